"""How time and memory of a step grow, one size at a time: python -m bench.scaling

Around 4 prompts x 8 samples x 64 tokens, hidden 128, 4 layers, a vocabulary of 2,048: each size is
doubled a few times, each point is a process of its own. Beside what was measured stands what
`--dry-run` would have said. `power` is the exponent of the growth between the last two points: 1 is
linear. Ranks: the toy's step, by torchrun, on the cores that there are.
"""

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import plan
import ssr
from bench.step import ROOT, Side, prepare

BASE = {"tokens": 64, "samples": 8, "prompts": 4, "vocabulary": 2048, "width": 128}
AXES = {
    "tokens": (16, 32, 64, 128, 256, 384),
    "samples": (2, 4, 8, 16, 32, 64),
    "prompts": (1, 2, 4, 8, 16, 32),
    "vocabulary": (512, 2048, 8192, 32_768, 131_072),
    "width": (64, 128, 256, 512),
}


def sizes_of(point: dict) -> tuple:
    shape = point["width"], 4, point["vocabulary"]
    return shape, (point["prompts"], point["samples"], point["tokens"])


def estimate(point: dict, machine: plan.Machine) -> dict:
    """What --dry-run says."""
    shape, (prompts, samples, tokens) = sizes_of(point)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, shape, (prompts, samples, tokens))
        longest = max(map(len, json.loads((folder / "work.json").read_text())["ids"]))
        config = plan.read_config(folder)
    s = ssr.parse([
        "--preset=toy", f"--prompts-per-step={prompts}", f"--samples-per-prompt={samples}",
        f"--max-new-tokens={tokens}", f"--max-prompt-tokens={longest}", "--no-track-kl",
        f"--slots={prompts * samples}", "--eval-prompts=1",
    ])  # fmt: skip
    work = plan.Work(s, config, 1, 1, 0, False)
    times = plan.seconds(work, machine)
    memory = plan.peak(plan.memory(work))
    return {"memory": memory, "sample": times["sample"], "train": times["train"]}


def measure(point: dict, machine: plan.Machine, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, *sizes_of(point))
        side = Side("ours", sys.executable, folder)
        answers = [side.ask("step") for _ in range(steps + 2)][2:]
        found = {"memory": side.ask("memory")["memory"]}
        side.close()
    found["seconds"] = statistics.median(a["seconds"] for a in answers)
    for stage in ("sample", "train"):
        found[stage] = statistics.median(a["stages"][stage] for a in answers)
    return found | {"estimate": estimate(point, machine)}


def toy_on(ranks: int) -> dict:
    """Seconds of the toy's steps 6 to 25."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--nproc_per_node={ranks}", f"{ROOT}/ssr.py", "--preset=toy", "--steps=25",
                 "--no-report", "--eval-every=1000", f"--folder={folder}/run"]  # fmt: skip
        launcher = "from torch.distributed.run import main; main()"
        subprocess.run([sys.executable, "-c", launcher, *words], check=True, capture_output=True)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "seconds/train" in row][5:]
    stages = [k for k in rows[0] if k.startswith("seconds/")]
    return {"seconds": statistics.median(sum(row[k] for k in stages) for row in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("axes", nargs="*", default=[*AXES, "ranks"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("bench/results/scaling.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = plan.machine_of("", torch.device("cpu"))
    rows: dict[str, dict] = {}
    print(f"{'':18} ms: step  sample (estimate)  train (estimate)  MB (estimate)  power")
    for axis in args.axes:
        before = None
        for value in AXES.get(axis, args.ranks):
            if axis == "ranks":
                found = toy_on(value)
                print(f"{axis:11}{value:7} {1e3 * found['seconds']:8.0f}", flush=True)
            else:
                found = measure(BASE | {axis: value}, machine, args.steps)
                if before:
                    grown = math.log(found["seconds"] / before[1]["seconds"])
                    found["power"] = grown / math.log(value / before[0])
                e, ms = found["estimate"], 1e3
                power = f"{found['power']:6.2f}" if before else ""
                print(f"{axis:11}{value:7} {ms * found['seconds']:8.0f} "
                      f"{ms * found['sample']:7.0f} {ms * e['sample']:10.0f} "
                      f"{ms * found['train']:6.0f} {ms * e['train']:10.0f} "
                      f"{found['memory'] / 1e6:6.0f} {e['memory'] / 1e6:8.0f} {power}",
                      flush=True)  # fmt: skip
            rows.setdefault(axis, {})[value] = found
            before = value, found
    report = {
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "machine": machine._asdict(),
        "base": BASE,
        "rows": rows,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
