import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.advantage import group_advantage
from kernels.logprob import linear_logprob, linear_policy_loss
from tests.kernel_cases import CASES, inputs, reference

ROOT = Path(__file__).parent.parent


def loss_and_grads(hidden, weight, targets, advantages, weights, **settings):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, stats = linear_policy_loss(hidden, weight, targets, advantages, weights, **settings)
    loss.backward()
    return loss.detach(), stats, hidden.grad, weight.grad


def run(*arguments, interpret):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_plain_torch(case):
    case("torch", "cpu")


@pytest.mark.parametrize("every", ["2500", pytest.param("25", marks=pytest.mark.slow)])
def test_triton_kernels_in_the_interpreter(every):
    pytest.importorskip("triton")
    output = run("-m", "tests.kernel_cases", "triton", "cpu", every, interpret=True)
    assert output.split() == [case.__name__ for case in CASES]


def test_every_kernel_compiles_for_gpus_that_are_not_here():
    pytest.importorskip("triton")
    lines = run("-m", "tests.compile_kernels", interpret=False).splitlines()
    print("\n".join(lines))
    assert len(lines) == 3 * 6 and all("0 bytes spilled" in line for line in lines)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_triton_kernels_on_the_gpu(case, dtype):
    case("triton", "cuda", dtype)


def test_bf16_is_within_the_budget_of_plain_torch():
    for case in CASES[:2]:
        case("torch", "cpu", torch.bfloat16)


# ------------------------------------------------------------------------------ signal


def test_ratio_is_exactly_one_on_policy():
    """With its own log-probs as old ones, and with none: the same gradient, bit for bit."""
    hidden, weight, targets = inputs(7, 24, 1003)
    A, w = torch.randn(7), torch.full((7,), 1 / 7)
    old = linear_logprob(hidden, weight, targets, 0.7)[0]
    given = loss_and_grads(hidden, weight, targets, A, w, temperature=0.7, old_logprobs=old)
    free = loss_and_grads(hidden, weight, targets, A, w, temperature=0.7)
    torch.testing.assert_close(free[0], -(A * w).sum())  # r = 1: the loss is the mean advantage
    assert all(torch.equal(x, y) for x, y in zip(given[2:], free[2:], strict=True))


def test_temperature_is_in_the_gradient():
    hidden, weight, targets = inputs(5, 24, 99)
    A, w = torch.randn(5), torch.ones(5)
    *_, dh, _ = loss_and_grads(hidden, weight, targets, A, w, temperature=1.3)
    h = hidden.double().requires_grad_()
    (-A * reference(h, weight.double(), targets, 1.3)[0]).sum().backward()
    torch.testing.assert_close(dh.double(), h.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", [[12], [6, 6], [3, 3, 3, 3], [1, 11], [5, 4, 2, 1]])
def test_gradients_do_not_depend_on_micro_batches_or_order(parts):
    hidden, weight, targets = inputs(12, 24, 99)
    A, w = torch.randn(12), torch.full((12,), 1 / 12)  # one denominator, agreed before
    settings = {"entropy": 0.1, "temperature": 0.7}
    want = loss_and_grads(hidden, weight, targets, A, w, **settings)
    order = torch.randperm(12)
    loss, stats, dw = 0.0, {}, 0.0
    dh = torch.zeros_like(hidden)
    for rows in order.split(parts):
        part = (hidden[rows], weight, targets[rows], A[rows], w[rows])
        more, values, dh[rows], more_dw = loss_and_grads(*part, **settings)
        loss, dw = loss + more, dw + more_dw
        stats = {k: stats.get(k, 0.0) + v for k, v in values.items()}
    for got, expected in ((loss, want[0]), (dh, want[2]), (dw, want[3])):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    for name, value in want[1].items():
        torch.testing.assert_close(stats[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_rows_without_weight_do_not_matter():
    hidden, weight, targets = inputs(6, 24, 99)
    A, w = torch.randn(6), torch.tensor([0.5, 0.0, 0.5, 0.0, 0.0, 0.0])
    loss, _, dh, dw = loss_and_grads(hidden, weight, targets, A, w)
    keep = [0, 2]
    want = loss_and_grads(hidden[keep], weight, targets[keep], A[keep], w[keep])
    torch.testing.assert_close(loss, want[0])
    torch.testing.assert_close(dw, want[3], atol=1e-6, rtol=1e-5)
    assert (dh[[1, 3, 4, 5]] == 0).all()
    loss, stats, dh, dw = loss_and_grads(hidden, weight, targets, A, torch.zeros(6))
    assert loss == 0 and (dh == 0).all() and (dw == 0).all()
    assert all(value == 0 for value in stats.values())


def test_the_token_of_a_winning_sample_rises():
    hidden, weight, targets = inputs(1, 24, 99)
    *_, dh, dw = loss_and_grads(hidden, weight, targets, torch.ones(1), torch.ones(1))
    before = linear_logprob(hidden, weight, targets)[0]
    after = linear_logprob(hidden - 0.01 * dh, weight - 0.01 * dw, targets)[0]
    assert after > before


def test_clip_removes_the_gradient_where_it_should():
    """Advantage up: no push beyond 1 + high; down: none below 1 - low; elsewhere it stays."""
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
    hidden = h.expand(V, D)
    zero = torch.zeros(V).double()
    for old in (None, log_p.detach() + 0.4 * torch.randn(V, generator=random)):
        drawn = p if old is None else old.exp()  # off policy: tokens come from the old one
        *_, dh, dw = loss_and_grads(
            hidden, W, targets, zero, drawn, ref_logprobs=ref, old_logprobs=old, kl=1.0
        )
        torch.testing.assert_close(dh.sum(0), x.grad[0])
        torch.testing.assert_close(dw, y.grad)
    on_policy = loss_and_grads(hidden, W, targets, zero, p, ref_logprobs=ref, kl=1.0)
    torch.testing.assert_close(on_policy[1]["kl"], exact.detach())  # k3 is right on average
    torch.testing.assert_close(on_policy[0], exact.detach())


def test_entropy_has_a_gradient():
    hidden, weight, targets = inputs(5, 24, 99)
    zero, w = torch.zeros(5), torch.full((5,), 0.2)
    *_, dh, dw = loss_and_grads(hidden, weight, targets, zero, w, entropy=0.3)
    h, x = (t.double().requires_grad_() for t in (hidden, weight))
    (-0.3 * 0.2 * reference(h, x, targets, 1.0)[1]).sum().backward()
    torch.testing.assert_close(dh.double(), h.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(dw.double(), x.grad, atol=1e-6, rtol=1e-5)


def test_importance_is_capped_and_constant():
    hidden, weight, targets = inputs(3, 24, 99)
    logprob = linear_logprob(hidden, weight, targets)[0]
    sampler = logprob - torch.tensor([0.1, 2.0, -0.5])
    A, w = torch.ones(3), torch.ones(3)
    settings = {"sampler_logprobs": sampler, "importance_cap": 1.5}
    loss, _, dh, _ = loss_and_grads(hidden, weight, targets, A, w, **settings)
    c = torch.tensor([0.1, 2.0, -0.5]).exp().clamp(max=1.5)
    torch.testing.assert_close(loss, -c.sum())
    plain = loss_and_grads(hidden, weight, targets, A, w)[2]
    torch.testing.assert_close(dh, c[:, None] * plain, atol=1e-6, rtol=1e-5)


def test_statistics_equal_hand_computed_ones():
    """Two tokens over a vocabulary of two, from numbers one can check on paper."""
    hidden = torch.eye(2)
    weight = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).log1p()  # logits of row 1: 0 and log 4
    targets = torch.tensor([0, 1])  # p = 1/2 and 4/5
    w = torch.tensor([0.25, 0.75])
    p = torch.tensor([0.5, 0.8])
    ref, sampler = torch.tensor([0.25, 0.8]).log(), torch.tensor([0.5, 0.4]).log()
    settings = {"ref_logprobs": ref, "sampler_logprobs": sampler}
    _, stats, *_ = loss_and_grads(hidden, weight, targets, torch.zeros(2), w, **settings)
    entropies = torch.stack([torch.tensor([q, 1 - q]) for q in (0.5, 0.8)])
    entropies = -(entropies * entropies.log()).sum(1)
    want = {
        "logprob": (w * p.log()).sum(),
        "entropy": (w * entropies).sum(),
        "kl": torch.tensor(0.25 * (0.5 - 1 + 0.6931472)),
        "clipped": torch.tensor(0.0),
        "sampler_gap": torch.tensor(0.75 * 0.6931472),
        "sampler_gap_max": torch.tensor(0.6931472),
    }
    assert stats.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(stats[name], value, msg=name)


def test_chunks_change_nothing(monkeypatch):
    hidden, weight, targets = inputs(50, 24, 99)
    A, w = torch.randn(50), torch.full((50,), 0.02)
    want = loss_and_grads(hidden, weight, targets, A, w, entropy=0.1)
    monkeypatch.setattr("kernels.logprob.CHUNK_BYTES", {"cpu": 7 * 4 * 99})
    got = loss_and_grads(hidden, weight, targets, A, w, entropy=0.1)
    for one, other in zip((got[0], *got[2:]), (want[0], *want[2:]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    logprob = linear_logprob(hidden, weight, targets)[0]
    torch.testing.assert_close(logprob, reference(hidden, weight, targets, 1.0)[0])


def test_no_rows_are_no_loss():
    hidden, weight, targets = torch.zeros(0, 8), torch.randn(9, 8), torch.zeros(0).long()
    loss, _, dh, dw = loss_and_grads(hidden, weight, targets, torch.zeros(0), torch.zeros(0))
    assert loss == 0 and dh.shape == (0, 8) and (dw == 0).all()
    assert linear_logprob(hidden, weight, targets)[0].shape == (0,)


# ------------------------------------------------------------------------------ advantages


def test_group_of_one_has_no_advantage():
    for baseline in ("mean", "leave-one-out"):
        assert (group_advantage(torch.tensor([[51.33], [7.0]]), baseline=baseline) == 0).all()


def test_missing_reward_is_left_out_of_its_group():
    nan = torch.nan
    got = group_advantage(torch.tensor([[1.0, nan, 3.0], [nan, nan, 5.0], [nan] * 3]), "none")
    assert got.tolist() == [[-1.0, 0.0, 1.0], [0.0] * 3, [0.0] * 3]


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"targets": torch.tensor([0, 99, 1])}, "target 99 is outside the vocabulary of 99"),
        ({"targets": torch.tensor([0, -100, 1])}, "target -100 is outside"),
        ({"targets": torch.tensor([0, 1])}, r"targets must be \(M,\) in int64"),
        ({"targets": torch.tensor([0.0, 1.0, 2.0])}, "targets must be"),
        ({"hidden": torch.randn(3, 7)}, r"hidden must be \(M, D\)"),
        ({"hidden": torch.randn(1, 3, 24)}, r"hidden must be \(M, D\)"),
        ({"hidden": torch.randn(3, 24).bfloat16()}, "cast them to one floating type"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"impl": "cuda"}, "impl='cuda' is unknown"),
    ],
)
def test_bad_arguments_are_named(changes, match):
    hidden, weight, targets = inputs(3, 24, 99)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, **changes}
    with pytest.raises(ValueError, match=match):
        linear_logprob(**arguments)
    rows = {"advantages": torch.zeros(3), "weights": torch.zeros(3)}
    with pytest.raises(ValueError, match=match):
        linear_policy_loss(**arguments, **rows)


def test_bad_rows_are_named():
    hidden, weight, targets = inputs(3, 24, 99)
    three = torch.zeros(3)
    with pytest.raises(ValueError, match=r"weights has the shape \(2,\)"):
        linear_policy_loss(hidden, weight, targets, three, torch.zeros(2))
    with pytest.raises(ValueError, match=r"kl=0.1 needs"):
        linear_policy_loss(hidden, weight, targets, three, three, kl=0.1)
    with pytest.raises(ValueError, match="needs sampler_logprobs"):
        linear_policy_loss(hidden, weight, targets, three, three, importance_cap=2.0)
    with pytest.raises(ValueError, match="infinite"):
        group_advantage(torch.tensor([[1.0, torch.inf]]))
    with pytest.raises(ValueError, match="scale='sd' is unknown"):
        group_advantage(torch.zeros(1, 2), scale="sd")
    with pytest.raises(ValueError, match="rewards must be"):
        group_advantage(torch.zeros(2))


def test_what_comes_in_from_above_multiplies_the_gradient():
    """A trainer may scale the loss, and add another that also reaches the head."""
    hidden, weight, targets = inputs(5, 24, 99)
    A, w = torch.randn(5), torch.ones(5)
    *_, dh, dw = loss_and_grads(hidden, weight, targets, A, w)
    h, x = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, _ = linear_policy_loss(h, x, targets, A, w)
    (3 * loss + x.sum()).backward()
    torch.testing.assert_close(h.grad, 3 * dh)
    torch.testing.assert_close(x.grad, 3 * dw + 1)


def test_backward_twice_is_refused():
    hidden, weight, targets = inputs(3, 24, 99)
    hidden.requires_grad_()
    loss, _ = linear_policy_loss(hidden, weight, targets, torch.ones(3), torch.ones(3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="works once"):
        loss.backward()


def test_non_contiguous_tensors_are_handled():
    hidden, weight, targets = inputs(7, 24, 99)
    want = linear_logprob(hidden, weight, targets)
    strided = torch.stack((targets, targets), 1)[:, 0]
    got = linear_logprob(hidden.T.contiguous().T, weight.T.contiguous().T, strided)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_triton_without_gpu_or_interpreter_is_refused():
    pytest.importorskip("triton")
    code = """
import torch
from kernels.advantage import group_advantage
from kernels.logprob import linear_logprob
two, targets = torch.rand(2, 3), torch.tensor([1, 2])
for call in (lambda: group_advantage(two, impl="triton"),
             lambda: linear_logprob(two, torch.rand(5, 3), targets, impl="triton")):
    try: call()
    except RuntimeError as error: print(error)
wide = torch.rand(2, 3).double(), torch.rand(5, 3).double(), targets
try: linear_logprob(*wide, impl="triton")
except ValueError as error: print(error)
"""
    lines = run("-c", code, interpret=False).splitlines()
    assert len(lines) == 3 and all("TRITON_INTERPRET=1" in line for line in lines[:2])
    assert "for float64 use impl='torch'" in lines[2]
