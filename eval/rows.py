"""Work on many segments, kept as it is done and never done again.

    rows = in_rounds(ranks, lambda: Rows(path, key), "wmt23", range(count), work)

`work` gets numbers of segments and gives a row for each, with its "segment". After each round, a
few seconds, the rows are on the disk; what was there before is read. Ranks share the work, the
first one writes.
"""

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from ranks import Ranks

FEW = 5.0  # seconds: what a round takes at least, and the time between two lines


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
    """A line every few seconds: how far it is, how fast since the last line, how long still."""

    def __init__(self, what: str, done: int, of: int):
        self.what, self.of = what, of
        self.started = self.last_time = time.perf_counter()
        self.last_done = done

    def __call__(self, done: int) -> None:
        now, ended = time.perf_counter(), done == self.of
        spent = now - self.last_time
        if spent < FEW and not ended:
            return
        rate = (done - self.last_done) / spent
        self.last_time, self.last_done = now, done
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        left = f", {speed}, {clock((self.of - done) / rate)} left"
        how = f" in {clock(now - self.started)}" if ended else left
        line = f"{self.what}: {done}/{self.of} segments{how}"
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if ended else "", flush=True)
        else:
            print(line, flush=True)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def in_rounds(
    ranks: Ranks,
    rows: Callable[[], Rows],
    what: str,
    numbers: Sequence[int],
    work: Callable,
    about: Callable[[], dict] = dict,
    size: int = 0,
) -> list[dict]:
    """The rows of the segments `numbers`, sorted by number: those that are there, and those that
    `work` makes of some numbers at a time, in the order given.

    The first round has a segment for each rank. Rounds double while one takes less than a few
    seconds, or while that is faster by a quarter: a sampler decodes many sequences in hardly more
    time than one. `size`: all rounds are of that size. What is sampled together can differ in the
    last bits from what is sampled alone, and so does not depend on the clock.
    """
    file: list[Rows] = []

    def opened() -> list[dict]:
        file.append(rows())
        return file[0].rows

    done = ranks.on_first(f"open {what}", opened)
    there = {row["segment"]: row for row in done}
    todo = [i for i in numbers if i not in there]
    pace = Pace(what, len(there), len(numbers))
    round_size, best_rate = size or ranks.size, 0.0
    try:
        while todo:
            started = time.perf_counter()
            made = ranks.share(what, todo[:round_size], work)

            def keep(made=made, started=started) -> float:
                file[0].add(made, about())
                return time.perf_counter() - started

            seconds = ranks.on_first(f"write {what}", keep)
            todo = todo[round_size:]
            there |= {row["segment"]: row for row in made}
            pace(len(there))
            rate = len(made) / seconds
            if not size and (seconds < FEW or rate > 1.25 * best_rate):
                round_size *= 2
            best_rate = max(best_rate, rate)
    finally:
        for one in file:
            one.file.close()
    return [there[i] for i in sorted(numbers)]
