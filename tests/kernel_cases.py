"""What the kernels must satisfy, run with impl="torch" here and "triton" in a process of its own.

The budget of an error: what the same formula in plain torch, in the same type, is wrong by against
float64, times two for another order of summation, plus a small constant.
"""

import sys

import torch

from kernels.advantage import BASELINES, SCALES, group_advantage
from kernels.logprob import linear_logprob, linear_policy_loss

TIES_EVERY = 500
SHAPES = [(1, 24, 1003), (7, 24, 1003), (33, 24, 1003), (7, 24, 17), (3, 8, 151_936)]


def inputs(M, D, V, size=1.0, device="cpu", dtype=torch.float32):
    random = torch.Generator().manual_seed(M * V)
    hidden = torch.randn(M, D, generator=random) * size
    weight = torch.randn(V, D, generator=random)
    targets = torch.randint(V, (M,), generator=random)
    targets[0], targets[-1] = 0, V - 1
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def reference(hidden, weight, targets, temperature):
    """Log-prob and entropy by plain autograd, in the inputs' own type, logits in fp32 or better."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T / temperature
    log_p = logits.log_softmax(-1)
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    return logprob, -(log_p.exp() * log_p).sum(-1)


def results(function, hidden, weight, a, b):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprob, entropy = function(hidden, weight)
    ((logprob * a.to(logprob)).sum() + (entropy * b.to(entropy)).sum()).backward()
    return {"logprob": logprob, "entropy": entropy, "dh": hidden.grad, "dw": weight.grad}


def within_budget(got, plain, exact, constant=1e-6):
    for name, value in got.items():
        truth = exact[name].double()
        size = truth.abs().max().clamp(min=1)
        error = (value.double() - truth).abs().max()
        allowed = 2 * (plain[name].double() - truth).abs().max() + constant * size
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def linear_logprob_is_exact(impl, device, dtype=torch.float32):
    for M, D, V in SHAPES:
        for temperature, size in ((1.0, 1.0), (0.7, 1.0), (1.5, 1.0), (1.0, 2000.0)):
            hidden, weight, targets = inputs(M, D, V, size, device, dtype)
            random = torch.Generator().manual_seed(0)
            a = torch.randn(M, generator=random).to(device)
            b = torch.randn(M, generator=random).to(device)

            def exact(h, w, targets=targets, T=temperature):
                return reference(h, w, targets, T)

            def ours(h, w, targets=targets, T=temperature):
                return linear_logprob(h, w, targets, T, impl)

            truth = results(exact, hidden.double(), weight.double(), a, b)
            within_budget(
                results(ours, hidden, weight, a, b), results(exact, hidden, weight, a, b), truth
            )


def policy_loss_is_exact(impl, device, dtype=torch.float32):
    """Value and gradients of the whole loss against float64 autograd of the formula."""
    for M, D, V in SHAPES:
        hidden, weight, targets = inputs(M, D, V, 1.0, device, dtype)
        random = torch.Generator().manual_seed(1)
        A, w = (torch.randn(2, M, generator=random)).to(device)
        w = w.abs() / M
        shift = torch.randn(3, M, generator=random).to(device) * 0.3
        logprob = reference(hidden.double(), weight.double(), targets, 0.7)[0]
        old, ref, sampler = (logprob + s for s in shift)
        given = {"old_logprobs": old, "ref_logprobs": ref, "sampler_logprobs": sampler}

        def formula(h, x, targets=targets, old=old, ref=ref, sampler=sampler, A=A, w=w):
            lp, H = reference(h, x, targets, 0.7)
            ratio = (lp - old).exp()
            c = (old - sampler).exp().clamp(max=1.2)
            surrogate = c * torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.3))
            kl = ratio.detach() * (lp - ref).detach() * lp  # the gradient that is promised
            return (w * (surrogate + 0.1 * kl - 0.05 * H)).sum()

        def ours(h, x, targets=targets, given=given, A=A, w=w):
            settings = {"clip": (0.2, 0.3), "kl": 0.1, "entropy": 0.05, "importance_cap": 1.2}
            return linear_policy_loss(
                h, x, targets, A, w, temperature=0.7, impl=impl, **settings, **given
            )[0]

        grads = []
        for function, kind in ((formula, torch.float64), (ours, dtype), (formula, dtype)):
            h, x = (t.to(kind).clone().requires_grad_() for t in (hidden, weight))
            function(h, x).backward()
            grads.append({"dh": h.grad, "dw": x.grad})
        within_budget(grads[1], grads[2], grads[0])


def advantages_agree_with_float64(impl, device, dtype=torch.float32):
    random = torch.Generator().manual_seed(2)
    for P, N in ((1, 1), (5, 2), (7, 8), (3, 33)):
        rewards = torch.rand(P, N, generator=random) * 100
        rewards[torch.rand(P, N, generator=random) < 0.2] = torch.nan
        rewards = rewards.to(device)
        for scale in SCALES:
            for baseline in BASELINES:
                got = group_advantage(rewards, scale, baseline, impl)
                want = advantage_by_hand(rewards.double().cpu(), scale, baseline)
                torch.testing.assert_close(got.cpu().double(), want, atol=1e-4, rtol=1e-4)


def advantage_by_hand(rewards, scale, baseline):
    advantages = torch.zeros_like(rewards)
    squares, counted = 0.0, 0
    for p, group in enumerate(rewards):
        known = [i for i, r in enumerate(group.tolist()) if r == r]
        counted += len(known)
        if len(known) < 2:
            continue
        values = group[known]
        squares += (values - values.mean()).square().sum().item()
        for i in known:
            others = values if baseline == "mean" else group[[j for j in known if j != i]]
            advantages[p, i] = group[i] - others.mean()
        if scale == "std":
            advantages[p] /= values.std() + 1e-6
    if scale == "batch":
        advantages /= (squares / max(counted - 1, 1)) ** 0.5 + 1e-6
    return advantages


def ties_give_exactly_zero(impl, device, dtype=torch.float32):
    """10,000 random constants, 51.33 among them, at several sizes of groups and types; in the
    interpreter, which is slow, some of them."""
    random = torch.Generator().manual_seed(3)
    constants = torch.cat((torch.tensor([51.33]), torch.randn(9999, generator=random) * 50))
    for N in (1, 3, 8, 11):
        for kind in (torch.float32, torch.bfloat16, torch.float64):
            rewards = constants[:, None].expand(-1, N).to(device, kind)
            if impl == "triton":
                rewards = rewards[:: 1 if rewards.is_cuda else TIES_EVERY]
            for scale in SCALES:
                for baseline in BASELINES:
                    assert (group_advantage(rewards, scale, baseline, impl) == 0).all()


CASES = [
    linear_logprob_is_exact,
    policy_loss_is_exact,
    advantages_agree_with_float64,
    ties_give_exactly_zero,
]

if __name__ == "__main__":  # TRITON_INTERPRET=1 python -m tests.kernel_cases triton cpu
    torch.set_num_threads(1)
    TIES_EVERY = int((*sys.argv, TIES_EVERY)[3])
    for case in CASES:
        case(sys.argv[1], sys.argv[2])
        print(case.__name__)
