"""R-Zero on the toy: seeds, and what is left of it without its parts.

    python -m bench.rzero                          # the rows below, into runs/rzero
    python -m bench.rzero --folder runs/mine "random Challenger"

Each run in a process of its own, as many at a time as there are cores; what is done is not done
again. The table has means over the seeds, first … last iteration where a figure moves.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from report import rows_of

FIVE, THREE = (0, 1, 2, 3, 4), (0, 1, 2)
LONG = ["--iterations=1", "--challenger-steps=150", "--challenger-lr=1e-3", "--solver-steps=1",
        "--band=0.5"]  # fmt: skip  # the Challenger alone: what it writes in the end is all learned
ROWS = {  # name -> options of rzero.py, seeds
    "R-Zero": ([], FIVE),
    "random Challenger": (["--challenge=random"], THREE),
    "random Challenger, four times the questions": (
        ["--challenge=random", "--questions=512"],
        THREE,
    ),
    "150 steps of the Challenger": (LONG, THREE),
    "150 steps, no repetition penalty": ([*LONG, "--repetition=0"], THREE),
    "the authors' code's reward": (["--challenge=released"], THREE),
    "translation": (["--preset=toy-translation"], THREE),
    "translation, random Challenger": (["--preset=toy-translation", "--challenge=random"], THREE),
}


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def run_all(rows: dict, folder: Path) -> None:
    waiting = [
        (folder / f"{slug(name)}-seed{seed}", [*options, f"--seed={seed}"])
        for name, (options, seeds) in rows.items()
        for seed in seeds
    ]
    waiting = [job for job in waiting if not (job[0] / "result.json").is_file()]
    running, total, begun = [], len(waiting), time.perf_counter()
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                path, options = waiting.pop(0)
                log = path.with_name(f"{path.name}.log")
                command = [sys.executable, "rzero.py", f"--folder={path}", "--no-report", *options]
                command += ["--resume"] * path.exists()
                with open(log, "w") as out:
                    process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
                running.append((process, path, log))
            time.sleep(0.5)
            for job in [job for job in running if job[0].poll() is not None]:
                running.remove(job)
                process, path, log = job
                if process.returncode:
                    raise RuntimeError(f"{path.name} failed:\n{log.read_text()[-1500:]}")
                done = total - len(waiting) - len(running)
                left = (time.perf_counter() - begun) / done * (total - done) / 60
                print(f"  {done}/{total}  {path.name}  {left:.0f} min left", flush=True)
    finally:
        for process, *_ in running:
            process.terminate()


def told(path: Path) -> dict[str, list[float]]:
    """What moved: at the start and after each iteration."""
    solver, challenger = (rows_of(path / x / "metrics.jsonl") for x in ("solver", "challenger"))
    lessons = [row for row in solver if "lessons/kept" in row]
    turns = [row["step"] for row in lessons] + [solver[-1]["step"] + 1]  # first steps
    ends = [row for row in solver if row["step"] + 1 in turns]
    asked = [row for row in challenger if "questions/different" in row]
    return {
        "greedy": [row["eval/accuracy"] for row in ends],
        "sampled": [row["eval/sampled_accuracy"] for row in ends],
        "depth": [row.get("questions/depth", row.get("questions/words")) for row in asked],
        "different": [row["questions/different"] for row in asked],
        "repetition": [row["reward/repetition"] for row in asked],
        "kept": [row["lessons/kept"] for row in lessons],
        "labels": [r["lessons/label_accuracy"] for r in lessons if "lessons/label_accuracy" in r],
    }


def table(rows: dict, folder: Path) -> str:
    lines = [
        "| | held-out, sampled: start, after each iteration | rose each time | greedy | depth of "
        "questions | learned from | right labels | alike | different |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (_, seeds) in rows.items():
        found = [told(folder / f"{slug(name)}-seed{seed}") for seed in seeds]

        def over(key: str, places: list[int] | None = None, found=found) -> str:
            """Means over the seeds of all values, or of some."""
            some = [[x[key][i] for i in places] if places else x[key] for x in found if x[key]]
            means = [statistics.fmean(values) for values in zip(*some, strict=True)]
            return " → ".join(f"{value:.3g}" for value in means) or "–"

        rose = sum(all(b > a for a, b in zip(x["sampled"], x["sampled"][1:], strict=False))
                   for x in found)  # fmt: skip
        cells = [name, over("sampled"), f"{rose} of {len(seeds)}", over("greedy", [0, -1])]
        cells += [over("depth", [0, -1]), over("kept"), over("labels"), over("repetition", [0, -1])]
        lines.append(f"| {' | '.join([*cells, over('different', [0, -1])])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        "bench.rzero", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--folder", default="runs/rzero")
    args = parser.parse_args()
    if unknown := set(args.rows) - ROWS.keys():
        sys.exit(f"bench.rzero: {', '.join(unknown)} is unknown; known: {', '.join(ROWS)}")
    rows = {name: ROWS[name] for name in args.rows or ROWS}
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    run_all(rows, folder)
    print("\n" + table(rows, folder))


if __name__ == "__main__":
    main()
