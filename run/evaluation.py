"""Held-out translations: translated, judged by the model itself, and measured independently.

The metrics never reach the training loop. Self-rewarding fails quietly: the model's own score
rises while its translations get worse. `Evaluation` watches for that, and calls it an alarm.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import grpo
from data.codec import PromptCodec
from data.languages import is_plausible_translation
from judge import Scorer, shown_translation
from run.distributed import Ranks
from run.metrics import mean
from run.problem import Problem


class Estimate(NamedTuple):
    """A mean over held-out texts, with its standard error: NaN of a single text."""

    step: int
    mean: float
    error: float

    @classmethod
    def of(cls, step: int, values: list[float | None]) -> "Estimate":
        values = present(values)
        error = statistics.pstdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(step, mean(values), error)

    def significantly_above(self, other: "Estimate") -> bool:
        """By three standard errors of the difference, since the best is the luckiest of many."""
        return self.mean - other.mean > 3 * math.hypot(self.error, other.error)


class Evaluation:
    """Translates held-out texts greedily and at temperature 1, judges and scores them."""

    def __init__(self, problem: Problem, prompts: list[grpo.Prompt], codec: PromptCodec, sampler,
                 judge: Scorer, s, ranks: Ranks):  # fmt: skip
        self.problem, self.codec, self.sampler, self.judge = problem, codec, sampler, judge
        self.prompts, self.s, self.ranks = prompts, s, ranks
        self.best: Estimate | None = None
        self.past: list[tuple[Estimate, Estimate]] = []  # (first measure, self-score)
        self.alarm = ""  # why it rings, if it does

    def __call__(self, number: int) -> tuple[dict[str, float], dict, bool]:
        """Metrics, the row of evaluations.jsonl, and whether these weights are the best so far."""
        eval_metrics = list(self.problem.eval_metrics)
        greedy, sampled = self.translate_and_judge(number)
        names = ("self", "format", *eval_metrics)
        metrics = {f"eval/{name}": mean(present(greedy[name])) for name in names}
        metrics["eval/invalid"] = mean([value is None for value in greedy["self"]])
        names = ("self", *eval_metrics)
        metrics |= {f"eval/sampled_{name}": mean(present(sampled[name])) for name in names}
        if eval_metrics:  # on samples: greedy translations are too alike
            metrics["eval/judge_correlation"] = correlation(
                sampled["self"], sampled[eval_metrics[-1]]
            )
        # Without a measure the judge selects: what is malformed or cannot be judged counts 0.
        gated = [ok * (x or 0.0) for ok, x in zip(greedy["format"], greedy["self"], strict=True)]
        now = Estimate.of(number, greedy[eval_metrics[0]] if eval_metrics else gated)
        own = Estimate.of(number, greedy["self"])
        best = self.best is None or now.mean > self.best.mean
        self.best = now if best else self.best
        metrics["eval/best_by"] = now.mean
        row = {"step": number, "greedy": rounded(greedy), "sampled": rounded(sampled)}
        if eval_metrics:
            self.alarm = self.alarm_reason(now, own)
            metrics["eval/alarm"] = float(bool(self.alarm))
            row["alarm"] = self.alarm
        if not self.past:  # once is enough
            tasks = {"source": "text", "reference": "reference", "from": "source", "to": "target"}
            row |= {k: [getattr(t, x) for t in self.problem.held_out] for k, x in tasks.items()}
        self.past.append((now, own))
        return metrics, row, best

    def translate_and_judge(self, number: int) -> list[dict[str, list]]:
        """For greedy and sampled translations: text, the judge's words and score, format, metrics.
        The two are judged in one call, so each distinct translation is judged once."""

        def work(mine: Sequence[int]) -> list[tuple[dict, ...]]:
            prompts = [self.prompts[i].ids for i in mine]
            tasks = [self.prompts[i].task for i in mine]
            shown = []
            for n, temperature in enumerate((0.0, 1.0), 1):
                self.ranks.set_stage(f"evaluation {n}/3, translate at temperature {temperature:g}")
                groups = self.sampler.generate(
                    prompts, 1, self.s.max_new_tokens, temperature,
                    stop_ids=self.codec.stop_ids, seed=self.s.seed + 1, keys=mine,
                )  # fmt: skip
                shown.append([
                    shown_translation(self.codec, self.problem.prompts, task, sample)
                    for task, (sample,) in zip(tasks, groups, strict=True)
                ])  # fmt: skip
            self.ranks.set_stage("evaluation 3/3, judge")
            pairs = [[text for text, _ in pair] for pair in zip(*shown, strict=True)]
            scores = self.judge(tasks, pairs, number)
            rows = []
            for k, translations in enumerate(shown):
                texts = [text for text, _ in translations]
                values = {name: f(tasks, texts) for name, f in self.problem.eval_metrics.items()}
                rows.append([
                    {"text": text, "judge": scores[i][k].judge_text, "self": scores[i][k].value}
                    | {"format": float(ok and is_plausible_translation(text, tasks[i]))}
                    | {name: x[i] for name, x in values.items()}
                    for i, (text, ok) in enumerate(translations)
                ])  # fmt: skip
            return list(zip(*rows, strict=True))

        pairs = self.ranks.map_over_ranks("evaluate", range(len(self.problem.held_out)), work)
        return [
            {name: [row[name] for row in rows] for name in rows[0]}
            for rows in zip(*pairs, strict=True)
        ]

    def alarm_reason(self, now: Estimate, own: Estimate) -> str:
        """The self-score is above its value at some earlier evaluation at which quality was higher;
        or above its start, and quality is below its best. Otherwise ""."""
        pairs = [(self.best, self.past[0][1])] if self.past else []
        for then, own_then in pairs + self.past:
            if own.significantly_above(own_then) and then.significantly_above(now):
                name = next(iter(self.problem.eval_metrics))
                score = f"{own.mean:.3f}, up from {own_then.mean:.3f} at step {own_then.step}"
                quality = f"{now.mean:.3f}, down from {then.mean:.3f} at step {then.step}"
                return f"the judge's score is {score}; {name} is {quality}"
        return ""

    def state(self) -> dict:
        return {"best": self.best, "past": list(self.past)}

    def restore(self, state: dict) -> None:
        self.best = Estimate(*state["best"])
        self.past = [tuple(Estimate(*x) for x in pair) for pair in state["past"]]


def rounded(values: dict[str, list]) -> dict[str, list]:
    return {k: [round(x, 4) if isinstance(x, float) else x for x in v] for k, v in values.items()}


def present(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def correlation(scores: list[float | None], values: list[float]) -> float:
    """Pearson's, over the texts that have a score; NaN if one side does not vary."""
    pairs = [(x, y) for x, y in zip(scores, values, strict=True) if x is not None]
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return statistics.correlation(a, b)
