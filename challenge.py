"""What a question is worth to the Challenger who wrote it, by what a Solver makes of it.

    solver = Player(folder, settings, game, device)
    reward = Challenge(settings, game, solver)     # for grpo.train
    worth(0.5, 0.0, True, "paper")                 # 1: half of its answers agree
    repetition(["2 + 3", "2 + 3", "a b c"], 0.5)   # 2/3, 2/3, 1/3: the share that is like each

R-Zero (arXiv 2508.05004) rewards uncertainty less a penalty for repetition. With p the share of the
majority among the Solver's answers, and c the share of the batch that lies in a question's cluster:

    paper        max(0, 1 - 2 |p - ½| - c), and 0 for what is no question
    released     min(p, 1 - p) - c, and -1 - c for what is none: the authors' code
    percentile   max(0, the share of the batch whose p is higher - c), 0: for games in which p is no
                 share but a likeness, of which ½ means nothing (ours)
    random       chance, to compare with
"""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch

from judge import Judged, Texts, digest
from problem import loaded
from ranks import Ranks
from sampler import Sampler

CHALLENGES = ("paper", "released", "percentile", "random")


def worth(share: float, penalty: float, right: bool, challenge: str) -> float:
    if challenge == "released":
        return (min(share, 1 - share) if right else -1.0) - penalty
    base = share if challenge == "percentile" else 1 - 2 * abs(share - 0.5)
    return max(0.0, base - penalty) if right else 0.0


def percentiles(values: Sequence[float]) -> list[float]:
    """Of each: the share of the others that are higher; equal ones count half."""
    above = [sum((x > v) + (x == v) / 2 for x in values) - 0.5 for v in values]
    return [x / max(len(values) - 1, 1) for x in above]


class Player:
    """A model that is asked, and does not learn."""

    def __init__(self, folder: Path, s, game, device: torch.device):
        model, self.texts = loaded(folder, device, False)
        self.s, self.game = s, game
        self.sampler = Sampler(model, s.slots, window_of(s, game, model))

    def question(self, sample, request):
        """What a Challenger wrote, if it is a question, and one that a Solver's prompt can hold."""
        text = self.texts.decode(sample.ids[:-1]) if sample.stopped else ""
        found = self.game.question(text, request)
        if found is None:
            return None
        [ids] = self.texts.encode([self.game.pose(found)])
        return found if len(ids) <= self.s.max_prompt_tokens else None

    def write(self, prompts: list[list[int]], n: int, keys: Sequence[int]) -> list[list]:
        return self.sampler.generate(
            prompts, n, self.s.max_new_tokens, self.s.temperature, top_p=self.s.top_p,
            stop_ids=self.texts.stop_ids, seed=self.s.seed, keys=keys,
        )  # fmt: skip

    def agreement(self, questions: Iterable) -> dict:
        """Question -> how far this Solver's answers agree, and their label; a question that the
        game refuses now is not there. The same whatever else is asked, and by whichever rank."""
        distinct = sorted(set(questions))
        prompts = self.texts.encode([self.game.pose(q) for q in distinct])
        groups = self.write(prompts, self.s.answers, [digest(0, ids) for ids in prompts])
        answers = [
            [self.game.answer(self.texts, sample, q) for sample in group]
            for q, group in zip(distinct, groups, strict=True)
        ]
        found = zip(distinct, self.game.agreement(distinct, answers, self), strict=True)
        return {q: x for q, x in found if x is not None}


def written(
    challenger: Player, solver: Player, keys: Sequence[int], segments: Sequence[int]
) -> list[dict]:
    """A row for each key: what the Challenger writes, and what the Solver makes of it."""
    pieces, requests = zip(*map(challenger.game.ask, keys), strict=True)
    samples = [x for [x] in challenger.write(challenger.texts.encode(pieces), 1, keys)]
    found = [solver.question(*x) for x in zip(samples, requests, strict=True)]
    agreed = solver.agreement(q for q in found if q is not None)
    rows = []
    for segment, question in zip(segments, found, strict=True):
        share, label = agreed.get(question, (None, None))
        known = question if question in agreed else None
        rows.append({"segment": segment, "question": known, "agreement": share, "label": label})
    return rows


def accuracy(
    held_out: Sequence, game, texts: Texts, sampler, s, ranks: Ranks, temperature: float, n: int
) -> float:
    """Of n answers to each of some prompts, whose tasks are questions with their truth."""

    def work(mine: Sequence) -> list[list[float]]:
        groups = sampler.generate(
            [prompt.ids for _, prompt in mine], n, s.max_new_tokens, temperature,
            stop_ids=texts.stop_ids, seed=s.seed + 1, keys=[k for k, _ in mine],
        )  # fmt: skip
        return [
            [game.right(game.answer(texts, x, prompt.task[0]), prompt.task[1]) for x in group]
            for group, (_, prompt) in zip(groups, mine, strict=True)
        ]

    found = ranks.share("measure", list(enumerate(held_out)), work)
    return statistics.fmean(right for row in found for right in row)


def window_of(s, game, model) -> int:
    return min(s.max_prompt_tokens + s.max_new_tokens + game.more_tokens, model.config.max_length)


class Challenge:
    """The Challenger's reward."""

    def __init__(self, s, game, solver: Player):
        self.s, self.game, self.solver = s, game, solver

    def __call__(self, requests: Sequence, groups: list[list], step: int) -> list[Judged]:
        """How far the Solver agrees on each question; `finish` makes a reward of it."""
        rows = [
            [self.solver.question(sample, request) for sample in group]
            for request, group in zip(requests, groups, strict=True)
        ]
        found = self.solver.agreement(q for row in rows for q in row if q is not None)
        judged = []
        for row in rows:
            agreed = [found[q][0] if q in found else 0.0 for q in row]
            parts = {"format": [float(q in found) for q in row], "agreement": agreed}
            words = [self.game.words(q) if q in found else "" for q in row]
            judged.append(Judged(agreed, parts, words))
        return judged

    def finish(self, judged: Sequence[Judged]) -> list[Judged]:
        """With the whole batch to compare with."""
        texts = [words for row in judged for words in row.words]
        shares = iter(repetition(texts, self.s.alike))
        agreed = [p for row in judged for p, w in zip(row.total, row.words, strict=True) if w]
        if self.s.challenge == "percentile":
            place = dict(zip(agreed, percentiles(agreed), strict=True))
        chance = Random(f"{self.s.seed} {texts}")
        found = []
        for row in judged:
            parts = row.parts | {"repetition": [next(shares) for _ in row.words]}
            total = []
            for right, p, again in zip(*parts.values(), strict=True):
                base = place.get(p, 0.0) if self.s.challenge == "percentile" else p
                value = worth(base, self.s.repetition * again, bool(right), self.s.challenge)
                total.append(chance.random() if self.s.challenge == "random" else value)
            found.append(row._replace(total=total, parts=parts))
        return found


# ---------------------------------------------------------------------------------- repetition


def words_of(text: str) -> list[str]:
    """Words; single characters where no spaces divide them, as in Chinese and in formulas: of words
    alone such texts would have one, and never be alike."""
    dense = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
    return re.findall(rf"[^\W\d_{dense}]+|\S", text)


def bleu(texts: list[str]) -> np.ndarray:
    """(Q, Q): of each as a translation of each, up to 4-grams or as many as it has words; where no
    n-gram is the same, a tenth of one counts as such."""
    split = [words_of(text) for text in texts]
    lengths = np.array([max(len(x), 1) for x in split], dtype=float)
    logs, orders = np.zeros((len(texts), len(texts))), np.zeros(len(texts))
    for n in range(1, 5):
        where: dict[tuple, Counter] = {}
        for i, x in enumerate(split):
            for k in range(len(x) - n + 1):
                where.setdefault(tuple(x[k : k + n]), Counter())[i] += 1
        same = np.zeros_like(logs)
        for counts in where.values():
            rows, often = list(counts), np.array(list(counts.values()))
            same[np.ix_(rows, rows)] += np.minimum.outer(often, often)
        total = lengths - n + 1
        long = total > 0
        logs[long] += np.log(np.where(same > 0, same, 0.1)[long] / total[long, None])
        orders += long
    short = np.minimum(0.0, 1 - lengths[None, :] / lengths[:, None])
    return np.exp(logs / orders[:, None] + short)


def repetition(texts: list[str], alike: float) -> list[float]:
    """Of each, the share of all that lies in its cluster: the two nearest clusters become one as
    long as the mean distance of their texts, 1 - BLEU, is below `alike`."""
    often = Counter(texts)
    distinct = sorted(often)  # where pairs are equally near the order decides
    size = np.array([often[text] for text in distinct], dtype=float)
    found = bleu(distinct)
    distance = 1 - (found + found.T) / 2  # BLEU is not symmetric
    np.fill_diagonal(distance, np.inf)
    cluster = np.arange(len(distinct))
    while len(distinct) > 1:
        a, b = np.unravel_index(distance.argmin(), distance.shape)
        if not distance[a, b] < alike:
            break
        mean = (size[a] * distance[a] + size[b] * distance[b]) / (size[a] + size[b])
        distance[a], distance[:, a] = mean, mean
        distance[b], distance[:, b], distance[a, a] = np.inf, np.inf, np.inf
        size[a] += size[b]
        cluster[cluster == b] = a
    share = {text: float(size[c]) / len(texts) for text, c in zip(distinct, cluster, strict=True)}
    return [share[text] for text in texts]
