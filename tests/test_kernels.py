import os
import subprocess
import sys

import pytest
import torch

from kernels.advantage import group_advantage
from kernels.decode import decode_attention
from kernels.logprob import linear_logprob, linear_policy_loss
from tests.kernel_cases import CASES, FUSED_CASES, inputs, reference
from tests.processes import ROOT


def loss_and_grads(hidden, weight, targets, advantages, weights, **settings):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, stats = linear_policy_loss(hidden, weight, targets, advantages, weights, **settings)
    loss.backward()
    return loss.detach(), stats, hidden.grad, weight.grad


# ------------------------------------------------------------------------- torch and Triton


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_plain_torch(case):
    case("torch", "cpu")


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.__name__)
def test_plain_torch_in_bf16(case):
    case("torch", "cpu", torch.bfloat16)


def test_triton_kernels_in_the_interpreter(request):
    """`python -m tests.compile_kernels`, which CI runs, compiles them for GPUs."""
    pytest.importorskip("triton")
    if request.config.getoption("--other-machine"):
        pytest.skip("a process of its own rounds as this machine does")
    command = [sys.executable, "-m", "tests.kernel_cases"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"},
                         capture_output=True, text=True)  # fmt: skip
    assert run.stdout.split() == [case.__name__ for case in CASES + FUSED_CASES], run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES + FUSED_CASES, ids=lambda case: case.__name__)
def test_triton_kernels_on_the_gpu(case, dtype):
    case(*(["triton"] if case in CASES else []), "cuda", dtype)


# ---------------------------------------------------------------------------- policy loss


def test_ratio_is_exactly_one_on_policy():
    """Own log-probs as old ones, and none: the same gradient, bit for bit."""
    hidden, weight, targets = inputs(7, 24, 1003)
    A, w = torch.randn(7), torch.full((7,), 1 / 7)
    old = linear_logprob(hidden, weight, targets, 0.7)[0]
    with_old = loss_and_grads(hidden, weight, targets, A, w, temperature=0.7, old_logprobs=old)
    without = loss_and_grads(hidden, weight, targets, A, w, temperature=0.7)
    torch.testing.assert_close(without[0], -(A * w).sum())  # r = 1: minus the mean advantage
    assert all(torch.equal(x, y) for x, y in zip(with_old[2:], without[2:], strict=True))


def test_chunks_change_nothing(monkeypatch):
    hidden, weight, targets = inputs(50, 24, 99)
    A, w, sampler = torch.randn(50), torch.full((50,), 0.02), torch.randn(50)
    want = loss_and_grads(hidden, weight, targets, A, w, sampler_logprobs=sampler)
    monkeypatch.setattr("kernels.logprob.CHUNK_BYTES", {"cpu": 7 * 4 * 99})
    got = loss_and_grads(hidden, weight, targets, A, w, sampler_logprobs=sampler)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    logprob = linear_logprob(hidden, weight, targets)[0]
    torch.testing.assert_close(logprob, reference(hidden, weight, targets, 1.0)[0])


def test_clip_removes_the_gradient_beyond_its_bounds():
    """Advantage above 0: no push beyond 1 + high; below 0: none below 1 - low."""
    hidden, weight, _ = inputs(1, 24, 99)
    hidden, targets = hidden.expand(4, -1), torch.full((4,), 5)
    logprob = linear_logprob(hidden, weight, targets)[0]
    old = logprob - torch.tensor([1.35, 0.75, 1.35, 0.75]).log()  # the ratios
    A = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, stats, dh, _ = loss_and_grads(
        hidden, weight, targets, A, torch.ones(4), old_logprobs=old, clip=(0.2, 0.3)
    )
    assert [bool((row == 0).all()) for row in dh] == [True, False, False, True]
    assert stats["clipped"] == 2
    torch.testing.assert_close(loss, torch.tensor(-1.3 - 0.75 + 1.35 + 0.8))


def test_kl_gradient_is_that_of_the_exact_kl():
    """Each token of a tiny vocabulary, weighted by its probability: an exact expectation."""
    random = torch.Generator().manual_seed(0)
    V, D = 7, 5
    h, W, R = (torch.randn(s, generator=random).double() for s in ((1, D), (V, D), (V, D)))
    ref = (h @ R.T).log_softmax(-1)[0]
    x, y = h.clone().requires_grad_(), W.clone().requires_grad_()
    log_p = (x @ y.T).log_softmax(-1)[0]
    exact = (log_p.exp() * (log_p - ref)).sum()
    exact.backward()
    p, targets = log_p.detach().exp(), torch.arange(V)
    hidden, zero = h.expand(V, D), torch.zeros(V).double()
    for old in (None, log_p.detach() + 0.4 * torch.randn(V, generator=random)):
        drawn = p if old is None else old.exp()  # off policy: tokens come from the old one
        loss, stats, dh, dw = loss_and_grads(
            hidden, W, targets, zero, drawn, ref_logprobs=ref, old_logprobs=old, kl=1.0
        )
        torch.testing.assert_close(dh.sum(0), x.grad[0])
        torch.testing.assert_close(dw, y.grad)
        if old is None:  # k3 is right on average
            torch.testing.assert_close((loss, stats["kl"]), (exact.detach(),) * 2)


def test_statistics_equal_hand_computed_ones():
    """Two tokens over a vocabulary of two, from numbers one can check on paper."""
    hidden = torch.eye(2)
    weight = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).log1p()  # logits of row 1: 0 and log 4
    targets = torch.tensor([0, 1])  # p = 1/2 and 4/5
    w = torch.tensor([0.25, 0.75])
    ref, sampler = torch.tensor([0.25, 0.8]).log(), torch.tensor([0.5, 0.4]).log()
    settings = {"ref_logprobs": ref, "sampler_logprobs": sampler, "importance_cap": 1.5}
    _, stats, *_ = loss_and_grads(hidden, weight, targets, torch.zeros(2), w, **settings)
    want = {
        "logprob": 0.25 * -0.6931472 + 0.75 * -0.2231436,
        "entropy": 0.25 * 0.6931472 + 0.75 * 0.5004024,
        "kl": 0.25 * (0.5 - 1 + 0.6931472),
        "clipped": 0.0,
        "importance_ratio": 0.25 * 1 + 0.75 * 2,  # before it is capped
        "importance_capped": 0.75,
        "sampler_gap": 0.75 * 0.6931472,
        "sampler_gap_max": 0.6931472,
    }
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(want)


def test_no_rows_are_no_loss():
    hidden, weight, targets = torch.zeros(0, 8), torch.randn(9, 8), torch.zeros(0).long()
    loss, _, dh, dw = loss_and_grads(hidden, weight, targets, torch.zeros(0), torch.zeros(0))
    assert loss == 0 and dh.shape == (0, 8) and (dw == 0).all()
    assert linear_logprob(hidden, weight, targets)[0].shape == (0,)


def test_incoming_gradient_scales_the_loss_once():
    """A trainer may scale the loss and add another that also reaches the head."""
    hidden, weight, targets = inputs(5, 24, 99)
    A, w = torch.randn(5), torch.ones(5)
    *_, dh, dw = loss_and_grads(hidden, weight, targets, A, w)
    h, x = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, _ = linear_policy_loss(h, x, targets, A, w)
    (3 * loss + x.sum()).backward(retain_graph=True)
    torch.testing.assert_close(h.grad, 3 * dh)
    torch.testing.assert_close(x.grad, 3 * dw + 1)
    with pytest.raises(RuntimeError, match="works once"):
        loss.backward()


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"targets": torch.tensor([0, 99, 1])}, "a target is outside the vocabulary"),
        ({"targets": torch.tensor([0, -100, 1])}, "a target is outside the vocabulary"),
        ({"targets": torch.tensor([0, 1])}, r"int64 targets \(M,\) are "),
        ({"targets": torch.tensor([0.0, 1.0, 2.0])}, r"int64 targets \(M,\) are .*float32"),
        ({"hidden": torch.randn(3, 7)}, r"hidden \(M, D\)"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"impl": "cuda"}, "impl='cuda' be auto"),
        ({"weights": torch.zeros(2)}, r"not \(2,\)"),
        ({"kl": 0.1}, "kl=0.1 needs ref_logprobs"),
    ],
)
def test_bad_arguments_of_the_policy_loss_are_named(changes, match):
    names = ("hidden", "weight", "targets", "advantages", "weights")
    arguments = dict(zip(names, (*inputs(3, 24, 99), torch.zeros(3), torch.zeros(3)), strict=True))
    with pytest.raises((ValueError, RuntimeError), match=match):
        linear_policy_loss(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, "does not fit"),
        ({"cache": torch.zeros(2, 1, 2, 9, 8)}, "does not fit"),
        ({"q": torch.zeros(2, 1, 3, 8)}, "does not fit"),
        ({"width": 10}, "width=10 must be in 1 … 9"),
        ({"lengths": torch.zeros(2)}, "lengths int64"),
    ],
)
def test_bad_arguments_of_decode_attention_are_named(changes, match):
    q, kv = torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 2, 8)
    lengths, cache = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2, 2, 9, 8)
    arguments = {"q": q, "k": kv, "v": kv, "cache": cache, "lengths": lengths, "width": 9}
    with pytest.raises(ValueError, match=match):
        decode_attention(**arguments | changes)


@pytest.mark.parametrize(
    ("rewards", "scale", "match"),
    [
        (torch.tensor([[1.0, torch.inf]]), "std", "infinite"),
        (torch.zeros(1, 2), "sd", "'sd' is unknown"),
        (torch.zeros(2), "std", "rewards must be"),
    ],
)
def test_bad_rewards_are_refused(rewards, scale, match):
    with pytest.raises(ValueError, match=match):
        group_advantage(rewards, scale)
