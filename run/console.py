"""What a person sees while a run goes on: lines, dashboards, the report.

What fails here is printed, and the run goes on.
"""

import importlib.util
import math
import os
import secrets
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALARM = "ALARM: self-score up, held-out quality down"
QUIET = 10.0  # seconds without a line


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
    def __init__(self, s, path: Path, measure: str | None):
        """`measure`: the first metric of held-out texts."""
        self.s, self.path, self.measure = s, path, measure
        self.dashboards: list = []
        self.has_report = False
        self.printed = time.monotonic()

    def open(self, settings: dict, first_step: int) -> None:
        """Dashboards and report, by the rank that has created and locked the folder."""
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
                print(f"{type(dashboard).__name__} gets no more rows: {error}", flush=True)

    def print_step(self, number: int, metrics: dict, latest: dict, left: float) -> None:
        """Every tenth step, and each one that takes long."""
        now, last = time.monotonic(), number == self.s.steps
        if not last and number % 10 and now - self.printed < QUIET:
            return
        self.printed = now
        name, wrong = self.measure or "self", metrics.get("reward/wrong_language", 0.0)
        parts = [
            f"step {number}/{self.s.steps}",
            *["ALARM"] * bool(latest.get("eval/alarm")),
            f"held-out {name} {latest[f'eval/{name}']:.3f} (step {latest['step']})",
            f"reward {metrics['reward/total']:.3f}",
            *[f"wrong language {wrong:.0%}"] * (wrong > 0),
            f"{timedelta(seconds=int(left))} left",
            f"entropy {metrics['policy/entropy']:.2f}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
        ]
        print("  ".join(parts), flush=True)

    def print_progress(self, work: str, share: float, began: float) -> None:
        """The share of the work that is done and the time left, if it takes long."""
        now = time.monotonic()
        if now - max(began, self.printed) >= QUIET:
            self.printed = now
            left = (now - began) * (1 - share) / share
            print(f"{work}  {share:.0%}, {timedelta(seconds=int(left))} left", flush=True)

    def draw_report(self) -> None:
        """In a process of its own, whose errors do not end the run."""
        if self.has_report:
            run = subprocess.run(
                [sys.executable, "-m", "report", str(self.path.resolve())],
                cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                start_new_session=True,  # Ctrl-C is for the run
            )  # fmt: skip
            if run.returncode:
                lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
                print(f"no report: {lines[-1]}", flush=True)

    def close(self) -> None:
        for dashboard in self.dashboards:
            dashboard.close()
        self.draw_report()


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
