"""Monolingual texts in, tasks out, in an order that is a function of (seed, epoch)."""

import json
from pathlib import Path
from random import Random

from judge import Task, is_language

KEYS = ("text", "source", "target")


def read(path: Path) -> list[Task]:
    """JSON lines with "text", "source", "target", maybe "reference"; every line must be right."""
    tasks = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue  # an empty line holds nothing to lose
            try:
                tasks.append(task_of(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return tasks


def task_of(line: bytes) -> Task:
    try:
        row = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    missing = [k for k in KEYS if not isinstance(row, dict) or not row.get(k)]
    if missing:
        raise ValueError(f"{', '.join(map(repr, missing))} missing")
    values = [row[k] for k in KEYS] + [row.get("reference")]
    if not all(isinstance(v, str) for v in values if v is not None):
        raise ValueError(f"{', '.join(KEYS)} must be strings")
    for text in values[:1] + values[3:]:
        (text or "").encode()  # half of a surrogate pair is no text
    for name in values[1:3]:
        if not is_language(name):
            raise ValueError(f"{name!r} is no name of a language")
    return Task(*values)


def split(tasks: list[Task], held_out: int, seed: int) -> tuple[list[Task], list[Task]]:
    """(held out, training): a text that is held out, in any direction, is not trained."""
    shuffled = Random(f"{seed} split").sample(tasks, len(tasks))
    apart = shuffled[:held_out]
    texts = {task.text for task in apart}
    return apart, [task for task in tasks if task.text not in texts]


class Order:
    def __init__(self, tasks: list[Task], seed: int):
        if not tasks:
            raise ValueError("no texts are left to train on: add some, or hold out fewer")
        self.tasks, self.seed, self.epoch = tasks, seed, -1

    def task(self, number: int) -> Task:
        """Text `number` of an endless stream of shuffled epochs."""
        epoch, place = divmod(number, len(self.tasks))
        if epoch != self.epoch:
            self.epoch = epoch
            rng = Random(f"{self.seed} epoch {epoch}")
            self.shuffled = rng.sample(range(len(self.tasks)), len(self.tasks))
        return self.tasks[self.shuffled[place]]
