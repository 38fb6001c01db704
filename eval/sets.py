"""Test sets, sources with references: sacreBLEU's, FLORES-200, or a file of your own.

    wmt23:zh-en        as sacreBLEU has it
    wmt24:zh-en        there is only en-zh: that is taken the other way round, references as sources
    flores200:en-zh    its 1,012 sentences "devtest"; flores200/dev: those of "dev"
    mine.jsonl         {"text": …, "source": "en", "target": "zh", "reference": …} in each line; its
                       directions are sets of their own
    toy:kasu-bevo      500 sentences that no toy run has seen, of its seed 0; toy1: of seed 1

FLORES-200 is looked for in the folder that FLORES200 names, else in ~/.cache/flores200_dataset, and
fetched there when it is missing.
"""

import html
import os
import re
import shutil
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

from data import (
    CODES,
    FLORES,
    SUFFIXES,
    code_pair,
    gather,
    lines_of,
    pair_of,
    pairs_in,
    split_entries,
    split_entry,
)
from judge import Task
from toy.languages import Languages

FLORES_URL = "https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz"


class Set(NamedTuple):
    entry: str
    label: str
    direction: str
    tasks: list[Task]
    file: str
    """Begins the names of its files."""


def load(entry: str) -> list[Task]:
    """The segments of a file, or of a set by its name with the direction behind a colon."""
    name, pair = split_entry(entry)
    if Path(name).expanduser().is_file() or Path(name).suffix in SUFFIXES:
        return gather(entry, twice=True).tasks
    if not pair:
        raise ValueError(f"{entry}: no such file, and a set needs a direction, like {name}:zh-en")
    if toy := re.fullmatch(r"toy(\d*)", name):
        return toy_set(int(toy[1] or 0), pair)
    return test_set(name, pair_of(pair))


def held_out(words: str, pairs: list[tuple[str, str]]) -> list[Task]:
    """Of several entries, all directions; a set without one is taken in those of `pairs`."""
    tasks = []
    for entry in split_entries(words):
        name, pair = split_entry(entry)
        if pair or Path(name).expanduser().is_file() or Path(name).suffix in SUFFIXES:
            tasks += load(entry)
            continue
        if not pairs:
            raise ValueError(f"{entry}: of which languages? Write it like {name}:en-zh, or give "
                             "--source and --target")  # fmt: skip
        both = dict.fromkeys(d for pair in pairs for d in (pair, pair[::-1]))
        tasks += [task for direction in both for task in test_set(name, direction)]
    return [  # as data.py reads what is trained on
        t._replace(text=plain(t.text), reference=plain(t.reference) if t.reference else None)
        for t in tasks
    ]


def plain(text: str) -> str:
    return html.unescape(text).strip()


def test_set(name: str, direction: tuple[str, str]) -> list[Task]:
    if name.split("/")[0] == "flores200":
        if unknown := [language for language in direction if language not in CODES]:
            raise ValueError(f"flores200: {unknown[0]} is not in data.py's table")
        sources, references = (flores(name, language) for language in direction)
    elif code_pair(direction) in (known := pairs_in(name)):
        sources, references = (lines_of(name, code_pair(direction), s) for s in ("src", "ref"))
    elif code_pair(direction[::-1]) in known:
        other = code_pair(direction[::-1])
        print(f"{name}:{code_pair(direction)} is {name}:{other} the other way round")
        references, sources = (lines_of(name, other, side) for side in ("src", "ref"))
    else:
        raise ValueError(f"{name} has no {code_pair(direction)}; it has {', '.join(sorted(known))}")
    if len(sources) != len(references) or not sources:
        raise ValueError(
            f"{name}:{code_pair(direction)} has {len(sources)} sources and {len(references)} "
            "references: its cache is broken, remove it"
        )
    return [Task(s, *direction, r) for s, r in zip(sources, references, strict=True)]


def toy_set(seed: int, pair: str) -> list[Task]:
    languages = Languages(seed)
    found = [languages.task("held-out", i) for i in range(10_000, 12_000)]  # runs look at the first
    found = [t for t in found if f"{t.source}-{t.target}".lower() == pair.lower()]
    if not found:
        raise ValueError(f"the toy has no {pair}; it has kasu-bevo and bevo-kasu")
    return found[:500]


def flores(name: str, language: str) -> list[str]:
    part = name.partition("/")[2] or "devtest"
    folder = Path(os.environ.get("FLORES200", "~/.cache/flores200_dataset")).expanduser()
    if not folder.is_dir():
        fetch(FLORES_URL, folder)
    file = folder / part / f"{FLORES[CODES[language]]}.{part}"
    if not file.is_file():
        raise ValueError(f"{file} is missing: remove {folder}, and it is fetched again")
    return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def fetch(url: str, folder: Path) -> None:
    """An archive with one folder in it -> that folder; whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    print(f"fetching {url}", flush=True)
    try:
        with (
            urllib.request.urlopen(url, timeout=60) as reply,
            tarfile.open(fileobj=reply, mode="r|gz") as archive,
        ):
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
            archive.extractall(partial, **safe)
        inner = next(partial.iterdir())
        inner.rename(folder)
    except (OSError, tarfile.TarError, EOFError, StopIteration) as error:
        raise OSError(
            f"{url} could not be fetched ({error}): unpack it elsewhere, copy it to {folder}, or "
            "name its folder in FLORES200"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def label(entry: str) -> str:
    """What a table calls a set without its direction: wmt23:zh-en -> wmt23."""
    name, _ = split_entry(entry)
    return re.sub(r"\.jsonl?$", "", Path(name).name) if Path(name).suffix else name
