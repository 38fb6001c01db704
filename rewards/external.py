"""A scorer that is no language model, such as COMET, as a reward."""

import re
from collections.abc import Callable, Sequence

from judge import NOT_JUDGED, Score, Task


class ExternalScorer:
    """`score` takes rows with "src" and "mt", and returns a number from 0 to 1 for each. Each
    distinct row is scored once."""

    def __init__(self, score: Callable[[list[dict]], list[float]], control: Sequence[str] = ()):
        """`control`: tokens that a text must not become; a space breaks them up."""
        self.score = score
        self.control = re.compile("|".join(map(re.escape, control)) or r"(?!)")

    def __call__(self, tasks: Sequence[Task], answers: list[list[str | None]], step: int):
        """answers (P, N) -> scores (P, N). An answer of None is not judged and scores 0."""
        keys = [[(t.text, a) for a in row] for t, row in zip(tasks, answers, strict=True)]
        distinct = list(dict.fromkeys(key for row in keys for key in row if key[1] is not None))
        rows = [{"src": self.break_up(text), "mt": self.break_up(a)} for text, a in distinct]
        values = zip(distinct, self.score(rows), strict=True)
        scores = {key: Score(value, f"{value:.4f}") for key, value in values}
        return [[scores.get(key, NOT_JUDGED) for key in row] for row in keys]

    def break_up(self, text: str) -> str:
        return self.control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
