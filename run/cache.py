"""Work on many items whose results are kept on disk as they are made and never computed twice.

    rows = map_cached(ranks, lambda: JsonlCache(path, key), "wmt23", range(count), work, 64)

`work(indices)` returns a row for each index, with the index as its "segment". Rows are written
after each round. All ranks share the work; rank 0 writes.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from run.distributed import Ranks
from run.folder import append_lines, try_lock

INTERVAL = 5.0  # seconds between two progress lines
CPU_ROUND = 32  # rows of each rank: more together is hardly faster there


class JsonlCache:
    """A growing file of JSON rows; its first line is the key, all that the rows depend on."""

    def __init__(self, path: Path, key: dict, replace: bool = False):
        """Rows of another key are dropped (`replace`), or refused."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = open(path, "a+b")  # noqa: SIM115 (the lock is held until it is closed)
        if not try_lock(self.lock):
            raise ValueError(f"{path} is being written by another process: wait for it")
        lines = path.read_bytes().split(b"\n")[:-1]  # a kill may have cut off the last line
        saved = json.loads(lines[0])["of"] if lines else key
        if saved != key:
            other = next(k for k in key | saved if saved.get(k) != key.get(k))
            if not replace:
                raise ValueError(
                    f"{path}: its {other} was {saved.get(other)}, now {key.get(other)}: write to "
                    "another folder, or remove it"
                )
            print(f"{path.name}: another {other} than before, computed again")
            lines = []
        self.rows = [json.loads(line) for line in lines[1:]]
        os.truncate(path, sum(len(line) + 1 for line in lines))
        if not lines:
            self.append([{"of": key}])

    def append(self, rows: list[dict]) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        append_lines(self.path, lines)


def map_cached(
    ranks: Ranks, open_cache: Callable[[], JsonlCache], what: str, indices: Sequence[int],
    work: Callable[[Sequence[int]], list[dict]], round_size: int,
) -> list[dict]:  # fmt: skip
    """The rows of all indices, sorted; those that are not in the cache are computed in this order,
    `round_size` at a time: what a kill may lose."""
    if not torch.cuda.is_available():
        round_size = min(round_size, CPU_ROUND * ranks.size)
    caches: list[JsonlCache] = []  # rank 0's only

    def read_cache() -> list[dict]:
        caches.append(open_cache())
        return caches[0].rows

    done = {row["segment"]: row for row in ranks.on_rank0(f"open {what}", read_cache)}
    todo = [i for i in indices if i not in done]
    started = printed = time.perf_counter()
    try:
        for first in range(0, len(todo), round_size):
            rows = ranks.map_over_ranks(what, todo[first : first + round_size], work)
            ranks.on_rank0(f"write {what}", lambda rows=rows: caches[0].append(rows))
            done |= {row["segment"]: row for row in rows}
            now, left = time.perf_counter(), len(todo) - first - len(rows)
            if now - printed > INTERVAL or not left:
                printed = now
                timing = f"{(now - started) * left / (len(todo) - left):.0f} s left"
                if not left:
                    timing = f"in {now - started:.0f} s"
                print(f"{what}: {len(done)}/{len(indices)} segments, {timing}", flush=True)
    finally:
        for cache in caches:
            cache.lock.close()
    return [done[i] for i in sorted(indices)]
