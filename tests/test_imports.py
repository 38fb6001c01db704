"""Who may import whom, and that nothing happens at import: whoever copies a file takes one file."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # file -> (imported with the file, imported inside a function), standard library aside
    "model.py": ({"torch", "safetensors"}, {"huggingface_hub", "transformers"}),
    "sampler.py": ({"torch"}, {"transformers", "model"}),  # its command line alone
    "judge.py": (set(), set()),
    "family.py": ({"torch", "grpo", "judge"}, set()),
    "games.py": ({"answers", "judge", "problem", "toy"}, {"sacrebleu", "toy"}),
    "challenge.py": ({"numpy", "torch", "judge", "problem", "ranks", "sampler"}, set()),
    "rzero.py": (
        {"torch", "challenge", "checkpoint", "data", "eval", "games", "grpo", "judge", "model"}
        | {"plan", "ranks", "report", "sampler", "ssr", "watch"},
        set(),
    ),
    "answers.py": (set(), {"math_verify"}),  # in its worker
    "grpo.py": ({"torch", "kernels", "ranks"}, set()),  # sampler and judge are handed in
    "ranks.py": ({"torch"}, set()),
    "checkpoint.py": ({"torch", "ranks"}, set()),
    "plan.py": ({"torch", "kernels", "model"}, {"huggingface_hub"}),
    "data.py": ({"judge"}, {"sacrebleu", "pyarrow"}),
    "remote.py": ({"judge"}, set()),
    "problem.py": (
        {"torch", "checkpoint", "data", "eval", "judge", "model", "ranks", "remote", "sampler"}
        | {"family", "plan", "toy", "watch"},
        {"sacrebleu"},
    ),
    "watch.py": ({"torch", "checkpoint", "grpo", "judge", "model", "ranks", "show"}, set()),
    "show.py": (set(), {"torch", "wandb"}),
    "report.py": (set(), {"matplotlib"}),
    "ssr.py": (
        {
            "torch",
            "checkpoint",
            "data",
            "eval",
            "grpo",
            "judge",
            "kernels",
            "model",
            "ranks",
            "sampler",
        }
        | {"family", "plan", "problem", "show", "toy", "watch"},
        set(),
    ),
    "toy/languages.py": ({"judge"}, set()),
    "toy/controls.py": ({"family", "judge", "toy"}, set()),
    "toy/programs.py": ({"torch", "games", "judge", "model", "toy"}, set()),
    "toy/pretrain.py": ({"torch", "tokenizers", "transformers", "judge", "model", "toy"}, set()),
    "eval/sets.py": ({"data", "judge", "toy"}, set()),
    "eval/agreement.py": ({"numpy", "data", "eval", "judge", "ranks"}, set()),
    "eval/comet.py": (set(), set()),
    "eval/score.py": ({"numpy", "sacrebleu", "data", "judge"}, set()),
    "eval/rows.py": ({"ranks"}, set()),
    "eval/table.py": ({"numpy", "eval"}, set()),
    "eval/translate.py": (
        {"torch", "checkpoint", "eval", "judge", "model", "problem", "ranks", "sampler", "toy"},
        set(),
    ),
    "eval/__main__.py": ({"torch", "data", "eval", "judge", "problem", "ranks"}, set()),
    "kernels/logprob.py": ({"torch"}, {"triton"}),  # inside a try: not every platform has it
    "kernels/advantage.py": ({"torch"}, {"triton"}),
}


def imports(tree, inside_functions):
    """Top-level names of the modules imported at the top of a file, or anywhere below it."""
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    nodes = [n for n in nodes if n not in top] if inside_functions else top
    names = set()
    for node in nodes:
        found = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        names |= {name.split(".")[0] for name in found}
    return names - set(sys.stdlib_module_names)


NEED_TRANSFORMERS = [
    "ssr.py",
    "rzero.py",
    "games.py",
    "challenge.py",
    "problem.py",
    "toy/pretrain.py",
    "toy/programs.py",
    "eval/translate.py",
    "eval/__main__.py",
]
ALONE = [
    "model.py",
    "ranks.py",
    "sampler.py",
    "judge.py",
    "answers.py",
    "report.py",
    "eval/comet.py",
    "kernels/logprob.py",
    "kernels/advantage.py",
]


def core_files():
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/[!_]*.py"), *ROOT.glob("toy/[!_]*.py")]
    files += [f for f in ROOT.glob("eval/*.py") if f.name not in ("__init__.py", "comet_worker.py")]
    return [file.relative_to(ROOT).as_posix() for file in files]


def test_every_core_file_has_its_arrows_listed():
    assert set(core_files()) == set(ALLOWED)


@pytest.mark.parametrize("file", ALLOWED)
def test_files_import_only_what_their_arrows_allow(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    with_file, in_functions = ALLOWED[file]
    assert imports(tree, False) <= with_file
    assert imports(tree, True) <= in_functions


WATCHED = """
import json, os, sys, torch, traceback

def state():
    return dict(os.environ), torch.get_default_dtype(), torch.get_num_threads()

jobs = sorted(json.load(sys.stdin), key=lambda job: job[2])
for number, (module, folder, transformers) in enumerate(jobs):
    if number > 1:  # two at a time
        os.wait()
    if transformers and "transformers" not in sys.modules:
        import torch.distributed.checkpoint, torch.distributed.fsdp, transformers as _
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    said = os.path.join(folder, "said")
    if os.fork() == 0:  # each sees PyTorch imported, maybe transformers, and nothing else
        os.chdir(folder)
        sys.path.insert(0, folder)
        before, drawn = state(), torch.get_rng_state()
        try:
            __import__(module)
            assert state() == before, "an import changed the environment, the dtype or the threads"
            assert torch.equal(torch.get_rng_state(), drawn), "an import drew random numbers"
            assert torch.is_grad_enabled()
            assert not torch.are_deterministic_algorithms_enabled()
            assert not torch.cuda.is_initialized()
            assert not torch.distributed.is_initialized()
            assert transformers or "transformers" not in sys.modules, "it needs transformers"
            words = "well"
        except BaseException:
            words = traceback.format_exc()
        open(said, "w").write(words)
        os._exit(0)
for _ in range(2):
    os.wait()
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What each import came to: in a process of its own, in a folder with what it may have."""
    jobs, folders = [], {}
    whole = tmp_path_factory.mktemp("whole")
    for name in ALLOWED:
        (whole / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, whole / name)
    for file in ALLOWED:
        folder = folders[file] = tmp_path_factory.mktemp(Path(file).stem)
        if file in ALONE:
            shutil.copy(ROOT / file, folder)
            module = Path(file).stem
        else:  # they find what they import beside them
            shutil.copytree(whole, folder, dirs_exist_ok=True)
            module = file.removesuffix(".py").replace("/", ".")
        jobs.append((module, str(folder), file in NEED_TRANSFORMERS))
    run = subprocess.run(
        [sys.executable, "-c", WATCHED], input=json.dumps(jobs), text=True, capture_output=True,
        cwd=whole.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return {file: (folder / "said").read_text() for file, folder in folders.items()}


@pytest.mark.parametrize("file", ALLOWED)
def test_a_file_imports_and_nothing_happens(file, imported):
    """Those that can be copied alone are."""
    assert imported[file] == "well"
