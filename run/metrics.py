"""What a step is measured by: seconds of its stages, means over its samples.

What each key of metrics.jsonl means is in docs/run-folder.md.
"""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor


class Clock:
    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def end_stage(self, name: str) -> None:
        """Names what was done since the last stage ended."""
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now

    def metrics(self, groups: list[list], trained: int) -> dict[str, float]:
        """Seconds by stage, and what was done in a second of each."""
        drawn = sum(len(sample.ids) for group in groups for sample in group)
        done = {
            "sample": drawn,  # tokens
            "judge": sum(map(len, groups)),  # translations
            "train": trained,  # tokens, prompts included
        }
        metrics = {f"seconds/{name}": value for name, value in self.seconds.items()}
        for name in done.keys() & self.seconds:
            metrics[f"per_second/{name}"] = done[name] / self.seconds[name]
        return metrics | {"tokens_per_second": drawn / (self.last - self.start)}


def batch_metrics(
    groups, judged, rewards: Tensor, advantages: Tensor
) -> dict[str, float | list[int]]:
    """Means over all samples, trained or not; rewards over those that have one."""
    samples = [sample for group in groups for sample in group]
    scored = ~rewards.isnan()
    lengths = [len(sample.ids) for sample in samples]
    logprobs = [x for sample in samples for x in sample.logprobs]
    # Samples of a wrong format are not judged.
    formats = [x for row in judged for x in row.parts.get("format", [1.0] * len(row.total))]
    metrics = {"reward/total": mean(rewards[scored].tolist())}
    for name in judged[0].parts:
        values = [x for row in judged for x in row.parts[name]]
        metrics[f"reward/{name}"] = mean([x for x in values if not math.isnan(x)])
        if name not in ("format", "wrong_language"):
            scores = [x for x, is_right in zip(values, formats, strict=True) if is_right]
            metrics[f"histogram/{name}"] = histogram(scores)
    metrics |= {
        # A reward is missing when a judgement is no score.
        "judge/invalid": sum(math.isnan(x) for row in judged for x in row.total)
        / max(sum(formats), 1),
        "groups/zero_variance": float((advantages == 0).all(1).double().mean()),
        "groups/distinct": mean([len({tuple(x.ids) for x in g}) / len(g) for g in groups]),
        # An estimate from the tokens drawn: right on average, over trained and untrained groups.
        "policy/entropy": -mean(logprobs),
        "length/mean": mean(lengths),
        "length/max": max(lengths),
        "length/truncated": mean([not sample.stopped for sample in samples]),
    }
    return metrics


def mean_kl(rows: list) -> float:
    """Of the policy to the starting weights, a token, over the samples that have a reward."""
    gaps = [
        (r.copies, r.reference.double() - torch.tensor(r.logprobs, dtype=torch.float64))
        for r in rows
    ]
    total = sum(copies * len(x) for copies, x in gaps) or math.nan
    # The estimator called k3, exp(x) - 1 - x: never negative, right on average.
    return sum(copies * float((x.expm1() - x).sum()) for copies, x in gaps) / total


def histogram(values: Sequence[float], bins: int = 20) -> list[int]:
    """How many of them lie in each part of 0 … 1; beyond counts to the nearest, NaN nowhere."""
    counts = [0] * bins
    for x in values:
        if not math.isnan(x):
            counts[min(max(int(x * bins), 0), bins - 1)] += 1
    return counts


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if len(values) else math.nan
