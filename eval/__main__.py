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
from itertools import product
from pathlib import Path

if __name__ == "__main__":  # as in ssr.py
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from data.languages import describe_language_check, is_plausible_translation
from data.loading import code_pair, hash_json, split_entries
from eval import cli, sets, table
from eval.comet import DTYPES, NAMES, Comet, comet_rows, find_python, where
from eval.score import SACREBLEU, Result, mean_score
from eval.sets import TestSet
from eval.table import Column
from eval.translate import System, read_translations, translate
from judge import Task
from rewards.build import checkpoint_id
from run.cache import JsonlCache, map_cached
from run.distributed import Ranks, init_distributed, run_with_error_reporting
from run.folder import atomic_write
from run.settings import CHAT, TEMPLATES

PAPER_SETS = "wmt23:zh-en,wmt24:zh-en,flores200:zh-en,wmt23:en-zh,wmt24:en-zh,flores200:en-zh"


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
    option("--max-num-seqs", type=cli.positive, default=64, help="sequences decoded together")
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


def parse_metrics(args: argparse.Namespace, test_sets: list[TestSet]) -> dict[str, str]:
    """Name -> checkpoint of COMET's, empty for sacreBLEU's metrics."""
    metrics: dict[str, str] = {}
    for text in split_entries(args.metrics):
        name, checkpoint = (text, "") if text in SACREBLEU else split_name(text)
        path = "" if text in SACREBLEU else where(checkpoint)  # refuses what is none
        name = cli.slug(name or checkpoint.rstrip("/").rpartition("/")[2])
        if name in metrics:
            raise ValueError(f"--metrics: the name {name} is taken: use NAME=CHECKPOINT")
        metrics[name] = checkpoint
        for one in test_sets if path in ("", NAMES["comet22"]) else []:
            lacking = [i for i, task in enumerate(one.tasks, 1) if not task.reference]
            if lacking:
                raise ValueError(
                    f"{name} needs references, and {one.entry} has none for segment {lacking[0]} "
                    f"({len(lacking)} in all lack one)"
                )
    if any(metrics.values()):
        find_python()  # raises before hours of translating if COMET is not installed
    return metrics


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
    if taken := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two systems are called {taken[0]}: use NAME=FOLDER")
    return systems


# --------------------------------------------------------------------------------------- scoring

Translations = dict[str, dict[str, list[dict]]]  # by system and set's file: a row a segment
Results = dict[str, dict[Column, Result]]  # by system


def score_systems(
    args, device: torch.device, ranks: Ranks, metrics: dict[str, str], systems: list[System],
    test_sets: list[TestSet], translations: Translations,
) -> Results:  # fmt: skip
    columns = [column_of(one, name) for one in test_sets for name in metrics]
    results = {system.name: dict.fromkeys(columns) for system in systems}
    for name, checkpoint in metrics.items():
        comet = contextlib.nullcontext()
        if checkpoint:
            limit = 0.9 * cli.HANG_TIMEOUT
            comet = Comet(checkpoint, str(device), args.comet_dtype, 16, start_limit=limit)
        with comet:
            for system, one in product(systems, test_sets):
                texts = [row["translation"] for row in translations[system.name][one.file]]
                if checkpoint:
                    file = args.out / system.name / f"{one.file}.{name}.jsonl"
                    result = score_with_comet(args, ranks, comet, one.tasks, texts, file)
                else:
                    result = SACREBLEU[name](one.tasks, texts)
                results[system.name][column_of(one, name)] = result
    return results


def column_of(one: TestSet, metric: str) -> Column:
    return Column(one.direction, one.label, metric)


def score_with_comet(
    args, ranks: Ranks, comet: Comet, tasks: list[Task], texts: list[str], file: Path
) -> Result:
    """The worker starts only if something is left to score."""
    with_references = all(task.reference for task in tasks)
    pairs = comet_rows(tasks, texts, with_references)
    key = {"checkpoint": checkpoint_id(comet.checkpoint), "dtype": args.comet_dtype}
    key |= {"source, translation or reference": hash_json(pairs)}

    def work(indices) -> list[dict]:
        scores = comet.score([pairs[i] for i in indices])
        by = describe_scorer(comet.about, with_references)
        return [
            {"segment": i, "score": score, "by": by}
            for i, score in zip(indices, scores, strict=True)
        ]

    rows = map_cached(
        ranks, lambda: JsonlCache(file, key, replace=True), f"{file.parent.name} {file.stem}",
        range(len(pairs)), work, 64 * ranks.size,
    )  # fmt: skip
    signatures = dict.fromkeys(row["by"] for row in rows)
    return mean_score([row["score"] for row in rows], "; ".join(signatures))


def describe_scorer(about: dict, with_references: bool) -> str:
    revision = f" at {about['revision'][:12]}" if about["revision"] else ""
    has_references = "with" if with_references and about["takes_reference"] else "without"
    return (
        f"{about['checkpoint']}{revision} ({about['class']}), unbabel-comet {about['comet']}, "
        f"{about['dtype']}, {has_references} references"
    )


# ------------------------------------------------------------------------------------ the report


def print_results(
    args, systems: list[System], test_sets: list[TestSet], translations: Translations,
    results: Results,
) -> None:  # fmt: skip
    """Write and print the table, and write a file of segments for each system and set."""
    unreadable = {system.name: {} for system in systems}
    wrong_notes = []
    for system, one in product(systems, test_sets):
        rows = translations[system.name][one.file]
        readable = [row["readable"] for row in rows]
        share = None if None in readable else 1 - sum(readable) / len(readable)
        unreadable[system.name][one.direction, one.label] = share
        wrong = [
            row["readable"] is not False and not is_plausible_translation(row["translation"], task)
            for row, task in zip(rows, one.tasks, strict=True)
        ]
        if any(wrong):
            i = wrong.index(True)
            text = " ".join(rows[i]["translation"].split())[:80]
            where_found = f"{system.name} {one.direction}/{one.label} {sum(wrong) / len(wrong):.1%}"
            wrong_notes.append(f"wrong language: {where_found}, e.g. segment {i}: {text}")
        write_segments(args.out / system.name, one, rows, wrong, results[system.name])
    rows = table.make_rows(results, unreadable)
    signatures: dict[str, dict[str, None]] = {}  # by metric
    for column, result in (pair for columns in results.values() for pair in columns.items()):
        signatures.setdefault(column.metric, {})[result.signature] = None
    notes = [
        *(f"{metric}: {'; '.join(texts)}" for metric, texts in signatures.items()),
        "Avg: the plain mean of the direction's COMET columns",
        "±: half of the 95% bootstrap interval; unreadable: outputs without a readable answer, "
        "scored as they are",
        f"↑ ↓: better or worse than {systems[0].name} with p < 0.05 (paired bootstrap); none if a "
        f"set has fewer than {table.TOO_FEW} segments",
        *wrong_notes,
        *[f"Only the first {args.first} segments of each set"] * bool(args.first),
    ]
    about = {"metrics": {metric: [*texts] for metric, texts in signatures.items()}}
    about |= {"sets": {one.entry: len(one.tasks) for one in test_sets}}
    atomic_write(args.out / "table.json", table.to_json(rows, about | {"command": sys.argv}))
    if args.compare:
        rows = table.published(rows[0].cells) + rows
    text = f"{table.to_markdown(rows)}\n\n" + "".join(f"- {note}\n" for note in notes)
    atomic_write(args.out / "table.md", text)
    print(f"\n{text}\n{args.out}/: table.md, table.json, and a folder for each system")


def write_segments(
    folder: Path, one: TestSet, rows: list[dict], wrong: list[bool], results: dict[Column, Result]
) -> None:
    scores = {column.metric: result.segments for column, result in results.items()
              if column == column_of(one, column.metric)}  # fmt: skip
    lines = []
    for i, (task, row) in enumerate(zip(one.tasks, rows, strict=True)):
        line = {"segment": i} | {k: v for k, v in task._asdict().items() if v is not None}
        line |= {k: row[k] for k in ("translation", "readable")}
        line |= {"wrong_language": wrong[i], "scores": {k: v[i] for k, v in scores.items()}}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / f"{one.file}.segments.jsonl", "".join(lines))


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
    results = score_systems(args, device, ranks, metrics, systems, test_sets, translations)
    ranks.ending = True
    ranks.on_rank0("report", lambda: print_results(args, systems, test_sets, translations, results))


def main(argv: list[str]) -> None:
    run_with_error_reporting("python -m eval", lambda: evaluate(argv), cli.HINT)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main(sys.argv[1:])
