"""What the benchmarks share: seconds, bytes, other processes."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PEER = ROOT / ".peers" / "bin" / "python"  # has TRL and Liger
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32


def seconds_of(work: Callable) -> float:
    if CUDA:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak_bytes(work: Callable) -> int:
    """The peak above what is held already: on the GPU, or resident (Linux)."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before

    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def call_in_new_process(
    function: Callable, *args, python: str = sys.executable, env: dict | None = None, log=None,
    timeout: float | None = None,
):  # fmt: skip
    """What the function returns, as JSON; what it prints goes to `log`, or is shown."""
    module, name = function.__module__, function.__qualname__
    if module == "__main__":  # of `python -m bench.gpu`
        module = sys.modules[module].__spec__.name
    code = f"""import json, sys, {module} as module
result = module.{name}(*json.loads(sys.argv[1]))
open(sys.argv[2], "w").write(json.dumps(result))"""
    with tempfile.NamedTemporaryFile("r") as result:
        command = [python, "-c", code, json.dumps(args), result.name]
        run_in_session(command, log, timeout, env)
        return json.load(result)


def run_in_session(command: list[str], log=None, timeout=None, env: dict | None = None) -> None:
    """Run a command of the repository; at its end all that it has started is killed."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT if log else None,
        env=os.environ | (env or {}), start_new_session=True,
    ) as process:  # fmt: skip
        try:
            code = process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if code:
        raise subprocess.CalledProcessError(code, command)


def take_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each side returns in each round, after one to warm up. A busy machine slows all."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            value = side()
            values[name] += [value] * (number > 0)
        if number:
            last = ", ".join(f"{name} {x[-1]:.4g}" for name, x in values.items())
            print(f"  round {number}/{rounds}  {last}", flush=True)
    return values


def machine() -> str:
    if CUDA:
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
