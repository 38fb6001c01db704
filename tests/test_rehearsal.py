"""The paper's whole path, small and offline: texts from WMT, SSR-X with COMET, the table.

sacreBLEU reads its own cache, COMET scores in its own process, and the commands are those of
docs/reproduce.md with other sizes.
"""

import json
import subprocess
import sys

import pytest
from pytest import approx

from tests.processes import ROOT
from tests.runs import rows_of
from tests.test_data import wmt  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow
SETS = ("wmt23", "wmt24", "flores200")
METRICS = ("cometkiwi-xxl", "xcomet-xxl")
SMALL = [
    "--preset=ssr-x-zero-7b", "--steps=2", "--lr=1e-3", "--prompts-per-step=4",
    "--samples-per-prompt=4", "--max-num-seqs=16", "--max-new-tokens=60",
    "--judge-max-new-tokens=40", "--max-prompt-tokens=400", "--eval-prompts=4", "--eval-every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(wmt, comet_python, comet_checkpoints):  # noqa: F811
    """The environment, and options that set tiny models in the large ones' places."""
    env = wmt | {"SSR_COMET_PYTHON": comet_python, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    kiwi, xcomet = comet_checkpoints / "kiwi", comet_checkpoints / "xcomet"
    return env, kiwi, f"--metrics=bleu,chrf,{METRICS[0]}={kiwi},{METRICS[1]}={xcomet}"


def run(env, *words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(world, pupil, tmp_path_factory):
    """Two steps of SSR-X, on the preset's texts, by two ranks with a worker each."""
    env, kiwi, _ = world
    folder = tmp_path_factory.mktemp("trained") / "run"
    out = run(env, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ssr.py",
              *SMALL, f"--model={pupil}", f"--comet={kiwi}", f"--eval-metrics=chrf,{kiwi}",
              f"--folder={folder}")  # fmt: skip
    assert "wmt17-20: 96 texts read, 96 kept" in out and "4 held out from wmt22" in out
    return folder


def test_comet_is_part_of_the_reward_and_measures(trained):
    for row in rows_of(trained / "metrics.jsonl")[1:]:
        assert row["reward/comet"] != 0
        both = row["reward/self"] + row["reward/comet"]
        assert row["judge/invalid"] > 0 or row["reward/total"] == approx(both)
    row = rows_of(trained / "evaluations.jsonl")[0]
    assert len(set(row["sampled"]["kiwi"])) == 4


def test_the_table_of_the_whole_path(world, trained, pupil, tmp_path):
    """Base and trained model on the paper's six sets; averages computed again by hand."""
    env, _, metrics = world
    out = run(env, "-m", "eval", f"--model=base={pupil}", f"--model=ssr-x={trained / 'last'}",
              metrics, "--max-new-tokens=60", "--max-num-seqs=8", f"--out={tmp_path}",
              "--compare")  # fmt: skip
    assert (tmp_path / "table.md").read_text() in out
    table = json.loads((tmp_path / "table.json").read_text())
    for system in ("base", "ssr-x"):
        scores, unreadable = (table["systems"][system][key] for key in ("scores", "unreadable"))
        for direction in ("zh-en", "en-zh"):
            columns = []
            for name in SETS:
                rows = rows_of(tmp_path / system / f"{name}.{direction}.segments.jsonl")
                assert len(rows) == 12
                for metric in METRICS:
                    columns.append(100 * sum(row["scores"][metric] for row in rows) / 12)
                    shown = scores[f"{direction}/{name}/{metric}"]["value"]
                    assert shown == approx(columns[-1], abs=1e-3)
                share = sum(not row["readable"] for row in rows) / 12
                assert unreadable[f"{direction}/{name}"] == approx(share)
            average = scores[f"{direction}/avg"]["value"]
            assert average == approx(sum(columns) / 6, abs=1e-3)
    published = next(line for line in out.splitlines() if "SSR-Zero-7B (published)" in line)
    assert " 79.29 |" in published and " 87.37 |" in published
    about = table["metrics"][METRICS[1]][0]
    assert "(XCOMETMetric), unbabel-comet 2.2.7, float32, with references" in about
    assert "(UnifiedMetric)" in table["metrics"][METRICS[0]][0]
