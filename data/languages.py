"""The languages' names, scripts and relatives, and whether an answer can be a translation at all.

    language("zh") == "Chinese"                     # as the prompts say it
    is_plausible_translation("Gute Nacht.", Task("Good night.", "English", "German"))

The latter is a part of the reward's format check: a copy of the source, or a text in another
language than the target, earns nothing, whatever a judge would say. Languages are told apart by
their script and, if it is installed, by py3langid.
"""

import importlib.metadata
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable
from functools import cache, lru_cache

from judge import Task, alnum_only, is_language, nfkc

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
ro Romanian ron_Latn|ru Russian rus_Cyrl|sd Sindhi snd_Arab|si Sinhala sin_Sinh
sk Slovak slk_Latn|sl Slovenian slv_Latn|so Somali som_Latn|sq Albanian als_Latn
sr Serbian srp_Cyrl|sv Swedish swe_Latn|sw Swahili swh_Latn
ta Tamil tam_Taml|te Telugu tel_Telu|tg Tajik tgk_Cyrl|th Thai tha_Thai|tk Turkmen tuk_Latn
tl Filipino tgl_Latn|tr Turkish tur_Latn|tt Tatar tat_Cyrl|ug Uyghur uig_Arab|uk Ukrainian ukr_Cyrl
ur Urdu urd_Arab|uz Uzbek uzn_Latn|vi Vietnamese vie_Latn|xh Xhosa xho_Latn|yi Yiddish ydd_Hebr
yo Yoruba yor_Latn|yue Cantonese yue_Hant|zh Chinese zho_Hans|zh_hant Traditional_Chinese zho_Hant
zu Zulu zul_Latn|kasu Kasu toy_kasu|bevo Bevo toy_bevo
"""
TABLE = [row.split() for row in re.split(r"[|\n]", LANGUAGES.strip())]
NAMES = {code: name.replace("_", " ") for code, name, _ in TABLE}
CODES = {name: code for code, name in NAMES.items()}
FLORES = {code: files for code, _, files in TABLE}


def language(word: str) -> str:
    """The name of a language, as the prompts say it: of a code, of a name, of code=Name."""
    code, equals, name = word.strip().partition("=")
    if equals and not is_language(name):
        raise ValueError(f"{name!r} is no name of a language (letters, 4 words at most)")
    if equals:
        return name
    if name := NAMES.get(code.lower().replace("-", "_")):
        return name
    if code.title() in CODES:
        return code.title()
    raise ValueError(
        f"unknown language {code!r}: use a code such as zh or a name such as Chinese; one that is "
        "not in data/languages.py's table is written xx=Name"
    )


def pair_of(codes: str) -> tuple[str, str]:
    """ "en-zh" -> ("English", "Chinese")."""
    source, _, target = codes.partition("-")
    return as_pair(language(source), language(target))


def parse_language_pairs(source: str, target: str) -> list[tuple[str, str]]:
    """The pairs of --source and --target: lists of the same length, or one for all of the other."""
    sources, targets = ([language(w) for w in x.split(",") if w] for x in (source, target))
    most = max(len(sources), len(targets))
    if any(len(x) not in (1, most) for x in (sources, targets)):
        raise ValueError(
            "--source and --target go together: give as many languages of both, or one for all, "
            f"not {len(sources)} and {len(targets)}"
        )
    sources, targets = (x if len(x) == most else x * most for x in (sources, targets))
    return list(dict.fromkeys(map(as_pair, sources, targets)))


def as_pair(source: str, target: str) -> tuple[str, str]:
    if source == target:
        raise ValueError(f"{source} would be translated into itself")
    return source, target


def code_pair(pair: tuple[str, str]) -> str:
    """As WMT names it."""
    return "-".join(CODES.get(name, name) for name in pair)


# ------------------------------------------------------------------ copies and other languages

# The scripts in the names of FLORES' files, as Unicode calls them.
UNICODE = dict(
    Latn="LATIN", Cyrl="CYRILLIC", Arab="ARABIC", Deva="DEVANAGARI", Hans="CJK", Hant="CJK",
    Jpan="CJK HIRAGANA KATAKANA", Hang="CJK HANGUL", Armn="ARMENIAN", Beng="BENGALI",
    Ethi="ETHIOPIC", Geor="GEORGIAN", Grek="GREEK", Gujr="GUJARATI", Hebr="HEBREW", Khmr="KHMER",
    Knda="KANNADA", Laoo="LAO", Mlym="MALAYALAM", Mymr="MYANMAR", Orya="ORIYA", Sinh="SINHALA",
    Taml="TAMIL", Telu="TELUGU", Thai="THAI", Tibt="TIBETAN",
)  # fmt: skip
TWO_SCRIPTS = "kk ku mn pa sr tk tt uz"  # their script is not checked
SCRIPTS = {
    NAMES[code]: UNICODE[file[4:]].split()
    for code, file in FLORES.items()
    if file[4:] in UNICODE and code not in TWO_SCRIPTS.split()
}
# A sentence may be right in two languages of a row, and in two whose names share a word.
CLOSE = """Bosnian Croatian Montenegrin Serbian|Cantonese Chinese|Danish Norwegian Swedish
Catalan Galician Italian Portuguese Spanish|Belarusian Russian Ukrainian|Bulgarian Macedonian
Czech Slovak|Indonesian Malay|Xhosa Zulu"""
PARTICLES = "a al an and bin da de del den der des di do dos du e el en et la le of the und van von"
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
CODE = re.compile(r"[\d/@\\_=<>{}#$%|~^]|\w[.:]\w")  # or a number, or an address


def is_plausible_translation(answer: str, task: Task) -> bool:
    wrong = is_copy(answer, task) or is_wrong_script(answer, task)
    return not (wrong or is_identified_as_other(answer, task.target))


@cache
def are_close(a: str, b: str) -> bool:
    groups = [set(group.split()) for group in re.split(r"[|\n]", f"{CLOSE}|{a}")]
    return any(group & {*a.split()} and group & {*b.split()} for group in groups)


@lru_cache(maxsize=2**12)
def words_in(text: str) -> dict[str, str]:
    """letters -> word, without particles; in a script without spaces, each letter is a word."""
    words = {alnum_only(word): word for word in WORD.findall(text)}
    return {key: word for key, word in words.items() if key and key not in PARTICLES.split()}


@lru_cache(maxsize=2**12)
def names_in(text: str) -> set[str]:
    """Words that a translation may keep: capitalised (unless all are), numbers, code."""
    words = words_in(text.lower() if text.isupper() and len(text.split()) > 2 else text)
    return {key for key, word in words.items() if word != word.lower() or CODE.search(word)}


def is_copy(answer: str, task: Task) -> bool:
    """Whether an answer consists of the source's words, give or take a letter, or contains it all.
    Where a right translation may be a copy, it is left to the judge: names, up to two words (eight
    letters in a script without spaces), and close languages."""
    source, words, names = words_in(task.text), words_in(answer), names_in(task.text)
    plain = [word for word in source.values() if not CODE.search(word)]
    length = sum(0.25 if re.match(f"[{UNSPACED}]", word) else 1 for word in plain)
    if are_close(task.source, task.target) or length <= 2 or names.issuperset(source):
        return False
    a, b = alnum_only(task.text), alnum_only(answer)
    joined = a in b or (b in a and 2 * len(b) > len(a))
    return joined or overlap(words.keys() - names, source) >= 0.8


@lru_cache(maxsize=2**14)
def spellings(word: str) -> set[str]:
    """The word, and the word without one of its letters; a short one keeps a gap there."""
    gap = "*" if len(word) < 5 else ""
    return {word, *(word[:i] + gap + word[i + 1 :] for i in range(len(word)) if len(word) > 2)}


def overlap(words: Collection[str], others: Collection[str]) -> float:
    """The share of the words that are among the others, or one letter off."""
    targets = {spelling for word in others for spelling in spellings(word)}
    return sum(not targets.isdisjoint(spellings(word)) for word in words) / max(1, len(words))


@lru_cache(maxsize=2**16)
def script_of(word: str) -> str:
    """The script of most of its letters, such as LATIN or CJK; "" without letters."""
    names = [unicodedata.name(c, "?") for c in nfkc(word) if c.isalpha()]
    return Counter(re.split("[ -]", name)[0] for name in names or [""]).most_common(1)[0][0]


def is_wrong_script(answer: str, task: Task) -> bool:
    """Whether less than a third of the new words are in the target's script. New are those that the
    source lacks or, if there are none, those that are not its names."""
    words = words_in(answer)
    new = words.keys() - words_in(task.text) or words.keys() - names_in(task.text)
    counts = Counter(filter(None, (script_of(words[key]) for key in new)))
    return 3 * sum(counts[x] for x in SCRIPTS.get(task.target, counts)) < counts.total()


# ------------------------------------------------- languages of one script: py3langid, if installed

LABELS = {name: {"nb": "no", "zh_hant": "zh"}.get(CODES[name], CODES[name]) for name in SCRIPTS}
MIN_LETTERS, MIN_PROBABILITY = 20, 0.85  # docs/faq.md has how often it is wrong with these


@cache
def identifier_version() -> str | None:
    """None if it is not installed. The same on all ranks, and when a run is resumed."""
    try:
        return f"py3langid {importlib.metadata.version('py3langid')}"
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def load_identifier():
    """For those of our languages that it knows."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages({*LABELS.values()} & {*identifier.labels})
    return identifier


def is_identifiable(name: str) -> bool:
    return bool(identifier_version()) and LABELS.get(name) in load_identifier().labels


def is_identified_as_other(answer: str, target: str) -> bool:
    """Whether a long enough answer is, almost certainly, in a language not even close to `target`.
    False without the identifier, and for a target that it does not know."""
    if not is_identifiable(target) or len(alnum_only(answer)) < MIN_LETTERS:
        return False
    label, probability = load_identifier().classify(answer)
    names = [name for name, known in LABELS.items() if known == label]
    return probability >= MIN_PROBABILITY and not any(are_close(name, target) for name in names)


def describe_language_check(targets: Iterable[str]) -> str:
    """How answers in a wrong language are recognised, in one line."""
    targets = sorted(set(targets))
    told = [name for name in targets if is_identifiable(name)]
    line = "Answers in a wrong language are recognised by their script"
    if told:
        line += f" and, for {', '.join(told)}, by {identifier_version()}"
    elif not identifier_version():
        line += ' alone (pip install "py3langid~=0.4.0" tells languages of one script apart)'
    if unknown := [name for name in targets if name not in SCRIPTS]:
        line += f"; for {', '.join(unknown)}, of no known script or of two, only copies are"
    return line
