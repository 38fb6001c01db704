"""What only a GPU can show, in about eight minutes: python -m bench.gpu [PART …]

    tests       those that need a GPU: kernels against float64, the sampler, bf16 runs of the toy
    decode      a step of the sampler at the shapes of Qwen2.5-0.5B and 7B (random weights), with
                PyTorch's operators and with our kernels, beside the limit: the time to read
                weights and cache at the measured bandwidth, or to multiply at the measured rate
    step        whole steps at 0.5B's shape, with the judge: stages, and peak memory beside what
                --dry-run says
    logprob-7b  the loss kernel at 7B's width beside plain torch, Liger, TRL
    logprob-0.5b        the same at 0.5B's
    sampler     beside transformers' `generate`
    toy         the toy's run in bf16
    evaluation  of that run's best weights

A part that fails is named, the others continue, and the exit code is 1. Numbers go to all.json in
--out, logs beside it, and one table is printed at the end. `--rehearse` runs `decode` and `step`
with tiny shapes, on a CPU where there is no GPU.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import logprob, sampler
from bench.measure import CUDA, DEVICE, call_in_new_process, machine, run_in_session, seconds_of
from bench.step import our_steps, prepare
from kernels.decode import decode_attention
from kernels.fused import block_sums, decode_blocks
from model import Config, Transformer
from run import estimate, settings
from sampler import Kernels, Sampler, SamplingParams

SHAPES = ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"]
TINY = Config("qwen2", 500, 32, 64, 2, 2, 1, 16, 4096, True)
DECODING = [(SHAPES[0], 32), (SHAPES[0], 256), (SHAPES[1], 64)]  # model, sequences
STEPS = 48  # of decoding, that are timed together
LIMIT = 240  # seconds of a part; each is a process of its own


def decode(rehearse: bool) -> dict:
    """Milliseconds of a step by PyTorch's operators and by ours, and the share of the limit."""
    gpu = estimate.measure_machine(DEVICE)
    rows: dict[str, dict] = {"machine": gpu._asdict()}
    dtype = torch.float32 if rehearse else torch.bfloat16
    for name, count in [("tiny", 4)] if rehearse else DECODING:
        config = TINY if rehearse else estimate.find_config(name)
        with torch.device("meta"):
            model = Transformer(config).to(dtype)
        model = model.to_empty(device=DEVICE).requires_grad_(False)
        for p in model.parameters():
            p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1.0)
        size = sum(p.numel() for p in model.parameters())
        for context in (64,) if rehearse else (256, 1024, 2048):
            read = (size + count * context * estimate.token_bytes(config, 1)) * dtype.itemsize
            by_bytes = read / (gpu.terabytes_a_second * 1e12)
            by_flops = 2 * size * count / (gpu.teraflops * 1e12)
            row = {"limit, ms": 1e3 * max(by_bytes, by_flops)}
            ours = Kernels(decode_attention, block_sums if CUDA else None)
            for kind, kernels in (("PyTorch", None), ("kernels", ours)):
                model.decode_blocks = decode_blocks if kernels and CUDA else None
                seconds = decoding_seconds(model, count, context, kernels)
                row |= {f"{kind}, ms": 1e3 * seconds, f"{kind}, of the limit": row["limit, ms"]
                        / (1e3 * seconds)}  # fmt: skip
            rows[f"{name}, {count} sequences, context {context}"] = row
            print(f"{name}, {count} sequences, context {context}: {row}", flush=True)
        del model
    return rows


def decoding_seconds(model, count: int, context: int, kernels) -> float:
    """Of a step, with `context` to `context` + STEPS cached tokens, whatever they are."""
    decoder = Sampler(model, count, context + STEPS + 1, kernels=kernels)
    decoder.limit.fill_(context)

    @torch.inference_mode()
    def run() -> None:
        decoder.alive.fill_(True)
        decoder.length.fill_(context)
        decoder.num_generated.zero_()
        for i in range(STEPS):
            decoder.decode(count, context + i + 1, SamplingParams())

    run()  # graphs are captured
    return min(seconds_of(run) for _ in range(3)) / STEPS


def step(rehearse: bool) -> dict:
    """Estimate and peak are without CUDA's own memory."""
    config = TINY if rehearse else estimate.find_config(SHAPES[0])
    P, N, new = sizes = (2, 4, 16) if rehearse else (32, 8, 512)
    room = new + 1500  # the judge's prompt has the translation, tokenised anew
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), config, sizes)
        steps = [metrics for _, metrics in our_steps(folder, 4, room)][1:]
    stages = {  # in the first step graphs are captured
        name.removeprefix("seconds/"): statistics.median(x[name] for x in steps)
        for name in steps[0] if name.startswith("seconds/")
    }  # fmt: skip
    s = settings.parse([
        "--preset=ssr-zero-0.5b", "--model=.", "--data=.", f"--prompts-per-step={P}",
        f"--samples-per-prompt={N}", f"--max-new-tokens={new}", f"--max-num-seqs={P * N}",
        f"--max-prompt-tokens={new + 1600}", "--judge-max-new-tokens=8",
    ])  # fmt: skip
    parts = estimate.memory(estimate.Workload(s, config, 1, 0, CUDA))
    parts.pop("CUDA and its libraries", None)
    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else None
    return {"seconds": stages, "GB": {"peak": peak, "estimate": sum(parts.values()) / 1e9}}


def run_command(log, *command: str) -> dict:
    """One of our programs; the last line that it prints."""
    run_in_session([sys.executable, *command], log, LIMIT)
    return {"last line": Path(log.name).read_text().strip().splitlines()[-1]}


def list_parts(out: Path, rehearse: bool) -> dict:
    """Name -> what it does, given a log."""

    def separate(function, *args):
        return lambda log: call_in_new_process(function, *args, log=log, timeout=LIMIT)

    def command(*argv: str):
        return lambda log: run_command(log, *argv)

    shapes = {"decode": separate(decode, rehearse), "step": separate(step, rehearse)}
    if rehearse:
        return shapes
    toy = out.absolute() / f"toy-{time.time():.0f}"
    tests = ["tests/test_gpu.py", "tests/test_kernels.py"]
    return {"tests": command("-m", "pytest", "-q", *tests, "-k", "gpu")} | shapes | {
        "logprob-7b": separate(logprob.run, ["7b"], 3),
        "logprob-0.5b": separate(logprob.run, ["0.5b"], 3),
        "sampler": separate(sampler.run, [], 3),
        "toy": command("ssr.py", "--preset=toy", f"--folder={toy}"),
        "evaluation": command(
            "-m", "eval", "--prompts=toy", "--max-new-tokens=20", "--metrics=bleu,chrf",
            "--sets=toy:kasu-bevo,toy:bevo-kasu", f"--model={toy}/best", f"--out={toy}/eval",
        ),
    }  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("bench.gpu", description=__doc__.split(":")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    args = parser.parse_args(argv)
    if not (args.rehearse or CUDA):
        parser.error("no CUDA GPU here; --rehearse runs the same code on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    parts, failed, begun = list_parts(args.out, args.rehearse), [], time.time()
    if unknown := set(args.parts) - parts.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; use {', '.join(parts)}")
    about = {"gpu": machine(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    results: dict[str, dict] = {"about": about}
    for name in args.parts or parts:
        print(f"{name} … {time.time() - begun:.0f} s", flush=True)
        try:
            with (args.out / f"{name}.txt").open("w") as log:
                results[name] = parts[name](log)
        except Exception as error:  # reported and counted; the other parts are still worth having
            failed.append(name)
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{name} FAILED: {error}; see {args.out / name}.txt", flush=True)
        (args.out / "all.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, rows in results.items():
        for row, value in rows.items():
            print(f"{name:10} {row:36} {json.dumps(value)[:300]}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
