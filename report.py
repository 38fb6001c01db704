"""A page to look at: python report.py RUN [RUN …]

    python report.py runs/mine                                   # writes runs/mine/report.html
    python report.py live=runs/a live=runs/b frozen=runs/c --out compared.html
    python report.py runs/mine --svg curve.svg --panels held-out,judge,entropy
    python report.py runs/game/challenger runs/game/solver --out players.html     # of rzero.py

Self-rewarding fails quietly, so look: curves, the judge against what it cannot see, the same
held-out sentences at several steps, the alarms. One file, no network: it opens from a disk and on
a phone. Runs of one NAME= share a colour. ssr.py calls this while it runs; the page of a run that
is not at its end reads itself again.

Only the files of a run are read (settings.json, metrics.jsonl, evaluations.jsonl, groups.jsonl),
so it works on runs from another machine. The page is report_page.html; here is what fills it.
"""

import argparse
import fcntl
import io
import json
import os
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from html import escape
from itertools import cycle
from pathlib import Path

POINTS = 400  # of a curve; what has more is shown as means of neighbours
COLUMNS = 12  # evaluations whose sentences are in the page, of each run
GROUPS = 40  # training groups, of each run
LETTERS = 4_000_000  # of all sentences in the page, about


@dataclass
class Panel:
    name: str
    title: str
    look: str
    """What to look for."""
    keys: dict[str, str]
    """Of metrics.jsonl -> what the line is called; the first is solid, the others dashed."""
    whole: bool = False
    """Show all of 0 … 1."""


LEARNING = [
    Panel("held-out", "Held-out quality", "Measured, never shown to the loop. If it falls while "
          "the judge's score rises, the judge is being fooled; a ring marks an alarm.",
          {"eval/MEASURE": "greedy", "eval/sampled_MEASURE": "sampled at T 1"}, True),
    Panel("judge", "The judge's own score, held-out", "Worth something only while it rises "
          "together with quality.", {"eval/self": "greedy", "eval/sampled_self": "sampled at T 1"},
          True),
    Panel("reward", "Reward of the step's samples", "What the loop maximises, by component.",
          {"reward/total": "total", "reward/self": "judge", "reward/comet": "COMET",
           "reward/format": "right form"}),
    Panel("correlation", "Judge's correlation with quality", "On held-out samples at T 1. It falls "
          "as samples grow alike; near 0 the judge says nothing about them.",
          {"eval/judge_correlation": "Pearson"}, True),
]  # fmt: skip
HEALTH = [
    Panel("entropy", "Entropy", "Nats a token. Near 0 all samples are alike, and there is nothing "
          "left to learn from.", {"policy/entropy": "policy"}),
    Panel("kl", "KL from the start", "Nats a token: how far the policy has moved. A sudden climb "
          "comes before a collapse.", {"policy/kl": "policy"}),
    Panel("groups", "Groups", "Shares: groups whose rewards are all the same, which teach nothing; "
          "and how many samples of a group are different ones.",
          {"groups/zero_variance": "no difference", "groups/distinct": "distinct"}, True),
    Panel("length", "Length of samples", "Tokens. A steady climb is a common way to please a "
          "judge; a fall to almost nothing is another.",
          {"length/mean": "mean", "length/max": "longest"}),
    Panel("habit", "Habits", "The beginning or ending that gained most since the start, as a share "
          "of held-out translations. What pleases the judge spreads: quotation marks, say.",
          {"habit": "most gained"}),
    Panel("unusable", "Not usable", "Shares: judgements that are no score, samples of a wrong "
          "form, samples cut off.", {"judge/invalid": "no score", "wrong/format": "wrong form",
                               "length/truncated": "cut off"}),
    Panel("gradient", "Gradient norm", "Before clipping. Spikes: lower --lr.",
          {"train/grad_norm": "norm"}),
    Panel("gap", "Sampler against trainer", "Difference of their log-probs: rounding, unless it "
          "grows.", {"policy/sampler_gap_max": "largest", "policy/sampler_gap": "mean"}),
]  # fmt: skip
COST = [
    Panel("rate", "Tokens sampled a second", "Over the whole step, judging and training included.",
          {"tokens_per_second": "whole step"}),
]  # fmt: skip
QUESTIONS = [  # of rzero.py's players
    Panel("difficulty", "Difficulty of questions", "Of those the Challenger writes. It should rise "
          "with what the Solver can do.", {"questions/depth": "depth", "questions/words": "words"}),
    Panel("agreement", "The Solver's agreement with itself", "On those questions. ½ is what the "
          "Challenger is paid for; where it is a likeness of translations, less than others have.",
          {"reward/agreement": "mean"}, True),
    Panel("different", "Different questions", "Shares of the batch: different questions; and "
          "what is like a question, its penalty. To repeat itself is a Challenger's trick.",
          {"questions/different": "different", "reward/repetition": "penalty"}, True),
    Panel("labels", "Right pseudo-labels", "Of the questions the Solver learns from; known in the "
          "toy alone. They may fall while questions get harder: R-Zero's known limit.",
          {"lessons/label_accuracy": "right"}, True),
    Panel("lessons", "Questions to learn from", "Those near enough to ½ (--band). Few are left: "
          "questions are too easy, or too hard.", {"lessons/kept": "kept"}),
]  # fmt: skip
PANELS = {panel.name: panel for panel in LEARNING + HEALTH + COST + QUESTIONS}
OF_PLAYERS = {  # what reads otherwise there
    "held-out": {"title": "Held-out accuracy", "look": "Nobody learns from these questions. "
                 "Sampled alone rises: answers agree more. Greedy rises, too: more is known."},
    "kl": {"title": "KL from the start of the turn", "look": "Nats a token: how far the player has "
           "moved since its iteration began. A sudden climb comes before a collapse."},
    "length": {"look": "Tokens: of the Challenger's questions, of the Solver's answers. They may "
               "grow as questions get harder, until they are cut off."},
    "unusable": {"look": "Shares: rewards that are no number, samples that are no question or no "
                 "answer, samples cut off."},
    "rate": {"look": "Over the whole step, training included, and for the Challenger the Solver's "
             "answers."},
}  # fmt: skip
CAME_TO = {
    "challenger": {"questions/depth": "depth of questions", "questions/words": "words a question",
                   "questions/different": "different ones", "reward/agreement": "agreement"},
    "solver": {"eval/accuracy": "held-out accuracy", "eval/sampled_accuracy": "sampled"},
}  # fmt: skip
STYLES = ["-", (0, (4, 2)), (0, (1, 1.6)), (0, (7, 2, 1, 2)), (0, (2, 4))]
LIGHT = ["#2f6fb7", "#c0562b", "#3d8f5f", "#8a55b0", "#a8831a", "#c2477f", "#3a8f9f", "#777777"]
DARK = ["#6aa9ef", "#f0915f", "#71c795", "#bd8fe0", "#dcb94e", "#ee85b3", "#7fcbd8", "#b5b5b5"]
AGAIN = '<label><input id="again" type="checkbox" checked> reads itself again every 20 s</label>'
INK, RULE, RED = "#010101", "#020202", "#030301"  # names, which page and picture replace


# --------------------------------------------------------------------------------- what is there


class Run:
    def __init__(self, path: Path, label: str, ended: bool = False):
        """`ended`: though whoever wrote it still holds its lock."""
        if not (path / "settings.json").is_file():
            inside = sorted(str(x.parent) for x in path.glob("*/settings.json"))
            hint = f"; inside are {', '.join(inside[:9])}" if inside else ""
            raise ValueError(f"{path} is not the folder of a run: it has no settings.json{hint}")
        self.path, self.label, self.title = path, label, label
        try:
            self.settings = json.loads((path / "settings.json").read_text())
            self.settings.keys()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}/settings.json is not one of a run ({error})") from None
        self.about = self.settings.pop("about", {})
        name, s = path.resolve().name, self.settings
        self.player = name if name in CAME_TO and f"{name}_steps" in s else ""
        if self.player:  # of what both are given its own
            s["steps"] = s["iterations"] * s[f"{name}_steps"]
            s["samples_per_prompt"] = s[f"{name}_samples"]
            s["lr"] = s.get(f"{name}_lr") or s["lr"]
        self.resumed = self.settings.pop("resumed", [])
        self.rows = rows_of(path / "metrics.jsonl")
        for row in self.rows:
            if row.get("reward/format") is not None:
                row["wrong/format"] = 1 - row["reward/format"]
        self.measured = [row for row in self.rows if {"eval/self", "eval/accuracy"} & row.keys()]
        self.evaluations = rows_of(path / "evaluations.jsonl")
        self.habits = habits([row["greedy"]["text"] for row in self.evaluations])
        found = {e["step"]: h for e, h in zip(self.evaluations, self.habits, strict=True)}
        for row in self.rows:
            if row["step"] in found:
                row["habit"] = found[row["step"]][0]
        self.groups = rows_of(path / "groups.jsonl")
        first = self.measured[0] if self.measured else {}
        named = [key[13:] for key in first if key.startswith("eval/sampled_")]
        self.measures = [name for name in named if name != "self"]
        self.can_ring = not self.player and bool(self.measures or not self.measured)
        self.running = not ended and is_locked(path / "lock")
        self.step = self.rows[-1]["step"] if self.rows else 0
        self.best = self.best_until(self.step)
        self.alarms = [row["step"] for row in self.measured if row.get("eval/alarm")]

    def series(self, key: str, points: int = POINTS) -> tuple[list[float], list[float]]:
        if "MEASURE" in key:
            key = key.replace("MEASURE", self.measures[0]) if self.measures else ""
        rows = [row for row in self.rows if row.get(key) is not None]
        return thinned([row["step"] for row in rows], [row[key] for row in rows], points)

    def best_until(self, step: int) -> int:
        """Whose weights best/ held then: the first of the evaluations with the highest measure."""
        usual = f"eval/{self.measures[0]}" if self.measures else "eval/self"
        known = [(row.get("eval/best_by", row.get(usual)), row["step"]) for row in self.measured]
        known = [x for x in known if x[0] is not None and x[1] <= step]
        return max(known, key=lambda x: (x[0], -x[1]))[1] if known else 0

    def at(self, step: int, key: str) -> float | None:
        return next((row.get(key) for row in self.measured if row["step"] == step), None)

    def came_to(self) -> list[tuple[str, float, float]]:
        """Of a player: what is known of it, at its first step and at its last."""
        most = self.step + 1  # no means of neighbours
        found = [(x, self.series(k, most)[1]) for k, x in CAME_TO[self.player].items()]
        return [(name, y[0], y[-1]) for name, y in found if y]

    def seconds(self) -> dict[str, float]:
        """By stage, of the whole run."""
        found: dict[str, float] = {}
        for row in self.rows:
            for key, value in row.items():
                if key.startswith("seconds/") and value:
                    found[key[8:]] = found.get(key[8:], 0.0) + value
        return found

    def state(self) -> str:
        of = self.settings.get("steps", "?")
        if self.running:
            return f"at step {self.step} of {of}"
        return f"{self.step} steps" if self.step == of else f"stopped at step {self.step} of {of}"


def is_locked(path: Path) -> bool:
    """Whoever writes a run holds its lock."""
    if not path.exists():
        return False
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def rows_of(path: Path) -> list[dict]:
    """JSON lines. A last one without its end is being written: it comes with the next look."""
    rows = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not JSON with a step ({error})") from None
        rows.append(row)
    return rows


def habits(texts: list[list[str]]) -> list[tuple[float, str]]:
    """Of each evaluation: the share that one beginning or ending has gained since the first, and
    which. Words, and letters, as not all scripts set spaces."""

    def ends(texts: list[str]) -> Counter:
        found: Counter = Counter()
        for text in texts:
            words = text.split() or [""]
            found.update({f"{words[0]} …", f"… {words[-1]}", f"{text[:1]}…", f"…{text[-1:]}"})
        return found

    first, gained = ends(texts[0]) if texts else Counter(), []
    for now in map(ends, texts):
        word, _ = max(now.items(), key=lambda item: (item[1] - first[item[0]], len(item[0])))
        gained.append(((now[word] - first[word]) / len(texts[0]), word))
    return gained


def thinned(x: list[float], y: list[float], points: int) -> tuple[list[float], list[float]]:
    """At most so many of them: means of as many neighbours as that takes."""
    size = -(-len(x) // points) or 1
    if size == 1:
        return x, y
    parts = [slice(i, i + size) for i in range(0, len(x), size)]
    return [statistics.fmean(x[p]) for p in parts], [statistics.fmean(y[p]) for p in parts]


def spread_out(values: list, most: int, always: set) -> list:
    """At most about `most` of them, evenly, and those in `always`."""
    every = max(1, -(-len(values) // most))
    return [v for i, v in enumerate(values) if i % every == 0 or v in always]


# ------------------------------------------------------------------------------------- pictures


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("it is drawn with matplotlib: pip install -r requirements.txt") from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "ssr", "font.size": 8, "text.color": INK,
        "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": RULE,
        "grid.color": RULE, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.linewidth": 0.5, "lines.linewidth": 1.4, "axes.axisbelow": True,
        "savefig.transparent": True, "axes.titlesize": 8,
    })  # fmt: skip
    return pyplot


def colour(number: int) -> str:
    """Another name: of the run with that number."""
    return f"#03{number % len(LIGHT):02x}03"


def as_svg(figure, prefix: str) -> str:
    """For a page: with no id that another picture has, and no size but what the page gives it."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'<g id="(run\d+)[^"]*">', r'<g class="\1">', text)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r"#03(\w\w)03", lambda m: f"var(--run{int(m[1], 16)})", text)
    return text.replace(INK, "currentColor").replace(RULE, "var(--line)").replace(RED, "var(--red)")


def numbered(runs: list[Run]) -> dict[str, int]:
    """Runs of one label have one colour."""
    return {label: i for i, label in enumerate(dict.fromkeys(run.label for run in runs))}


def plain(name: str) -> str:
    """Between dollars matplotlib sees mathematics."""
    return name.replace("$", r"\$")


def palette(colours: list[str]) -> str:
    return "".join(f"--run{i}:{c};" for i, c in enumerate(colours))


def draw_panel(axes, panel: Panel, runs: list[Run], numbers: dict[str, int], points=POINTS):
    """The lines' numbers, for the page to read out; none when no run has what is to be drawn."""
    drawn: list[dict] = []
    for n, run in enumerate(runs):
        number = numbers[run.label]
        had: list[list[float]] = []
        for (key, name), style in zip(panel.keys.items(), cycle(STYLES), strict=False):
            x, y = run.series(key, points)
            if not x or y in had:  # a reward of one component is its total: the same line twice
                continue
            had.append(y)
            dots = {"marker": ".", "markersize": 4} if len(x) < 30 else {}
            axes.plot(x, y, ls=style, color=colour(number), gid=f"run{number}-{n}{name}", **dots)
            line = {"run": number, "of": run.title, "name": name, "x": x}
            drawn.append(line | {"y": [round(v, 5) for v in y]})
        if panel.name == "held-out" and run.alarms:
            y = [run.at(step, f"eval/{run.measures[0]}") for step in run.alarms]
            ring = {"color": RED, "mfc": "none", "markersize": 5, "clip_on": False}
            axes.plot(run.alarms, y, "o", gid=f"run{number}-{n}alarms", **ring)
    values = [v for line in drawn for v in line["y"]]
    if values and panel.whole:
        axes.set_ylim(min(0.0, *values), max(1.02, *values))
    elif values and 0 <= min(values) < 0.5 * max(values):
        axes.set_ylim(bottom=0)
    return drawn


def panel_of(plt, panel: Panel, runs: list[Run], numbers: dict[str, int]) -> dict | None:
    figure, axes = plt.subplots(figsize=(4.3, 2.3), layout="constrained")
    series = draw_panel(axes, panel, runs, numbers)
    axes.set_xlabel("step")
    svg = as_svg(figure, panel.name) if series else ""
    box, limits = axes.get_position(), axes.get_xlim()
    plt.close(figure)
    if not series:
        return None
    place = {"left": box.x0, "right": box.x1, "top": 1 - box.y1, "bottom": 1 - box.y0}
    return {"panel": panel, "svg": svg, "place": place, "limits": limits, "series": series}


def histogram(plt, run: Run, n: int, number: int) -> str:
    """The judge's scores of each step's samples: the more of them, the darker."""
    names = (k for row in run.rows for k in row if k.startswith("histogram/"))
    name = next((k for k in names if k != "histogram/label"), "")  # that one is 0 or 1
    rows = [row for row in run.rows if row.get(name)]
    if not rows:
        return ""
    size = -(-len(rows) // 200)
    columns = [
        [sum(bin) for bin in zip(*(row[name] for row in rows[i : i + size]), strict=True)]
        for i in range(0, len(rows), size)
    ]
    shares = [[count / max(sum(column), 1) for count in column] for column in columns]
    most = max(map(max, shares)) or 1.0
    blue = (0.24, 0.52, 0.80)
    picture = [[(*blue, (c[b] / most) ** 0.6) for c in shares] for b in range(len(shares[0]))]
    figure, axes = plt.subplots(figsize=(4.3, 2.3), layout="constrained")
    axes.imshow(picture, origin="lower", aspect="auto", interpolation="nearest",
                extent=(rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5, 0, 1))  # fmt: skip
    axes.grid(False)
    score = "agreement" if name == "histogram/agreement" else "score"
    axes.set(xlabel="step", ylabel=score, title=plain(run.title))
    svg = as_svg(figure, f"histogram{n}")
    plt.close(figure)
    return figure_of(svg, number)


def scatter(plt, run: Run, n: int, number: int) -> str:
    """The judge against a measure it cannot see, on held-out samples at temperature 1."""
    if not run.measures or not run.evaluations:
        return ""
    measure = run.measures[-1]
    rows = {row["step"]: row for row in run.evaluations}
    steps = sorted({min(rows), run.best, max(rows)} & rows.keys())
    figure, axes = plt.subplots(
        1, len(steps), figsize=(4.3, 2.3), layout="constrained", sharex=True, sharey=True
    )
    for one, step in zip([axes] if len(steps) == 1 else axes, steps, strict=True):
        drawn = rows[step]["sampled"]
        points = [(x, y) for x, y in zip(drawn[measure], drawn["self"], strict=True)
                  if None not in (x, y)]  # fmt: skip
        x, y = zip(*points, strict=True) if points else ([], [])
        one.plot(x, y, "o", color=colour(number), alpha=0.25, markersize=2.5, markeredgewidth=0)
        r = run.at(step, "eval/judge_correlation")
        one.set(title=f"step {step}" + (f", r = {r:.2f}" if r is not None else ""), xlabel=measure)
    (axes if len(steps) == 1 else axes[0]).set_ylabel(f"judge, {plain(run.title)}")
    svg = as_svg(figure, f"scatter{n}")
    plt.close(figure)
    return figure_of(svg, number)


def figure_of(svg: str, number: int) -> str:
    return f'<figure class="run{number}">{svg}</figure>'


# ------------------------------------------------------------------------------------- the page


def panels_html(panels: list[dict], runs: list[Run]) -> str:
    parts = []
    gained = [(run, *run.habits[-1]) for run in runs if run.habits and run.habits[-1][0] > 0]
    last = ", ".join(f"{run.title}: “{word[:40]}” +{share:.0%}" for run, share, word in gained)
    for one in panels:
        panel = one["panel"]
        note = f"<br>{escape(last)}" if panel.name == "habit" else ""
        names = list(dict.fromkeys(line["name"] for line in one["series"]))
        order = list(panel.keys.values())
        keys = "".join(
            '<span class="key"><svg viewBox="0 0 24 4"><path d="M0 2H24" '
            f'class="dash{order.index(x) % len(STYLES)}"/></svg>{escape(x)}</span>'
            for x in names
        )
        parts.append(
            f'<figure class="panel" data-panel="{panel.name}"><h3>{escape(panel.title)}</h3>'
            f'<p class="look">{escape(panel.look)}{note}</p>{one["svg"]}'
            f'<figcaption><span class="keys">{keys}</span><output></output></figcaption></figure>'
        )
    return "".join(parts)


def number_of(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def overview(runs: list[Run], numbers: dict[str, int]) -> str:
    """A row a run: where it is, what it came to, what it cost."""
    rows = []
    for run in runs:
        measure = run.measures[0] if run.measures else None
        seconds, ranks = sum(run.seconds().values()), run.about.get("ranks", 1)
        device = run.about.get("device", "CPU")
        unit = "CPU" if device == "CPU" else "GPU"
        alarm = f'<b class="bad">{len(run.alarms)}</b>' if run.alarms else "none"
        last = run.measured[-1]["step"] if run.measured else 0
        own = [number_of(run.at(step, "eval/self")) for step in (0, run.best, last)]
        if (invalid := run.at(last, "eval/invalid") or 0) > 0.02:
            own[2] += f" ({invalid:.0%} no score)"
        ends = [number_of(run.at(step, f"eval/{measure}")) for step in (0, run.best, last)]
        if run.player:  # it keeps no best/
            found = [(x, number_of(y), "–", number_of(z)) for x, y, z in run.came_to()]
            (measure, *ends), (_, *own) = [*found, *[("–",) * 4] * 2][:2]
        cells = [
            f'<i class="dot run{numbers[run.label]}"></i>{escape(run.title)}',
            escape(run.state()) + (' <b class="live">running</b>' if run.running else ""),
            escape(measure or "not measured"),
            *ends,
            *own,
            "–" if run.player else str(run.best),
            alarm if run.can_ring else "cannot ring",
            took(seconds),
            f"{seconds * ranks / 3600:.2g} {unit} hours",
        ]
        rows.append("<tr><td>" + "</td><td>".join(cells) + "</td></tr>")
    return "".join(rows)


def took(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02} min" if hours else f"{rest // 60} min {rest % 60:02} s"


def verdict(runs: list[Run]) -> str:
    """What to know before anything else: how it went, and which weights to take."""
    return "".join(
        f'<p class="verdict {kind}">{f"<b>{escape(run.title)}</b>: " if len(runs) > 1 else ""}'
        f"{escape(words)}{link}</p>"
        for run in runs
        for kind, words, link in [verdict_of(run)]
    )


def verdict_of(run: Run) -> tuple[str, str, str]:
    if not run.measured and not (run.player and run.step):
        return "unsure", "Nothing has been measured yet.", ""
    if run.step and all(row.get("groups/zero_variance", 1) == 1 for row in run.rows):
        words = "No group of samples ever differed in its reward: nothing was learned. Look at "
        groups = "" if run.player else ", and at the training groups"
        return "unsure", f"{words}what could not be used{groups}.", ""
    if run.player:
        found = run.came_to()
        words = ", ".join(f"{x} {number_of(y)} → {number_of(z)}" for x, y, z in found)
        words = f"{run.state().capitalize()}: {words or 'nothing independent was measured'}."
        if turns := run.step // run.settings[f"{run.player}_steps"]:
            words += f" Weights: iteration-{turns}/{run.player}."
        worse = run.player == "solver" and any(z < y for _, y, z in found)
        return "unsure" if worse or not found else "good", words, ""
    last, weights = run.measured[-1]["step"], f"Take best/, of step {run.best}."
    if not run.best:
        weights = "No step was better than the start: keep the model the run began with."
    if not run.measures:
        words = "Nothing independent was measured, so no alarm can ring and the judge's score is "
        words += "all there is. Give --held-out a set with references, or --measures cometkiwi. "
        return "unsure", words + weights, ""
    name = run.measures[0]
    start, now = (number_of(run.at(step, f"eval/{name}")) for step in (0, last))
    words = f"{run.state().capitalize()}: held-out {name} {start} → {now}. "
    if not run.alarms:
        return "good", f"{words}{weights} No alarm.", ""
    words += f"Alarm at step {', '.join(map(str, run.alarms))}: the model thought better of itself "
    words += "while its translations got worse"
    why = next((e["alarm"] for e in reversed(run.evaluations) if e.get("alarm")), "")
    words += f" ({why}). " if why else ". "
    words += "It does not ring any more. " if run.alarms[-1] != last else ""
    words += weights if run.best == last else f"{weights[:-1]}, not last/. "
    return "bad", words, '<a href="#alarms">Examples</a>' if run.evaluations else ""


def stages(runs: list[Run], numbers: dict[str, int]) -> str:
    """Where the time of each run went, and what each stage did in a second."""
    rows = []
    units = {"sample": "tokens", "judge": "texts", "train": "tokens"}
    for run in runs:
        seconds = dict(sorted(run.seconds().items(), key=lambda item: -item[1]))
        total = sum(seconds.values()) or 1.0
        bars = "".join(
            f'<span class="stage {k}" style="flex-grow:{v / total:.4f}"></span>'
            for k, v in seconds.items()
        )
        said = []
        for name, value in seconds.items():
            called = "reward" if run.player and name == "judge" else name
            rates = [row[f"per_second/{name}"] for row in run.rows if f"per_second/{name}" in row]
            rate = f", {statistics.median(rates):,.0f} {units[name]}/s" if rates else ""
            said.append(
                f'<span><i class="stage {name}"></i>{called} {value / total:.0%}{rate}</span>'
            )
        rows.append(
            f'<div class="run{numbers[run.label]}"><h3>{escape(run.title)}</h3>'
            f'<div class="bar">{bars}</div><p class="stages">{"".join(said)}</p></div>'
        )
    return "".join(rows)


def alarms(runs: list[Run]) -> list[dict]:
    """At each alarm: why, and the sentences that lost most while the judge liked them no less."""
    found = []
    for run in runs:
        rows = {row["step"]: row for row in run.evaluations}
        tasks = run.evaluations[0] if run.evaluations else {}
        for row in run.evaluations:
            if not row.get("alarm"):
                continue
            best = run.best_until(row["step"])
            then, now = rows[best]["greedy"], row["greedy"]
            by = run.measures[-1]  # the finer one, where there are two
            losses = [
                (then[by][i] - now[by][i], i)
                for i in range(len(now["text"]))
                if None not in (then["self"][i], now["self"][i])
                and now["self"][i] >= then["self"][i]
            ]
            worst = [i for loss, i in sorted(losses, reverse=True)[:5] if loss > 0]
            examples = [
                {"source": tasks["source"][i], "reference": tasks["reference"][i],
                 "then": cell(then, i, run.measures), "now": cell(now, i, run.measures)}
                for i in worst
            ]  # fmt: skip
            found.append({"run": run.title, "step": row["step"], "why": row["alarm"],
                          "best": best, "examples": examples})  # fmt: skip
    return found


def without_alarms(runs: list[Run]) -> str:
    """What stands in their place."""
    if any(run.alarms for run in runs):
        return "They rang, but this run kept no evaluations.jsonl to show examples from."
    if any(run.can_ring for run in runs):
        return "None rang."
    return "They cannot ring: nothing independent was measured."


def cell(found: dict, i: int, measures: list[str]) -> dict:
    values = {name: found[name][i] for name in measures}
    return {"text": found["text"][i], "score": found["self"][i], "words": found["judge"][i],
            "right": found["format"][i], "values": values}  # fmt: skip


def sentences(runs: list[Run], numbers: dict[str, int]) -> dict:
    """Held-out texts and what each run made of them, greedily, at some steps."""
    columns, texts, room = [], {}, LETTERS
    for run in runs:
        if not run.evaluations:
            continue
        first = run.evaluations[0]
        names = [(first["source"][i], first["to"][i]) for i in range(len(first["source"]))]
        for i, name in enumerate(names):
            texts.setdefault(name, {"source": name[0], "to": name[1], "from": first["from"][i],
                                    "reference": first["reference"][i]})  # fmt: skip
        last = run.evaluations[-1]["step"]
        steps = [row["step"] for row in run.evaluations]
        kept = spread_out(steps, COLUMNS, {run.best, last, *run.alarms[:1]})
        for row in [row for row in run.evaluations if row["step"] in kept]:
            step = row["step"]
            cells = {name: cell(row["greedy"], i, run.measures) for i, name in enumerate(names)}
            marks = ["best"] * (step == run.best) + ["alarm"] * (step in run.alarms)
            columns.append({"run": run.title, "number": numbers[run.label], "step": step,
                            "marks": marks, "cells": cells,
                            "shown": step in (0, run.best, last)})  # fmt: skip
    rows = []
    for name, text in texts.items():
        row = text | {"cells": [column["cells"].get(name) for column in columns]}
        room -= sum(len(c["text"]) + len(c["words"]) + 60 for c in row["cells"] if c)
        if room < 0:
            break
        rows.append(row)
    heads = [{k: v for k, v in column.items() if k != "cells"} for column in columns]
    return {"columns": heads, "rows": rows, "all": len(texts)}


def training(runs: list[Run], numbers: dict[str, int]) -> list[dict]:
    found = []
    for run in runs:
        steps = list(dict.fromkeys(row["step"] for row in run.groups))
        kept = set(spread_out(steps, GROUPS, {steps[-1]} if steps else set()))
        about = {"run": run.title, "number": numbers[run.label]}
        found += [row | about for row in run.groups if row["step"] in kept]
    return found


def settings_html(runs: list[Run]) -> str:
    """Where runs differ and what their commands say, then all the rest, folded away."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    differing = [name for name in names if len(runs) > 1 and len(set(map(str, values[name]))) > 1]
    words = " ".join(said(run.about.get("command", "")) for run in runs)
    given = {word.replace("-", "_") for word in re.findall(r"--(?:no-)?([a-z-]+)", words)}
    about = list(dict.fromkeys(name for run in runs for name in run.about))
    rows = [(x, [run.about.get(x) for run in runs], "") for x in about if x != "launcher"]
    rows += [(x, values[x], "differs") for x in differing]
    rows += [(x, values[x], "") for x in names if x in given and x not in differing]
    rest = [(x, values[x], "") for x in names if x not in given and x not in differing]
    again = "".join(
        f"<p>{escape(run.title)} was resumed after step {x['from_step']} ({escape(x['started'])}, "
        f"commit {escape(x['commit'][:12])})</p>"
        for run in runs
        for x in run.resumed
    )
    usual = f"<details><summary>all others</summary>{settings_table(runs, rest)}</details>"
    return settings_table(runs, rows) + again + usual


def settings_table(runs: list[Run], rows: list[tuple[str, list, str]]) -> str:
    head = "".join(f"<th>{escape(run.title)}</th>" for run in runs)
    body = "".join(
        f'<tr class="{kind}"><th>{escape(name)}</th>'
        + "".join(f"<td>{escape(said(value))}</td>" for value in found)
        + "</tr>"
        for name, found, kind in rows
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def said(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def panels_for(runs: list[Run]) -> dict[str, Panel]:
    own = OF_PLAYERS if all(run.player for run in runs) else {}
    panels = {name: replace(panel, **own.get(name, {})) for name, panel in PANELS.items()}
    drawn = {key for panel in panels.values() for key in panel.keys}
    found = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    more = {k: k[7:] for k in found if k.startswith("reward/") and k not in drawn}
    panels["reward"].keys = panels["reward"].keys | more
    return panels


def page(runs: list[Run]) -> str:
    plt = pyplot()
    numbers, players = numbered(runs), all(run.player for run in runs)
    running = any(run.running for run in runs)
    drawn = {name: panel_of(plt, p, runs, numbers) for name, p in panels_for(runs).items()}
    data = {
        "panels": {
            name: {k: one[k] for k in ("place", "limits", "series")}
            for name, one in drawn.items()
            if one
        },
        "labels": list(numbers),
        "sentences": sentences(runs, numbers),
        "groups": training(runs, numbers),
        "alarms": alarms(runs),
        "running": running,
        "without_alarms": without_alarms(runs),
    }
    of_runs = list(enumerate(runs))
    several = f"{len(runs)} runs" if len(runs) > 1 else runs[0].title
    if players:
        folders = dict.fromkeys(Path(run.settings["folder"]).name for run in runs)
        several = f"R-Zero: {', '.join(folders)}"
    order = [*LEARNING[:1], *QUESTIONS, *LEARNING[1:]]
    filled = {
        "title": escape(several),
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "again": AGAIN * running,
        "light": palette(LIGHT),
        "dark": palette(DARK),
        "rules": "".join(
            f".run{i}{{--c:var(--run{i % len(LIGHT)})}}.hide{i} .run{i}:not(.dot){{display:none}}"
            for i in numbers.values()
        ),
        "dashes": "".join(
            f".dash{i}{{stroke-dasharray:{' '.join(map(str, s[1])) if s != '-' else 'none'}}}"
            for i, s in enumerate(STYLES)
        ),
        "verdict": verdict(runs),
        "overview": overview(runs, numbers),
        "learning": panels_html([drawn[p.name] for p in order if drawn[p.name]], runs),
        "health": panels_html([drawn[p.name] for p in HEALTH if drawn[p.name]], runs),
        "cost": panels_html([drawn[p.name] for p in COST if drawn[p.name]], runs),
        "histograms": "".join(histogram(plt, run, n, numbers[run.label]) for n, run in of_runs),
        "scatters": "".join(scatter(plt, run, n, numbers[run.label]) for n, run in of_runs),
        "stages": stages(runs, numbers),
        "settings": settings_html(runs),
        # "<" would let a sentence end the script it stands in.
        "data": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    }
    template = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    kind = "rzero" if players else "ssr"
    template = re.sub(r"(?s)<(ssr|rzero)>(.*?)</\1>", lambda m: m[2] * (m[1] == kind), template)
    return re.sub(r"\{\{(\w+)\}\}", lambda m: filled[m[1]], template)


def picture(runs: list[Run], panels: list[Panel]) -> str:
    """Some panels side by side, as a file of its own for light and dark pages."""
    plt = pyplot()
    numbers = numbered(runs)
    width = max(4.0, 3.6 * len(panels))
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3), layout="constrained")
    for one, panel in zip([axes] if len(panels) == 1 else axes, panels, strict=True):
        first = dict([next(iter(panel.keys.items()))])  # one line a run is enough to read
        if not draw_panel(one, replace(panel, keys=first), runs, numbers, 100):
            raise ValueError(f"--panels {panel.name}: no run has anything to draw there")
        one.set(title=panel.title, xlabel="step")
    if len(numbers) > 1:
        first = axes if len(panels) == 1 else axes[0]
        lines = [first.plot([], [], color=colour(i), label=plain(x)) for x, i in numbers.items()]
        first.legend(handles=[line for [line] in lines], frameon=False)
    head, tail = as_svg(figure, "x").split(">", 1)
    plt.close(figure)
    style = (
        f"svg{{color:#333;--line:#ccc;--red:#c00;{palette(LIGHT)}font-family:sans-serif}}"
        "text{font-family:sans-serif!important}@media(prefers-color-scheme:dark)"
        f"{{svg{{color:#ccc;--line:#555;--red:#f66;{palette(DARK)}}}}}"
    )
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}><style>{style}</style>{tail}'


# --------------------------------------------------------------------------------- command line


def write(path: Path, text: str) -> None:
    """Whole or not at all: somebody may be looking at it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(text.encode(errors="replace"))  # half of a surrogate pair is no text
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    print(f"wrote {path}, {len(text) / 1e6:.1f} MB")


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="the folder of a run")
    parser.add_argument("--out", help="default: report.html in the run; of several: here")
    parser.add_argument("--svg", help="write a picture of some panels instead")
    parser.add_argument("--panels", default="held-out,judge,entropy", help=", ".join(PANELS))
    parser.add_argument("--ended", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    runs = []
    for word in args.runs:
        label, _, folder = ("", "", word) if Path(word).is_dir() else word.partition("=")
        runs.append(Run(Path(folder or label), label if folder else "", args.ended))
    labels = [run.label for run in runs]
    names = [run.path.resolve().name for run in runs]
    for run, name in zip(runs, names, strict=True):  # short, and each its own
        run.title = name if names.count(name) == 1 else str(run.path)
        if run.label:
            run.title = run.label if labels.count(run.label) == 1 else f"{run.label}: {run.title}"
        run.label = run.label or run.title
    if args.svg:
        if unknown := set(args.panels.split(",")) - PANELS.keys():
            raise ValueError(f"--panels {min(unknown)} is unknown; known: {', '.join(PANELS)}")
        known = panels_for(runs)
        write(Path(args.svg), picture(runs, [known[name] for name in args.panels.split(",")]))
        return
    usual = runs[0].path / "report.html" if len(runs) == 1 else "report.html"
    write(Path(args.out or usual), page(runs))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
