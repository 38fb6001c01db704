"""Log-probs and the GRPO loss from hidden states, without ever materialising all logits.

With V = 152,000 the fp32 logits of 16,000 tokens take 10 GB, their log-softmax and its gradient as
much again each. Here they exist for one chunk of rows at a time:

    logprob, entropy = linear_logprob(hidden, weight, targets)      # differentiable
    loss, stats = linear_policy_loss(hidden, weight, targets, advantages, weights)

Derivation. For one row let z = (W h) / T be the logits at temperature T, m = max z,
s = Σ exp(z - m), and

    log p_j = z_j - m - log s        H = -Σ p_j log p_j = log s - Σ p_j (z_j - m)

(m and log s are kept apart: at |z| = 10,000 their sum would be rounded to a thousandth.) With
d log p_t / dz_j = [j = t] - p_j  and  dH / dz_j = -p_j (log p_j + H), a loss that reaches this row
through a = dL/d log p_t and b = dL/dH has

    dL/dz_j = a ([j = t] - p_j) - b p_j (log p_j + H)
    dL/dh = W' dL/dz / T        dL/dW = dL/dz h' / T

`linear_logprob` recomputes the logits in the backward pass, when a and b are known (8·M·D·V flops).
`linear_policy_loss` knows its loss, so it computes the gradient in the forward pass while a chunk's
logits are at hand (6·M·D·V flops), and the backward pass only scales it.

Matrix products are the vendor's, with fp32 output. Between them, one pass over the chunk forward
and one backward are a Triton kernel each; on a CPU plain torch does the same.

Letters: M rows (tokens), D width, V vocabulary, R rows of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists on Linux only; impl="torch" does not need it
    triton = None

CHUNK_BYTES = {"cpu": 160e6, "cuda": 640e6}  # of one chunk's fp32 logits


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """hidden (M, D), weight (V, D), targets (M,) -> log-prob (M,) of the targets, entropy (M,).

    Both in fp32 (fp64 for fp64 input), both differentiable in hidden and weight.
    """
    impl = check_inputs(hidden, weight, targets, temperature, impl)
    return LinearLogprob.apply(hidden, weight, targets, temperature, impl)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    kl: float = 0.0,
    temperature: float = 1.0,
    sampler_logprobs: Tensor | None = None,
    entropy_bonus: float = 0.0,
    importance_cap: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO loss of M completion tokens, and its statistics.

        loss = Σ_i w_i (c_i max(-A_i r_i, -A_i clip(r_i, 1 - low, 1 + high))
                        + kl · KL_i - entropy_bonus · H_i)

    `weights` (M,) w_i carry the denominator: 1 / (all completion tokens of the step, over every
    micro-batch and rank) for a token-normalised loss. Losses, gradients and statistics of
    micro-batches then simply add up, however the step is split.

    r_i = exp(log p - old). Without `old_logprobs` the step is strictly on-policy: r is exactly 1
    and its gradient that of log p, even if sampler and trainer round differently.

    c_i = min(exp(old - sampler), importance_cap), a constant, corrects for a sampler whose
    probabilities differ from the trainer's (truncated importance sampling); 1 without a cap.

    KL_i to `ref_logprobs` is valued by k3 = e^x - 1 - x with x = ref - log p: never negative and
    unbiased. The gradient of k3 is not that of the KL: over samples of the policy its mean is that
    of the reversed KL. The gradient used is r (log p - ref) d log p, whose mean is exactly that of
    KL(policy || ref); so with kl > 0 `loss` is for logging and backward() is not its derivative.

    Statistics, all Σ_i w_i x_i but the maximum: logprob, entropy, kl, clipped (share of tokens
    whose gradient the clip removed), sampler_gap and sampler_gap_max (|log p - sampler's|); with a
    cap importance_ratio, before it is capped, and importance_capped (share of tokens).
    """
    impl = check_inputs(hidden, weight, targets, temperature, impl)
    columns = [advantages, weights, old_logprobs, ref_logprobs, sampler_logprobs]
    for column in columns:
        if column is not None and column.shape != targets.shape:
            raise ValueError(
                f"advantages, weights and log-probs must have the shape {tuple(targets.shape)} of "
                f"targets, not {tuple(column.shape)}"
            )
    if kl and ref_logprobs is None:
        raise ValueError(f"kl={kl} needs ref_logprobs")

    with torch.no_grad():
        chunks = Chunks(hidden, weight, targets, temperature, impl)
        chunks.start_gradients()
        loss, stats = chunks.hidden.new_zeros(()).float(), {}
        for part in chunks.parts():
            logprob, entropy, saved = chunks.forward(part)
            here = [None if x is None else x[part].to(entropy.dtype) for x in columns]
            value, values, *slopes = policy_loss(
                logprob, entropy, *here, clip, kl, entropy_bonus, importance_cap
            )
            chunks.backward(part, saved, *slopes)
            del saved  # before the next chunk allocates as much
            loss = loss + value
            for name, x in values.items():
                combine = torch.maximum if name.endswith("_max") else torch.add
                stats[name] = combine(stats[name], x) if name in stats else x
    gradients = chunks.d_hidden.to(hidden.dtype), chunks.d_weight.to(weight.dtype)
    return PrecomputedGradient.apply(hidden, weight, loss, *gradients), stats


def policy_loss(logprob, entropy, A, w, old, ref, sampler, clip, kl, entropy_bonus, importance_cap):
    """Loss of some rows (R,), its statistics, dL/d log p and dL/dH (R,)."""
    stats = {"logprob": w * logprob, "entropy": w * entropy}
    if importance_cap:
        importance = ((logprob if old is None else old) - sampler).exp()
        A = A * importance.clamp(max=importance_cap)
        is_capped = importance > importance_cap
        stats |= {"importance_ratio": w * importance, "importance_capped": w * is_capped}
    ratio = torch.ones_like(logprob) if old is None else (logprob - old).exp()
    clipped_ratio = ratio.clamp(1 - clip[0], 1 + clip[1])
    is_clipped = -A * clipped_ratio > -A * ratio
    loss = w * torch.maximum(-A * ratio, -A * clipped_ratio) - entropy_bonus * stats["entropy"]
    d_logprob = w * torch.where(is_clipped, 0.0, -A * ratio)
    stats["clipped"] = w * is_clipped
    if ref is not None:
        gap = ref - logprob
        stats["kl"] = w * (gap.exp() - 1 - gap)
        loss = loss + kl * stats["kl"]
        d_logprob = d_logprob - kl * w * ratio * gap
    stats = {name: value.sum() for name, value in stats.items()}
    if sampler is not None:
        gap = (logprob - sampler).abs()
        stats["sampler_gap"] = (w * gap).sum()
        stats["sampler_gap_max"] = (gap * (w != 0)).amax()
    return loss.sum(), stats, d_logprob, -entropy_bonus * w if entropy_bonus else None


def check_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature, impl: str) -> str:
    """Refuse inputs that would give a wrong number; return the implementation to use."""
    shapes = [(tuple(x.shape), x.dtype) for x in (hidden, weight, targets)]
    if hidden.shape != (*targets.shape, weight.shape[1]) or targets.dtype != torch.int64:
        raise ValueError(f"hidden (M, D), weight (V, D) and int64 targets (M,) are {shapes}")
    if not temperature > 0 or impl not in ("auto", "torch", "triton"):
        raise ValueError(f"temperature={temperature} must be above 0, and impl={impl!r} be auto, "
                         "torch or triton")  # fmt: skip
    is_inside = (targets >= 0) & (targets < weight.shape[0])  # reading it would stall a GPU
    torch._assert_async(is_inside.all(), "a target is outside the vocabulary")
    if impl == "auto":
        usable = triton is not None and hidden.is_cuda and hidden.dtype != torch.float64
        return "triton" if usable else "torch"
    return impl


# ------------------------------------------------------------------ one chunk in plain torch


def rows_torch(z: Tensor, targets: Tensor, temperature: float):
    """Logits (R, V), overwritten -> log-prob (R,), entropy (R,), tensors for the backward."""
    if temperature != 1:
        z.div_(temperature)
    log_p = z.log_softmax(-1)
    p = torch.exp(log_p, out=z)
    # log_softmax sums V terms sequentially and is 5e-6 off at V = 152,000. `sum` adds pairwise, so
    # the deviation of Σ p from 1 is that error, and is corrected row by row.
    total = p.sum(-1)
    logprob = log_p.gather(1, targets[:, None])[:, 0] - total.log()
    slices = zip(p.split(64), log_p.split(64), strict=True)  # no third (R, V)
    entropy = total.log() - torch.cat([(x * y).sum(-1) for x, y in slices]) / total
    return logprob, entropy, (p, log_p, entropy, total)


def rows_back_torch(saved, targets: Tensor, a: Tensor, b: Tensor | None, temperature: float):
    """a = dL/d log p, b = dL/dH (None: 0) -> dL/d(W h) (R, V), in the memory of the saved p."""
    p, log_p, entropy, total = saved
    factor = -1 / (total * temperature)
    if b is None:
        dz = p.mul_((a * factor)[:, None])
    else:
        slope = log_p.add_((entropy - total.log())[:, None]).mul_(b[:, None]).add_(a[:, None])
        dz = p.mul_(slope.mul_(factor[:, None]))
    index = torch.arange(len(targets), device=dz.device)
    dz[index, targets] += a / temperature
    return dz


# ------------------------------------------------------------------------ one chunk in Triton

if triton is not None:

    @triton.jit
    def row_kernel(
        logits, targets, logprobs, entropies, peaks, log_sums, scale,
        V: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per row, one pass: sums are rescaled when a block raises the maximum.

        With z' = z - m: s = Σ e^z', u = Σ z' e^z', and for a new maximum m* = m - δ (δ <= 0)
        s* = e^δ s and u* = e^δ (u + δ s).
        """
        row = tl.program_id(0).to(tl.int64)
        m = -1e38  # finite: the first δ times an empty sum must be 0, not NaN
        s = 0.0
        u = 0.0
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < V
            z = tl.load(logits + row * V + column, mask=inside, other=float("-inf"))
            z = z.to(tl.float32) * scale
            m_new = tl.maximum(m, tl.max(z, 0))
            delta = m - m_new
            z = tl.where(inside, z - m_new, 0.0)
            e = tl.where(inside, tl.exp(z), 0.0)
            shrink = tl.exp(delta)
            u = shrink * (u + delta * s) + tl.sum(z * e, 0)
            s = shrink * s + tl.sum(e, 0)
            m = m_new
        target = tl.load(targets + row)
        z_target = tl.load(logits + row * V + target).to(tl.float32) * scale
        log_sum = tl.log(s)
        tl.store(logprobs + row, z_target - m - log_sum)
        tl.store(entropies + row, log_sum - u / s)
        tl.store(peaks + row, m)
        tl.store(log_sums + row, log_sum)

    @triton.jit
    def gradient_kernel(
        logits, gradient, targets, entropies, peaks, log_sums, a_rows, b_rows, scale,
        V: tl.constexpr, BLOCK: tl.constexpr, HAS_B: tl.constexpr,
    ):  # fmt: skip
        """One program per row and block. `gradient` may alias `logits`."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < V
        z = tl.load(logits + row * V + column, mask=inside, other=0.0).to(tl.float32) * scale
        log_p = z - tl.load(peaks + row) - tl.load(log_sums + row)
        a = tl.load(a_rows + row)
        slope = a
        if HAS_B:
            slope = a + tl.load(b_rows + row) * (log_p + tl.load(entropies + row))
        target = tl.load(targets + row)
        dz = tl.where(column == target, a, 0.0) - tl.exp(log_p) * slope
        dz = (dz * scale).to(gradient.dtype.element_ty)
        tl.store(gradient + row * V + column, dz, mask=inside)


def rows_triton(z: Tensor, targets: Tensor, temperature: float):
    R, V = z.shape
    logprob, entropy, peak, log_sum = z.new_empty(4, R)
    block = min(8192, triton.next_power_of_2(V))
    row_kernel[(R,)](
        z, targets, logprob, entropy, peak, log_sum, 1 / temperature, V, block, num_warps=8
    )
    return logprob, entropy, (z, entropy, peak, log_sum)


def rows_back_triton(saved, targets: Tensor, a: Tensor, b: Tensor | None, temperature, dtype):
    z, entropy, peak, log_sum = saved
    R, V = z.shape
    dz = z if dtype == z.dtype else torch.empty_like(z, dtype=dtype)
    block = min(4096, triton.next_power_of_2(V))
    a = a.contiguous()
    b_rows = a if b is None else b.contiguous()
    grid = (R, triton.cdiv(V, block))
    gradient_kernel[grid](
        z, dz, targets, entropy, peak, log_sum, a, b_rows, 1 / temperature, V, block, b is not None
    )
    return dz


# ------------------------------------------------------------------------ chunks and autograd


class Chunks:
    """The matrix products around the rows: in half precision on CUDA, else in fp32 or fp64."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature, impl: str):
        dtype = hidden.dtype
        self.half = hidden.is_cuda and dtype in (torch.bfloat16, torch.float16)
        if not self.half:  # no fp32 output from half products off CUDA: widen once, not per chunk
            dtype = torch.promote_types(dtype, torch.float32)
        self.hidden, self.weight = hidden.detach().to(dtype), weight.detach().to(dtype)
        self.targets, self.temperature, self.impl = targets.contiguous(), temperature, impl

    def start_gradients(self) -> None:
        self.d_hidden = torch.empty_like(self.hidden)
        self.d_weight = torch.zeros_like(self.weight)

    def parts(self):
        M, V = self.hidden.shape[0], self.weight.shape[0]
        rows = max(1, int(CHUNK_BYTES.get(self.hidden.device.type, 160e6)) // (4 * V))
        rows = -(-M // -(-M // rows)) if M else 1  # as few chunks, of even size
        return (slice(i, min(i + rows, M)) for i in range(0, M, rows))

    def forward(self, part: slice):
        h, targets = self.hidden[part], self.targets[part]
        if self.half:
            z = torch.mm(h, self.weight.t(), out_dtype=torch.float32)
        else:
            z = F.linear(h, self.weight)
        rows = rows_triton if self.impl == "triton" else rows_torch
        return rows(z, targets, self.temperature)

    def backward(self, part: slice, saved, a: Tensor, b: Tensor | None) -> None:
        """Add a chunk's gradients to `d_hidden` and `d_weight`."""
        targets, temperature, dtype = self.targets[part], self.temperature, self.weight.dtype
        if self.impl == "triton":
            dz = rows_back_triton(saved, targets, a, b, temperature, dtype)
        else:
            dz = rows_back_torch(saved, targets, a, b, temperature).to(dtype)
        torch.mm(dz, self.weight, out=self.d_hidden[part])
        self.d_weight.addmm_(dz.t(), self.hidden[part])


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, impl):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.settings = temperature, impl
        chunks = Chunks(hidden, weight, targets, temperature, impl)
        empty = chunks.hidden.new_zeros(0)
        results = [(empty, empty), *(chunks.forward(part)[:2] for part in chunks.parts())]
        logprobs, entropies = zip(*results, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    @staticmethod
    def backward(ctx, a, b):
        hidden, weight, targets = ctx.saved_tensors
        chunks = Chunks(hidden, weight, targets, *ctx.settings)
        chunks.start_gradients()
        for part in chunks.parts():
            saved = chunks.forward(part)[2]  # the logits again: 2·M·D·V flops
            chunks.backward(part, saved, a[part], b[part])
            del saved  # before the next chunk allocates as much
        return chunks.d_hidden.to(hidden.dtype), chunks.d_weight.to(weight.dtype), None, None, None


class PrecomputedGradient(torch.autograd.Function):
    """A loss whose gradient is known: backward() scales it by the incoming gradient.

    In place, and only once: a second (V, D) matrix would undo what the chunks save.
    """

    @staticmethod
    def forward(ctx, hidden, weight, loss, d_hidden, d_weight):
        ctx.gradients = [d_hidden, d_weight]
        return loss.clone()

    @staticmethod
    def backward(ctx, incoming):
        if not ctx.gradients:
            raise RuntimeError("linear_policy_loss: backward() works once, its gradient is spent")
        d_weight, d_hidden = ctx.gradients.pop(), ctx.gradients.pop()
        return d_hidden.mul_(incoming), d_weight.mul_(incoming), None, None, None
