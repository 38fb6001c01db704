"""A system's translations of test sets: made by our sampler, or read from somebody else's files."""

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import fingerprint
from eval.rows import Rows, in_rounds
from eval.sets import Set
from judge import shown_translation
from model import find_folder, load
from problem import TEMPLATES, load_texts
from ranks import Ranks
from sampler import Sampler
from toy.pretrain import Recipe, make


class System(NamedTuple):
    name: str
    model: str
    """A folder or hub id, or empty: `files` hold its translations."""
    files: list[str]


def translate(args, ranks: Ranks, system: System, chosen: list[Set], out: Path) -> dict[str, list]:
    """Rows by set. The model is loaded when there is something left to translate."""
    device = device_of(args)
    folder = ranks.one_first("fetch the model", lambda: folder_of(system.model))
    prompts = TEMPLATES[args.prompts]
    texts = load_texts(folder, prompts, args.chat)
    key = {"model": weights_of(folder), "prompts": args.prompts, "chat": args.chat}
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    key |= {"max_new_tokens": args.max_new_tokens, "dtype": dtype}
    asked = {one.file: texts.encode([prompts.ask(task) for task in one.tasks]) for one in chosen}
    loaded: list[Sampler] = []

    def sampler() -> Sampler:
        if not loaded:
            model = load(folder, dtype=getattr(torch, dtype), device=device)
            longest = max(len(p) for prompts in asked.values() for p in prompts)
            window = longest + args.max_new_tokens
            if window > model.config.max_length:
                room = model.config.max_length - longest
                raise ValueError(
                    f"{system.name} has {model.config.max_length} positions, {longest} of them for "
                    f"the longest prompt: --max-new-tokens {args.max_new_tokens} does not fit, at "
                    f"most {room} does (--prompts {args.prompts})"
                )
            loaded.append(Sampler(model, args.slots, window))
        return loaded[0]

    def translated(one: Set, numbers: list[int]) -> list[dict]:
        groups = sampler().generate(
            [asked[one.file][i] for i in numbers], 1, args.max_new_tokens, 0.0,
            stop_ids=texts.stop_ids, keys=numbers,
        )  # fmt: skip
        rows = []
        for i, (sample,) in zip(numbers, groups, strict=True):
            text, right = shown_translation(texts, prompts, one.tasks[i], sample)
            output = texts.decode(sample.ids[: len(sample.ids) - sample.stopped])
            row = {"segment": i, "translation": text, "readable": right}
            rows.append(row | {"output": output, "tokens": len(sample.ids)})
        return rows

    return {
        one.file: in_rounds(
            ranks, lambda one=one: Rows(out / system.name / f"{one.file}.jsonl",
                                        key | {"set or tokenizer": digest(asked[one.file])}),
            f"{system.name} {one.entry}", range(len(one.tasks)),
            lambda numbers, one=one: translated(one, numbers),
            size=args.slots * ranks.size,  # what is decoded together does not follow the clock
        )
        for one in chosen
    }  # fmt: skip


def read_translations(system: System, chosen: list[Set]) -> dict[str, list]:
    """Somebody else's: a line a segment, or JSON rows with "translation"."""
    found = {}
    for one, name in zip(chosen, system.files, strict=True):
        path = Path(name).expanduser()
        try:
            content = path.read_bytes().decode("utf-8-sig").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--translations {name}: cannot be read ({error})") from None
        lines = [line.removesuffix("\r") for line in content.split("\n")]
        rows = [{"translation": line} for line in lines]
        if path.suffix == ".jsonl":
            rows = [row_in(path, n, line) for n, line in enumerate(lines, 1)]
            rows = rows[1:] if "of" in rows[0] else rows
        if len(rows) != len(one.tasks):
            raise ValueError(
                f"--translations {name}: {len(rows)} translations, and {one.entry} has "
                f"{len(one.tasks)} segments"
            )
        if "segment" in rows[0]:  # one of our files, in which rounds may stand in any order
            rows.sort(key=lambda row: row["segment"])
        found[one.file] = [
            {"segment": i, "translation": row["translation"], "readable": row.get("readable")}
            for i, row in enumerate(rows)
        ]
    return found


def row_in(path: Path, number: int, line: str) -> dict:
    """With a "translation"; or the first line of a file that an evaluation wrote."""
    try:
        row = json.loads(line)
        if not (number == 1 and "of" in row) and not isinstance(row["translation"], str):
            raise ValueError("it is no string")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}, line {number}: not a JSON row with a "translation" ({error})'
        ) from None
    return row


def folder_of(model: str) -> Path:
    """ "toy", "toy1", …: the toy's pretrained model of that seed, made when it is not there."""
    toy = re.fullmatch(r"toy(\d*)", model)
    if toy and not (Path(model) / "config.json").exists():  # toy/ is also a folder of ours
        return make(Recipe(seed=int(toy[1] or 0)))
    return find_folder(model)


def device_of(args: argparse.Namespace) -> torch.device:
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name} is not there: use cpu")
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def weights_of(folder: Path) -> str:
    """Which model: its weights and its config, wherever they lie."""
    return f"{fingerprint(folder)} {digest([(folder / 'config.json').read_text()])}"


def digest(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]
