"""The fused policy loss beside plain torch, Liger and TRL: time, peak memory, gradients.

    python -m bench logprob                  # M 2048, D 896, V 151,936, in the peers' environment
    python -m bench.logprob --shape 8192 3584 152064                                   # on a GPU

Every side computes the same thing: the on-policy GRPO loss of M tokens in sequences of 128, its
gradient in hidden states and head weight, and each token's log-prob (ours, plain and TRL: entropy
too). Time: the sides in turn, several rounds, in one process. Peak memory: each side in a process
of its own, above what inputs take; the gradients, M·D + V·D numbers, are in it for all. Sides that
do not import are left out by name.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.step import resident
from kernels.logprob import linear_logprob, linear_policy_loss

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
LENGTH = 128  # of a sequence, for peers that want (sequences, tokens)


def plain(hidden, weight, targets, advantages, weights):
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    ratio = (logprob - logprob.detach()).exp()
    return (weights * -advantages * ratio).sum(), entropy


def ours(hidden, weight, targets, advantages, weights):
    return linear_policy_loss(hidden, weight, targets, advantages, weights)


def ours_recomputing(hidden, weight, targets, advantages, weights):
    logprob, entropy = linear_logprob(hidden, weight, targets)
    ratio = (logprob - logprob.detach()).exp()
    return (weights * -advantages * ratio).sum(), entropy.detach()


def liger():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    kind = LigerFusedLinearGRPOLoss(beta=0.0, compiled=CUDA, use_ref_model=False, temperature=1.0)

    def run(hidden, weight, targets, advantages, weights):
        shape = (-1, LENGTH)
        mask = torch.ones_like(targets).view(shape)
        rows = hidden.view(*mask.shape, -1), weight, targets.view(shape), mask
        return kind(*rows, advantages.view(shape)[:, 0])

    return run


def trl():
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden, weight, targets, advantages, weights):
        logprob, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 8192, None, 1.0, ("entropy",)
        )
        ratio = (logprob - logprob.detach()).exp()
        return (weights * -advantages * ratio).sum(), entropy

    return run


def cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    def run(hidden, weight, targets, advantages, weights):
        nll = linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce_exact")
        ratio = (nll.detach() - nll).exp()
        return (weights * -advantages * ratio).sum(), None

    return run


SIDES = {
    "ours": lambda: ours,
    "ours, linear_logprob": lambda: ours_recomputing,
    "plain torch": lambda: plain,
    "liger": liger,
    "trl": trl,
}
if CUDA:
    SIDES |= {"torch.compile": lambda: torch.compile(plain), "cce": cut_cross_entropy}


def make_inputs(shape):
    M, D, V = shape
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, D, generator=random).to(DEVICE, DTYPE).requires_grad_()
    weight = torch.randn(V, D, generator=random).mul_(0.05).to(DEVICE, DTYPE).requires_grad_()
    targets = torch.randint(V, (M,), generator=random).to(DEVICE)
    advantages = torch.randn(M // LENGTH, 1, generator=random).expand(-1, LENGTH).reshape(-1)
    weights = torch.full((M,), 1 / M)
    return hidden, weight, targets, advantages.to(DEVICE), weights.to(DEVICE)


def once(side, inputs) -> float:
    for tensor in inputs[:2]:
        tensor.grad = None
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    side(*inputs)[0].backward()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(name: str, shape) -> None:
    """In a process of its own: megabytes above the inputs."""
    side, inputs = SIDES[name](), make_inputs(shape)
    small = make_inputs((LENGTH, 16, 64))
    once(side, small)  # imports and thread pools are not the kernel's memory
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(side, inputs)
        print((torch.cuda.max_memory_allocated() - before) / 1e6)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    once(side, inputs)
    print((resident("VmHWM") - before) / 1e6)


def matmul_rate(shape) -> float:
    """Flops a second of the forward's own product, in the type that is used."""
    M, D, V = shape
    M = min(M, 1024)
    a, b = torch.randn(M, D, device=DEVICE, dtype=DTYPE), torch.randn(V, D, device=DEVICE)
    b = b.to(DTYPE)
    times = []
    for _ in range(4):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b.T
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * M * D * V / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[2048, 896, 151_936])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="bench/results/logprob.json")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options.peak, options.shape)
        return
    sides = {}
    for name, make in SIDES.items():
        try:
            sides[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    inputs = make_inputs(options.shape)
    times: dict[str, list[float]] = {name: [] for name in sides}
    grads = {}
    for turn in range(options.rounds + 1):  # the first is a warm-up
        for name, side in sides.items():
            took = once(side, inputs)
            if turn:
                times[name].append(took)
                print(f"round {turn}/{options.rounds} {name}: {took:.2f} s", flush=True)
            else:
                rows = inputs[0].grad.double(), inputs[1].grad[:64].double()
                grads[name] = tuple(r.cpu() for r in rows)
    M, D, V = options.shape
    rate = matmul_rate(options.shape)
    rows = {}
    for name in sides:
        command = [sys.executable, "-m", "bench.logprob", "--peak", name]
        command += ["--shape", *map(str, options.shape)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        middle = statistics.median(times[name])
        gap = max(
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(grads[name], grads["plain torch"], strict=True)
        )
        rows[name] = {
            "seconds": middle,
            "range": [min(times[name]), max(times[name])],
            "share of matmul rate": 6 * M * D * V / rate / middle,
            "peak MB": float(output.split()[-1]),
            "gradient gap to plain torch": gap,
        }
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if CUDA else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "shape M, D, V": options.shape,
        "type": str(DTYPE),
        "matmul Gflop/s": rate / 1e9,
        "gradients MB": (M * D + V * D) * DTYPE.itemsize / 1e6,
        "sides": rows,
    }
    Path(options.out).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "sides"}, indent=2))
    for name, row in rows.items():
        share, gap = row["share of matmul rate"], row["gradient gap to plain torch"]
        numbers = f"{row['seconds']:8.3f} s, {share:5.0%} of the matmul rate"
        print(f"{name:22} {numbers}, {row['peak MB']:8.0f} MB, gap {gap:.1e}")


if __name__ == "__main__":
    main()
