"""What happens between two steps: measure, keep, log, tell.

    watch = Watch(settings, path, model, problem.folder, evaluation, checkpoints, ranks)
    step = watch.restore()             # of a run that goes on: weights and all, as after that step
    watch.begin(step)                  # the first row, before any training; or that step's again
    watch.after(step)                  # a row a step; an evaluation and a checkpoint now and then
    watch.finish()                     # last/, result.json and the table; or, before that:
    watch.stop()                       # last/ and a checkpoint to go on from

The measures here never reach the loop. Self-rewarding fails quietly: the model's own score rises
while its translations get worse. That is what `Evaluation` looks for, and calls an alarm.
"""

import contextlib
import dataclasses
import fcntl
import itertools
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import grpo
from checkpoint import Checkpoints
from judge import Prompts, Scorer, Task, Texts, shown_translation
from model import save
from ranks import Ranks, Stopping
from show import ALARM, Show

Measure = Callable[[list[Task], list[str]], list[float]]
"""Of translations of these tasks; it may look at their references."""


@dataclass
class Problem:
    """Where the model starts, what it translates, and what is measured without telling it."""

    folder: Path
    prompts: Prompts
    task: Callable[[int], Task]
    """Training text number 0, 1, 2, …"""
    held_out: list[Task]
    measures: dict[str, "Measure"]
    """The first is the one that names the best weights."""
    digest: str
    """Of the texts: a run goes on with the same ones only."""


# --------------------------------------------------------------------------------- the measures


class Evaluation:
    """Held-out texts, translated greedily and once at temperature 1, judged and measured."""

    def __init__(
        self, problem: Problem, prompts: list[grpo.Prompt], texts: Texts, sampler, judge: Scorer,
        stop_ids, s, ranks: Ranks,
    ):  # fmt: skip
        self.problem, self.texts, self.sampler, self.judge = problem, texts, sampler, judge
        self.prompts, self.stop_ids, self.s, self.ranks = prompts, stop_ids, s, ranks
        self.best: Reading | None = None
        self.past: list[tuple[Reading, Reading]] = []  # of the measure and of the self-score
        self.alarm = ""  # why it rings, if it does

    def __call__(self, number: int) -> tuple[dict[str, float], dict, bool]:
        """Metrics, the row of evaluations.jsonl, and whether these weights are the best so far."""
        measures = list(self.problem.measures)
        greedy, sampled = self.translate_and_judge(number)
        names = ("self", "format", *measures)
        metrics = {f"eval/{name}": grpo.mean(known(greedy[name])) for name in names}
        metrics["eval/invalid"] = grpo.mean([value is None for value in greedy["self"]])
        for name in ("self", *measures):
            metrics[f"eval/sampled_{name}"] = grpo.mean(known(sampled[name]))
        if measures:  # on samples: greedy translations are too alike
            metrics["eval/judge_correlation"] = correlation(sampled["self"], sampled[measures[-1]])
        # Without a measure the best is the judge's: what is broken or cannot be judged counts 0.
        gated = [ok * (x or 0.0) for ok, x in zip(greedy["format"], greedy["self"], strict=True)]
        now, own = (
            Reading.of(number, greedy[measures[0]] if measures else gated),
            Reading.of(number, greedy["self"]),
        )
        best = self.best is None or now.mean > self.best.mean
        self.best = now if best else self.best
        metrics["eval/best_by"] = now.mean
        row = {"step": number, "greedy": rounded(greedy), "sampled": rounded(sampled)}
        if measures:
            self.alarm = self.alarming(now, own)
            if self.alarm and metrics["eval/invalid"] > 0.02:
                self.alarm += f"; {metrics['eval/invalid']:.0%} of its answers are no score"
            metrics["eval/alarm"] = float(bool(self.alarm))
            row["alarm"] = self.alarm
        if not self.past:  # once is enough
            tasks = {"source": "text", "reference": "reference", "from": "source", "to": "target"}
            row |= {k: [getattr(t, x) for t in self.problem.held_out] for k, x in tasks.items()}
        self.past.append((now, own))
        return metrics, row, best

    def translate_and_judge(self, number: int) -> list[dict[str, list]]:
        """Greedily and at temperature 1: a translation of each held-out text, the judge's words and
        score, its form, and its values by measure. The two are judged in one call: each distinct
        translation once."""

        def work(mine: Sequence[int]) -> list[tuple[dict, ...]]:
            prompts = [self.prompts[i] for i in mine]
            tasks = [p.task for p in prompts]
            shown = []
            for stage, temperature in enumerate((0.0, 1.0), 1):
                self.ranks.at(f"evaluation {stage}/3, translate at temperature {temperature:g}")
                groups = self.sampler.generate(
                    [p.ids for p in prompts], 1, self.s.max_new_tokens, temperature,
                    stop_ids=self.stop_ids, seed=self.s.seed + 1, keys=mine,
                )  # fmt: skip
                shown.append([
                    shown_translation(self.texts, self.problem.prompts, task, sample)
                    for task, (sample,) in zip(tasks, groups, strict=True)
                ])  # fmt: skip
            self.ranks.at("evaluation 3/3, judge")
            pairs = [[text for text, _ in pair] for pair in zip(*shown, strict=True)]
            scores = self.judge(tasks, pairs, number)
            rows = []
            for k, translations in enumerate(shown):
                texts = [text for text, _ in translations]
                values = {name: f(tasks, texts) for name, f in self.problem.measures.items()}
                rows.append([
                    {"text": text, "judge": scores[i][k].words, "self": scores[i][k].value}
                    | {"format": float(ok)} | {name: x[i] for name, x in values.items()}
                    for i, (text, ok) in enumerate(translations)
                ])  # fmt: skip
            return list(zip(*rows, strict=True))

        pairs = self.ranks.share("evaluate", range(len(self.problem.held_out)), work)
        return [
            {name: [row[name] for row in rows] for name in rows[0]}
            for rows in zip(*pairs, strict=True)
        ]

    def alarming(self, now: "Reading", own: "Reading") -> str:
        """The model thinks better of itself than at the start, and is worse than at its best; or
        it thinks better of itself than once before, when it was better. Said in words, else ""."""
        pairs = [(self.best, self.past[0][1])] if self.past else []
        for then, own_then in pairs + self.past:
            if own.above(own_then) and then.above(now):
                name = next(iter(self.problem.measures))
                return (
                    f"the judge's score is {own.mean:.3f}, up from {own_then.mean:.3f} at step "
                    f"{own_then.step}; {name} is {now.mean:.3f}, down from {then.mean:.3f} at "
                    f"step {then.step}"
                )
        return ""

    def state(self) -> dict:
        return {"best": self.best, "past": list(self.past)}

    def restore(self, state: dict) -> None:
        self.best = Reading(*state["best"])
        self.past = [tuple(Reading(*x) for x in pair) for pair in state["past"]]


def rounded(values: dict[str, list]) -> dict[str, list]:
    return {k: [round(x, 4) if isinstance(x, float) else x for x in v] for k, v in values.items()}


def known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


class Reading(NamedTuple):
    step: int
    mean: float
    error: float

    @classmethod
    def of(cls, step: int, values: list[float | None]) -> "Reading":
        values = known(values)
        error = statistics.pstdev(values) / math.sqrt(len(values)) if values else math.nan
        return cls(step, grpo.mean(values), error)

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
    def __init__(
        self, s, path: Path, model, source: Path, evaluation: Evaluation, kept: Checkpoints,
        ranks: Ranks,
    ):  # fmt: skip
        """`model`: whole weights, those that the sampler has."""
        self.s, self.model, self.source, self.evaluation = s, model, source, evaluation
        self.kept, self.ranks, self.folder = kept, ranks, RunFolder(path, ranks.rank == 0)
        self.begun = time.perf_counter()
        self.spent = 0.0  # seconds, by processes before this one
        self.before: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.alarms: list[int] = []
        self.first, self.again = 0, False
        self.taught = False  # some group had a difference to learn from
        self.step: grpo.Step | None = None
        self.state: dict = {}  # as it was before `step` was recorded
        self.groups: list[dict] = []  # rows of groups.jsonl
        self.show = Show(s, path, next(iter(evaluation.problem.measures), None), self.folder)
        for sampler in (evaluation.sampler, getattr(evaluation.judge, "sampler", None)):
            if sampler:  # a judge behind an endpoint has none
                sampler.progress = self.report_progress

    def restore(self) -> grpo.Step | None:
        self.ranks.on_first("lock the folder", self.folder.lock)
        about = self.kept.restore()
        if about is None:
            return None
        if about["step"] > self.s.steps:
            raise ValueError(
                f"{self.folder.path} is at step {about['step']} already, beyond --steps "
                f"{self.s.steps}"
            )
        state = about["watch"]
        self.evaluation.restore(state.pop("evaluation"))
        self.groups = about["groups"]
        vars(self).update(state)
        self.show.alarmed = bool(self.latest.get("eval/alarm"))
        self.first = about["step"]
        # Then it was evaluated as the last step, and its weights may be those in best/.
        self.again = about["settings"]["steps"] == about["step"]
        return grpo.Step(about["step"], about["metrics"], [], about["missing"])

    def begin(self, step: grpo.Step | None) -> None:
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        needed = (self.s.keep + 1) * self.kept.bytes  # the new one is there before the oldest goes
        needed += 3 * weights + 2**24  # best/, last/, the next of them; the logs
        number = step and step.number

        def open_folder() -> None:
            if step is None:
                self.folder.check_unfinished(self.kept)
            self.folder.begin(self.s, needed, number)

        self.ranks.on_first("begin", open_folder)
        settings = dataclasses.asdict(self.s)
        self.ranks.on_first("open the dashboards", lambda: self.show.begin(settings, number or 0))
        if step is None:
            self.evaluate(0, {})
        else:
            self.after(step)

    def after(self, step: grpo.Step) -> None:
        spent = self.spent + time.perf_counter() - self.begun
        names = ("before", "latest", "alarms", "taught")
        if step.prompts:  # else a run goes on with its row, and has them
            self.groups = self.groups_of(step)
        self.step, self.state = step, {name: getattr(self, name) for name in names}
        self.state |= {"spent": spent, "evaluation": self.evaluation.state()}
        if step.number % self.s.save_every == 0 or step.number == self.s.steps:
            self.save()
        self.taught |= step.metrics["groups/zero_variance"] < 1
        self.record(step)

    def report_progress(self, share: float) -> None:
        self.show.progress(f"step {self.ranks.step}: {self.ranks.stage}", share)

    def save(self) -> None:
        about = {"metrics": self.step.metrics, "missing": self.step.missing, "watch": self.state}
        about["groups"] = self.groups
        self.kept.save(self.step.number, about)

    def record(self, step: grpo.Step) -> None:
        """Its row, after its checkpoint: a run that goes on begins by writing the row again."""
        last = step.number == self.s.steps
        again = self.again and step.number == self.first
        self.folder.add("groups.jsonl", self.groups)
        if step.prompts and step.number == self.first + 1:
            has_template = bool(self.evaluation.texts.tokenizer.chat_template)
            words = describe_batch(step.metrics, self.s, has_template)
            self.show.say(f"step {step.number}: {words}")
        if last or again or step.number % self.s.eval_every == 0:
            self.evaluate(step.number, step.metrics)
        else:
            self.log({"step": step.number} | step.metrics)
        if last or step.number > self.first:
            self.tell(step, last)

    def groups_of(self, step: grpo.Step) -> list[dict]:
        """What a few prompts of the step were answered, and what was made of it."""
        rows = []
        for p, prompt in enumerate(step.prompts[: self.s.shown_groups]):
            judged, task = step.judged[p], prompt.task
            samples = [
                {
                    "text": self.evaluation.texts.decode(
                        sample.ids[: len(sample.ids) - sample.stopped]
                    ),
                    "cut": not sample.stopped,
                    "reward": judged.total[n],
                    "advantage": float(step.advantages[p, n]),
                    "judge": judged.words[n],
                }
                | {name: values[n] for name, values in judged.parts.items()}
                for n, sample in enumerate(step.groups[p])
            ]
            row = {"step": step.number, "source": task.text, "from": task.source}
            rows.append(row | {"to": task.target, "samples": [finite(x) for x in samples]})
        return rows

    def evaluate(self, number: int, metrics: dict) -> None:
        begun = time.perf_counter()
        self.ranks.step = number
        self.show.now(f"step {number}  evaluating {len(self.evaluation.prompts)} held-out texts …")
        found, row, best = self.evaluation(number)
        found |= {"step": number, "seconds/evaluate": time.perf_counter() - begun}
        self.folder.add("evaluations.jsonl", [row])
        self.log({"step": number} | metrics | found)
        self.latest, self.before = found, self.before or found
        if best and number:  # the start's weights are where they came from
            self.keep("best")
        if found.get("eval/alarm"):
            self.alarms = [*self.alarms, number]
        self.show.alarm(number, self.evaluation.alarm)
        self.show.report()

    def log(self, row: dict) -> None:
        self.folder.add("metrics.jsonl", [row])
        self.show.row(row)

    def keep(self, name: str) -> None:
        if not self.folder.mine:
            return
        save_whole(self.model, self.source, self.folder.path / name)

    def tell(self, step: grpo.Step, last: bool) -> None:
        pace = (time.perf_counter() - self.begun) / max(step.number - self.first, 1)
        left = pace * (self.s.steps - step.number)
        self.show.step(step.number, step.metrics, self.latest, left, last)

    def stop(self) -> None:
        if self.step is None:
            print("stopped before the first step was done: nothing to keep")
            return
        self.ranks.ending = True
        self.save()
        self.keep("last")
        self.written()
        number, path = self.step.number, self.folder.path
        self.show.say(f"stopped after step {number}; go on with --resume --folder {path}")

    def give_up(self) -> None:
        """Keep what there is. The error that ends the run is raised again after this."""
        self.ranks.ending = True
        self.keep("last")
        self.kept.wait()
        self.ranks.gather(None)  # no rank leaves before

    def written(self) -> None:
        """The last checkpoint, on the disk; no rank leaves before."""
        self.kept.wait()
        error = self.ranks.on_first("end", lambda: self.kept.error)
        if error:
            raise OSError(error)

    def finish(self) -> None:
        self.ranks.ending = True
        self.keep("last")
        seconds = self.spent + time.perf_counter() - self.begun
        best, path = self.evaluation.best.step, self.folder.path
        content = {"steps": self.s.steps, "seconds": seconds, "best_step": best}
        content |= {"alarms": self.alarms, "before": self.before, "after": self.latest}
        self.folder.write("result.json", content)
        print(f"\n{f'held-out, {len(self.evaluation.prompts)} texts':38}  before   after")
        others = {f"eval/{n}": f"{n}, greedy" for n in self.evaluation.problem.measures}
        for key, label in (others | SHOWN).items():
            both = [x.get(key, math.nan) for x in (self.before, self.latest)]
            if key in self.latest and both != [USUAL.get(key)] * 2:
                then, now = ("–" if math.isnan(x) else f"{x:.3f}" for x in both)
                print(f"{label:38}  {then:>6}  {now:>6}")
        print(self.summarize_trend())
        weights = f"{path / 'best'}, of step {best}"
        if not best:
            weights = "no step was better than the start: keep the model you began with (the last "
            weights += f"step's are in {path / 'last'})"
        if not self.taught:
            print(
                "No group of samples ever differed in its reward: nothing was learned. See "
                "groups.jsonl, and reward/format and judge/invalid in metrics.jsonl"
            )
        print(f"\n{self.s.steps} steps in {seconds:.0f} s\nweights: {weights}"
              + f"\nreport:  {path / 'report.html'}" * self.s.report)  # fmt: skip
        self.written()

    def summarize_trend(self) -> str:
        """Whether judge and truth rose together, and whether an alarm rang."""
        measures = list(self.evaluation.problem.measures)
        if not measures:
            return "Nothing independent was measured: best/ goes by the judge, no alarm can ring"
        starts, ends = self.evaluation.past[0], self.evaluation.past[-1]
        truth, judge = (end.above(start) for start, end in zip(starts, ends, strict=True))
        name = measures[0].replace("_", " ")
        words = f"Neither {name} nor the judge's score rose beyond chance"
        if judge and truth:
            words = f"The judge's score and {name} rose together"
        elif judge or truth:
            both = ("the judge's score", name)
            words = "{} rose, {} did not".format(*both if judge else both[::-1]).capitalize()
        words += "; no alarm rang." if not self.alarms else (
            f"; {ALARM} at step {', '.join(map(str, self.alarms))}: compare best/ with last/."
        )  # fmt: skip
        then, now = (x.get("eval/judge_correlation", math.nan) for x in (self.before, self.latest))
        if truth and now < then:
            words += (
                " The correlation falls as samples grow alike: where all are good, little is left "
                "to tell apart."
            )
        return words


def save_whole(model, source: Path, folder: Path) -> None:
    """With the files of the tokenizer, as they came."""
    save(model, folder)
    for file in source.iterdir():
        if re.search(r"token|vocab|merges|chat_template|generation_config", file.name):
            shutil.copyfile(file, folder / file.name)


def describe_batch(metrics: dict, s, has_template: bool) -> str:
    """What the first batch was like, and which options would change what is wrong with it."""
    form, cut = metrics["reward/format"], metrics["length/truncated"]
    scored = 1 - metrics["judge/invalid"]
    words = f"{form:.0%} of the samples are of the right form, {cut:.0%} were cut off"
    words += f", {scored:.0%} of what was judged has a score" if form else ""
    advice = []
    if cut > 0.2:
        advice.append(f"longer samples: --max-new-tokens {2 * s.max_new_tokens}")
    if form < 0.5 and s.prompts == "paper":
        chat = "--chat " if has_template and not s.chat else ""
        advice.append(f"a simpler question: {chat}--prompts plain")
    if form and scored < 0.8:
        advice.append("the judge's words are in groups.jsonl: --judge-only says if it can judge")
    if metrics["groups/zero_variance"] == 1:
        advice.append("no group differs, so this step teaches nothing")
    return "; ".join([words, *advice])


SHOWN = {
    "eval/exact_match": "exact match with the truth, greedy",
    "eval/quality": "quality (1 - word error), greedy",
    "eval/self": "the judge's score, greedy",
    "eval/sampled_exact_match": "exact match, sampled at T 1",
    "eval/judge_correlation": "judge's correlation with quality, T 1",
    "eval/format": "share in the right form, greedy",
    "eval/invalid": "share the judge gave no score",
}
USUAL = {"eval/format": 1.0, "eval/invalid": 0.0}  # not worth a line


class Stopper:
    """SIGTERM and Ctrl-C end the run: at once where nothing changes, else after the step in hand.

    A second one ends it without keeping anything; with many ranks it is ignored, for a scheduler
    and torchrun may both have sent one.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def __enter__(self) -> None:
        self.before = {
            name: signal.signal(name, self.ask) for name in (signal.SIGTERM, signal.SIGINT)
        }

    def ask(self, signum: int, frame) -> None:
        if self.ranks.stop:
            if self.ranks.size == 1:
                raise KeyboardInterrupt
            return
        self.ranks.stop = True
        with contextlib.suppress(OSError):  # not print: it may be what was interrupted
            if self.ranks.rank == 0:
                os.write(2, b"\nasked to stop: keeping the last whole step\n")
        if self.ranks.stoppable:
            raise Stopping

    def __exit__(self, *_) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)


# -------------------------------------------------------------------------------- the run folder


LOGS = ("metrics.jsonl", "evaluations.jsonl", "groups.jsonl")


class RunFolder:
    """Written by one rank alone, `mine`; the others call the same and nothing happens."""

    def __init__(self, path: Path, mine: bool):
        self.path, self.mine = path, mine
        self.locked = None

    def begin(self, s, needed: int, step: int | None) -> None:
        """A new folder, or (`step`) the logs cut back to before that step, which comes again."""
        if not self.mine:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = [f for x in ("checkpoints", "best", "last") for f in (self.path / x).rglob("*")]
        check_space(self.path.parent, needed - sum(f.stat().st_size for f in held if f.is_file()))
        try:
            self.path.mkdir(exist_ok=s.resume)
        except FileExistsError:
            raise ValueError(f"{self.path} exists already: another run was faster") from None
        self.lock()
        about = {
            "commit": commit(),
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "launcher": launcher(),
            "machine": f"{platform.platform()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ranks": int(os.environ.get("WORLD_SIZE", 1)),
            "device": device_name(s.device),
        }
        settings = dataclasses.asdict(s)
        if step is not None:
            old = json.loads((self.path / "settings.json").read_text())
            settings |= {"resumed": [*old.get("resumed", []), about | {"from_step": step}]}
            about = old["about"]
        self.write("settings.json", settings | {"about": about})
        for name in LOGS:
            self.cut(name, -1 if step is None else step)

    def lock(self) -> None:
        """Against a second run in the same folder; the system lets go of it when we end."""
        if self.locked or not (self.mine and self.path.is_dir()):
            return
        self.locked = open(self.path / "lock", "a+")  # noqa: SIM115 (open as long as we live)
        for last in (False, True):  # whoever only looks if it is locked holds it for a moment
            try:
                fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not last:
                    time.sleep(0.3)
                    continue
            self.locked.seek(0)
            raise ValueError(
                f"{self.path} is being written by another run ({self.locked.read().strip()}): wait "
                "for its end, or stop it"
            ) from None
        self.locked.truncate(0)
        self.locked.write(f"process {os.getpid()} on {platform.node()}\n")
        self.locked.flush()

    def close(self) -> None:
        if self.locked:
            self.locked.close()

    def check_unfinished(self, kept: Checkpoints) -> None:
        """A run that begins anew in its folder must be the same, and not yet at its end."""
        if not (self.path / "settings.json").is_file():
            return
        if (self.path / "result.json").is_file():
            raise ValueError(
                f"{self.path} has come to its end, and has no checkpoint to go on from: name "
                "another --folder"
            )
        kept.compare(json.loads((self.path / "settings.json").read_text()), self.path)

    def cut(self, name: str, step: int) -> None:
        """Keep the rows before `step`; a row that a kill left half-written is behind them."""
        path = self.path / name
        rows = path.read_bytes().split(b"\n") if path.exists() else []
        kept = list(itertools.takewhile(lambda row: step_of(row) < step, rows))
        if len(kept) < len(rows):
            partial = self.path / (name + ".partial")
            partial.write_bytes(b"".join(row + b"\n" for row in kept))
            os.replace(partial, path)

    def write(self, name: str, content: dict) -> None:
        """Whole or not at all: another program may be waiting for it."""
        if not self.mine:
            return
        partial = self.path / (name + ".partial")
        partial.write_text(json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, self.path / name)

    def add(self, name: str, rows: list[dict]) -> None:
        """Append whole lines or none."""
        lines = "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)
        self.append(name, lines)

    def append(self, name: str, lines: str) -> None:
        if not self.mine:
            return
        path, left = self.path / name, lines.encode()
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError as error:
                if file.tell() > before:
                    file.truncate(before)
                raise OSError(f"cannot write {path}: {error.strerror}; make room there") from None


def step_of(row: bytes) -> float:
    try:
        return json.loads(row)["step"]
    except ValueError:
        return math.inf


def check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed for best/, "
            "last/ and the checkpoints (--keep, --save-every)"
        )


def launcher() -> str:
    """What stays the same when torchrun starts the ranks again: their parent."""
    return f"{platform.node()} {os.getppid()}"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() and device != "cpu" else "CPU"


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
