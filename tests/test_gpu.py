"""What needs a GPU: CUDA graphs, bf16, fp32 logits out of bf16 products."""

import json

import pytest
import torch

import model as ours
from kernels.decode import decode_attention
from kernels.fused import block_sums, decode_blocks
from sampler import Kernels, Sampler, SamplingParams
from tests.test_sampler import STOPS, forward_logprobs, some_prompts
from tests.tiny import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SETTINGS = {"n": 4, "max_new_tokens": 20, "stop_ids": STOPS, "seed": 9}


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def model(request, tmp_path):
    make_model(tmp_path)
    return ours.load(tmp_path, dtype=request.param, device="cuda")


def test_graphs_give_the_samples_of_plain_steps(model):
    graphed, plain = Sampler(model, 16, 64), Sampler(model, 16, 64)
    plain.decode = lambda count, width, params: plain.step(  # the graphs' shapes, without graphs
        min(16, 1 << (count - 1).bit_length()), 64, params
    )
    prompts = some_prompts(9, begin=(4, 5))
    for changes in ({}, {"temperature": 0}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.8}):
        want = plain.generate(prompts, **SETTINGS | changes)
        assert graphed.generate(prompts, **SETTINGS | changes) == want
    assert {params for _, _, params in graphed.graphs} >= {SamplingParams(), SamplingParams(0)}


def test_graphs_see_weights_updated_in_place_and_replaced(model):
    sampler = Sampler(model, 8, 64)
    prompts = some_prompts(2)
    first = sampler.generate(prompts, **SETTINGS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    second = sampler.generate(prompts, **SETTINGS)
    assert second == Sampler(model, 8, 64).generate(prompts, **SETTINGS) != first
    model.load_state_dict({k: v / 1.5 for k, v in model.state_dict().items()}, assign=True)
    want = Sampler(model, 8, 64).generate(prompts, **SETTINGS)
    assert sampler.generate(prompts, **SETTINGS) == want


@pytest.mark.parametrize("kernels", [None, Kernels(decode_attention, block_sums)])
def test_logprobs_agree_with_the_training_forward(model, kernels):
    prompts = some_prompts(6)
    budget = 1e-4 if model.activation_dtype == torch.float32 else 0.05
    model.decode_blocks = decode_blocks if kernels else None
    groups = Sampler(model, 7, 64, kernels=kernels).generate(prompts, **SETTINGS)
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            with torch.device("cuda"):
                want = forward_logprobs(model, prompt, sample.ids)
            assert (torch.tensor(sample.logprobs) - want.cpu()).abs().max() < budget


def test_logits_are_fp32_with_and_without_grad(model):
    hidden = torch.randn(5, 32, device="cuda", dtype=model.activation_dtype)
    exact = hidden.double() @ model.head_weight.double().T
    with torch.no_grad():
        torch.testing.assert_close(model.logits(hidden).double(), exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.logits(hidden).double(), exact, atol=1e-4, rtol=1e-4)


def test_packed_rows_equal_one_by_one(model):
    lengths = [5, 1, 17, 8, 16]
    row = torch.randint(99, (1, sum(lengths)), device="cuda")
    alone = torch.cat([model(ids[None]) for ids in row[0].split(lengths)], dim=1)
    budget = 1e-4 if model.activation_dtype == torch.float32 else 0.1
    assert (model(row, segments=lengths) - alone).abs().max() < budget


def test_a_large_vocabulary_is_sorted_and_summed_in_graphs():
    config = ours.Config("qwen2", 151_936, 64, 96, 2, 4, 2, 16, 512, tied=True)
    model = ours.Transformer(config).to("cuda", torch.bfloat16)
    sampler = Sampler(model, 8, 64, kernels=Kernels(block_sums=block_sums))
    for params in ({}, {"top_k": 50}, {"top_p": 0.9}):
        groups = sampler.generate([[1, 2, 3]] * 4, 2, 12, **params)
        assert len({tuple(s.ids) for g in groups for s in g}) == 8


def test_gpu_the_toy_learns_in_bf16(toy, tmp_path):
    """bf16 samplers in CUDA graphs, fp32 masters: sampler and trainer agree, and it learns."""
    import ssr

    run = tmp_path / "run"
    options = ["--preset=toy", "--steps=40"]
    ssr.main([*options, f"--model={toy}", f"--folder={run}"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row["policy/sampler_gap"] for row in rows[1:]) < 0.02
    # Not the reward: in so few steps it rises by no more than its noise.
    assert rows[-1]["eval/exact_match"] > rows[0]["eval/exact_match"] + 0.15


def test_gpu_an_evaluation_translates_as_on_the_cpu(toy, tmp_path, monkeypatch):
    """In fp32 equal but for rounding, in bf16 nearly the same scores."""
    from eval.__main__ import main

    options = ["--prompts=toy", "--sets=toy:kasu-bevo", "--metrics=chrf", "--max-new-tokens=20"]
    scores = {}
    for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"), ("cpu", "float32")):
        if name == "cpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        words = [f"--dtype={dtype}", f"--model={name}={toy}", f"--out={tmp_path / name}"]
        main([*options, *words])
        table = json.loads((tmp_path / name / "table.json").read_text())
        scores[name] = table["systems"][name]["scores"]["Kasu-Bevo/toy/chrf"]["value"]
    assert abs(scores["cpu"] - scores["fp32"]) < 0.2 and abs(scores["cpu"] - scores["bf16"]) < 2
