"""Checkpoints: all that a run needs to resume, written while it trains, whole or not there at all.

    kept = Checkpoints(run / "checkpoints", 2, ranks, tensors_of(model, optimizer), identity)
    kept.save(step, about)        # copies the tensors and returns; a thread writes the copy
    kept.wait()                   # until that is on the disk
    about = kept.restore()        # of the newest that is whole; the tensors are filled in place

A checkpoint is a folder `step-000025`: each rank's shards in PyTorch's own format, which any number
of ranks can read, and state.json, with the rest. It is written as `step-000025.partial`, synced and
renamed.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from run.distributed import Ranks

VERSION = 7  # of state.json and of the names in `tensors_of`


def tensors_of(model, optimizer, average: Iterable[Tensor] = ()) -> dict[str, Tensor]:
    """Name -> the very tensors that training changes. `average`: in the parameters' order."""
    named, tensors = list(model.named_parameters()), {}
    for name, parameter in named:
        tensors[f"model.{name}"] = parameter.detach()
        if not optimizer.state[parameter]:  # AdamW makes these at its first step
            zeros = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors | {f"average.{n}": x for (n, _), x in zip(named, average, strict=False)}


class Checkpoints:
    def __init__(
        self, folder: Path, keep: int, ranks: Ranks, tensors: dict[str, Tensor], identity: dict
    ):
        """`identity`: what must be equal to resume."""
        self.folder, self.keep, self.ranks, self.tensors = folder, keep, ranks, tensors
        self.identity = json.loads(json.dumps(identity))
        self.writing: threading.Thread | None = None
        self.error = ""  # of the last save
        # PyTorch warns that it assumes a single process: true wherever it does.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        # The thread's collectives need a group of their own, beside those of the loop.
        self.group = dist.new_group(backend="gloo") if ranks.size > 1 else None

    # ---------------------------------------------------------------------------------- writing

    def save(self, step: int, about: dict) -> None:
        """Returns when the tensors may change again. Collective."""
        self.wait()
        final = self.folder / f"step-{step:06}"
        partial = final.with_suffix(".partial")

        def is_new() -> bool:
            if final.exists():
                return False  # a resumed run begins with the record of its last step
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            return True

        if not self.ranks.on_rank0("save", is_new):
            return
        future = dcp.async_save(self.tensors, checkpoint_id=partial, process_group=self.group)
        about = {"version": VERSION, "step": step} | self.identity | about
        self.writing = threading.Thread(target=self.finish, args=(future, partial, final, about))
        self.writing.start()

    def finish(self, future, partial: Path, final: Path, about: dict) -> None:
        self.error = ""
        try:
            future.result()  # rank 0 has it when all have written
            if self.ranks.rank == 0:
                with open(partial / "state.json", "w") as file:
                    file.write(json.dumps(about, indent=1))
                    file.flush()
                    os.fsync(file.fileno())
                sync(partial)
                os.replace(partial, final)
                sync(self.folder)
                for old in self.all()[self.keep :]:
                    shutil.rmtree(old)
        except BaseException as error:  # CheckpointException is no Exception
            self.error = f"the checkpoint {final} could not be written ({reason(error)})"
            if self.ranks.rank == 0:
                print(f"\nssr.py: {self.error}; the one before is whole, and the run continues",
                      file=sys.stderr, flush=True)  # fmt: skip
                shutil.rmtree(partial, ignore_errors=True)

    def wait(self) -> None:
        if self.writing:
            self.writing.join()
            self.writing = None

    # ---------------------------------------------------------------------------------- reading

    def all(self) -> list[Path]:
        """Newest first."""
        folders = [folder for folder in self.folder.glob("step-*") if not folder.suffix]
        return sorted(folders, key=lambda folder: -int(folder.name[5:]))

    def restore(self) -> dict | None:
        """The newest checkpoint's state, its tensors in place; None where there is none."""

        def find() -> list[tuple[Path, dict]]:
            return [(x, json.loads((x / "state.json").read_text())) for x in self.all()[:1]]

        newest = self.ranks.on_rank0("look for checkpoints", find)
        if not newest:
            return None
        [(folder, about)] = newest
        if about["version"] != VERSION:
            raise ValueError(
                f"{folder} has format {about['version']}, and this code reads format {VERSION}: "
                "resume with the code that wrote it"
            )
        for name in self.identity:
            if about.get(name) != self.identity[name]:
                raise ValueError(
                    f"{folder} is of another run: the {name} it began with: {about.get(name)}, "
                    f"now: {self.identity[name]}"
                )
        try:
            dcp.load(self.tensors, checkpoint_id=folder, process_group=self.group)
        except dcp.api.CheckpointException as error:  # is no Exception
            raise ValueError(
                f"{folder} cannot be read ({reason(error)}). All nodes must share its disk; if it "
                "is damaged, delete it to resume from the one before"
            ) from None
        return about


def reason(error: BaseException) -> str:
    """The first cause of an error that PyTorch has wrapped, on one line."""
    causes = [cause for cause, _ in getattr(error, "failures", {}).values()]
    error = causes[0] if causes else error
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def sync(folder: Path) -> None:
    """A rename in it is lost with the power until this is done."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(path: Path) -> str:
    """Hash a file, or a model folder's weights, tokenizer and chat template. Of files beyond 16 MiB
    the size and 1,024 places are read."""
    files, digest = [path], hashlib.sha256()
    if path.is_dir():
        names = re.compile(r"\.safetensors$|token|vocab|merges|chat_template")
        files = sorted(x for x in path.iterdir() if names.search(x.name) and x.is_file())
    for name in files:
        size = name.stat().st_size
        digest.update(f"{name.name} {size}".encode())
        with open(name, "rb") as file:
            for place in range(0, size, max(size // 1024, 2**14)):
                file.seek(place)
                digest.update(file.read(2**14))
    return digest.hexdigest()[:16]
