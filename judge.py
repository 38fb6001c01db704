"""The self-reward: the model translates, judges its translations, and the scores are read strictly.

    codec = PromptCodec(tokenizer)                 # text <-> token ids: data/codec.py
    prompt = codec.encode([PAPER.ask(task)])       # what the actor continues
    judge = Judge(sampler, codec, PAPER, stop_ids=codec.stop_ids)     # the same weights
    reward = Reward(codec, PAPER, {"self": (1.0, judge)})
    judged = reward(tasks, groups, step)           # of each task: .total (N,), .parts, .judge_text

Text from data or from a model is `UntrustedText`: it is tokenised apart from the template, with its
control tokens spelled out. What a translation's form can decide is decided before it is judged:

    tags missing, repeated, out of order, or cut off            format 0
    a tag; a control token or a score that the source lacks     format 0
    no letter or digit, or `is_translation` is false            format 0 (the latter is counted)
    too long to be judged                                       score 0
    the judge's output is no score                              no reward (NaN): left out, counted

Only the judge's own words after its thinking are read: output that repeats a text it was asked
about is an echo. A plea (prompt injection in plain words) has the form of a translation, so it is
fenced, but a judge may still obey it. Letters: P tasks, N samples of each.
"""

import hashlib
import html
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class Task(NamedTuple):
    text: str
    source: str  # the languages' names, as the prompts say them
    target: str
    reference: str | None = None  # for metrics; the self-reward never reads it


class UntrustedText(str):
    """Text from data or from a model, never from a template."""


def is_language(name: str) -> bool:
    """Whether a name is short enough to hold no instruction: templates take it as it is."""
    return bool(re.fullmatch(r"\w[\w ()'-]{0,39}", name)) and len(name.split()) <= 4


@dataclass(frozen=True)
class Prompts:
    """Templates with {source_language}, {target_language}, {source} and {translation}."""

    actor: str
    judge: str  # for score_mode="written": the judge writes its score
    expected: str  # for score_mode="expected": the next token is the score
    scores: dict[str, float]  # those tokens, and their values from 0 to 1
    tags: bool  # answers stand in <think> … </think> <answer> … </answer>; else all is the answer
    fence: str = ""  # around what is judged, on lines of its own, longer than any in the text
    name: str = ""

    def ask(self, task: Task) -> list[str]:
        return self.fill(self.actor, task)

    def ask_judge(self, task: Task, translation: str, score_mode: str = "written") -> list[str]:
        template = self.judge if score_mode == "written" else self.expected
        return self.fill(template, task, translation=translation)

    def fill(self, template: str, task: Task, **candidates: str) -> list[str]:
        """The template's own strings and `UntrustedText` ones, in order. With candidates it is a
        prompt for a judge: its texts are fenced, and hold no tags."""
        names = {"source_language": task.source, "target_language": task.target}
        for name in names.values():
            if not is_language(name):
                raise ValueError(f"{name!r} is no name of a language (letters, 4 words at most)")
        template = re.sub(r"\{(\w+_language)\}", lambda m: names[m[1]], template)
        texts = {"source": task.text, **candidates}
        parts = re.split(rf"\{{({'|'.join(texts)})\}}", template)  # every second one is a name
        for i in range(len(parts) - 2, 0, -2):
            text = texts[parts[i]]
            bar = self.fence if candidates else ""
            while bar and bar in nfkc(text):
                bar += self.fence[0]
            text = UntrustedText(without_tags(text) if candidates else text)
            parts[i : i + 1] = [bar + "\n", text, "\n" + bar] if bar else [text]
        return parts


TRANSLATE = "Translate the following text to {target_language}:\n{source}"
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
    'hundred means "perfect meaning and grammar". Score 0 if the translation is irrelevant, is not '
    "in {target_language}, or offers several translations."
)
ONE_DIGIT = GEMBA.replace("100", "9").replace("one hundred", "nine")
SOURCE = "\n\n{source_language} source:\n{source}"
TEXTS = SOURCE + "\n\n{target_language} translation:\n{translation}"
THOUGHT = "<think> </think> <answer>"

# The actor's prompt is the one that users of the published model show. The judge's rules are the
# paper's (GEMBA's question without a reference, three reasons for a 0); its wording, the one-digit
# variant and the fences are ours: quotation marks would hide doubled quotes, which the paper's
# models learned to add. The translation comes last, so that a group shares the prefix before it.
PAPER = Prompts(
    name="paper",
    actor=WRAPPER % TRANSLATE,
    judge=WRAPPER % (GEMBA + " Give the score alone as the answer." + TEXTS),
    expected=WRAPPER % (ONE_DIGIT + TEXTS) + THOUGHT,
    scores={str(digit): digit / 9 for digit in range(10)},
    tags=True,
    fence="```",
)
# For models that were trained to translate without showing their thinking.
PLAIN = replace(PAPER, name="plain", actor=TRANSLATE, tags=False)
# For a very small model: a few control words, and scores of one token each.
TOY = Prompts(
    name="toy",
    actor="translate {source_language} {target_language} {source} =>",
    judge="score {source_language} {target_language} {source} || {translation} =>",
    expected="score {source_language} {target_language} {source} || {translation} =>",
    scores={str(tens): tens / 100 for tens in range(0, 101, 10)},
    tags=False,
)


# Letters that look like Latin ones, and what looks like <.
LOOK_ALIKE = str.maketrans(
    "авеһіјкмнорсԛѕтԝхуαικνορτυɑɪᴀᴇʜᴋɴʀꜱᴛᴡ", "abehijkmhopcqstwxyaikvoptuaiaehknrstw"
)
ANGLES = "<\u2039\u27e8\u3008\u276e\u276c\u1438\u02c2"
FILLERS = "\u115f\u1160\u2800"  # blank letters; others become these when normalised
TAG = re.compile(rf"[{ANGLES}]\W?(think|answer)")


def nfkc(text: str) -> str:
    """As a tokenizer may see it: normalising turns U+1FEF into a backtick, a wide "<" into "<"."""
    return unicodedata.normalize("NFKC", text.replace("\0", ""))


@lru_cache(maxsize=2**14)
def folded(text: str) -> str:
    """Without case, accents, white space, invisible characters and look-alikes of Latin letters."""
    if text.isascii() and "&" not in text:  # the same, 20 times as fast
        return re.sub(r"[\0- \x7f]+", "", text.lower())
    text = unicodedata.normalize("NFKD", html.unescape(text)).casefold().translate(LOOK_ALIKE)
    return "".join(c for c in text if unicodedata.category(c)[0] not in "MZC" and c not in FILLERS)


def alnum_only(text: str) -> str:
    """Letters and digits, folded."""
    return "".join(filter(str.isalnum, folded(text)))


def without_tags(text: str) -> str:
    """Replace "<" and the like by "(" in a text with a tag, which an echo could repeat."""
    return re.sub(f"[{ANGLES}]", "(", nfkc(text)) if TAG.search(folded(text)) else text


def holds_score(answer: str, source: str) -> bool:
    """Whether the answer states a score that the source does not explain: a line is only scores
    ("90", "score: 90") and no line of the source is that number; or "score: 90" or "90/100" stands
    anywhere and the source has no 90."""

    def digits(line: str) -> str:  # in order: another language may turn a date round
        return "".join(sorted(filter(str.isdigit, line)))

    answer, source = (re.sub(r"[*_`\"“”{}()\[\]]", "", nfkc(x)) for x in (answer, source))
    answer, source = ("".join(str(unicodedata.decimal(c, c)) for c in x) for x in (answer, source))
    lines = (line.strip(" .!?:,;'。") for line in answer.splitlines())
    scores = {digits(line) for line in lines if SCORES.fullmatch(line)}
    numbers = [x for x in source.splitlines() if not re.search(r"[^\W\d]", x.split(":")[-1])]
    labelled = re.findall(r"\bscore\s*[:=]\s*(\d+)(?!\d|\s*[-–:]\s*\d)", answer, re.I)
    labelled += re.findall(r"(\d+)\s*/\s*100\b", answer)
    return not (scores <= {*map(digits, numbers)} and {*labelled} <= {*re.findall(r"\d+", source)})


def is_echo(answer: str, question: Sequence[str]) -> bool:
    """Whether a judge's answer without tags repeats a text that it was asked about, or is empty."""
    answer = nfkc(after_thinking(answer) or "").strip().casefold()
    texts = [nfkc(part).casefold() for part in question if isinstance(part, UntrustedText)]
    return "<answer>" not in answer and any(answer in text for text in texts)


def format_ok(text: str) -> bool:
    """Each of the four tags exactly once, in order."""
    return re.findall("|".join(TAGS), text) == [*TAGS]


def read_answer(text: str) -> str | None:
    """What stands in the last <answer> … </answer>, or None when there is none."""
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return answers[-1].strip() if answers else None


def after_thinking(text: str) -> str | None:
    """What follows the last </think>, which a prompt may have opened; None in an open <think>."""
    answer = text.rpartition("</think>")[2]
    return None if "<think>" in answer else answer


def answer_text(text: str) -> str | None:
    """The last <answer> after the thinking, or all the text if it has none; None if the thinking or
    the answer was cut off."""
    text = after_thinking(text)
    if text is None or text.rfind("<answer>") > text.rfind("</answer>"):
        return None
    answer = read_answer(text)
    return text if answer is None else answer


FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
SCORE = re.compile(
    r"(?:score\s*:\s*)?(100(?:\.0+)?|[0-9]{1,2}(?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*100)?", re.I
)
SCORES = re.compile(rf"{SCORE.pattern}(?:[,\s]+{SCORE.pattern})*", re.I)


def parse_score(text: str) -> float | None:
    """A judge's output -> 0 … 100; None unless all of the answer is a score."""
    answer = answer_text(text)
    match = SCORE.fullmatch(answer.translate(FULL_WIDTH).strip()) if answer is not None else None
    return float(match[1]) if match else None


class Score(NamedTuple):
    value: float | None  # 0 … 1; None: there is no score
    judge_text: str


NOT_JUDGED, TOO_LONG = Score(0.0, "not judged"), Score(0.0, "too long to judge")


def score_distinct(
    tasks: Sequence[Task], answers: list[list[str | None]],
    score: Callable[[list[tuple[Task, str]]], list[Score]],
) -> list[list[Score]]:  # fmt: skip
    """answers (P, N) -> scores (P, N); each distinct pair is scored once, an answer of None is not
    judged and scores 0."""
    rows = [[(Task(*task[:3]), a) for a in row] for task, row in zip(tasks, answers, strict=True)]
    pairs = sorted({pair for row in rows for pair in row if pair[1] is not None})
    scores = dict(zip(pairs, score(pairs), strict=True))
    return [[scores.get(pair, NOT_JUDGED) for pair in row] for row in rows]


def prompt_key(step: int, ids: Sequence[int]) -> int:
    text = f"{step} {' '.join(map(str, ids))}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class Judgement(NamedTuple):
    judge_text: str
    own: bool  # the judge's own to the end: neither cut off, nor still thinking, nor an echo


def average_judgements(judgements: Sequence[Judgement], parse: Callable = parse_score) -> Score:
    """The mean over the judgements that `parse` can read, from 0 … 100 to 0 … 1."""
    values = [parse(x.judge_text) if x.own else None for x in judgements]
    values = [value / 100 for value in values if value is not None]
    mean = sum(values) / len(values) if values else None
    return Score(mean, " / ".join(x.judge_text for x in judgements))


class Judge:
    """Asks a sampler's model to score translations. Each distinct pair is asked once."""

    def __init__(
        self, sampler, codec, prompts: Prompts, score_mode: str = "written",
        samples: int = 1, temperature: float = 0.0, max_new_tokens: int = 1024,
        stop_ids: Sequence[int] = (), seed: int = 0,
    ):  # fmt: skip
        """`samples` judgements of each pair are averaged; more than one needs a temperature."""
        self.sampler, self.codec, self.prompts = sampler, codec, prompts
        self.score_mode, self.max_new_tokens = score_mode, max_new_tokens
        self.samples, self.temperature, self.seed = samples, temperature, seed
        self.stop_ids, self.values = list(stop_ids), {}
        if score_mode == "expected":
            self.values = {codec.one_token(text): x for text, x in prompts.scores.items()}

    def __call__(self, tasks: Sequence[Task], answers: list[list[str | None]], step: int):
        return score_distinct(tasks, answers, lambda pairs: self.judge(pairs, step))

    def judge(self, pairs: list[tuple[Task, str]], step: int) -> list[Score]:
        questions = [self.prompts.ask_judge(*pair, self.score_mode) for pair in pairs]
        scores = self.ask(questions, step, parse_score, self.values)
        return [scores.get(i, TOO_LONG) for i in range(len(pairs))]

    def ask(
        self, questions: list[list[str]], step: int, parse: Callable, values: dict[int, float]
    ) -> dict[int, Score]:
        """Scores of the questions that fit the window, by number: what `parse` makes of a written
        answer (0 … 100), or the mean of `values` (by token id, 0 … 1) under the next token's
        probabilities."""
        if self.score_mode == "written":
            written = self.write(questions, step, self.max_new_tokens)
            return {i: average_judgements(group, parse) for i, group in written.items()}
        prompts = self.fitting(questions, 1)
        rows = self.sampler.next_logprobs([*prompts.values()], [*values]).tolist()
        return {i: self.read_expected(row, values) for i, row in zip(prompts, rows, strict=True)}

    def write(
        self, questions: list[list[str]], step: int, max_new_tokens: int
    ) -> dict[int, list[Judgement]]:
        """The judgements on those questions that fit the window."""
        prompts = self.fitting(questions, max_new_tokens)
        keys = [prompt_key(step, ids) for ids in prompts.values()]  # same in any batch
        groups = self.sampler.generate(
            [*prompts.values()], self.samples, max_new_tokens, self.temperature,
            stop_ids=self.stop_ids, seed=self.seed, keys=keys,
        )  # fmt: skip
        groups = dict(zip(prompts, groups, strict=True))
        return {i: [self.read(x, questions[i]) for x in group] for i, group in groups.items()}

    def fitting(self, questions: list[list[str]], max_new_tokens: int) -> dict[int, list[int]]:
        """The prompts that fit the window, by the question's number."""
        room = self.sampler.max_length - max_new_tokens
        return {i: p for i, p in enumerate(self.codec.encode(questions)) if len(p) <= room}

    def read(self, sample, question: list[str]) -> Judgement:
        text = self.codec.decode(sample.ids[: len(sample.ids) - sample.stopped])
        echo = is_echo(self.codec.thought_start + text, question)
        return Judgement(text, sample.stopped and not echo)

    def read_expected(self, logprobs: list[float], values: dict[int, float]) -> Score:
        """The mean over the tokens of `values`; None when others are likelier than all of them."""
        probs = [math.exp(x) for x in logprobs]
        total = sum(probs)
        if not total >= 0.5:
            return Score(None, f"no score: {total:.0%} of the probability lies on score tokens")
        mean = sum(v * p for v, p in zip(values.values(), probs, strict=True)) / total
        likeliest = self.codec.decode([[*values][probs.index(max(probs))]]).strip()
        return Score(mean, f"{likeliest} ({max(probs):.0%})")


Scorer = Callable[[Sequence[Task], list[list[str | None]], int], list[list[Score]]]
# The reward of a wrong format, and what is added to the score of a right one.
FORMAT_REWARDS = {"product": (0.0, 0.0), "zero-one": (0.0, 1.0), "plus-minus-one": (-1.0, 1.0)}


class RewardOutput(NamedTuple):
    """The rewards of one prompt's samples."""

    total: list[float]  # (N,); NaN where a part has no value
    # By name, (N,): "format" (1 or 0), "wrong_language" (1 where that alone made it 0), each
    # scorer's value (0 … 1, NaN, or 0 where the form was wrong), and "weight" of weighted groups.
    parts: dict[str, list[float]]
    judge_text: list[str]  # the first scorer's
    weight: float = 1.0  # of the group's advantages
    part_weights: dict[str, float] | None = None  # of the parts that the total is the sum of


class Reward:
    """Format check and scores. `scorers`: name -> (weight, scorer); score = Σ weight · value.

        format_reward     right format    wrong format
        product           score           0
        zero-one          1 + score       0
        plus-minus-one    1 + score       -1

    A scorer whose `needs_token_ids` is true also gets the samples; one whose `references` is true
    sees the tasks' references, the others do not.
    """

    def __init__(
        self, codec, prompts: Prompts, scorers: dict[str, tuple[float, Scorer]],
        format_reward: str = "product", weigh: Callable | None = None,
        is_translation: Callable[[str, Task], bool] = lambda answer, task: True,
    ):  # fmt: skip
        """`weigh(tasks, answers, scores, step)`: the groups' weights, from the first scorer's
        scores. `is_translation(answer, task)`: part of the format check, beyond the form."""
        self.codec, self.prompts, self.scorers = codec, prompts, scorers
        self.format_reward = FORMAT_REWARDS[format_reward]
        self.weigh, self.is_translation = weigh, is_translation

    def __call__(self, tasks: Sequence[Task], groups: list[list], step: int) -> list[RewardOutput]:
        formed = [  # (P, N): what has the right form, in whatever language
            [translation_in(self.codec, self.prompts, task, x) for x in group]
            for task, group in zip(tasks, groups, strict=True)
        ]
        answers = [
            [x if x is None or self.is_translation(x, task) else None for x in row]
            for task, row in zip(tasks, formed, strict=True)
        ]
        scores, blind = {}, [task._replace(reference=None) for task in tasks]
        for name, (_, scorer) in self.scorers.items():
            shown = tasks if getattr(scorer, "references", False) else blind
            samples = [groups] if getattr(scorer, "needs_token_ids", False) else []
            scores[name] = scorer(shown, answers, step, *samples)
        first = next(iter(scores.values()))
        weights = self.weigh(blind, answers, first, step) if self.weigh else [1.0] * len(groups)
        wrong, right = self.format_reward
        part_weights = {"format": right - wrong} if right > wrong else {}
        part_weights |= {name: weight for name, (weight, _) in self.scorers.items()}
        judged = []
        for p, row in enumerate(answers):
            ok = [answer is not None for answer in row]
            parts = {"format": [float(x) for x in ok]}
            parts["wrong_language"] = [float(x != y) for x, y in zip(formed[p], row, strict=True)]
            # A missing score stays NaN, but a wrong format needs none.
            for name, rows in scores.items():
                values = [math.nan if x.value is None else x.value for x in rows[p]]
                parts[name] = [x if good else 0.0 for good, x in zip(ok, values, strict=True)]
            weighted = [(weight, parts[name]) for name, (weight, _) in self.scorers.items()]
            total = [
                right + sum(w * values[n] for w, values in weighted) if good else wrong
                for n, good in enumerate(ok)
            ]
            if self.weigh:
                parts["weight"] = [weights[p]] * len(row)
            judge_text = [x.judge_text for x in first[p]]
            judged.append(RewardOutput(total, parts, judge_text, weights[p], part_weights))
        return judged


def translation_in(codec, prompts: Prompts, task: Task, sample) -> str | None:
    """The translation in a sample, or None when its form earns nothing."""
    text, spoken = codec.read(sample)  # `spoken`: what follows the thinking
    if not sample.stopped or spoken is None or (prompts.tags and not format_ok(text)):
        return None
    answer = codec.sanitize(read_answer(spoken) if prompts.tags else spoken).strip()
    control = {*codec.control.findall(answer)} - {*codec.control.findall(codec.sanitize(task.text))}
    forged = TAG.search(folded(answer)) or holds_score(answer, task.text)
    return None if control or forged or not alnum_only(answer) else answer


def shown_translation(codec, prompts: Prompts, task: Task, sample) -> tuple[str, bool]:
    """What a reader gets, and whether its form was right, in whatever language. Unreadable output
    is kept verbatim: dropping it would inflate metrics."""
    _, answer = codec.read(sample)
    answer = read_answer(answer or "") if prompts.tags else answer
    text = codec.decode(sample.ids[: len(sample.ids) - sample.stopped])
    right = translation_in(codec, prompts, task, sample) is not None
    return (text if answer is None else answer.strip()), right
