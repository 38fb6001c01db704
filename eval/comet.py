"""COMET scores, from a process with an environment of its own.

    with Comet("comet22", device="cuda", dtype="bfloat16") as comet:   # loads while you go on
        scores = comet.score([{"src": "Hallo", "mt": "Hello", "ref": "Hi"}])

    python -m eval.comet install                                # makes .comet/, once
    python -m eval.comet check --checkpoint cometkiwi
    python -m eval.comet score --checkpoint cometkiwi --file rows.jsonl

COMET needs older libraries than the project, so it is not imported: a worker (`comet_worker.py`,
which belongs beside this file) runs under another Python and answers over pipes. Only the standard
library is needed here.
"""

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
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
ENDED = object()
"""What the inbox gets last from a worker that ended."""


class Died(Exception):
    """The worker ended without an answer."""


class Comet:
    """One model in one process. One call at a time; other threads wait."""

    def __init__(
        self,
        checkpoint: str,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 32,
        python: str = "",
        start_limit: float = 1800.0,
        silence_limit: float = 600.0,
    ):
        """`checkpoint`: one of NAMES, an id of the hub, a folder or a .ckpt file.

        `dtype` is the encoder's; what follows it is always computed in fp32. `start_limit`:
        seconds to download and load. `silence_limit`: seconds that one batch may take.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; known: {', '.join(DTYPES)}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.checkpoint, self.device = checkpoint, device
        self.start_limit, self.silence_limit = start_limit, silence_limit
        settings = {"checkpoint": where(checkpoint), "device": device}
        settings |= {"dtype": dtype, "batch_size": batch_size}
        self.command = [python_of(python), "-W", "ignore", str(WORKER), json.dumps(settings)]
        self.lock = threading.Lock()
        self.calls = 0
        self.process: subprocess.Popen | None = None
        self.start()

    def ready(self) -> dict:
        """Wait until the model is loaded; what is known about it, which is then in `about`, too."""
        with self.lock:
            return self.twice(self.wait)

    def score(
        self, rows: list[dict[str, str]], progress: Callable[[int, int], None] | None = None
    ) -> list[float]:
        """One score a row of "src", "mt" and, in all or none, "ref".

        A model that knows no references scores without them. `progress(done, of)` is called after
        each batch; a worker that died is started again, once, and begins from 0.
        """
        keys = check(rows)
        if not rows:
            return []
        with self.lock:
            return self.twice(lambda: self.ask(rows, keys, progress))

    def close(self) -> None:
        """End the worker and free its memory. A later call would start another."""
        with self.lock:
            self.stop()

    def __enter__(self) -> "Comet":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --------------------------------------------------------------------------------- a call

    def twice(self, call: Callable):
        """The call's result; when the worker dies under it, that of a second try."""
        for last in (False, True):
            try:
                if self.process is None:
                    self.start()
                return call()
            except Died as death:
                self.stop()
                if last:
                    raise RuntimeError(f"two workers in a row: {death}") from None
                print(f"comet: {death}\ncomet: starting it again", file=sys.stderr)

    def wait(self) -> dict:
        deadline = self.started + self.start_limit
        while not self.about:
            message = self.receive(deadline, f"no model after {self.start_limit:g} s (start_limit)")
            self.stage = message.get("stage", self.stage)
            if "error" in message:
                self.stop()
                raise self.reported(message)
            self.about = message.get("about", {})
        self.about["checkpoint"] = self.checkpoint
        return self.about

    def ask(self, rows: list[dict], keys: tuple, progress: Callable | None) -> list[float]:
        self.wait()
        if self.about["needs_reference"] and "ref" not in keys:
            raise ValueError(f"{self.checkpoint} needs references: rows must have 'ref'")
        if not self.about["takes_reference"]:
            keys = ("src", "mt")
        self.calls += 1  # the answers to a call that was interrupted are told from this one's
        request = {"call": self.calls, "rows": [{key: row[key] for key in keys} for row in rows]}
        line = json.dumps(request) + "\n"
        # Not in this thread: a worker that hangs reads nothing, and a full pipe would block us.
        self.sender = threading.Thread(target=send, args=(self.process, line), daemon=True)
        self.sender.start()
        done = 0
        while True:
            self.stage = f"scoring row {done} of {len(rows)}"
            deadline = time.monotonic() + self.silence_limit
            silence = f"no sign of life for {self.silence_limit:g} s (silence_limit)"
            message = self.receive(deadline, silence)
            if message.get("call") != self.calls:
                continue
            if "error" in message:
                raise self.reported(message)
            if "scores" in message:
                return message["scores"]
            done = message["done"]
            if progress:
                progress(done, len(rows))

    def receive(self, deadline: float, problem: str) -> dict:
        try:
            message = self.inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            who = self.who()
            self.stop()
            raise TimeoutError(f"{who}: {problem}; it was killed") from None
        if message is ENDED:
            raise Died(self.death())
        return message

    # ---------------------------------------------------------------------------- the process

    def start(self) -> None:
        self.about: dict = {}
        self.stage, self.started = "starting", time.monotonic()
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.said: deque[str] = deque(maxlen=15)
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding="utf-8", errors="replace",
            start_new_session=True,  # Ctrl-C is for us: we decide what becomes of the worker
        )  # fmt: skip
        self.sender: threading.Thread | None = None
        self.hearer = threading.Thread(
            target=hear, args=(self.process, self.inbox, self.said), daemon=True
        )
        self.drain = threading.Thread(target=keep, args=(self.process, self.said), daemon=True)
        self.hearer.start()
        self.drain.start()

    def stop(self) -> None:
        """The worker keeps nothing, so it is killed, with all that it has started."""
        if self.process is None:
            return
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for thread in (self.sender, self.hearer, self.drain):
            if thread:
                thread.join(timeout=5)
        with contextlib.suppress(BrokenPipeError):  # of what had not been read
            self.process.stdin.close()
        self.process = None

    def who(self) -> str:
        return f"{self.checkpoint} on {self.device} (worker {self.process.pid}, {self.stage})"

    def death(self) -> str:
        code = self.process.wait()
        self.drain.join(timeout=5)  # it has read what there was to read
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        words = "".join(f"\n    {line.rstrip()}" for line in self.said)
        return f"{self.who()} died: {how}{hint}{words and '; its last words:'}{words}"

    def reported(self, message: dict) -> Exception:
        kind = ValueError if message["kind"] == "ValueError" else RuntimeError
        return kind(f"{self.checkpoint} on {self.device}: {message['error']}")


def where(checkpoint: str) -> str:
    """The hub id of a short name; what is neither that nor a path nor an id is refused."""
    if checkpoint not in NAMES and "/" not in checkpoint and not os.path.exists(checkpoint):
        raise ValueError(
            f"{checkpoint!r} is no checkpoint of COMET's: use {', '.join(NAMES)}, an id of the hub "
            "or a path"
        )
    return NAMES.get(checkpoint, checkpoint)


def rows_of(tasks: list, texts: list[str], references: bool) -> list[dict[str, str]]:
    """What `score` takes, of tasks with a `text` and a `reference` and their translations."""
    return [
        {"src": task.text, "mt": text} | ({"ref": task.reference} if references else {})
        for task, text in zip(tasks, texts, strict=True)
    ]


def hear(process: subprocess.Popen, inbox: queue.SimpleQueue, said: deque[str]) -> None:
    with process.stdout as lines:
        for line in lines:
            try:
                inbox.put(dict(json.loads(line)))
            except (TypeError, ValueError):  # printed early, or cut short by the worker's death
                said.append(line)
    inbox.put(ENDED)


def keep(process: subprocess.Popen, said: deque[str]) -> None:
    """The last lines of what it says, so that the pipe is never full."""
    with process.stderr as lines:
        said.extend(lines)


def send(process: subprocess.Popen, line: str) -> None:
    # One who waits for the answer hears of a death by other means.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line)
        process.stdin.flush()


def check(rows: list[dict]) -> tuple[str, ...]:
    """The keys that all rows have."""
    keys = ("src", "mt", "ref") if any("ref" in row for row in rows) else ("src", "mt")
    for number, row in enumerate(rows):
        for key in keys:
            if key not in row:
                more = ": give references to all rows or to none" if key == "ref" else ""
                raise ValueError(f"row {number} has no {key!r}{more}")
            if not isinstance(row[key], str):
                raise ValueError(f"row {number}: {key!r} is {row[key]!r}, not a string")
    return keys


# ------------------------------------------------------------------------------ the environment


def python_of(setting: str = "") -> str:
    """COMET's interpreter: `setting`, else $SSR_COMET_PYTHON, else what `install` has made."""
    if asked := setting or os.environ.get("SSR_COMET_PYTHON"):
        if not shutil.which(asked):
            raise FileNotFoundError(
                f"{asked} is no program: name COMET's Python (SSR_COMET_PYTHON), or unset it and "
                "run `python -m eval.comet install`"
            )
        return asked
    if not (HOME / "ready").is_file():
        what = "is not finished" if HOME.exists() else "is not there"
        raise FileNotFoundError(
            f"COMET's environment {HOME} {what}: run `python -m eval.comet install`, or set "
            "SSR_COMET_PYTHON to a Python that has it"
        )
    return str(HOME / "bin" / "python")


def install(folder: Path, again: bool = False) -> None:
    """A virtual environment with the pinned versions. Its file `ready` is written last."""
    ready, begun, wanted = folder / "ready", folder / "begun", REQUIREMENTS.read_text("utf-8")
    if not again and ready.is_file() and json.loads(ready.read_text())["requirements"] == wanted:
        return print(f"{folder} is ready (--again: make it anew)")
    if folder.exists() and any(folder.iterdir()) and not (ready.is_file() or begun.is_file()):
        raise ValueError(f"{folder} holds something else: name another --folder, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    begun.touch()
    ready.unlink(missing_ok=True)
    python = str(folder / "bin" / "python")
    steps = {
        "making a virtual environment": [sys.executable, "-m", "venv", str(folder)],
        f"installing {REQUIREMENTS.name}: some minutes, some GB": [
            python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check",
            "--requirement", str(REQUIREMENTS), *(["--force-reinstall"] if again else []),
        ],
        "trying it": [python, "-P", "-W", "ignore", "-c", "import comet, torch"],  # -P: not ours
    }  # fmt: skip
    for what, command in steps.items():
        print(f"{folder}: {what}", flush=True)
        if code := subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            raise RuntimeError(f"{what} failed (exit code {code}); what it said is above")
    listed = [python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    found = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    versions = {row["name"]: row["version"] for row in json.loads(found)}
    ready.write_text(json.dumps({"requirements": wanted, "versions": versions}, indent=1))
    begun.unlink()
    print(f"{folder} is ready")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.comet", description="COMET scores")
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("install", help="make COMET's environment")
    made.add_argument("--folder", type=Path, default=HOME)
    made.add_argument("--again", action="store_true", help="even if it is ready")
    for name, words in (("check", "load a model and describe it"), ("score", "one score a line")):
        command = commands.add_parser(name, help=words)
        command.add_argument("--checkpoint", required=True, help=f"{', '.join(NAMES)}, id or path")
        command.add_argument("--device", default="cpu")
        command.add_argument("--dtype", default="float32", choices=DTYPES)
        if name == "score":
            command.add_argument("--file", type=Path, required=True, help="JSON lines")
    given = parser.parse_args()
    try:
        if given.command == "install":
            return install(given.folder.absolute(), given.again)
        rows = []
        if given.command == "score":
            rows = [json.loads(line) for line in given.file.read_text("utf-8").splitlines()]
        with Comet(given.checkpoint, given.device, given.dtype) as comet:
            if given.command == "check":
                print(json.dumps(comet.ready(), indent=2))
            for score in comet.score(rows):
                print(score)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"comet: {error}")


if __name__ == "__main__":
    main()
