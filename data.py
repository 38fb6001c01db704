"""Texts in, tasks out: monolingual text from files and from WMT's test sets, in an order that is a
function of (seed, epoch).

    python data.py wmt17-20:en-zh                     # what would be trained on, counted
    python data.py news.txt --source en --target de,zh --out texts.jsonl

What `--data` takes, several with commas between them:

    texts.jsonl          a line each: {"text": …, "source": "English", "target": "zh"}
    news.txt:en-zh       plain text, a text a line, to be translated from English to Chinese
    crawl.parquet:en-de  its column "text", and "source" and "target" where it has them (pyarrow)
    wmt17-20:en-zh       the sources of WMT17 … WMT20, both directions, fetched by sacreBLEU

`--source` and `--target` speak for what names no languages itself. Languages are codes or English
names; one that the table below lacks is written with both: tlh=Klingon.

WMT's sets are what the paper very likely trained on. Taken are the sources alone, never a
reference. As there, an English text has at least 30 characters; that rule for other languages is
ours: a Chinese, Japanese or Korean character counts as three. Whatever was read before, in the same
pair of languages, is left out.
"""

import argparse
import difflib
import hashlib
import html
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from judge import Task, is_language

KEYS = ("text", "source", "target")
SHORTEST = 30  # characters of a text from WMT

# Code, name, and the name of its files in FLORES-200.
LANGUAGES = """
af Afrikaans afr_Latn|am Amharic amh_Ethi|ar Arabic arb_Arab|as Assamese asm_Beng
az Azerbaijani azj_Latn|be Belarusian bel_Cyrl|bg Bulgarian bul_Cyrl|bn Bengali ben_Beng
bo Tibetan bod_Tibt|bs Bosnian bos_Latn|ca Catalan cat_Latn|cs Czech ces_Latn|cy Welsh cym_Latn
da Danish dan_Latn|de German deu_Latn|el Greek ell_Grek|en English eng_Latn|eo Esperanto epo_Latn
es Spanish spa_Latn|et Estonian est_Latn|eu Basque eus_Latn|fa Persian pes_Arab|fi Finnish fin_Latn
fr French fra_Latn|ga Irish gle_Latn|gd Scottish_Gaelic gla_Latn|gl Galician glg_Latn
gu Gujarati guj_Gujr|ha Hausa hau_Latn|he Hebrew heb_Hebr|hi Hindi hin_Deva|hr Croatian hrv_Latn
ht Haitian_Creole hat_Latn|hu Hungarian hun_Latn|hy Armenian hye_Armn|id Indonesian ind_Latn
ig Igbo ibo_Latn|is Icelandic isl_Latn|it Italian ita_Latn|ja Japanese jpn_Jpan|jv Javanese jav_Latn
ka Georgian kat_Geor|kk Kazakh kaz_Cyrl|km Khmer khm_Khmr|kn Kannada kan_Knda|ko Korean kor_Hang
ku Kurdish kmr_Latn|ky Kyrgyz kir_Cyrl|lb Luxembourgish ltz_Latn|lo Lao lao_Laoo
lt Lithuanian lit_Latn|lv Latvian lvs_Latn|mg Malagasy plt_Latn|mi Maori mri_Latn
mk Macedonian mkd_Cyrl|ml Malayalam mal_Mlym|mn Mongolian khk_Cyrl|mr Marathi mar_Deva
ms Malay zsm_Latn|mt Maltese mlt_Latn|my Burmese mya_Mymr|nb Norwegian_Bokmal nob_Latn
ne Nepali npi_Deva|nl Dutch nld_Latn|nn Norwegian_Nynorsk nno_Latn|or Odia ory_Orya
pa Punjabi pan_Guru|pl Polish pol_Latn|ps Pashto pbt_Arab|pt Portuguese por_Latn
ro Romanian ron_Latn
ru Russian rus_Cyrl|sd Sindhi snd_Arab|si Sinhala sin_Sinh|sk Slovak slk_Latn|sl Slovenian slv_Latn
so Somali som_Latn|sq Albanian als_Latn|sr Serbian srp_Cyrl|sv Swedish swe_Latn|sw Swahili swh_Latn
ta Tamil tam_Taml|te Telugu tel_Telu|tg Tajik tgk_Cyrl|th Thai tha_Thai|tk Turkmen tuk_Latn
tl Filipino tgl_Latn|tr Turkish tur_Latn|tt Tatar tat_Cyrl|ug Uyghur uig_Arab|uk Ukrainian ukr_Cyrl
ur Urdu urd_Arab|uz Uzbek uzn_Latn|vi Vietnamese vie_Latn|xh Xhosa xho_Latn|yi Yiddish ydd_Hebr
yo Yoruba yor_Latn|yue Cantonese yue_Hant|zh Chinese zho_Hans|zh_hant Traditional_Chinese zho_Hant
zu Zulu zul_Latn|kasu Kasu toy_kasu|bevo Bevo toy_bevo
"""
TABLE = [row.replace("\n", "").split() for row in LANGUAGES.strip().replace("\n", "|").split("|")]
NAMES = {code: name.replace("_", " ") for code, name, _ in TABLE}
CODES = {name: code for code, name in NAMES.items()}
FLORES = {code: files for code, _, files in TABLE}


class Corpus(NamedTuple):
    tasks: list[Task]
    counts: dict[str, Counter]
    """By entry of the data, "read", "kept", and what was left out by its reason."""
    with_references: Counter

    def report(self) -> str:
        lines = []
        for entry, count in self.counts.items():
            out = [f"{n:,} {why}" for why, n in count.items() if why not in ("read", "kept")]
            left = f"; left out: {', '.join(out)}" if out else ""
            known = self.with_references[entry]
            kept = f"{count['kept']:,} kept" + f", {known:,} with a reference" * bool(known)
            lines.append(f"{entry}: {count['read']:,} texts read, {kept}{left}")
        return "\n".join(lines)


# ----------------------------------------------------------------------------------- languages


def language(word: str) -> str:
    """The name of a language, as the prompts say it: of a code, of a name, of code=Name."""
    word = word.strip()
    if "=" in word:
        name = word.partition("=")[2]
        if not is_language(name):
            raise ValueError(f"{name!r} is no name of a language (letters, 4 words at most)")
        return name
    for known in (word.lower(), word.lower().replace("-", "_")):
        if known in NAMES:
            return NAMES[known]
    for name in CODES:
        if name.lower() == word.lower():
            return name
    near = difflib.get_close_matches(word.title(), CODES, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(
        f"unknown language {word!r}{hint}: use a code such as zh or a name such as Chinese; one "
        "that is not in data.py's table is written xx=Name"
    )


def pair_of(words: str) -> tuple[str, str]:
    """ "en-zh" -> ("English", "Chinese")."""
    source, dash, target = words.partition("-")
    if not dash or not source or not target:
        raise ValueError(f"{words!r} is no pair of languages: write it like en-zh")
    names = language(source), language(target)
    if names[0] == names[1]:
        raise ValueError(f"{words!r} translates {names[0]} into itself")
    return names


def pairs_of(source: str, target: str) -> list[tuple[str, str]]:
    """Of --source and --target: lists of the same length, or one of them for all of the other."""
    sources, targets = ([w for w in x.split(",") if w.strip()] for x in (source, target))
    if not sources or not targets:
        if sources or targets:
            raise ValueError("--source and --target go together: give both, such as en and zh")
        return []
    most = max(len(sources), len(targets))
    if len(sources) not in (1, most) or len(targets) not in (1, most):
        raise ValueError(
            f"--source names {len(sources)} languages and --target {len(targets)}: give as many of "
            "both, or one for all"
        )
    sources, targets = ([language(w) for w in x] * (most // len(x)) for x in (sources, targets))
    for one, other in zip(sources, targets, strict=True):
        if one == other:
            raise ValueError(f"--source and --target: {one} would be translated into itself")
    return list(dict.fromkeys(zip(sources, targets, strict=True)))


# ------------------------------------------------------------------------------------- reading


def gather(
    words: str, source: str = "", target: str = "", skip_bad: bool = False, twice: bool = False
) -> Corpus:
    """All entries of `--data`, each text once (unless `twice`). A line that cannot be read is an
    error that names it, or (`skip_bad`) is left out and counted."""
    pairs = pairs_of(source, target)
    tasks, before, with_references = [], set(), Counter()
    counts: dict[str, Counter] = {}
    for entry in split_entries(words):
        count = counts[entry] = Counter(read=0, kept=0)
        for found in read(entry, pairs):
            count["read"] += 1
            if isinstance(found, ValueError):
                if not skip_bad:
                    raise ValueError(f"{found} (--skip-bad-lines leaves such lines out)")
                count["that cannot be read"] += 1
                if count["that cannot be read"] <= 3:
                    print(f"left out: {found}")
                elif count["that cannot be read"] == 4:
                    print("left out: more like that, which are counted")
            elif isinstance(found, str):
                count[found] += 1
            elif found[:3] in before and not twice:
                count["seen before"] += 1
            else:
                before.add(found[:3])
                tasks.append(found)
                count["kept"] += 1
                with_references[entry] += found.reference is not None
    if not counts:
        raise ValueError("--data names nothing: give a file, or a set such as wmt17-20:en-zh")
    corpus = Corpus(tasks, counts, with_references)
    if not tasks:
        found = corpus.report().replace("\n", "; ")
        raise ValueError(f"there is no text to translate in {found}")
    return corpus


def split_entries(words: str) -> list[str]:
    """Split at commas, except those that belong to the name of an existing file."""
    pieces, found = words.split(","), []
    while pieces:
        for count in range(len(pieces), 0, -1):
            entry = ",".join(pieces[:count]).strip()
            if count == 1 or is_file(split_entry(entry)[0]):
                break
        found.append(entry)
        pieces = pieces[count:]
    return [entry for entry in found if entry]


def is_file(name: str) -> bool:
    return os.path.isfile(os.path.expanduser(name))  # False for names that are too long, too


Found = Iterator[Task | ValueError | str]  # str: why a text is left out


def read(entry: str, pairs: list[tuple[str, str]]) -> Found:
    name, pair = split_entry(entry)
    if pair:
        pairs = [pair_of(pair)]
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix in (".csv", ".tsv", ".gz", ".zip", ".xz"):
            raise ValueError(f"{name}: a {path.suffix} file is not read; make JSON lines of it")
        if path.suffix == ".parquet":
            return from_parquet(path, pairs, bool(pair))
        if path.suffix in (".jsonl", ".json"):
            return from_jsonl(path, pairs, bool(pair))
        return from_text(path, pairs)
    if path.is_dir():
        raise ValueError(f"{name} is a folder; name files")
    if not re.fullmatch(r"[a-z]+[\w.-]*(/[\w./-]+)?", name) or path.suffix[1:2].isalpha():
        raise ValueError(f"{name}: there is no such file")
    if not pairs:
        raise ValueError(f"{entry}: no file of that name; a test set needs a pair of "
                         f"languages, such as {name}:en-zh")  # fmt: skip
    return from_wmt(name, pairs)


SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")


def split_entry(entry: str) -> tuple[str, str]:
    """ "news.txt:en-zh" -> its file or set, and its pair, "" without one."""
    if is_file(entry):
        return entry, ""
    found = re.fullmatch(r"(.+):([\w=]+-[\w= ]+)", entry)
    return (found[1], found[2]) if found else (entry, "")


def from_jsonl(path: Path, pairs: list[tuple[str, str]], only: bool) -> Found:
    """Lines with "text", "source", "target", maybe "reference"."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue  # an empty line holds nothing to lose
            try:
                tasks = tasks_of(parsed(line), pairs, only)
            except (ValueError, RecursionError) as error:
                yield ValueError(f"{path}, line {number}: {error}")
                continue
            yield from tasks


def parsed(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError('not an object with "text", "source" and "target"')
    return row


def tasks_of(row: dict, pairs: list[tuple[str, str]], only: bool) -> list[Task]:
    """One task, or one for each of the pairs when the row names no languages. `only`: it may name
    no others."""
    named = [k for k in KEYS[1:] if row.get(k)]
    missing = [k for k in KEYS if not row.get(k) and (k == "text" or named or not pairs)]
    if missing:
        hint = "" if "text" in missing else " (--source and --target can say it for all lines)"
        raise ValueError(f"{', '.join(map(repr, missing))} missing{hint}")
    given = {k: row[k] for k in (*KEYS, "reference") if row.get(k) is not None}
    if not all(isinstance(value, str) for value in given.values()):
        raise ValueError(f"{', '.join(given)} must be strings")
    for value in given.values():
        value.encode()  # half of a surrogate pair is no text
    text, reference = given["text"].replace("\0", "").strip(), given.get("reference")
    if not text:
        raise ValueError("'text' is blank")
    if named:
        own = language(given["source"]), language(given["target"])
        if own[0] == own[1]:
            raise ValueError(f"{own[0]} would be translated into itself")
        if only and own not in pairs:
            raise ValueError(
                f"{own[0]} to {own[1]}, but the pair behind the file's name says other"
            )
        pairs = [own]
    elif len({source for source, _ in pairs}) > 1:
        raise ValueError(AMBIGUOUS)
    return [Task(text, source, target, reference) for source, target in pairs]


AMBIGUOUS = (
    "its language is not clear, as --source names several: write the pair behind the file's name, "
    "FILE:en-zh"
)


def from_text(path: Path, pairs: list[tuple[str, str]]) -> Found:
    if not pairs:
        raise ValueError(
            f"{path}: plain text does not say its languages: write {path}:en-zh, or give "
            "--source and --target"
        )
    if len({source for source, _ in pairs}) > 1:
        raise ValueError(f"{path}: {AMBIGUOUS}")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                yield ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})")
                continue
            if "\0" in text:
                yield ValueError(f"{path}, line {number}: it contains NUL: is it UTF-16?")
            elif text:
                yield from (Task(text, *pair) for pair in pairs)


def from_parquet(path: Path, pairs: list[tuple[str, str]], only: bool) -> Found:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise ValueError(f'no column "text" but {", ".join(file.schema_arrow.names)}')
        columns = [c for c in (*KEYS, "reference") if c in file.schema_arrow.names]
        rows = (row for part in file.iter_batches(columns=columns) for row in part.to_pylist())
        for number, row in enumerate(rows, 1):
            try:
                tasks = tasks_of(row, pairs, only)
            except ValueError as error:
                yield ValueError(f"{path}, row {number}: {error}")
                continue
            yield from tasks
    except (OSError, ValueError) as error:  # pyarrow's errors are these
        raise ValueError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------- WMT's test sets


def from_wmt(name: str, pairs: list[tuple[str, str]]) -> Found:
    """Sources of test sets, of each pair both directions."""
    directions = list(dict.fromkeys(d for pair in pairs for d in (pair, pair[::-1])))
    for part in years(name):
        known = pairs_in(part)
        there = [d for d in directions if code_pair(d) in known]
        if not there:
            raise ValueError(
                f"{name}: {part} has no {code_pair(directions[0])}; it has "
                f"{', '.join(sorted(known))}"
            )
        for direction in there:
            for line in lines_of(part, code_pair(direction), "src"):
                text = html.unescape(line).strip()  # WMT's older files write & as &amp;
                short = length_of(text) < SHORTEST
                yield f"shorter than {SHORTEST} characters" if short else Task(text, *direction)


def years(name: str) -> list[str]:
    """ "wmt17-20" -> wmt17, wmt18, wmt19, wmt20."""
    found = re.fullmatch(r"wmt(\d\d)-(?:wmt)?(\d\d)", name)
    if not found:
        return [name]
    first, last = int(found[1]), int(found[2])
    if first > last:
        raise ValueError(f"{name}: the first year comes after the last")
    return [f"wmt{year:02}" for year in range(first, last + 1)]


def pairs_in(name: str) -> set[str]:
    """The directions of a set of sacreBLEU's."""
    from sacrebleu.dataset import DATASETS

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 3, 0.5)
        hint = f"; similar: {', '.join(near)}" if near else ""
        raise ValueError(f"{name}: no such file, and no test set of sacreBLEU's{hint}")
    return set(DATASETS[name].langpairs)


def code_pair(pair: tuple[str, str]) -> str:
    """As WMT names it."""
    return "-".join(CODES.get(name, name) for name in pair)


def lines_of(name: str, pair: str, side: str) -> list[str]:
    """The sources ("src") or references ("ref") of a test set, through sacreBLEU's cache."""
    from sacrebleu.dataset import DATASETS
    from sacrebleu.utils import SACREBLEU_DIR

    dataset, folder = DATASETS[name], Path(SACREBLEU_DIR) / name
    try:
        if side == "src":
            files = [dataset.get_source_file(pair)]
        else:
            files = dataset.get_reference_files(pair)
    except (Exception, SystemExit) as error:  # what it raises is of every kind
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} ({pair}) could not be fetched by sacreBLEU: {first}. Without a network, copy "
            f"{folder} from a machine that has it; after a broken download remove {folder} and try "
            "again"
        ) from None
    if len(files) > 1:
        raise ValueError(f"{name} ({pair}) has {len(files)} references; use a set with one")
    return Path(files[0]).read_text(encoding="utf-8").removesuffix("\n").split("\n")


def length_of(text: str) -> int:
    """In characters; one as wide as Chinese ones are counts as three."""
    return sum(3 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


# ------------------------------------------------------------------------------------ the order


def digest(tasks: list[Task]) -> str:
    lines = (json.dumps(task, ensure_ascii=False) for task in tasks)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def split(tasks: list[Task], held_out: int, seed: int) -> tuple[list[Task], list[Task]]:
    """(held out, training): a text that is held out, in any direction, is not trained."""
    apart = Random(f"{seed} split").sample(tasks, len(tasks))[:held_out]
    return apart, without(tasks, apart)


def without(tasks: list[Task], others: list[Task]) -> list[Task]:
    """Those that say nothing of what the others say, in either language."""
    texts = {text for task in others for text in (task.text, task.reference)}
    return [task for task in tasks if task.text not in texts]


class Order:
    def __init__(self, tasks: list[Task], seed: int):
        if not tasks:
            raise ValueError("no texts are left to train on: add some, or hold out fewer")
        self.tasks, self.seed, self.epoch = tasks, seed, -1

    def task(self, number: int) -> Task:
        """Text `number` of an endless stream of shuffled epochs."""
        epoch, place = divmod(number, len(self.tasks))
        if epoch != self.epoch:
            self.epoch = epoch
            rng = Random(f"{self.seed} epoch {epoch}")
            self.shuffled = rng.sample(range(len(self.tasks)), len(self.tasks))
        return self.tasks[self.shuffled[place]]


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("data", help="files and sets, with commas between them")
    option("--source", default="", help="languages of texts that do not say theirs")
    option("--target", default="", help="languages to translate them into")
    option("--skip-bad-lines", action="store_true", help="count them instead of stopping")
    option("--out", help="write the tasks there, as JSON lines")
    args = parser.parse_args(words)
    try:
        corpus = gather(args.data, args.source, args.target, args.skip_bad_lines)
        print(corpus.report())
        for pair, count in Counter((t.source, t.target) for t in corpus.tasks).items():
            lengths = sorted(len(t.text) for t in corpus.tasks if (t.source, t.target) == pair)
            middle, long = lengths[count // 2], lengths[count * 99 // 100]
            print(f"{pair[0]} to {pair[1]}: {count:,} texts, {middle} characters at the median, "
                  f"{long} at the 99th percentile")  # fmt: skip
        if args.out:
            rows = ({k: v for k, v in t._asdict().items() if v} for t in corpus.tasks)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            partial = Path(args.out + ".partial")
            partial.write_text(lines, encoding="utf-8")
            partial.replace(args.out)
            print(f"{len(corpus.tasks):,} tasks in {args.out}")
    except (OSError, ValueError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
