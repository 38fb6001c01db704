"""Who may import whom, and that an import does nothing but import."""

import ast
import graphlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BELOW = "run.checkpoint run.distributed run.cache run.folder"  # of run, what is below the loop
ARROWS = {  # module or folder -> the modules and folders of ours that it may import
    "model": "", "sampler": "", "judge": "", "kernels": "kernels", "report": "report",
    "run.distributed": "", "run.metrics": "", "run.console": "", "eval.comet": "",
    "rzero.answers": "",
    "run.checkpoint": "run.distributed",
    "run.cache": "run.distributed run.folder",
    "run.folder": "model",
    "run.estimate": "kernels model",
    "grpo": "kernels run.distributed run.metrics",
    "data": "judge data",
    "toy.languages": "judge",
    "toy": "judge model toy data.codec rewards.family rzero.games",
    "rewards.remote": "judge",
    "rewards.family": "judge grpo data.codec",
    "rewards.toy": "judge toy.languages",
    "rewards": f"judge grpo data.codec sampler eval.comet toy rewards {BELOW}",
    "run.driver": f"grpo judge data.codec kernels model sampler {BELOW}",
    "run": "grpo judge model sampler kernels data eval.sets rewards toy run",
    "eval": f"judge model sampler data toy rewards eval run {BELOW}",
    "rzero": "grpo judge model sampler data toy run report rzero",
    "ssr": "grpo judge model sampler data rewards run toy",
}  # fmt: skip
ALONE = [
    *("model.py", "sampler.py", "judge.py", "run/distributed.py", "rzero/answers.py"),
    *("eval/comet.py", "kernels/logprob.py", "kernels/advantage.py"),
]
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py"))
}
OURS = [name for name in FILES if name.split(".")[0] not in ("tests", "bench", "docs")]


def imports(name):
    """Our modules that a module imports, inside functions, too."""
    names = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            names |= inside or {node.module}
    return names & FILES.keys()


def test_modules_import_only_what_their_arrows_allow():
    for name in OURS:
        allowed = ARROWS.get(name, ARROWS[name.split(".")[0]]).split()
        for imported in imports(name):  # nothing may import ssr
            assert imported in allowed or imported.split(".")[0] in allowed, name


def test_no_module_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter({name: imports(name) for name in OURS}).prepare()


IMPORTING = """
import json, os, random, sys, torch, traceback
import numpy

def state():
    return (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.cuda.is_initialized(), torch.distributed.is_initialized(), random.getstate(),
            torch.get_rng_state().tolist(), str(numpy.random.get_state()))

for folder, modules in json.load(sys.stdin):
    if os.fork() == 0:  # each sees PyTorch imported, and nothing else
        os.chdir(folder)
        sys.path.insert(0, folder)
        for module in modules:
            before = state()
            try:
                __import__(module)
                assert state() == before, "an import changed global state or drew random numbers"
                assert modules[1:] or "transformers" not in sys.modules, "it needs transformers"
            except BaseException:
                print(module, traceback.format_exc(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_imports_change_no_global_state_and_files_that_stand_alone_import_alone(tmp_path):
    programs = {name for name in OURS if name.endswith("__main__")} | {"eval.comet_worker"}
    jobs = [(str(ROOT), [name for name in OURS if name not in programs])]
    for number, file in enumerate(ALONE):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(ROOT / file, folder)
        jobs.append((str(folder), [Path(file).stem]))
    run = subprocess.run([sys.executable, "-c", IMPORTING], input=json.dumps(jobs), text=True,
                         capture_output=True, cwd=tmp_path)  # fmt: skip
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
