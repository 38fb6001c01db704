"""The small operators of a decoding step, each in one launch.

    hidden = decode_blocks(model, x, rope, cache)      # the blocks and last norm of a Transformer
    maxima, sums = block_sums(logits, size, scale)     # what `sampler.draw` needs of all logits

With one token per sequence an operator takes less time than its launch. A block in ten launches:

    q, k, v product | q and k norms, rope | attention (2) | output product | add, norm |
    gate and up product | SiLU(gate)·up | down product | add, norm of the next block

An add belongs to the norm that follows it, so the first norm stands before the blocks. Results are
rounded to the activations' dtype where model.py, their reference, rounds them, so that the sampler
stays as close to the trainer as without these kernels. They have no backward.

Letters: B sequences, T tokens (1), M = B·T rows, D width, H query heads, K key/value heads,
E head size, V vocabulary.
"""

import torch
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists on Linux only; without it nothing here works
    triton = None


def decode_blocks(model, x: Tensor, rope: tuple[Tensor, Tensor], cache) -> Tensor:
    """`model.blocks` and `model.norm`: embeddings x (B, T, D), overwritten, -> hidden (B, T, D).

    The parts of a block and `cache.attend` are those of model.py; rope is (B, T, 1, E) each.
    """
    first, *others = model.blocks
    following_norms = [*(block.attention_norm for block in others), model.norm]
    normed = first.attention_norm(x)
    for block, following_norm in zip(model.blocks, following_norms, strict=True):
        attention, mlp = block.attention, block.mlp
        H, K, E = attention.heads, attention.kv_heads, attention.head_dim
        qkv = attention.qkv(normed).view(*x.shape[:2], H + 2 * K, E)
        norm_rope(qkv, H, K, attention.q_norm, attention.k_norm, *rope)
        y = cache.attend(attention.layer, *qkv.split((H, K, K), dim=2))
        normed = add_norm(x, attention.out(y.flatten(2)), block.mlp_norm)
        normed = add_norm(x, mlp.down(silu_mul(mlp.gate_up(normed))), following_norm)
    return normed


def add_norm(x: Tensor, added: Tensor, norm: nn.RMSNorm) -> Tensor:
    """x += added; -> its norm."""
    D, normed, weight = x.shape[-1], torch.empty_like(x), norm.weight.to(x.dtype)
    block = triton.next_power_of_2(D)
    add_norm_kernel[(x.numel() // D,)](
        x, added, weight, normed, norm.eps, D, block, num_warps=min(16, max(1, block // 512))
    )
    return normed


def norm_rope(qkv: Tensor, H: int, K: int, q_norm, k_norm, cos: Tensor, sin: Tensor) -> None:
    """The query and key heads of qkv (B, T, H+2K, E), in place; the norms may be None."""
    B, T, heads, E = qkv.shape
    has_norm = q_norm is not None
    weights = [n.weight.to(qkv.dtype) for n in (q_norm, k_norm)] if has_norm else [qkv, qkv]
    norm_rope_kernel[B * T, H + K](
        qkv, *weights, cos.contiguous(), sin.contiguous(), q_norm.eps if has_norm else 0.0, H,
        heads, E, triton.next_power_of_2(E // 2), has_norm, num_warps=1,
    )  # fmt: skip


def silu_mul(gate_up: Tensor) -> Tensor:
    """(B, T, 2·inner), the gate first -> SiLU(gate)·up (B, T, inner)."""
    inner = gate_up.shape[-1] // 2
    product = gate_up.new_empty(*gate_up.shape[:-1], inner)
    block = min(1024, triton.next_power_of_2(inner))
    grid = (product.numel() // inner, triton.cdiv(inner, block))
    silu_mul_kernel[grid](gate_up, product, inner, block)
    return product


def block_sums(logits: Tensor, size: int, scale: float) -> tuple[Tensor, Tensor]:
    """fp32 logits (B, V) -> over blocks of `size` tokens the maximum z* and Σ exp(scale (z - z*)),
    (B, V/size) each, from one pass. A block of -inf has the sum 0."""
    B, V = logits.shape
    maxima, sums = logits.new_empty(2, B, V // size)
    blocks, padded = V // size, triton.next_power_of_2(size)
    group = max(1, 4096 // padded)  # blocks of a program
    grid = (B, triton.cdiv(blocks, group))
    block_sums_kernel[grid](logits, maxima, sums, scale, blocks, size, padded, group)
    return maxima, sums


# ---------------------------------------------------------------------------------- kernels

if triton is not None:

    @triton.jit
    def add_norm_kernel(x, added, weight, normed, eps, D: tl.constexpr, BLOCK: tl.constexpr):
        """One program per row."""
        column = tl.arange(0, BLOCK)
        inside = column < D
        at = tl.program_id(0).to(tl.int64) * D + column
        total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        total = total.to(x.dtype.element_ty)
        tl.store(x + at, total, mask=inside)
        total = total.to(tl.float32)
        factor = tl.rsqrt(tl.sum(total * total, 0) / D + eps)
        weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + at, (total * factor * weights).to(x.dtype.element_ty), mask=inside)

    @triton.jit
    def norm_rope_kernel(
        qkv, q_weight, k_weight, cos, sin, eps, H, HEADS, E: tl.constexpr, BLOCK: tl.constexpr,
        HAS_NORM: tl.constexpr,
    ):  # fmt: skip
        """One program per row and head. Dimension i rotates together with dimension i + E/2."""
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        half: tl.constexpr = E // 2
        i = tl.arange(0, BLOCK)
        inside = i < half
        dtype = qkv.dtype.element_ty
        at = qkv + (row * HEADS + head) * E + i
        left = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            weight = (q_weight if head < H else k_weight) + i
            factor = tl.rsqrt(tl.sum(left * left + right * right, 0) / E + eps)
            left = left * factor * tl.load(weight, mask=inside, other=0.0).to(tl.float32)
            right = right * factor * tl.load(weight + half, mask=inside, other=0.0).to(tl.float32)
            left, right = left.to(dtype).to(tl.float32), right.to(dtype).to(tl.float32)
        c = tl.load(cos + row * E + i, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + row * E + i, mask=inside, other=0.0).to(tl.float32)
        new_left = (left * c).to(dtype).to(tl.float32) - right * s
        new_right = (right * c).to(dtype).to(tl.float32) + left * s
        tl.store(at, new_left.to(dtype), mask=inside)
        tl.store(at + half, new_right.to(dtype), mask=inside)

    @triton.jit
    def silu_mul_kernel(gate_up, product, INNER: tl.constexpr, BLOCK: tl.constexpr):
        """One program per row and block. gate_up (M, 2·INNER) -> product (M, INNER)."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < INNER
        at = gate_up + row * 2 * INNER + column
        gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(at + INNER, mask=inside, other=0.0).to(tl.float32)
        silu = (gate / (1 + tl.exp(-gate))).to(product.dtype.element_ty).to(tl.float32)
        tl.store(product + row * INNER + column, (silu * up).to(product.dtype.element_ty), inside)

    @triton.jit
    def block_sums_kernel(
        logits, maxima, sums, scale, blocks, SIZE: tl.constexpr, PADDED: tl.constexpr,
        GROUP: tl.constexpr,
    ):  # fmt: skip
        """One program per row and GROUP of blocks."""
        row = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
        column = tl.arange(0, PADDED)
        is_block = block < blocks
        inside = is_block[:, None] & (column < SIZE)[None, :]
        at = logits + (row * blocks + block)[:, None] * SIZE + column[None, :]
        z = tl.load(at, mask=inside, other=float("-inf"))
        peak = tl.max(z, 1)
        e = tl.exp((z - tl.maximum(peak, -3e38)[:, None]) * scale)
        tl.store(maxima + row * blocks + block, peak, mask=is_block)
        tl.store(sums + row * blocks + block, tl.sum(e, 1), mask=is_block)
