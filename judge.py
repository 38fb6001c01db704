"""Prompts in, scores out: how the model is asked to translate, to judge itself, and is read.

    texts = Texts(tokenizer)                       # between text and token ids
    prompt = texts.encode([PAPER.ask(task)])       # what the actor continues
    judge = Judge(sampler, texts, PAPER)           # the same sampler, the same weights
    reward = Reward(texts, PAPER, {"self": (1.0, judge)})
    judged = reward(tasks, groups, step)           # .total (P, N), .parts, .words

Text that comes from data or from a model is `Given`: it is tokenised apart from the template and
with every control token in it taken to pieces, so no text can pose as the template. Whether a
translation earns something by its form alone is decided here, before the judge is asked:

    no readable <answer>, tags missing, twice or out of order, cut off         format 0
    a tag, however spelt; a control token or a score that the source has not   format 0
    no letters, a copy (`is_copy`), another script (`wrong_script`)            format 0
    too long to be judged                                                      score 0
    the judge's own words cannot be read as a score                            no reward (NaN)

What the judge says is read strictly (`parse_score`), and only what it wrote itself: the texts that
it is asked about hold no tag (`without_tags`), and without tags what stands in one of them is an
echo. What cannot be read is `None`: never clamped, never a middle value. A sample without a reward
is left out of its group and counted. A plea in words, which a judge may obey, has no form that
could be told from a translation's: it stays inside its fence, and that is all.

Letters: P tasks, N samples of each. Only the standard library is needed: sampler and tokenizer are
handed in.
"""

import datetime
import hashlib
import html
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
GATES = ("product", "zero-one", "plus-minus-one")


class Task(NamedTuple):
    text: str
    source: str
    """The languages' names, as the prompts say them."""
    target: str
    reference: str | None = None
    """For measuring. The self-reward never reads it."""


def is_language(name: str) -> bool:
    """The templates take it as it is: no room for an instruction."""
    return bool(re.fullmatch(r"\w[\w ()'-]{0,39}", name)) and len(name.split()) <= 4


class Given(str):
    """Text from data or from a model, never from a template."""


# ------------------------------------------------------------------------------- the prompts


@dataclass(frozen=True)
class Prompts:
    """Templates with {source_language}, {target_language}, {source} and what is judged:
    {translation}, {first} and {second}, or {candidates}."""

    actor: str
    judge: str
    """For reading="written": the judge writes its score."""
    expected: str
    """For reading="expected": the next token is the score."""
    scores: dict[str, float]
    """What that token may be, each one token, and its worth from 0 to 1."""
    tags: bool
    """Whether answers stand in <think> … </think> <answer> … </answer>; else all of it counts."""
    fence: str = ""
    """Set around what is judged, on lines of its own, longer than any in the text."""
    pair: str = ""
    """Which of two is better: the answer is "first" or "second"."""
    opening: str = ""
    """What an answer begins with where its next token is read."""
    group: str = ""
    """Several at once: the answer is a score of each, in order."""
    candidate: str = ""
    """Each of {candidates}, with {number} and {translation}."""
    most: int = 1
    """Of them in one prompt."""

    def ask(self, task: Task) -> list[str]:
        return self.fill(self.actor, task, {}, "")

    def ask_judge(self, task: Task, translation: str, reading: str = "written") -> list[str]:
        template = self.judge if reading == "written" else self.expected
        return self.fill(template, task, {"translation": translation}, self.fence)

    def ask_pair(self, task: Task, first: str, second: str, reading: str = "written") -> list[str]:
        template = self.pair + (self.opening if reading == "expected" else "")
        return self.fill(template, task, {"first": first, "second": second}, self.fence)

    def ask_group(self, task: Task, candidates: Sequence[str]) -> list[str]:
        each = [
            self.candidate.replace("{number}", str(i)).replace("{translation}", f"{{candidate{i}}}")
            for i in range(1, len(candidates) + 1)
        ]
        given = {f"candidate{i}": text for i, text in enumerate(candidates, 1)}
        return self.fill(self.group.replace("{candidates}", "".join(each)), task, given, self.fence)

    def fill(self, template: str, task: Task, given: dict[str, str], fence: str) -> list[str]:
        """The template's own strings and `Given` ones, in order. The source is fenced, too, where
        the candidates are."""
        for name in (task.source, task.target):
            if not is_language(name):
                raise ValueError(
                    f"{name!r} is no name of a language (letters, spaces, ()'-; 4 words at most)"
                )
        names = {"source_language": task.source, "target_language": task.target}
        template = re.sub(r"\{(\w+_language)\}", lambda m: names[m[1]], template)
        shown = without_tags if given else str  # to a judge, whose answer is in tags
        given = {name: shown(text) for name, text in {"source": task.text, **given}.items()}
        parts: list[str] = []
        for i, piece in enumerate(re.split(rf"\{{({'|'.join(given)})\}}", template)):
            if i % 2 == 0:  # between two names
                parts.append(piece)
                continue
            text = given[piece]
            bar = fence
            while bar and bar in nfkc(text):
                bar += fence[0]
            parts += [bar + "\n", Given(text), "\n" + bar] if bar else [Given(text)]
        return parts


WRAPPER = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves "
    "it. The Assistant first thinks about the reasoning process in the mind and then provides the "
    "User with the answer. The reasoning process is enclosed within <think> </think> and answer is "
    "enclosed within <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
    "</think> <answer> answer here </answer>. \n\nUser:\n%s\n\nAssistant:\n"
)
GEMBA = (
    "Score the following translation from {source_language} to {target_language} on a continuous "
    'scale from 0 to 100, where a score of zero means "no meaning preserved" and score of one '
    'hundred means "perfect meaning and grammar".'
)
ZERO = (
    "Score 0 if the translation is irrelevant, is not in {target_language}, or offers several "
    "translations."
)
SOURCE = "\n\n{source_language} source:\n{source}"
TEXTS = SOURCE + "\n\n{target_language} translation:\n{translation}"
# To compare two, and to score several at once: the wording is ours, after GEMBA's.
PAIR = (
    "Which of two translations from {source_language} to {target_language} is better? The better "
    "one preserves more of the meaning, in better grammar. One that is irrelevant, is not in "
    "{target_language}, or offers several translations is the worse one. Give one word alone as "
    "the answer: first or second."
)
PAIR_TEXTS = (
    SOURCE + "\n\nThe first {target_language} translation:\n{first}"
    "\n\nThe second {target_language} translation:\n{second}"
)
GROUP = (
    f"{GEMBA.replace('the following translation', 'each of the following translations')} {ZERO} "
    "Give the scores alone as the answer, one for each translation, in their order, with commas "
    "between them."
)
THOUGHT = "<think> </think> <answer>"

# The actor's prompt is the one that re-uses of the published model show. The judge's rules are the
# paper's as far as they are known (GEMBA's question without a reference, the three reasons for 0);
# its wording, the fences and the one-digit variant are ours. Fences, not quotation marks: quotes
# would hide doubled quotes, which the paper's models learned to add. The translation comes last,
# so that what is before it is the same for a whole group.
PAPER = Prompts(
    actor=WRAPPER % "Translate the following text to {target_language}:\n{source}",
    judge=WRAPPER % (f"{GEMBA} {ZERO} Give the score alone as the answer." + TEXTS),
    expected=(
        WRAPPER % (f"{GEMBA.replace('100', '9').replace('one hundred', 'nine')} {ZERO}" + TEXTS)
        + THOUGHT
    ),
    scores={str(digit): digit / 9 for digit in range(10)},
    tags=True,
    fence="```",
    pair=WRAPPER % (PAIR + PAIR_TEXTS),
    opening=THOUGHT,
    group=WRAPPER % (GROUP + SOURCE + "{candidates}"),
    candidate="\n\n{target_language} translation {number}:\n{translation}",
    most=16,
)
# For models that were taught to translate when asked, without a show of thinking.
PLAIN = replace(
    PAPER, actor="Translate the following text to {target_language}:\n{source}", tags=False
)
# What a very small model can be taught: a few control words, and scores that are one token each,
# so its judge is asked the same whether the score is written or expected.
TOY = Prompts(
    actor="translate {source_language} {target_language} {source} =>",
    judge="score {source_language} {target_language} {source} || {translation} =>",
    expected="score {source_language} {target_language} {source} || {translation} =>",
    scores={str(tens): tens / 100 for tens in range(0, 101, 10)},
    tags=False,
    pair="compare {source_language} {target_language} {source} || {first} || {second} =>",
    group="rate {source_language} {target_language} {source} {candidates}=>",
    candidate="|| {translation} ",
    most=4,
)


class Texts:
    """Between text and token ids. Control tokens come from templates alone."""

    def __init__(self, tokenizer, chat: bool = False, thinking: bool = True):
        """`chat`: a prompt is a user's turn in the tokenizer's chat template. `thinking`: whether
        the model may think, if that template can choose."""
        self.tokenizer = tokenizer
        # What "unknown" becomes is no way to say anything, so it may come from given text.
        # Some tokenizers add runs of spaces or a line's end: those control nothing.
        added = {t: i for t, i in tokenizer.get_added_vocab().items() if len(t.strip()) > 1}
        harmless = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
        self.control_ids = {*added.values()} - harmless
        self.control = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        # What the tokenizer begins every text with, if anything (Llama 3 does).
        first = tokenizer("a").input_ids[:1]
        self.begin = first if first == [tokenizer.bos_token_id] else []
        self.known: dict[str, list[int]] = {}  # the template's pieces
        self.stop_ids = [tokenizer.eos_token_id]
        self.turn = ("", "")  # what stands before and after a prompt
        self.notes: list[str] = []  # on changes to the chat template
        if chat:
            self.begin = []  # the template has it
            self.turn, end, self.notes = turns(tokenizer, thinking)
            self.stop_ids += [i for i in self.pieces([end])[0][:1] if i in self.control_ids]

    def encode(self, prompts: Sequence[list[str]]) -> list[list[int]]:
        before, after = self.turn
        prompts = [[p for p in (before, *prompt, after) if p] for prompt in prompts]
        given = {part for prompt in prompts for part in prompt if isinstance(part, Given)}
        fixed = {p for prompt in prompts for p in prompt if not isinstance(p, Given)}
        if new := sorted(fixed - self.known.keys()):
            self.known |= zip(new, self.pieces(new), strict=True)
        texts = sorted(given)
        # A control token's text, letter by letter, is only that: letters.
        safe = [self.control.sub(split_control_token, self.plain(t)).split("\0") for t in texts]
        flat = iter(self.pieces([piece for pieces in safe for piece in pieces]))
        ids = {
            t: [i for _ in pieces for i in next(flat)]
            for t, pieces in zip(texts, safe, strict=True)
        }
        for text, found in ids.items():
            if forged := self.control_ids.intersection(found):
                tokens = self.tokenizer.convert_ids_to_tokens(sorted(forged))
                raise ValueError(f"control tokens {tokens} cannot be kept out of {text[:60]!r}")
        tables = {False: self.known, True: ids}
        return [
            [*self.begin, *(i for p in prompt for i in tables[isinstance(p, Given)][p])]
            for prompt in prompts
        ]

    def plain(self, text: str) -> str:
        """Without NUL, and normalised where that brings a control token to light."""
        text = text.replace("\0", "")
        return nfkc(text) if self.control.search(nfkc(text)) else text

    def pieces(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """With control tokens written out, where a model drew some."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def one_token(self, text: str) -> int:
        ids = self.pieces([text])[0]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"reading='expected' needs scores of one token each, but {text!r} is {len(ids)} "
                "or unknown in this tokenizer: use reading='written'"
            )
        return ids[0]


TODAY = datetime.date(2024, 7, 26)  # what Llama 3's template takes where it knows no clock


def turns(tokenizer, thinking: bool = True) -> tuple[tuple[str, str], str, list[str]]:
    """(What a chat template sets before and after a user's words), what ends an assistant's, and
    notes on what was changed in the template: today's date is a fixed one, so that prompts do not
    change from day to day; `thinking=False` disables thinking where the template has a switch."""
    mark = "THE-WORDS"
    talk = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
    if not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no chat template: leave the "
                         "chat option out")  # fmt: skip
    own, switches, notes = tokenizer.get_chat_template(), {}, []
    template = re.sub(
        r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda m: repr(TODAY.strftime(m[2])), own
    )
    if "strftime_now(" in template:
        raise ValueError(f"{tokenizer.name_or_path}: the chat template reads the clock, so prompts "
                         "would change from day to day: write a fixed date into it")  # fmt: skip
    if template != own:
        notes.append(f"The chat template writes today's date; {TODAY} is used instead, so that "
                     "prompts do not change from day to day")  # fmt: skip
    if not thinking and "enable_thinking" in template:
        switches = {"enable_thinking": False}
        notes.append("Thinking is disabled in the chat template: the prompts have no place for it")
    try:
        asked, said = (
            tokenizer.apply_chat_template(
                talk[:n], chat_template=template, tokenize=False, add_generation_prompt=n == 1,
                **switches,
            )
            for n in (1, 2)
        )  # fmt: skip
    except Exception as error:  # whatever the template raises: it is a program
        raise ValueError(f"{tokenizer.name_or_path}: the chat template fails: {error}") from None
    if asked.count(mark) != 1 or said.count(mark) != 2:
        raise ValueError(
            "the tokenizer's chat template does not set down a user's words as they are"
        )
    before, after = asked.split(mark)
    return (before, after), said.rsplit(mark)[-1].strip(), notes


def nfkc(text: str) -> str:
    """As a tokenizer may see it: normalising makes a backtick of U+1FEF, a "<" of a wide one."""
    return unicodedata.normalize("NFKC", text.replace("\0", ""))


def split_control_token(match: re.Match) -> str:
    return "\0" + "\0".join(match[0]) + "\0"


# ------------------------------------------------------------------------ what is not the judge's

# Letters that look like Latin ones, and what looks like < and >.
LOOK_ALIKE = str.maketrans(
    "авеһіјкмнорсԛѕтԝхуαικνορτυɑɪᴀᴇʜᴋɴʀꜱᴛᴡ", "abehijkmhopcqstwxyaikvoptuaiaehknrstw"
)
ANGLES = "<\u2039\u27e8\u3008\u276e\u276c\u1438\u02c2"  # and their like
FILLERS = "\u115f\u1160\u2800"  # blank letters; others become these when normalised
TAG = re.compile(rf"[{ANGLES}]\W?(think|answer)")


@lru_cache(maxsize=2**14)
def folded(text: str) -> str:
    """Without what shows nothing, case, accents and another script's letters in Latin words."""
    if text.isascii() and "&" not in text:  # the same, 20 times as fast
        return re.sub(r"[\0- \x7f]+", "", text.lower())
    text = unicodedata.normalize("NFKD", html.unescape(text)).casefold().translate(LOOK_ALIKE)
    return "".join(c for c in text if unicodedata.category(c)[0] not in "MZC" and c not in FILLERS)


def without_tags(text: str) -> str:
    """With round brackets where a tag, however spelt, could be brought back by an echo."""
    return re.sub(f"[{ANGLES}]", "(", nfkc(text)) if TAG.search(folded(text)) else text


def holds_score(answer: str, source: str) -> bool:
    """A line of scores, unless one of the source has their digits and no letters but in a label;
    or, anywhere, "score: 90" or "90/100", unless the source has that number."""

    def plain(text: str) -> str:
        text = re.sub(r"[*_`\"“”{}()\[\]]", "", nfkc(text))
        return text if text.isascii() else "".join(str(unicodedata.decimal(c, c)) for c in text)

    def digits(lines: Iterable[str]) -> set[str]:
        return {"".join(sorted(filter(str.isdigit, line))) for line in lines}

    answer, source = plain(answer), plain(source)
    lines = (line.strip(" .!?:,;'。") for line in answer.splitlines())
    own = digits(line for line in lines if SCORES.fullmatch(line))
    known = (x for x in source.splitlines() if not re.search(r"[^\W\d]", x.split(":")[-1]))
    labelled = re.findall(r"\bscore\s*[:=]\s*(\d+)(?!\d|\s*[-–:]\s*\d)", answer, re.I)
    labelled += re.findall(r"(\d+)\s*/\s*100\b", answer)
    return not own <= digits(known) or not {*labelled} <= {*re.findall(r"\d+", source)}


def is_echo(words: str, asked: Sequence[str]) -> bool:
    """Whether a judge's answer without tags stands in a text that it was asked about."""
    words = nfkc(words).strip().casefold()
    texts = [nfkc(part).casefold() for part in asked if isinstance(part, Given)]
    return "<answer>" not in words and any(words in text for text in texts)


# ------------------------------------------------------------------------------- the reading


def format_ok(text: str) -> bool:
    """Each of the four tags exactly once, in order."""
    places = [text.find(tag) for tag in TAGS]
    return all(text.count(tag) == 1 for tag in TAGS) and places == sorted(places)


def read_answer(text: str) -> str | None:
    """What stands in the last <answer> … </answer>, or None when there is none."""
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return found[-1].strip() if found else None


FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
SCORE = re.compile(
    r"(?:score\s*:\s*)?(100(?:\.0+)?|[0-9]{1,2}(?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*100)?", re.I
)
SCORES = re.compile(rf"{SCORE.pattern}(?:[,\s]+{SCORE.pattern})*", re.I)


def parse_score(text: str) -> float | None:
    """A judge's words -> 0 … 100, or None when they are no score.

    Read is what stands in the last <answer>. Without any <answer>, the whole text must be a score:
    numbers are never fished out of prose. An <answer> that is not closed was cut off: None.
    """
    answer = answer_text(text)
    found = SCORE.fullmatch(answer.translate(FULL_WIDTH).strip()) if answer is not None else None
    return float(found[1]) if found else None


def answer_text(text: str) -> str | None:
    """What stands in the last <answer>, all of a text without any, None where one was cut off."""
    if text.rfind("<answer>") > text.rfind("</answer>"):
        return None
    answer = read_answer(text)
    return text if answer is None else answer


class Score(NamedTuple):
    value: float | None
    """0 … 1; None: the words are no score."""
    words: str


def check_reading(reading: str, samples: int, temperature: float) -> None:
    if reading not in ("written", "expected"):
        raise ValueError(f"reading={reading!r} is unknown; known: written, expected")
    if samples > 1 and (temperature == 0 or reading == "expected"):
        raise ValueError(
            f"{samples} judge samples would all be the same at temperature {temperature} and "
            f"reading {reading!r}: set a temperature and 'written', or one sample"
        )


class Judge:
    """Asks a sampler's model what translations are worth; each distinct pair once."""

    def __init__(
        self,
        sampler,
        texts: Texts,
        prompts: Prompts,
        reading: str = "written",
        samples: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 1024,
        stop_ids: Sequence[int] = (),
        seed: int = 0,
    ):
        """`samples` judgements of each pair are averaged; more than one needs a temperature."""
        check_reading(reading, samples, temperature)
        self.sampler, self.texts, self.prompts, self.reading = sampler, texts, prompts, reading
        self.samples, self.temperature, self.seed = samples, temperature, seed
        self.max_new_tokens = max_new_tokens if reading == "written" else 1
        self.stop_ids = list(stop_ids)
        self.score_ids = []
        if reading == "expected":
            self.score_ids = [texts.one_token(text) for text in prompts.scores]

    def __call__(self, tasks: Sequence[Task], answers: list[list[str | None]], step: int):
        """answers (P, N) -> scores (P, N) and their words; None is not judged and scores 0."""
        pairs = [
            [(t.text, t.source, t.target, a) for a in row]
            for t, row in zip(tasks, answers, strict=True)
        ]
        scores = self.judge({p for row in pairs for p in row if p[3] is not None}, step)
        nothing = Score(0.0, "not judged")
        return [[scores.get(pair, nothing) for pair in row] for row in pairs]

    def judge(self, distinct: set[tuple], step: int) -> dict[tuple, Score]:
        pairs = sorted(distinct)
        asked = [self.prompts.ask_judge(Task(*p[:3]), p[3], self.reading) for p in pairs]
        prompts = self.texts.encode(asked)
        room = self.sampler.max_length - self.max_new_tokens
        scores = {p: Score(0.0, "too long to judge") for p in pairs}
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
        pairs, prompts = [pairs[i] for i in fitting], [prompts[i] for i in fitting]
        if self.reading == "written":
            read = self.read_written(prompts, [asked[i] for i in fitting], step)
        else:
            read = self.read_expected(prompts)
        return scores | dict(zip(pairs, read, strict=True))

    def write(
        self, prompts: list[list[int]], asked: list[list[str]], step: int, max_new_tokens: int
    ) -> list[list[tuple[str, bool]]]:
        """For each prompt, which `asked` is the text of, its judgements' words, and whether they
        are the judge's own to the end: neither cut off nor an echo."""
        keys = [digest(step, prompt) for prompt in prompts]  # the same whatever else is asked
        groups = self.sampler.generate(
            prompts, self.samples, max_new_tokens, self.temperature,
            stop_ids=self.stop_ids, seed=self.seed, keys=keys,
        )  # fmt: skip
        words = [[self.texts.decode(s.ids[: len(s.ids) - s.stopped]) for s in g] for g in groups]
        return [
            [(w, s.stopped and not is_echo(w, parts)) for w, s in zip(row, group, strict=True)]
            for row, group, parts in zip(words, groups, asked, strict=True)
        ]

    def read_written(
        self, prompts: list[list[int]], asked: list[list[str]], step: int
    ) -> list[Score]:
        scores = []
        for group in self.write(prompts, asked, step, self.max_new_tokens):
            words = [w for w, _ in group]
            read = [parse_score(w) if whole else None for w, whole in group]
            valid = [score / 100 for score in read if score is not None]
            mean = sum(valid) / len(valid) if valid else None
            scores.append(Score(mean, " / ".join(words)))
        return scores

    def read_expected(self, prompts: list[list[int]]) -> list[Score]:
        """The mean score over the score tokens; None when other tokens are likelier than they."""
        scores, worth = [], list(self.prompts.scores.values())
        for row in self.sampler.next_logprobs(prompts, self.score_ids).tolist():
            shares = [math.exp(x) for x in row]
            total = sum(shares)
            mean = sum(v * p for v, p in zip(worth, shares, strict=True)) / max(total, 1e-30)
            likely = list(self.prompts.scores)[shares.index(max(shares))]
            words = f"{likely} ({max(shares):.0%})"
            if total < 0.5:
                words = f"no score: {total:.0%} of the probability lies on score tokens"
            scores.append(Score(mean if total >= 0.5 else None, words))
        return scores


def digest(step: int, ids: Sequence[int]) -> int:
    text = f"{step} {' '.join(map(str, ids))}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class Outside:
    """A scorer that is no language model: `score` takes rows with "src", "mt" and maybe "ref", and
    gives a number for each (COMET does). Each distinct row is asked once."""

    def __init__(
        self,
        score: Callable[[list[dict]], list[float]],
        low: float = 0.0,
        high: float = 1.0,
        references: bool = False,
        control: Sequence[str] = (),
    ):
        """`low` and `high`: the numbers that are worth 0 and 1. `references`: let it see them.
        `control`: what its tokenizer takes for more than letters; a space breaks it in texts."""
        if not high > low:
            raise ValueError(f"the score that is worth 1 ({high}) must be above that of 0 ({low})")
        self.score, self.low, self.high, self.references = score, low, high, references
        self.control = re.compile("|".join(map(re.escape, control)) or r"(?!)")

    def __call__(self, tasks: Sequence[Task], answers: list[list[str | None]], step: int):
        """answers (P, N) -> scores (P, N); None is not asked and scores 0."""
        keys = [
            [(t.text, a, t.reference if self.references else None) for a in row]
            for t, row in zip(tasks, answers, strict=True)
        ]
        asked = list(dict.fromkeys(key for row in keys for key in row if key[1] is not None))
        keys_of_row = ("src", "mt", "ref")[: 3 if self.references else 2]
        rows = [dict(zip(keys_of_row, map(self.plain, key), strict=False)) for key in asked]
        found = {
            key: Score((raw - self.low) / (self.high - self.low), f"{raw:.4f}")
            for key, raw in zip(asked, self.score(rows), strict=True)
        }
        nothing = Score(0.0, "not judged")
        return [[found.get(key, nothing) for key in row] for row in keys]

    def plain(self, text: str | None) -> str | None:
        return text and self.control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)


# -------------------------------------------------------------------------------- the reward

Scorer = Callable[[Sequence[Task], list[list[str | None]], int], list[list[Score]]]


class Judged(NamedTuple):
    """What the samples of one prompt are worth."""

    total: list[float]
    """(N,); NaN where a part has no value."""
    parts: dict[str, list[float]]
    """By name, (N,): "format" (1 or 0) and each scorer's value, 0 … 1 (certainty: nats) or NaN; 0
    where nothing was judged, for its form; "weight", where groups are weighed."""
    words: list[str]
    """What the first scorer said."""
    weight: float = 1.0
    """Of the group's advantages."""


class Reward:
    """Format gate and scores. `scorers`: name -> (weight, scorer), the weights' sum is the scale.

    product         format * score
    zero-one        format + format * score
    plus-minus-one  ±1 + format * score

    A scorer whose `of_samples` is true also gets the groups: it reads ids, not text alone. One
    whose `references` is true sees the tasks' references, the others do not.
    """

    def __init__(
        self,
        texts: Texts,
        prompts: Prompts,
        scorers: dict[str, tuple[float, Scorer]],
        gate="product",
        weigh: Callable | None = None,
    ):
        """`weigh(tasks, answers, scores, step)`: the groups' weights, from what the first scorer
        said."""
        if gate not in GATES:
            raise ValueError(f"gate={gate!r} is unknown; known: {', '.join(GATES)}")
        self.texts, self.prompts, self.scorers, self.gate = texts, prompts, scorers, gate
        self.weigh = weigh

    def __call__(self, tasks: Sequence[Task], groups: list[list], step: int) -> list[Judged]:
        answers = [
            [translation_in(self.texts, self.prompts, task, sample) for sample in group]
            for task, group in zip(tasks, groups, strict=True)
        ]
        found, blind = {}, [task._replace(reference=None) for task in tasks]
        for name, (_, scorer) in self.scorers.items():
            shown = tasks if getattr(scorer, "references", False) else blind
            more = [groups] if getattr(scorer, "of_samples", False) else []
            found[name] = scorer(shown, answers, step, *more)
        first = next(iter(found))
        weights = [1.0] * len(groups)
        if self.weigh:
            weights = self.weigh(blind, answers, found[first], step)
        judged = []
        for p, row in enumerate(answers):
            parts = {"format": [float(answer is not None) for answer in row]}
            for name, rows in found.items():
                parts[name] = [math.nan if x.value is None else x.value for x in rows[p]]
            total = [
                self.combine({name: values[n] for name, values in parts.items()})
                for n in range(len(row))
            ]
            if self.weigh:  # to be logged
                parts["weight"] = [weights[p]] * len(row)
            words = [score.words for score in found[first][p]]
            judged.append(Judged(total, parts, words, weights[p]))
        return judged

    def combine(self, values: dict[str, float]) -> float:
        """NaN (no score) stays NaN, but a broken format needs no score."""
        right = values["format"]
        base = {"product": 0.0, "zero-one": right, "plus-minus-one": 2 * right - 1}[self.gate]
        if not right:
            return base
        return base + sum(weight * values[name] for name, (weight, _) in self.scorers.items())


def translation_in(texts: Texts, prompts: Prompts, task: Task, sample) -> str | None:
    """The translation in a sample, or None when its form earns nothing."""
    if not sample.stopped:
        return None
    text = texts.decode(sample.ids[:-1])
    if prompts.tags and not format_ok(text):
        return None
    answer = texts.plain(read_answer(text) if prompts.tags else text).strip()
    control = {*texts.control.findall(answer)} - {*texts.control.findall(texts.plain(task.text))}
    forged = TAG.search(folded(answer)) or holds_score(answer, task.text)
    if control or forged or not letters_only(answer):
        return None
    return None if is_copy(answer, task) or wrong_script(answer, task) else answer


def shown_translation(texts: Texts, prompts: Prompts, task: Task, sample) -> tuple[str, bool]:
    """What a reader gets, and whether it was readable: what is not is shown as it came, for to
    leave it out of a measure would flatter."""
    text = texts.decode(sample.ids[: len(sample.ids) - sample.stopped])
    answer = read_answer(text) if prompts.tags else text.strip()
    right = translation_in(texts, prompts, task, sample) is not None
    return (text if answer is None else answer), right


# --------------------------------------------------------------------------- copies and scripts

# The script of a language, as Unicode calls it. A language that is not listed is not checked.
WRITTEN = """
LATIN Afrikaans Albanian Azerbaijani Basque Bosnian Catalan Croatian Czech Danish Dutch English
Esperanto Estonian Filipino Finnish French Galician German Hausa Hungarian Icelandic Igbo Irish
Indonesian Italian Javanese Latvian Lithuanian Luxembourgish Malagasy Malay Maltese Maori Polish
Norwegian_Bokmal Norwegian_Nynorsk Portuguese Romanian Scottish_Gaelic Slovak Slovenian Somali
Spanish Swahili Swedish Turkish Vietnamese Welsh Xhosa Yoruba Zulu | ETHIOPIC Amharic | KHMER Khmer
| ARABIC Arabic Pashto Persian Sindhi Urdu Uyghur | ARMENIAN Armenian | BENGALI Assamese Bengali
| CJK Cantonese Chinese Simplified_Chinese Traditional_Chinese | CJK+HANGUL Korean | GREEK Greek
| CJK+HIRAGANA+KATAKANA Japanese | DEVANAGARI Hindi Marathi Nepali | HEBREW Hebrew Yiddish
| CYRILLIC Belarusian Bulgarian Kyrgyz Macedonian Russian Tajik Ukrainian | GEORGIAN Georgian
| GUJARATI Gujarati | KANNADA Kannada | LAO Lao | MALAYALAM Malayalam | MYANMAR Burmese | ORIYA Odia
| SINHALA Sinhala | TAMIL Tamil | TELUGU Telugu | THAI Thai | TIBETAN Tibetan"""
ENTRIES = map(str.split, WRITTEN.split("|"))
SCRIPTS = {x.replace("_", " "): key.split("+") for key, *names in ENTRIES for x in names}
# Of these a sentence may be right in two; so it may where languages' names share a word.
CLOSE = """Bosnian Croatian Montenegrin Serbian|Cantonese Chinese|Danish Norwegian Swedish
Catalan Galician Italian Portuguese Spanish|Belarusian Russian Ukrainian|Bulgarian Macedonian
Czech Slovak|Indonesian Malay|Xhosa Zulu"""
PARTICLES = "a al an and bin da de del den der des di do dos du e el en et la le of the und van von"
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
CODE = re.compile(r"[\d/@\\_=<>{}#$%|~^]|\w[.:]\w")  # or a number, or an address


def letters_only(text: str) -> str:
    """Letters and digits: what is spelt with look-alikes, or with gaps, is the same."""
    return "".join(filter(str.isalnum, folded(text)))


@lru_cache(maxsize=2**12)
def words_in(text: str) -> dict[str, str]:
    """Each word but particles, by its letters; where no spaces are between words, each letter."""
    words = {letters_only(word): word for word in WORD.findall(text)}
    return {key: word for key, word in words.items() if key and key not in PARTICLES.split()}


@lru_cache(maxsize=2**12)
def names_in(text: str) -> set[str]:
    """Words that a translation may keep: with a capital (unless all have), numbers, code."""
    words = words_in(text.lower() if text.isupper() and len(text.split()) > 2 else text)
    return {key for key, word in words.items() if word != word.lower() or CODE.search(word)}


def is_copy(answer: str, task: Task) -> bool:
    """Whether an answer is made of the source's words, give or take a letter, or has all of it.
    Where the truth may be a copy the judge is asked: of names, of two words (eight letters where
    no spaces are), between languages that are close."""
    source, words, names = words_in(task.text), words_in(answer), names_in(task.text)
    groups = [set(group.split()) for group in re.split(r"[|\n]", f"{CLOSE}|{task.source}")]
    close = any(x & {*task.source.split()} and x & {*task.target.split()} for x in groups)
    plain = [word for word in source.values() if not CODE.search(word)]
    length = sum(0.25 if re.match(f"[{UNSPACED}]", word) else 1 for word in plain)
    if close or length <= 2 or names.issuperset(source):
        return False
    a, b = letters_only(task.text), letters_only(answer)
    joined = a in b or (b in a and 2 * len(b) > len(a))
    return joined or share_of(words.keys() - names, source) >= 0.8


@lru_cache(maxsize=2**14)
def spellings(word: str) -> set[str]:
    """The word, and what is left of it without a letter, or with a gap for one if it is short."""
    gap = "*" if len(word) < 5 else ""
    return {word, *(word[:i] + gap + word[i + 1 :] for i in range(len(word)) if len(word) > 2)}


def share_of(words: Collection[str], others: Collection[str]) -> float:
    """Of the words that are among the others, or one letter off."""
    known = {spelling for word in others for spelling in spellings(word)}
    return sum(not known.isdisjoint(spellings(word)) for word in words) / max(1, len(words))


@lru_cache(maxsize=2**16)
def script_of(word: str) -> str:
    """Of most of its letters: LATIN, CJK, …; "" of none."""
    names = [unicodedata.name(c, "?") for c in nfkc(word) if c.isalpha()]
    return Counter(re.split("[ -]", name)[0] for name in names or [""]).most_common(1)[0][0]


def wrong_script(answer: str, task: Task) -> bool:
    """Whether less than a third of the words that are not the source's (or, where all are, of
    those that are not its names) are in the target's script."""
    words = words_in(answer)
    new = words.keys() - words_in(task.text) or words.keys() - names_in(task.text)
    counts = Counter(filter(None, (script_of(words[key]) for key in new)))
    return 3 * sum(counts[x] for x in SCRIPTS.get(task.target, counts)) < counts.total()
