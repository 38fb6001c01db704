"""The other self-rewards of the family: what else a policy can be rewarded with by itself.

    python ssr.py --reward certainty           # self-certainty (Intuitor, 2505.19590)
    python ssr.py --reward confidence          # of the answer's span (RLSF, 2507.21931)
    python ssr.py --reward pairs               # win rate within the group (SPO, 2401.04056)
    python ssr.py --reward group               # all candidates of a text in one judge prompt
    python ssr.py --reward cream --judge previous      # consistent judgements (CREAM, 2410.12735)
    python ssr.py --reward majority            # what most of a group say (TTRL, 2504.16084)

Each is a scorer for judge.Reward: `scorer(tasks, answers, step)` gives scores (P, N), where an
answer that is None, for its form, is not judged and scores 0. The first two read probabilities, so
they also get the samples (`of_samples`). The policy judges in pairs and groups with the sampler,
reading and temperature of the `judge.Judge` that they are given.

Letters: P tasks, N samples of each, M tokens of a micro-batch, V vocabulary.
"""

import bisect
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import torch
from torch import Tensor

import grpo
from judge import FULL_WIDTH, Judge, Prompts, Score, Task, Texts, answer_text, parse_score

Answers = list[list[str | None]]

REWARDS = ("certainty", "confidence", "pairs", "group", "cream", "majority")
SKILLS = {"pairs": "compare", "group": "rate"}  # what a toy must have been taught
NOTHING = Score(0.0, "not judged")
LOGITS = 2**26  # at once: 256 MiB in fp32


def check(s, toy_skills: Sequence[str]) -> None:
    """Refuse settings that this reward cannot use."""
    if s.reward in ("certainty", "confidence") and s.judge != "live":
        raise ValueError(f"--reward {s.reward} is read from the policy's own probabilities: leave "
                         f"--judge {s.judge} out")  # fmt: skip
    if s.reward in REWARDS and s.judge_model:
        raise ValueError(f"--judge-model has nothing to judge with --reward {s.reward}: that is "
                         "the policy's own")  # fmt: skip
    if s.reward == "cream" and s.judge == "live":
        raise ValueError("--reward cream compares the live judge with another of the policy's own: "
                         "use --judge previous (paper), frozen or ema")  # fmt: skip
    if s.preset == "toy" and not s.model:
        check_taught(s, toy_skills)


def check_taught(s, known) -> None:
    """`known`: a toy's skills, or its vocabulary, where each is a word."""
    skill = SKILLS.get(s.reward)
    if skill and skill not in known:
        raise ValueError(f"--reward {s.reward}: the toy{f' {s.model}' * bool(s.model)} must be "
                         f"taught to {skill}: use --toy-skills {skill}")  # fmt: skip


def together(s, prompts: Prompts) -> int:
    """The most candidates that stand in one question to the judge."""
    return {"pairs": 2, "group": min(prompts.most, s.samples_per_prompt)}.get(s.reward, 1)


def asks(s, prompts: Prompts, task: Task) -> list[str]:
    """The longest question, with nothing in it."""
    if s.reward == "pairs":
        return prompts.ask_pair(task, "", "", s.reading)
    if s.reward == "group":
        return prompts.ask_group(task, [""] * together(s, prompts))
    return prompts.ask_judge(task, "", s.reading)


def words_of(s, prompts: Prompts) -> int:
    """The most tokens that the judge writes."""
    if s.reward == "group":  # room for a score of each, and for the stop
        return max(s.judge_max_new_tokens, together(s, prompts) + 1)
    return s.judge_max_new_tokens if s.reading == "written" else 1


def scorers(s, judge: Judge) -> dict:
    """name -> (weight, scorer) for judge.Reward; `judge` is the policy."""
    texts, prompts = judge.texts, judge.prompts
    own = judge.sampler.model, texts, prompts, s.temperature, s.micro_batch_tokens
    if s.reward == "certainty":
        scorer = Confidence(self_certainty, lambda ids: range(len(ids)), *own)
    elif s.reward == "confidence":
        answer = partial(answer_span, texts) if prompts.tags else lambda ids: range(len(ids) - 1)
        scorer = Confidence(top_gap, answer, *own)
    elif s.reward == "pairs":
        scorer = Pairs(judge)
    elif s.reward == "group":
        scorer = Group(judge, together(s, prompts), words_of(s, prompts))
    else:
        scorer = judge if s.reward == "cream" else majority
    return {"self" if s.reward == "cream" else s.reward: (1.0, scorer)}


def majority(tasks: Sequence[Task], answers: Answers, step: int) -> list[list[Score]]:
    """1 for what most of the group say, white space aside; of several, what appears first."""
    scores = []
    for row in answers:
        plain = [a if a is None else " ".join(a.split()) for a in row]
        counts = Counter(a for a in plain if a is not None)  # in order of appearance, as max looks
        best = max(counts, key=counts.__getitem__, default=None)
        found = [Score(float(a == best), f"{counts[a]} of {len(row)}") for a in plain]
        scores.append([NOTHING if a is None else x for a, x in zip(plain, found, strict=True)])
    return scores


# ------------------------------------------------------------------------- its own probabilities


def self_certainty(logits: Tensor) -> Tensor:
    """(M, V) -> (M,): KL(uniform‖p) in nats, exactly 0 for equal logits."""
    # With the maximum taken off first: logsumexp - mean - log V of large logits would round.
    logits = logits - logits.amax(-1, keepdim=True)
    return (logits.exp().mean(-1).log() - logits.mean(-1)).clamp(min=0)


def top_gap(logits: Tensor) -> Tensor:
    """(M, V) -> (M,): the likeliest token's probability minus the next one's."""
    first, second = logits.softmax(-1).topk(2).values.unbind(-1)
    return first - second


class Confidence:
    """The mean of `measure` over some of a sample's tokens, `where(ids)`: by the weights that drew
    it, of the whole vocabulary, at the temperature at which they are trained."""

    of_samples = True

    def __init__(
        self, measure: Callable[[Tensor], Tensor], where: Callable[[list[int]], range], model,
        texts: Texts, prompts: Prompts, temperature: float, micro_batch_tokens: int,
    ):  # fmt: skip
        self.measure, self.where, self.model = measure, where, model
        self.texts, self.prompts = texts, prompts
        self.temperature, self.most = temperature, micro_batch_tokens

    def __call__(
        self, tasks: Sequence[Task], answers: Answers, step: int, groups: list[list]
    ) -> list[list[Score]]:
        prompts = self.texts.encode([self.prompts.ask(task) for task in tasks])
        rows = {  # each distinct sample of a prompt once
            (p, tuple(x.ids)): grpo.Row(prompts[p], x.ids, x.logprobs, 0.0, 1)
            for p, (row, group) in enumerate(zip(answers, groups, strict=True))
            for answer, x in zip(row, group, strict=True)
            if answer is not None
        }
        values = self.per_token(list(rows.values()))
        scores = {
            key: self.score(row.ids, x) for (key, row), x in zip(rows.items(), values, strict=True)
        }
        return [
            [
                NOTHING if answer is None else scores[p, tuple(x.ids)]
                for answer, x in zip(row, group, strict=True)
            ]
            for p, (row, group) in enumerate(zip(answers, groups, strict=True))
        ]

    def score(self, ids: list[int], values: Tensor) -> Score:
        some = self.where(ids)
        value = float(values[some.start : some.stop].mean())
        if math.isnan(value):
            raise FloatingPointError("the model's logits are not finite")
        return Score(value, f"{value:.4f} over {len(some)} tokens")

    @torch.no_grad()
    def per_token(self, rows: list[grpo.Row]) -> list[Tensor]:
        """Packed as in training, so that a prompt is computed once for its samples."""
        found: dict[int, Tensor] = {}
        device, vocabulary = self.model.head_weight.device, len(self.model.head_weight)
        for part in grpo.pack(range(len(rows)), rows, self.most, 1) if rows else []:
            some = [rows[i] for i in part]
            hidden = grpo.MicroBatch(some, [0.0] * len(some), None, device).hidden(self.model)
            values = [
                self.measure(self.model.logits(h) / self.temperature)
                for h in hidden.split(max(1, LOGITS // vocabulary))
            ]
            sizes = [len(row.ids) for row in some]
            found |= zip(part, torch.cat(values).double().cpu().split(sizes), strict=True)
        return [found[i] for i in range(len(rows))]


def answer_span(texts: Texts, ids: list[int]) -> range:
    """The tokens of what stands in the last <answer>, white space at its ends aside. One that also
    holds a part of something else (a tokenizer may merge "> a") counts; so does each of those that
    only together make a character."""
    ids = ids[:-1]  # the stop
    text = texts.decode(ids)
    start = text.rfind("<answer>") + len("<answer>")
    answer = text[start : text.rfind("</answer>")]
    start, end = start + len(answer) - len(answer.lstrip()), start + len(answer.rstrip())

    def length(count: int) -> int:
        """Characters that so many tokens complete."""
        return len(texts.decode(ids[:count]).rstrip("\ufffd"))

    counts = range(len(ids) + 1)
    first = bisect.bisect_left(counts, start, key=length)
    return range(first - (length(first) > start), bisect.bisect_left(counts, end, key=length))


# -------------------------------------------------------------------------- asked by the group


class Pairs:
    """The mean over the other candidates of P(this one is better), each pair asked in both orders:

        P(a beats b) = ½ (P("first" | a, b) + 1 - P("first" | b, a))

    so a leaning towards one place is no advantage. Equal candidates have ½ without asking, and so
    has one that is alone. A pair whose judgement cannot be read, or is too long to be asked, is
    left out.
    """

    def __init__(self, judge: Judge):
        self.judge = judge
        if judge.reading == "expected":
            self.first, self.second = (word_ids(judge.texts, x) for x in ("first", "second"))

    def __call__(self, tasks: Sequence[Task], answers: Answers, step: int) -> list[list[Score]]:
        asked = {
            (task.text, task.source, task.target, *pair)
            for task, row in zip(tasks, answers, strict=True)
            for pair in itertools.permutations({a for a in row if a is not None}, 2)
        }
        found = self.ask(sorted(asked), step)
        scores = []
        for task, row in zip(tasks, answers, strict=True):
            about = task.text, task.source, task.target
            scores.append([])
            for n, a in enumerate(row):
                others = [b for b in row[:n] + row[n + 1 :] if b is not None]
                both = [(found.get((*about, a, b)), found.get((*about, b, a))) for b in others]
                scores[-1].append(NOTHING if a is None else win_rate(both))
        return scores

    def ask(self, pairs: list[tuple], step: int) -> dict[tuple, Score]:
        """(text, source, target, a, b) -> P(a, which stands first, is better)."""
        judge = self.judge
        asked = [judge.prompts.ask_pair(Task(*p[:3]), *p[3:], judge.reading) for p in pairs]
        prompts = judge.texts.encode(asked)
        fit = [i for i, p in enumerate(prompts) if fits(judge, p, judge.max_new_tokens)]
        prompts, asked = [prompts[i] for i in fit], [asked[i] for i in fit]
        if judge.reading == "written":
            scores = self.read_written(prompts, asked, step)
        else:
            scores = self.read_expected(prompts)
        too_long = dict.fromkeys(pairs, Score(None, "too long to judge"))
        return too_long | {pairs[i]: score for i, score in zip(fit, scores, strict=True)}

    def read_written(
        self, prompts: list[list[int]], asked: list[list[str]], step: int
    ) -> list[Score]:
        scores, worth = [], {"first": 1.0, "second": 0.0}
        for group in self.judge.write(prompts, asked, step, self.judge.max_new_tokens):
            read = [(answer_text(w) or "").strip().casefold() if own else "" for w, own in group]
            valid = [worth[word] for word in read if word in worth]
            mean = math.fsum(valid) / len(valid) if valid else None
            scores.append(Score(mean, " / ".join(w for w, _ in group)))
        return scores

    def read_expected(self, prompts: list[list[int]]) -> list[Score]:
        """The first word's share; None when other tokens are likelier than both."""
        scores = []
        ids = [*self.first, *self.second]
        for row in self.judge.sampler.next_logprobs(prompts, ids).tolist():
            shares = [math.exp(x) for x in row]
            first, second = sum(shares[: len(self.first)]), sum(shares[len(self.first) :])
            known = first + second >= 0.5
            words = f"first {first:.0%}, second {second:.0%}"
            scores.append(Score(first / (first + second) if known else None, words))
        return scores


def win_rate(both: list[tuple[Score | None, Score | None]]) -> Score:
    """From the judgements of a candidate with each other one, in both orders; None: equal."""
    if not both:
        return Score(0.5, "nothing to compare with")
    shares, lost = [], ""
    for there, back in both:
        if there is None:
            shares.append(0.5)
        elif there.value is None or back.value is None:
            lost = lost or (there.words if there.value is None else back.words)
        else:
            shares.append((1 + (there.value - back.value)) / 2)
    if not shares:
        return Score(None, lost)
    value = math.fsum(shares) / len(shares)
    return Score(value, f"beats {value:.0%} of {len(shares)}")


def word_ids(texts: Texts, word: str) -> list[int]:
    """Of a word that is one token; with a space before it, as the template shows, it may be
    another."""
    unknown = texts.tokenizer.unk_token_id
    found = {ids[0] for ids in texts.pieces([word, f" {word}"]) if len(ids) == 1} - {unknown}
    return sorted(found) or [texts.one_token(word)]  # which says what is wrong


def fits(judge: Judge, prompt: list[int], new: int) -> bool:
    return len(prompt) + new <= judge.sampler.max_length


class Group:
    """All candidates of a text in one prompt, which is answered with a score of each, in order.

    Equal ones stand there once. Their order is drawn anew at each step: places are not judged
    alike. More than `most` are dealt into several prompts. It is always written, whatever the
    judge's reading; an answer with another number of scores, or one that is none, is no score of
    any of them, and neither is one to a prompt that is too long to be asked.
    """

    def __init__(self, judge: Judge, most: int, max_new_tokens: int):
        self.judge, self.most, self.max_new_tokens = judge, most, max_new_tokens

    def __call__(self, tasks: Sequence[Task], answers: Answers, step: int) -> list[list[Score]]:
        asked = [
            (p, part)
            for p, (task, row) in enumerate(zip(tasks, answers, strict=True))
            for part in self.deal(task, row, step)
        ]
        parts = [self.judge.prompts.ask_group(tasks[p], part) for p, part in asked]
        prompts = self.judge.texts.encode(parts)
        fit = [i for i, x in enumerate(prompts) if fits(self.judge, x, self.max_new_tokens)]
        prompts, parts = [prompts[i] for i in fit], [parts[i] for i in fit]
        groups = self.judge.write(prompts, parts, step, self.max_new_tokens)
        found = {(p, a): Score(None, "too long to judge") for p, part in asked for a in part}
        for i, group in zip(fit, groups, strict=True):
            p, part = asked[i]
            found |= {(p, a): score for a, score in zip(part, read_scores(group, len(part)),
                                                        strict=True)}  # fmt: skip
        return [
            [NOTHING if a is None else found[p, a] for a in row] for p, row in enumerate(answers)
        ]

    def deal(self, task: Task, row: list[str | None], step: int) -> list[list[str]]:
        """Distinct candidates, in prompts of about the same number."""
        distinct = sorted({a for a in row if a is not None})
        Random(f"{self.judge.seed} {step} {task.text}").shuffle(distinct)
        prompts = math.ceil(len(distinct) / self.most)
        return [distinct[i::prompts] for i in range(prompts)]


def read_scores(group: list[tuple[str, bool]], count: int) -> list[Score]:
    """The mean of each candidate's scores over the judgements that can be read."""
    valid = []
    for words, own in group:
        answer = (answer_text(words) or "").translate(FULL_WIDTH).strip() if own else ""
        pieces = re.split(",", answer) if "," in answer else answer.split()
        read = [parse_score(piece) for piece in pieces]
        if len(read) == count and None not in read:
            valid.append(read)
    words = " / ".join(w for w, _ in group)
    if not valid:
        return [Score(None, words)] * count
    return [Score(math.fsum(x) / len(x) / 100, words) for x in zip(*valid, strict=True)]


# ----------------------------------------------------------------------------- consistent judges


def weigher(s, judge: Judge) -> "Agreement | None":
    """`judge`: whom the live one is compared with."""
    return Agreement(judge) if s.reward == "cream" else None


class Agreement:
    """CREAM's weight of a group: 2c - 1, where c is (τ + 1) / 2, so it is Kendall's τ itself,
    between two judges' rankings of its samples. Those of a wrong form are last for both.

    paper: one c, the mean over the data set / here: one of each group / because AdamW divides out
    a factor that a whole batch has in common.
    """

    def __init__(self, judge: Judge):
        self.judge = judge

    def __call__(
        self, tasks: Sequence[Task], answers: Answers, scores: list[list[Score]], step: int
    ) -> list[float]:
        then = self.judge(tasks, answers, step)
        return [
            kendall([x.value for x in a], [x.value for x in b])
            for a, b in zip(scores, then, strict=True)
        ]


def kendall(a: list[float | None], b: list[float | None]) -> float:
    """(concordant - discordant) / pairs that are not tied in both; 0 where there is none."""
    known = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    signs = [(sign(x - u), sign(y - v)) for (x, y), (u, v) in itertools.combinations(known, 2)]
    counted = [(x, y) for x, y in signs if x or y]
    return sum(x * y for x, y in counted) / max(1, len(counted))


def sign(x: float) -> int:
    return (x > 0) - (x < 0)
