"""Draw what happens in long runs: python -m docs.longrun OUT.svg live=RUN[,RUN…] frozen=RUN …

    python ssr.py --steps 1000 --final-lr 1 --seed 0 --folder runs/live-0     # and so on

Needs matplotlib, which the project itself does not: pip install matplotlib
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

PANELS = {
    "eval/exact_match": "exact match with the truth (dots: the alarm)",
    "eval/self": "the judge's score of the same translations",
    "policy/entropy": "entropy of the policy, nats a token",
}
COLOURS = ["#2166ac", "#4d9221", "#b2182b", "#762a83"]


def series(run: Path, key: str) -> tuple[list[int], list[float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get(key) is not None]
    if key.startswith("policy"):  # noisy: means of 25 steps
        groups = [rows[i : i + 25] for i in range(0, len(rows) - 24, 25)]
        return [g[-1]["step"] for g in groups], [sum(r[key] for r in g) / 25 for g in groups]
    return [row["step"] for row in rows], [row[key] for row in rows]


def main(out: str, groups: list[str]) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.6), layout="constrained")
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for colour, group in zip(COLOURS, groups, strict=False):
            name, runs = group.split("=")
            for i, run in enumerate(runs.split(",")):
                label = name.replace("_", " ") if i == 0 else None
                steps, values = series(Path(run), key)
                axis.plot(steps, values, color=colour, alpha=0.75, lw=1.4, label=label)
                if key == "eval/exact_match":  # a dot where the alarm rang
                    alarms = series(Path(run), "eval/alarm")[1]
                    rung = [(x, y) for x, y, a in zip(steps, values, alarms, strict=True) if a]
                    axis.scatter([x for x, _ in rung], [y for _, y in rung], color=colour, s=9)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, 1.02 if key.startswith("eval") else None)
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(out)
    print(out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
