"""What a person sees while a run goes on: lines and dashboards."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import ssr
from run import console
from run.console import Console
from tests.processes import ROOT
from tests.runs import go

SMALL = [
    *("--preset=toy", "--prompts-per-step=2", "--samples-per-prompt=4", "--eval-prompts=4"),
    "--eval-every=2",
]
METRICS = {"reward/total": 0.71234, "policy/entropy": 0.5, "tokens_per_second": 8926.8}
LATEST = {"eval/chrf": 0.5, "step": 25}


def make_console(path):
    return Console(SimpleNamespace(steps=100, log_to=""), path, "chrf")


def test_the_line_has_the_most_important_first(tmp_path, capsys):
    shown = make_console(tmp_path)
    shown.print_step(30, METRICS, LATEST, 3725.0)
    wrong = {"reward/wrong_language": 0.25}
    shown.print_step(40, METRICS | wrong, LATEST | {"eval/alarm": 1.0}, 5.0)
    line, alarm = capsys.readouterr().out.splitlines()
    assert line == (
        "step 30/100  held-out chrf 0.500 (step 25)  reward 0.712  1:02:05 left  entropy 0.50  "
        "8,927 tokens/s"
    )
    assert alarm.startswith(
        "step 40/100  ALARM  held-out chrf 0.500 (step 25)  reward 0.712  wrong language 25%"
    )


def test_long_work_shows_its_progress_and_the_time_left(tmp_path, monkeypatch, capsys):
    now = [0.0]
    fake = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(console, "time", fake)
    shown = make_console(tmp_path)
    for work, began, second, share in (
        ("translate", 0, 5, 0.25), ("translate", 0, 12, 0.5), ("translate", 0, 15, 0.6),
        ("judge", 16, 36, 0.25), ("judge", 38, 47, 0.1),
    ):  # fmt: skip
        now[0] = second
        shown.print_progress(work, share, began)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["translate  50%, 0:00:12 left", "judge  25%, 0:01:00 left"]
    now[0] = 58
    for step in (3, 4):  # the second comes too soon for another line
        shown.print_step(step, METRICS, LATEST, 1.0)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_report_of_a_run_says_how_it_ended(toy, tmp_path, capsys, monkeypatch):
    """At its end; stopped by an error; and where the report fails, the run does not."""
    real = ssr.grpo.train

    def train(*args):
        for step in real(*args):
            yield step
            if step.number == 2:
                change()

    def fail():
        raise OSError("the disk is gone")

    def spoil():
        with open(tmp_path / "spoilt" / "metrics.jsonl", "a") as file:
            file.write("{\n")

    def go_on(name, steps):
        ssr.main([*SMALL, f"--steps={steps}", f"--model={toy}", f"--folder={tmp_path / name}"])
        return capsys.readouterr().out

    monkeypatch.setattr(ssr.grpo, "train", train)
    change = bool
    out = go_on("whole", 2)
    text = (tmp_path / "whole" / "report.html").read_text()
    assert "2 of 2 steps in " in text and "Held-out exact_match" in text
    assert re.search(r"(?m)^step 2/2  held-out", out)  # the last step is printed in any case
    change = fail
    with pytest.raises(SystemExit, match="the disk is gone"):
        go_on("lr=1 failed", 5)
    text = (tmp_path / "lr=1 failed" / "report.html").read_text()
    assert "2 of 5 steps in " in text
    change = spoil
    assert re.search(
        r"no report: report: .*metrics\.jsonl, line \d is not JSON", go_on("spoilt", 2)
    )
    assert (tmp_path / "spoilt" / "result.json").exists()


def test_dashboards_get_the_rows_and_one_that_fails_is_dropped(toy, tmp_path, monkeypatch, capsys):
    """A run that goes on writes its last row again."""
    opened = []

    class Dashboard:
        def __init__(self, path, settings, first_step):
            self.first, self.steps, self.close = first_step, [], bool
            opened.append(self)

        def log(self, numbers, step):
            self.steps.append(step)
            if step == 4:
                raise ConnectionError("no network")

    monkeypatch.setitem(console.DASHBOARDS, "wandb", Dashboard)
    monkeypatch.setattr(console.importlib.util, "find_spec", bool)
    for words in (["--steps=2"], ["--steps=5", "--resume"]):
        go(tmp_path / "run", toy, "--log-to=wandb", *words, small=SMALL)
    assert [(x.first, x.steps) for x in opened] == [(0, [0, 1, 2]), (2, [2, 3, 4])]
    assert capsys.readouterr().out.count("Dashboard gets no more rows: no network") == 1


def test_dashboards_that_are_unknown_or_missing_are_refused(monkeypatch):
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--log-to comet is unknown; known: tensorboard, wandb"):
        console.check_dashboards("comet")
    with pytest.raises(ValueError, match="tensorboard is not installed: pip install tensorboard"):
        console.check_dashboards("tensorboard, wandb")


# --------------------------------------------------------------------------------- slow proofs


BOARDS = """
from pathlib import Path
from types import SimpleNamespace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from run.console import Console

for first, steps in (0, [0, 1, 2]), (2, [2, 3]):  # a run that is stopped and goes on
    shown = Console(SimpleNamespace(log_to="tensorboard, wandb"), Path("."), None)
    shown.open({"lr": 1.0}, first)
    for step in steps:
        shown.log_metrics({"step": step, "policy/entropy": first + step / 4, "histogram/x": [1]})
    for dashboard in shown.dashboards:
        dashboard.close()
events = EventAccumulator("tensorboard").Reload()
logged = [(e.step, e.value) for e in events.Scalars("policy/entropy")]
assert logged == [(0, 0.0), (1, 0.25), (2, 2.5), (3, 2.75)], logged
"""


@pytest.mark.slow
def test_tensorboard_and_wandb_hold_what_is_logged(tmp_path):
    """The real ones, W&B offline; a run that is stopped and goes on is one run there."""
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", str(packages)]
    pins = tmp_path / "pins.txt"
    pins.write_text(re.sub(r"(?m)^(torch|triton).*\n", "", (ROOT / "requirements.txt").read_text()))
    subprocess.run([*pip, "-c", str(pins), "tensorboard", "wandb"], check=True)
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": f"{packages}:{ROOT}"}
    subprocess.run([sys.executable, "-c", BOARDS], check=True, env=environment, cwd=tmp_path)
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    name = (tmp_path / "wandb-id").read_text()
    assert len(files) == 2 and all(file.stem == f"run-{name}" for file in files)
    # Protocol buffers, in which names can be read.
    assert all(b"policy/entropy" in file.read_bytes() for file in files)
