"""Group advantages: rewards (P, N) of N samples for each of P prompts -> advantages (P, N).

The policy gradient stays unbiased when a baseline that does not depend on the sample is subtracted
from its reward; GRPO uses the mean of the sample's group: a_i = r_i - mean(r), with r_1 … r_n the
rewards of a group that are not NaN. With the mean of the others ("leave-one-out") it is
a_i * n / (n - 1).

    scale "std"     a_i / (std(r) + 1e-6), unbiased: the paper family's choice
    scale "batch"   a_i / (std over all samples of all groups, each about its own mean)
    scale "none"    a_i

In a group whose rewards are all equal no sample is better than another, so every advantage must be
exactly 0, not the residue of a rounded mean (a constant 51.33 leaves 4e-6 in its mean, which
division by a std of the same size turns into 0.86). Rewards are therefore first taken relative to
the group's maximum, exactly 0 in a tie, and the variance is summed in a second pass over the
deviations. A group of one has nobody to compare with: 0. NaN marks a missing reward: it is left
out of its group and its own advantage is 0; the caller counts it.

Letters: P prompts, N samples of each.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists on Linux only; impl="torch" does not need it
    triton = None

EPSILON = 1e-6
SCALES, BASELINES = ("std", "batch", "none"), ("mean", "leave-one-out")


def group_advantage(
    rewards: Tensor, scale: str = "std", baseline: str = "mean", impl: str = "auto"
) -> Tensor:
    """(P, N) rewards -> (P, N) advantages, in float64 for float64 and else in fp32; no gradient."""
    options = (scale, SCALES), (baseline, BASELINES), (impl, ("auto", "torch", "triton"))
    for value, known in options:
        if value not in known:
            raise ValueError(f"{value!r} is unknown; known: {', '.join(known)}")
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be (prompts, samples), not {tuple(rewards.shape)}")
    if torch.isinf(rewards).any():
        raise ValueError("a reward is infinite: use NaN for one that is missing")
    wide = torch.promote_types(rewards.dtype, torch.float32)
    rewards = rewards.detach().to(wide).contiguous()
    if impl == "auto":
        impl = "triton" if rewards.is_cuda and triton is not None else "torch"
    run = advantage_triton if impl == "triton" else advantage_torch
    advantages = run(rewards, scale == "std")
    if scale == "batch":  # they are still the deviations from their group's mean
        others = ((~rewards.isnan()).sum() - 1).clamp(min=1)
        advantages = advantages / ((advantages.square().sum() / others).sqrt() + EPSILON)
    if baseline == "leave-one-out":
        n = (~rewards.isnan()).sum(1, keepdim=True)
        advantages = advantages * n / (n - 1).clamp(min=1)
    return advantages


def decoupled_advantage(parts: list[tuple[float, Tensor]]) -> Tensor:
    """Weights and rewards (P, N) of several scorers -> (P, N), by GDPO (arXiv 2601.05242): each is
    scaled by its own std in the group, so that none wins by its spread, then their weighted sum by
    its std in the batch. A sample needs all of them, or NaN in all.

        paper: the batch's mean is subtracted / here: each group's, which is 0 up to rounding /
        because a tie in all parts must stay exactly 0
    """
    total = sum(w * group_advantage(rewards) for w, rewards in parts)
    return group_advantage(total.masked_fill(parts[0][1].isnan(), torch.nan), "batch")


# ---------------------------------------------------------------------------------- reference


def advantage_torch(rewards: Tensor, by_std: bool) -> Tensor:
    known = ~rewards.isnan()
    n = known.sum(1, keepdim=True)  # (P, 1)
    peak = rewards.masked_fill(~known, -torch.inf).amax(1, keepdim=True)
    below = torch.where(known, rewards - peak, 0.0)  # exactly 0 in a tie
    deviation = torch.where(known, below - below.sum(1, keepdim=True) / n.clamp(min=1), 0.0)
    if not by_std:
        return deviation
    squares = deviation.square().sum(1, keepdim=True)
    return deviation / ((squares / (n - 1).clamp(min=1)).sqrt() + EPSILON)


# ---------------------------------------------------------------------------------- kernel

if triton is not None:

    @triton.jit
    def group_kernel(
        rewards, advantages, N: tl.constexpr, BLOCK: tl.constexpr, BY_STD: tl.constexpr,
        EPSILON: tl.constexpr,
    ):  # fmt: skip
        """One program per group, which stays in registers."""
        group = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < N
        reward = tl.load(rewards + group * N + column, mask=inside, other=float("nan"))
        known = reward == reward
        n = tl.sum(known.to(reward.dtype), 0)
        peak = tl.max(tl.where(known, reward, float("-inf")), 0)
        below = tl.where(known, reward - peak, 0.0)
        deviation = tl.where(known, below - tl.sum(below, 0) / tl.maximum(n, 1.0), 0.0)
        if BY_STD:
            variance = tl.sum(deviation * deviation, 0) / tl.maximum(n - 1.0, 1.0)
            deviation = deviation / (tl.sqrt(variance) + EPSILON)
        tl.store(advantages + group * N + column, deviation, mask=inside)


def advantage_triton(rewards: Tensor, by_std: bool) -> Tensor:
    P, N = rewards.shape
    advantages = torch.empty_like(rewards)
    if rewards.numel():
        block = triton.next_power_of_2(N)
        group_kernel[(P,)](rewards, advantages, N, block, by_std, EPSILON)
    return advantages
