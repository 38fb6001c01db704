"""All benchmarks of this machine, in one command: python -m bench [PART …]

    step        a whole step of GRPO beside TRL's; seconds until the toy is right; evaluation
    sampler     beside transformers' `generate`
    logprob     the loss beside Liger's and TRL's
    scaling     time and memory against tokens, samples, prompts, vocabulary, width, ranks
    loop        where the toy's step spends its time, and how near its limit it is
    memory      what --dry-run says beside what is taken

TRL, Liger and transformers get an environment of their own, .peers, made on first use (some minutes
and 2 GB). What was measured goes to bench/results/*.json; the tables of docs/performance.md and
docs/bench.svg are made from that. On a GPU: python -m bench.gpu.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PEERS = ["torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "liger-kernel==0.8.5",
         "accelerate==1.15.0", "datasets==5.2.0"]  # fmt: skip
PARTS = ("step", "sampler", "logprob", "scaling", "loop", "memory")


def peers(folder: Path) -> str:
    """The python of their environment."""
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if not done.exists() or done.read_text().split() != PEERS:
        print(f"Making the peers' environment in {folder}: {', '.join(PEERS)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS], check=True)
        done.write_text("\n".join(PEERS))
    return str(python)


def run(part: str, peer: str, threads: int, pairs: int) -> None:
    python, words = sys.executable, ["-m", f"bench.{part}", f"--out={RESULTS / part}.json"]
    if part == "step":
        words += [f"--peer={peer}", f"--pairs={pairs}", f"--threads={threads}", "--until=0.8"]
    elif part == "sampler":
        words += [f"--pairs={pairs}"]
    elif part == "logprob":
        python = peer  # everything in one process: our kernels need torch alone
    elif part == "loop":
        words += [f"--threads={threads}"]
    subprocess.run([python, *words], cwd=ROOT, check=True)


def machine() -> str:
    """The processor's name, where Linux has one."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def stamp(part: str) -> None:
    """When and where, into what a part has written."""
    import importlib.metadata

    file = RESULTS / f"{part}.json"
    found = json.loads(file.read_text())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    found["where"] = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), **versions}
    file.write_text(json.dumps(found, indent=1) + "\n")


def markdown(head: str, rows: list) -> str:
    names = head.split(" | ")
    lines = [names, ["---"] * len(names), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def tables() -> dict[str, str]:
    """Of each part its name -> its table, from what was measured last."""
    of = {part: json.loads((RESULTS / f"{part}.json").read_text()) for part in PARTS}
    found = {}
    ms, mb = lambda x: f"{1e3 * x:,.0f}", lambda x: f"{x / 1e6:,.0f}"
    rows, until = [], []
    for r in of["step"]["rows"]:
        ours, trl = r["seconds"]["ours"], r["seconds"]["trl"]
        low, *_, high = r["ratios"]
        rows.append([r["row"], ms(ours), ms(trl), f"**{r['ratio']:.2f}×** ({low:.1f}–{high:.1f})",
                     f"{mb(r['memory']['ours'])} / {mb(r['memory']['trl'])}",
                     f"{r['products'] / ours:.0%}"])  # fmt: skip
        if "until" in r:
            mine, theirs = r["until"]["ours"], r["until"]["trl"]
            rates = [500 / sorted(r["evaluation"][k])[1] for k in ("ours", "trl")]
            until.append([r["row"], f"{mine['seconds']:.1f} s, {mine['steps']} steps",
                          f"{theirs['seconds']:.1f} s, {theirs['steps']} steps",
                          f"**{theirs['seconds'] / mine['seconds']:.2f}×**",
                          *(f"{rate:,.0f}" for rate in rates)])  # fmt: skip
    found["step"] = markdown("step | ours, ms | TRL, ms | TRL ÷ ours (range) | MB, ours / TRL | "
                             "products alone, of ours", rows)  # fmt: skip
    found["step"] += "\n" + markdown(
        "until 0.8 of 500 are right | ours | TRL | TRL ÷ ours | greedy translations/s, ours | "
        "transformers", until)  # fmt: skip
    rows = [[r["shape"], f"{r['ours tokens/s']:,.0f}", f"{r['transformers tokens/s']:,.0f}",
             f"**{r['ratio']:.1f}×** ({r['ratio range'][0]:.1f}–{r['ratio range'][1]:.1f})",
             f"{r['products share']:.0%}",
             f"{r['peak MB ours']:,.0f} / {r['peak MB transformers']:,.0f}"]
            for r in of["sampler"]["rows"]]  # fmt: skip
    found["sampler"] = markdown("shape | ours, tokens/s | transformers, tokens/s | ratio (range) | "
                                "products alone, of ours | MB, ours / theirs", rows)  # fmt: skip
    rows = [[name, f"{r['seconds']:.1f}", f"{r['share of matmul rate']:.0%}",
             f"{r['peak MB']:,.0f}"] for name, r in of["logprob"]["sides"].items()]  # fmt: skip
    found["logprob"] = markdown("side | seconds | of the matmul rate | MB", rows)
    rows = [[name, f"{1e3 * r['seconds']:.1f}", *(f"{r[k]:.0%}" for k in
             ("share", "operators", "products", "limit"))]
            for name, r in of["loop"]["stages"].items()]  # fmt: skip
    rows.append(["**step**", f"{1e3 * of['loop']['step_seconds']:.1f}", "", "", "", ""])
    found["loop"] = markdown("stage | ms a step | of the step | in operators | in products | "
                             "at the rate of one large product", rows)  # fmt: skip
    rows = []
    for axis, points in of["scaling"]["rows"].items():
        for size, r in points.items():
            row = [axis, size, ms(r["seconds"]), f"{r['power']:.2f}" if "power" in r else ""]
            if "estimate" in r:
                for name, show in (("sample", ms), ("train", ms), ("memory", mb)):
                    off = r["estimate"][name] / r[name] - 1
                    row += [show(r[name]), f"{show(r['estimate'][name])} ({off:+.0%})"]
            rows.append(row + [""] * (10 - len(row)))
    found["scaling"] = markdown("grown | to | ms a step | power | sample, ms | estimate | "
                                "train, ms | estimate | MB | estimate", rows)  # fmt: skip
    rows = [[name, mb(r["estimate"]), mb(r["measured"]),
             f"{r['estimate'] / r['measured'] - 1:+.1%}"]
            for name, r in of["memory"]["rows"].items()]  # fmt: skip
    found["memory"] = markdown("shape | estimate, MB | measured, MB | off by", rows)
    for part in found:
        w = of[part]["where"]
        found[part] += (f"\n{w['machine']}, torch {w['torch']}, transformers {w['transformers']}, "
                        f"{w['date']}; `python -m bench {part}`.\n")  # fmt: skip
    return found


def write(page: Path) -> None:
    """Each table between the page's two comments of its name."""
    text = page.read_text()
    for part, table in tables().items():
        begin, end = f"<!-- {part} -->\n", f"<!-- /{part} -->"
        before, rest = text.split(begin)
        text = before + begin + table + end + rest.split(end, 1)[1]
    page.write_text(text)


def draw(out: Path) -> None:
    """Ratios to the peers; time a step against each size, and a line of slope 1."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
                     "svg.hashsalt": "bench"}  # fmt: skip
    ratios = {}
    for row in json.loads((RESULTS / "step.json").read_text())["rows"]:
        ratios[f"step, {row['row']}\nbeside TRL"] = row["ratios"]
    for row in json.loads((RESULTS / "sampler.json").read_text())["rows"]:
        low, high = row["ratio range"]
        ratios[f"sampling, {row['shape']}\nbeside transformers"] = [low, row["ratio"], high]
    sides = json.loads((RESULTS / "logprob.json").read_text())["sides"]
    for name in ("liger", "trl"):
        ratio = sides[name]["seconds"] / sides["ours"]["seconds"]
        ratios[f"log-prob and loss\nbeside {name}"] = [ratio] * 3
    axes = json.loads((RESULTS / "scaling.json").read_text())["rows"]
    axes = {name: points for name, points in axes.items() if name != "ranks"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    names = list(ratios)[::-1]
    for place, name in enumerate(names):
        values = ratios[name]
        middle = values[len(values) // 2]
        left.barh(place, middle, color="#3b7dd8", height=0.62)
        left.plot([values[0], values[-1]], [place, place], color="#777", linewidth=1)
        left.text(max(values[-1], middle) + 0.1, place, f"{middle:.1f}×", va="center")
    left.axvline(1, color="#777", linewidth=0.8)
    left.set(yticks=range(len(names)), xlabel="times as fast", title="Ours beside the peers")
    left.set_yticklabels(names, fontsize=7)
    left.margins(x=0.12)
    for name, points in axes.items():
        sizes = [float(size) for size in points]
        seconds = [point["seconds"] for point in points.values()]
        right.plot([s / sizes[0] for s in sizes], seconds, "o-", markersize=3, label=name)
    low, high = right.get_ylim()
    right.plot([1, 64], [high / 64, high], color="#777", linewidth=0.8, linestyle=":")
    right.set(xscale="log", yscale="log", xlabel="times the smallest size", ylabel="seconds a step",
              title="How a step grows (dotted: linear)")  # fmt: skip
    right.legend(frameon=False, fontsize=8)
    for one in (left, right):
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None}, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--draw", action="store_true", help="only make docs' picture and tables again"
    )
    args = parser.parse_args()
    if unknown := set(args.parts) - {*PARTS}:
        sys.exit(f"bench: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not args.draw:
        wanted = args.parts or PARTS
        peer = peers(args.peers) if {"step", "logprob"} & {*wanted} else ""
        print(machine(), flush=True)
        for part in wanted:
            begun = time.time()
            print(f"\n== {part}", flush=True)
            run(part, peer, args.threads, args.pairs)
            stamp(part)
            print(f"({time.time() - begun:.0f} s)", flush=True)
    draw(ROOT / "docs" / "bench.svg")
    write(ROOT / "docs" / "performance.md")


if __name__ == "__main__":
    main()
