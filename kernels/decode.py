"""Decode attention: one new token per sequence over a KV cache whose sequences have any lengths.

    y = decode_attention(q, k, v, cache, lengths, width)      # and k, v are in the cache

Derivation. Decoding reads each cached key and value once, so its time is their bytes over the
memory's bandwidth; three things keep it near that. A sequence reads its own length, not the longest
one's. The H/K query heads of a key head share one pass over it. Sequences are cut into spans with a
program each, so that few long ones also fill the GPU (split-KV, flash-decoding). For one query row
with scores x_j = q·k_j E^-½ over the positions j of one span,

    m = max x_j        s = Σ exp(x_j - m)        a = Σ exp(x_j - m) v_j

and as exp(x - m) = exp(x - m') exp(m' - m), blocks of a span (a running maximum rescales s and a)
and spans of a sequence combine alike: with M = max m_i over the spans

    y = Σ exp(m_i - M) a_i / Σ exp(m_i - M) s_i

The new token comes from registers: it is the initial state (x_new, 1, v_new) of span 0, which also
writes it to the cache at `lengths`, where no program reads. A span beyond its sequence's length
exits, so the grid depends on B, K and `width` alone, which a captured CUDA graph needs. With one
span, y is written at once; else m, s and a go through fp32 scratch to a second kernel. Scores,
softmax and sums are in fp32. Positions at or beyond a length are never read.

Letters: B sequences, S slots of the cache (B ≤ S), H query heads, K key/value heads, L positions of
a slot, E head size, G = H/K query heads of a key head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists on Linux only; impl="torch" does not need it
    triton = None

BLOCK = 64  # positions that a program loads at once; a span is a multiple of it
MIN_SPAN, MAX_SPLITS = 128, 32  # a shorter span costs more in scratch than it gains
PROGRAMS = 1024  # about two waves on 132 multiprocessors; as many splits as reach it


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, lengths: Tensor, width: int, impl: str = "auto"
) -> Tensor:
    """q (B, 1, H, E), new k and v (B, 1, K, E), cache (2, S, K, L, E) -> y (B, 1, H, E).

    Sequence b is in slot b, with `lengths[b]` < L tokens (int64, on the device) cached before this
    one, whose k and v are written behind them. `width` > max(lengths) is a bound that the host
    holds. If it is too small for a sequence, the y of that one is wrong, and nothing else.
    """
    B, _, H, E = q.shape
    _, S, K, L, _ = cache.shape
    shapes = [tuple(x.shape) for x in (k, v, cache, lengths)]
    if shapes != [(B, 1, K, E), (B, 1, K, E), (2, S, K, L, E), (B,)] or B > S or H % K:
        raise ValueError(f"q {tuple(q.shape)} does not fit k, v, cache and lengths {shapes}")
    if not 1 <= width <= L or not cache.is_contiguous() or lengths.dtype != torch.int64:
        raise ValueError(f"width={width} must be in 1 … {L}, cache contiguous and lengths int64")
    if impl == "auto":
        usable = triton is not None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
        impl = "triton" if usable else "torch"
    run = {"torch": decode_torch, "triton": decode_triton}[impl]
    return run(q, k, v, cache, lengths, width)


# ---------------------------------------------------------------------------------- reference


def decode_torch(q, k, v, cache: Tensor, lengths: Tensor, width: int) -> Tensor:
    B, _, H, E = q.shape
    K = cache.shape[2]
    keys, values = cache
    slots = torch.arange(B, device=q.device)
    keys[slots, :, lengths] = k[:, 0]
    values[slots, :, lengths] = v[:, 0]
    visible = torch.arange(width, device=q.device) <= lengths[:, None]  # (B, width)
    keys, values = keys[:B, :, :width], values[:B, :, :width]
    # The query heads of a key head become query tokens, so no key is repeated.
    q = q.reshape(B, K, H // K, E)
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible[:, None, None])
    return y.reshape(B, 1, H, E)


# ---------------------------------------------------------------------------------- kernels

if triton is not None:

    @triton.jit
    def split_kernel(
        q, k, v, keys, values, lengths, y, maxima, sums, partials, scale, width, span, splits,
        q_stride, k_stride, v_stride, K, L, G: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr,
        E_PAD: tl.constexpr, BLOCK: tl.constexpr, ONE_SPLIT: tl.constexpr,
    ):  # fmt: skip
        """One program per sequence and key head, and span of positions."""
        pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        b, key_head = pair // K, pair % K
        length = tl.load(lengths + b)
        cached = tl.minimum(length, width).to(tl.int32)
        start = split * span
        is_first = split == 0
        if (start >= cached) & (split > 0):
            return
        e, g = tl.arange(0, E_PAD), tl.arange(0, ROWS)
        inside, is_head = e < E, g < G
        tile = is_head[:, None] & inside[None, :]
        heads = (key_head * G + g)[:, None] * E + e[None, :]
        query = tl.load(q + b * q_stride + heads, mask=tile, other=0.0)
        new_key = tl.load(k + b * k_stride + key_head * E + e, mask=inside, other=0.0)
        new_value = tl.load(v + b * v_stride + key_head * E + e, mask=inside, other=0.0)
        keys += pair * L * E
        values += pair * L * E
        tl.store(keys + length * E + e, new_key, mask=inside & is_first)
        tl.store(values + length * E + e, new_value, mask=inside & is_first)

        # Powers of two: `scale` includes log2 e.
        own = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
        m = tl.where(is_first, own, float("-inf"))
        s = tl.where(is_first, 1.0, tl.zeros([ROWS], tl.float32))
        a = tl.zeros([ROWS, E_PAD], tl.float32)
        a = tl.where(is_first, a + new_value.to(tl.float32)[None, :], a)
        for first in range(start, tl.minimum(start + span, cached), BLOCK):
            column = first + tl.arange(0, BLOCK)
            is_cached = column < cached
            block = column[:, None] * E + e[None, :]
            mask = is_cached[:, None] & inside[None, :]
            key = tl.load(keys + block, mask=mask, other=0.0)
            value = tl.load(values + block, mask=mask, other=0.0)
            x = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # (ROWS, BLOCK)
            x = tl.where(is_cached[None, :], x, float("-inf"))
            new_m = tl.maximum(m, tl.max(x, 1))
            p = tl.exp2(x - new_m[:, None])
            rescale = tl.exp2(m - new_m)
            s = s * rescale + tl.sum(p, 1)
            a = a * rescale[:, None]
            a = tl.dot(p.to(value.dtype), value, a, input_precision="ieee")
            m = new_m

        row = pair * G + g  # of the B·H query heads
        if ONE_SPLIT:
            result = (a / s[:, None]).to(y.dtype.element_ty)
            tl.store(y + row[:, None] * E + e[None, :], result, mask=tile)
        else:
            part = row * splits + split
            tl.store(maxima + part, m, mask=is_head)
            tl.store(sums + part, s, mask=is_head)
            tl.store(partials + part[:, None] * E + e[None, :], a, mask=tile)

    @triton.jit
    def combine_kernel(
        maxima, sums, partials, lengths, y, width, span, splits, H,
        E: tl.constexpr, E_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr,
    ):  # fmt: skip
        """One program per sequence and query head. What no span has written is not read."""
        row, split, e = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS_PAD), tl.arange(0, E_PAD)
        cached = tl.minimum(tl.load(lengths + row // H), width)
        used = (split == 0) | (split * span < cached)
        part = row * splits + split
        m = tl.load(maxima + part, mask=used, other=float("-inf"))
        weight = tl.exp2(m - tl.max(m, 0))
        s = tl.sum(weight * tl.load(sums + part, mask=used, other=0.0), 0)
        tile = used[:, None] & (e < E)[None, :]
        a = tl.load(partials + part[:, None] * E + e[None, :], mask=tile, other=0.0)
        result = tl.sum(weight[:, None] * a, 0) / s
        tl.store(y + row * E + e, result.to(y.dtype.element_ty), mask=e < E)


def decode_triton(q, k, v, cache: Tensor, lengths: Tensor, width: int) -> Tensor:
    B, _, H, E = q.shape
    K, L = cache.shape[2:4]
    q, k, v = (x if x.stride()[2:] == (E, 1) else x.contiguous() for x in (q, k, v))
    splits = min(-(-width // MIN_SPAN), -(-PROGRAMS // (B * K)), MAX_SPLITS)
    span = -(-width // (splits * BLOCK)) * BLOCK
    splits = -(-width // span)  # none of them beyond `width`
    y = torch.empty(B, 1, H, E, dtype=q.dtype, device=q.device)
    maxima, sums = torch.empty(2, B * H, splits, dtype=torch.float32, device=q.device)
    partials = torch.empty(B * H, splits, E, dtype=torch.float32, device=q.device)
    scale = 1.4426950408889634 * E**-0.5
    padded = max(16, triton.next_power_of_2(E))  # 16: the least that `tl.dot` takes
    rows = max(16, triton.next_power_of_2(H // K))
    split_kernel[B * K, splits](
        q, k, v, *cache, lengths, y, maxima, sums, partials, scale, width, span, splits,
        q.stride(0), k.stride(0), v.stride(0), K, L, H // K, rows, E, padded, BLOCK, splits == 1,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(B * H,)](
            maxima, sums, partials, lengths, y, width, span, splits, H,
            E, padded, triton.next_power_of_2(splits),
        )  # fmt: skip
    return y
