"""The paper's whole path, small and offline: texts from WMT, SSR-X with COMET, the table.

Everything is the real library's: sacreBLEU reads its cache, COMET scores in its own process, the
commands are those of docs/reproduce.md with other sizes.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pytest import approx

from eval.comet import Comet
from tests import corpora
from tests.test_data import wmt  # noqa: F401 (a fixture)
from tests.test_problem import SMALL, rows_of

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
SETS = ("wmt23", "wmt24", "flores200")
METRICS = ("cometkiwi-xxl", "xcomet-xxl")


@pytest.fixture(scope="module")
def world(wmt, comet_python, comet_checkpoints):  # noqa: F811
    """The environment, and options that set tiny models in the large ones' places."""
    env = wmt | {"SSR_COMET_PYTHON": comet_python, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    kiwi, xcomet = comet_checkpoints / "kiwi", comet_checkpoints / "xcomet"
    return env, kiwi, f"--metrics=bleu,chrf,{METRICS[0]}={kiwi},{METRICS[1]}={xcomet}"


def run(env, *words, fails=False):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert bool(done.returncode) == fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def trained(world, pupil, tmp_path_factory):
    """Three steps of SSR-X, on the preset's texts."""
    env, kiwi, _ = world
    folder = tmp_path_factory.mktemp("trained") / "run"
    out = run(env, "ssr.py", *SMALL, "--preset=ssr-x-zero-7b", "--steps=3", f"--model={pupil}",
              f"--comet={kiwi}", "--comet-dtype=float32", "--lr=1e-3", f"--folder={folder}",
              f"--measures=chrf,{kiwi}")  # fmt: skip
    assert "wmt17-20: 96 texts read, 96 kept" in out and "4 held out from wmt22" in out
    return folder


def test_comet_is_part_of_the_reward(world, trained):
    env, kiwi, _ = world
    rows = rows_of(trained / "metrics.jsonl")
    assert all(row["reward/comet"] != 0 for row in rows[1:])
    for row in rows[1:]:
        both = row["reward/self"] + row["reward/comet"]
        assert row["judge/invalid"] > 0 or row["reward/total"] == pytest.approx(both)
    # What the log says of held-out samples is what COMET says of them.
    row = rows_of(trained / "evaluations.jsonl")[0]
    with Comet(str(kiwi), python=env["SSR_COMET_PYTHON"]) as comet:
        pairs = zip(row["source"], row["sampled"]["text"], strict=True)
        scores = comet.score([{"src": source, "mt": text} for source, text in pairs])
    assert row["sampled"]["kiwi"] == pytest.approx(scores, abs=1e-4)


def test_the_table_of_the_whole_path(world, trained, pupil, tmp_path):
    """Base and trained model on the paper's six sets; averages computed again by hand."""
    env, _, metrics = world
    command = ["-m", "eval", f"--model=base={pupil}", f"--model=ssr-x={trained / 'last'}", metrics,
               "--max-new-tokens=60", "--slots=8", f"--out={tmp_path}", "--compare"]  # fmt: skip
    out = run(env, *command)
    assert (tmp_path / "table.md").read_text() in out
    table = json.loads((tmp_path / "table.json").read_text())
    for system in ("base", "ssr-x"):
        scores = table["systems"][system]["scores"]
        for direction in ("zh-en", "en-zh"):
            columns = []
            for name in SETS:
                file = tmp_path / system / f"{name}.{direction}"
                rows = rows_of(Path(f"{file}.segments.jsonl"))
                assert len(rows) == 12
                for metric in METRICS:
                    values = [row["scores"][metric] for row in rows]
                    columns.append(100 * sum(values) / len(values))
                    shown = scores[f"{direction}/{name}/{metric}"]["value"]
                    assert shown == pytest.approx(columns[-1], abs=1e-3)
                share = sum(not row["readable"] for row in rows) / 12
                assert table["systems"][system]["unreadable"][f"{direction}/{name}"] == approx(share)
            by_hand = sum(columns) / 6
            assert scores[f"{direction}/avg"]["value"] == pytest.approx(by_hand, abs=1e-3)
    with open(tmp_path / "table.csv", newline="") as file:
        lines = {line["model"]: line for line in csv.DictReader(file)}
    assert lines["SSR-Zero-7B (published)"]["zh-en/wmt23/cometkiwi-xxl"] == "79.29"
    assert lines["SSR-Zero-7B (published)"]["zh-en/avg"] == "87.37"
    about = table["metrics"][METRICS[1]][0]
    assert "(XCOMETMetric), unbabel-comet 2.2.7, float32, with references" in about
    assert "(UnifiedMetric)" in table["metrics"][METRICS[0]][0]

    # Nothing is left to do: the same command needs neither model nor COMET.
    again = run(env | {"SSR_COMET_PYTHON": sys.executable}, *command)
    assert "segments, " not in again.partition("writing")[2]
    assert json.loads((tmp_path / "table.json").read_text())["systems"] == table["systems"]


def test_scores_are_comets_own_and_references_can_be_hidden(world, pupil, tmp_path):
    env, kiwi, _ = world
    xcomet = kiwi.parent / "xcomet"
    lines = [corpora.english("wmt23", i) for i in range(12)]
    (tmp_path / "hyp.txt").write_text("\n".join([*lines[:11], ""]) + "\n")  # one is empty
    run(env, "-m", "eval", f"--translations=theirs={tmp_path / 'hyp.txt'}", "--sets=wmt23:zh-en",
        f"--metrics=x={xcomet},y={xcomet}:no-ref", f"--out={tmp_path / 'out'}")  # fmt: skip
    rows = rows_of(tmp_path / "out" / "theirs" / "wmt23.zh-en.segments.jsonl")
    with Comet(str(xcomet), python=env["SSR_COMET_PYTHON"]) as comet:
        whole = [{"src": r["text"], "mt": r["translation"], "ref": r["reference"]} for r in rows]
        bare = [{"src": r["src"], "mt": r["mt"]} for r in whole]
        assert [r["scores"]["x"] for r in rows] == pytest.approx(comet.score(whole), abs=1e-5)
        assert [r["scores"]["y"] for r in rows] == pytest.approx(comet.score(bare), abs=1e-5)
    assert rows[0]["scores"]["x"] != rows[0]["scores"]["y"]
    error = run(env, "-m", "eval", f"--translations=theirs={tmp_path / 'hyp.txt'}",
                "--sets=wmt23:zh-en", f"--metrics=needy={kiwi.parent / 'regression'}:no-ref",
                f"--out={tmp_path / 'out'}", fails=True)  # fmt: skip
    assert "regression needs references" in error


def test_scoring_that_was_interrupted_goes_on(world, tmp_path):
    """Killed between two rounds of COMET's: what is on the disk is not scored again."""
    env, kiwi, _ = world
    rows = [{"text": f"Text {i}", "source": "en", "target": "zh"} for i in range(1500)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "hyp.txt").write_text("".join(f"Wort {i}\n" for i in range(1500)))
    words = ["-m", "eval", f"--translations=t={tmp_path / 'hyp.txt'}", f"--metrics=kiwi={kiwi}",
             f"--sets={tmp_path / 'many.jsonl'}"]  # fmt: skip
    run(env, *words, f"--out={tmp_path / 'whole'}")
    process = subprocess.Popen([sys.executable, *words, f"--out={tmp_path / 'out'}"], cwd=ROOT,
                               env=env, stdout=subprocess.DEVNULL)  # fmt: skip
    file = tmp_path / "out" / "t" / "many.en-zh.kiwi.jsonl"
    while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") > 30):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = file.read_bytes()
    assert 30 < done.count(b"\n") < 1500
    run(env, *words, f"--out={tmp_path / 'out'}")
    assert file.read_bytes().startswith(done[: done.rindex(b"\n")])
    tables = [(tmp_path / x / "table.csv").read_text() for x in ("out", "whole")]
    assert tables[0] == tables[1]


def test_a_worker_that_is_killed_in_training_does_not_end_it(world, pupil, tmp_path):
    env, kiwi, _ = world
    process = subprocess.Popen(
        [sys.executable, "ssr.py", *SMALL, "--preset=ssr-x-zero-7b", "--steps=40",
         f"--model={pupil}", f"--comet={kiwi}", "--comet-dtype=float32", "--eval-every=100",
         f"--folder={tmp_path / 'run'}"], cwd=ROOT, env=env, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "comet_worker"],
                           capture_output=True, text=True)  # fmt: skip
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    _, error = process.communicate(timeout=200)
    assert found.stdout.split() and process.returncode == 0, error
    assert "starting it again" in error
    rows = rows_of(log)
    assert rows[-1]["step"] == 40 and all("reward/comet" in row for row in rows[1:])


def test_two_ranks_have_a_worker_each_and_learn_the_same(world, pupil, tmp_path):
    env, kiwi, _ = world
    words = [*SMALL, "--preset=ssr-x-zero-7b", "--steps=2", f"--model={pupil}", f"--comet={kiwi}",
             "--comet-dtype=float32"]  # fmt: skip
    run(env, "ssr.py", *words, f"--folder={tmp_path / 'one'}")
    run(env, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ssr.py", *words,
        f"--folder={tmp_path / 'two'}")  # fmt: skip
    one, two = (rows_of(tmp_path / x / "metrics.jsonl") for x in ("one", "two"))
    for a, b in zip(one[1:], two[1:], strict=True):
        for key in ("reward/total", "reward/comet", "reward/self", "length/mean"):
            assert a[key] == pytest.approx(b[key], abs=1e-4), key
