"""--dry-run: what lives all the time is counted to the byte; the rest is an estimate that must err
on neither side by much."""

import math

import pytest
import torch

import grpo
import ssr
from model import load
from rewards import build
from run import driver, estimate, settings
from run.checkpoint import tensors_of
from run.estimate import MACHINES, Workload, find_config, memory, seconds
from sampler import Sampler
from tests.runs import refuses
from tests.tiny import make_model

H100, DRY = MACHINES["h100"], "--dry-run=8xh100"


def work(name, G, **changes):
    k = Workload(settings.parse(["--preset=ssr-zero-7b"]), find_config(name), G, 250, True)
    return k.changed(**changes)


def number_of(out: str, label: str) -> float:
    return float(next(x for x in out.splitlines() if x.startswith(label))[28:].split()[0])


def test_known_shapes_have_the_published_number_of_parameters():
    published = {
        "Qwen/Qwen2.5-0.5B": 494_032_768,
        "Qwen/Qwen2.5-7B": 7_615_616_512,
        "Qwen/Qwen2.5-32B": 32_763_876_352,
        "Qwen/Qwen3-4B-Base": 4_022_468_096,
    }
    assert {name: estimate.params_of(find_config(name))[0] for name in published} == published


def test_what_lives_all_the_time_is_counted_to_the_byte(tmp_path):
    make_model(tmp_path)
    model = load(tmp_path)
    s = settings.parse(["--preset=toy", "--max-num-seqs=7", "--max-new-tokens=20", "--no-track-kl"])
    k = Workload(s, model.config, 1, 10, False)
    parts = memory(k)
    tensors = tensors_of(model, grpo.make_optimizer(model, s))
    size = sum(x.nbytes for n, x in tensors.items() if n.startswith("model"))
    assert parts["weights, fp32"] == parts["gradients, fp32"] == size
    assert parts["AdamW"] == sum(x.nbytes for n, x in tensors.items() if "exp_avg" in n)
    assert "the starting weights" not in parts and "the sampler's copy" not in parts

    def sampler_bytes(template):
        sampler = Sampler(model, 7, template + 32 + 20 + 1 + 64)
        return sampler.kv.nbytes + sum(x.nbytes for x in sampler.state)

    assert parts["its KV cache"] == pytest.approx(sampler_bytes(10), rel=0.02)
    # R-Zero's Solver, which answers the Challenger: no judge, so another window.
    answers = k.changed(reward="oracle")._replace(template=0)
    answering = answers._replace(asked=answers)
    other_player = memory(answering)["the other player"]
    assert other_player == pytest.approx(sampler_bytes(0) + size, rel=0.02)
    assert answering.changed(max_num_seqs=3).asked.s.max_num_seqs == 3
    assert seconds(answering, H100)["answers"] == seconds(answers, H100)["sample"]


def test_adamw_in_host_memory_is_counted_there_with_its_way_and_its_copy(monkeypatch):
    plain = work("Qwen/Qwen2.5-1.5B", 2, updates_per_batch=3)
    k = plain.changed(offload_optimizer=True)
    gone = memory(plain)["AdamW"]
    assert sum(memory(plain).values()) - sum(memory(k).values()) == pytest.approx(gone)
    weights = memory(k)["weights, fp32"]
    assert estimate.host_bytes(k) == gone + (gone + weights)  # and a checkpoint's copy
    assert estimate.host_bytes(plain) == 0
    assert number_of(estimate.format_estimate(k, H100, "1.5B"), "host memory") == 15.44
    times = seconds(k, H100)
    assert times.pop("offload") == pytest.approx(3 * 2 * gone / (estimate.HOST_RATE * 1e9))
    assert times == seconds(plain, H100)
    # A CPU's memory is the host's.
    assert memory(k._replace(cuda=False)) == memory(plain._replace(cuda=False))
    free = {"cuda": math.inf, "cpu": 1e9}
    monkeypatch.setattr(estimate, "available_bytes", lambda device: free[device.type])
    estimate.check_room(plain, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"about 15\.4 GB .* 1\.0 are .* host memory"):
        estimate.check_room(k, torch.device("cuda"))


def test_blocks_are_recomputed_only_where_their_activations_might_not_fit(capsys):
    for name, size, recompute in (
        ("0.5B", "8xh100", 0),
        ("0.5B", "rtx4090", 1),
        ("7B", DRY[10:], 1),
    ):
        ssr.main(["--preset=ssr-zero-7b", f"--model=Qwen/Qwen2.5-{name}", f"--dry-run={size}"])
        assert capsys.readouterr().out.count("computed again in the backward") == recompute, name
    k = work("Qwen/Qwen2.5-0.5B", 1)
    room = sum(memory(k).values())
    assert estimate.plan_recompute(k, room) == k
    kept = estimate.plan_recompute(k, 10 * room)
    long_prompts = k.changed(max_prompt_tokens=1400, max_new_tokens=40)  # each sample copies them
    parts = memory(long_prompts._replace(recompute=False))
    enough = 1.01 * sum(parts.values()) / estimate.ROOM
    assert estimate.plan_recompute(long_prompts, enough).recompute
    assert memory(kept)["while training"] > 2 * memory(k)["while training"]
    assert seconds(k, H100)["train"] > 1.2 * seconds(kept, H100)["train"]


def test_a_prompt_is_read_once_for_the_samples_that_fit():
    sizes = {"max_prompt_tokens": 80, "max_new_tokens": 100, "samples_per_prompt": 8}
    k = work("Qwen/Qwen2.5-0.5B", 1, prompts_per_step=6, micro_batch_tokens=900, **sizes)
    assert k.train_tokens == 6 * 880
    assert k.changed(micro_batch_tokens=500).train_tokens == 12 * 480  # half a group fits


def test_a_judge_that_only_reads_keeps_one_slot():
    k = work("Qwen/Qwen2.5-0.5B", 1, max_num_seqs=64, judge="frozen")
    written, read = (memory(k.changed(score_mode=x)) for x in ("written", "expected"))
    saved = written["the starting weights"] - read["the starting weights"]
    assert saved == pytest.approx(written["its KV cache"], rel=0.02)


def test_time_grows_with_the_work_and_shrinks_with_the_gpus():
    k = work("Qwen/Qwen2.5-7B", 8, max_num_seqs=512, eval_prompts=512)
    runs = (k, k._replace(G=16), k.changed(prompts_per_step=256))
    step, more_gpus, twice = (sum(seconds(run, H100).values()) for run in runs)
    assert 1.3 < step / more_gpus < 2.1 and 1.5 < twice / step <= 2
    once = estimate.evaluation_seconds(k, H100)
    assert 1.2 < estimate.evaluation_seconds(k.changed(eval_prompts=1024), H100) / once <= 2
    assert estimate.evaluation_seconds(k.changed(reward="certainty"), H100) == once


def test_a_judge_takes_time_where_one_is_asked():
    rewards = (*build.REWARDS, "random", "oracle", "external", "self+external")
    kinds = {x: work("Qwen/Qwen2.5-7B", 8, reward=x, track_kl=True) for x in rewards}
    stages = {name: seconds(k, H100) for name, k in kinds.items()}
    judged = {name for name, times in stages.items() if "judge" in times}
    assert judged == {"self", "self+comet", "self+external", "pairs", "group", "cream"}
    for name in ("certainty", "confidence"):  # they read the samples once more
        assert stages[name][name] == pytest.approx(stages[name]["reference"])


def test_the_papers_run_fits_on_eight_gpus_of_80_gb_and_32b_does_not(capsys):
    ssr.main([DRY, "--preset=ssr-zero-7b", "--steps=50"])
    out = capsys.readouterr().out
    assert "7.616 B parameters on 8 × H100 (80 GB)" in out
    assert "It fits, with" in out
    each, step = number_of(out, "evaluation, 3 of them"), number_of(out, "step ")
    hours = number_of(out, "50 steps, hours")
    assert hours * 3600 == pytest.approx(3 * each + 50 * step, rel=0.02)
    with pytest.raises(SystemExit) as error:
        ssr.main(["--preset=ssr-zero-7b", "--model=Qwen/Qwen2.5-32B", "--dry-run=64xh100"])
    out = capsys.readouterr().out
    assert error.value.code == 1 and "It does NOT fit: " in out and "--offload-optimizer" in out


def test_r_zeros_players_fit_on_eight_gpus_of_80_gb(capsys):
    from rzero import selfplay

    words = ["--preset=r-zero-4b", DRY]
    selfplay.main(words)
    out = capsys.readouterr().out
    assert out.count("It fits, with") == 2 and "Between them 8000 questions, 10 answers" in out
    assert number_of(out, "answers") == pytest.approx(10 * number_of(out, "sample"), rel=0.02)
    with pytest.raises(SystemExit) as error:
        selfplay.main([*words, "--max-num-seqs=32"])
    assert error.value.code == 1


def test_a_dry_run_of_the_toy_measures_this_machine_and_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    ssr.main(["--dry-run", "--preset=toy"])
    out = capsys.readouterr().out
    assert "measured" in out and "It fits" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dry-run=h9000"], r"--dry-run h9000: use COUNTxGPU, such as 8xh100, with one of a100"),
        (["--dry-run=0xh100"], r"--dry-run 0xh100: use COUNTxGPU"),
        ([DRY, "--model=nobody/nothing"], "nobody/nothing: no folder with a config.json, none of"),
    ],
)
def test_a_dry_run_that_is_not_possible_says_why(words, message):
    refuses(["--preset=ssr-zero-7b", *words], message)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "available_bytes", lambda device: 1e7)
    monkeypatch.setattr(driver, "load", None)
    run = tmp_path / "run"
    refuses(["--preset=toy", f"--model={toy}", f"--folder={run}"],
            r"needs about 0.1 GB on each rank, and 0.0 are there: --")  # fmt: skip
    assert not run.exists()
