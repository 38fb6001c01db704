"""What --dry-run says of memory beside what a step takes: python -m bench.memory [SHAPE …]

Random weights, the paper's prompts, three steps with a KL in the loss: every part is at work.
On a GPU: Qwen2.5-0.5B's and 1.5B's shapes, the peak of PyTorch's allocator. On a CPU: small shapes,
the peak of what is resident beyond what was there before loading.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import grpo
import judge as reward
import plan
import ssr
import watch
from bench.step import resident
from judge import PAPER, Judge, Score, Task
from model import Config, Transformer, save
from tests.tiny import make_tokenizer

CUDA = torch.cuda.is_available()
SMALL = {  # layers, tokens of a micro-batch
    f"{layers} layers, {tokens} tokens": (layers, tokens)
    for layers, tokens in ((4, 4096), (8, 4096), (12, 2048), (8, 8192))
}
SHAPES = ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B"] if CUDA else list(SMALL)


def settings(shape: str, folder: Path) -> ssr.Settings:
    """And the model and the texts that they name."""
    if CUDA:
        config, sizes = plan.shape_of(shape), (16, 8, 512, 512, 64, 16384)
    else:
        layers, tokens = SMALL[shape]
        config = Config("qwen2", 32_000, 512, 1_408, layers, 8, 2, 64, 4_096, True)
        sizes = 12, 4, 128, 64, 24, tokens
    prompts, samples, longest, new, slots, tokens = sizes
    model = Transformer(dataclasses.replace(config, hub={"eos_token_id": 0}))
    save(model.to(torch.bfloat16) if CUDA else model, folder / "model")
    make_tokenizer(folder / "model")
    row = {"source": "English", "target": "Chinese"}
    rows = [row | {"text": f"{i} {'sun ' * (longest // 8)}"} for i in range(prompts + 8)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return ssr.parse([
        "--preset=ssr-zero-7b", f"--model={folder / 'model'}", f"--data={folder / 'texts.jsonl'}",
        f"--folder={folder / 'run'}", "--steps=3", f"--prompts-per-step={prompts}", "--kl=0.1",
        f"--samples-per-prompt={samples}", f"--max-prompt-tokens={longest + 900}",
        f"--max-new-tokens={new}", "--judge-max-new-tokens=16", "--eval-prompts=8",
        f"--slots={slots}", f"--micro-batch-tokens={tokens}", "--no-report",
    ])  # fmt: skip


def measure(shape: str) -> None:
    """In a process of its own: prints the estimate by part, and the peak, in MB."""
    found: dict = {}

    def check_room(work: plan.Work, *_) -> None:
        """Where loading begins."""
        found.update(estimate=plan.memory(work), before=0 if CUDA else resident("VmRSS"))
        if not CUDA:
            Path("/proc/self/clear_refs").write_text("5")

    plan.check_room = check_room
    for name in ("evaluate", "finish"):  # steps, and nothing else
        setattr(watch.Watch, name, lambda *_: None)
    seconds: dict[str, float] = {}

    def after(self, step: grpo.Step) -> None:
        self.taught = True  # else the run ends with code 3
        seconds.update({k: v for k, v in step.metrics.items() if k.startswith("seconds/")})

    watch.Watch.after = after
    # The tests' tokenizer knows few words: a template has nearly as many tokens as letters.
    ssr.judge_template = lambda s: len("".join(PAPER.ask_judge(Task("", "a", "b"), "")))
    # An untrained model earns nothing: any format and any score will do for the memory.
    grpo.check_health = lambda *_: None
    reward.translation_in = lambda texts, _, task, sample: texts.decode(sample.ids)
    judge = Judge.judge
    Judge.judge = lambda self, pairs, step: {
        p: Score(hash(p) % 100 / 100, "") for p in judge(self, pairs, step)
    }
    with tempfile.TemporaryDirectory() as folder:
        ssr.run(settings(shape, Path(folder)))
    peak = torch.cuda.max_memory_allocated() if CUDA else resident("VmHWM") - found["before"]
    parts = found["estimate"]
    if CUDA:  # not in the allocator's count
        parts["CUDA and its libraries"] = 0
    found = {"parts": parts, "estimate": plan.peak(parts), "measured": peak}
    print(json.dumps(found | {"last step": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=SHAPES)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    rows = {}
    for shape in options.shapes:
        command = [sys.executable, "-m", "bench.memory", "--measure", shape]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows[shape] = row = json.loads(output.splitlines()[-1])
        error = row["estimate"] / row["measured"] - 1
        stages = ", ".join(f"{k[8:]} {v:.2f}" for k, v in row["last step"].items())
        sizes = [row[name] / 1e6 for name in ("estimate", "measured")]
        print("{:28} estimate {:8,.0f} MB, measured {:8,.0f} MB".format(shape, *sizes)
              + f": {error:+.0%}; step 3, s: {stages}", flush=True)  # fmt: skip
    if options.out:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        options.out.write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
