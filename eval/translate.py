"""A system's translations of test sets: sampled greedily here, or read from files."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from data.loading import hash_json, parsed
from eval.cli import identify_weights, locate_model
from eval.sets import TestSet
from judge import shown_translation
from model import load
from run.cache import JsonlCache, map_cached
from run.distributed import Ranks
from run.driver import make_sampler
from run.problem import load_codec
from run.settings import TEMPLATES
from sampler import Sampler


class System(NamedTuple):
    name: str
    model: str
    """A folder or hub id; empty when `files` hold its translations."""
    files: list[str]


def translate(
    args, device: torch.device, ranks: Ranks, system: System, test_sets: list[TestSet]
) -> dict[str, list[dict]]:
    """Rows by set. The model is loaded only if something is left to translate."""
    folder = ranks.rank0_then_all("fetch the model", lambda: locate_model(system.model))
    prompts = TEMPLATES[args.prompts]
    codec = load_codec(folder, args.chat)
    key = {"model": identify_weights(folder), "prompts": args.prompts, "chat": args.chat}
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    key |= {"max_new_tokens": args.max_new_tokens, "dtype": dtype}
    encoded = {t.file: codec.encode([prompts.ask(task) for task in t.tasks]) for t in test_sets}

    @cache
    def sampler() -> Sampler:
        model = load(folder, dtype=getattr(torch, dtype), device=device)
        longest = max(len(ids) for prompts in encoded.values() for ids in prompts)
        room = model.config.max_length - longest
        if args.max_new_tokens > room:
            raise ValueError(
                f"{system.name} has {model.config.max_length} positions, {longest} of them for the "
                f"longest prompt: --max-new-tokens {args.max_new_tokens} does not fit, at most "
                f"{room} does (--prompts {args.prompts})"
            )
        return make_sampler(model, args.max_num_seqs, longest + args.max_new_tokens)

    def translate_set(one: TestSet) -> list[dict]:
        def work(indices) -> list[dict]:
            groups = sampler().generate(
                [encoded[one.file][i] for i in indices], 1, args.max_new_tokens, 0.0,
                stop_ids=codec.stop_ids, keys=indices,
            )  # fmt: skip
            rows = []
            for i, (sample,) in zip(indices, groups, strict=True):
                text, readable = shown_translation(codec, prompts, one.tasks[i], sample)
                output = codec.decode(sample.ids[: len(sample.ids) - sample.stopped])
                row = {"segment": i, "translation": text, "readable": readable}
                rows.append(row | {"output": output, "tokens": len(sample.ids)})
            return rows

        def open_cache() -> JsonlCache:
            path = args.out / system.name / f"{one.file}.jsonl"
            return JsonlCache(path, key | {"set": hash_json(encoded[one.file])})

        what, count = f"{system.name} {one.entry}", len(one.tasks)
        return map_cached(
            ranks, open_cache, what, range(count), work, args.max_num_seqs * ranks.size
        )

    return {one.file: translate_set(one) for one in test_sets}


def read_translations(system: System, test_sets: list[TestSet]) -> dict[str, list[dict]]:
    """Somebody else's: a line a segment, or JSON rows with "translation"."""
    translations = {}
    for one, name in zip(test_sets, system.files, strict=True):
        path = Path(name).expanduser()
        parse = parse_translation if path.suffix == ".jsonl" else plain_translation
        rows = parse_lines(path, parse)
        if len(rows) != len(one.tasks):
            raise ValueError(
                f"--translations {name}: {len(rows)} translations, and {one.entry} has "
                f"{len(one.tasks)} segments"
            )
        translations[one.file] = [
            {"translation": row["translation"], "readable": row.get("readable")} for row in rows
        ]
    return translations


def parse_lines(path: Path, parse: Callable[[bytes], object]) -> list:
    rows = []
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        try:
            rows.append(parse(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


def plain_translation(line: bytes) -> dict:
    return {"translation": line.decode("utf-8-sig").removesuffix("\r")}


def parse_translation(line: bytes) -> dict:
    row = parsed(line)
    if not isinstance(row.get("translation"), str):
        raise ValueError('"translation" is missing, or no string')
    row["translation"].encode()  # raises for half of a surrogate pair
    return row
