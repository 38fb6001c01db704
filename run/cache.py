"""Work on many items whose results are kept on disk as they are made and never computed twice.

    rows = map_cached(ranks, lambda: JsonlCache(path, key), "wmt23", range(count), work, 64)

`work(indices)` returns a row for each index, with the index as its "segment". Rows are written
after each round, which takes a few seconds. All ranks share the work; rank 0 writes.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from run.distributed import Ranks
from run.files import append_lines

INTERVAL = 5.0  # seconds between two progress lines


class JsonlCache:
    """A growing file of JSON rows; its first line is the key, all that the rows depend on."""

    def __init__(
        self, path: Path, key: dict, describe: Callable[[], dict] = dict, replace: bool = False
    ):
        """What `describe()` returns at the first write is kept beside the key. Rows of another key
        are dropped (`replace`), or refused."""
        self.path, self.key, self.describe = path, key, describe
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = open(path, "a+b")  # noqa: SIM115 (the lock is held until it is closed)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another process: wait for it") from None
        lines = path.read_bytes().split(b"\n")[:-1]  # a kill may have cut off the last line
        saved = self.parse(lines[0], 1, "of")["of"] if lines else key
        if saved != key:
            other = next(k for k in key | saved if saved.get(k) != key.get(k))
            if not replace:
                raise ValueError(
                    f"{path}: its {other} was {saved.get(other)}, now {key.get(other)}: write to "
                    "another folder, or remove it"
                )
            print(f"{path.name}: another {other} than before, computed again")
            lines = []
        self.about = self.parse(lines[0], 1, "about")["about"] if lines else None
        self.rows = [self.parse(line, n, "segment") for n, line in enumerate(lines[1:], 2)]
        os.truncate(path, sum(len(line) + 1 for line in lines))

    def parse(self, line: bytes, number: int, field: str) -> dict:
        try:
            row = json.loads(line)
            row[field]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.path}, line {number} is not what we wrote there: remove the file"
            ) from None
        return row

    def append(self, rows: list[dict]) -> None:
        if self.about is None:
            self.about = self.describe()
            rows = [{"of": self.key, "about": self.about}, *rows]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        append_lines(self.path, lines)


def map_cached(
    ranks: Ranks, open_cache: Callable[[], JsonlCache], what: str, indices: Sequence[int],
    work: Callable[[Sequence[int]], list[dict]], largest_round: int,
) -> list[dict]:  # fmt: skip
    """The rows of all indices, sorted; those that are not in the cache are computed in this order.

    A round begins with one row for each rank. It doubles, up to `largest_round`, while it takes
    less than INTERVAL, and beyond that while twice the rows take little longer, as on a GPU.
    """
    caches: list[JsonlCache] = []  # rank 0's only

    def read_cache() -> list[dict]:
        caches.append(open_cache())
        return caches[0].rows

    done = {row["segment"]: row for row in ranks.on_rank0(f"open {what}", read_cache)}
    todo = [i for i in indices if i not in done]
    progress = Progress(what, len(done), len(indices))
    size, best_rate = ranks.size, 0.0
    try:
        while todo:
            now, todo = todo[:size], todo[size:]
            started = time.perf_counter()
            rows = ranks.map_over_ranks(what, now, work)

            def write(rows=rows, started=started) -> float:
                caches[0].append(rows)
                return time.perf_counter() - started

            spent = ranks.on_rank0(f"write {what}", write)  # its clock decides for all ranks
            rate = len(rows) / max(spent, 1e-9)
            if spent < INTERVAL or rate > 1.5 * best_rate:
                size = min(2 * size, max(largest_round, ranks.size))
            best_rate = max(rate, best_rate)
            done |= {row["segment"]: row for row in rows}
            progress(len(done))
    finally:
        for cache in caches:
            cache.lock.close()
    return [done[i] for i in sorted(indices)]


class Progress:
    """Prints every INTERVAL how much is done, and the time left at the speed since the start."""

    def __init__(self, what: str, done: int, total: int):
        self.what, self.total, self.first = what, total, done
        self.started = self.last = time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if now - self.last < INTERVAL and done < self.total:
            return
        self.last, spent = now, now - self.started
        left = spent * (self.total - done) / (done - self.first)
        timing = f"{minutes(left)} left" if left else f"in {minutes(spent)}"
        print(f"{self.what}: {done}/{self.total} segments, {timing}", flush=True)


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
