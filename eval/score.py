"""What a set of translations is worth: BLEU, chrF, and what chance there is in a difference.

    found = bleu(tasks, translations)                # as sacreBLEU's command line says it
    found.value, found.segments, found.about         # 0 … 100, one number a segment, the signature
    draws = replicates(found)                        # the value on 1,000 resampled test sets
    interval(draws)                                  # 95% of them lie in there
    p_value(found, draws, other, other_draws)        # could their difference be chance?

A metric is a table of statistics, a row a segment, and a function of the table's sum: n-gram counts
for BLEU, (score, 1) for a mean of segments such as COMET's. So one bootstrap serves all. It draws
the same segments for every system and metric of a set: differences are paired.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from sacrebleu.metrics import BLEU, CHRF

from data import CODES
from judge import Task

DRAWS, SEED = 1000, 12345  # as sacreBLEU does it


class Found(NamedTuple):
    value: float
    segments: list[float]
    table: ndarray  # (segments, statistics)
    total: Callable[[ndarray], float]
    """Of the table's sum."""
    about: str
    """How the number came about: a signature, or a checkpoint and its version."""


def bleu(tasks: list[Task], translations: list[str]) -> Found:
    code = CODES.get(tasks[0].target, "")
    code = {"zh_hant": "zh", "yue": "zh"}.get(code, code)  # words are split alike
    try:
        metric, sentence = BLEU(trg_lang=code), BLEU(trg_lang=code, effective_order=True)
    except (
        ImportError,
        RuntimeError,
    ) as error:  # Japanese and Korean need their own word splitters
        raise ValueError(f"BLEU of {tasks[0].target}: {error}") from None
    return with_sacrebleu(metric, sentence, tasks, translations)


def chrf(tasks: list[Task], translations: list[str]) -> Found:
    return with_sacrebleu(CHRF(), CHRF(), tasks, translations)


def with_sacrebleu(metric, sentence, tasks: list[Task], translations: list[str]) -> Found:
    references = [[task.reference for task in tasks]]
    value = metric.corpus_score(translations, references).score
    segments = [
        sentence.sentence_score(text, [task.reference]).score
        for text, task in zip(translations, tasks, strict=True)
    ]
    # What its own bootstrap is made of; it has no public name, but our version is pinned.
    table = np.array(metric._extract_corpus_statistics(translations, references), dtype=np.float64)
    about = f"{metric.get_signature()}"

    def total(summed: ndarray) -> float:
        return metric._compute_score_from_stats(summed).score

    return Found(value, segments, table, total, about)


def mean_of(segments: list[float], about: str) -> Found:
    """Of scores from 0 to 1, times 100."""
    table = np.array([(100 * score, 1.0) for score in segments])
    value = float(table[:, 0].sum() / len(segments))
    return Found(value, segments, table, lambda summed: float(summed[0] / summed[1]), about)


SACREBLEU = {"bleu": bleu, "chrf": chrf}


# --------------------------------------------------------------------------------------- chance


def replicates(found: Found, draws: int = DRAWS, seed: int = SEED) -> ndarray:
    """(draws,): the value on test sets of the same size, drawn from this one with replacement."""
    n = len(found.table)
    chosen = np.random.default_rng(seed).choice(n, size=(draws, n))
    counts = np.stack([np.bincount(row, minlength=n) for row in chosen])  # (draws, segments)
    return np.array([found.total(summed) for summed in counts @ found.table])


def interval(draws: ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def p_value(ours: float, draws: ndarray, theirs: float, their_draws: ndarray) -> float:
    """Two-sided: how often resampling alone moves the difference by as much as it is.

    sacreBLEU's paired bootstrap says less: it takes the mean off the difference without its sign.
    """
    difference = draws - their_draws
    moved = np.abs(difference - difference.mean()) >= abs(ours - theirs)
    return float((moved.sum() + 1) / (len(draws) + 1))
