"""Work on many segments, kept as it is done and never done again.

    rows = in_rounds(ranks, lambda: Rows(path, key), "wmt23", count, 512, work)

`work` gets numbers of segments and gives a row for each, with its "segment". After each round the
rows are on the disk; what was there before is read. Ranks share the work, the first one writes.
"""

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ranks import Ranks


class Rows:
    """A file of JSON lines that grows while work goes on. Its first line says what they are of."""

    def __init__(self, path: Path, key: dict, anew: bool = False, elsewhere: str = "--out"):
        """`anew`: rows of another key are put aside; else they are an error, which names the option
        that writes `elsewhere`."""
        self.path, self.key = path, key
        self.rows: list[dict] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")  # noqa: SIM115 (open as long as we live)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another process: wait for it") from None
        self.file.seek(0)
        lines = self.file.read().split(b"\n")[:-1]  # what has no end was cut off by a kill
        had = self.parsed(lines[0], 1, "of")["of"] if lines else None
        if had not in (None, key):
            other = next(k for k in key | had if had.get(k) != key.get(k))
            if not anew:
                raise ValueError(
                    f"{path}: its {other} was {had.get(other)}, now {key.get(other)}: name another "
                    f"{elsewhere}, or remove it"
                )
            print(f"{path.name}: another {other} than before, scored again")
            lines = []
        self.about = self.parsed(lines[0], 1, "about")["about"] if lines else {}
        self.rows = [self.parsed(line, n, "segment") for n, line in enumerate(lines[1:], 2)]
        self.file.truncate(sum(len(line) + 1 for line in lines))

    def parsed(self, line: bytes, number: int, wanted: str) -> dict:
        try:
            row = json.loads(line)
            row[wanted]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.path}, line {number} is not what we wrote there: remove the file"
            ) from None
        return row

    def add(self, rows: list[dict], about: dict | None = None) -> None:
        lines = list(rows)
        if not os.fstat(self.file.fileno()).st_size:
            self.about = about or {}
            lines.insert(0, {"of": self.key, "about": self.about})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            self.file.write(text.encode())  # at the end, wherever it was read
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}; make room there") from None
        self.rows += rows


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[str]]:
    """A file that is there when it is complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; make room there") from None


class Pace:
    """One line about how far it is, how fast and how long still."""

    def __init__(self, what: str, done: int, of: int):
        self.what, self.begun, self.had, self.of = what, time.perf_counter(), done, of

    def __call__(self, done: int) -> None:
        spent = time.perf_counter() - self.begun
        rate = max(done - self.had, 1e-9) / spent
        left = int((self.of - done) / rate)
        clock = f"{left // 60}:{left % 60:02} left"
        line = f"{self.what}: {done}/{self.of} segments, {rate:.1f}/s, {clock}"
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if done == self.of else "", flush=True)
        else:
            print(line, flush=True)


def in_rounds(
    ranks: Ranks,
    rows: Callable[[], Rows],
    what: str,
    count: int,
    size: int,
    work: Callable,
    about: Callable[[], dict] = dict,
) -> list[dict]:
    """The rows of all `count` segments: those that are there, and those that `work` makes of the
    numbers of `size` segments at a time."""  # fmt: skip
    file: list[Rows] = []

    def opened() -> list[dict]:
        file.append(rows())
        return file[0].rows

    done = ranks.on_first(f"open {what}", opened)
    there = {row["segment"]: row for row in done}
    todo = [i for i in range(count) if i not in there]
    pace = Pace(what, len(there), count)
    try:
        for start in range(0, len(todo), size):
            made = ranks.share(what, todo[start : start + size], work)
            ranks.on_first(f"write {what}", lambda made=made: file[0].add(made, about()))
            there |= {row["segment"]: row for row in made}
            pace(len(there))
    finally:
        for one in file:
            one.file.close()
    return [there[i] for i in range(count)]
