"""Benchmarks beside peers: python -m bench PART [ROW …]

    step        a whole step of GRPO beside TRL's
    sampler     beside transformers' `generate`
    logprob     the loss beside Liger's and TRL's

TRL and Liger live in an environment of their own; without it we run alone:

    python -m venv .peers && .peers/bin/pip install -r bench/peers.txt

On a GPU: python -m bench.gpu. Runs over seeds: python -m bench.sweep.
"""

import argparse
import importlib
import json
import sys
import time

import torch

from bench.measure import PEER, call_in_new_process, machine

ROUNDS = {"step": 3, "sampler": 7, "logprob": 3}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=ROUNDS)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
    parser.add_argument("--rounds", type=int, help="default: the part's own")
    args = parser.parse_args(argv)
    part, rounds = importlib.import_module(f"bench.{args.part}"), args.rounds or ROUNDS[args.part]
    if args.part == "logprob" and PEER.exists():  # all sides in one process: ours need torch alone
        result = call_in_new_process(part.run, args.rows, rounds, python=str(PEER))
    else:
        result = part.run(args.rows, rounds)
    about = {"machine": machine(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(about | result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
