"""The other self-rewards of the family: what else a policy can reward itself with.

    python ssr.py --reward certainty           # self-certainty (Intuitor, 2505.19590)
    python ssr.py --reward confidence          # of the answer's span (RLSF, 2507.21931)
    python ssr.py --reward pairs               # win rate within the group (SPO, 2401.04056)
    python ssr.py --reward group               # all candidates of a text in one judge prompt
    python ssr.py --reward cream --judge previous      # consistent judgements (CREAM, 2410.12735)
    python ssr.py --reward majority            # the group's most frequent answer (TTRL, 2504.16084)

Each is a scorer for judge.Reward: `scorer(tasks, answers, step)` returns scores (P, N); an answer
of None has a wrong form and scores 0. Letters: P tasks, N samples of each, M tokens of a
micro-batch, V vocabulary.
"""

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

import grpo
from data.codec import PromptCodec
from judge import (
    FULL_WIDTH,
    GEMBA,
    NOT_JUDGED,
    SOURCE,
    THOUGHT,
    WRAPPER,
    Judge,
    Prompts,
    Score,
    Task,
    answer_text,
    average_judgements,
    parse_score,
)

Answers = list[list[str | None]]

REWARDS = ("certainty", "confidence", "pairs", "group", "cream", "majority")
SKILLS = {"pairs": "compare", "group": "rate"}  # what a toy must have been taught
LOGITS = 2**26  # at once: 256 MiB in fp32
TOO_LONG = Score(None, "too long to judge")  # no reward, unlike a single translation's 0
EQUAL = Score(0.5, "equal")


def largest_question(s, prompts: Prompts, task: Task) -> tuple[list[str], int, int]:
    """The judge's question with blank candidates, their number, and the tokens it generates."""
    new_tokens = s.judge_max_new_tokens if s.score_mode == "written" else 1
    if s.reward == "pairs":
        return ask_pair(prompts, task, "", "", s.score_mode), 2, new_tokens
    if s.reward == "group":  # it needs room for a score of each, and for the stop
        size = min(COMPARISONS[prompts.name].most, s.samples_per_prompt)
        return ask_group(prompts, task, [""] * size), size, max(s.judge_max_new_tokens, size + 1)
    return prompts.ask_judge(task, "", s.score_mode), 1, new_tokens


def self_scorers(s, judge: Judge) -> dict:
    """name -> (weight, scorer) for judge.Reward; `judge` is the policy."""
    if s.reward == "certainty":
        scorer = confidence(self_certainty, lambda ids: range(len(ids)), judge, s)
    elif s.reward == "confidence":
        scorer = confidence(top_gap, partial(answer_span, judge.codec), judge, s)
    elif s.reward == "pairs":
        scorer = PairwiseJudge(judge)
    elif s.reward == "group":
        _, size, new_tokens = largest_question(s, judge.prompts, Task("", "English", "Chinese"))
        scorer = GroupJudge(judge, size, new_tokens)
    else:
        scorer = judge if s.reward == "cream" else majority
    return {"self" if s.reward == "cream" else s.reward: (1.0, scorer)}


def majority(tasks: Sequence[Task], answers: Answers, step: int) -> list[list[Score]]:
    """1 for the group's most frequent answer (white space aside; of several, the first), else 0."""
    scores = []
    for row in answers:
        plain = [a if a is None else " ".join(a.split()) for a in row]
        counts = Counter(a for a in plain if a is not None)  # in order of appearance, as max looks
        best = max(counts, key=counts.__getitem__, default=None)
        scores.append([
            NOT_JUDGED if a is None else Score(float(a == best), f"{counts[a]} of {len(row)}")
            for a in plain
        ])  # fmt: skip
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


def confidence(
    measure: Callable[[Tensor], Tensor], where: Callable[[list[int]], range], judge: Judge, s
) -> Callable:
    """The mean of `measure` over a sample's tokens in `where(ids)`, with the weights that drew it,
    over the whole vocabulary, at the temperature of training."""
    model = judge.sampler.model

    @torch.no_grad()
    def score(
        tasks: Sequence[Task], answers: Answers, step: int, groups: list[list]
    ) -> list[list[Score]]:
        prompts = judge.codec.encode([judge.prompts.ask(task) for task in tasks])
        rows = {  # each distinct sample of a prompt once
            (p, tuple(x.ids)): grpo.TrainSample(prompts[p], x.ids, x.logprobs, 0.0, 1)
            for p, (row, group) in enumerate(zip(answers, groups, strict=True))
            for answer, x in zip(row, group, strict=True)
            if answer is not None
        }
        scores: dict[grpo.TrainSample, Score] = {}
        device, vocabulary = model.head_weight.device, len(model.head_weight)
        # Packed as in training, so that a prompt is computed once for its samples.
        for part in filter(
            None, grpo.pack_micro_batches([*rows.values()], s.micro_batch_tokens, 1)
        ):
            hidden = grpo.MicroBatch(part, device).hidden(model)
            values = [
                measure(model.logits(h) / s.temperature)
                for h in hidden.split(max(1, LOGITS // vocabulary))
            ]
            sizes = [len(row.ids) for row in part]
            for row, x in zip(part, torch.cat(values).double().cpu().split(sizes), strict=True):
                span = where(row.ids)
                value = float(x[span.start : span.stop].mean())
                if math.isnan(value):
                    raise FloatingPointError("the model's logits are not finite")
                scores[row] = Score(value, f"{value:.4f} over {len(span)} tokens")
        return [
            [scores.get(rows.get((p, tuple(x.ids))), NOT_JUDGED) for x in group]
            for p, group in enumerate(groups)
        ]

    score.needs_token_ids = True
    return score


def answer_span(codec: PromptCodec, ids: list[int]) -> range:
    """The tokens of the last <answer>'s text, or of all after the thinking, without white space at
    its ends. A token counts if it holds any part of it (a tokenizer may merge "> a"), or a part of
    one of its characters."""
    ids = ids[:-1]  # the stop
    text = codec.decode(ids)
    tags = [tag for tag in ("</think>", "<answer>") if tag in text]
    start = max((text.rfind(tag) + len(tag) for tag in tags), default=0)
    answer = text[start:].partition("</answer>")[0]
    start, end = start + len(answer) - len(answer.lstrip()), start + len(answer.rstrip())

    def length(count: int) -> int:
        """Characters that so many tokens complete."""
        return len(codec.decode(ids[:count]).rstrip("\ufffd"))

    counts = range(len(ids) + 1)
    first = bisect.bisect_left(counts, start, key=length)
    return range(first - (length(first) > start), bisect.bisect_left(counts, end, key=length))


# --------------------------------------------------------------- several candidates in a prompt


class Comparison(NamedTuple):
    """Templates that show several candidates: {first} and {second}, or {candidates}."""

    pair: str  # which of two is better; the answer is "first" or "second"
    opening: str  # what an answer begins with where its next token is read
    group: str  # several at once; the answer is a score of each, in order
    candidate: str  # each of {candidates}, with {number} and {translation}
    most: int  # candidates in one prompt


# By the name of the Prompts. The wording is ours, after GEMBA's.
COMPARISONS = {
    "paper": Comparison(
        pair=WRAPPER % (
            "Which of two translations from {source_language} to {target_language} is better? The "
            "better one preserves more of the meaning, in better grammar. One that is irrelevant, "
            "is not in {target_language}, or offers several translations is the worse one. Give "
            f"one word alone as the answer: first or second.{SOURCE}"
            "\n\nThe first {target_language} translation:\n{first}"
            "\n\nThe second {target_language} translation:\n{second}"
        ),
        opening=THOUGHT,
        group=WRAPPER % (
            GEMBA.replace("the following translation", "each of the following translations")
            + " Give the scores alone as the answer, one for each translation, in their order, "
            f"with commas between them.{SOURCE}{{candidates}}"
        ),
        candidate="\n\n{target_language} translation {number}:\n{translation}",
        most=16,
    ),
    "toy": Comparison(
        pair="compare {source_language} {target_language} {source} || {first} || {second} =>",
        opening="",
        group="rate {source_language} {target_language} {source} {candidates}=>",
        candidate="|| {translation} ",
        most=4,
    ),
}  # fmt: skip
COMPARISONS["plain"] = COMPARISONS["paper"]


def ask_pair(
    prompts: Prompts, task: Task, first: str, second: str, score_mode="written"
) -> list[str]:
    templates = COMPARISONS[prompts.name]
    template = templates.pair + (templates.opening if score_mode == "expected" else "")
    return prompts.fill(template, task, first=first, second=second)


def ask_group(prompts: Prompts, task: Task, candidates: Sequence[str]) -> list[str]:
    templates, numbers = COMPARISONS[prompts.name], range(1, len(candidates) + 1)
    each = "".join(
        templates.candidate.replace("{number}", str(i)).replace("{translation}", f"{{text{i}}}")
        for i in numbers
    )
    texts = {f"text{i}": text for i, text in zip(numbers, candidates, strict=True)}
    return prompts.fill(templates.group.replace("{candidates}", each), task, **texts)


class PairwiseJudge:
    """The mean over the other candidates of P(this one is better), each pair asked in both orders:

        P(a beats b) = ½ (P("first" | a, b) + 1 - P("first" | b, a))

    so a preference for one position is no advantage. Equal candidates, and one that is alone, have
    ½ without a question. A pair whose judgement cannot be read is left out.
    """

    def __init__(self, judge: Judge):
        self.judge, self.values = judge, {}
        if judge.score_mode == "expected":
            both = [(word_ids(judge.codec, word), x / 100) for word, x in PREFERENCES.items()]
            self.values = {i: value for ids, value in both for i in ids}

    def __call__(self, tasks: Sequence[Task], answers: Answers, step: int) -> list[list[Score]]:
        mode, prompts = self.judge.score_mode, self.judge.prompts
        orders = [
            (p, *pair)
            for p, row in enumerate(answers)
            for pair in itertools.permutations(sorted({a for a in row if a is not None}), 2)
        ]
        questions = [ask_pair(prompts, tasks[p], a, b, mode) for p, a, b in orders]
        judged = self.judge.ask(questions, step, parse_preference, self.values)
        first = {order: judged.get(i, TOO_LONG) for i, order in enumerate(orders)}
        scores = [[NOT_JUDGED] * len(row) for row in answers]
        for p, row in enumerate(answers):
            for n, a in enumerate(row):
                others = [b for b in row[:n] + row[n + 1 :] if b is not None]
                if a is not None:
                    both = [[first.get((p, *x), EQUAL) for x in ((a, b), (b, a))] for b in others]
                    scores[p][n] = win_rate(both)
        return scores


PREFERENCES = {"first": 100.0, "second": 0.0}  # that the first is better, as parse_score's numbers


def parse_preference(text: str) -> float | None:
    return PREFERENCES.get((answer_text(text) or "").strip().casefold())


def win_rate(both: list[list[Score]]) -> Score:
    """From the judgements of a candidate with each other one, in both orders."""
    shares = [(1 + (x.value - y.value)) / 2 for x, y in both if None not in (x.value, y.value)]
    if both and not shares:
        return next(x for pair in both for x in pair if x.value is None)
    value = math.fsum(shares) / len(shares) if shares else 0.5
    return Score(value, f"beats {value:.0%} of {len(shares)}")


def word_ids(codec: PromptCodec, word: str) -> list[int]:
    """The ids of a word that is one token, alone or after a space."""
    rows = codec.pieces([word, f" {word}"])
    ids = {row[0] for row in rows if len(row) == 1} - {codec.tokenizer.unk_token_id}
    return sorted(ids) or [codec.one_token(word)]  # its error names the word


class GroupJudge:
    """All candidates of a text in one prompt, which is answered with a score of each, in order.

    Equal candidates appear once. Their order is drawn anew at each step, as a judge favours some
    positions. More than `most` are split over several prompts. The answer is always written,
    whatever the judge's score mode; unless it has one readable score for each, none is scored.
    """

    def __init__(self, judge: Judge, most: int, max_new_tokens: int):
        self.judge, self.most, self.max_new_tokens = judge, most, max_new_tokens

    def __call__(self, tasks: Sequence[Task], answers: Answers, step: int) -> list[list[Score]]:
        parts = [
            (p, candidates)
            for p, (task, row) in enumerate(zip(tasks, answers, strict=True))
            for candidates in self.split(task, row, step)
        ]
        questions = [ask_group(self.judge.prompts, tasks[p], part) for p, part in parts]
        judgements = self.judge.write(questions, step, self.max_new_tokens)
        scores = {}
        for i, (p, part) in enumerate(parts):
            for n, answer in enumerate(part):
                read = partial(parse_scores, len(part), n)
                score = average_judgements(judgements[i], read) if i in judgements else TOO_LONG
                scores[p, answer] = score
        return [[scores.get((p, a), NOT_JUDGED) for a in row] for p, row in enumerate(answers)]

    def split(self, task: Task, row: list[str | None], step: int) -> list[list[str]]:
        distinct = sorted({a for a in row if a is not None})
        Random(f"{self.judge.seed} {step} {task.text}").shuffle(distinct)
        prompts = math.ceil(len(distinct) / self.most)  # of about the same number
        return [distinct[i::prompts] for i in range(prompts)]


def parse_scores(count: int, n: int, text: str) -> float | None:
    """The score of candidate n, if there is one for each of them."""
    answer = (answer_text(text) or "").translate(FULL_WIDTH).strip()
    scores = [parse_score(piece) for piece in answer.split("," if "," in answer else None)]
    return scores[n] if len(scores) == count and None not in scores else None


# ----------------------------------------------------------------------------- consistent judges


def agreement(
    judge: Judge, tasks: Sequence[Task], answers: Answers, scores: list[list[Score]], step: int
) -> list[float]:
    """CREAM's weight of a group, 2c - 1 with c = (τ + 1) / 2: Kendall's τ between two judges'
    rankings of its samples. Those of a wrong form are last for both.

    paper: one c, the mean over the data set / here: one for each group / because AdamW divides out
    a factor that a whole batch has in common.
    """
    others = judge(tasks, answers, step)
    return [
        kendall([x.value for x in a], [x.value for x in b])
        for a, b in zip(scores, others, strict=True)
    ]


def kendall(a: list[float | None], b: list[float | None]) -> float:
    """(concordant - discordant) / pairs that are not tied in both; 0 where there is none."""
    rows = [row for row in zip(a, b, strict=True) if None not in row]
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)
    i, j = torch.triu_indices(len(rows), len(rows), 1)
    signs = (values[i] - values[j]).sign()
    return float(signs.prod(1).sum()) / max(1, int(signs.any(1).sum()))
