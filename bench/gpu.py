"""Everything that only a GPU can show, in about eight minutes: python -m bench.gpu

    kernels     each against float64, in fp32 and bf16, beside plain torch in the same type
    decode      tokens/s at 1, 16, 128 and 256 sequences for the shapes of Qwen2.5-0.5B, 1.5B and 7B
                (random weights), beside the limit: the time to read weights and cache at the
                measured bandwidth, or to multiply at the measured rate, whichever is longer
    step        whole SSR steps at 0.5B and 1.5B: stages, peak memory, and what --dry-run says
    logprob     the loss kernel at 0.5B's and 7B's widths beside plain torch, Liger, TRL
    sampler     beside transformers' `generate`
    tests       those that need a GPU;  toy: the toy's run in bf16, and its evaluation

A part that fails is named, the others go on, and the exit code is 1. Numbers go to
bench/results/gpu/ as JSON, logs beside them, and one table is printed at the end. `--rehearse` runs
the same code with tiny shapes on a CPU.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

import plan
from kernels.advantage import group_advantage
from kernels.logprob import linear_policy_loss
from model import Config, Transformer
from sampler import Sampler

SHAPES = ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B"]
PROMPT, NEW = 128, 128


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def kernels(device: torch.device, rehearse: bool) -> dict:
    """Largest errors against float64, of the largest value; "torch" is the same type's own."""
    M, D, V = (64, 32, 500) if rehearse else (2048, 896, 151_936)
    found = {}
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(M, D, generator=draw).to(device, dtype)
        weight = torch.randn(V, D, generator=draw).mul_(0.05).to(device, dtype)
        targets = torch.randint(V, (M,), generator=draw).to(device)
        advantages = torch.randn(M, generator=draw).to(device)
        weights = torch.full((M,), 1 / M, device=device)

        def sides(hidden, weight, impl, rest=(targets, advantages, weights)) -> dict:
            h, w = (x.detach().clone().requires_grad_() for x in (hidden, weight))
            loss, stats = linear_policy_loss(h, w, *rest, impl=impl)
            loss.backward()
            names = {"logprob": stats["logprob"], "entropy": stats["entropy"]}
            return names | {"d hidden": h.grad, "d weight": w.grad[:4096]}

        exact = sides(hidden.double(), weight.double(), "torch")
        for impl in ("torch",) if rehearse else ("triton", "torch"):
            for name, value in sides(hidden, weight, impl).items():
                error = (value.double() - exact[name]).abs().max() / exact[name].abs().max()
                found[f"{name}, {str(dtype)[6:]}, {impl}"] = float(error)
        del exact
    rewards = torch.rand(512, 8, generator=draw, dtype=torch.float64)
    rewards[3], rewards[5, 2] = 51.33, torch.nan
    exact = group_advantage(rewards)
    got = group_advantage(rewards.float().to(device)).double().cpu()
    found["advantage"] = float((got - exact).abs().max())
    assert not got[3].any(), "a tie must give exactly 0"
    return found


def decode(device: torch.device, rehearse: bool) -> dict:
    machine = plan.machine_of("", device)
    found: dict[str, dict] = {"machine": machine._asdict()}
    for name in ["tiny"] if rehearse else SHAPES:
        config = Config("qwen2", 500, 32, 64, 2, 2, 1, 16, 512, True)
        config = config if rehearse else plan.shape_of(name)
        dtype = torch.float32 if rehearse else torch.bfloat16
        with torch.device("meta"):
            model = Transformer(config).to(dtype)
        model = model.to_empty(device=device).requires_grad_(False)
        for p in model.parameters():
            p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1.0)
        size = sum(p.numel() for p in model.parameters())
        for count in (1, 4) if rehearse else (1, 16, 128, 256):
            sampler = Sampler(model, count, PROMPT + NEW)
            draw = torch.Generator().manual_seed(count)
            prompts = torch.randint(config.vocab_size, (count, PROMPT), generator=draw).tolist()
            run = partial(sampler.generate, prompts, 1, NEW, seed=1)
            run()  # graphs are captured
            times = []
            for _ in range(3):
                wait(device)
                begun = time.perf_counter()
                run()
                wait(device)
                times.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            sampler.generate(prompts, 1, 1, seed=1)
            wait(device)
            spent = min(times) - (time.perf_counter() - begun)  # without reading the prompts
            width = dtype.itemsize
            cache = 2 * config.layers * config.kv_heads * config.head_dim * width
            read = size * width + count * (PROMPT + NEW / 2) * cache
            by_bytes = read / (machine.terabytes_a_second * 1e12)
            by_flops = 2 * size * count / (machine.teraflops * 1e12)
            limit = (NEW - 1) * max(by_bytes, by_flops)
            found[f"{name}, {count} sequences"] = {
                "tokens/s": count * (NEW - 1) / spent,
                "of the limit": limit / spent,
                "binding": "bytes" if by_bytes > by_flops else "products",
            }
            print(f"{name}, {count} sequences: {count * (NEW - 1) / spent:,.0f} tokens/s, "
                  f"{limit / spent:.0%} of the limit", flush=True)  # fmt: skip
            del sampler
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def command(out: Path, name: str, *words: str, limit: int = 240) -> dict:
    """Another program's run, its words kept in a file; what it wrote as JSON."""
    log, result = out / f"{name}.txt", out / f"{name}.json"
    words = [str(result) if word == "OUT" else word for word in words]
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, timeout=limit
        ).returncode
    if code:
        raise RuntimeError(f"{' '.join(words)} ended with {code}: {log.read_text()[-600:]}")
    last = log.read_text().strip().splitlines()[-1:]
    return json.loads(result.read_text()) if result.exists() else {"said": last}


def parts(out: Path, device: torch.device, rehearse: bool) -> dict:
    run = str(out / f"toy-{time.time():.0f}")
    sets = "--sets=toy:kasu-bevo,toy:bevo-kasu"
    evaluation = ["--prompts=toy", "--max-new-tokens=20", sets, "--metrics=bleu,chrf"]
    there = {
        "kernels": partial(kernels, device, rehearse),
        "decode": partial(decode, device, rehearse),
        "step": partial(command, out, "memory", "-m", "bench.memory", "--out", "OUT"),
    }
    if rehearse:
        return {name: there[name] for name in ("kernels", "decode")}
    for name, shape in (("7b", "8192 3584 152064"), ("0.5b", "2048 896 151936")):
        words = ["-m", "bench.logprob", "--shape", *shape.split(), "--out", "OUT"]
        there[f"logprob-{name}"] = partial(command, out, f"logprob-{name}", *words)
    words = ["-m", "bench.sampler", "--pairs", "3", "--out", "OUT"]
    files = ["tests/test_gpu.py", "tests/test_kernels.py"]
    return there | {
        "sampler": partial(command, out, "sampler", *words),
        "tests": partial(command, out, "tests", "-m", "pytest", "-q", *files, "-k", "gpu"),
        "toy": partial(
            command, out, "toy", "ssr.py", "--preset=toy", "--device=cuda", f"--folder={run}"
        ),
        "evaluation": partial(
            command, out, "eval", "-m", "eval", *evaluation, f"--model={run}/best",
            f"--out={run}/eval",
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help="default: all")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("bench.gpu: no CUDA GPU here; --rehearse runs the same code on a CPU")
    device = torch.device("cpu" if args.rehearse else "cuda", None if args.rehearse else 0)
    args.out.mkdir(parents=True, exist_ok=True)
    gpu = "CPU" if args.rehearse else torch.cuda.get_device_name()
    about = {"date": str(datetime.date.today()), "gpu": gpu, "torch": torch.__version__}
    found, failed, begun = {"about": about}, [], time.time()
    known = parts(args.out, device, args.rehearse)
    if unknown := set(args.parts) - known.keys():
        sys.exit(f"bench.gpu: no part {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in args.parts or known:
        print(f"{name} … {time.time() - begun:.0f} s", flush=True)
        try:
            found[name] = known[name]()
        except Exception as error:  # said, counted, and the rest is still worth having
            failed.append(name)
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{name} FAILED: {error}", flush=True)
        (args.out / "all.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{about}")
    for name in [name for name in known if name in found]:
        for row, value in found[name].items():
            print(f"{name:10} {row:36} {json.dumps(value)[:300]}")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
