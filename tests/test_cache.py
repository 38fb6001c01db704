"""Results kept as they are made: what is computed again, what is refused; and a full disk."""

import json
import resource
import signal
from types import SimpleNamespace

import pytest

from run import cache
from run.cache import JsonlCache, map_cached
from run.distributed import Ranks
from run.folder import append_lines, atomic_write


def test_a_round_is_on_disk_before_the_next_and_progress_has_the_time_left(
    tmp_path, monkeypatch, capsys
):
    path, sizes = tmp_path / "x.jsonl", []
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(cache, "time", clock)

    def work(indices):
        rows = path.read_text().splitlines()[1:] if path.stat().st_size else []
        assert len(rows) == sum(sizes)
        sizes.append(len(indices))
        clock.now += 0.1 * len(indices)
        return [{"segment": i} for i in indices]

    for count, round_size in ((10, 8), (90, 30), (190, 64)):  # the last on a CPU
        map_cached(
            Ranks(), lambda: JsonlCache(path, {"v": 1}), "work", range(count), work, round_size
        )
    assert sizes == [8, 2, 30, 30, 20, 32, 32, 32, 4]
    assert capsys.readouterr().out.splitlines() == [
        "work: 10/10 segments, in 1 s",
        "work: 70/90 segments, 2 s left", "work: 90/90 segments, in 8 s",
        "work: 154/190 segments, 4 s left", "work: 190/190 segments, in 10 s",
    ]  # fmt: skip


def test_an_interrupted_map_continues_behind_the_last_whole_row(tmp_path):
    path, computed = tmp_path / "x.jsonl", []

    def work(indices):
        computed.extend(indices)
        if len(computed) == 6:
            raise KeyboardInterrupt
        return [{"segment": i, "square": i * i} for i in indices]

    def run():
        return map_cached(
            Ranks(), lambda: JsonlCache(path, {"v": 1}), "x", range(9, -1, -1), work, 3
        )

    with pytest.raises(KeyboardInterrupt):
        run()
    assert computed == [9, 8, 7, 6, 5, 4] and len(path.read_text().splitlines()) == 4
    with open(path, "a") as file:
        file.write('{"segment": 6, "squ')  # as a kill leaves it
    assert [row["square"] for row in run()] == [i * i for i in range(10)]
    assert sorted(computed[6:]) == [0, 1, 2, 3, 4, 5, 6]
    assert run() and len(computed) == 13


def test_rows_of_another_key_are_refused_or_replaced(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    first = JsonlCache(path, {"model": "a", "seed": 1})
    first.append([{"segment": 0}])
    with pytest.raises(ValueError, match=r"x\.jsonl is being written by another process"):
        JsonlCache(path, {"model": "a", "seed": 1})
    first.lock.close()
    again = JsonlCache(path, {"model": "a", "seed": 1})
    assert again.rows == [{"segment": 0}]
    again.lock.close()
    with pytest.raises(ValueError, match="its seed was 1, now 2: write to another folder"):
        JsonlCache(path, {"model": "a", "seed": 2})
    new = JsonlCache(path, {"model": "a", "seed": 2}, replace=True)
    new.append([{"segment": 5}])
    new.lock.close()
    assert "x.jsonl: another seed than before" in capsys.readouterr().out
    header, *rows = map(json.loads, path.read_text().splitlines())
    assert header["of"] == {"model": "a", "seed": 2} and rows == [{"segment": 5}]


def test_a_full_disk_leaves_whole_files_and_whole_lines(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    atomic_write(old, "before\n")
    append_lines(new, "one\n")
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.RLIMIT_FSIZE
    soft, hard = resource.getrlimit(limits)
    resource.setrlimit(limits, (10_000, hard))
    try:
        for write, path in ((atomic_write, old), (append_lines, new)):
            with pytest.raises(OSError, match=rf"cannot write .*{path.name}: .*make room there"):
                write(path, "x\n" * 10_000)
    finally:
        resource.setrlimit(limits, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert old.read_text() == "before\n" and new.read_text() == "one\n"
    append_lines(new, "two\n")
    assert new.read_text() == "one\ntwo\n"
    with pytest.raises(OSError, match=r"No such file or directory$"):
        atomic_write(tmp_path / "nowhere" / "x", "")
