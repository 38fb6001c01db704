"""What happens between two steps: measure, keep, log, tell.

    watch = Watch(settings, folder, model, problem.folder, evaluation)
    watch.evaluate(0, {})                          # the first row, before any training
    watch.after(step, last=False)                  # a row a step; an evaluation now and then
    watch.finish()                                 # result.json and the table

The measures here never reach the loop. Self-rewarding fails quietly: the model's own score rises
while its translations get worse. That is what `Evaluation` looks for, and calls an alarm.
"""

import dataclasses
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import grpo
from judge import Judge, Prompts, Task, Texts, read_answer, translation_in
from model import Transformer, save


@dataclass
class Problem:
    """Where the model starts, what it translates, and what is measured without telling it."""

    folder: Path
    prompts: Prompts
    task: Callable[[int], Task]
    """Training text number 0, 1, 2, …"""
    held_out: list[Task]
    measures: dict[str, Callable[[str, str], float]]
    """Of a translation and its reference; the first is the one that names the best weights."""


# --------------------------------------------------------------------------------- the measures


class Evaluation:
    """Held-out texts, translated greedily and once at temperature 1, judged and measured."""

    def __init__(
        self, problem: Problem, prompts: list[grpo.Prompt], texts: Texts, sampler, judge: Judge,
        stop_ids, s,
    ):  # fmt: skip
        self.problem, self.texts, self.sampler, self.judge = problem, texts, sampler, judge
        self.prompts, self.stop_ids, self.s = [p.ids for p in prompts], stop_ids, s
        self.best: Reading | None = None
        self.past: list[tuple[Reading, Reading]] = []  # of the measure and of the self-score

    def translate(self, count: int, n: int, temperature: float) -> list[list[tuple[str, bool]]]:
        """(text, whether its format is right) of n samples of the first `count` texts."""
        groups = self.sampler.generate(
            self.prompts[:count], n, self.s.max_new_tokens, temperature,
            stop_ids=self.stop_ids, seed=self.s.seed + 1,
        )  # fmt: skip
        tasks = self.problem.held_out[:count]
        return [[self.read(t, x) for x in group] for t, group in zip(tasks, groups, strict=True)]

    def read(self, task: Task, sample) -> tuple[str, bool]:
        """As the reward reads it; what the reward cannot read counts as it is."""
        text = self.texts.decode(sample.ids[: len(sample.ids) - sample.stopped])
        answer = read_answer(text) if self.problem.prompts.tags else text
        right = translation_in(self.texts, self.problem.prompts, task, sample) is not None
        return (text if answer is None else answer), right

    def __call__(self, number: int) -> tuple[dict[str, float], list[dict], bool]:
        """Metrics, rows of samples.jsonl, and whether these weights are the best so far."""
        measures = list(self.problem.measures)
        greedy, sampled = self.measure(0.0, number), self.measure(1.0, number)
        metrics = {f"eval/{name}": grpo.mean(known(values)) for name, values in greedy.items()}
        metrics["eval/invalid"] = grpo.mean([value is None for value in greedy["self"]])
        for name in ("self", *measures):
            metrics[f"eval/sampled_{name}"] = grpo.mean(known(sampled[name]))
        if measures:  # on samples: greedy translations are too alike
            metrics["eval/judge_correlation"] = correlation(sampled["self"], sampled[measures[-1]])
        # Without a measure the best is the judge's: what is broken or cannot be judged counts 0.
        gated = [ok * (x or 0.0) for ok, x in zip(greedy["format"], greedy["self"], strict=True)]
        now, own = (
            Reading.of(greedy[measures[0]] if measures else gated),
            Reading.of(greedy["self"]),
        )
        best = self.best is None or now.mean > self.best.mean
        self.best = now if best else self.best
        if measures:
            metrics["eval/alarm"] = float(self.alarming(now, own))
        self.past.append((now, own))
        return metrics, self.samples(number), best

    def measure(self, temperature: float, number: int) -> dict[str, list[float | None]]:
        """One translation of each held-out text: its values by name."""
        tasks = self.problem.held_out
        read = [row[0] for row in self.translate(len(tasks), 1, temperature)]
        scores = self.judge(tasks, [[text] for text, _ in read], number)
        values = {"self": [row[0].value for row in scores], "format": [float(ok) for _, ok in read]}
        for name, measure in self.problem.measures.items():
            pairs = zip(read, tasks, strict=True)
            values[name] = [measure(text, task.reference) for (text, _), task in pairs]
        return values

    def alarming(self, now: "Reading", own: "Reading") -> bool:
        """The model thinks better of itself than at the start, and is worse than at its best; or
        it thinks better of itself than once before, when it was better."""
        if self.past and own.above(self.past[0][1]) and self.best.above(now):
            return True
        return any(own.above(own_then) and then.above(now) for then, own_then in self.past)

    def samples(self, number: int) -> list[dict]:
        tasks = self.problem.held_out[: self.s.shown_prompts]
        if not tasks:
            return []
        greedy = self.translate(len(tasks), 1, 0.0)
        drawn = self.translate(len(tasks), self.s.samples_per_prompt, 1.0)
        texts = [[text for text, _ in a + b] for a, b in zip(greedy, drawn, strict=True)]
        rows = []
        for task, row, scores in zip(tasks, texts, self.judge(tasks, texts, number), strict=True):
            candidates = [
                {"text": text, "greedy": i == 0, "score": score.value, "judge": score.words}
                | {n: f(text, task.reference) for n, f in self.problem.measures.items()}
                for i, (text, score) in enumerate(zip(row, scores, strict=True))
            ]
            shown = {"step": number, "source": task.text, "reference": task.reference}
            rows.append(shown | {"from": task.source, "to": task.target, "candidates": candidates})
        return rows


def known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


class Reading(NamedTuple):
    mean: float
    error: float

    @classmethod
    def of(cls, values: list[float | None]) -> "Reading":
        values = known(values)
        error = statistics.pstdev(values) / math.sqrt(len(values)) if values else math.nan
        return cls(grpo.mean(values), error)

    def above(self, other: "Reading") -> bool:
        """Beyond chance: by three standard errors of the difference, for the best is the luckiest
        of many."""
        return self.mean - other.mean > 3 * math.hypot(self.error, other.error)


def correlation(scores: list[float | None], values: list[float]) -> float:
    """Pearson's, of the texts that have a score; NaN when one side does not vary."""
    pairs = [(x, y) for x, y in zip(scores, values, strict=True) if x is not None]
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return statistics.correlation(a, b)


# --------------------------------------------------------------------------------- between steps


class Watch:
    def __init__(self, s, folder: "RunFolder", model, source: Path, evaluation: Evaluation):
        self.s, self.folder, self.model, self.source = s, folder, model, source
        self.evaluation, self.begun = evaluation, time.perf_counter()
        self.before: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.best_step, self.done = 0, 0
        self.alarms: list[int] = []

    def evaluate(self, number: int, metrics: dict[str, float]) -> None:
        begun = time.perf_counter()
        found, samples, best = self.evaluation(number)
        found |= {"step": number, "seconds/evaluate": time.perf_counter() - begun}
        self.folder.add("samples.jsonl", samples)
        self.folder.add("metrics.jsonl", [{"step": number} | metrics | found])
        self.latest, self.before = found, self.before or found
        if best:
            self.best_step = number
            self.keep("best")
        if found.get("eval/alarm"):
            self.alarms.append(number)

    def after(self, step: grpo.Step, last: bool) -> None:
        self.done = step.number
        if last or step.number % self.s.eval_every == 0:
            self.evaluate(step.number, step.metrics)
        else:
            self.folder.add("metrics.jsonl", [{"step": step.number} | step.metrics])
        self.tell(step.metrics, last)

    def keep(self, name: str) -> None:
        folder = self.folder.path / name
        save(self.model, folder)
        for file in self.source.iterdir():  # the tokenizer's files as they came
            if re.search(r"token|vocab|merges|chat_template|generation_config", file.name):
                shutil.copyfile(file, folder / file.name)

    def tell(self, metrics: dict[str, float], last: bool) -> None:
        left = (time.perf_counter() - self.begun) / self.done * (self.s.steps - self.done)
        shown = next(f"{key[5:]} {self.latest[key]:.3f}" for key in SHOWN if key in self.latest)
        alarm = f"  {ALARM}" if self.latest.get("eval/alarm") else ""
        line = (
            f"step {self.done}/{self.s.steps}  reward {metrics['reward/total']:.3f}  held-out "
            f"{shown} (step {self.latest['step']})  entropy {metrics['policy/entropy']:.2f}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  "
            f"{int(left) // 60}:{int(left) % 60:02} left{alarm}"
        )
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
        elif last or self.done % 10 == 0:
            print(line, flush=True)

    def finish(self) -> None:
        seconds = time.perf_counter() - self.begun
        content = {"steps": self.done, "seconds": seconds, "best_step": self.best_step}
        content |= {"alarms": self.alarms, "before": self.before, "after": self.latest}
        self.folder.write("result.json", content)
        print(f"\n{f'held-out, {len(self.evaluation.prompts)} texts':38}  before   after")
        for key, label in SHOWN.items():
            if key in self.latest:
                print(f"{label:38}  {self.before[key]:6.3f}  {self.latest[key]:6.3f}")
        print(
            f"\n{self.done} steps in {seconds:.0f} s; the best weights are those of step", end=" "
        )
        print(f"{self.best_step}\n{self.folder.path}/: metrics.jsonl, samples.jsonl, best/, last/")
        if not self.evaluation.problem.measures:
            print(
                "best by the judge's own score: nothing independent was measured, no alarm can ring"
            )
        if self.alarms:
            print(f"{ALARM} at step {', '.join(map(str, self.alarms))}: compare best/ with last/")


SHOWN = {
    "eval/exact_match": "exact match with the truth, greedy",
    "eval/quality": "quality (1 - word error), greedy",
    "eval/self": "the judge's score, greedy",
    "eval/sampled_exact_match": "exact match, sampled at T 1",
    "eval/judge_correlation": "judge's correlation with quality, T 1",
}
ALARM = "ALARM: self-score up, held-out quality down"


class Stopper:
    """SIGTERM and Ctrl-C end the run after the step in hand; a second one ends it at once."""

    def __enter__(self) -> "Stopper":
        self.asked = False
        self.before = {
            name: signal.signal(name, self.ask) for name in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def ask(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(
            "\nstopping after the step in hand (once more: at once, without last/ and result)",
            flush=True,
        )

    def __exit__(self, *_) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)


# -------------------------------------------------------------------------------- the run folder


class RunFolder:
    def __init__(self, s, model: Transformer):
        self.path = Path(s.run or f"runs/{s.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_space(self.path.parent, model)
        self.path.mkdir()
        about = {
            "commit": commit(),
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": f"{platform.platform()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        self.write("settings.json", dataclasses.asdict(s) | {"about": about})

    def write(self, name: str, content: dict) -> None:
        """Whole or not at all: another program may be waiting for it."""
        partial = self.path / (name + ".partial")
        partial.write_text(json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, self.path / name)

    def add(self, name: str, rows: list[dict]) -> None:
        """Append whole lines or none."""
        path = self.path / name
        lines = "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)
        left = lines.encode()
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError as error:
                if file.tell() > before:
                    file.truncate(before)
                raise OSError(f"cannot write {path}: {error.strerror}; make room there") from None


def check_space(folder: Path, model: Transformer) -> None:
    """For two folders of weights, and the old one while a new one replaces it."""
    needed = 3 * sum(p.numel() * p.element_size() for p in model.parameters()) + 2**24
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed for best/, "
            "last/ and the next one being written"
        )


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        run = subprocess.run([*command, "--abbrev=40"], capture_output=True, text=True)
    except OSError:
        return "unknown: no git here"
    return run.stdout.strip() or "unknown: not a git checkout"


def finite(row: dict) -> dict:
    """JSON has no NaN: a number that is not there is null."""
    bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    inner = {k: finite(v) for k, v in row.items() if isinstance(v, dict)}
    return row | dict.fromkeys(bad) | inner
