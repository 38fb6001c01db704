"""Sweeps run, resume and tabulate; the benchmarks run. Their figures are not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import logprob, sampler, step, sweep
from bench.sweep import Sweep, run_sweep
from run import settings
from rzero import selfplay
from tests.runs import write_rows

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, pathlib, sys
options = dict(option[2:].split("=") for option in sys.argv[1:] if "=" in option)
folder, seed = pathlib.Path(options["folder"]), int(options["seed"])
resumed = "--resume" in sys.argv
assert resumed == folder.exists() and options["model"] == f"model-{seed}"
folder.mkdir(exist_ok=True)
if seed == 1 and (folder.parent / "broken").exists():
    sys.exit("out of luck")
metrics = {"eval/exact_match": 0.2, "eval/sampled_exact_match": 0.1}
after = dict.fromkeys(metrics, float(options["level"]) - 0.2 * seed)
steps = [{"step": 0, "seconds/evaluate": 9.0},
         {"step": 1, "seconds/sample": 0.5, "seconds/train": 0.9, "seconds/evaluate": 9.0},
         {"step": 2, "seconds/sample": 1.5, "seconds/train": 0.7}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\\n" for x in steps))
result = {"before": metrics, "after": after, "resumed": resumed}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def small(tmp_path):
    """A sweep of a program that is done at once."""
    (tmp_path / "program.py").write_text(PROGRAM)
    rows = {"high": ["--level=0.9"], "low, of two": ["--level=0.5"]}
    program = [str(tmp_path / "program.py")]
    return Sweep(program, rows, 2, lambda seed: f"model-{seed}", sweep.reward_cells)


def test_sweep_tabulates_mean_and_spread_over_seeds_and_seconds_of_steps(small, tmp_path):
    lines = run_sweep(small, list(small.rows), 2, tmp_path / "all", []).splitlines()
    assert lines[0].startswith("|  | before | after | lowest seed |") and len(lines) == 4
    assert lines[2] == "| high | 0.200 ± 0.000 | 0.800 ± 0.141 | 0.700 | 0.800 ± 0.141 | 1.80 |"
    assert "| low, of two | 0.200 ± 0.000 | 0.400 ± 0.141 |" in lines[3]


def test_interrupted_sweep_continues_and_keeps_finished_runs(small, tmp_path, capsys):
    out, rows = tmp_path / "all", list(small.rows)
    out.mkdir()
    (out / "broken").touch()
    with pytest.raises(RuntimeError, match=r"(?s)seed1 failed:.*out of luck"):
        run_sweep(small, rows, 2, out, [])
    (out / "broken").unlink()
    done = {f.parent.name: f.stat().st_mtime_ns for f in out.glob("*/result.json")}
    capsys.readouterr()
    run_sweep(small, rows, 2, out, [])
    assert f"4 runs, {len(done)} of them done already" in capsys.readouterr().out
    for name, time in done.items():
        assert (out / name / "result.json").stat().st_mtime_ns == time
    resumed = [json.loads(f.read_text())["resumed"] for f in out.glob("*/result.json")]
    assert len(resumed) == 4 and any(resumed)  # the one that failed had begun


def test_sweep_with_other_options_is_refused(small, tmp_path):
    run_sweep(small, ["high"], 1, tmp_path / "all", [])
    with pytest.raises(ValueError, match=r"--level=0\.8: name another --folder"):
        run_sweep(small, ["high"], 1, tmp_path / "all", ["--level=0.8"])


def test_rzero_row_shows_every_iteration_and_the_challengers_first_and_last_step(tmp_path):
    for seed, more in enumerate((0.0, 0.2)):
        (tmp_path / f"{seed}" / "challenger").mkdir(parents=True)
        table = {"eval/accuracy": [0.9, 0.9], "eval/sampled_accuracy": [0.4, 0.3 + more]}
        table |= {"lessons/kept": [None, 20], "lessons/label_accuracy": [None, 0.5]}
        (tmp_path / f"{seed}" / "result.json").write_text(json.dumps(table))
        names = ("questions/depth", "questions/different", "reward/repetition")
        steps = [{"step": 0}, *(dict.fromkeys(names, x) for x in (1, 7, 2))]
        write_rows(tmp_path / f"{seed}" / "challenger" / "metrics.jsonl", steps)
    cells = sweep.rzero_cells({"R-Zero": [tmp_path / "0", tmp_path / "1"]}, "R-Zero")
    assert cells["held-out, sampled"] == "0.4 → 0.4" and cells["rose each time"] == "1 of 2"
    assert cells["learned from"] == "20" and cells["depth of questions"] == "1 → 2"


def test_options_of_all_rows_exist(toy):
    for name, one in sweep.SWEEPS.items():
        for options in one.rows.values():
            if name == "rzero":
                selfplay.parse(options)
            else:
                settings.parse([*one.program[1:], f"--model={toy}", *options])


@pytest.mark.slow
def test_sweep_of_the_toy_runs(toy, tmp_path, capsys, monkeypatch):
    rewards = sweep.SWEEPS["rewards"]._replace(build_model=lambda seed: toy)
    monkeypatch.setitem(sweep.SWEEPS, "rewards", rewards)
    argv = ["rewards", "majority vote", "--seeds=1", f"--folder={tmp_path / 'all'}"]
    sweep.main([*argv, "--", "--steps=2", "--prompts-per-step=2", "--eval-prompts=4"])
    assert "| majority vote | " in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_script_is_rehearsed(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", f"--out={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True)
    results = json.loads((tmp_path / "all.json").read_text())
    row = results["decode"]["tiny, 4 sequences, context 64"]
    assert 0 < row["PyTorch, of the limit"] < 1 and 0 < row["kernels, of the limit"] < 1
    assert min(results["step"]["seconds"][x] for x in ("sample", "judge", "reference", "train")) > 0


@pytest.mark.slow
def test_benchmarks_run(monkeypatch):
    monkeypatch.setitem(step.ROWS, "toy", (None, (4, 4, 20), 3))
    [toy] = step.run(["toy"], 1)["rows"]
    assert toy["ours"]["ms"] > 0 and toy["ours"]["MB"] > 1 and 0.3 < toy["ours"]["reward"] < 0.9
    monkeypatch.setattr(sampler, "NEW", 8)
    [row] = sampler.run(["small"], 1)["rows"]
    assert row["ratio"] > 0
    sides = logprob.compare((256, 32, 500), 1)["sides"]
    assert max(x["gradient gap"] for x in sides.values()) < 1e-4
