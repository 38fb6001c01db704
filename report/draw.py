"""Draws the page of one or several runs: python -m report RUN [RUN …]

    python -m report runs/mine                                   # writes runs/mine/report.html
    python -m report live=runs/a live=runs/b frozen=runs/c --out compared.html
    python -m report runs/mine --svg curve.svg --panels held-out,judge,entropy
    python -m report runs/game/challenger runs/game/solver --out players.html     # of rzero

Self-rewarding fails quietly. The page shows curves, the judge against what it cannot see, the same
held-out sentences at several steps, and the alarms. It is one file that needs no network. Runs of
one NAME= share a colour. The page of a run that goes on reloads itself.
"""

import argparse
import json
import os
import re
import time
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import NamedTuple

from report import charts
from report.runs import RunData

COLUMNS = 12  # evaluations of each run whose sentences are in the page
GROUPS = 40  # training groups of each run in the page


class Panel(NamedTuple):
    title: str
    look: str
    """What to look for."""
    keys: dict[str, str]
    """Metric -> name of its line; the first line is solid, the others are dashed."""
    is_share: bool = False


PANELS = {
    "held-out": Panel("Held-out quality", "The loop never sees it. If it falls while the judge's "
        "score rises, the judge is being fooled; a ring marks an alarm.",
        {"eval/{measure}": "greedy", "eval/sampled_{measure}": "sampled at T 1"}, True),
    "judge": Panel("The judge's own score, held-out", "Worth something only while it rises with "
        "quality.", {"eval/self": "greedy", "eval/sampled_self": "sampled at T 1"}, True),
    "reward": Panel("Reward of the step's samples", "What the loop maximises, by component.",
        {"reward/total": "total"}),
    "correlation": Panel("Correlation of judge and quality", "On held-out samples at T 1. It falls "
        "as samples grow alike; near 0 the scores say nothing about them.",
        {"eval/judge_correlation": "Pearson"}, True),
    "difficulty": Panel("Difficulty of questions", "R-Zero: should rise with what the Solver can "
        "do.", {"questions/depth": "depth", "questions/words": "words"}),
    "lessons": Panel("Questions to learn from", "R-Zero: those with agreement in --band. If "
        "few are left, questions are too easy or too hard.", {"lessons/kept": "kept"}),
    "entropy": Panel("Entropy", "Nats a token. Near 0 all samples are alike, and nothing is left "
        "to learn from.", {"policy/entropy": "policy"}),
    "kl": Panel("KL from the start", "Nats a token, in R-Zero from the start of a turn. A sudden "
        "climb comes before a collapse.", {"policy/kl": "policy"}),
    "groups": Panel("Groups", "Shares of groups whose rewards are all equal, which teach nothing, "
        "and of distinct samples in a group.",
        {"groups/zero_variance": "all equal", "groups/distinct": "distinct"}, True),
    "length": Panel("Length of samples", "Tokens. A steady climb often only pleases the judge; a "
        "fall to almost nothing may, too.", {"length/mean": "mean", "length/max": "longest"}),
    "unusable": Panel("Not usable", "Shares of judgements and of samples; a wrong language may be "
        "a copy. The training groups below show examples.", {"judge/invalid": "no score",
        "length/truncated": "cut off", "reward/wrong_language": "wrong language"}),
    "gradient": Panel("Gradient norm", "Before clipping. If it spikes, lower --lr.",
        {"train/grad_norm": "norm"}),
    "gap": Panel("Sampler against trainer", "Difference of their log-probs: rounding, unless it "
        "grows.", {"policy/sampler_gap_max": "largest", "policy/sampler_gap": "mean"}),
}  # fmt: skip


def panels_for(runs: list[RunData]) -> dict[str, Panel]:
    """PANELS, with every component of the reward that the runs have."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    parts = {key: key.removeprefix("reward/") for key in keys if key.startswith("reward/")}
    parts.pop("reward/wrong_language", None)  # has another panel
    reward = PANELS["reward"]
    return PANELS | {"reward": reward._replace(keys=reward.keys | parts)}


def draw_panel(panel: Panel, runs: list[RunData]) -> charts.Axes | None:
    """None if no run has anything to draw."""
    lines: list[tuple[RunData, str, str, list[float], list[float]]] = []
    for run in runs:
        drawn: list = []
        for (key, name), dash in zip(panel.keys.items(), charts.DASHES * 4, strict=False):
            x, y = run.series(key)
            if x and y not in drawn:  # a reward of one component equals its total
                drawn.append(y)
                lines.append((run, name, dash, x, y))
    if not lines:
        return None
    steps = [step for *_, x, _ in lines for step in x]
    values = [value for *_, y in lines for value in y]
    x_range = (min(steps), max(max(steps), min(steps) + 1))
    axes = charts.Axes(x_range, charts.y_range(values, panel.is_share))
    for run, name, dash, x, y in lines:
        axes.add_line(x, y, run.number, dash, f"{run.title}, {name}: {y[0]:.4g} → {y[-1]:.4g}")
        axes.legend[name] = dash
    for run in runs if "eval/{measure}" in panel.keys else []:
        for step in run.alarms:
            axes.add_ring(step, run.eval_at(step, f"eval/{run.eval_metrics[0]}"))
    return axes


def panel_html(panel: Panel, axes: charts.Axes) -> str:
    legend = "".join(
        '<span><svg viewBox="0 0 24 4"><path d="M0 2H24" '
        f'stroke-dasharray="{dash}"/></svg>{escape(name)}</span>'
        for name, dash in axes.legend.items()
    )
    return (
        f'<figure><h3>{escape(panel.title)}</h3><p class="soft">{escape(panel.look)}</p>'
        f'{charts.svg(axes.content)}<figcaption class="tools soft">{legend}</figcaption></figure>'
    )


def histogram_html(run: RunData) -> str:
    """The scores of each step's samples: the more of them, the darker."""
    names = (key for row in run.rows for key in row if key.startswith("histogram/"))
    key = next((name for name in names if name != "histogram/label"), "")  # labels are 0 or 1
    rows = [row for row in run.rows if row.get(key)]
    if not rows:
        return ""
    counts = [row[key] for row in spread_out(rows, 120)]
    columns = [[count / max(sum(bins), 1) for count in bins] for bins in counts]
    axes = charts.Axes((rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5), (0.0, 1.0))
    axes.add_heatmap(columns)
    title = f"<h3>{escape(key.removeprefix('histogram/'))}, {escape(run.title)}</h3>"
    return f"<figure>{title}{charts.svg(axes.content)}</figure>"


def picture(runs: list[RunData], names: list[str]) -> str:
    """Some panels side by side, as an SVG file for light and dark pages."""
    labels, panels, content = number_runs(runs), panels_for(runs), ""
    for i, name in enumerate(names):
        if name not in panels:
            raise ValueError(f"--panels {name} is unknown; known: {', '.join(panels)}")
        panel = panels[name]
        first_key = dict([next(iter(panel.keys.items()))])  # one line a run is enough to read
        axes = draw_panel(panel._replace(keys=first_key), runs)
        if not axes:
            raise ValueError(f"--panels {name}: no run has anything to draw there")
        title = charts.text((charts.LEFT + charts.RIGHT) / 2, 0, panel.title)
        content += f'<g transform="translate({i * charts.WIDTH} 40)">{title}{axes.content}</g>'
    for i, label in enumerate(labels if len(labels) > 1 else []):
        x = charts.LEFT + i * 130
        content += f'<path class="line run{i}" d="M{x} 10h20"/>'
        content += charts.text(x + 26, 14, label, "start")
    content = f"<style>{charts.css(len(labels))}</style>{content}"
    return charts.svg(content, charts.WIDTH * len(names), charts.HEIGHT + 40)


# ----------------------------------------------------------------------------- parts of the page


def fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def assess_run(run: RunData) -> tuple[str, str]:
    """What to read first: good, unsure or bad; how the run went and which weights to take."""
    if not run.eval_rows:
        return "unsure", f"{run.state().capitalize()}: nothing was measured on held-out texts."
    if run.step and all(row.get("groups/zero_variance", 1) == 1 for row in run.rows):
        return "unsure", "Nothing was learned: all samples of each group had the same reward."
    changes = [
        f"{name} {fixed(run.eval_at(0, key))} → {fixed(run.eval_at(run.last_eval, key))}"
        for name in [*run.eval_metrics[:1], "self"]
        if (key := f"eval/{name}") in run.eval_rows[0]
    ]
    text = f"{run.state().capitalize()}: held-out {', '.join(changes)}. "
    if run.best is None:  # a player of R-Zero
        return "good", text
    weights = f"Take best/, of step {run.best}. "
    if not run.best:
        weights = "No step was better than the start: keep the model the run began with. "
    if not run.eval_metrics:
        text += "Nothing independent was measured, so no alarm can ring. Give --held-out a set "
        return "unsure", f"{text}with references, or --eval-metrics cometkiwi. {weights}"
    if not run.alarms:
        return "good", f"{text}{weights}No alarm."
    why = next((row["alarm"] for row in reversed(run.evaluations) if row.get("alarm")), "")
    text += f"Alarm at step {', '.join(map(str, run.alarms))}: the judge's score rose while "
    text += f"translations got worse{f' ({why})' if why else ''}. "
    return "bad", text + weights + ("" if run.best == run.last_eval else "Do not take last/.")


def verdict_html(run: RunData) -> str:
    kind, text = assess_run(run)
    return f'<p class="verdict {kind}"><b>{escape(run.title)}</b>: {escape(text)}</p>'


def overview_row(run: RunData) -> str:
    """Where the run is, and the metrics at its start, best and last evaluation."""
    metrics = []
    for name in [run.eval_metrics[0] if run.eval_metrics else "–", "self"]:
        values = [run.eval_at(step, f"eval/{name}") for step in (0, run.best, run.last_eval)]
        metrics += [escape(name), *map(fixed, values)]
    alarms = f'<b class="bad">{len(run.alarms)}</b>' if run.alarms else "none"
    seconds = sum(x or 0.0 for row in run.rows for k, x in row.items() if k.startswith("seconds/"))
    cells = [
        f'<i class="dot run{run.number}"></i>{escape(run.title)}',
        escape(run.state()) + (", running" if run.running else ""),
        *metrics,
        "–" if run.best is None else str(run.best),
        alarms if run.eval_metrics and run.best is not None else "cannot ring",
        str(timedelta(seconds=round(seconds))),
    ]
    return f"<tr><td>{'</td><td>'.join(cells)}</td></tr>"


def settings_html(runs: list[RunData]) -> str:
    """Settings that differ are marked and come first, after where the runs come from."""

    def as_text(value) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    every = [run.about | run.settings for run in runs]
    about = {key for run in runs for key in run.about}
    rows = {key: [as_text(some.get(key)) for some in every] for values in every for key in values}
    differing = {key for key in rows if len(set(rows[key])) > 1} - about
    body = ""
    for key in sorted(rows, key=lambda key: (key not in about, key not in differing)):
        kind = "differs" if key in differing else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in rows[key])
        body += f'<tr class="{kind}"><th>{escape(key)}</th>{cells}</tr>'
    head = "".join(f"<th>{escape(run.title)}</th>" for run in runs)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def spread_out(values: list, most: int, always: tuple = ()) -> list:
    """About `most` of the values, evenly, and those in `always`."""
    every = max(1, -(-len(values) // most))
    return [v for i, v in enumerate(values) if i % every == 0 or v in always]


def wrong_language(run: RunData) -> list[dict]:
    """The latest training group with an answer in a wrong language."""
    return [g for g in run.groups if any(x.get("wrong_language") for x in g["samples"])][-1:]


def sentences(runs: list[RunData]) -> dict:
    """Held-out texts, and how each run translated them greedily at some steps."""
    fields, texts, columns, cells = ("source", "to", "from", "reference"), {}, [], []
    for run in [run for run in runs if run.evaluations]:
        tasks = list(zip(*(run.evaluations[0][name] for name in fields), strict=True))
        texts |= dict.fromkeys(tasks)
        steps = [row["step"] for row in run.evaluations]
        kept = spread_out(steps, COLUMNS, (run.best, steps[-1], *run.alarms[:1]))
        for row in [row for row in run.evaluations if row["step"] in kept]:
            step, names = row["step"], ["text", "judge", "format", "self", *run.eval_metrics]
            marks = ["best"] * (step == run.best) + ["alarm"] * (step in run.alarms)
            column = {"run": run.title, "number": run.number, "step": step, "marks": marks}
            column |= {"eval_metrics": run.eval_metrics, "shown": step in (0, run.best, steps[-1])}
            columns.append(column)
            values = zip(*(row["greedy"][name] for name in names), strict=True)
            values = [dict(zip(names, x, strict=True)) for x in values]
            cells.append(dict(zip(tasks, values, strict=True)))
    rows = [
        dict(zip(fields, task, strict=True)) | {"cells": [x.get(task) for x in cells]}
        for task in texts
    ]
    return {"columns": columns, "rows": rows}


# ---------------------------------------------------------------------------------------- the page


def number_runs(runs: list[RunData]) -> list[str]:
    """Gives the runs of one label one number, which is their colour. Returns the labels."""
    labels = list(dict.fromkeys(run.label for run in runs))
    for run in runs:
        run.number = labels.index(run.label)
    return labels


def page(runs: list[RunData]) -> str:
    labels = number_runs(runs)
    panels = panels_for(runs).values()
    dots = [f'<span><i class="dot run{i}"></i>{escape(x)}</span>' for i, x in enumerate(labels)]
    data = {
        "groups": [
            row | {"run": run.title}
            for run in runs
            for row in spread_out(run.groups, GROUPS, (*run.groups[-1:], *wrong_language(run)))
        ],
        "running": any(run.running for run in runs),
    }
    values = {
        "title": escape(", ".join(run.title for run in runs[:4]) + " …" * (len(runs) > 4)),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "css": charts.css(len(labels)),
        "verdicts": "".join(map(verdict_html, runs)),
        "overview": "".join(map(overview_row, runs)),
        "colours": "".join(dots) if len(labels) > 1 else "",
        "curves": "".join(panel_html(p, axes) for p in panels if (axes := draw_panel(p, runs))),
        "histograms": "".join(map(histogram_html, runs)),
        "settings": settings_html(runs),
        # A "<" in a sentence could end the script element.
        "data": json.dumps(data | sentences(runs), ensure_ascii=False).replace("<", "\\u003c"),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: values[m[1]], template)


def write(path: Path, text: str) -> None:
    """Writes the file whole or not at all: a browser may be reading it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    print(f"wrote {path}, {len(text) / 1e6:.1f} MB")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="the folder of a run")
    parser.add_argument("--out", help="default: report.html in the run; of several: here")
    parser.add_argument("--svg", help="write a picture of some panels instead")
    parser.add_argument("--panels", default="held-out,judge,entropy", help=", ".join(PANELS))
    parser.add_argument("--ended", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    runs = []
    for argument in args.runs:
        is_folder = Path(argument).is_dir()  # its name may have a = in it
        label, _, folder = ("", "", argument) if is_folder else argument.rpartition("=")
        name = folder if len(args.runs) > 1 else Path(folder).resolve().name
        runs.append(RunData(Path(folder), label or name, args.ended))
    labels = [run.label for run in runs]
    for run in runs:
        run.title = run.label if labels.count(run.label) == 1 else f"{run.label}: {run.path}"
    if args.svg:
        write(Path(args.svg), picture(runs, args.panels.split(",")))
    else:
        default = runs[0].path / "report.html" if len(runs) == 1 else "report.html"
        write(Path(args.out or default), page(runs))
