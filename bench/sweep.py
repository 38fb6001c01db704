"""Train every row of options on several seeds, and print a table: python -m bench.sweep SWEEP

    python -m bench.sweep rewards                    # ssr.py's toy with every reward
    python -m bench.sweep together                   # the self-reward and an outside scorer
    python -m bench.sweep spread                     # the same, scaled: plain sum and GDPO
    python -m bench.sweep rzero                      # R-Zero without its parts
    python -m bench.sweep rewards random "majority vote" --seeds 5 --folder runs/mine
    python -m bench.sweep rewards -- --steps=1000    # what follows -- goes to every run

Each run is a process of its own, as many at a time as there are cores. The same command continues
an interrupted sweep: finished runs (those with a result.json) are kept, others are resumed.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from judge import Score
from report.runs import read_rows
from rewards import toy as toy_rewards
from rewards.build import TOY_NOISE
from toy import pretrain, programs

ROOT = Path(__file__).parent.parent
Folders = dict[str, list[Path]]  # row -> its runs, one for each seed


class Sweep(NamedTuple):
    program: list[str]
    rows: dict[str, list[str]]
    """Name -> options."""
    seeds: int
    build_model: Callable[[int], Path]
    """The pretrained model of a seed, built before the runs that share it."""
    cells: Callable[[Folders, str], dict[str, str]]
    """Of a row: column -> cell."""


def run_sweep(sweep: Sweep, rows: list[str], seeds: int, folder: Path, more: list[str]) -> str:
    """The table, when all runs are done. `more`: options of every run."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    models = [sweep.build_model(seed) for seed in range(seeds)]
    folders = {
        row: [folder / f"{folder_name(row)}-seed{seed}" for seed in range(seeds)] for row in rows
    }
    run_all({
        folders[row][seed]:
        [*sweep.program, *sweep.rows[row], f"--model={model}", f"--seed={seed}", *more]
        for seed, model in enumerate(models) for row in rows
    })  # fmt: skip
    cells = {row: sweep.cells(folders, row) for row in rows}
    head = ["", *cells[rows[0]]]
    lines = [head, ["---"] * len(head), *([row, *cells[row].values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run_all(jobs: dict[Path, list[str]]) -> None:
    """`jobs`: folder -> program and options."""
    for folder, command in jobs.items():
        record = folder.with_suffix(".command")
        if record.exists() and (saved := json.loads(record.read_text())) != command:
            raise ValueError(f"{folder} was run as {' '.join(saved)} and would now be run as "
                             f"{' '.join(command)}: name another --folder")  # fmt: skip
        record.write_text(json.dumps(command))
    waiting = [folder for folder in jobs if not (folder / "result.json").is_file()]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them done already", flush=True)
    begun = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # after an error none is started
        futures = [pool.submit(run_one, folder, jobs[folder]) for folder in waiting]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                name = future.result()
                left = (time.perf_counter() - begun) / done * (len(waiting) - done) / 60
                print(f"  {done}/{len(waiting)}  {name}  {left:.0f} min left", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def run_one(folder: Path, command: list[str]) -> str:
    command = [sys.executable, *command, f"--folder={folder}", *["--resume"] * folder.exists()]
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if not (folder / "result.json").is_file():
        tail = folder.with_suffix(".log").read_text()[-1500:]
        raise RuntimeError(f"{folder.name} failed:\n{tail}")
    return folder.name


def folder_name(row: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in row).split())


# ---------------------------------------------------------------------------------------- cells


def final(folders: list[Path], when: str, name: str) -> list[float]:
    """A metric "before" or "after" the run, of each seed."""
    return [json.loads((f / "result.json").read_text())[when][f"eval/{name}"] for f in folders]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def step_seconds(folder: Path) -> float:
    """Mean over the steps: all stages, without evaluation."""
    steps = [row for row in read_rows(folder / "metrics.jsonl") if row["step"]]
    return sum(
        value for row in steps for name, value in row.items()
        if name.startswith("seconds/") and name != "seconds/evaluate"
    ) / len(steps)  # fmt: skip


def reward_cells(folders: Folders, row: str) -> dict[str, str]:
    after = final(folders[row], "after", "exact_match")
    return {
        "before": spread(final(folders[row], "before", "exact_match")),
        "after": spread(after),
        "lowest seed": f"{min(after):.3f}",
        "sampled at T 1, after": spread(final(folders[row], "after", "sampled_exact_match")),
        "s a step": f"{statistics.fmean(map(step_seconds, folders[row])):.2f}",
    }


def rzero_cells(folders: Folders, row: str) -> dict[str, str]:
    """The Solver at the start and after each iteration, the Challenger's first and last step:
    means over the seeds."""
    results = [json.loads((folder / "result.json").read_text()) for folder in folders[row]]
    steps = [read_rows(folder / "challenger" / "metrics.jsonl") for folder in folders[row]]
    steps = [[x for x in rows if "questions/different" in x] for rows in steps]

    def means(values: list[list[float]]) -> str:
        columns = zip(*values, strict=True)
        return " → ".join(f"{statistics.fmean(column):.3g}" for column in columns) or "–"

    def solver(name: str) -> str:
        return means([[x for x in r.get(name, []) if x is not None] for r in results])

    def challenger(name: str) -> str:
        return means([[rows[0][name], rows[-1][name]] for rows in steps if rows])

    sampled = [r["eval/sampled_accuracy"] for r in results]
    rose = sum(all(a < b for a, b in itertools.pairwise(values)) for values in sampled)
    return {
        "held-out, sampled": means(sampled),
        "rose each time": f"{rose} of {len(results)}",
        "greedy": solver("eval/accuracy"),
        "depth of questions": challenger("questions/depth"),
        "learned from": solver("lessons/kept"),
        "right labels": solver("lessons/label_accuracy"),
        "alike": challenger("reward/repetition"),
        "different": challenger("questions/different"),
    }


# --------------------------------------------------------------------------------------- sweeps


def build_skilled(seed: int) -> Path:
    """One model for all rewards: SPO and group judging need skills that not every toy has."""
    return pretrain.language_model(pretrain.Recipe(seed=seed, skills=pretrain.SKILLS))


def build_default(seed: int) -> Path:
    return pretrain.language_model(pretrain.Recipe(seed=seed))


def build_weak(seed: int) -> Path:
    """At the default, 3.5e6 tokens, the judge alone reaches the ceiling."""
    return pretrain.language_model(pretrain.Recipe(seed=seed, tokens=2e6))


def scaled_external(factor: float):
    """The toy's outside scorer with another spread, as a part of --reward."""
    external = toy_rewards.external(0, TOY_NOISE)

    def score(*asked) -> list[list[Score]]:
        return [[Score(factor * x.value, x.judge_text) for x in row] for row in external(*asked)]

    score.references = True
    return score


narrow, wide = scaled_external(0.1), scaled_external(10.0)


def build_programs(seed: int) -> Path:
    return programs.program_model(programs.ProgramRecipe(seed=seed))


REWARDS = {
    "self, live judge": [],
    "self, frozen judge": ["--judge=frozen"],
    "self, EMA judge": ["--judge=ema"],
    "self, written score": ["--score-mode=written"],
    "noisy external scorer": ["--reward=external"],
    "self + noisy external": ["--reward=self+external"],
    "truth (upper bound)": ["--reward=oracle"],
    "random": ["--reward=random"],
    "self-certainty": ["--reward=certainty"],
    "answer-span confidence": ["--reward=confidence"],
    "pairwise win rate (SPO)": ["--reward=pairs"],
    "group judging, one prompt": ["--reward=group"],
    "CREAM, previous weights": ["--reward=cream", "--judge=previous"],
    "majority vote": ["--reward=majority"],
}
TOGETHER = {"self": [], "external": ["--reward=external"],
            "self + external": ["--reward=self+external"]}  # fmt: skip
SPREAD = TOGETHER | {
    "self + a tenth of external": [f"--reward=self+{__file__}:narrow"],
    "self + ten times external": [f"--reward=self+{__file__}:wide"],
    "self + external, GDPO": ["--reward=self+external", "--advantage-scale=each"],
}
CHALLENGER_ALONE = [
    "--iterations=1", "--challenger-steps=150", "--challenger-lr=1e-3", "--solver-steps=1",
    "--band=0-1",
]  # fmt: skip
RZERO = {
    "R-Zero": [],
    "random Challenger": ["--challenge=random"],
    "random Challenger, four times the questions": ["--challenge=random", "--questions=512"],
    "150 steps of the Challenger": CHALLENGER_ALONE,
    "150 steps, no repetition penalty": [*CHALLENGER_ALONE, "--repetition=0"],
    "the authors' code's reward": ["--challenge=released"],
}
TOY = [str(ROOT / "ssr.py"), "--preset=toy"]
SWEEPS = {
    "rewards": Sweep(TOY, REWARDS, 3, build_skilled, reward_cells),
    "together": Sweep([*TOY, "--no-track-kl"], TOGETHER, 8, build_weak, reward_cells),
    "spread": Sweep([*TOY, "--no-track-kl", "--steps=40"], SPREAD, 8, build_default, reward_cells),
    "rzero": Sweep(["-m", "rzero"], RZERO, 3, build_programs, rzero_cells),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("bench.sweep", description=__doc__.split(":")[0])
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
    parser.add_argument("--seeds", type=int, help="how many, from 0")
    parser.add_argument("--folder", type=Path, help="default: runs/SWEEP")
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:at])
    sweep = SWEEPS[args.sweep]
    if unknown := set(args.rows) - sweep.rows.keys():
        parser.error(f"no row {', '.join(sorted(unknown))}: use {', '.join(sweep.rows)}")
    folder = args.folder or Path("runs") / args.sweep
    rows, seeds = args.rows or list(sweep.rows), args.seeds or sweep.seeds
    try:
        print("\n" + run_sweep(sweep, rows, seeds, folder, argv[at + 1 :]))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"bench.sweep: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
