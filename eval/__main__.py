"""The paper's table: translate test sets, score them, print a row for each system.

    python -m eval --model runs/7b/best --sets wmt23:zh-en,flores200:en-zh --metrics bleu,chrf
    torchrun --nproc_per_node=8 -m eval --model base=Qwen/Qwen2.5-7B --model ours=runs/7b/best
    python -m eval --translations theirs=a.txt,b.txt --sets wmt23:zh-en,mine.jsonl

Sets: eval/sets.py; by default the paper's six. Metrics: bleu, chrf, and COMET checkpoints by a
short name (eval/comet.py), a hub id or a folder; NAME=CHECKPOINT names the column. Each system is a
row, compared with the first.

Translations are greedy, and read as the reward reads them. Unreadable output is scored verbatim and
counted; dropping it would inflate scores. Everything is kept under --out and never done again: the
same command continues after an interruption, or adds a set, a metric or a system.

    OUT/SYSTEM/SET.jsonl            a row for each translated segment
    OUT/SYSTEM/SET.METRIC.jsonl     COMET's scores
    OUT/SYSTEM/SET.segments.jsonl   both together, with sentence BLEU and chrF
    OUT/table.md, table.json        the table
"""

import argparse
import contextlib
import gc
import json
import os
import re
import signal
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # as in ssr.py
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from data.languages import describe_language_check, is_plausible_translation
from data.loading import code_pair, hash_json, split_entries
from eval import cli, sets, table
from eval.comet import DTYPES, NAMES, Comet, comet_rows, find_python, where
from eval.score import SACREBLEU, Result, mean_score
from eval.sets import TestSet
from eval.translate import System, read_translations, translate
from judge import Task
from rewards.build import checkpoint_id
from run.cache import JsonlCache, map_cached
from run.distributed import Ranks, init_distributed, run_with_error_reporting
from run.folder import atomic_write
from run.settings import CHAT, TEMPLATES

PAPER_SETS = "wmt23:zh-en,wmt24:zh-en,flores200:zh-en,wmt23:en-zh,wmt24:en-zh,flores200:en-zh"


class Metric(NamedTuple):
    name: str
    checkpoint: str
    """Empty for sacreBLEU's metrics."""

    def needs_references(self) -> bool:
        return not self.checkpoint or where(self.checkpoint) == NAMES["comet22"]


# ------------------------------------------------------------------------------ the command line


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    option = parser.add_argument
    option("--model", action="append", default=[], help="[NAME=]folder, hub id or toy; repeatable")
    option("--translations", action="append", default=[], help="[NAME=]FILE,…: one for each set")
    option("--sets", default=PAPER_SETS, help="separated by commas (default: the paper's)")
    option("--metrics", default="cometkiwi-xxl,xcomet-xxl", help="default: %(default)s")
    option("--out", type=Path, default=Path("runs/eval"), help="default: %(default)s")
    option("--compare", action="store_true", help="add the paper's rows to the table")
    option("--first", type=cli.positive, help="only this many segments of each set")
    option("--prompts", choices=list(TEMPLATES), default="paper", help="default: %(default)s")
    option("--chat", default=False, help="use the tokenizer's chat template", **CHAT)
    option("--max-new-tokens", type=cli.positive, default=1024, help="default: %(default)s")
    option("--max-num-seqs", "--slots", type=cli.positive, default=64,
           help="sequences decoded together")  # fmt: skip
    option("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    option("--comet-dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.model and not args.translations:
        raise ValueError("nothing to evaluate: give --model or --translations (--help shows how)")
    if args.compare and args.first:
        raise ValueError("--compare with --first: the published numbers are for whole sets")
    return args


def split_name(text: str) -> tuple[str, str]:
    name, equals, rest = text.partition("=")
    return (name, rest) if equals and "/" not in name else ("", text)


def load_sets(args: argparse.Namespace) -> list[TestSet]:
    test_sets: dict[str, TestSet] = {}  # by file name
    for entry in split_entries(args.sets):
        segments: dict[str, list[Task]] = {}
        for task in sets.load_set(entry):
            segments.setdefault(code_pair((task.source, task.target)), []).append(task)
        for direction, tasks in segments.items():
            label = cli.slug(sets.label(entry))
            file = f"{label}.{cli.slug(direction)}" + (f".first{args.first}" if args.first else "")
            if file in test_sets:
                raise ValueError(f"--sets has two called {label} {direction}: rename a file")
            test_sets[file] = TestSet(entry, label, direction, tasks[: args.first], file)
    if not test_sets:
        raise ValueError("--sets is empty")
    return [*test_sets.values()]


def parse_metrics(args: argparse.Namespace, test_sets: list[TestSet]) -> list[Metric]:
    metrics: dict[str, Metric] = {}
    for text in filter(None, (w.strip() for w in args.metrics.split(","))):
        name, checkpoint = split_name(text)
        if text in SACREBLEU:
            name, checkpoint = text, ""
        elif checkpoint in NAMES or "/" in checkpoint:
            checkpoint_id(checkpoint)  # refuses a path where there is nothing
        else:
            raise ValueError(
                f"--metrics {text} is unknown: use {', '.join(SACREBLEU)}, COMET's "
                f"{', '.join(NAMES)}, its hub ids and folders"
            )
        name = cli.slug(name or checkpoint.rstrip("/").rpartition("/")[2])
        if name in metrics or name == "segments" or (checkpoint and name in SACREBLEU):
            raise ValueError(f"--metrics: the name {name} is taken: use NAME=CHECKPOINT")
        metrics[name] = Metric(name, checkpoint)
        for one in test_sets if metrics[name].needs_references() else []:
            lacking = [i for i, task in enumerate(one.tasks, 1) if not task.reference]
            if lacking:
                raise ValueError(
                    f"{name} needs references, and {one.entry} has none for segment {lacking[0]} "
                    f"({len(lacking)} in all lack one)"
                )
    if not metrics:
        raise ValueError("--metrics is empty")
    if any(metric.checkpoint for metric in metrics.values()):
        find_python()  # raises before hours of translating if COMET is not installed
    return [*metrics.values()]


def parse_systems(args: argparse.Namespace, test_sets: list[TestSet]) -> list[System]:
    systems = []
    for text in args.model:
        name, model = split_name(text)
        folder = Path(model).expanduser()
        is_hub_id = not folder.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", model)
        if not (is_hub_id or re.fullmatch(r"toy\d*", model) or (folder / "config.json").is_file()):
            raise ValueError(
                f"--model {text}: there is no {folder / 'config.json'} (a run's weights are in "
                "last/, and in best/ if a step was better than the start)"
            )
        systems.append(System(cli.slug(name or folder.resolve().name), model, []))
    for text in args.translations:
        name, files = split_name(text)
        name, files = name or Path(files.split(",")[0]).stem, files.split(",")
        if Path(files[0]).is_dir():
            files = [f"{files[0]}/{one.file}.segments.jsonl" for one in test_sets]
        if len(files) != len(test_sets):
            raise ValueError(
                f"--translations {text}: {len(files)} files for {len(test_sets)} sets; give one "
                "for each, in the order of --sets, or a folder that an evaluation wrote"
            )
        systems.append(System(cli.slug(name), "", files))
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1 or not name.strip("._"):
            raise ValueError(f"the system name {name!r} is taken or no name: use NAME=FOLDER")
    return systems


# --------------------------------------------------------------------------------------- scoring


def score_systems(
    args, device: torch.device, ranks: Ranks, metric: Metric, systems: list[System],
    test_sets: list[TestSet], translations: dict[str, dict[str, list[dict]]],
) -> dict[tuple[str, str], Result]:  # fmt: skip
    """Results by system and set."""
    with contextlib.ExitStack() as stack:

        @cache
        def comet() -> Comet:
            """Started only if something is left to score."""
            worker = Comet(metric.checkpoint, str(device), args.comet_dtype, 16,
                           start_limit=0.9 * cli.HANG_TIMEOUT)  # fmt: skip
            stack.enter_context(worker).ready()
            return worker

        results = {}
        for system in systems:
            for one in test_sets:
                texts = [row["translation"] for row in translations[system.name][one.file]]
                if metric.checkpoint:
                    file = args.out / system.name / f"{one.file}.{metric.name}.jsonl"
                    result = score_with_comet(args, ranks, metric, comet, one.tasks, texts, file)
                else:
                    result = SACREBLEU[metric.name](one.tasks, texts)
                results[system.name, one.file] = result
        return results


def score_with_comet(
    args, ranks: Ranks, metric: Metric, comet, tasks: list[Task], texts: list[str], file: Path
) -> Result:
    with_references = all(task.reference for task in tasks)
    pairs = comet_rows(tasks, texts, with_references)
    key = {"checkpoint": checkpoint_id(metric.checkpoint), "dtype": args.comet_dtype}
    key |= {"translation, source or reference": hash_json(pairs)}
    opened: list[JsonlCache] = []  # by rank 0 only

    def open_cache() -> JsonlCache:
        def describe() -> dict:
            about = comet().about
            return about | {"references": with_references and about["takes_reference"]}

        opened.append(JsonlCache(file, key, describe, replace=True))
        return opened[0]

    def work(indices) -> list[dict]:
        scores = comet().score([pairs[i] for i in indices])
        return [{"segment": i, "score": x} for i, x in zip(indices, scores, strict=True)]

    what = f"{file.parent.name} {file.stem}"
    rows = map_cached(ranks, open_cache, what, range(len(pairs)), work, 64 * ranks.size)
    about = ranks.on_rank0("read", lambda: opened[0].about)
    revision = f" at {about['revision'][:12]}" if about.get("revision") else ""
    signature = (
        f"{about['checkpoint']}{revision} ({about['class']}), unbabel-comet {about['comet']}, "
        f"{about['dtype']}, {'with' if about['references'] else 'without'} references"
    )
    return mean_score([row["score"] for row in rows], signature)


# ------------------------------------------------------------------------------------ the report


def print_results(
    args, systems: list[System], test_sets: list[TestSet], results, translations
) -> None:
    """Write and print the table; `results` by metric, system and set."""
    columns: dict[str, dict] = {}
    unreadable: dict[str, dict] = {}
    wrong_language, wrong_notes = {}, []
    for system in systems:
        columns[system.name] = {
            table.Column(one.direction, one.label, metric): by_set[system.name, one.file]
            for one in test_sets
            for metric, by_set in results.items()
        }
        unreadable[system.name] = {}
        for one in test_sets:
            rows = translations[system.name][one.file]
            readable = [row["readable"] for row in rows if row["readable"] is not None]
            share = 1 - sum(readable) / len(readable) if readable else None
            unreadable[system.name][one.direction, one.label] = share
            wrong = [
                row["readable"] is not False
                and not is_plausible_translation(row["translation"], task)
                for row, task in zip(rows, one.tasks, strict=True)
            ]
            share, name = sum(wrong) / len(wrong), f"{system.name} {one.direction}/{one.label}"
            wrong_language[name] = share
            if share:
                i = wrong.index(True)
                text = " ".join(rows[i]["translation"].split())[:80]
                wrong_notes.append(f"wrong language: {name} {share:.1%}, e.g. segment {i}: {text}")
            write_segments(args.out, system, one, rows, wrong, results)
    rows = table.make_rows(columns, unreadable)
    if args.compare:
        rows = table.published(rows[0].cells) + rows
    signatures = {
        metric: list(dict.fromkeys(result.signature for result in by_set.values()))
        for metric, by_set in results.items()
    }
    notes = [f"{metric}: {'; '.join(texts)}" for metric, texts in signatures.items()]
    notes += [
        "Avg: the plain mean of the direction's COMET columns",
        "±: half of the 95% bootstrap interval; unreadable: outputs without a readable answer, "
        "scored as they are",
        f"↑ ↓: better or worse than {systems[0].name} with p < 0.05 (paired bootstrap); none if a "
        f"set has fewer than {table.TOO_FEW} segments",
        *wrong_notes,
    ] + [f"Only the first {args.first} segments of each set"] * bool(args.first)
    text = f"{table.to_markdown(rows)}\n\n" + "".join(f"- {note}\n" for note in notes)
    about = {"metrics": signatures, "sets": {one.entry: len(one.tasks) for one in test_sets}}
    about |= {"wrong_language": wrong_language}
    atomic_write(args.out / "table.md", text)
    atomic_write(args.out / "table.json", table.to_json(rows, about | {"command": sys.argv}))
    print(f"\n{text}\n{args.out}/: table.md, table.json, and a folder for each system")


def write_segments(
    out: Path, system: System, one: TestSet, rows: list[dict], wrong: list[bool], results
) -> None:
    lines = []
    for i, (task, row) in enumerate(zip(one.tasks, rows, strict=True)):
        scores = {m: by_set[system.name, one.file].segments[i] for m, by_set in results.items()}
        line = {"segment": i} | {k: v for k, v in task._asdict().items() if v is not None}
        line |= {k: row[k] for k in ("translation", "readable")}
        line |= {"wrong_language": wrong[i], "scores": scores}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (out / system.name).mkdir(parents=True, exist_ok=True)
    atomic_write(out / system.name / f"{one.file}.segments.jsonl", "".join(lines))


def evaluate(argv: list[str]) -> None:
    args = parse(argv)
    device, ranks = init_distributed(cli.HANG_TIMEOUT)
    test_sets = ranks.on_rank0("read the sets", lambda: load_sets(args))
    print(describe_language_check(task.target for one in test_sets for task in one.tasks))
    metrics = parse_metrics(args, test_sets)
    systems = parse_systems(args, test_sets)
    segments = sum(len(one.tasks) for one in test_sets)
    print(f"systems: {len(systems)}, sets: {len(test_sets)}, segments: {segments:,}, metrics: "
          f"{len(metrics)}; writing {args.out}", flush=True)  # fmt: skip
    translations = {s.name: read_translations(s, test_sets) for s in systems if s.files}
    for system in systems:
        if system.model:
            translations[system.name] = translate(args, device, ranks, system, test_sets)
            gc.collect()  # the model, to make room for the next one and COMET
            torch.cuda.empty_cache()
    results = {
        metric.name: score_systems(args, device, ranks, metric, systems, test_sets, translations)
        for metric in metrics
    }
    ranks.ending = True
    ranks.on_rank0("report", lambda: print_results(args, systems, test_sets, results, translations))


def main(argv: list[str]) -> None:
    run_with_error_reporting("python -m eval", lambda: evaluate(argv), cli.HINT)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main(sys.argv[1:])
