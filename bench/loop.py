"""Where a step of the toy's loop spends its time: python -m bench.loop [--model FOLDER]

For each stage: seconds a step (median, nothing else measured), then in a second pass under torch's
profiler how much of it torch's operators take, and how much the matrix products. What is left is
Python: the loop's own lines, tokenising, and the dispatch of operators this small. "Limit" is the
share of the stage in which its floating-point operations would be done at the rate of one large
product, measured here.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer

import grpo
import ssr
from judge import TOY, Judge, Reward, Texts
from model import load
from plan import machine_of
from ranks import Ranks
from sampler import Sampler
from toy.pretrain import Recipe, make

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear")
PRODUCTS += ("aten::_scaled_dot_product_flash_attention_for_cpu",)
PRODUCTS += ("aten::_scaled_dot_product_flash_attention_for_cpu_backward",)


class Stage:
    """A function, timed; under `profiling` its operators are counted instead."""

    profiling = False

    def __init__(self, function):
        self.function = function
        self.seconds, self.operators, self.products, self.flops = [], 0.0, 0.0, 0

    def __call__(self, *args, **kwargs):
        if not Stage.profiling:
            begun = time.perf_counter()
            result = self.function(*args, **kwargs)
            self.seconds.append(time.perf_counter() - begun)
            return result
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
            result = self.function(*args, **kwargs)
        for event in seen.key_averages():
            self.operators += event.self_cpu_time_total / 1e6
            if event.key in PRODUCTS:
                self.products += event.self_cpu_time_total / 1e6
                self.flops += event.flops
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a toy model's folder; default: made, or found")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results/loop.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    s = ssr.parse(["--preset=toy", f"--steps={2 * args.steps}"])
    folder = Path(args.model) if args.model else make(Recipe())
    model, tokenizer = load(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    texts, stop_ids = Texts(tokenizer), [tokenizer.eos_token_id]
    sampler, start = Sampler(model, s.slots, 96), load(folder)
    judge = Judge(sampler, texts, TOY, s.reading)
    reward = Reward(texts, TOY, {"self": (1.0, judge)})
    problem = ssr.toy_problem(ssr.parse(["--preset=toy", f"--model={folder}"]), Ranks())

    def batch(number):
        P = s.prompts_per_step
        tasks = [problem.task(i) for i in range((number - 1) * P, number * P)]
        ids = texts.encode([TOY.ask(task) for task in tasks])
        return [grpo.Prompt(*both) for both in zip(ids, tasks, strict=True)]

    rate = 1e12 * machine_of("", torch.device("cpu")).teraflops
    sampler.generate, reward = Stage(sampler.generate), Stage(reward)
    grpo.reference_logprobs, grpo.update = Stage(grpo.reference_logprobs), Stage(grpo.update)
    stages = {"sample": sampler.generate, "judge": reward}
    stages |= {"reference": grpo.reference_logprobs, "train": grpo.update}
    whole = []
    begun = time.perf_counter()
    optimizer = grpo.make_optimizer(model, s)
    for step in grpo.train(model, sampler, reward, batch, s, optimizer, stop_ids, start):
        whole.append(time.perf_counter() - begun)
        Stage.profiling = step.number >= args.steps
        begun = time.perf_counter()
    steps = args.steps - 5  # the first few warm up
    total = statistics.median(whole[5 : args.steps])
    print("stage       ms a step  of step  operators  products  limit")
    rows = {}
    for name, stage in stages.items():
        seconds = statistics.median(stage.seconds[5:])
        later = statistics.mean(stage.seconds[-10:])  # like the steps that were profiled
        operators, products = (x / args.steps / later for x in (stage.operators, stage.products))
        limit = stage.flops / args.steps / rate / later
        rows[name] = {
            "seconds": seconds, "share": seconds / total,
            "operators": operators, "products": products, "limit": limit,
        }  # fmt: skip
        print(
            f"{name:10} {1e3 * seconds:10.1f} {seconds / total:8.0%} {operators:10.0%} "
            f"{products:9.0%} {limit:6.0%}"
        )
    print(f"{'step':10} {1e3 * total:10.1f}   median of {steps}, {args.threads} threads")
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"CPU, {args.threads} threads of {os.cpu_count()}",
        "torch": torch.__version__,
        "products, Gflop/s": rate / 1e9,
        "step_seconds": total,
        "stages": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
