"""What a person sees while a run goes on: in a terminal, in the log, on dashboards."""

import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest

import show
import ssr
from show import ALARM, Reporter, Show, clock

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--preset=toy", "--prompts-per-step=2", "--samples-per-prompt=4", "--eval-prompts=4"),
    "--eval-every=2",
]
METRICS = {
    "reward/total": 0.71234, "policy/entropy": 0.5, "tokens_per_second": 8926.8,
    "per_second/sample": 29012.0, "per_second/judge": 6500.4, "per_second/train": 25001.0,
}  # fmt: skip


class Folder:
    mine = True

    def __init__(self):
        self.text = ""

    def append(self, name, lines):
        assert name == "log.txt"
        self.text += lines


def shown(path, **more):
    s = SimpleNamespace(**{"steps": 100, "report": False, "log_to": ""} | more)
    return Show(s, path, "chrf", Folder())


def test_the_line_says_the_most_important_first(tmp_path):
    latest = {"eval/chrf": 0.5, "step": 25}
    line = shown(tmp_path).line(30, METRICS, latest, 3725.0)
    assert line == (
        "step 30/100  held-out chrf 0.500 (step 25)  reward 0.712  1:02:05 left  entropy 0.50  "
        "8,927 tokens/s  sample 29,012 tokens/s  judge 6,500 texts/s  train 25,001 tokens/s"
    )
    rung = shown(tmp_path).line(30, METRICS, latest | {"eval/alarm": 1.0}, 5.0)
    assert rung.startswith("step 30/100  ALARM  held-out chrf 0.500 (step 25)  reward 0.712")
    assert len(rung[: rung.index(" left")]) < 80
    nothing = shown(tmp_path).line(30, METRICS, {"eval/chrf": math.nan, "step": 0}, 5.0)
    assert "held-out chrf – (step 0)" in nothing


def test_time_left_is_said_as_a_clock_does():
    assert [clock(x) for x in (0, 59.9, 61, 3600, 36061)] == [
        "0:00", "0:59", "1:01", "1:00:00", "10:01:01",
    ]  # fmt: skip


def test_long_work_says_its_progress_and_the_time_left(tmp_path, monkeypatch, capsys):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], strftime=lambda _: "")
    monkeypatch.setattr(show, "time", clock)
    said = shown(tmp_path)
    for work, second, share in (
        ("translate", 0, 0.0), ("translate", 5, 0.25), ("translate", 12, 0.5),
        ("translate", 15, 0.6), ("judge", 16, 0.1), ("judge", 36, 0.25), ("judge", 38, 0.01),
        ("judge", 47, 0.1),
    ):  # fmt: skip
        now[0] = second
        said.progress(work, share)
    assert capsys.readouterr().out.splitlines() == [
        "translate  50%, 0:12 left", "judge  25%, 1:00 left",
    ]  # fmt: skip
    now[0] = 58
    said.step(3, METRICS, {"eval/chrf": 0.5, "step": 0}, 1.0, False)
    said.step(4, METRICS, {"eval/chrf": 0.5, "step": 0}, 1.0, False)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_alarm_is_said_when_it_begins_to_ring(tmp_path, capsys):
    show = shown(tmp_path)
    for step, why in ((25, ""), (50, "because"), (75, "because"), (100, ""), (125, "again")):
        show.alarm(step, why)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 50", "step 125"]
    assert "because" in lines[0] and "Compare best/ with last/" in lines[0]
    assert show.folder.text.count(ALARM) == 2


def test_the_live_line_stays_one_line_in_a_narrow_terminal(toy, tmp_path):
    """In a real terminal, 60 columns wide: each line is written over the last, none is longer."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    command = [sys.executable, "ssr.py", *SMALL, "--steps=4", "--no-report", f"--model={toy}"]
    process = subprocess.Popen(
        [*command, f"--folder={tmp_path / 'run'}"], cwd=ROOT, stdout=theirs, stdin=theirs,
        env={k: v for k, v in os.environ.items() if k != "COLUMNS"},
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    assert process.wait(60) == 0
    lines = re.findall(r"\r\x1b\[K([^\r]*)", said.decode())
    assert [x for x in lines if x.startswith("step 0  evaluating 4 held-out texts …")]
    steps = [x for x in lines if re.match(r"step [1-4]/4  held-out", x)]
    assert len(steps) == 4 and all(len(x) == 59 for x in steps)
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert len(log) == 5 and all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step", x) for x in log)
    assert "of the right form" in log[0] and all("train" in line for line in log[1:])
    assert "\x1b" not in "".join(log)


def test_a_run_draws_its_report(toy, tmp_path, capsys):
    run = tmp_path / "run"
    ssr.main([*SMALL, "--steps=2", f"--model={toy}", f"--folder={run}"])
    text = (run / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*)</script>', text)[1])
    assert data["panels"]["entropy"]["series"][0]["x"] == [1, 2]  # to its last step
    out = capsys.readouterr().out
    assert not data["running"] and f"report:  {run / 'report.html'}" in out
    assert re.search(r"(?m)^step 2/2  held-out", out)  # the last step is said wherever it falls
    assert not list(run.glob("*.partial"))


def test_a_report_that_fails_is_said_and_the_run_goes_on(toy, tmp_path, capsys, monkeypatch):
    real = ssr.grpo.train

    def spoiled(*args):
        for step in real(*args):
            yield step
            with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
                file.write("{\n")

    monkeypatch.setattr(ssr.grpo, "train", spoiled)
    ssr.main([*SMALL, "--steps=2", f"--model={toy}", f"--folder={tmp_path / 'run'}"])
    out = capsys.readouterr().out
    assert re.search(r"no report: report\.py: .*metrics\.jsonl, line \d is not JSON", out)
    assert (tmp_path / "run" / "result.json").exists()


def test_reports_are_drawn_in_the_background_and_not_too_often(toy, tmp_path, monkeypatch):
    run = tmp_path / "run"
    ssr.main([*SMALL, "--steps=1", "--no-report", f"--model={toy}", f"--folder={run}"])
    assert not (run / "report.html").exists()
    reporter = Reporter(run)
    assert reporter.draw(False) == "" and reporter.process.poll() is None  # at work
    first = reporter.process
    assert reporter.draw(False) == "" and reporter.process is first
    assert first.wait(60) == 0 and (run / "report.html").exists()
    assert reporter.draw(False) == "" and reporter.process is None  # a moment ago
    monkeypatch.setattr(show, "PAUSE", 0.0)
    assert reporter.draw(False) == "" and reporter.process is not None
    assert reporter.draw(True) == "" and reporter.process is None  # the last one is waited for


def test_what_fails_is_said_once_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    class Board:
        rows = 0

        def __call__(self, numbers, step):
            self.rows += 1
            raise ConnectionError("no network")

    def full(*_):
        raise OSError("cannot write log.txt: No space left")

    watching = shown(tmp_path, report=True)
    watching.begin({}, 0)
    board = Board()
    watching.boards = [board]
    watching.folder.append = full
    monkeypatch.setattr(show.subprocess, "Popen", lambda *_, **__: full())
    for step in (1, 2):
        watching.row({"step": step, "x": 1.0})
        watching.step(step, METRICS, {"eval/chrf": 0.5, "step": 0}, 1.0, False)
    watching.report()
    out = capsys.readouterr().out
    assert out.count("Board gets no more rows: no network") == 1 and board.rows == 1
    assert out.count("log.txt ends here: cannot write") == 1
    assert "no report: cannot write" in out
    watching.close()


def test_a_run_that_ends_with_an_error_has_a_report_that_says_so(toy, tmp_path, monkeypatch):
    real = ssr.grpo.train

    def broken(*args):
        for step in real(*args):
            yield step
            if step.number == 2:
                raise OSError("the disk is gone")

    monkeypatch.setattr(ssr.grpo, "train", broken)
    run = tmp_path / "lr=1 run"
    with pytest.raises(SystemExit, match="the disk is gone"):
        ssr.main([*SMALL, "--steps=5", f"--model={toy}", f"--folder={run}"])
    text = (run / "report.html").read_text()
    assert '"running": false' in text and "stopped at step 2 of 5" in text


def test_dashboards_that_are_unknown_or_missing_are_refused_at_once(tmp_path, monkeypatch):
    for words, message in (
        ("comet", "--log-to comet is unknown; known: tensorboard, wandb"),
        ("tensorboard,wandb", "--log-to tensorboard is not installed: pip install tensorboard"),
    ):
        monkeypatch.setattr(show.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match=message):
            ssr.main([*SMALL, "--log", words, f"--folder={tmp_path / 'run'}"])


# --------------------------------------------------------------------------------- slow proofs


@pytest.mark.slow
def test_tensorboard_and_wandb_hold_what_metrics_jsonl_holds(toy, tmp_path):
    """The real ones, W&B offline; a run that is stopped and goes on is one run there."""
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(packages)]
    pins = tmp_path / "pins.txt"
    pins.write_text(re.sub(r"(?m)^(torch|triton).*\n", "", (ROOT / "requirements.txt").read_text()))
    subprocess.run([*pip, "-c", str(pins), "tensorboard", "wandb"], check=True)
    run = tmp_path / "run"
    words = [*SMALL, f"--model={toy}", f"--folder={run}", "--log-to=tensorboard,wandb"]
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(packages)}

    def go(*more):
        command = [sys.executable, str(ROOT / "ssr.py"), *words, "--no-report", *more]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)

    go("--steps=2", "--save-every=1")
    go("--steps=4", "--resume")
    check = f"""
import json, pathlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
rows = [json.loads(x) for x in open({str(run / "metrics.jsonl")!r})]
wanted = {{row["step"]: row["policy/entropy"] for row in rows if "policy/entropy" in row}}
events = EventAccumulator({str(run / "tensorboard")!r})
events.Reload()
found = {{e.step: e.value for e in events.Scalars("policy/entropy")}}
assert found.keys() == wanted.keys() == {{1, 2, 3, 4}}, (found, wanted)
assert all(abs(found[k] - wanted[k]) < 1e-5 for k in wanted)
assert not any("histogram" in tag for tag in events.Tags()["scalars"])
"""
    subprocess.run([sys.executable, "-c", check], check=True, env=environment)
    files = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    name = (run / "wandb-id").read_text()
    assert len(files) == 2 and all(file.stem == f"run-{name}" for file in files)
    for file in files:  # protocol buffers, in which names and settings can be read
        content = file.read_bytes()
        assert b"policy/entropy" in content and b"prompts_per_step" in content
