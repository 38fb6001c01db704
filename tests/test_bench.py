"""The benchmarks run. Their figures are nobody's test, but one that breaks is found here."""

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT


def bench(name: str, *words: str) -> str:
    command = [sys.executable, "-m", f"bench.{name}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.slow
def test_what_runs_on_a_gpu_is_rehearsed_here(tmp_path):
    said = bench("gpu", "--rehearse", f"--out={tmp_path}")
    assert "2 sequences" not in said and "tiny, 4 sequences" in said and "FAILED" not in said
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["kernels"]["advantage"] < 1e-5
    errors = {k: v for k, v in found["kernels"].items() if "float32" in k}
    assert len(errors) == 4 and max(errors.values()) < 1e-4
    assert 0 < found["decode"]["tiny, 4 sequences"]["of the limit"] < 1


@pytest.mark.slow
def test_a_step_is_taken_and_measured(tmp_path):
    out = tmp_path / "step.json"
    bench("step", "hidden 64", "--pairs=1", f"--out={out}")
    [row] = json.loads(out.read_text())["rows"]
    assert row["seconds"]["ours"] > row["products"] > 0
    assert {"sample", "train"} < row["stages"].keys()


@pytest.mark.slow
def test_growth_is_measured_beside_the_estimate(tmp_path):
    out = tmp_path / "scaling.json"
    bench("scaling", "prompts", "--steps=1", f"--out={out}")
    points = json.loads(out.read_text())["rows"]["prompts"]
    assert len(points) == 6
    for point in points.values():
        assert point["memory"] > 0 and point["estimate"]["memory"] > 0
    assert points["32"]["seconds"] > points["1"]["seconds"]


@pytest.mark.slow
def test_memory_is_measured_beside_the_estimate(tmp_path):
    out = tmp_path / "memory.json"
    bench("memory", "4 layers, 4096 tokens", f"--out={out}")
    [row] = json.loads(out.read_text())["rows"].values()
    assert 0.75 < row["estimate"] / row["measured"] < 1.25
    assert min(row["last step"][f"seconds/{x}"] for x in ("sample", "judge", "train")) > 0.02


@pytest.mark.slow
def test_the_loop_is_taken_apart(toy, tmp_path):
    out = tmp_path / "loop.json"
    bench("loop", f"--model={toy}", "--steps=8", f"--out={out}")
    found = json.loads(out.read_text())
    assert [*found["stages"]] == ["sample", "judge", "reference", "train"]
    assert all(0 < x["limit"] < x["operators"] for x in found["stages"].values())
