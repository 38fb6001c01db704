"""Many processes as one: the same samples, the same learning, nobody waits for ever."""

import itertools
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import grpo
import ssr
from judge import Judge, Score
from model import load
from run import distributed, monitor, settings
from run.distributed import Ranks, Stopping, init_distributed, is_lost
from tests import golden, processes
from tests.runs import (
    RANKS,
    assert_close_weights,
    assert_same_run,
    go_ranks,
    rows_of,
    start_endless,
    train,
    untimed,
)


def test_attention_never_plans_anew_for_each_shape():
    torch.backends.cuda.enable_cudnn_sdp(True)
    init_distributed()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ---------------------------------------------------------------------------- the same learning


def golden_steps(rank, changes):
    _, ranks = init_distributed()
    print(json.dumps(few(golden.steps(ranks, **changes))), file=sys.stderr)


def few(steps):
    return list(itertools.islice(steps, 4))


CLIPPED = {"updates_per_batch": 2, "max_grad_norm": 0.05, "loss_norm": "sequence", "steps": 4}
CLIPPED |= {"advantage_scale": "batch", "micro_batch_tokens": 4096}
ONE_PROMPT = {"prompts_per_step": 1, "samples_per_prompt": 2, "kl": 0.1, "steps": 3}
ONE_PROMPT |= {"loss_norm": "constant", "entropy_bonus": 0.1, "importance_cap": 0.9}
ONE_PROMPT |= {"advantage_scale": "each", "overlong": "soft"}


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (4, {}),
        (3, CLIPPED),  # gradients scaled down; groups of few rows for three ranks
        (3, ONE_PROMPT),  # a rank without a row takes part, in the KL, too
    ],
)
def test_any_number_of_ranks_makes_the_steps_of_one_process(tmp_path, size, changes):
    """In float64, and all ranks report the same numbers."""
    done = processes.run(tmp_path, size, golden_steps, changes)
    assert done.codes == [0] * size, done.err
    assert len(set(done.err)) == 1
    rows = json.loads(done.err[0])
    assert not golden.differences(rows, few(golden.steps(**changes)))
    default = golden.from_text(golden.FILE.read_text())[: len(rows)]
    assert bool(golden.differences(rows, default)) == bool(changes)


# --------------------------------------------------------------------------- stopped and continued


@pytest.mark.parametrize(
    ("size", "words", "before", "after"),
    [
        (2, "--judge=ema", "--offload-optimizer", "--no-offload-optimizer"),
        (1, "--judge=ema --kl=0.1 --updates-per-batch=2 --score-mode=written",
         "--no-offload-optimizer", "--offload-optimizer"),
    ],
)  # fmt: skip
def test_a_stopped_run_ends_where_it_would_have_ended(toy, tmp_path, size, words, before, after):
    """AdamW's state may move when it resumes."""
    words = [f"--model={toy}", "--steps=5", "--save-every=2", *words.split()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    go_ranks(whole, size, *words)
    done = go_ranks(parts, size, *words, before, stop_after=3)
    assert "stopped after step 3; go on with --resume" in done.out[0]
    assert not (parts / "result.json").exists()
    assert "after step 3" in go_ranks(parts, size, *words, after, "--resume").out[0]
    assert_same_run(whole, parts)
    saved = json.loads((parts / "settings.json").read_text())
    assert [x["from_step"] for x in saved["resumed"]] == [3]
    kept = sorted(x.name for x in (parts / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000005"]


def test_changing_numbers_of_ranks_learn_what_one_process_learns(toy, tmp_path):
    words = [f"--model={toy}", "--steps=4", "--judge=ema"]
    one, parts = tmp_path / "one", tmp_path / "parts"
    go_ranks(one, 1, *words)
    go_ranks(parts, 2, *words, stop_after=2)
    go_ranks(parts, 3, *words, "--resume", stop_after=3)
    go_ranks(parts, 1, *words, "--resume")
    assert_close_weights(one / "last", parts / "last")
    rows = [untimed(rows_of(run / "metrics.jsonl")) for run in (one, parts)]
    for a, b in zip(*rows, strict=True):
        for row in (a, b):
            row.update({k: math.nan for k, v in row.items() if v is None})
            row["histogram/self"] = sum(row.get("histogram/self", []))
            row["train/tokens"] = 0  # a prompt is read once in each micro-batch
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5, nan_ok=True)
    for a, b in zip(*(rows_of(run / "evaluations.jsonl") for run in (one, parts)), strict=True):
        assert all(a[kind]["text"] == b[kind]["text"] for kind in ("greedy", "sampled"))


# -------------------------------------------------------------------------------- what goes wrong


def failing(rank, words):
    if rank == 1:
        Judge.judge = lambda *_: int("not a number")
    ssr.main(words)


def disagreeing(rank, words):
    ssr.main(words if rank else words[:-1])


@pytest.mark.parametrize(
    ("size", "work", "words", "message"),
    [
        (2, failing, [], "rank 1: invalid literal for int()"),
        (2, disagreeing, ["--kl=0.5"], "disagree on --kl: rank 0 has 0.0, rank 1 0.5"),
        (2, train, ["--step=4"], "did you mean --steps?"),
    ],
)
def test_an_error_ends_all_ranks_and_is_printed_once(toy, tmp_path, size, work, words, message):
    words = [*RANKS, f"--model={toy}", f"--folder={tmp_path / 'run'}", *words]
    done = processes.run(tmp_path / "said", size, work, words)
    assert done.codes == [1] * size and not (tmp_path / "run" / "metrics.jsonl").exists()
    err = "".join(done.err)
    assert err.count(message) == 1 and "Traceback" not in err


def spoiled(rank, words):
    """At step 2 the gradient of rank 1 alone is not finite."""
    loss, rollout, steps = grpo.MicroBatch.loss, grpo.rollout, []

    def spoiled_loss(self, model, s):
        value, stats = loss(self, model, s)
        return value * (math.nan if rank == 1 and len(steps) == 2 else 1), stats

    grpo.MicroBatch.loss = spoiled_loss
    grpo.rollout = lambda *a, **k: steps.append(1) or rollout(*a, **k)
    ssr.main(words)


def test_all_ranks_skip_a_step_that_is_not_finite_on_one(toy, tmp_path):
    words = [*RANKS, f"--model={toy}", f"--folder={tmp_path / 'run'}", "--steps=3"]
    done = processes.run(tmp_path / "said", 2, spoiled, words)
    assert done.codes == [0, 0], done.err
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("train/skipped") for row in rows] == [None, 0.0, 1.0, 0.0]
    assert all(p.isfinite().all() for p in load(tmp_path / "run" / "last").parameters())


def never_scored(rank, words, folder):
    """No score at all: the run stops itself; rank 0 is slow to write the weights."""
    Judge.judge = lambda self, pairs, step: [Score(None, "hm")] * len(pairs)
    grpo.MAX_BAD_STEPS = 2
    keep, abort = monitor.RunMonitor.keep, distributed.abort

    def slowly(self, name):
        time.sleep(1.5 * (rank == 0 and name == "last"))
        keep(self, name)

    def left(message):
        there = (Path(folder) / "last" / "config.json").is_file()
        print("weights are there:", there, file=sys.stderr, flush=True)
        abort(message)

    monitor.RunMonitor.keep, distributed.abort = slowly, left
    ssr.main(words)


def test_no_rank_leaves_a_run_that_stops_itself_before_its_weights_are_kept(toy, tmp_path):
    words = [*RANKS, f"--model={toy}", f"--folder={tmp_path / 'run'}"]
    done = processes.run(tmp_path / "said", 2, never_scored, words, str(tmp_path / "run"))
    assert done.codes == [1, 1] and "".join(done.err).count("no valid score for 2 steps") == 1
    assert ["weights are there: True" in err for err in done.err] == [True, True]
    load(tmp_path / "run" / "last")


def test_a_rank_that_hangs_is_named_with_its_stage(toy, tmp_path):
    both = start_endless(tmp_path / "run", 2, f"--model={toy}", "--hang-timeout=20")
    os.kill(both[1].pid, signal.SIGSTOP)
    both[0].join(300)
    both[1].kill()
    done = processes.finish(tmp_path / "said", both)
    assert done.codes[0] == 1
    assert "no progress for 20 s (--hang-timeout). The ranks are at:" in done.err[0]
    stages = dict(re.findall(r"  (step .*): rank (\d+)", done.err[0]))
    assert sorted(stages.values()) == ["0", "1"], done.err[0]


def test_a_rank_that_is_killed_ends_the_others_with_a_message(toy, tmp_path):
    ranks = start_endless(tmp_path / "run", 2, f"--model={toy}")
    ranks[1].kill()
    done = processes.finish(tmp_path / "said", ranks)
    assert done.codes == [1, -signal.SIGKILL]
    assert "another rank has gone" in done.err[0] and "Traceback" not in done.err[0]
    assert not is_lost(ValueError("--data igloo.jsonl: there is no such file"))


# ------------------------------------------------------------------------------------ small things


def test_a_signal_interrupts_only_work_that_changes_nothing():
    ranks = Ranks()

    def interruptible(items):
        assert ranks.stoppable
        return items

    assert ranks.map_over_ranks("x", [1, 2], interruptible) == [1, 2] and not ranks.stoppable
    ranks.stop = True
    assert not issubclass(Stopping, Exception)  # which a library's call may catch
    with pytest.raises(Stopping):
        ranks.map_over_ranks("x", [1, 2], interruptible)
    ranks.ending = True
    assert ranks.map_over_ranks("x", [1, 2], list) == [1, 2]


def test_no_option_of_ours_begins_one_of_torchruns():
    """torchrun would take `--run x` after ssr.py for a short form of its own --run-path."""
    from torch.distributed.run import get_args_parser

    theirs = [o for a in get_args_parser()._actions for o in a.option_strings]
    ours = settings.field_docs(settings.Settings)
    assert [(o, t) for o in map(settings.option, ours) for t in theirs if t.startswith(o)] == []
