"""Reads the folder of a run: its settings, metrics, evaluations and training groups."""

import json
from pathlib import Path


class RunData:
    def __init__(self, path: Path, label: str):
        if not (path / "settings.json").is_file():
            raise ValueError(f"{path} is not the folder of a run: it has no settings.json")
        self.settings = json.loads((path / "settings.json").read_text())
        self.about = self.settings.pop("about", {})
        self.path, self.label, self.title, self.number = path, label, label, 0
        self.total_steps = self.settings.get("steps", "?")
        turn = self.settings.get(f"{path.resolve().name}_steps")  # of a player of R-Zero
        if turn:
            self.total_steps = turn * self.settings["iterations"]
        self.rows = read_rows(path / "metrics.jsonl")
        self.evaluations = read_rows(path / "evaluations.jsonl")
        self.groups = read_rows(path / "groups.jsonl")
        self.eval_rows = [row for row in self.rows if {"eval/self", "eval/accuracy"} & row.keys()]
        first = self.eval_rows[0] if self.eval_rows else {}
        names = [key[13:] for key in first if key.startswith("eval/sampled_")]
        self.eval_metrics = [name for name in names if name != "self"]
        self.step = self.rows[-1]["step"] if self.rows else 0
        self.last_eval = self.eval_rows[-1]["step"] if self.eval_rows else 0
        selected = [row for row in self.eval_rows if row.get("eval/best_by") is not None]
        best = max(selected, key=lambda row: row["eval/best_by"], default=None)
        self.best: int | None = best and best["step"]
        """The step of the weights in best/: the first of the best evaluations."""
        self.alarms = [row["step"] for row in self.eval_rows if row.get("eval/alarm")]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; {measure} in its name is the run's first measure."""
        key = key.replace("{measure}", (self.eval_metrics or ["none"])[0])
        rows = [row for row in self.rows if row.get(key) is not None]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def eval_at(self, step: int | None, key: str) -> float | None:
        return next((row.get(key) for row in self.eval_rows if row["step"] == step), None)


def read_rows(path: Path) -> list[dict]:
    """Rows of JSON lines. A last line without a newline is still being written: it is left out."""
    rows = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from None
    return rows
