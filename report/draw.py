"""Draws the page of one or several runs: python -m report RUN [RUN …]

    python -m report runs/mine                                   # writes runs/mine/report.html
    python -m report live=runs/a live=runs/b frozen=runs/c --out compared.html
    python -m report runs/mine --svg curve.svg --panels held-out,judge,entropy
    python -m report runs/game/challenger runs/game/solver --out players.html     # of rzero

Self-rewarding fails quietly. The page shows curves, the judge against what it cannot see, the same
held-out sentences at several steps, and the alarms. It is one file without scripts that needs no
network. Runs of one NAME= share a colour.
"""

import argparse
import os
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import NamedTuple

from report import charts
from report.runs import RunData

SENTENCES = 40  # of the held-out texts in the page
GROUPS = 12  # training groups of each run in the page
WORD = re.compile(r"[^\W\u3040-\u9fff]+|.", re.S)  # Chinese and Japanese: character by character


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
    lines = [
        (run, name, dash, *run.series(key))
        for run in runs
        for (key, name), dash in zip(panel.keys.items(), charts.DASHES * 4, strict=False)
    ]
    lines = [line for line in lines if line[-1]]
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
    counts = [row[key] for row in spread_out(rows, 120, [])]
    columns = [[count / max(sum(bins), 1) for count in bins] for bins in counts]
    axes = charts.Axes((rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5), (0.0, 1.0))
    axes.add_heatmap(columns)
    title = f"<h3>{escape(key.removeprefix('histogram/'))}, {escape(run.title)}</h3>"
    return f"<figure>{title}{charts.svg(axes.content)}</figure>"


def picture(runs: list[RunData], labels: list[str], names: list[str]) -> str:
    """Some panels side by side, as an SVG file for light and dark pages."""
    panels, content = panels_for(runs), ""
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
    seconds = sum(x or 0.0 for row in run.rows for k, x in row.items() if k.startswith("seconds/"))
    text = f"{run.step} of {run.total_steps} steps in {timedelta(seconds=round(seconds))}"
    if not run.eval_rows:
        return "unsure", f"{text}. Nothing was measured on held-out texts."
    if run.step and all(row.get("groups/zero_variance", 1) == 1 for row in run.rows):
        return "unsure", "Nothing was learned: all samples of each group had the same reward."
    changes = [
        f"{name} {fixed(run.eval_at(0, key))} → {fixed(run.eval_at(run.last_eval, key))}"
        for name in [*run.eval_metrics[:1], "self"]
        if (key := f"eval/{name}") in run.eval_rows[0]
    ]
    text += f". Held-out {', '.join(changes)}. "
    if run.best is None:  # a player of R-Zero
        return "good", text
    weights = "No step was better than the start: keep the model the run began with. "
    if run.best:
        name = run.eval_metrics[0] if run.eval_metrics else "self"
        at_best = fixed(run.eval_at(run.best, f"eval/{name}"))
        weights = f"Take best/, of step {run.best} ({name} {at_best}). "
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


def text_html(text: str, reference: str | None = None) -> str:
    """Words that the reference does not have are marked."""
    expected = {" ", *WORD.findall(text if reference is None else reference)}
    words = [
        escape(word) if word in expected else f"<ins>{escape(word)}</ins>"
        for word in WORD.findall(text)
    ]
    return f'<div class="text" dir="auto">{"".join(words) or "(empty)"}</div>'


def cell_html(kind: str, head: str, text: str, *notes: str) -> str:
    """A translation; `text` is HTML, the others are not."""
    below = "".join(f'<div class="soft">{escape(note)}</div>' for note in notes)
    return f'<div class="cell {kind}"><b class="soft">{escape(head)}</b>{text}{below}</div>'


def spread_out(values: list, most: int, always: list) -> list:
    """About `most` of the values, evenly, and those in `always`."""
    every = max(1, -(-len(values) // most))
    return [v for i, v in enumerate(values) if i % every == 0 or v in always]


def translations(run: RunData) -> Iterator[tuple[tuple, str, float]]:
    """Held-out task, the cell of its greedy translation, and how far the judge is above the finest
    measure: at the start, the best step, the first alarm and the end."""
    fields = ("from", "to", "source", "reference")
    tasks = list(zip(*(run.evaluations[0][name] for name in fields), strict=True))
    steps = {0, run.best, *run.alarms[:1], run.evaluations[-1]["step"]}
    for row in [row for row in run.evaluations if row["step"] in steps]:
        marks = " (best)" * (row["step"] == run.best) + " (alarm)" * (row["step"] in run.alarms)
        for i, task in enumerate(tasks):
            one = {name: values[i] for name, values in row["greedy"].items()}
            scores = [f"{name} {fixed(one[name])}" for name in ("self", *run.eval_metrics)]
            notes = " · ".join(scores), f"judge: {one['judge'][:300]}"
            head = f"{run.title}, step {row['step']}{marks}{', wrong format' * (not one['format'])}"
            cell = cell_html(f"run{run.number}", head, text_html(one["text"], task[-1]), *notes)
            own = -9.0 if one["self"] is None else one["self"]
            yield task, cell, own - (one[run.eval_metrics[-1]] if run.eval_metrics else 0.0)


def sentences_html(runs: list[RunData]) -> str:
    """First the texts whose last translation the judge scores most above the measure."""
    cells: dict[tuple, str] = {}
    excess: dict[tuple, float] = {}
    for run in [run for run in runs if run.evaluations]:
        for task, cell, above in translations(run):
            cells[task] = cells.get(task, "") + cell
            excess[task] = above
    articles = ""
    for task in sorted(cells, key=excess.__getitem__, reverse=True)[:SENTENCES]:
        source, target, text, reference = task
        articles += f'<article><div class="soft">{escape(f"{source} → {target}")}</div>'
        articles += text_html(text)
        if reference:
            articles += f'<div class="soft">reference</div>{text_html(reference)}'
        articles += f'<div class="cells">{cells[task]}</div></article>'
    return articles


def groups_html(run: RunData) -> str:
    """Some training groups, among them the last one and the last with a wrong language."""
    wrong = [row for row in run.groups if any(x.get("wrong_language") for x in row["samples"])]
    text = ""
    for row in spread_out(run.groups, GROUPS, [*run.groups[-1:], *wrong[-1:]]):
        cells = ""
        for sample in sorted(row["samples"], key=lambda x: -(x["reward"] or 0.0)):
            advantage = sample["advantage"] or 0.0
            head = f"reward {fixed(sample['reward'])}, advantage {fixed(sample['advantage'])}"
            head += ", cut off" * sample["cut"]
            head += ", wrong language or copy" * bool(sample.get("wrong_language"))
            kind = "above" if advantage > 0 else "below" if advantage < 0 else "equal"
            judged = f"judge: {sample['judge'][:300]}"
            cells += cell_html(kind, head, text_html(sample["text"]), judged)
        head = f"{run.title}, step {row['step']}, {row['from']} → {row['to']}: {row['source']}"
        text += f"<details><summary>{escape(head)}</summary>"
        text += f'<div class="cells">{cells}</div></details>'
    return text


def settings_html(runs: list[RunData]) -> str:
    """Settings that differ are marked and come first, after where the runs come from."""
    every = [run.about | run.settings for run in runs]
    about = {key for run in runs for key in run.about}
    rows = {key: [str(some.get(key)) for some in every] for values in every for key in values}
    differing = {key for key in rows if len(set(rows[key])) > 1} - about
    body = ""
    for key in sorted(rows, key=lambda key: (key not in about, key not in differing)):
        kind = "differs" if key in differing else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in rows[key])
        body += f'<tr class="{kind}"><th>{escape(key)}</th>{cells}</tr>'
    head = "".join(f"<th>{escape(run.title)}</th>" for run in runs)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


# ---------------------------------------------------------------------------------------- the page


def page(runs: list[RunData], labels: list[str]) -> str:
    dots = [f'<span><i class="dot run{i}"></i>{escape(x)}</span>' for i, x in enumerate(labels)]
    panels = panels_for(runs).values()
    values = {
        "title": escape(", ".join(run.title for run in runs[:4]) + " …" * (len(runs) > 4)),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "css": charts.css(len(labels)),
        "verdicts": "".join(map(verdict_html, runs)),
        "colours": "".join(dots) if len(labels) > 1 else "",
        "curves": "".join(panel_html(p, axes) for p in panels if (axes := draw_panel(p, runs))),
        "histograms": "".join(map(histogram_html, runs)),
        "sentences": sentences_html(runs),
        "groups": "".join(map(groups_html, runs)),
        "settings": settings_html(runs),
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
    args = parser.parse_args(argv)
    runs = []
    for argument in args.runs:
        is_folder = Path(argument).is_dir()  # its name may have a = in it
        label, _, folder = ("", "", argument) if is_folder else argument.rpartition("=")
        name = folder if len(args.runs) > 1 else Path(folder).resolve().name
        runs.append(RunData(Path(folder), label or name))
    names = [run.label for run in runs]
    labels = list(dict.fromkeys(names))
    for run in runs:
        run.number = labels.index(run.label)  # its colour
        run.title = run.label if names.count(run.label) == 1 else f"{run.label}: {run.path}"
    if args.svg:
        write(Path(args.svg), picture(runs, labels, args.panels.split(",")))
    else:
        default = runs[0].path / "report.html" if len(runs) == 1 else "report.html"
        write(Path(args.out or default), page(runs, labels))
