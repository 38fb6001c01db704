"""Where a step of the toy's loop spends its time: python -m bench loop

For each stage: seconds a step (median, without a profiler), then in a second pass under torch's
profiler how much of it torch's operators take, and how much the matrix products. The rest is
Python: the loop's own lines, tokenising, the dispatch of operators this small. "Limit" is the share
of the stage in which its floating-point operations would be done at the rate of one large product.
"""

import statistics
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import grpo
from bench import step
from run.estimate import measure_machine

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear")
PRODUCTS += ("aten::_scaled_dot_product_flash_attention_for_cpu",)
PRODUCTS += ("aten::_scaled_dot_product_flash_attention_for_cpu_backward",)


class Profiled:
    """A function and what its operators have taken."""

    def __init__(self, function):
        self.function, self.operators, self.products, self.flops = function, 0.0, 0.0, 0

    def __call__(self, *args, **kwargs):
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as trace:
            result = self.function(*args, **kwargs)
        for event in trace.key_averages():
            self.operators += event.self_cpu_time_total / 1e6
            if event.key in PRODUCTS:
                self.products += event.self_cpu_time_total / 1e6
                self.flops += event.flops
        return result


def run(_: list[str], count: int) -> dict:
    """`count`: the steps of each pass."""
    with tempfile.TemporaryDirectory() as folder:
        step.prepare(Path(folder), *step.ROWS["toy"][:2], "self")
        torch.set_num_threads(1)
        loop = step.Ours(folder, track_kl=True)
    rate = 1e12 * measure_machine(torch.device("cpu")).teraflops
    steps = [loop.step() for _ in range(count)]
    profiled = {"sample": Profiled(loop.sampler.generate), "judge": Profiled(loop.reward)}
    profiled["reference"] = Profiled(grpo.set_reference_logprobs)
    profiled["train"] = Profiled(grpo.update)
    loop.sampler.generate, loop.reward = profiled["sample"], profiled["judge"]
    with (
        mock.patch.object(grpo, "set_reference_logprobs", profiled["reference"]),
        mock.patch.object(grpo, "update", profiled["train"]),
    ):
        for _ in range(count):
            loop.step()
    total, rows = statistics.median(x["seconds"] for x in steps[5:]), {}  # the first warm up
    for name, stage in profiled.items():
        seconds = statistics.median(x["stages"][name] for x in steps[5:])
        later = count * statistics.mean(x["stages"][name] for x in steps[-10:])  # like those seen
        rows[name] = {
            "seconds": seconds, "share": seconds / total, "operators": stage.operators / later,
            "products": stage.products / later, "limit": stage.flops / rate / later,
        }  # fmt: skip
    return {"products, Gflop/s": rate / 1e9, "step_seconds": total, "stages": rows}
