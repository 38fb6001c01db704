"""The paper's table: translate test sets, score them, print a row for each system.

    python -m eval --model runs/7b/best --sets wmt23:zh-en,flores200:en-zh --metrics bleu,chrf
    torchrun --nproc_per_node=8 -m eval --model base=Qwen/Qwen2.5-7B --model ours=runs/7b/best
    python -m eval --translations theirs=a.txt,b.txt --sets wmt23:zh-en,mine.jsonl
    python -m eval --help

Sets, by default the paper's six: see eval/sets.py. Metrics: bleu, chrf, and COMET checkpoints by a
short name (eval/comet.py), a hub id or a folder; NAME=CHECKPOINT names its column, and :no-ref
behind it hides the references from one that could use them. Each system is a row; the first is the
one that the others are compared with. The table holds what a command names, and no more.

Translations are greedy, and read as the reward reads them. What cannot be read is scored as it is
and counted: to leave it out would flatter. All of it lies under --out, and what is there is not
done again: the same command goes on after an interruption, or adds a set, a metric or a system.

    OUT/SYSTEM/SET.jsonl            a row a segment, as it was translated
    OUT/SYSTEM/SET.METRIC.jsonl     COMET's scores
    OUT/SYSTEM/SET.segments.jsonl   both beside each other, with sentence BLEU and chrF
    OUT/table.md, .csv, .json       the table
"""

import argparse
import difflib
import gc
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # as ssr.py does
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from data import code_pair, split_entries
from eval import sets, table
from eval.comet import NAMES, Comet, python_of, rows_of, where
from eval.rows import Rows, in_rounds, whole
from eval.score import SACREBLEU, Found, mean_of
from eval.sets import Set
from eval.translate import System, device_of, digest, read_translations, translate
from judge import Task
from problem import TEMPLATES, stamp
from ranks import Ranks, is_lost, join, leave

PAPER_SETS = "wmt23:zh-en,wmt24:zh-en,flores200:zh-en,wmt23:en-zh,wmt24:en-zh,flores200:en-zh"


class Metric(NamedTuple):
    name: str
    checkpoint: str
    """Empty: it is sacreBLEU's."""
    references: bool


# ------------------------------------------------------------------------------ what is asked


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    option = parser.add_argument
    option(
        "--model", action="append", default=[], help="[NAME=]folder, hub id or toy; once a system"
    )
    option(
        "--translations",
        action="append",
        default=[],
        help="[NAME=]FILE,…: one for each set, a line or JSON row a segment; or a folder of OUT",
    )
    option("--sets", default=PAPER_SETS, help="with commas between them (default: the paper's)")
    option("--metrics", default="cometkiwi-xxl,xcomet-xxl", help="default: the paper's")
    option("--out", default="runs/eval", help="folder of all that is written")
    option("--compare", action="store_true", help="add the paper's rows to the table")
    option("--first", type=int, default=0, help="only this many segments of each set, to try it")
    option("--prompts", choices=list(TEMPLATES), default="paper")
    option("--chat", action="store_true", help="set them in the tokenizer's chat template")
    option("--max-new-tokens", type=int, default=1024)
    option("--slots", type=int, default=64, help="sequences that are decoded together")
    option("--device", default="", help="cpu or cuda; default: a GPU if there is one")
    option("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    option("--comet-dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    option("--comet-batch", type=int, default=16, help="translations that COMET scores together")
    option("--patience", type=float, default=7200.0, help="seconds to wait for a rank or COMET")
    args = parser.parse_args(words)
    if not args.model and not args.translations:
        raise ValueError("nothing to evaluate: give --model or --translations (--help shows how)")
    for name in ("max_new_tokens", "slots", "comet_batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if args.compare and args.first:
        raise ValueError("--compare with --first: what was published is of whole sets")
    if args.first < 0:
        raise ValueError(f"--first {args.first} must be at least 1")
    return args


def needs_references(metric: Metric) -> bool:
    if not metric.checkpoint:
        return True
    hparams = Path(metric.checkpoint).expanduser() / "hparams.yaml"
    if hparams.is_file():  # else it is found out when it is loaded
        return bool(
            re.search(r"class_identifier: (regression|ranking)_metric", hparams.read_text())
        )
    return where(metric.checkpoint) == NAMES["comet22"]


def systems_of(args: argparse.Namespace, chosen: list[Set]) -> list[System]:
    found = []
    for words in args.model:
        name, model = named(words)
        check_model(args, words, model)
        found.append(System(name or Path(model).resolve().name, model, []))
    for words in args.translations:
        name, files = named(words)
        name, files = name or Path(files.split(",")[0]).stem, files.split(",")
        if Path(files[0]).is_dir():
            files = [str(Path(files[0]) / f"{one.file}.jsonl") for one in chosen]
        if len(files) != len(chosen):
            raise ValueError(
                f"--translations {words}: {len(files)} files for {len(chosen)} sets; give one for "
                "each, in the order of --sets, or a folder that an evaluation wrote"
            )
        found.append(System(name, "", files))
    names = [slug(system.name) for system in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two systems are called {name}: name them, --model NAME=FOLDER")
    return [s._replace(name=name) for s, name in zip(found, names, strict=True)]


def check_model(args: argparse.Namespace, words: str, model: str) -> None:
    """What is no model's folder is said before any other model is at work."""
    folder = Path(model).expanduser()
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        return  # an id of the hub
    if not (folder / "config.json").is_file() and not re.fullmatch(r"toy\d*", model):
        best = folder / "best"
        hint = f"; did you mean {best}?" if (best / "config.json").is_file() else ""
        if folder.name == "best" and (folder.parent / "result.json").is_file():
            hint = f": no step of that run was better than its start; {folder.parent / 'last'} has "
            hint += "the last step's weights"
        raise ValueError(f"--model {words}: there is no {folder / 'config.json'}{hint}")
    settings = folder.parent / "settings.json"
    if settings.is_file():
        had = json.loads(settings.read_text())
        for name in ("prompts", "chat"):
            if name in had and had[name] != getattr(args, name):
                print(f"Note: {words} was trained with {name} {had[name]}, and is asked with "
                      f"{name} {getattr(args, name)}")  # fmt: skip


def slug(name: str) -> str:
    """Names become names of files."""
    found = re.sub(r"[^\w.-]+", "_", name)
    if not found.strip("._"):
        raise ValueError(f"{name!r} is no name for a file: use NAME=…")
    return found


def named(words: str) -> tuple[str, str]:
    name, equals, rest = words.partition("=")
    return (name, rest) if equals and "/" not in name else ("", words)


def sets_of(args: argparse.Namespace) -> list[Set]:
    found = []
    for entry in split_entries(args.sets):
        segments: dict[str, list[Task]] = {}
        for task in sets.load(entry):
            segments.setdefault(code_pair((task.source, task.target)), []).append(task)
        for direction, tasks in segments.items():
            label = slug(sets.label(entry))
            file = f"{label}.{slug(direction)}" + (f".first{args.first}" if args.first else "")
            found.append(Set(entry, label, direction, tasks[: args.first or None], file))
    if not found:
        raise ValueError("--sets names none")
    for one in found:
        if [s.file.casefold() for s in found].count(one.file.casefold()) > 1:
            raise ValueError(f"--sets has two called {one.label} {one.direction}: rename a file")
    return found


def metrics_of(args: argparse.Namespace, chosen: list[Set]) -> list[Metric]:
    found = []
    for words in filter(None, (w.strip() for w in args.metrics.split(","))):
        shown = not words.endswith(":no-ref")
        name, checkpoint = named(words.removesuffix(":no-ref"))
        plain = words in SACREBLEU
        if not plain and (checkpoint in SACREBLEU or name in SACREBLEU):
            raise ValueError(f"--metrics {words}: bleu and chrf are sacreBLEU's, under these names")
        if not plain and checkpoint not in NAMES and "/" not in checkpoint:
            near = difflib.get_close_matches(checkpoint, [*SACREBLEU, *NAMES], 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"--metrics {checkpoint} is unknown: {hint}There are {', '.join(SACREBLEU)}, "
                f"COMET's {', '.join(NAMES)}, its ids of the hub and its folders"
            )
        if not plain:
            stamp(checkpoint)  # refuses a path with nothing there
        label = checkpoint.rstrip("/").rpartition("/")[2] + ("" if shown else "-no-ref")
        found.append(Metric(slug(name or label), "" if plain else checkpoint, shown))
    if not found:
        raise ValueError("--metrics names none")
    for metric in found:
        if [m.name for m in found].count(metric.name) > 1 or metric.name == "segments":
            raise ValueError(f"a metric cannot be called {metric.name}: name it NAME=CHECKPOINT")
        for one in chosen if needs_references(metric) else []:
            lacking = [i for i, task in enumerate(one.tasks, 1) if not task.reference]
            if lacking:
                raise ValueError(
                    f"{metric.name} needs references, and {one.entry} has none for segment "
                    f"{lacking[0]} ({len(lacking)} in all lack one)"
                )
    if any(metric.checkpoint for metric in found):
        python_of()  # before hours of translating: says how to install it
    return found


# ------------------------------------------------------------------------------------- scoring


def score(
    args, ranks: Ranks, metric: Metric, systems: list[System], chosen: list[Set], done: dict,
    out: Path,
) -> dict[tuple[str, str], Found]:  # fmt: skip
    """By system and set."""
    started: list[Comet] = []

    def comet() -> Comet:
        """Started when there is something left to score."""
        if not started:
            limit = 0.9 * args.patience  # before a rank that waits for it is given up
            started.append(Comet(metric.checkpoint, str(device_of(args)), args.comet_dtype,
                                 args.comet_batch, start_limit=limit))  # fmt: skip
            started[0].ready()
        return started[0]

    found = {}
    try:
        for system in systems:
            for one in chosen:
                texts = [row["translation"] for row in done[system.name][one.file]]
                if not metric.checkpoint:
                    scores = SACREBLEU[metric.name](one.tasks, texts)
                else:
                    file = out / system.name / f"{one.file}.{metric.name}.jsonl"
                    what = f"{metric.name} of {system.name} {one.entry}"
                    scores = with_comet(args, ranks, metric, one.tasks, texts, comet, file, what)
                found[system.name, one.file] = scores
    finally:
        for worker in started:
            worker.close()
    return found


def with_comet(
    args, ranks: Ranks, metric: Metric, tasks: list[Task], texts: list[str],
    comet: Callable[[], Comet], file: Path, what: str,
) -> Found:  # fmt: skip
    shown = metric.references and all(task.reference for task in tasks)
    rows = rows_of(tasks, texts, shown)
    key = {"checkpoint": stamp(metric.checkpoint), "dtype": args.comet_dtype}
    key |= {"translation, source or reference": digest(rows)}
    opened: list[Rows] = []

    def open_file() -> Rows:
        opened.append(Rows(file, key, anew=True))
        return opened[0]

    def work(numbers: list[int]) -> list[dict]:
        scores = comet().score([rows[i] for i in numbers])
        return [{"segment": i, "score": x} for i, x in zip(numbers, scores, strict=True)]

    def about() -> dict:
        known = comet().about
        had = opened[0].about.get("revision", known["revision"])  # of a file that is continued
        if had != known["revision"]:
            raise ValueError(
                f"{file}: {metric.checkpoint} was at revision {had}, the hub now gives "
                f"{known['revision']}: remove the file, and all is scored by the new one"
            )
        return known | {"references": shown and known["takes_reference"]}

    scored = in_rounds(ranks, open_file, what, range(len(rows)), work, about)
    said = ranks.on_first("read", lambda: opened[0].about)
    return mean_of([row["score"] for row in scored], words_about(said))


def words_about(about: dict) -> str:
    revision = f" at {about['revision'][:12]}" if about.get("revision") else ""
    refs = "with references" if about["references"] else "without references"
    return (
        f"{about['checkpoint']}{revision} ({about['class']}), unbabel-comet {about['comet']}, "
        f"{about['dtype']}, {refs}"
    )


# -------------------------------------------------------------------------------------- the end


def report(args, systems, chosen: list[Set], metrics: list[Metric], done: dict, found: dict,
           out: Path) -> None:  # fmt: skip
    columns: dict[str, dict] = {}
    shares: dict[str, dict] = {}
    for system in systems:
        columns[system.name] = {
            table.Column(one.direction, one.label, m.name): found[m.name][system.name, one.file]
            for one in chosen
            for m in metrics
        }
        shares[system.name] = {}
        for one in chosen:
            rows = done[system.name][one.file]
            known = [row["readable"] for row in rows if row["readable"] is not None]
            share = 1 - sum(known) / len(known) if known else None
            shares[system.name][one.direction, one.label] = share
            write_segments(system, one, rows, found, out)
    rows = table.rows_of(columns, shares)
    if args.compare:
        theirs = table.published(rows[0].cells)
        if not theirs:
            print("--compare: nothing was published of these sets and metrics")
        rows = theirs + rows
    told = {}
    for m in metrics:
        for words in dict.fromkeys(x.about for x in found[m.name].values()):
            told.setdefault(m.name, []).append(words)
    notes = [f"- {name}: {'; '.join(words)}" for name, words in told.items()]
    if of := table.averaged(told):
        notes.append(f"- Avg: the plain mean of the direction's columns of {', '.join(of)}")
    notes.append(
        "- ±: half of the 95% bootstrap interval; unreadable: outputs without a readable answer, "
        "scored as they are"
    )
    if len(systems) > 1:
        notes.append(
            f"- ↑ ↓: better or worse than {systems[0].name} with p < 0.05 (paired bootstrap)"
        )
        if any(len(one.tasks) < table.FEW for one in chosen):
            notes.append(f"- No arrows: a set has fewer than {table.FEW} segments")
    for i, one in enumerate(systems):
        outputs = [[row["translation"] for row in rows] for rows in done[one.name].values()]
        for other in systems[:i]:
            theirs = [[row["translation"] for row in rows] for rows in done[other.name].values()]
            if outputs == theirs:
                notes.append(f"- {one.name} and {other.name} gave the same translation of every "
                             "segment: are they the same weights?")  # fmt: skip
    if args.first:
        notes.append(f"- Only the first {args.first} segments of each set")
    text = table.markdown(rows) + "\n\n" + "\n".join(notes) + "\n"
    with whole(out / "table.md") as file:
        file.write(text)
    table.as_csv(rows, out / "table.csv")
    about = {"metrics": told, "sets": {one.entry: len(one.tasks) for one in chosen}}
    table.as_json(rows, about | {"command": sys.argv}, out / "table.json")
    print(f"\n{text}\n{out}/: table.md, table.csv, table.json, and a folder a system")


def write_segments(system: System, one: Set, rows: list[dict], found: dict, out: Path) -> None:
    path = out / system.name / f"{one.file}.segments.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        for i, (task, row) in enumerate(zip(one.tasks, rows, strict=True)):
            scores = {m: x[system.name, one.file].segments[i] for m, x in found.items()}
            line = {"segment": i} | {k: v for k, v in task._asdict().items() if v is not None}
            line |= {k: row[k] for k in ("translation", "readable")} | {"scores": scores}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def evaluate(args: argparse.Namespace) -> None:
    ranks = join(device_of(args).type, args.patience)
    chosen = ranks.on_first("read the sets", lambda: sets_of(args))
    metrics = metrics_of(args, chosen)
    systems = systems_of(args, chosen)
    out = Path(args.out)
    print(
        f"{count(systems, 'system')}, {sum(len(one.tasks) for one in chosen):,} segments in "
        f"{count(chosen, 'set')}, {count(metrics, 'metric')}; writing {out}", flush=True,
    )  # fmt: skip
    theirs = {s.name: read_translations(s, chosen) for s in systems if not s.model}
    done = {}
    for system in systems:
        if system.model:
            done[system.name] = translate(args, ranks, system, chosen, out)
            gc.collect()  # the model, to make room for COMET
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            done[system.name] = theirs[system.name]
    found = {m.name: score(args, ranks, m, systems, chosen, done, out) for m in metrics}
    ranks.ending = True
    ranks.on_first("report", lambda: report(args, systems, chosen, metrics, done, found, out))


def count(things: list, name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def main(words: list[str]) -> None:
    try:
        evaluate(parse(words))
    except KeyboardInterrupt:
        leave("\npython -m eval: stopped; the same command goes on")
    except (OSError, ValueError, RuntimeError) as error:
        lost = "another rank has gone; the same command goes on"
        leave(f"python -m eval: {lost if is_lost(error) else error}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def interrupted(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupted)
    main(sys.argv[1:])
