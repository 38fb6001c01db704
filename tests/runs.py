"""Small runs of ssr.py, in this process or in several, and what they leave behind."""

import json
import os
import signal
import time

import pytest
import torch

import ssr
from model import load
from run.evaluation import Evaluation
from run.folder import LOGS
from run.monitor import RunMonitor
from tests import processes

TOY = [
    *("--preset=toy", "--prompts-per-step=4", "--samples-per-prompt=4", "--eval-prompts=16"),
    "--eval-every=2",
]
RANKS = [*TOY, "--prompts-per-step=5", "--eval-prompts=8", "--lr=2e-3", "--hang-timeout=600"]
PAPER = [
    *("--preset=ssr-zero-7b", "--steps=1", "--prompts-per-step=4", "--samples-per-prompt=4"),
    *("--max-new-tokens=60", "--judge-max-new-tokens=40", "--max-prompt-tokens=400"),
    *("--eval-prompts=4", "--eval-every=1", "--max-num-seqs=16"),
]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def untimed(rows):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def num_lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, seconds=300, pause=0.02):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


def go(folder, toy, *words, small=TOY):
    """The rows of a run in this process. It may end with code 3: a short run may learn nothing."""
    try:
        ssr.main([*small, f"--model={toy}", f"--folder={folder}", *words])
    except SystemExit as error:
        if error.code != 3:
            raise
    return rows_of(folder / "metrics.jsonl")


def train(rank, words, stop_after=0):
    """A run; every rank gets SIGTERM after step `stop_after`."""
    real = RunMonitor.after

    def after(self, step):
        real(self, step)
        if step.number == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    RunMonitor.after = after
    ssr.main(words)


def go_ranks(folder, size, *words, stop_after=0):
    """A run in `size` processes that must end well: their output."""
    done = processes.run(folder.parent / f"{folder.name}-said", size, train,
                         [*RANKS, f"--folder={folder}", *words], stop_after)  # fmt: skip
    assert done.codes == [0] * size, (done.err, done.out)
    return done


def start_endless(folder, size, *words, work=train, args=()):
    """Processes of a run that has done some steps and would go on for ever."""
    words = [*RANKS, f"--folder={folder}", "--steps=1000000", *words]
    started = processes.start(folder.parent / "said", size, work, words, *args)
    wait_for(lambda: num_lines(folder / "metrics.jsonl") > 3)
    return started


def set_quality(monkeypatch, quality):
    """The held-out measure at step n is quality(n), whatever the translations are."""
    real = Evaluation.__call__

    def measured(self, number):
        self.problem.eval_metrics = {
            "exact_match": lambda tasks, texts: [quality(number)] * len(texts)
        }
        return real(self, number)

    monkeypatch.setattr(Evaluation, "__call__", measured)


def assert_same_run(a, b):
    """To the last bit, except for the time."""
    for name in LOGS:
        assert untimed(rows_of(a / name)) == untimed(rows_of(b / name))
    weights = [sorted((f.parent.name, f.read_bytes()) for f in run.glob("*st/*.safetensors"))
               for run in (a, b)]  # fmt: skip
    assert weights[0] == weights[1] and "last" in dict(weights[0])
    results = [json.loads((run / "result.json").read_text()) for run in (a, b)]
    for key in ("before", "after"):
        results[0][key], results[1][key] = untimed([r[key] for r in results])
    assert untimed(results)[0] == untimed(results)[1]


def assert_close_weights(a, b, atol=1e-4):
    """Of four updates by 2e-3."""
    for mine, theirs in zip(load(a).parameters(), load(b).parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


def refuses(words, message):
    """ssr.py ends with an error of one line that matches."""
    with pytest.raises(SystemExit, match=message) as error:
        ssr.main(words)
    assert str(error.value).count("\n") <= 1
