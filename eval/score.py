"""BLEU, chrF and the bootstrap: what translations are worth, and whether a difference is chance.

    result = bleu(tasks, translations)               # as sacreBLEU's command line computes it
    draws = bootstrap(result.statistics, result.aggregate)    # on 1,000 resampled test sets
    interval(draws), p_value(result.score, draws, other.score, other_draws)

A metric is a table of statistics, a row for each segment, and a function of its column sums:
n-gram counts for BLEU, (score, 1) for the mean of segment scores such as COMET's. So one bootstrap
serves all metrics. The same seed draws the same segments for every system and metric of a set,
which pairs their differences.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from sacrebleu.metrics import BLEU, CHRF

from data.languages import CODES
from judge import Task

DRAWS, SEED = 1000, 12345  # as in sacreBLEU


class Result(NamedTuple):
    score: float
    segments: list[float]
    statistics: ndarray  # (segments, columns)
    aggregate: Callable[[ndarray], float]
    """Column sums of `statistics` -> score."""
    signature: str
    """How the score came about: sacreBLEU's signature, or COMET's checkpoint and version."""


def bleu(tasks: list[Task], translations: list[str]) -> Result:
    code = CODES.get(tasks[0].target, "")
    code = {"zh_hant": "zh", "yue": "zh"}.get(code, code)  # tokenised alike
    try:
        corpus, sentence = BLEU(trg_lang=code), BLEU(trg_lang=code, effective_order=True)
    except (ImportError, RuntimeError) as error:  # Japanese and Korean need extra packages
        raise ValueError(f"BLEU of {tasks[0].target}: {error}") from None
    return with_sacrebleu(corpus, sentence, tasks, translations)


def chrf(tasks: list[Task], translations: list[str]) -> Result:
    return with_sacrebleu(CHRF(), CHRF(), tasks, translations)


def with_sacrebleu(corpus, sentence, tasks: list[Task], translations: list[str]) -> Result:
    references = [[task.reference for task in tasks]]
    score = corpus.corpus_score(translations, references).score
    segments = [
        sentence.sentence_score(text, [task.reference]).score
        for text, task in zip(translations, tasks, strict=True)
    ]
    # What its own bootstrap uses; private, but the version is pinned.
    statistics = np.array(
        corpus._extract_corpus_statistics(translations, references), dtype=np.float64
    )

    return Result(
        score, segments, statistics, lambda sums: corpus._compute_score_from_stats(sums).score,
        f"{corpus.get_signature()}",
    )  # fmt: skip


def mean_score(segments: list[float], signature: str) -> Result:
    """100 times the mean of scores from 0 to 1."""
    statistics = np.array([(100 * score, 1.0) for score in segments])
    score = float(statistics[:, 0].mean())
    return Result(score, segments, statistics, lambda sums: float(sums[0] / sums[1]), signature)


SACREBLEU = {"bleu": bleu, "chrf": chrf}


# ------------------------------------------------------------------------------- significance


def bootstrap(
    statistics: ndarray, aggregate: Callable, draws: int = DRAWS, seed: int = SEED
) -> ndarray:
    """(draws,): scores on test sets of the same size, drawn from this one with replacement."""
    n = len(statistics)
    chosen = np.random.default_rng(seed).choice(n, size=(draws, n))
    counts = np.stack([np.bincount(row, minlength=n) for row in chosen])  # (draws, segments)
    return np.array([aggregate(sums) for sums in counts @ statistics])


def interval(draws: ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def p_value(ours: float, draws: ndarray, theirs: float, their_draws: ndarray) -> float:
    """Two-sided: how often resampling alone moves the difference by as much as it is.

    sacreBLEU's paired bootstrap centres the absolute difference instead of the signed one.
    """
    difference = draws - their_draws
    moved = np.abs(difference - difference.mean()) >= abs(ours - theirs)
    return float((moved.sum() + 1) / (len(draws) + 1))
