"""docs/borrowing.md: each example runs with no other files than its heading names."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "borrowing.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n)*)", TEXT, re.M))  # heading -> what follows
RUN_OR_READ = ("comet_worker.py", "comet-requirements.txt", "page.html", "__main__.py")


def blocks(heading):
    return re.findall(r"^```python\n(.*?)^```$", SECTIONS[heading], re.M | re.S)


def copy(heading, folder):
    """Files keep their folders. -> what was copied."""
    for name in heading.split(", "):
        if name.endswith("/"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_the_core_files_have_an_example():
    core = ["grpo", "judge", "kernels/advantage", "kernels/decode", "kernels/logprob", "model"]
    core += ["sampler"]
    assert {f"{name}.py" for name in core} <= {heading.split(", ")[0] for heading in SECTIONS}
    assert all(blocks(heading) for heading in SECTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("heading", SECTIONS, ids=lambda heading: heading.split(", ")[0])
def test_an_example_runs_beside_the_files_it_names(heading, tmp_path):
    copied = copy(heading, tmp_path)
    code = "\n\n".join(blocks(heading))
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    surroundings |= {"OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
    run = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    shown = re.findall(r"^ *print\(.*\)  # (.+)$", code, re.M)
    assert shown and run.stdout.splitlines()[-len(shown) :] == shown
    # What was imported has left its bytecode: all that was copied was needed.
    cached = {file.relative_to(tmp_path) for file in tmp_path.rglob("__pycache__/*.pyc")}
    used = {(file.parents[1] / file.name.split(".")[0]).as_posix() + ".py" for file in cached}
    assert used == {name for name in copied if not name.endswith(RUN_OR_READ)}
