"""Texts in, tasks out: monolingual text from files and from WMT's test sets, in an order that is a
function of (seed, epoch).

What `--data` takes, several with commas between them:

    texts.jsonl          a line each: {"text": …, "source": "English", "target": "zh"}
    news.txt:en-zh       plain text, a text a line, to be translated from English to Chinese
    crawl.parquet:en-de  its column "text", and "source" and "target" where it has them (pyarrow)
    wmt17-20:en-zh       the sources of WMT17 … WMT20, both directions, fetched by sacreBLEU

The pair behind a name, or else `--source` and `--target`, are the languages of texts that do not
name theirs. Languages are codes or English names; one that data/languages.py lacks is written with
both: tlh=Klingon.

WMT's sets are what the paper very likely trained on. Only the sources are used, never a reference.
As there, an English text has at least 30 characters; the rule for other languages is ours: a
Chinese, Japanese or Korean character counts as three. Repeated texts of a language pair are left
out.
"""

import hashlib
import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from random import Random
from typing import NamedTuple

from data.languages import as_pair, code_pair, language, pair_of, parse_language_pairs
from judge import Task

KEYS = ("text", "source", "target", "reference")
SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
SHORTEST = 30  # characters of a text from WMT
Pairs = list[tuple[str, str]]
Entries = Iterator[Task | ValueError | str]  # a task, an unreadable line, why a text is left out


class Corpus(NamedTuple):
    tasks: list[Task]
    counts: dict[str, Counter]
    """By entry of the data, "read", "kept", and what was left out by its reason."""

    def report(self) -> str:
        lines = []
        for entry, count in self.counts.items():
            out = [f"{n:,} {why}" for why, n in count.items() if why not in ("read", "kept")]
            left = f"; left out: {', '.join(out)}" if out else ""
            lines.append(f"{entry}: {count['read']:,} texts read, {count['kept']:,} kept{left}")
        return "\n".join(lines)


def load_corpus(
    entries: str, source: str = "", target: str = "", skip_bad: bool = False, twice: bool = False
) -> Corpus:
    """All entries of `--data`, each text once (unless `twice`). A line that cannot be read is an
    error that names it; with `skip_bad` it is left out and counted."""
    pairs = parse_language_pairs(source, target)
    corpus, seen = Corpus([], {}), set()
    for entry in split_entries(entries):
        count = corpus.counts[entry] = Counter(read=0, kept=0)
        for item in read_file(entry, pairs):
            count["read"] += 1
            if isinstance(item, ValueError):
                if not skip_bad:
                    raise ValueError(f"{item}; or python -m data --skip-bad-lines --out NEW")
                count["that cannot be read"] += 1
            elif isinstance(item, str):
                count[item] += 1
            elif item[:3] in seen and not twice:
                count["seen before"] += 1
            else:
                seen.add(item[:3])
                corpus.tasks.append(item)
                count["kept"] += 1
    if not corpus.tasks:
        raise ValueError(f"--data {entries}: there is no text to translate in it")
    return corpus


def split_entries(entries: str) -> list[str]:
    return [entry.strip() for entry in entries.split(",") if entry.strip()]


def split_entry(entry: str) -> tuple[str, str]:
    """ "news.txt:en-zh" -> its file or set, and its pair, "" without one."""
    match = re.fullmatch(r"(.+):([\w=]+-[\w= ]+)", entry)
    return (match[1], match[2]) if match else (entry, "")


# ------------------------------------------------------------------------------------------- files


def read_file(entry: str, pairs: Pairs) -> Entries:
    name, pair = split_entry(entry)
    path, pairs = Path(name).expanduser(), [pair_of(pair)] if pair else pairs
    if path.is_dir() or path.suffix in (".csv", ".tsv", ".gz", ".zip", ".xz"):
        raise ValueError(f"{name} is not read: make JSON lines of it")
    if path.is_file():
        return from_file(path, pairs)
    if not pairs:
        raise ValueError(f"{name}: there is no such file; a test set needs its languages, such as "
                         "wmt20:en-zh")  # fmt: skip
    return from_wmt(name, pairs)


def from_file(path: Path, pairs: Pairs) -> Entries:
    if path.suffix == ".parquet":
        rows, parse, unit = parquet_rows(path), dict, "row"
    else:
        rows, unit = path.read_bytes().split(b"\n"), "line"
        parse = parsed if path.suffix in (".jsonl", ".json") else plain_text
    for number, row in enumerate(rows, 1):
        if isinstance(row, bytes) and not row.decode(errors="replace").strip():
            continue
        try:
            yield from tasks_of(parse(row), pairs)
        except ValueError as error:
            yield ValueError(f"{path}, {unit} {number}: {error}")


def parquet_rows(path: Path) -> list[dict]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install pyarrow") from None
    columns = [name for name in parquet.read_schema(path).names if name in KEYS]
    return parquet.read_table(path, columns=columns).to_pylist()


def plain_text(line: bytes) -> dict:
    return {"text": line.decode("utf-8-sig")}


def parsed(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig").strip())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}: column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError('not an object with "text", "source" and "target"')
    return row


def tasks_of(row: dict, pairs: Pairs, hint: str = " (--data FILE:en-zh)") -> list[Task]:
    """The task of a row that names its languages, else one for each of the pairs."""
    row = {k: row[k] for k in KEYS if row.get(k) is not None}
    for key, value in row.items():
        if not isinstance(value, str):
            raise ValueError(f'"{key}" must be a string')
        value.encode()  # half of a surrogate pair is no text
    row["text"] = text = row.get("text", "").replace("\0", "").strip()
    named = row.get("source") or row.get("target")
    needed = ("text", "source", "target") if named or not pairs else ("text",)
    if missing := [repr(k) for k in needed if not row.get(k)]:
        raise ValueError(f"{', '.join(missing)} missing{'' if named or pairs else hint}")
    if named:
        pairs = [as_pair(language(row["source"]), language(row["target"]))]
    elif len({source for source, _ in pairs}) > 1:
        raise ValueError("its language is not clear, as --source names several: write the pair "
                         "behind the file's name, FILE:en-zh")  # fmt: skip
    return [Task(text, source, target, row.get("reference")) for source, target in pairs]


# ------------------------------------------------------------------------------- WMT's test sets


def from_wmt(name: str, pairs: Pairs) -> Entries:
    """The sources of test sets, both directions of each pair."""
    directions = dict.fromkeys(d for pair in pairs for d in (pair, pair[::-1]))
    codes = {code_pair(direction): direction for direction in directions}
    for part in years(name):
        available = pairs_in(part)
        if not available & codes.keys():
            raise ValueError(f"{name}: {part} has no {next(iter(codes))}; it has "
                             f"{', '.join(sorted(available))}")  # fmt: skip
        for code, direction in codes.items():
            for line in lines_of(part, code, "src") if code in available else ():
                text = html.unescape(line).strip()  # WMT's older files write & as &amp;
                short = length_of(text) < SHORTEST
                yield f"shorter than {SHORTEST} characters" if short else Task(text, *direction)


def years(name: str) -> list[str]:
    """ "wmt17-20" -> wmt17, wmt18, wmt19, wmt20."""
    if match := re.fullmatch(r"wmt(\d\d)-(\d\d)", name):
        return [f"wmt{year:02}" for year in range(int(match[1]), int(match[2]) + 1)]
    return [name]


def pairs_in(name: str) -> set[str]:
    """The directions of a set of sacreBLEU's."""
    from sacrebleu.dataset import DATASETS

    if name not in DATASETS:
        near = ", ".join(get_close_matches(name, DATASETS, 3, 0.5)) or "none"
        raise ValueError(f"{name}: no such file, and no test set of sacreBLEU's; similar: {near}")
    return set(DATASETS[name].langpairs)


def lines_of(name: str, pair: str, side: str) -> list[str]:
    """The sources ("src") or references ("ref") of a test set, through sacreBLEU's cache."""
    from sacrebleu.dataset import DATASETS
    from sacrebleu.utils import SACREBLEU_DIR

    dataset, folder = DATASETS[name], Path(SACREBLEU_DIR) / name
    try:
        sources = [dataset.get_source_file(pair)]
        files = sources if side == "src" else dataset.get_reference_files(pair)
    except (Exception, SystemExit) as error:  # what it raises is of every kind
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} ({pair}) could not be fetched by sacreBLEU: {cause}. Without a network, copy "
            f"{folder} from a machine that has it; after a broken download remove it and try again"
        ) from None
    if len(files) > 1:
        raise ValueError(f"{name} ({pair}) has {len(files)} references; use a set with one")
    return Path(files[0]).read_text(encoding="utf-8").removesuffix("\n").split("\n")


def length_of(text: str) -> int:
    """In characters; one as wide as Chinese ones are counts as three."""
    return sum(3 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


# ------------------------------------------------------------------------------------ the order


def hash_json(content) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def sample_held_out(tasks: list[Task], count: int, seed: int) -> list[Task]:
    """At most `count` of the tasks."""
    return Random(f"{seed} split").sample(tasks, len(tasks))[:count]


def exclude_overlap(tasks: list[Task], others: list[Task]) -> list[Task]:
    """The tasks whose text is neither a text nor a reference of the others."""
    texts = {text for task in others for text in (task.text, task.reference)}
    return [task for task in tasks if task.text not in texts]


class EpochShuffler:
    """An endless stream of shuffled epochs."""

    def __init__(self, tasks: list[Task], seed: int):
        if not tasks:
            raise ValueError("no texts are left to train on: add some, or hold out fewer")
        self.tasks, self.seed, self.epoch = tasks, seed, -1

    def task(self, number: int) -> Task:
        epoch, index = divmod(number, len(self.tasks))
        if epoch != self.epoch:
            self.epoch = epoch
            rng = Random(f"{self.seed} epoch {epoch}")
            self.shuffled = rng.sample(range(len(self.tasks)), len(self.tasks))
        return self.tasks[self.shuffled[index]]
