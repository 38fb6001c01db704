"""What a person sees while a run goes on: a line, dashboards, the report.

What fails here is printed once, and the run goes on.
"""

import importlib.util
import math
import os
import secrets
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALARM = "ALARM: self-score up, held-out quality down"
QUIET = 10.0  # seconds without a line where the output is no terminal


def check_dashboards(names: str) -> list[str]:
    """The names in "tensorboard,wandb", all of them installed."""
    dashboards = [name.strip() for name in names.split(",") if name.strip()]
    for name in dashboards:
        if name not in DASHBOARDS:
            raise ValueError(f"--log-to {name} is unknown; known: {', '.join(DASHBOARDS)}")
        if not importlib.util.find_spec(name):
            raise ValueError(f"--log-to {name} is not installed: pip install {name}")
    return dashboards


class Console:
    def __init__(self, s, path: Path, measure: str | None, is_writer: bool):
        """`measure`: the first metric of held-out texts. `is_writer`: has dashboards and report."""
        self.s, self.path, self.measure, self.is_writer = s, path, measure, is_writer
        self.dashboards: list = []
        self.has_report = False
        self.is_live = False  # the next line overwrites the last one
        self.work, self.share = "", 0.0  # of the latest `print_progress`
        self.work_began = self.printed = time.monotonic()

    def open(self, settings: dict, first_step: int) -> None:
        """Call it when the folder exists and is locked."""
        if not self.is_writer:
            return
        self.has_report = True
        for name in check_dashboards(self.s.log_to):
            try:
                self.dashboards.append(DASHBOARDS[name](self.path, settings, first_step))
            except Exception as error:  # whatever they raise: not logged in, no network, …
                raise ValueError(f"--log-to {name}: {error}") from error

    def log_metrics(self, row: dict) -> None:
        """Numbers go to the dashboards, but not histograms."""
        numbers = {k: v for k, v in row.items() if isinstance(v, float | int) and math.isfinite(v)}
        for dashboard in list(self.dashboards):
            try:
                dashboard.log(numbers, row["step"])
            except Exception as error:  # whatever they raise
                self.dashboards.remove(dashboard)
                self.print_line(f"{type(dashboard).__name__} gets no more rows: {error}")

    def print_step(self, number: int, metrics: dict, latest: dict, left: float) -> None:
        """The most important first: a terminal cuts off the rest."""
        name, last = self.measure or "self", number == self.s.steps
        wrong = metrics.get("reward/wrong_language", 0.0)
        parts = [
            f"step {number}/{self.s.steps}",
            *["ALARM"] * bool(latest.get("eval/alarm")),
            f"held-out {name} {latest[f'eval/{name}']:.3f} (step {latest['step']})",
            f"reward {metrics['reward/total']:.3f}",
            *[f"wrong language {wrong:.0%}"] * (wrong > 0),
            f"{format_seconds(left)} left",
            f"entropy {metrics['policy/entropy']:.2f}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
        ]
        line = "  ".join(parts)
        if sys.stdout.isatty():
            self.print_live(line, "\n" if last else "")
        elif last or number % 10 == 0 or time.monotonic() - self.printed > QUIET:
            self.printed = time.monotonic()
            print(line, flush=True)

    def print_progress(self, work: str, share: float) -> None:
        """Prints the share of the work that is done and the time left, if it takes long."""
        now, is_terminal = time.monotonic(), sys.stdout.isatty()
        if work != self.work or share < self.share:
            self.work, self.work_began = work, now
        self.share = share
        if now - max(self.work_began, self.printed) < (1.0 if is_terminal else QUIET):
            return
        self.printed = now
        left = format_seconds((now - self.work_began) * (1 - share) / share)
        line = f"{work}  {share:.0%}, {left} left"
        self.print_live(line) if is_terminal else print(line, flush=True)

    def print_live(self, line: str, end: str = "") -> None:
        """Prints a line that the next one overwrites, in a terminal only. It must fit: of a longer
        one the first rows would remain."""
        if sys.stdout.isatty():
            width = max(shutil.get_terminal_size().columns - 1, 1)
            print(f"\r\033[K{line[:width]}", end=end, flush=True)
            self.is_live = not end

    def print_line(self, line: str) -> None:
        print(("\r\033[K" if self.is_live else "") + line, flush=True)
        self.is_live = False

    def draw_report(self, *options: str) -> None:
        """In a process of its own, whose errors do not end the run."""
        if self.has_report:
            run = subprocess.run(
                [sys.executable, "-m", "report", str(self.path.resolve()), *options],
                cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                start_new_session=True,  # Ctrl-C is for the run
            )  # fmt: skip
            if run.returncode:
                lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
                self.print_line(f"no report: {lines[-1]}")

    def close(self) -> None:
        for dashboard in self.dashboards:
            dashboard.close()
        self.draw_report("--ended")


def format_seconds(seconds: float) -> str:
    text = str(timedelta(seconds=int(seconds)))
    return text.removeprefix("0:").removeprefix("0")


# --------------------------------------------------------------------------------- dashboards


class TensorBoard:
    def __init__(self, path: Path, settings: dict, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What a resumed run writes again is purged.
        self.writer = SummaryWriter(str(path / "tensorboard"), purge_step=first_step)
        self.close = self.writer.close

    def log(self, numbers: dict, step: int) -> None:
        for name in numbers.keys() - {"step"}:
            self.writer.add_scalar(name, numbers[name], step)


class WeightsAndBiases:
    def __init__(self, path: Path, settings: dict, first_step: int):
        import wandb

        # A folder is one run there, however often it is resumed. WANDB_MODE=offline works.
        file = path / "wandb-id"
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ssr-zero"), name=path.name, dir=str(path),
            id=file.read_text(), resume="allow", config=settings,
            settings=wandb.Settings(quiet=True),
        )  # fmt: skip
        self.log, self.close = run.log, run.finish


DASHBOARDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
