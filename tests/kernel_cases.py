"""What the kernels must satisfy: run here with impl="torch", and with impl="triton" on a GPU or in
a process of the interpreter.

Error budget: twice the error that the same formula in plain torch and the same dtype has against
float64 (another order of summation), plus a small constant.
"""

import torch

from kernels.advantage import BASELINES, SCALES, group_advantage
from kernels.decode import decode_attention
from kernels.logprob import linear_logprob, linear_policy_loss

LARGE = {"torch": 151_936, "triton": 9_001}  # several blocks of each kernel; slow to interpret


def shapes(impl):
    return [(1, 24, 1003), (33, 24, 1003), (7, 24, 17), (3, 8, LARGE[impl])]


def strided(x):
    """The same numbers, not side by side in memory."""
    return torch.stack((x, x), -1)[..., 0]


def inputs(M, D, V, size=1.0, device="cpu", dtype=torch.float32):
    random = torch.Generator().manual_seed(M * V)
    hidden = torch.randn(M, D, generator=random) * size
    weight = torch.randn(V, D, generator=random)
    targets = torch.randint(V, (M,), generator=random)
    targets[0], targets[-1] = 0, V - 1
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def reference(hidden, weight, targets, temperature):
    """Log-prob and entropy in plain torch, with logits in fp32 or better."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T / temperature
    log_p = logits.log_softmax(-1)
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    return logprob, -(log_p.exp() * log_p).sum(-1)


def assert_within_budget(ours, plain, hidden, weight, constant=1e-6):
    """Compare the values and gradients of `ours` with `plain`; both give (loss, values)."""
    results = []
    for function, dtype in ((ours, hidden.dtype), (plain, hidden.dtype), (plain, torch.float64)):
        h, w = (x.detach().to(dtype).clone().requires_grad_() for x in (hidden, weight))
        loss, values = function(h, w)
        loss.backward()
        results.append([x.detach().double() for x in (*values, h.grad, w.grad)])
    for i, (got, same, truth) in enumerate(zip(*results, strict=True)):
        budget = 2 * (same - truth).abs().max() + constant * truth.abs().max().clamp(min=1)
        error = (got - truth).abs().max()
        assert error <= budget, f"result {i}: {error:.2e} > {budget:.2e}"


def linear_logprob_is_exact(impl, device, dtype=torch.float32):
    for M, D, V in shapes(impl):
        for temperature, size in ((1.0, 1.0), (0.7, 1.0), (1.0, 2000.0)):
            hidden, weight, targets = inputs(M, D, V, size, device, dtype)
            a, b = torch.randn(2, M, generator=torch.Generator().manual_seed(0)).to(device)

            def weighted(function, *more, a=a, b=b, targets=targets, T=temperature):
                def run(h, w):
                    logprob, entropy = function(h, strided(w), strided(targets), T, *more)
                    loss = (logprob * a.to(logprob)).sum() + (entropy * b.to(entropy)).sum()
                    return loss, (logprob, entropy)

                return run

            assert_within_budget(
                weighted(linear_logprob, impl), weighted(reference), hidden, weight
            )


def policy_loss_is_exact(impl, device, dtype=torch.float32):
    for M, D, V in shapes(impl):
        hidden, weight, targets = inputs(M, D, V, 1.0, device, dtype)
        random = torch.Generator().manual_seed(1)
        A, w = torch.randn(2, M, generator=random).to(device)
        w = w.abs() / M
        logprob = reference(hidden.double(), weight.double(), targets, 0.7)[0]
        old, ref = logprob + 0.3 * torch.randn(2, M, generator=random).to(device)

        def formula(h, x, targets=targets, old=old, ref=ref, A=A, w=w):
            lp, _ = reference(h, x, targets, 0.7)
            ratio = (lp - old).exp()
            surrogate = torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.3))
            kl = ratio.detach() * (lp - ref).detach() * lp  # has the documented gradient
            return (w * (surrogate + 0.1 * kl)).sum(), ()

        def ours(h, x, targets=targets, old=old, ref=ref, A=A, w=w):
            logprobs = {"old_logprobs": old, "ref_logprobs": ref}
            settings = {"clip": (0.2, 0.3), "kl": 0.1, "temperature": 0.7, "impl": impl}
            return linear_policy_loss(h, x, targets, A, w, **logprobs, **settings)[0], ()

        assert_within_budget(ours, formula, hidden, weight)


def advantages_agree_with_float64(impl, device, dtype=torch.float32):
    random = torch.Generator().manual_seed(2)
    for P, N in ((1, 1), (5, 2), (7, 8), (3, 33)):
        rewards = torch.rand(P, N, generator=random) * 100
        rewards[torch.rand(P, N, generator=random) < 0.2] = torch.nan
        for scale in SCALES:
            for baseline in BASELINES:
                want = advantage_by_hand(rewards.double(), scale, baseline)
                for kind, error in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
                    got = group_advantage(rewards.to(device, kind), scale, baseline, impl)
                    torch.testing.assert_close(got.cpu().double(), want, atol=error, rtol=error)


def advantage_by_hand(rewards, scale, baseline):
    advantages, deviations = torch.zeros_like(rewards), []
    for p, group in enumerate(rewards):
        present = [i for i, r in enumerate(group.tolist()) if r == r]
        values = group[present]
        deviations.append(values - values.mean())
        for i in present if len(present) > 1 else []:
            others = present if baseline == "mean" else [j for j in present if j != i]
            advantages[p, i] = group[i] - group[others].mean()
        if scale == "std" and len(present) > 1:
            advantages[p] /= values.std() + 1e-6
    everything = torch.cat(deviations)
    if scale == "batch":
        spread = everything.square().sum() / max(len(everything) - 1, 1)
        advantages /= spread.sqrt() + 1e-6
    return advantages


def ties_give_exactly_zero(impl, device, dtype=torch.float32):
    """Random constants, 51.33 among them; few in the interpreter, which is slow."""
    count = 4 if impl == "triton" and device == "cpu" else 10_000
    random = torch.Generator().manual_seed(3)
    constants = torch.cat((torch.tensor([51.33]), torch.randn(count - 1, generator=random) * 50))
    for N in (1, 3, 8, 11):
        for kind in (torch.float32, torch.bfloat16, torch.float64):
            rewards = constants[:, None].expand(-1, N).to(device, kind)
            for scale in SCALES:
                for baseline in BASELINES:
                    assert (group_advantage(rewards, scale, baseline, impl) == 0).all()


def decode_attention_is_exact(impl, device, dtype=torch.float32):
    """Beside float64: sequences of any length, the shortest and longest among them; one span and
    several; new keys and values are in the cache, and nothing else of it has changed."""
    random = torch.Generator().manual_seed(4)
    B, S, K, L = 3, 4, 2, 330
    types = [dtype] if device == "cuda" or impl == "torch" else [dtype, torch.float16]
    for kind in types:
        for H, E, width, longest in ((14, 16, 300, 299), (2, 24, 64, 63), (8, 16, 330, 130)):
            lengths = torch.tensor([0, longest // 2, longest], device=device)
            qkv = torch.randn(B, 1, H + 2 * K, E, generator=random).to(device, kind)
            cache = torch.randn(2, S, K, L, E, generator=random).to(device, kind)
            results = []
            for how, wide in ((impl, kind), ("torch", kind), ("torch", torch.float64)):
                after = cache.to(wide).clone()
                q, k, v = qkv.to(wide).split((H, K, K), dim=2)  # not contiguous, as in the model
                y = decode_attention(q, k, v, after, lengths, width, how)
                results.append((y.double(), after.double()))
            (got, ours), (same, _), (truth, theirs) = results
            assert torch.equal(ours, theirs)
            written = (ours != cache.double()).any(-1)  # (2, S, K, L)
            want = torch.zeros_like(written)
            want[:, torch.arange(B), :, lengths] = True
            assert torch.equal(written, want)
            budget = 2 * (same - truth).abs().max() + 1e-6
            assert (got - truth).abs().max() <= budget


CASES = [
    linear_logprob_is_exact,
    policy_loss_is_exact,
    advantages_agree_with_float64,
    ties_give_exactly_zero,
    decode_attention_is_exact,
]

if __name__ == "__main__":  # TRITON_INTERPRET=1 python -m tests.kernel_cases
    torch.set_num_threads(1)
    for case in CASES:
        case("triton", "cpu")
        print(case.__name__)
