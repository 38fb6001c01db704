"""Benchmarks beside peers: python -m bench PART [ROW …]

    step        a whole step of GRPO beside TRL's; seconds until the toy translates well
    sampler     beside transformers' `generate`
    logprob     the loss beside Liger's and TRL's
    loop        where the toy's step spends its time, and how near its limit it is

TRL and Liger are installed into .peers on first use (some minutes and 2 GB). The result of a whole
part is written to bench/results/PART.json. On a GPU: python -m bench.gpu. Runs over seeds: python
-m bench.sweep.
"""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

from bench.measure import RESULTS, ROOT, call_in_new_process, machine, write_result

PACKAGES = ["torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "liger-kernel==0.8.5",
            "accelerate==1.15.0", "datasets==5.2.0"]  # fmt: skip
ROUNDS = {"step": 3, "sampler": 7, "logprob": 3, "loop": 40}


def install_peers(folder: Path) -> str:
    """The Python of the peers' environment."""
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if not done.exists() or done.read_text().split() != PACKAGES:
        print(f"Making the peers' environment in {folder}: {', '.join(PACKAGES)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        done.write_text("\n".join(PACKAGES))
    return str(python)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=ROUNDS)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all; else nothing is kept")
    parser.add_argument("--rounds", type=int, help="default: the part's own")
    parser.add_argument("--alone", action="store_true", help="without TRL and Liger")
    args = parser.parse_args(argv)
    print(machine(), flush=True)
    part, rounds = importlib.import_module(f"bench.{args.part}"), args.rounds or ROUNDS[args.part]
    peer = ""
    if args.part in ("step", "logprob") and not args.alone:
        peer = install_peers(ROOT / ".peers")
    if args.part == "step":
        result = part.run(args.rows, rounds, peer)
    elif peer:  # all sides in one process: ours need torch alone
        result = call_in_new_process(part.run, args.rows, rounds, python=peer)
    else:
        result = part.run(args.rows, rounds)
    if not args.rows:
        write_result(RESULTS / f"{args.part}.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
