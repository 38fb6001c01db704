"""Rewards that the self-reward is compared with on the toy, where the right translation is known.

"oracle" is the truth, the upper bound. "external" is the truth with noise: it plays the outside
scorer (COMET, say) of the paper's SSR-X. "random" is noise alone: it shows what the loop does by
itself.
"""

from random import Random

from judge import Score, Task
from toy.languages import quality

REWARDS = ("random", "oracle", "external", "self+external")
Answers = list[list[str | None]]


def random_scores(seed: int):
    def score(tasks: list[Task], answers: Answers, step: int) -> list[list[Score]]:
        streams = [Random(f"random reward {seed} {step} {task.text}") for task in tasks]
        return [
            [Score(stream.random(), "random") for _ in row]
            for stream, row in zip(streams, answers, strict=True)
        ]

    return score


def external(seed: int, noise: float):
    """The truth plus an error with standard deviation `noise`, clamped to 0 … 1."""

    def score(tasks: list[Task], answers: Answers, step: int) -> list[list[Score]]:
        scores = []
        for task, row in zip(tasks, answers, strict=True):
            rng = Random(f"external scorer {seed} {step} {task.text}")
            values = [quality(a or "", task.reference) + rng.gauss(0, noise) for a in row]
            scores.append([Score(min(1.0, max(0.0, value)), "external") for value in values])
        return scores

    score.references = True
    return score


def toy_scorers(reward: str, judge, seed: int, noise: float) -> dict:
    """name -> (weight, scorer) for judge.Reward."""
    return {
        "random": {"random": (1.0, random_scores(seed))},
        "oracle": {"oracle": (1.0, external(seed, 0.0))},
        "external": {"external": (1.0, external(seed, noise))},
        "self+external": {"self": (0.5, judge), "external": (0.5, external(seed, noise))},
    }[reward]
