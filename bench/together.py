"""Do the self-reward and an outside scorer add up? The toy with a weak judge and scorers of three
qualities, alone and together: the paper's SSR-Zero, external reward and SSR-X-Zero, in small.

    python -m bench.together            # 56 runs, some 25 minutes; goes on where it was stopped
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

import torch

import ssr
from toy import controls
from toy.pretrain import Recipe, make

TOKENS = 2e6  # of pretraining: at the default the judge alone reaches the ceiling
NOISES = (0.3, 0.6, 1.0)  # standard deviation of the scorer's error; the truth is 0 to 1
ROWS = {"self": {}}
for noise in NOISES:
    ROWS[f"external, noise {noise}"] = {"reward": "external", "toy_noise": noise}
    ROWS[f"self + external, noise {noise}"] = {"reward": "self+external", "toy_noise": noise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("runs/together"))
    args = parser.parse_args()
    seeds = list(range(args.seeds))
    torch.set_num_threads(1)
    for seed in seeds:
        make(Recipe(seed=seed, tokens=TOKENS))
    usual = dataclasses.asdict(ssr.Settings(**ssr.PRESETS["toy"] | {"preset": "toy"}))
    own = {"toy_tokens": TOKENS, "track_kl": False}
    controls.run_all(seeds, args.folder, usual, own, ROWS)

    def after(row: str) -> list[float]:
        folders = [args.folder / f"{controls.slug(row)}-seed{seed}" for seed in seeds]
        return [controls.result(folder)["after"]["eval/exact_match"] for folder in folders]

    print(
        "\nSelf + external, less … (mean over the seeds ± standard error; seeds where it is above)"
    )
    for noise in NOISES:
        both = after(f"self + external, noise {noise}")
        for row in ("self", f"external, noise {noise}"):
            gains = [a - b for a, b in zip(both, after(row), strict=True)]
            error = statistics.stdev(gains) / len(gains) ** 0.5
            wins = sum(gain > 0 for gain in gains)
            print(f"noise {noise}, {row:22} {statistics.mean(gains):+.3f} ± {error:.3f}  "
                  f"{wins} of {len(gains)}")  # fmt: skip


if __name__ == "__main__":
    main()
