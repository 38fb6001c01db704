"""Between two steps: evaluate, save, log, print.

with RunMonitor(…) as monitor:     # what ends the run is handled at its end
    resume_from = monitor.begin()  # restores, or evaluates the start
    for step in …:
        monitor.after(step)        # a row; now and then an evaluation and a checkpoint
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpo
from run.checkpoint import Checkpoints
from run.console import ALARM, Console
from run.distributed import Ranks, Stopping
from run.evaluation import Evaluation
from run.folder import RunFolder, finite, save_with_tokenizer

LABELS = {  # in the table at the end
    "eval/exact_match": "exact match with the truth, greedy",
    "eval/quality": "quality (1 - word error), greedy",
    "eval/self": "the judge's score, greedy",
    "eval/sampled_exact_match": "exact match, sampled at T 1",
    "eval/judge_correlation": "judge's correlation with quality, T 1",
    "eval/format": "share in the right form, greedy",
    "eval/invalid": "share the judge gave no score",
}
STATE = ("first_evaluation", "latest", "alarms", "has_learned")


class RunMonitor:
    def __init__(self, s, path: Path, source: Path, evaluation: Evaluation,
                 checkpoints: Checkpoints, ranks: Ranks):  # fmt: skip
        """`source`: the folder of the starting model, whose tokenizer is copied."""
        self.s, self.source, self.evaluation = s, source, evaluation
        self.checkpoints, self.ranks = checkpoints, ranks
        self.folder = RunFolder(path, ranks.rank == 0)
        self.started, self.finished = time.perf_counter(), False
        self.first_evaluation: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.alarms: list[int] = []
        self.has_learned = False  # some group had a difference to learn from
        self.resumed_at, self.ends = 0, {s.steps}  # the last steps of this run, now and before
        self.step: grpo.Step | None = None
        self.state: dict = {}  # as it was before `step` was recorded
        self.groups: list[dict] = []  # rows of groups.jsonl
        measure = next(iter(evaluation.problem.eval_metrics), None)
        self.console = Console(s, path, measure)
        for sampler in (evaluation.sampler, getattr(evaluation.judge, "sampler", None)):
            if sampler:  # a judge behind an endpoint has none
                sampler.progress = self.report_progress

    def __enter__(self) -> "RunMonitor":
        self.signals = stop_on_signal(self.ranks)
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
            self.signals.__exit__(None, None, None)
        return kind is Stopping

    def begin(self, policy, announce: str) -> grpo.Step | None:
        """Restore a run that is resumed, or evaluate the starting weights."""
        step = self.restore() if self.s.resume else None
        policy.sync()

        def open_folder() -> None:
            if step is None and (self.folder.path / "result.json").is_file():
                raise ValueError(f"{self.folder.path} has come to its end, and has no checkpoint "
                                 "to go on from: name another --folder")  # fmt: skip
            self.folder.begin(self.s, step and step.number)
            self.console.open(dataclasses.asdict(self.s), self.resumed_at)

        self.ranks.on_rank0("begin", open_folder)
        after = f", after step {step.number}" if step else ""
        if self.s.resume and not step:
            after = ", from the beginning: there is no checkpoint to go on from"
        print(f"{announce}\nwriting {self.folder.path}{after}")
        if step is None:
            self.evaluate(0, {})
        else:
            self.after(step)
        return step

    def restore(self) -> grpo.Step | None:
        """Weights, optimizer and state as they were after the step that is returned."""
        self.ranks.on_rank0("lock the folder", self.folder.lock)
        saved = self.checkpoints.restore()
        if saved is None:
            return None
        number, state = saved["step"], saved["monitor"]
        if number > self.s.steps:
            raise ValueError(f"{self.folder.path} is at step {number} already, beyond --steps "
                             f"{self.s.steps}")  # fmt: skip
        self.evaluation.restore(state.pop("evaluation"))
        self.groups, self.resumed_at = saved["groups"], number
        self.started -= state.pop("seconds")
        vars(self).update(state)
        if saved["steps"] == number:  # evaluated as the last one, its weights may be in best/
            self.ends.add(number)
        return grpo.Step(number, saved["metrics"], [], saved["failure_streaks"])

    # --------------------------------------------------------------------------- after a step

    def after(self, step: grpo.Step) -> None:
        """The checkpoint comes before the row: a run that is resumed writes the row again."""
        if step.prompts:  # a restored step has none; its rows are in self.groups
            self.groups = self.group_rows(step)
        self.step, self.state = step, {name: getattr(self, name) for name in STATE}
        self.state["seconds"] = time.perf_counter() - self.started
        self.state["evaluation"] = self.evaluation.state()
        if step.number % self.s.save_every == 0 or step.number == self.s.steps:
            self.save()
        self.has_learned |= step.metrics["groups/zero_variance"] < 1
        self.folder.add("groups.jsonl", self.groups)
        if step.prompts and step.number == self.resumed_at + 1:
            has_template = bool(self.evaluation.codec.tokenizer.chat_template)
            summary = describe_batch(step.metrics, self.s, has_template)
            print(f"step {step.number}: {summary}", flush=True)
        if step.number in self.ends or step.number % self.s.eval_every == 0:
            self.evaluate(step.number, step.metrics)
        else:
            self.log({"step": step.number} | step.metrics)
        seconds = (time.perf_counter() - self.started) / step.number  # of a step, on average
        left = seconds * (self.s.steps - step.number)
        self.console.print_step(step.number, step.metrics, self.latest, left)

    def save(self) -> None:
        state = {"metrics": self.step.metrics, "failure_streaks": self.step.failure_streaks}
        state |= {"groups": self.groups, "steps": self.s.steps, "monitor": self.state}
        self.checkpoints.save(self.step.number, state)

    def group_rows(self, step: grpo.Step) -> list[dict]:
        """The step's first prompt with its samples, rewards and advantages."""
        codec, task, judged = self.evaluation.codec, step.prompts[0].task, step.judged[0]
        samples = [
            {
                "text": codec.decode(sample.ids[: len(sample.ids) - sample.stopped]),
                "cut": not sample.stopped,
                "reward": float(step.rewards[0, n]),
                "advantage": float(step.advantages[0, n]),
                "judge": judged.judge_text[n],
            }
            | {name: values[n] for name, values in judged.parts.items()}
            for n, sample in enumerate(step.groups[0])
        ]
        row = {"step": step.number, "source": task.text, "from": task.source, "to": task.target}
        return [row | {"samples": [finite(x) for x in samples]}]

    def evaluate(self, number: int, metrics: dict) -> None:
        started = time.perf_counter()
        self.ranks.step = number
        evaluated, row, best = self.evaluation(number)
        evaluated |= {"step": number, "seconds/evaluate": time.perf_counter() - started}
        self.folder.add("evaluations.jsonl", [row])
        self.log({"step": number} | metrics | evaluated)
        self.latest, self.first_evaluation = evaluated, self.first_evaluation or evaluated
        if best and number:  # the starting weights are where they came from
            self.keep("best")
        if why := self.evaluation.alarm:
            self.alarms = [*self.alarms, number]
            print(f"step {number}: {ALARM}: {why}. Compare best/ with last/", flush=True)
        self.console.draw_report()

    def log(self, row: dict) -> None:
        self.folder.add("metrics.jsonl", [row])
        self.console.log_metrics(row)

    def keep(self, name: str) -> None:
        if self.folder.is_writer:
            model = self.evaluation.sampler.model  # whole weights
            save_with_tokenizer(model, self.source, self.folder.path / name)

    def report_progress(self, share: float) -> None:
        ranks = self.ranks
        self.console.print_progress(f"step {ranks.step}: {ranks.stage}", share, ranks.stage_began)

    # ----------------------------------------------------------------------------- how it ends

    def stop(self) -> None:
        if self.step is None:
            print("stopped before the first step was done: nothing to keep")
            return
        self.ranks.ending = True
        self.save()
        self.keep("last")
        self.wait_for_save()
        number, path = self.step.number, self.folder.path
        print(f"stopped after step {number}; go on with --resume --folder {path}", flush=True)

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

    def finish(self) -> None:
        self.ranks.ending = self.finished = True
        self.keep("last")
        seconds, path = time.perf_counter() - self.started, self.folder.path
        best, first, latest = self.evaluation.best.step, self.first_evaluation, self.latest
        content = {"steps": self.s.steps, "seconds": seconds, "best_step": best}
        content |= {"alarms": self.alarms, "before": first, "after": latest}
        self.folder.write("result.json", content)
        print(f"\n{f'held-out, {len(self.evaluation.prompts)} texts':38}  before   after")
        metrics = {
            f"eval/{name}": f"{name}, greedy" for name in self.evaluation.problem.eval_metrics
        }
        for key, label in (metrics | LABELS).items():
            if key in latest:
                line = f"{label:38}  {first[key]:6.3f}  {latest[key]:6.3f}"
                print(line.replace("   nan", "     –"))
        if self.alarms:
            steps = ", ".join(map(str, self.alarms))
            print(f"{ALARM} at step {steps}: compare best/ with last/")
        if not self.has_learned:
            print("No group of samples ever differed in its reward: nothing was learned. See "
                  "groups.jsonl, and reward/format and judge/invalid in metrics.jsonl")  # fmt: skip
        weights = f"{path / 'best'}, of step {best}"
        if not best:
            weights = "no step was better than the start: keep the model you began with (the last "
            weights += f"step's are in {path / 'last'})"
        print(f"\n{self.s.steps} steps in {seconds:.0f} s\nweights: {weights}"
              f"\nreport:  {path / 'report.html'}")  # fmt: skip
        self.wait_for_save()


def describe_batch(metrics: dict, s, has_template: bool) -> str:
    """What the first batch was like, and which options would change what is wrong with it."""
    form, cut = metrics["reward/format"], metrics["length/truncated"]
    wrong = metrics["reward/wrong_language"]
    scored = 1 - metrics["judge/invalid"]
    summary = f"{form:.0%} of the samples are of the right form, {cut:.0%} were cut off"
    summary += f", {scored:.0%} of those have a reward" if form else ""
    summary += f", {wrong:.0%} are copies or in a wrong language" if wrong else ""
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


@contextlib.contextmanager
def stop_on_signal(ranks: Ranks) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the run: at once where nothing changes, else after the step in hand.

    A second one ends it without keeping anything. With many ranks it is ignored, since a scheduler
    and torchrun may both have sent one.
    """

    def request_stop(signum: int, frame) -> None:
        if ranks.stop:
            if ranks.size == 1:
                raise KeyboardInterrupt
            return
        ranks.stop = True
        if ranks.rank == 0:
            with contextlib.suppress(OSError):  # not print: it may be what was interrupted
                os.write(2, b"\nasked to stop: keeping the last whole step\n")
        if ranks.stoppable:
            raise Stopping

    signals = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(name, request_stop) for name in signals]
    try:
        yield
    finally:
        for name, handler in zip(signals, previous, strict=True):
            signal.signal(name, handler)
