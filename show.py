"""What a person sees while a run goes on: a line, a log, dashboards, the report.

    show = Show(settings, path, measure)
    show.row({"step": 1, "reward/total": 0.7})      # to TensorBoard and W&B, where asked for
    show.step(1, metrics, latest, left)             # the line in the terminal; log.txt has each
    show.alarm(25, "the judge's score is …")        # a line that stays
    show.report()                                   # report.html is drawn anew, in the background

Nothing here changes the run: what fails is said, and the run goes on.
"""

import importlib.util
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ALARM = "ALARM: self-score up, held-out quality down"
PAUSE = 30.0  # seconds between two reports
QUIET = 10.0  # seconds without a line, where nobody sees the live one


def check_dashboards(names: str) -> list[str]:
    """The names in "tensorboard,wandb", known and installed."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in KINDS:
            raise ValueError(f"--log-to {name} is unknown; known: {', '.join(KINDS)}")
        if not importlib.util.find_spec(name):
            raise ValueError(f"--log-to {name} is not installed: pip install {name}")
    return found


class Show:
    def __init__(self, s, path: Path, measure: str | None, folder):
        """`measure`: of held-out texts, the first; `folder`: the run's, which is written by one."""
        self.s, self.path, self.measure, self.folder = s, path, measure, folder
        self.boards: list = []
        self.reporter: Reporter | None = None
        self.alarmed = self.live = False
        self.work, self.share = "", 0.0  # what `progress` was last told
        self.begun = self.said = time.monotonic()
        self.logs = True

    def begin(self, settings: dict, number: int) -> None:
        """When the folder is there; `number`: of the first step that is logged now."""
        if not self.folder.mine:
            return
        self.reporter = Reporter(self.path) if self.s.report else None
        for name in check_dashboards(self.s.log_to):
            try:
                self.boards.append(KINDS[name](self.path, settings, number))
            except Exception as error:  # whatever they raise: not logged in, no network, …
                raise ValueError(f"--log-to {name}: {error}") from error

    def row(self, row: dict) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, float | int) and math.isfinite(v)}
        for board in list(self.boards):
            self.to_board(board, lambda board=board: board(numbers, row["step"]))

    def to_board(self, board, work: Callable) -> None:
        try:
            work()
        except Exception as error:  # whatever they raise
            self.boards.remove(board)
            self.say(f"{type(board).__name__} gets no more rows: {error}")

    def step(self, number: int, metrics: dict, latest: dict, left: float, last: bool) -> None:
        line = self.line(number, metrics, latest, left)
        self.log(line)
        if sys.stdout.isatty():
            self.now(line, "\n" if last else "")
        elif last or number % 10 == 0 or time.monotonic() - self.said > QUIET:
            self.said = time.monotonic()
            print(line, flush=True)

    def progress(self, work: str, share: float) -> None:
        """How much of it is done, 0 to 1, and the time left: when it takes long, now and then."""
        now, live = time.monotonic(), sys.stdout.isatty()
        if work != self.work or share < self.share:
            self.work, self.begun = work, now
        self.share = share
        if now - max(self.begun, self.said) < (1.0 if live else QUIET):
            return
        self.said = now
        line = f"{work}  {share:.0%}, {clock((now - self.begun) * (1 - share) / share)} left"
        if live:
            self.now(line)
        else:
            print(line, flush=True)

    def line(self, number: int, metrics: dict, latest: dict, left: float) -> str:
        """The most important first: a terminal cuts off the rest."""
        name = self.measure or "self"
        held_out = latest[f"eval/{name}"]
        said = "–" if math.isnan(held_out) else f"{held_out:.3f}"
        parts = [f"step {number}/{self.s.steps}"]
        parts += ["ALARM"] if latest.get("eval/alarm") else []
        parts += [
            f"held-out {name} {said} (step {latest['step']})",
            f"reward {metrics['reward/total']:.3f}",
            f"{clock(left)} left",
            f"entropy {metrics['policy/entropy']:.2f}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
        ]
        rates = {k[11:]: v for k, v in metrics.items() if k.startswith("per_second/")}
        units = {"sample": "tokens", "judge": "texts", "train": "tokens"}
        parts += [f"{name} {rates[name]:,.0f} {units[name]}/s" for name in units if name in rates]
        return "  ".join(parts)

    def now(self, words: str, end: str = "") -> None:
        """A line that the next one writes over; only where somebody looks. What does not fit would
        leave its first half behind."""
        if sys.stdout.isatty():
            width = max(shutil.get_terminal_size().columns - 1, 1)
            print(f"\r\033[K{words[:width]}", end=end, flush=True)
            self.live = not end

    def alarm(self, number: int, why: str) -> None:
        """Said when it begins to ring, not while it goes on."""
        if why and not self.alarmed:
            self.say(f"step {number}: {ALARM}: {why}. Compare best/ with last/ in report.html")
        self.alarmed = bool(why)

    def say(self, words: str) -> None:
        print(("\r\033[K" if self.live else "") + words, flush=True)
        self.live = False
        self.log(words)

    def log(self, words: str) -> None:
        if not self.logs:
            return
        try:
            self.folder.append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {words}\n")
        except OSError as error:
            self.logs = False
            self.say(f"log.txt ends here: {error}")

    def report(self, last: bool = False) -> None:
        if not self.reporter:
            return
        try:
            trouble = self.reporter.draw(last)
        except OSError as error:  # no memory for a process, no room for its words
            trouble = str(error)
        if trouble:
            self.say(f"no report: {trouble}")

    def close(self) -> None:
        """However the run ended, its report says so."""
        for board in list(self.boards):
            self.to_board(board, board.close)
        self.report(last=True)


def clock(seconds: float) -> str:
    whole = int(seconds)
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole // 60 % 60:0{2 if hours else 1}}:{whole % 60:02}"


class Reporter:
    """Draws report.html in a process of its own, so that the run does not wait for it."""

    def __init__(self, path: Path):
        self.path = path
        self.process: subprocess.Popen | None = None
        self.words = None
        self.begun = -math.inf

    def draw(self, last: bool) -> str:
        """Starts it, unless it was a moment ago; `last`: now, and waited for. What went wrong."""
        if self.process and (last or self.process.poll() is not None):
            trouble = self.ended()
            if trouble and not last:
                return trouble
        if self.process or (not last and time.monotonic() < self.begun + PAUSE):
            return ""
        self.begun = time.monotonic()
        self.words = tempfile.TemporaryFile()  # noqa: SIM115 (read when it ends)
        script = Path(__file__).with_name("report.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(self.path.resolve()), *["--ended"] * last],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.words,
            start_new_session=True,  # Ctrl-C is for the run
        )  # fmt: skip
        return self.ended() if last else ""

    def ended(self) -> str:
        try:
            code = self.process.wait(600)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.words.seek(0)
        words = self.words.read().decode(errors="replace").strip()
        self.words.close()
        self.process = None
        return (words.splitlines() or [f"it ended with {code}"])[-1] if code else ""


# --------------------------------------------------------------------------------- dashboards


class TensorBoard:
    def __init__(self, path: Path, settings: dict, number: int):
        from torch.utils.tensorboard import SummaryWriter

        # What a run that goes on writes again is purged.
        self.writer = SummaryWriter(str(path / "tensorboard"), purge_step=number)

    def __call__(self, numbers: dict, step: int) -> None:
        for name, value in numbers.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, path: Path, settings: dict, number: int):
        import wandb

        # One run there for one folder here, however often it goes on. WANDB_MODE=offline works.
        file = path / "wandb-id"
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ssr-zero"), name=path.name, dir=str(path),
            id=file.read_text(), resume="allow", config=settings,
            settings=wandb.Settings(quiet=True),
        )  # fmt: skip

    def __call__(self, numbers: dict, step: int) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
