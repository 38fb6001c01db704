"""The fused policy loss beside plain torch, Liger and TRL: time, peak memory, gradients.

    python -m bench logprob [0.5b | 7b]      # Qwen2.5's widths, in the peers' environment

Every side computes the on-policy GRPO loss of M tokens in sequences of 128, its gradient in hidden
states and head weight, and each token's log-prob (all but Liger: the entropy too). The sides take
turns in one process. Peak memory is measured in a process of its own for each, above the inputs; it
holds the gradients, M·D + V·D numbers. A side that cannot be imported is left out.
"""

import statistics
from functools import partial

import torch
import torch.nn.functional as F

from bench.measure import (
    CUDA,
    DEVICE,
    DTYPE,
    call_in_new_process,
    peak_bytes,
    seconds_of,
    take_turns,
)
from kernels.logprob import linear_policy_loss

SHAPES = {"0.5b": (2048, 896, 151_936), "7b": (8192, 3584, 152_064)}  # M, D, V
LENGTH = 128  # of a sequence, for peers that want (sequences, tokens)


def plain_loss(logprob, advantages, weights):
    ratio = (logprob - logprob.detach()).exp()
    return (weights * -advantages * ratio).sum()


# Every side: hidden, weight, targets, advantages, weights -> the loss and more.


def plain(hidden, weight, targets, advantages, weights):
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return plain_loss(log_p.gather(1, targets[:, None])[:, 0], advantages, weights), entropy


def liger():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    kind = LigerFusedLinearGRPOLoss(beta=0.0, compiled=CUDA, use_ref_model=False, temperature=1.0)

    def run(hidden, weight, targets, advantages, weights):
        targets = targets.view(-1, LENGTH)
        rows = hidden.view(*targets.shape, -1), weight, targets, torch.ones_like(targets)
        return kind(*rows, advantages.view(-1, LENGTH)[:, 0])

    return run


def trl():
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden, weight, targets, advantages, weights):
        logprob, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 8192, None, 1.0, ("entropy",)
        )
        return plain_loss(logprob, advantages, weights), entropy

    return run


SIDES = {
    "ours": lambda: linear_policy_loss,
    "plain torch": lambda: plain,
    "liger": liger,
    "trl": trl,
}
if CUDA:
    SIDES["torch.compile"] = lambda: torch.compile(plain)


def make_inputs(shape: list[int]) -> tuple:
    M, D, V = shape
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, D, generator=draw).to(DEVICE, DTYPE).requires_grad_()
    weight = torch.randn(V, D, generator=draw).mul_(0.05).to(DEVICE, DTYPE).requires_grad_()
    targets = torch.randint(V, (M,), generator=draw).to(DEVICE)
    advantages = torch.randn(M // LENGTH, 1, generator=draw).expand(-1, LENGTH).reshape(-1)
    return hidden, weight, targets, advantages.to(DEVICE), torch.full((M,), 1 / M, device=DEVICE)


def once(side, inputs) -> float:
    """Seconds of a forward and a backward."""
    for tensor in inputs[:2]:
        tensor.grad = None
    return seconds_of(lambda: side(*inputs)[0].backward())


def measure_peak(name: str, shape: list[int]) -> int:
    """In a process of its own."""
    side, inputs = SIDES[name](), make_inputs(shape)
    once(side, make_inputs([LENGTH, 16, 64]))  # imports and thread pools are not its memory
    return peak_bytes(lambda: once(side, inputs))


def matmul_rate(D: int, V: int) -> float:
    """Flop/s of the forward's own product."""
    a, b = (torch.randn(n, D, device=DEVICE).to(DTYPE) for n in (1024, V))
    return 2 * 1024 * D * V / min(seconds_of(lambda: a @ b.T) for _ in range(4))


def compare(shape: tuple[int, int, int], rounds: int) -> dict:
    sides, gradients, inputs, (M, D, V) = {}, {}, make_inputs(shape), shape
    for name, make in SIDES.items():
        try:
            sides[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        once(sides[name], inputs)
        gradients[name] = [x.grad[:64].double().cpu() for x in inputs[:2]]
    times = take_turns({name: partial(once, side, inputs) for name, side in sides.items()}, rounds)
    rate = matmul_rate(D, V)
    rows = {}
    for name, seconds in times.items():
        both = zip(gradients[name], gradients["plain torch"], strict=True)
        rows[name] = {
            "seconds": statistics.median(seconds),
            "range": [min(seconds), max(seconds)],
            "share of matmul rate": 6 * M * D * V / rate / statistics.median(seconds),
            "peak MB": call_in_new_process(measure_peak, name, shape) / 1e6,
            "gradient gap": max(float((x - y).abs().max() / y.abs().max()) for x, y in both),
        }
    about = {"shape M, D, V": shape, "type": str(DTYPE), "matmul Gflop/s": rate / 1e9}
    return about | {"sides": rows}


def run(shapes: list[str], rounds: int) -> dict:
    return compare(SHAPES[(shapes or ["0.5b"])[0]], rounds)
