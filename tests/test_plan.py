"""--dry-run: what lives all the time is counted to the byte; the rest is an estimate that must err
on neither side by much."""

import pytest
import torch

import grpo
import plan
import rzero
import ssr
from checkpoint import tensors_of
from model import load
from plan import MACHINES, Work, memory, peak, seconds, shape_of
from sampler import Sampler
from tests.tiny import make_model, make_tokenizer
from toy import controls

H100 = MACHINES["h100"]


def work(name, G, S=None, **changes):
    s = ssr.dataclasses.replace(ssr.parse(["--preset=ssr-zero-7b", "--dry-run"]), **changes)
    return Work(s, shape_of(name), G, S or G, 250, True)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-32B", 32_763_876_352),
        ("Qwen/Qwen3-4B-Base", 4_022_468_096),
    ],
)
def test_known_shapes_have_the_published_number_of_parameters(name, parameters):
    assert work(name, 8).params[0] == parameters


def test_what_lives_all_the_time_is_counted_to_the_byte(tmp_path):
    make_model(tmp_path)
    model = load(tmp_path)
    s = ssr.parse(["--preset=toy", "--slots=7", "--max-new-tokens=20", "--no-track-kl"])
    k = Work(s, model.config, 1, 1, 10, False)
    parts = memory(k)
    optimizer = grpo.make_optimizer(model, s)
    tensors = tensors_of(model, optimizer)
    size = sum(x.nbytes for n, x in tensors.items() if n.startswith("model"))
    assert parts["weights, fp32"] == parts["gradients, fp32"] == size
    assert parts["AdamW"] == sum(x.nbytes for n, x in tensors.items() if "exp_avg" in n)
    window = 10 + 32 + 20 + 1 + 64
    sampler = Sampler(model, 7, window)
    held = sampler.kv.nbytes + sum(x.nbytes for x in sampler.state)
    assert parts["its KV cache"] == pytest.approx(held, rel=0.02)
    assert "the starting weights" not in parts and "the sampler's copy" not in parts


def test_a_prompt_is_read_once_for_the_samples_that_fit():
    sizes = {"max_prompt_tokens": 80, "max_new_tokens": 100, "samples_per_prompt": 8}
    k = work("Qwen/Qwen2.5-0.5B", 1, prompts_per_step=6, micro_batch_tokens=2000, **sizes)
    assert k.training == (6 * 880, 6 * (880 + 7 * 10), 3)  # two groups of 950 in each
    k = k._replace(s=ssr.dataclasses.replace(k.s, micro_batch_tokens=900))
    assert k.training == (12 * 480, 12 * (480 + 3 * 10), 12)  # half a group in each
    # The same tokens in a forward, but those of the prompts, which seven of eight samples spare.
    apart = k._replace(s=ssr.dataclasses.replace(k.s, samples_per_prompt=1, prompts_per_step=48))
    spared = seconds(apart, H100)["reference"] - seconds(k, H100)["reference"]
    N, _, root = k.params
    flops = H100.teraflops * 1e12 * plan.REACHED["products"]
    assert spared == pytest.approx(36 * 80 * 2 * (N - root) / flops, rel=0.05)


def test_judges_that_only_read_keep_one_slot():
    for judge, name in (("frozen", "the starting weights"), ("ema", "the EMA and its judge")):
        read, written = (
            memory(work("Qwen/Qwen2.5-0.5B", 1, judge=judge, reading=x, slots=64))[name]
            for x in ("expected", "written")
        )
        k = work("Qwen/Qwen2.5-0.5B", 1)
        window = 250 + k.longest + k.s.judge_max_new_tokens + 64
        each = [(window - less) * (k.cache_bytes + 20) for less in (0, k.judge_words - 1)]
        assert written - read == pytest.approx(64 * each[0] - each[1], rel=1e-9)


def test_weights_are_spread_and_copies_are_not():
    one, eight, node = (memory(work("Qwen/Qwen2.5-7B", G, S)) for G, S in ((1, 1), (8, 8), (64, 8)))
    assert one["AdamW"] == 8 * eight["AdamW"] == 8 * node["AdamW"]
    assert one["the sampler's copy"] == eight["the sampler's copy"]
    without = memory(work("Qwen/Qwen2.5-7B", 8, track_kl=False))
    assert peak(eight) - peak(without) == eight["the starting weights"]


def test_time_grows_with_the_work_and_shrinks_with_the_gpus():
    few, many = (sum(seconds(work("Qwen/Qwen2.5-7B", G), H100).values()) for G in (8, 16))
    assert 1.3 < few / many < 2.1
    twice = work("Qwen/Qwen2.5-7B", 8, prompts_per_step=256)
    assert sum(seconds(twice, H100).values()) == pytest.approx(2 * few, rel=0.02)


def test_the_papers_run_fits_on_eight_gpus_of_80_gb_and_32b_does_not(capsys):
    ssr.main(["--dry-run", "--preset=ssr-zero-7b", "--gpus=8", "--gpu=h100"])
    out = capsys.readouterr().out
    assert "7.616 B parameters on 8 × H100 (80 GB), weights shared by 8" in out
    assert "It fits, with" in out
    large = ["--dry-run", "--preset=ssr-zero-7b", "--model=Qwen/Qwen2.5-32B", "--gpus=64"]
    for words in ([], ["--gpu=h200", "--shard=node", "--micro-batch-tokens=16384"]):
        with pytest.raises(SystemExit) as error:
            ssr.main([*large, *words])
        assert error.value.code == 1
    out = capsys.readouterr().out
    assert "would leave" in out and "use more or larger GPUs" in out
    assert "It would with --shard all --micro-batch-tokens 8192 --no-track-kl." in out


def test_the_advice_fits():
    k = work("Qwen/Qwen2.5-7B", 8, slots=256, micro_batch_tokens=16384)
    assert "It does NOT fit" in plan.verdict(k, H100)
    words = plan.verdict(k, H100).split("It would with ")[1].rstrip(".").split()
    s = ssr.parse(["--preset=ssr-zero-7b", "--dry-run", "--slots=256", *words])
    assert plan.verdict(k._replace(s=s), H100).startswith("It fits")


def test_evaluations_are_in_the_time_of_a_run(capsys):
    words = ["--dry-run", "--preset=ssr-zero-7b", "--gpus=8", "--gpu=h100", "--steps=50"]
    ssr.main(words)
    out = capsys.readouterr().out
    each, step = number_of(out, "evaluation, 3 of them")[0], number_of(out, "step ")[0]
    hours = number_of(out, "50 steps, hours")[0]
    assert hours * 3600 == pytest.approx(3 * each + 50 * step, rel=0.02)
    k = work("Qwen/Qwen2.5-7B", 8, eval_prompts=512, slots=512)
    twice = k.changed(eval_prompts=1024)
    ratio = plan.evaluation_seconds(twice, H100) / plan.evaluation_seconds(k, H100)
    assert 1.2 < ratio <= 2
    certain = k.changed(reward="certainty")  # the judge is asked all the same
    assert plan.evaluation_seconds(certain, H100) == plan.evaluation_seconds(k, H100)


def test_prompts_that_cannot_work_are_known_before_anything_is_sampled(tmp_path, capsys):
    make_model(tmp_path, vocab=400)
    make_tokenizer(tmp_path)
    words = ["--dry-run", "--preset=ssr-zero-0.5b", f"--model={tmp_path}", "--max-new-tokens=64"]
    ssr.main(words)
    out = capsys.readouterr().out
    assert "with --max-new-tokens 64 many samples will be cut off; --prompts plain" in out
    assert "has a chat template: if it is an instruct model, ask it with --chat --prompts pl" in out
    ssr.main([*words, "--chat", "--prompts=plain"])
    ssr.main(["--dry-run", "--preset=ssr-zero-0.5b"])
    out = capsys.readouterr().out
    assert "cut off" not in out and "chat template" not in out


def number_of(out: str, words: str) -> list[float]:
    return [
        float(line[len(words) :].split()[0]) for line in out.splitlines() if line.startswith(words)
    ]


def test_r_zeros_players_fit_on_eight_gpus_of_80_gb(capsys):
    words = ["--preset=r-zero-4b", "--dry-run", "--gpus=8", "--gpu=h100"]
    rzero.main(words)
    out = capsys.readouterr().out
    assert out.count("It fits, with") == 2 and "Between them 8000 questions, 10 answers" in out

    assert number_of(out, "answers")[0] == pytest.approx(10 * number_of(out, "sample")[0], rel=0.02)
    hours = [*number_of(out, "5 steps, hours"), number_of(out, "15 steps, minutes")[0] / 60]
    writing = number_of(out, "Between them 8000 questions, 10 answers to each:")
    # A rank writes 1,000 questions with 10 answers each; in a step 10 answers to each of 64.
    assert writing[0] * 3600 == pytest.approx(
        number_of(out, "answers")[0] * 1000 / 64 * 1.1, rel=0.03
    )
    total = number_of(out, "3 iterations:")
    assert total[0] == pytest.approx(3 * (sum(hours) + writing[0]), rel=0.01)
    with pytest.raises(SystemExit) as error:
        rzero.main([*words, "--slots=32"])
    assert error.value.code == 1
    words += capsys.readouterr().out.split("It would with ")[1].split(".")[0].split()
    rzero.main(words)
    for words in (["--dry-run"], ["--dry-run", "--preset=toy-translation", "--model=x"]):
        with pytest.raises(SystemExit, match="--dry-run: of a --model, and not for the toy's"):
            rzero.main(words)


def test_every_slot_of_r_zero_is_counted_and_the_advice_fits(capsys):
    """On many GPUs each has little to decode, and room for all slots nevertheless."""
    words = ["--preset=r-zero-4b", "--dry-run", "--gpus=64", "--gpu=h100", "--slots=40"]
    for shard in ("all", "node"):
        with pytest.raises(SystemExit):
            rzero.main([*words, f"--shard={shard}"])
        out = capsys.readouterr().out
        shape = shape_of("Qwen/Qwen3-4B-Base")
        held = 40 * (1024 + 4096 + 65) * 4 * shape.layers * shape.kv_heads * shape.head_dim / 1e9
        assert number_of(out, "its KV cache") == pytest.approx([held, held], rel=0.01)
        shared = 4 * 4.022 / (8 if shard == "node" else 64)
        assert number_of(out, "weights, fp32") == pytest.approx([shared, shared], abs=0.01)
        assert "--no-track-kl" not in out  # --kl keeps them
        told = out.split("It would with ")[1].split(".")[0].split()
        assert ("--shard" in told) == (shard == "node")
        rzero.main([*words, f"--shard={shard}", *told])
        capsys.readouterr()
    large = Work(ssr.parse(["--preset=ssr-zero-7b", "--dry-run", "--slots=8", "--no-track-kl"]),
                 shape_of("Qwen/Qwen2.5-72B"), 8, 8, 250, True)  # fmt: skip
    large = large.changed(micro_batch_tokens=large.longest)
    assert plan.verdict(large, H100).endswith("on each. use more or larger GPUs.")


def test_a_judge_takes_time_where_one_is_asked():
    stages = {
        name: seconds(work("Qwen/Qwen2.5-7B", 8, reward=name), H100)
        for name in (*ssr.REWARDS, *controls.REWARDS)
    }
    asks = {name for name, times in stages.items() if "judge" in times}
    assert asks == {"self", "self+comet", "self+external", "pairs", "group", "cream"}
    for name in ("certainty", "confidence"):  # they read the samples once more
        assert stages[name][name] == pytest.approx(stages[name]["reference"])


def test_who_answers_the_challenger_is_counted_to_the_byte(tmp_path):
    make_model(tmp_path)
    model = load(tmp_path)
    s = ssr.parse(["--preset=toy", "--slots=7", "--max-new-tokens=20", "--reward=oracle"])
    asked = Work(s, model.config, 1, 1, 0, False)
    parts = memory(asked._replace(asked=asked))
    sampler = Sampler(model, 7, 32 + 20 + 1 + 64)
    held = sampler.kv.nbytes + sum(x.nbytes for x in sampler.state) + 4 * asked.params[0]
    assert parts["who answers, its cache"] == pytest.approx(held, rel=0.02)
    assert "judge" not in seconds(asked, H100) and "answers" not in seconds(asked, H100)
    assert asked._replace(asked=asked).changed(slots=3).asked.s.slots == 3
    twice = asked._replace(asked=asked.changed(samples_per_prompt=2 * s.samples_per_prompt))
    ratio = seconds(twice, H100)["answers"] / seconds(asked, H100)["sample"]
    assert 1.5 < ratio <= 2


def test_a_dry_run_of_the_toy_measures_this_machine_and_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    ssr.main(["--dry-run", "--preset=toy", "--device=cpu"])
    out = capsys.readouterr().out
    assert "measured" in out and "It fits" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu=h9000"], r"--gpu h9000: use a100, .* or four numbers with commas"),
        (["--gpu=80,989"], r"--gpu 80,989: use a100"),
        (["--model=nobody/nothing"], r"--model nobody/nothing: no folder with a config.json"),
        (["--gpus=-1"], r"--gpus -1 must be at least 0"),
    ],
)
def test_a_question_that_cannot_be_answered_says_why(words, message, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        ssr.main(["--dry-run", "--preset=ssr-zero-7b", *words])


def test_four_numbers_are_a_machine():
    assert plan.machine_of("48,362,0.86,32", torch.device("cpu"))[1:] == (48, 362, 0.86, 32)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "room", lambda device: 1e7)
    monkeypatch.setattr(ssr, "load", None)
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"needs about 0.1 GB on each rank, and 0.0 are there: --"):
        ssr.main(["--preset=toy", f"--model={toy}", f"--folder={run}"])
    assert not run.exists()
