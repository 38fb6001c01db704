"""The Challenger's reward: how uncertain a frozen Solver is about each question it wrote.

    solver = Player(folder, settings, game, device)
    reward = ChallengerReward(settings, solver)         # for grpo.train
    challenger_reward(0.5, 0.0, True, "paper")          # 1: half of the Solver's answers agree
    cluster_shares(["2 + 3", "2 + 3", "a b c"])         # 2/3, 2/3, 1/3

R-Zero (arXiv 2508.05004) rewards uncertainty, minus a penalty for repetition. With p the majority's
share of the Solver's answers, and c the share of the batch in the question's cluster:

    paper        max(0, 1 - 2 |p - ½| - c); 0 for text that is not a question
    released     min(p, 1 - p) - c; -1 - c for text that is not a question (the authors' code)
    random       uniform noise, as a control
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch

from judge import RewardOutput, prompt_key
from run.driver import load_frozen, make_sampler
from sampler import Sample

CHALLENGES = ("paper", "released", "random")
TOP_P = 0.99
"""The paper's, where nothing is trained on the samples (see rzero/selfplay.py)."""
SAME_CLUSTER = 0.5
"""Clusters closer than this mean distance, 1 - BLEU, are merged."""


def challenger_reward(share: float, penalty: float, is_question: bool, challenge: str) -> float:
    if challenge == "released":
        return (min(share, 1 - share) if is_question else -1.0) - penalty
    return max(0.0, 1 - 2 * abs(share - 0.5) - penalty) if is_question else 0.0


class Player:
    """A frozen model that writes questions or answers them."""

    def __init__(self, folder: Path, s, game, device: torch.device):
        model, _ = load_frozen(folder, device)
        self.s, self.game = s, game
        self.sampler = make_sampler(model, s.max_num_seqs, s.max_prompt_tokens + s.max_new_tokens)

    def sample(self, prompts: list[list[int]], n: int, keys: Sequence[int]) -> list[list[Sample]]:
        return self.sampler.generate(
            prompts, n, self.s.max_new_tokens, self.s.temperature, top_p=TOP_P,
            stop_ids=self.game.codec.stop_ids, seed=self.s.seed, keys=keys,
        )  # fmt: skip

    def parse_question(self, sample: Sample) -> str | None:
        """None also where the Solver's prompt would be longer than --max-prompt-tokens."""
        if (question := self.game.parse_question(self.game.read(sample))) is None:
            return None
        [ids] = self.game.codec.encode([self.game.solver_prompt(question)])
        return question if len(ids) <= self.s.max_prompt_tokens else None

    def agreement(self, questions: Iterable[str | None]) -> dict[str, tuple[float, str]]:
        """Question -> the majority's share of this Solver's answers, and the majority's answer.

        Draws are keyed by the prompt: they do not depend on the other questions or on the rank.
        """
        distinct = sorted({q for q in questions if q is not None})
        prompts = self.game.codec.encode([self.game.solver_prompt(q) for q in distinct])
        groups = self.sample(prompts, self.s.answers, [prompt_key(0, ids) for ids in prompts])
        return {
            question: self.game.majority([self.game.answer(x, question) for x in group])
            for question, group in zip(distinct, groups, strict=True)
        }


class ChallengerReward:
    """As grpo.train calls it; `finish` sees the whole batch, which the penalty needs."""

    def __init__(self, s, solver: Player):
        self.s, self.solver = s, solver

    def __call__(
        self, tasks: Sequence, groups: list[list[Sample]], step: int
    ) -> list[RewardOutput]:
        rows = [[self.solver.parse_question(sample) for sample in group] for group in groups]
        agreed = self.solver.agreement(q for row in rows for q in row)
        judged = []
        for row in rows:
            shares = [0.0 if q is None else agreed[q][0] for q in row]
            parts = {"format": [float(q is not None) for q in row], "agreement": shares}
            judged.append(RewardOutput(shares, parts, [q or "" for q in row]))
        return judged

    def finish(self, judged: Sequence[RewardOutput]) -> list[RewardOutput]:
        texts = [text for row in judged for text in row.judge_text]
        penalties = iter(cluster_shares(texts))
        noise = Random(f"{self.s.seed} {texts}")
        rewarded = []
        for row in judged:
            parts = row.parts | {"repetition": [next(penalties) for _ in row.judge_text]}
            total = [
                noise.random() if self.s.challenge == "random" else challenger_reward(
                    share, self.s.repetition * penalty, bool(is_question), self.s.challenge
                )
                for is_question, share, penalty in zip(*parts.values(), strict=True)
            ]  # fmt: skip
            rewarded.append(row._replace(total=total, parts=parts))
        return rewarded


# ---------------------------------------------------------------------------------- repetition


def split_words(text: str) -> list[str]:
    """Words; single characters in scripts without spaces and in formulas, which would otherwise be
    one word each and never similar."""
    dense = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
    return re.findall(rf"[^\W\d_{dense}]+|\S", text)


def pairwise_bleu(texts: list[str]) -> np.ndarray:
    """(Q, Q): BLEU of row text against column text, up to 4-grams or as many as it has words; an
    order without a match counts a tenth of a match."""
    split = [split_words(text) for text in texts]
    lengths = np.array([max(len(words), 1) for words in split], dtype=float)
    logs, orders = np.zeros((len(texts), len(texts))), np.zeros(len(texts))
    for n in range(1, 5):
        where: dict[tuple, Counter] = {}  # n-gram -> text -> count
        for i, words in enumerate(split):
            for k in range(len(words) - n + 1):
                where.setdefault(tuple(words[k : k + n]), Counter())[i] += 1
        matches = np.zeros_like(logs)
        for counts in where.values():
            rows, often = list(counts), np.array(list(counts.values()))
            matches[np.ix_(rows, rows)] += np.minimum.outer(often, often)
        total = lengths - n + 1
        long = total > 0
        logs[long] += np.log(np.where(matches > 0, matches, 0.1)[long] / total[long, None])
        orders += long
    brevity = np.minimum(0.0, 1 - lengths[None, :] / lengths[:, None])
    return np.exp(logs / orders[:, None] + brevity)


def cluster_shares(texts: list[str], threshold: float = SAME_CLUSTER) -> list[float]:
    """For each text the share of all texts in its cluster: average linkage on 1 - BLEU, merging the
    closest two clusters while their mean distance is below `threshold`."""
    copies = Counter(texts)
    distinct = sorted(copies)  # ties between pairs are broken by this order
    size = np.array([copies[text] for text in distinct], dtype=float)
    bleu = pairwise_bleu(distinct)
    distance = 1 - (bleu + bleu.T) / 2  # BLEU is not symmetric
    np.fill_diagonal(distance, np.inf)
    cluster = np.arange(len(distinct))
    while len(distinct) > 1:
        a, b = np.unravel_index(distance.argmin(), distance.shape)
        if not distance[a, b] < threshold:
            break
        mean = (size[a] * distance[a] + size[b] * distance[b]) / (size[a] + size[b])
        distance[a], distance[:, a] = mean, mean
        distance[b], distance[:, b], distance[a, a] = np.inf, np.inf, np.inf
        size[a] += size[b]
        cluster[cluster == b] = a
    share = {text: float(size[c]) / len(texts) for text, c in zip(distinct, cluster, strict=True)}
    return [share[text] for text in texts]
