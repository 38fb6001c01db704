"""What the self-reward is compared with: other rewards on the same loop, and the table of them.

    python ssr.py --controls                   # every row below, three seeds each
    python ssr.py --controls --toy-skills compare,rate     # a toy that was taught all they need

The truth is used here, and only here, as a reward: by "oracle", the upper bound, and, with noise,
by "external", which plays the outside scorer (COMET, say) of the paper's SSR-X.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

from family import SKILLS
from judge import Score, Task
from toy.languages import quality

Answers = list[list[str | None]]


def random_scores(seed: int):
    """Nothing but noise: what the loop does with it is what the loop does by itself."""

    def score(tasks: list[Task], answers: Answers, step: int) -> list[list[Score]]:
        streams = [Random(f"random reward {seed} {step} {task.text}") for task in tasks]
        return [
            [Score(stream.random(), "random") for _ in row]
            for stream, row in zip(streams, answers, strict=True)
        ]

    return score


def oracle(tasks: list[Task], answers: Answers, step: int) -> list[list[Score]]:
    values = [
        [quality(a or "", t.reference) for a in r] for t, r in zip(tasks, answers, strict=True)
    ]
    return [[Score(value, "truth") for value in row] for row in values]


oracle.references = True


def external(seed: int, noise: float):
    """The truth with an error of that standard deviation."""

    def score(tasks: list[Task], answers: Answers, step: int) -> list[list[Score]]:
        streams = [Random(f"external scorer {seed} {step} {task.text}") for task in tasks]
        return [
            [Score(min(1.0, max(0.0, s.value + rng.gauss(0, noise))), "external") for s in row]
            for rng, row in zip(streams, oracle(tasks, answers, step), strict=True)
        ]

    score.references = True
    return score


def scorers(reward: str, judge, seed: int, noise: float) -> dict:
    """name -> (weight, scorer) for judge.Reward."""
    return {
        "self": {"self": (1.0, judge)},
        "random": {"random": (1.0, random_scores(seed))},
        "oracle": {"oracle": (1.0, oracle)},
        "external": {"external": (1.0, external(seed, noise))},
        "self+external": {"self": (0.5, judge), "external": (0.5, external(seed, noise))},
    }[reward]


REWARDS = ("self", "random", "oracle", "external", "self+external")
ROWS = {  # of the table: name -> options of ssr.py
    "self, live judge": {},
    "self, frozen judge": {"judge": "frozen"},
    "self, EMA judge": {"judge": "ema"},
    "self, written score": {"reading": "written"},
    "noisy external scorer": {"reward": "external"},
    "self + noisy external": {"reward": "self+external"},
    "truth (upper bound)": {"reward": "oracle"},
    "random": {"reward": "random"},
}
FAMILY = {  # family.py's
    "self-certainty": {"reward": "certainty"},
    "answer-span confidence": {"reward": "confidence"},
    "pairwise win rate (SPO)": {"reward": "pairs"},
    "group judging, one prompt": {"reward": "group"},
    "CREAM, previous weights": {"reward": "cream", "judge": "previous"},
    "majority vote": {"reward": "majority"},
}


def rows_for(toy_skills: Sequence[str]) -> dict[str, dict]:
    """Those that a toy with these skills can be asked."""
    can = {k: v for k, v in FAMILY.items() if SKILLS.get(v["reward"]) in (None, *toy_skills)}
    return ROWS | can


def run_all(seeds: list[int], folder: Path, usual: dict, own: dict, rows: dict[str, dict]) -> None:
    """Every row and seed in a process of its own, a core each; what is done is not done again.

    `usual`: the toy's settings; `own`: those of them that are changed for all runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(row, seed, folder / f"{slug(row)}-seed{seed}") for seed in seeds for row in rows]
    waiting = [job for job in jobs if not is_done(*job, usual | own, rows)]
    print(f"{len(jobs)} runs under {folder}, {len(jobs) - len(waiting)} of them done already")
    todo, running, done, start = len(waiting), [], 0, time.perf_counter()
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                job = waiting.pop(0)
                running.append((launch(*job, own | rows[job[0]]), job))
            time.sleep(0.2)
            for process, job in [r for r in running if r[0].poll() is not None]:
                running.remove((process, job))
                if not is_done(*job, usual | own, rows):
                    words = (folder / f"{job[2].name}.log").read_text()[-1500:]
                    raise RuntimeError(f"{job[0]}, seed {job[1]} failed:\n{words}")
                done += 1
                left = (time.perf_counter() - start) / done * (todo - done)
                print(f"  {done}/{todo}  {summary(*job)}  {left / 60:.0f} min left", flush=True)
    finally:
        for process, _ in running:
            process.terminate()
    print("\n" + table(seeds, folder, rows))


def is_done(row: str, seed: int, folder: Path, settings: dict, rows: dict) -> bool:
    """Ended at its last step, with the settings that are asked for now."""
    if not (folder / "result.json").is_file():
        return False
    had = json.loads((folder / "settings.json").read_text())
    asked = settings | rows[row] | {"seed": seed}
    free = ("folder", "threads", "controls", "seeds", "report")
    same = all(had.get(k) == v for k, v in asked.items() if k not in free)
    return same and result(folder)["steps"] == asked["steps"]


def launch(row: str, seed: int, folder: Path, own: dict):
    if folder.exists():  # begun and not ended, or with other settings
        folder.rename(folder.with_name(f"{folder.name}.old-{time.time_ns()}"))
    command = [sys.executable, str(Path(__file__).parent.parent / "ssr.py"), "--preset=toy"]
    command += [f"--seed={seed}", f"--folder={folder}", "--no-report"]
    for name, value in own.items():
        option = name.replace("_", "-")
        command.append(f"--no-{option}" if value is False else f"--{option}={value}")
    with open(folder.parent / f"{folder.name}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def slug(row: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in row).split())


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def summary(row: str, seed: int, folder: Path) -> str:
    r = result(folder)
    before, after = (r[when]["eval/exact_match"] for when in ("before", "after"))
    return f"{row}, seed {seed}: {before:.3f} -> {after:.3f}"


def table(seeds: list[int], folder: Path, rows: dict) -> str:
    """Markdown: mean ± standard deviation over the seeds."""
    lines = [
        "| reward | before | after | lowest seed | sampled at T 1, after | s a step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        folders = [folder / f"{slug(row)}-seed{seed}" for seed in seeds]
        results = [result(f) for f in folders]
        before = [r["before"]["eval/exact_match"] for r in results]
        after = [r["after"]["eval/exact_match"] for r in results]
        sampled = [r["after"]["eval/sampled_exact_match"] for r in results]
        cells = [row, spread(before), spread(after), f"{min(after):.3f}", spread(sampled)]
        cells.append(f"{math.fsum(map(seconds, folders)) / len(seeds):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds(folder: Path) -> float:
    """Of a step, on average: all its stages, and no evaluation."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in steps if row["step"]]
    stages = [
        value for row in steps for name, value in row.items()
        if name.startswith("seconds/") and name != "seconds/evaluate"
    ]  # fmt: skip
    return math.fsum(stages) / len(steps)


def spread(values: list[float]) -> str:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.3f} ± {deviation:.3f}"
