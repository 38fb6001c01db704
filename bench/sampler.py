"""Our sampler beside transformers' `generate`: same weights, prompts, stop tokens and threads.

    python -m bench.sampler                        # both shapes, five alternating pairs
    python -m bench.sampler --shapes small --pairs 9

8 prompts x 8 samples, up to 64 new tokens, about one token in 32 is a stop token. A token counts
when it stands before or at its sequence's stop; what is computed after it is waste. Each pair runs
ours and theirs one after the other in one process, so that a busy machine slows both. Peak memory
is measured in a process of its own for each side, above what the loaded model takes.

Two lower bounds stand beside our time. `products`: the same matrix products (weights and rows as
in the run) and nothing else. `roofline`: bytes of weights and cache that each step must read, over
the machine's measured bandwidth; on a GPU this is the one that binds.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

import model as ours
from bench.step import resident
from sampler import Sampler

SHAPES = {
    "small": ours.Config("qwen2", 8_000, 256, 704, 4, 4, 2, 64, 1024, tied=True),
    "qwen2.5-0.5b": ours.Config("qwen2", 151_936, 896, 4864, 24, 14, 2, 64, 32_768, tied=True),
}
PROMPTS, SAMPLES, NEW = 8, 8, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def workload(config: ours.Config) -> tuple[list[list[int]], list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 65, (PROMPTS,), generator=draw).tolist()
    prompts = [torch.randint(config.vocab_size, (n,), generator=draw).tolist() for n in lengths]
    return prompts, torch.randperm(config.vocab_size, generator=draw)[::32].tolist()


def make_weights(config: ours.Config, folder: str) -> None:
    torch.manual_seed(0)
    ours.save(ours.Transformer(config).to(DTYPE), folder)


class Ours:
    def __init__(self, folder: str, prompts, stops):
        self.prompts, self.stops = prompts, stops
        self.model = ours.load(folder, device=DEVICE)
        room = max(map(len, prompts)) + NEW
        self.sampler = Sampler(self.model, slots=PROMPTS * SAMPLES, max_length=room)

    def run(self, seed: int) -> int:
        groups = self.sampler.generate(self.prompts, SAMPLES, NEW, stop_ids=self.stops, seed=seed)
        return sum(len(s.ids) for group in groups for s in group)


class Theirs:
    def __init__(self, folder: str, prompts, stops):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
        self.model = self.model.to(DEVICE).eval()
        self.stops = torch.tensor(stops, device=DEVICE)
        self.width = max(map(len, prompts))
        ids = [[0] * (self.width - len(p)) + p for p in prompts]
        mask = [[0] * (self.width - len(p)) + [1] * len(p) for p in prompts]
        self.inputs = {
            "input_ids": torch.tensor(ids, device=DEVICE),
            "attention_mask": torch.tensor(mask, device=DEVICE),
        }
        self.rules = transformers.GenerationConfig(
            do_sample=True,
            top_k=0,
            num_return_sequences=SAMPLES,
            max_new_tokens=NEW,
            eos_token_id=stops,
            pad_token_id=0,
        )

    @torch.no_grad()
    def run(self, seed: int) -> int:
        torch.manual_seed(seed)
        drawn = self.model.generate(**self.inputs, generation_config=self.rules)[:, self.width :]
        stop = torch.isin(drawn, self.stops)
        return int((stop.cumsum(1) - stop.long() == 0).sum())


def seconds(work) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def products_and_steps(side: Ours) -> tuple[float, list[tuple[int, int]]]:
    """Seconds of one run's matrix products alone, and (live sequences, width) of its steps."""
    trace, steps = [], []
    hooks = [
        m.register_forward_pre_hook(lambda m, x: trace.append((m.weight, x[0].numel())))
        for m in side.model.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    logits, decode = side.model.logits, side.sampler.decode

    def traced_logits(hidden):
        trace.append((side.model.head_weight, hidden.numel()))
        return logits(hidden)

    def traced_decode(live, width, rules):
        steps.append((live, width))
        side.sampler.step(live, width, rules)  # not a graph: hooks must see it

    side.model.logits, side.sampler.decode = traced_logits, traced_decode
    side.run(seed=1)
    side.model.logits, side.sampler.decode = logits, decode
    for hook in hooks:
        hook.remove()
    largest = max(size for _, size in trace)
    inputs = torch.randn(largest, device=DEVICE, dtype=DTYPE)

    @torch.no_grad()
    def replay():
        for weight, size in trace:
            F.linear(inputs[:size].view(-1, weight.shape[1]), weight)

    replay()
    return min(seconds(replay) for _ in range(3)), steps


def split(side: Ours) -> dict[str, float]:
    """Share of a CPU run's wall time by kind of work, from torch's profiler."""
    kinds = {"products": ("aten::mm", "aten::addmm"), "attention": ("aten::bmm", "attention")}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        wall = seconds(partial(side.run, 1))
    shares = {"products": 0.0, "attention": 0.0, "other operators": 0.0}
    for event in profile.key_averages():
        kind = next((k for k, names in kinds.items() if event.key.endswith(names)), None)
        shares[kind or "other operators"] += event.self_cpu_time_total / 1e6 / wall
    return {**shares, "Python, launches, profiler": 1 - sum(shares.values())}


def roofline(config: ours.Config, steps: list[tuple[int, int]]) -> float:
    """Seconds that reading weights and cache takes at the measured copy bandwidth."""
    source = torch.empty(2**26 if DEVICE == "cpu" else 2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    copy = min(seconds(lambda: [target.copy_(source) for _ in range(10)]) for _ in range(5)) / 10
    bandwidth = 2 * source.numel() / copy
    size = DTYPE.itemsize
    with torch.device("meta"):
        weights = sum(p.numel() for p in ours.Transformer(config).parameters()) * size
    cached = 2 * config.layers * config.kv_heads * config.head_dim * size  # bytes a token
    return sum(weights + live * width * cached for live, width in steps) / bandwidth


def peak_megabytes(side: str, folder: str, shape: str) -> float:
    command = [sys.executable, "-m", "bench.sampler", "--peak", side, folder, shape]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def measure_peak(side: str, folder: str, shape: str) -> None:
    """In a process of its own: memory above the loaded model's, in MB."""
    make = Ours if side == "ours" else Theirs
    if DEVICE == "cuda":
        runner = make(folder, *workload(SHAPES[shape]))
        model = sum(p.nbytes for p in runner.model.parameters())
        runner.run(seed=1)
        print((torch.cuda.max_memory_allocated() - model) / 1e6)
        return
    # Without pages of the weights' file in the count: a model of our own memory on either side.
    runner = make(folder, *workload(SHAPES[shape]))
    for p in runner.model.parameters():
        p.data = p.data.clone()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    runner.run(seed=1)
    print((resident("VmHWM") - before) / 1e6)


def compare(shape: str, pairs: int) -> dict:
    config = SHAPES[shape]
    prompts, stops = workload(config)
    with tempfile.TemporaryDirectory() as folder:
        make_weights(config, folder)
        mine, peer = Ours(folder, prompts, stops), Theirs(folder, prompts, stops)
        mine.run(seed=0), peer.run(seed=0)
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        times = []
        for pair in range(pairs):
            for name, side in (("ours", mine), ("theirs", peer)):
                count = []
                took = seconds(lambda s=side, c=count, p=pair: c.append(s.run(seed=p + 1)))
                rates[name].append(count[0] / took)
                if name == "ours" and pair == 0:
                    times.append(took)
            done = f"{shape} pair {pair + 1}/{pairs}"
            print(
                f"{done}: {rates['ours'][-1]:.0f} and {rates['theirs'][-1]:.0f} tokens/s",
                flush=True,
            )
        products, steps = products_and_steps(mine)
        where = {} if DEVICE == "cuda" else split(mine)
        whole = min(seconds(partial(mine.run, 1)) for _ in range(3))
        mine = peer = None  # their memory is free before the peaks are taken
        ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)]
        return {
            "shape": shape,
            "ours tokens/s": statistics.median(rates["ours"]),
            "transformers tokens/s": statistics.median(rates["theirs"]),
            "ratio": statistics.median(ratios),
            "ratio range": [min(ratios), max(ratios)],
            "seconds": whole,
            "products share": products / whole,
            "roofline share": roofline(config, steps) / whole,
            **{f"share {kind}": share for kind, share in where.items()},
            "peak MB ours": peak_megabytes("ours", folder, shape),
            "peak MB transformers": peak_megabytes("theirs", folder, shape),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", default="bench/results/sampler.json")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.peak:
        measure_peak(*options.peak)
        return
    rows = [compare(shape, options.pairs) for shape in options.shapes]
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or "CPU"
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{machine}, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "workload": f"{PROMPTS} prompts x {SAMPLES} samples, up to {NEW} new tokens, {DTYPE}",
        "rows": rows,
    }
    Path(options.out).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "rows"}, indent=2))
    keys = list(rows[0])
    for key in keys:
        cells = [r[key] for r in rows]
        print(
            f"{key:24}", *(f"{c:>16.3f}" if isinstance(c, float) else f"{c!s:>16}" for c in cells)
        )


if __name__ == "__main__":
    main()
