"""Many processes as one: the same samples, the same learning, nobody waits for ever."""

import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
import ranks as ranks_module
import ssr
import watch
from judge import Judge, Score, turns
from model import load, load_tokenizer
from ranks import Ranks, Stopping, is_lost, join
from tests import golden, processes

SMALL = [
    *("--preset=toy", "--prompts-per-step=5", "--samples-per-prompt=4", "--eval-prompts=8"),
    *("--eval-every=2", "--no-report", "--lr=2e-3", "--patience=600"),
]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------- the same learning


def golden_steps(rank, per_node, changes):
    ranks = join("cpu", 600, within_nodes=per_node)
    print(json.dumps(few(golden.steps(ranks, **changes))), file=sys.stderr)


def few(steps):
    return list(itertools.islice(steps, 4))


def check_golden(done, size, changes):
    """All ranks report the same numbers, those of one process but for the order of sums."""
    assert done.codes == [0] * size, done.err
    assert len(set(done.err)) == 1
    assert not golden.differences(json.loads(done.err[0]), few(golden.steps(**changes)))


@pytest.mark.parametrize(("size", "per_node"), [(2, None), (4, None), (4, 2)])
def test_any_number_of_ranks_makes_the_golden_steps(tmp_path, size, per_node):
    """Samples, rewards, losses, gradient norms of four steps, in float64; with two ranks a node,
    weights spread over a node."""
    done = processes.run(tmp_path, size, golden_steps, bool(per_node), {}, per_node=per_node)
    check_golden(done, size, {})


def test_ranks_clip_and_update_again_as_one_process_does(tmp_path):
    """Several updates a batch, gradients scaled down, two groups of few rows for three ranks."""
    changes = {"updates_per_batch": 2, "max_norm": 0.05, "loss_norm": "sequence", "steps": 4}
    changes |= {"advantage_scale": "batch", "micro_batch_tokens": 4096}
    done = processes.run(tmp_path, 3, golden_steps, False, changes)
    check_golden(done, 3, changes)
    default = golden.from_text(golden.FILE.read_text())[:4]
    assert golden.differences(json.loads(done.err[0]), default)


def test_a_rank_without_a_row_takes_part(tmp_path):
    """One prompt with two samples for three ranks, and a KL, which the empty one has none of."""
    changes = {"prompts_per_step": 1, "samples_per_prompt": 2, "kl": 0.1, "steps": 3}
    done = processes.run(tmp_path, 3, golden_steps, False, changes)
    check_golden(done, 3, changes)


def train(rank, words, stop_after=0):
    """A run; every rank gets SIGTERM after that step."""
    real = ssr.Watch.after

    def after(self, step):
        real(self, step)
        if step.number == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    ssr.Watch.after = after
    ssr.main(words)


def go(folder, size, *words, **more):
    """A run in `size` processes that must end well."""
    done = processes.run(folder.parent / f"{folder.name}-said", size, train,
                         [*SMALL, f"--folder={folder}", *words], *more.values())  # fmt: skip
    assert done.codes == [0] * size, (done.err, done.out)
    return done


def untimed(path):
    return [{k: v for k, v in r.items() if "second" not in k} for r in rows_of(path)]


def assert_same_run(a, b):
    """To the last bit, but for the time."""
    for name in watch.LOGS:
        assert untimed(a / name) == untimed(b / name)
    kept = [sorted(run.glob("best/*.safetensors")) for run in (a, b)]
    assert len(kept[0]) == len(kept[1])  # none, where no step was better than the start
    for name in ("best", "last") if kept[0] else ("last",):
        weights = [(run / name / "model.safetensors").read_bytes() for run in (a, b)]
        assert weights[0] == weights[1]
    results = [json.loads((run / "result.json").read_text()) for run in (a, b)]
    for key in ("before", "after", "best_step", "alarms", "steps"):
        old, new = ({**r}[key] for r in results)
        drop = "seconds/evaluate"
        if isinstance(old, dict):
            old, new = ({k: v for k, v in x.items() if k != drop} for x in (old, new))
        assert old == new


def test_ranks_learn_what_one_process_learns(toy, tmp_path):
    words = [f"--model={toy}", "--steps=3", "--judge=ema", "--ema-decay=0.5"]
    for size in (1, 2):
        go(tmp_path / f"of-{size}", size, *words)
    one, two = (tmp_path / f"of-{size}" for size in (1, 2))
    for a, b in zip(*(untimed(run / "metrics.jsonl") for run in (one, two)), strict=True):
        for row in (a, b):
            row.update({k: math.nan for k, v in row.items() if v is None})
            row["histogram/self"] = sum(row.get("histogram/self", []))
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5, nan_ok=True)
    for a, b in zip(*(rows_of(run / "evaluations.jsonl") for run in (one, two)), strict=True):
        assert all(a[kind]["text"] == b[kind]["text"] for kind in ("greedy", "sampled"))
    for a, b in zip(*(load(run / "last").parameters() for run in (one, two)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # of four updates by 2e-3


# --------------------------------------------------------------------------- stopped and continued


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (2, []),
        pytest.param(1, [], marks=pytest.mark.slow),
        (1, ["--judge=ema", "--kl=0.1", "--updates-per-batch=2", "--reading=written"]),
        pytest.param(2, ["--judge=ema", "--ema-decay=0.5"], marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_ends_where_it_would_have_ended(toy, tmp_path, size, words):
    words = [f"--model={toy}", "--steps=5", "--save-every=2", *words]
    go(tmp_path / "whole", size, *words)
    done = go(tmp_path / "parts", size, *words, stop_after=3)
    assert "stopped after step 3; go on with --resume" in done.out[0]
    assert not (tmp_path / "parts" / "result.json").exists()
    done = go(tmp_path / "parts", size, *words, "--resume")
    assert "after step 3" in done.out[0]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    settings = json.loads((tmp_path / "parts" / "settings.json").read_text())
    assert [x["from_step"] for x in settings["resumed"]] == [3]
    kept = sorted(x.name for x in (tmp_path / "parts" / "checkpoints").iterdir())
    assert kept == ["newest", "step-000004", "step-000005"]


@pytest.mark.slow
def test_another_number_of_ranks_can_go_on(toy, tmp_path):
    words = [f"--model={toy}", "--steps=4"]
    go(tmp_path / "one", 1, *words)
    go(tmp_path / "both", 2, *words, stop_after=2)
    go(tmp_path / "both", 1, *words, "--resume")
    go(tmp_path / "other", 1, *words, stop_after=2)
    go(tmp_path / "other", 3, *words, "--resume")
    for run in ("both", "other"):
        for a, b in zip(*(load(tmp_path / x / "last").parameters() for x in ("one", run)),
                        strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # of four updates by 2e-3


# -------------------------------------------------------------------------------- what goes wrong


def failing(rank, words):
    """The judge of rank 1 cannot do its work."""
    if rank == 1:
        Judge.judge = lambda *_: int("not a number")
    ssr.main(words)


def test_an_error_of_one_rank_ends_all_and_is_said_once(toy, tmp_path):
    words = [*SMALL, f"--model={toy}", f"--folder={tmp_path / 'run'}"]
    done = processes.run(tmp_path / "said", 2, failing, words)
    assert done.codes == [1, 1]
    assert sum("rank 1: invalid literal for int()" in x for x in done.err) == 1
    assert "Traceback" not in "".join(done.err)


def disagreeing(rank, words, others):
    ssr.main(words if rank == 0 else others)


def test_ranks_that_disagree_are_told(toy, tmp_path):
    words = [*SMALL, f"--model={toy}", f"--folder={tmp_path / 'run'}"]
    done = processes.run(tmp_path / "said", 2, disagreeing, words, [*words, "--kl=0.5"])
    assert done.codes == [1, 1] and not (tmp_path / "run").exists()
    said = "".join(done.err)
    assert said.count("disagree on --kl: rank 0 has 0.0, rank 1 0.5") == 1


def test_nodes_of_different_size_cannot_share_within_a_node(toy, tmp_path):
    words = [*SMALL, f"--model={toy}", f"--folder={tmp_path / 'run'}", "--shard=node"]
    done = processes.run(tmp_path / "said", 3, train, words, per_node=2)
    assert done.codes == [1] * 3 and not (tmp_path / "run").exists()
    said = "".join(done.err)
    assert said.count("--shard node needs the same number of ranks on every node") == 1


def spoiled(rank, words):
    """At step 2 the gradient of rank 1 alone is not finite."""
    real = grpo.MicroBatch.loss

    def loss(self, model, s):
        value, stats = real(self, model, s)
        if rank == 1 and spoiled.step == 2:
            value = value * math.nan
        return value, stats

    def batch_of(*args, **kwargs):
        spoiled.step += 1
        return rolled(*args, **kwargs)

    spoiled.step, rolled = 0, grpo.roll_out
    grpo.MicroBatch.loss, grpo.roll_out = loss, batch_of
    ssr.main(words)


def test_all_ranks_skip_a_step_that_is_not_finite_on_one(toy, tmp_path):
    words = [*SMALL, f"--model={toy}", f"--folder={tmp_path / 'run'}", "--steps=3"]
    done = processes.run(tmp_path / "said", 2, spoiled, words)
    assert done.codes == [0, 0], done.err
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("train/skipped") for row in rows] == [None, 0.0, 1.0, 0.0]
    assert all(p.isfinite().all() for p in load(tmp_path / "run" / "last").parameters())


def never_scored(rank, words, folder):
    """No score at all: the run stops itself; rank 0 is slow to keep what there is."""
    Judge.judge = lambda self, pairs, step: dict.fromkeys(pairs, Score(None, "hm"))
    keep = ssr.Watch.keep

    def slowly(self, name):
        time.sleep(1.5 * (rank == 0 and name == "last"))
        keep(self, name)

    def leave(message):
        there = (Path(folder) / "last" / "config.json").is_file()
        print("weights are there:", there, file=sys.stderr, flush=True)
        real(message)

    ssr.Watch.keep, ssr.leave, real = slowly, leave, ssr.leave
    ssr.main(words)


def test_a_run_that_stops_itself_keeps_its_weights_though_ranks_differ_in_speed(toy, tmp_path):
    words = [*SMALL, f"--model={toy}", f"--folder={tmp_path / 'run'}", "--max-bad-steps=2"]
    done = processes.run(tmp_path / "said", 2, never_scored, words, str(tmp_path / "run"))
    assert done.codes == [1, 1] and "".join(done.err).count("no valid score for 2 steps") == 1
    assert ["weights are there: True" in said for said in done.err] == [True, True]
    load(tmp_path / "run" / "last")


def test_words_about_gloo_are_no_lost_rank():
    assert not is_lost(ValueError("--data igloo.jsonl: there is no such file"))


class QuickEvent(threading.Event):
    def wait(self, timeout=None):
        return super().wait(timeout / 60)


def train_while_time_flies(rank, words, flag):
    """Once the flag is there, 600 seconds of the watchdog's clock pass in one; not before, so that
    no busy machine is taken for a rank that hangs."""
    flown = []

    def monotonic():
        now = time.monotonic()
        if not flown and os.path.exists(flag):
            flown.append(now)
        return now + 600 * (now - flown[0]) if flown else now

    ranks_module.time = SimpleNamespace(monotonic=monotonic)
    ranks_module.threading = SimpleNamespace(Event=QuickEvent, Thread=threading.Thread)
    train(rank, words)


def test_a_rank_that_hangs_is_named_with_its_stage(toy, tmp_path):
    words = [*SMALL, f"--model={toy}", f"--folder={tmp_path / 'run'}", "--steps=1000000"]
    flag = tmp_path / "flag"
    both = processes.start(tmp_path / "said", 2, train_while_time_flies, words, str(flag))
    wait_for(lambda: len(lines(tmp_path / "run" / "metrics.jsonl")) > 3)
    os.kill(both[1].pid, signal.SIGSTOP)
    flag.write_text("")
    both[0].join(300)
    both[1].kill()
    done = processes.finish(tmp_path / "said", both)
    assert done.codes[0] == 1
    assert "no progress for 600 s (--patience). Who is waited for:" in done.err[0]
    assert "rank 1 gives no sign of life, last at: step" in done.err[0]


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_rank_that_is_killed_ends_the_others_with_a_word(toy, tmp_path):
    words = [*SMALL, f"--model={toy}", f"--folder={tmp_path / 'run'}", "--steps=1000000"]
    ranks = processes.start(tmp_path / "said", 2, train, words)
    wait_for(lambda: len(lines(tmp_path / "run" / "metrics.jsonl")) > 3)
    ranks[1].kill()
    done = processes.finish(tmp_path / "said", ranks)
    assert done.codes == [1, -signal.SIGKILL]
    assert "another rank has gone" in done.err[0] and "Traceback" not in done.err[0]


# ------------------------------------------------------------------------------------ small things


def test_an_interrupt_reaches_only_work_that_changes_nothing():
    ranks = Ranks()

    def interrupted(items):
        assert ranks.stoppable
        return items

    assert ranks.share("x", [1, 2], interrupted) == [1, 2] and not ranks.stoppable
    ranks.stop = True
    with pytest.raises(Stopping):
        ranks.share("x", [1, 2], interrupted)
    ranks.ending = True
    assert ranks.share("x", [1, 2], list) == [1, 2]


def test_a_stop_inside_a_librarys_call_is_not_that_calls_error(monkeypatch, tmp_path):
    """A signal comes where it wants: while transformers reads a tokenizer, too."""

    def stopped(*_, **__):
        raise Stopping

    def wordless(*_, **__):
        raise OSError

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", wordless)
    with pytest.raises(ValueError, match=r"no tokenizer could be read there \(OSError\)"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", stopped)
    with pytest.raises(Stopping):
        Ranks().share("load", [tmp_path], lambda items: [load_tokenizer(x) for x in items])
    template = SimpleNamespace(chat_template="x", name_or_path="x", apply_chat_template=stopped)
    template.get_chat_template = lambda: "x"
    with pytest.raises(Stopping):
        turns(template)


def test_micro_batches_are_whole_even_and_a_multiple_of_the_ranks():
    def rows_of(lengths: list[int]) -> list[grpo.Row]:
        """Each of a prompt of its own."""
        return [grpo.Row([n], [0] * x, [0.0] * x, 1.0, 1) for n, x in enumerate(lengths)]

    lengths = [7, 1, 5, 5, 3, 9, 2, 4, 30]
    rows = rows_of(lengths)
    for ranks in (1, 2, 3, 4):
        parts = grpo.pack(range(9), rows, 12, ranks)
        assert sorted(i for part in parts for i in part) == list(range(9))
        assert len(parts) % ranks == 0
        sizes = [sum(lengths[i] for i in part) for part in parts]
        assert all(size <= 12 or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
        assert sizes == sorted(sizes, reverse=True)
    assert grpo.pack([4], rows, 12, 3) == [[4], [], []]
    even = grpo.pack(range(64), rows_of([10] * 64), 100, 4)
    assert {len(part) for part in even} == {8}


def test_the_rows_of_a_prompt_stay_together_while_they_fit():
    rows = [grpo.Row([p] * 9, [0] * 5, [0.0] * 5, 1.0, 1) for p in (1, 2, 3) for _ in range(4)]
    # A prompt of 9 and four times 4 tokens, and an eighth of 9 for three of the four: 28.
    parts = grpo.pack(range(12), rows, 28, 1)
    assert sorted(parts) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert grpo.segments_of(rows[:5]) == [[9, 4, 4, 4, 4], [9, 4]]
    halves = [[2 * i, 2 * i + 1] for i in range(6)]
    assert sorted(grpo.pack(range(12), rows, 27, 1)) == halves
    assert sorted(grpo.pack(range(12), rows, 9, 1)) == [[i] for i in range(12)]  # each alone
    assert sorted(grpo.pack(range(12), rows, 1000, 6)) == halves  # or three ranks would idle
    assert sorted(grpo.pack(range(4), rows, 1000, 6)) == [[], [], [0], [1], [2], [3]]


def test_no_option_of_ours_begins_one_of_torchruns():
    """torchrun would take `--run x` after ssr.py for a short form of its own --run-path."""
    from torch.distributed.run import get_args_parser

    theirs = [o for a in get_args_parser()._actions for o in a.option_strings]
    ours = [ssr.option(f.name) for f in ssr.dataclasses.fields(ssr.Settings)]
    assert [(o, t) for o in ours for t in theirs if t.startswith(o)] == []
