import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: no test waits for a network

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny models: threads would wait for each other longer than they work

HERE = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--other-machine", action="store_true", help="round as another processor")


# The longest files first: workers that take a file at a time end at about the same time.
LONGEST = (
    "toy",
    "distributed",
    "rzero",
    "checkpoint",
    "ssr",
    "problem",
    "report",
    "sampler",
    "family",
)


def pytest_collection_modifyitems(items):
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda x: names.index(x.path.name) if x.path.name in names else len(names))


@pytest.fixture(autouse=True)
def machine(request):
    if not request.config.getoption("--other-machine"):
        yield
        return
    from tests.perturb import perturbed

    with perturbed(seed=0):
        yield


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch):
    """The page is drawn by a process of its own, which only tests of it need."""
    if "report" not in request.node.name:
        monkeypatch.setattr("run.console.Console.draw_report", lambda *_: None)


def once(tmp_path_factory, name, make):
    """A folder that `make(folder)` fills, for all workers of pytest-xdist, once."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, partial = root / name, root / f"{name}.partial"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(partial)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def toy():
    """The toy's pretrained model, as it is shipped."""
    from toy.pretrain import SHIPPED

    return SHIPPED / "languages-seed0"


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """Where the command of the README has run."""

    def run(folder):
        folder.mkdir()
        command = [sys.executable, str(HERE.parent / "ssr.py"), "--folder", "run"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, run.stderr

    return once(tmp_path_factory, "learned", run)


@pytest.fixture(scope="session")
def comet_python(tmp_path_factory):
    """A Python that has COMET: $SSR_COMET_PYTHON, or that of an environment made for this."""
    if given := os.environ.get("SSR_COMET_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("comet") / "environment"
    command = [sys.executable, "-m", "eval.comet", "install", "--folder", str(folder)]
    subprocess.run(command, cwd=HERE.parent, check=True)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="session")
def comet_checkpoints(comet_python, tmp_path_factory):
    """A folder with tiny random models, one of each kind in `tiny_comet.MODELS`."""
    folder = tmp_path_factory.mktemp("tiny-comet")
    command = [comet_python, "-W", "ignore", str(HERE / "tiny_comet.py"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def pupil(tmp_path_factory):
    """A tiny Qwen2 that answers the paper's prompts in their form."""
    from tests.corpora import lessons
    from tests.tiny import make_pupil

    return once(tmp_path_factory, "pupil", lambda new: make_pupil(new, lessons("news"), steps=80))


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """A toy of small programs that has read just enough to ask, and to answer in the right form."""
    from toy.pretrain import build_and_save
    from toy.programs import ProgramRecipe, pretrain_programs

    recipe = ProgramRecipe(
        tokens=9e4, width=48, layers=1, mlp=96, asked=0.2, doubted=0.0, slip=0.0,
        muon=0.02, adamw=6e-3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("programs")
    build_and_save(pretrain_programs, recipe, folder)
    return folder
