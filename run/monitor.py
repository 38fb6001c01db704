"""Between two steps: evaluate, save, log, print.

with RunMonitor(…) as monitor:     # what ends the run is handled at its end
    resume_from = monitor.begin()  # restores, or evaluates the start
    for step in …:
        monitor.after(step)        # a row; now and then an evaluation and a checkpoint
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from pathlib import Path

import grpo
from run.checkpoint import Checkpoints
from run.console import ALARM, Console
from run.distributed import Ranks, Stopping
from run.evaluation import Evaluation
from run.folder import RunFolder, finite, save_with_tokenizer

SHOWN = {  # in the table at the end
    "eval/exact_match": "exact match with the truth, greedy",
    "eval/quality": "quality (1 - word error), greedy",
    "eval/self": "the judge's score, greedy",
    "eval/sampled_exact_match": "exact match, sampled at T 1",
    "eval/judge_correlation": "judge's correlation with quality, T 1",
    "eval/format": "share in the right form, greedy",
    "eval/invalid": "share the judge gave no score",
}
UNREMARKABLE = {"eval/format": 1.0, "eval/invalid": 0.0}  # not worth a line
STATE = ("first_evaluation", "latest", "alarms", "had_signal")


class RunMonitor:
    def __init__(self, s, path: Path, source: Path, evaluation: Evaluation,
                 checkpoints: Checkpoints, ranks: Ranks):  # fmt: skip
        """`source`: the folder of the starting model, whose tokenizer is copied."""
        self.s, self.source, self.evaluation = s, source, evaluation
        self.checkpoints, self.ranks = checkpoints, ranks
        self.folder = RunFolder(path, ranks.rank == 0)
        self.started, self.finished = time.perf_counter(), False
        self.earlier_seconds = 0.0  # of the processes before this one
        self.first_evaluation: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.alarms: list[int] = []
        self.had_signal = False  # some group had a difference to learn from
        self.resumed_at, self.extends_finished_run = 0, False
        self.step: grpo.Step | None = None
        self.state: dict = {}  # as it was before `step` was recorded
        self.groups: list[dict] = []  # rows of groups.jsonl
        measure = next(iter(evaluation.problem.measures), None)
        self.console = Console(s, path, measure, self.folder)
        for sampler in (evaluation.sampler, getattr(evaluation.judge, "sampler", None)):
            if sampler:  # a judge behind an endpoint has none
                sampler.progress = self.report_progress

    def __enter__(self) -> "RunMonitor":
        self.signals = Stopper(self.ranks)
        self.signals.__enter__()
        return self

    def __exit__(self, kind, error, trace) -> bool:
        """A signal ends the run with a checkpoint; an error that grpo raises, with the weights."""
        try:
            if kind is None:
                self.finish()
            elif kind is Stopping:
                self.stop()
            elif issubclass(kind, grpo.Stop):
                self.give_up()
        finally:
            self.console.close()
            self.folder.close()
            self.signals.__exit__()
        return kind is Stopping

    def restore(self) -> grpo.Step | None:
        """Weights, optimizer and state as they were after the step that is returned."""
        self.ranks.on_rank0("lock the folder", self.folder.lock)
        about = self.checkpoints.restore()
        if about is None:
            return None
        number, state = about["step"], about["monitor"]
        if number > self.s.steps:
            raise ValueError(f"{self.folder.path} is at step {number} already, beyond --steps "
                             f"{self.s.steps}")  # fmt: skip
        self.evaluation.restore(state.pop("evaluation"))
        self.groups = about["groups"]
        vars(self).update(state)
        self.console.alarmed = bool(self.latest.get("eval/alarm"))
        self.resumed_at = number
        # Then this step was evaluated as the last one, and its weights may be those in best/.
        self.extends_finished_run = about["settings"]["steps"] == number
        return grpo.Step(number, about["metrics"], [], about["missing"])

    def begin(self, policy, announce: str) -> grpo.Step | None:
        """Restore a run that is resumed, or evaluate the starting weights."""
        step = self.restore() if self.s.resume else None
        policy.sync()
        model = self.evaluation.sampler.model
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        # The new checkpoint before the old one goes; best/, last/, the next of them; the logs.
        needed = (self.checkpoints.keep + 1) * self.checkpoints.bytes + 3 * weights + 2**24
        number = step and step.number

        def open_folder() -> None:
            if step is None:
                self.check_unfinished()
            self.folder.begin(self.s, needed, number)
            self.console.open(dataclasses.asdict(self.s), number or 0)

        self.ranks.on_rank0("begin", open_folder)
        after = f", after step {number}" if step else ""
        if self.s.resume and not step:
            after = ", from the beginning: there is no checkpoint to go on from"
        print(f"{announce}\nwriting {self.folder.path}{after}")
        if step is None:
            self.evaluate(0, {})
        else:
            self.after(step)
        return step

    def check_unfinished(self) -> None:
        """A run that starts anew in its folder must be the same, and not finished."""
        path = self.folder.path
        if (path / "result.json").is_file():
            raise ValueError(f"{path} has come to its end, and has no checkpoint to go on from: "
                             "name another --folder")  # fmt: skip
        if (path / "settings.json").is_file():
            self.checkpoints.compare(json.loads((path / "settings.json").read_text()), path)

    def stop(self) -> None:
        if self.step is None:
            print("stopped before the first step was done: nothing to keep")
            return
        self.ranks.ending = True
        self.save()
        self.keep("last")
        self.wait_for_save()
        number, path = self.step.number, self.folder.path
        self.console.print_line(f"stopped after step {number}; go on with --resume --folder {path}")

    def give_up(self) -> None:
        """Keep the weights, before the error that ends the run is raised again."""
        self.ranks.ending = True
        self.keep("last")
        self.checkpoints.wait()
        self.ranks.gather(None)  # no rank leaves before

    def wait_for_save(self) -> None:
        """Until the last checkpoint is on the disk; no rank leaves before."""
        self.checkpoints.wait()
        if error := self.ranks.on_rank0("end", lambda: self.checkpoints.error):
            raise OSError(error)

    def after(self, step: grpo.Step) -> None:
        """The checkpoint comes before the row: a run that is resumed writes the row again."""
        seconds = self.earlier_seconds + time.perf_counter() - self.started
        if step.prompts:  # a restored step has none; its rows are in self.groups
            self.groups = self.group_rows(step)
        self.step, self.state = step, {name: getattr(self, name) for name in STATE}
        self.state |= {"earlier_seconds": seconds, "evaluation": self.evaluation.state()}
        if step.number % self.s.save_every == 0 or step.number == self.s.steps:
            self.save()
        self.had_signal |= step.metrics["groups/zero_variance"] < 1
        self.record(step)

    def save(self) -> None:
        about = {"metrics": self.step.metrics, "missing": self.step.missing, "monitor": self.state}
        self.checkpoints.save(self.step.number, about | {"groups": self.groups})

    def record(self, step: grpo.Step) -> None:
        last = step.number == self.s.steps
        again = self.extends_finished_run and step.number == self.resumed_at
        self.folder.add("groups.jsonl", self.groups)
        if step.prompts and step.number == self.resumed_at + 1:
            has_template = bool(self.evaluation.texts.tokenizer.chat_template)
            summary = describe_batch(step.metrics, self.s, has_template)
            self.console.print_line(f"step {step.number}: {summary}")
        if last or again or step.number % self.s.eval_every == 0:
            self.evaluate(step.number, step.metrics)
        else:
            self.log({"step": step.number} | step.metrics)
        if last or step.number > self.resumed_at:
            elapsed, done = time.perf_counter() - self.started, step.number - self.resumed_at
            left = elapsed / max(done, 1) * (self.s.steps - step.number)
            self.console.log_step(step.number, step.metrics, self.latest, left, last)

    def group_rows(self, step: grpo.Step) -> list[dict]:
        """The step's first prompt with its samples, rewards and advantages."""
        texts, task, judged = self.evaluation.texts, step.prompts[0].task, step.judged[0]
        samples = [
            {
                "text": texts.decode(sample.ids[: len(sample.ids) - sample.stopped]),
                "cut": not sample.stopped,
                "reward": judged.total[n],
                "advantage": float(step.advantages[0, n]),
                "judge": judged.words[n],
            }
            | {name: values[n] for name, values in judged.parts.items()}
            for n, sample in enumerate(step.groups[0])
        ]
        row = {"step": step.number, "source": task.text, "from": task.source, "to": task.target}
        return [row | {"samples": [finite(x) for x in samples]}]

    def evaluate(self, number: int, metrics: dict) -> None:
        started = time.perf_counter()
        self.ranks.step = number
        num_texts = len(self.evaluation.prompts)
        self.console.print_live(f"step {number}  evaluating {num_texts} held-out texts …")
        evaluated, row, best = self.evaluation(number)
        evaluated |= {"step": number, "seconds/evaluate": time.perf_counter() - started}
        self.folder.add("evaluations.jsonl", [row])
        self.log({"step": number} | metrics | evaluated)
        self.latest, self.first_evaluation = evaluated, self.first_evaluation or evaluated
        if best and number:  # the starting weights are where they came from
            self.keep("best")
        if evaluated.get("eval/alarm"):
            self.alarms = [*self.alarms, number]
        self.console.print_alarm(number, self.evaluation.alarm)
        self.console.draw_report()

    def log(self, row: dict) -> None:
        self.folder.add("metrics.jsonl", [row])
        self.console.log_metrics(row)

    def keep(self, name: str) -> None:
        if self.folder.mine:
            model = self.evaluation.sampler.model  # whole weights
            save_with_tokenizer(model, self.source, self.folder.path / name)

    def report_progress(self, share: float) -> None:
        self.console.print_progress(f"step {self.ranks.step}: {self.ranks.stage}", share)

    def finish(self) -> None:
        self.ranks.ending = self.finished = True
        self.keep("last")
        seconds = self.earlier_seconds + time.perf_counter() - self.started
        best, path = self.evaluation.best.step, self.folder.path
        content = {"steps": self.s.steps, "seconds": seconds, "best_step": best}
        content |= {"alarms": self.alarms, "before": self.first_evaluation, "after": self.latest}
        self.folder.write("result.json", content)
        self.print_table()
        print(self.summarize_trend())
        evaluations = self.first_evaluation, self.latest
        then, now = (x.get("eval/judge_correlation", math.nan) for x in evaluations)
        if now < then and not self.alarms:
            print("The judge's correlation falls as samples grow alike: where all are good, little "
                  "is left to tell apart.")  # fmt: skip
        if not self.had_signal:
            print("No group of samples ever differed in its reward: nothing was learned. See "
                  "groups.jsonl, and reward/format and judge/invalid in metrics.jsonl")  # fmt: skip
        weights = f"{path / 'best'}, of step {best}"
        if not best:
            weights = "no step was better than the start: keep the model you began with (the last "
            weights += f"step's are in {path / 'last'})"
        print(f"\n{self.s.steps} steps in {seconds:.0f} s\nweights: {weights}"
              + f"\nreport:  {path / 'report.html'}" * self.s.report)  # fmt: skip
        self.wait_for_save()

    def print_table(self) -> None:
        print(f"\n{f'held-out, {len(self.evaluation.prompts)} texts':38}  before   after")
        others = {f"eval/{n}": f"{n}, greedy" for n in self.evaluation.problem.measures}
        for key, label in (others | SHOWN).items():
            values = [x.get(key) for x in (self.first_evaluation, self.latest)]
            if key in self.latest and values != [UNREMARKABLE.get(key)] * 2:
                line = f"{label:38}  {values[0]:6.3f}  {values[1]:6.3f}"
                print(line.replace("   nan", "     –"))

    def summarize_trend(self) -> str:
        """Whether judge and measure rose together, and whether an alarm rang."""
        measures = list(self.evaluation.problem.measures)
        if not measures:
            return "Nothing independent was measured: best/ goes by the judge, no alarm can ring"
        pairs = zip(self.evaluation.past[0], self.evaluation.past[-1], strict=True)
        truth, judge = (end.significantly_above(start) for start, end in pairs)
        names = [measures[0].replace("_", " "), "the judge's score"]
        summary = f"Neither {names[0]} nor {names[1]} rose beyond chance"
        if judge and truth:
            summary = f"The judge's score and {names[0]} rose together"
        elif judge or truth:
            rose, flat = reversed(names) if judge else names
            summary = f"{rose} rose, {flat} did not".capitalize()
        if not self.alarms:
            return f"{summary}; no alarm rang."
        steps = ", ".join(map(str, self.alarms))
        return f"{summary}; {ALARM} at step {steps}: compare best/ with last/."


def describe_batch(metrics: dict, s, has_template: bool) -> str:
    """What the first batch was like, and which options would change what is wrong with it."""
    form, cut = metrics["reward/format"], metrics["length/truncated"]
    scored = 1 - metrics["judge/invalid"]
    summary = f"{form:.0%} of the samples are of the right form, {cut:.0%} were cut off"
    summary += f", {scored:.0%} of what was judged has a score" if form else ""
    advice = []
    if cut > 0.2:
        advice.append(f"longer samples: --max-new-tokens {2 * s.max_new_tokens}")
    if form < 0.5 and s.prompts == "paper":
        chat = "--chat " if has_template and not s.chat else ""
        advice.append(f"a simpler question: {chat}--prompts plain")
    if form and scored < 0.8:
        advice.append("read the judgements in groups.jsonl; python -m eval.judge tests a judge")
    if metrics["groups/zero_variance"] == 1:
        advice.append("no group differs, so this step teaches nothing")
    return "; ".join([summary, *advice])


class Stopper:
    """SIGTERM and Ctrl-C end the run: at once where nothing changes, else after the step in hand.

    A second one ends it without keeping anything. With many ranks it is ignored, since a scheduler
    and torchrun may both have sent one.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def __enter__(self) -> None:
        signals = (signal.SIGTERM, signal.SIGINT)
        self.previous = {name: signal.signal(name, self.request_stop) for name in signals}

    def request_stop(self, signum: int, frame) -> None:
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
        for name, handler in self.previous.items():
            signal.signal(name, handler)
