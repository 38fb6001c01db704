"""Real processes for tests: ranks forked from a server that has everything imported.

A fork costs a tenth of a second where a new interpreter with torch costs three.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

ROOT = Path(__file__).parent.parent
PRELOADED = ["ssr", "rzero.selfplay", "toy.programs", "tests.golden", "tests.runs"]
PRELOADED += ["torch._dynamo", "transformers.models.auto", "numpy.random"]  # torch needs them late


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(folder: Path, size: int, work, *args, env=None) -> list:
    """`work(rank, *args)` in `size` processes that find each other as torchrun's would.

    Their output goes to folder/out-RANK and folder/err-RANK.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(size):
        variables = {
            "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }  # fmt: skip
        variables = {} if size == 1 else {k: str(v) for k, v in variables.items()}
        for name in ("out", "err"):  # there even if it is killed before it can open them
            (folder / f"{name}-{rank}").write_text("")
        job = (str(folder), rank, variables | (env or {}), work, args)
        processes.append(context.Process(target=begin, args=job))
        processes[-1].start()
    processes[0].store = store  # lives as long as they do
    return processes


def begin(folder: str, rank: int, variables: dict, work, args) -> None:
    import torch

    from run.distributed import interrupt

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.update(variables)
    signal.signal(signal.SIGTERM, interrupt)
    torch.set_num_threads(1)
    work(rank, *args)


def finish(
    folder: Path, processes: list, timeout: float = 600, grace: float = 60
) -> SimpleNamespace:
    """Their exit codes and output; none is left behind. When one has failed the others get SIGTERM,
    as from torchrun, and have `grace` seconds to end."""
    deadline, failed = time.monotonic() + timeout, False
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
        if not failed and any(process.exitcode for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + grace)
            for process in processes:
                process.terminate()
    failed = any(process.exitcode for process in processes)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    output = {
        name: [(folder / f"{name}-{rank}").read_text() for rank in range(len(processes))]
        for name in ("out", "err")
    }
    assert failed or not hung, (f"ranks {hung} hang", output)
    return SimpleNamespace(codes=[process.exitcode for process in processes], **output)


def run(folder: Path, size: int, work, *args, **more) -> SimpleNamespace:
    return finish(folder, start(folder, size, work, *args, **more))
