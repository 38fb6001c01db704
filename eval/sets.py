"""Test sets, sources with references: sacreBLEU's, FLORES-200, or a file of your own.

    wmt23:zh-en        as sacreBLEU has it
    wmt24:zh-en        only en-zh exists: it is reversed, with references as sources
    flores200:en-zh    its 1,012 sentences "devtest"; flores200/dev: those of "dev"
    mine.jsonl         {"text": …, "source": "en", "target": "zh", "reference": …} in each line; its
                       directions are sets of their own
    toy:kasu-bevo      500 sentences that no toy run has seen, of its seed 0; toy1: of seed 1

FLORES-200 is read from the folder that FLORES200 names, by default ~/.cache/flores200_dataset, and
is downloaded there when it is missing.
"""

import html
import os
import re
import shutil
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

from data import languages, loading
from judge import Task
from toy.languages import Languages

FLORES_URL = "https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz"


class TestSet(NamedTuple):
    entry: str
    label: str
    direction: str
    tasks: list[Task]
    file: str
    """Begins the names of its files."""


def load_set(entry: str) -> list[Task]:
    """The segments of a file, or of a set and direction such as wmt23:zh-en."""
    name, pair = loading.split_entry(entry)
    if is_own_file(name):
        return loading.load_corpus(entry, twice=True).tasks
    if not pair:
        raise ValueError(f"{entry}: no such file, and a set needs a direction, like {name}:zh-en")
    if toy := re.fullmatch(r"toy(\d*)", name):
        return load_toy(int(toy[1] or 0), pair)
    return load_public(name, loading.pair_of(pair))


def held_out(entries: str, pairs: list[tuple[str, str]]) -> list[Task]:
    """The segments of several entries; a set without a direction is taken in those of `pairs`."""
    tasks = []
    for entry in loading.split_entries(entries):
        name, pair = loading.split_entry(entry)
        if pair or is_own_file(name):
            tasks += load_set(entry)
            continue
        if not pairs:
            raise ValueError(f"{entry}: of which languages? Write it like {name}:en-zh, or give "
                             "--source and --target")  # fmt: skip
        directions = dict.fromkeys(d for pair in pairs for d in (pair, pair[::-1]))
        tasks += [task for direction in directions for task in load_public(name, direction)]

    # Unescaped as data/loading.py does it with training texts.
    return [Task(*(text and html.unescape(text).strip() for text in task)) for task in tasks]


def is_own_file(name: str) -> bool:
    return Path(name).expanduser().is_file() or Path(name).suffix in loading.SUFFIXES


def load_public(name: str, direction: tuple[str, str]) -> list[Task]:
    pair, reverse = loading.code_pair(direction), loading.code_pair(direction[::-1])
    if name.split("/")[0] == "flores200":
        for language in direction:
            if language not in languages.CODES:
                raise ValueError(f"flores200: {language} is not in data/languages.py's table")
        sources, references = (read_flores(name, language) for language in direction)
    elif pair in (available := loading.pairs_in(name)):
        sources, references = (loading.lines_of(name, pair, side) for side in ("src", "ref"))
    elif reverse in available:
        print(f"{name}:{pair} is {name}:{reverse} the other way round")
        references, sources = (loading.lines_of(name, reverse, side) for side in ("src", "ref"))
    else:
        raise ValueError(f"{name} has no {pair}; it has {', '.join(sorted(available))}")
    if len(sources) != len(references) or not sources:
        raise ValueError(
            f"{name}:{pair} has {len(sources)} sources and {len(references)} references: its cache "
            "is broken, remove it"
        )
    return [Task(s, *direction, r) for s, r in zip(sources, references, strict=True)]


def load_toy(seed: int, pair: str) -> list[Task]:
    languages = Languages(seed)
    tasks = [languages.task("held-out", i) for i in range(10_000, 12_000)]  # runs use the first
    tasks = [t for t in tasks if f"{t.source}-{t.target}".lower() == pair.lower()]
    if not tasks:
        raise ValueError(f"the toy has no {pair}; it has kasu-bevo and bevo-kasu")
    return tasks[:500]


def read_flores(name: str, language: str) -> list[str]:
    part = name.partition("/")[2] or "devtest"
    folder = Path(os.environ.get("FLORES200", "~/.cache/flores200_dataset")).expanduser()
    if not folder.is_dir():
        download_archive(FLORES_URL, folder)
    file = folder / part / f"{languages.FLORES[languages.CODES[language]]}.{part}"
    if not file.is_file():
        raise ValueError(f"{file} is missing: remove {folder}, and it is fetched again")
    return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def download_archive(url: str, folder: Path) -> None:
    """The one folder in an archive becomes `folder`, whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    print(f"fetching {url}", flush=True)
    try:
        with (
            urllib.request.urlopen(url, timeout=60) as reply,
            tarfile.open(fileobj=reply, mode="r|gz") as archive,
        ):
            archive.extractall(partial, filter="data")
        next(partial.iterdir()).rename(folder)
    except (OSError, tarfile.TarError, EOFError, StopIteration) as error:
        raise OSError(
            f"{url} could not be fetched ({error}): unpack it elsewhere, copy it to {folder}, or "
            "name its folder in FLORES200"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def label(entry: str) -> str:
    """What a table calls a set without its direction: wmt23:zh-en -> wmt23."""
    name, _ = loading.split_entry(entry)
    return re.sub(r"\.jsonl?$", "", Path(name).name) if Path(name).suffix else name
