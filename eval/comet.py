"""COMET scores, from a process with an environment of its own.

    with Comet("comet22", device="cuda", dtype="bfloat16") as comet:
        comet.start()                                        # it loads while you go on
        scores = comet.score([{"src": "Hallo", "mt": "Hello", "ref": "Hi"}])

    python -m eval.comet install                                       # makes .comet/, once

COMET needs older libraries than the project, so it is not imported: a worker (`comet_worker.py`,
next to this file) runs under another Python and answers over a socket. This file needs the standard
library only.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = {
    "comet22": "Unbabel/wmt22-comet-da",
    "cometkiwi": "Unbabel/wmt22-cometkiwi-da",
    "cometkiwi-xl": "Unbabel/wmt23-cometkiwi-da-xl",
    "cometkiwi-xxl": "Unbabel/wmt23-cometkiwi-da-xxl",
    "xcomet-xl": "Unbabel/XCOMET-XL",
    "xcomet-xxl": "Unbabel/XCOMET-XXL",
}
DTYPES = ("float32", "bfloat16", "float16")
HOME = Path(__file__).resolve().parent.parent / ".comet"
WORKER = Path(__file__).resolve().with_name("comet_worker.py")
REQUIREMENTS = WORKER.with_name("comet-requirements.txt")


class Comet:
    """One model in one process, for one thread."""

    def __init__(
        self, checkpoint: str, device: str = "cpu", dtype: str = "float32", batch_size: int = 32,
        python: str = "", start_limit: float = 1800.0, silence_limit: float = 600.0,
    ):  # fmt: skip
        """`checkpoint`: one of NAMES, a hub id or a folder. `dtype`: of the encoder; the heads
        always compute in fp32. `start_limit`: seconds to download and load. `silence_limit`:
        seconds that one batch may take."""
        self.checkpoint, self.device, self.batch_size = checkpoint, device, batch_size
        self.start_limit, self.silence_limit = start_limit, silence_limit
        settings = {"checkpoint": where(checkpoint), "device": device, "dtype": dtype}
        self.command = [find_python(python), "-W", "ignore", str(WORKER), json.dumps(settings)]
        self.process: subprocess.Popen | None = None

    def ready(self) -> dict:
        """Wait until the model is loaded; returns its description, also in `about`."""
        if self.process is None:
            self.start()
        if not self.about:
            left = self.started + self.start_limit - time.monotonic()
            self.about = self.exchange("", left)["about"] | {"checkpoint": self.checkpoint}
        return self.about

    def score(self, rows: list[dict[str, str]]) -> list[float]:
        """A score for each row of "src", "mt" and, in all rows or none, "ref", which is ignored by
        models that take no reference."""
        if not rows:
            return []
        about = self.ready()
        if about["needs_reference"] and not all("ref" in row for row in rows):
            raise ValueError(f"{self.checkpoint} needs references: rows must have 'ref'")
        with_references = about["takes_reference"] and "ref" in rows[0]
        keys = ("src", "mt", "ref") if with_references else ("src", "mt")
        rows = [{key: row[key] for key in keys} for row in rows]
        # Longest first: what does not fit in memory shows at once.
        order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i].values())))
        scores = [math.nan] * len(rows)
        for start in range(0, len(rows), self.batch_size):
            batch = order[start : start + self.batch_size]
            request = json.dumps([rows[i] for i in batch]) + "\n"
            reply = self.exchange(request, self.silence_limit)
            for i, score in zip(batch, reply["scores"], strict=True):
                if not math.isfinite(score):
                    raise RuntimeError(f"row {i} has the score {score}: try dtype 'float32'")
                scores[i] = score
        return scores

    def __enter__(self) -> "Comet":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---------------------------------------------------------------------------- the process

    def start(self) -> None:
        self.about: dict = {}
        self.started = time.monotonic()
        self.socket, theirs = socket.socketpair()
        self.replies = self.socket.makefile(encoding="utf-8")
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        with theirs:
            self.process = subprocess.Popen(
                self.command, stdin=theirs, stdout=self.output, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the worker
            )  # fmt: skip

    def exchange(self, request: str, limit: float) -> dict:
        """Send a request and return the reply, which takes at most `limit` seconds."""
        worker = f"{self.checkpoint} on {self.device} (worker {self.process.pid})"
        try:
            self.socket.settimeout(max(limit, 0.1))
            if request:  # to send nothing would fail, too, once the worker has replied and ended
                self.socket.sendall(request.encode())
            line = self.replies.readline()
            if not line.endswith("\n"):
                raise ConnectionResetError
        except TimeoutError:
            self.close()
            what = (f"scores after {self.silence_limit:g} s (silence_limit)" if request
                    else f"model after {self.start_limit:g} s (start_limit)")  # fmt: skip
            raise TimeoutError(f"{worker}: no {what}; it was killed") from None
        except ConnectionError:
            raise RuntimeError(f"{worker} died: {self.describe_death()}") from None
        except BaseException:  # Ctrl-C: the pending reply would answer the next request
            self.close()
            raise
        message = json.loads(line)
        if "error" in message:
            if not self.about:  # it could not load, and has ended
                self.close()
            kind = ValueError if message["kind"] == "ValueError" else RuntimeError
            raise kind(f"{self.checkpoint} on {self.device}: {message['error']}")
        return message

    def describe_death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it has closed its socket
            self.process.wait(timeout=5)
        code = self.process.poll() or 0
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        how += " (out of memory?)" * (-code == signal.SIGKILL)
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").splitlines()[-15:]
        self.close()
        return "\n    ".join([how, *lines])

    def close(self) -> None:
        """Kill the worker, which has nothing to save, and all that it started. A later call starts
        another."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in (self.replies, self.socket, self.output):
            file.close()
        self.process = None


def where(checkpoint: str) -> str:
    """A folder or hub id; of a short name, the latter."""
    path = os.path.expanduser(NAMES.get(checkpoint, checkpoint))
    if not os.path.isdir(path) and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise ValueError(
            f"{checkpoint!r} is no checkpoint of COMET's: use {', '.join(NAMES)}, a hub id or a "
            "folder"
        )
    return path


def comet_rows(tasks: list, texts: list[str], references: bool) -> list[dict[str, str]]:
    """The rows that `score` takes."""
    return [
        {"src": task.text, "mt": text} | ({"ref": task.reference} if references else {})
        for task, text in zip(tasks, texts, strict=True)
    ]


# ------------------------------------------------------------------------------ the environment


def find_python(setting: str = "") -> str:
    """COMET's interpreter: `setting`, else $SSR_COMET_PYTHON, else what `install` has made."""
    if named := setting or os.environ.get("SSR_COMET_PYTHON"):
        if not shutil.which(named):
            raise FileNotFoundError(
                f"{named} is no program: name COMET's Python (SSR_COMET_PYTHON), or unset it and "
                "run `python -m eval.comet install`"
            )
        return named
    python = HOME / "bin" / "python"
    if not python.is_file():
        raise FileNotFoundError(
            f"COMET's environment {HOME} is not there: run `python -m eval.comet install`, or set "
            "SSR_COMET_PYTHON to a Python that has it"
        )
    return str(python)


def install(folder: Path) -> None:
    """A virtual environment with the pinned versions; what is there already is kept."""
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    print(f"{folder}: installing {REQUIREMENTS.name}: some minutes, some GB", flush=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "-r", str(REQUIREMENTS)],
        [python, "-P", "-W", "ignore", "-c", "import comet, torch"],  # -P: not ours
    ):
        if code := subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            sys.exit(f"comet: {' '.join(command)} failed (exit code {code}); see above")
    print(f"{folder} is ready")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.comet")
    parser.add_argument("command", choices=["install"], help="make COMET's environment")
    parser.add_argument("--folder", type=Path, default=HOME)
    install(parser.parse_args().folder.absolute())


if __name__ == "__main__":
    main()
