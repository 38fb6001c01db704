"""The folder of a run: its logs, its lock, and what is in it about the machine and the code; and
writing files so that neither a kill nor a full disk leaves half of one behind.

Rank 0 alone writes. `write` and `add` do nothing on the other ranks (`is_writer` is false); the
other methods are called on rank 0 only.
"""

import dataclasses
import errno
import fcntl
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from model import save

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOGS = ("metrics.jsonl", "evaluations.jsonl", "groups.jsonl")


class RunFolder:
    def __init__(self, path: Path, is_writer: bool):
        self.path, self.is_writer = path, is_writer
        self.locked = None

    def begin(self, s, step: float | None) -> None:
        """Create the folder; or cut the logs to before `step`, which is logged again. By rank 0."""
        self.path.mkdir(parents=True, exist_ok=s.resume)
        self.lock()
        settings, about = dataclasses.asdict(s), environment()
        if step is not None:
            old = json.loads((self.path / "settings.json").read_text())
            settings |= {"resumed": [*old.get("resumed", []), about | {"from_step": step}]}
            about = old["about"]
        self.write("settings.json", settings | {"about": about})
        for name in LOGS:
            self.cut(name, -1 if step is None else step)

    def lock(self) -> None:
        """Against a second run in the same folder. It is released when this process ends."""
        if self.locked or not self.path.is_dir():
            return
        self.locked = open(self.path / "lock", "a+")  # noqa: SIM115 (open as long as we live)
        if not try_lock(self.locked):
            self.locked.seek(0)
            owner = self.locked.read().strip()
            raise ValueError(f"{self.path} is being written by another run ({owner}): wait for its "
                             "end, or stop it")  # fmt: skip
        self.locked.truncate(0)
        self.locked.write(f"process {os.getpid()} on {platform.node()}\n")
        self.locked.flush()

    def close(self) -> None:
        if self.locked:
            self.locked.close()

    def cut(self, name: str, step: int) -> None:
        """Keep the rows before `step`. A row that a kill left half-written comes after them."""
        path = self.path / name
        rows = path.read_bytes().split(b"\n") if path.exists() else []
        kept = list(itertools.takewhile(lambda row: step_of(row) < step, rows))
        if len(kept) < len(rows):
            atomic_write(path, b"".join(row + b"\n" for row in kept))

    def write(self, name: str, content: dict) -> None:
        if self.is_writer:
            text = json.dumps(finite(content), indent=1, ensure_ascii=False)
            atomic_write(self.path / name, text + "\n")

    def add(self, name: str, rows: list[dict]) -> None:
        if self.is_writer:
            lines = [json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows]
            append_lines(self.path / name, "".join(lines))


# -------------------------------------------------------------------------------- any file


def atomic_write(path: Path, content: str | bytes) -> None:
    """Readers find the old content or the new one, never a part of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from None


def append_lines(path: Path, lines: str) -> None:
    """Append all of `lines` or, when an error occurs, none of them."""
    left = lines.encode()
    try:
        with open(path, "ab", buffering=0) as file:  # a buffer would be written again when closed
            size = file.tell()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> OSError:
    hint = "; make room there" if error.errno in NO_ROOM else ""
    return OSError(f"cannot write {path}: {error.strerror}{hint}")


def try_lock(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def save_with_tokenizer(model, source: Path, folder: Path) -> None:
    """A Hugging Face folder, with the tokenizer's files as they are in `source`."""
    save(model, folder)
    for file in source.iterdir():
        if re.search(r"token|vocab|merges|chat_template|generation_config", file.name):
            shutil.copyfile(file, folder / file.name)


def step_of(row: bytes) -> float:
    try:
        return json.loads(row)["step"]
    except ValueError:
        return math.inf


def environment() -> dict:
    return {
        "commit": commit(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "launcher": launcher(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def launcher() -> str:
    """What stays the same when torchrun starts the ranks again: their parent."""
    return f"{platform.node()} {os.getppid()}"


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        run = subprocess.run([*command, "--abbrev=40"], capture_output=True, text=True)
    except OSError:
        return "unknown: no git here"
    return run.stdout.strip() or "unknown: not a git checkout"


def finite(row: dict) -> dict:
    """JSON has no NaN: a number that is not there is null."""
    bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    inner = {k: finite(v) for k, v in row.items() if isinstance(v, dict)}
    return row | dict.fromkeys(bad) | inner
