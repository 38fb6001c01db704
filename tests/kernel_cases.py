"""What the kernels must satisfy: run here with impl="torch", and with impl="triton" on a GPU or in
a process of the interpreter.

Error budget: twice the error that the same formula in plain torch and the same dtype has against
float64 (another order of summation), plus a small constant.
"""

from dataclasses import replace
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import fused
from kernels.advantage import BASELINES, SCALES, group_advantage
from kernels.decode import decode_attention
from kernels.logprob import linear_logprob, linear_policy_loss
from model import Config, RMSNorm, Transformer, rotate
from sampler import CustomDecode, SamplingParams, block_sums_torch, draw

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


@torch.no_grad()
def fused_operators_round_as_the_model_does(device, dtype):
    """Within the budget; in 16 bits nearly everywhere the very same number."""
    random = torch.Generator().manual_seed(5)
    for H, K, E, has_norm in ((3, 1, 34, True), (4, 2, 16, False), (2, 2, 128, True)):
        D = 24 * H
        shapes = [(3, 2, D), (3, 2, D), (3, 2, 2 * D), (3, 2, H + 2 * K, E), (3, 2, 1, E // 2)]
        *tensors, angle = (torch.randn(shape, generator=random) for shape in shapes)
        tensors += [torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin)]
        tensors = [x.to(device, dtype) for x in tensors]
        norms = [RMSNorm(size, 1e-5) for size in (D, E, E)]
        for norm in norms:
            torch.nn.init.normal_(norm.weight, 1.0, 0.5, generator=random)
            norm.to(device, dtype)
        norms = norms if has_norm else [norms[0], None, None]
        same = by_the_model(tensors, norms, H, K)
        truth = by_the_model([x.double() for x in tensors], norms, H, K)
        x, added, gate_up, qkv, *rope = tensors
        normed = fused.add_norm(x, added, norms[0])
        fused.norm_rope(qkv, H, K, *norms[1:], *rope)
        got = x, normed, qkv, fused.silu_mul(gate_up)
        for one, other, exact in zip(got, same, truth, strict=True):
            budget = 2 * (other - exact).abs().max() + 1e-6
            assert (one - exact).abs().max() <= budget
            assert dtype == torch.float32 or (one == other).float().mean() > 0.97


def by_the_model(tensors, norms, H, K) -> tuple:
    x, added, gate_up, qkv, *rope = tensors
    q, k, v = qkv.split((H, K, K), dim=2)
    if norms[1] is not None:
        q, k = norms[1](q), norms[2](k)
    qkv = torch.cat((rotate(torch.cat((q, k), dim=2), *rope), v), dim=2)
    gate, up = gate_up.chunk(2, dim=-1)
    return x + added, norms[0](x + added), qkv, F.silu(gate) * up


class Launches(TorchDispatchMode):
    """Counts PyTorch's operators that are neither views nor allocations, and Triton kernels."""

    kernel_type = type(getattr(fused, "silu_mul_kernel", None))  # compiled, or interpreted
    count, in_kernel = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_free = function.is_view or any(x in function._schema.name for x in ("empty", "_view"))
        self.count += not (is_free or self.in_kernel)
        return function(*args, **(kwargs or {}))

    def count_kernels(self):
        launch = self.kernel_type.__getitem__

        def counted(kernel, grid):
            def run(*args, **options):
                self.count, self.in_kernel = self.count + 1, True  # the interpreter uses PyTorch
                launch(kernel, grid)(*args, **options)
                self.in_kernel = False

            return run

        return mock.patch.object(self.kernel_type, "__getitem__", counted)


@torch.no_grad()
def fused_blocks_are_ten_launches_a_layer(device, dtype):
    """A decoding step of models of 2 and 3 layers, beside the plain path."""
    small = Config("qwen3", 99, 40, 48, 2, 4, 2, 16, 512, True, norm_eps=1e-5)
    lengths, ids = torch.tensor([[5, 139], [4, 7]], device=device)
    counts, random = {}, torch.Generator().manual_seed(6)
    for layers in (2, 3):
        model = Transformer(replace(small, layers=layers))
        for p in model.parameters():
            p.normal_(float(p.dim() == 1), 0.3, generator=random)
        model = model.to(device, dtype)
        past = torch.randn(layers, 2, 2, 2, 150, 16, generator=random).to(device, dtype)
        results = []
        for blocks in (None, fused.decode_blocks):
            model.decode_blocks = blocks
            after, launches = past.clone(), Launches()
            view = CustomDecode(after, lengths, 140, partial(decode_attention, impl="triton"))
            with launches.count_kernels(), launches:
                hidden = model(ids[:, None], lengths[:, None], cache=view)
            results.append((hidden, after))
            counts[layers, blocks is not None] = launches.count
        budget = 1e-5 if dtype == torch.float32 else 0.05
        for want, got in zip(*results, strict=True):
            atol = budget * want.abs().max().item()
            torch.testing.assert_close(got, want, atol=atol, rtol=0)
    plain, ours = (counts[3, is_fused] - counts[2, is_fused] for is_fused in (False, True))
    assert ours == 10 < plain, (ours, plain)


def block_sums_give_the_same_draws(device, dtype):
    """With banned tokens, a block of nothing else, and large logits; beside float64."""
    random = torch.Generator().manual_seed(7)
    for V, size, spread in ((1003, 59, 3.0), (9000, 500, 3.0), (4096, 512, 3000.0)):
        logits = torch.randn(3, V, generator=random) * spread
        logits[:, torch.rand(V, generator=random) < 0.3] = -torch.inf
        logits[0, :size] = -torch.inf
        logits = logits.to(device)
        for temperature in (1.0, 0.7):
            got = fused.block_sums(logits, size, 1 / temperature)
            want = block_sums_torch(logits.double(), size, 1 / temperature)
            assert torch.equal(got[0].double(), want[0]) and got[1][0, 0] == 0
            torch.testing.assert_close(got[1].double(), want[1], atol=1e-6, rtol=1e-5)
            params = SamplingParams(temperature)
            uniform = torch.rand(3, generator=random, dtype=torch.float64).to(device)
            tokens, logprobs = draw(logits, uniform, params, fused.block_sums)
            theirs, exact = draw(logits.double(), uniform, params)
            assert torch.equal(tokens, theirs)
            assert logits.gather(1, tokens[:, None]).isfinite().all()
            torch.testing.assert_close(logprobs.double(), exact, atol=1e-5, rtol=1e-5)


CASES = [  # of impl, device and dtype
    linear_logprob_is_exact,
    policy_loss_is_exact,
    advantages_agree_with_float64,
    ties_give_exactly_zero,
    decode_attention_is_exact,
]
FUSED_CASES = [  # of device and dtype: model.py and sampler.py are their references
    fused_operators_round_as_the_model_does,
    fused_blocks_are_ten_launches_a_layer,
    block_sums_give_the_same_draws,
]

if __name__ == "__main__":  # TRITON_INTERPRET=1 python -m tests.kernel_cases
    torch.set_num_threads(1)
    for case in CASES:
        case("triton", "cpu")
        print(case.__name__)
    for case in FUSED_CASES:
        case("cpu", torch.float32)
        if case is FUSED_CASES[0]:
            case("cpu", torch.float16)  # the interpreter has no bf16
        print(case.__name__)
