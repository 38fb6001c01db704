"""Can a model judge? Its scores of given translations beside scores that somebody else gave.

    python ssr.py --judge-only rows.jsonl --model DIR_OR_ID      # or several, one.jsonl,other.jsonl

    {"text": "Good night.", "source": "en", "target": "zh", "translation": "晚安。", "score": 97.5}

A line a translation; "score" (or "scores": {"human": 97.5, "comet": 0.91}) is what it is compared
with, on whatever scale; without any, the judge's own scores are all there is. The segments.jsonl
of `python -m eval` are such files. Several translations of one text say most: GRPO compares
siblings, and "same text" is how often the judge prefers the better of two.
"""

import json
import math
import re
import statistics
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import pairs_of, parsed, tasks_of
from eval.rows import Rows, in_rounds, whole
from eval.score import Found, interval, replicates
from judge import Score, Task
from ranks import Ranks

TOO_FEW = 3  # of rows, or of pairs, to say anything about


class Item(NamedTuple):
    task: Task
    translation: str
    given: dict[str, float]


def read(paths: list[Path], source: str = "", target: str = "") -> list[Item]:
    pairs = pairs_of(source, target)
    return [item for path in paths for item in read_one(path, pairs)]


def read_one(path: Path, pairs: list[tuple[str, str]]) -> list[Item]:
    items = []
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parsed(line)
                if not isinstance(row.get("translation"), str):
                    raise ValueError('"translation" is missing, or no string')
                row["translation"].encode()  # half of a surrogate pair is no text
                task, *more = tasks_of(row, pairs, False)
                if more:
                    raise ValueError("into which language? --target names several")
                items.append(Item(task, row["translation"], scores_in(row)))
            except (ValueError, RecursionError, OverflowError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not items:
        raise ValueError(f"{path} holds no translations")
    return items


def scores_in(row: dict) -> dict[str, float]:
    """What has none (null) has no say."""
    found = row.get("scores") or {}
    if not isinstance(found, dict):
        raise ValueError('"scores" must be an object, a name and a number each')
    found = {k: v for k, v in (found | {"score": row.get("score")}).items() if v is not None}
    for name, value in found.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(f'the score "{name}" is {value!r}, no number')
    return found


def judged(items: list[Item], judge: Callable, ranks: Ranks, path: Path, key: dict) -> list[dict]:
    """A row for each with the judge's "score", 0 … 1 or null, and its words; kept in `path`. Long
    ones are judged first: what is judged together is about as long, and what is too much is soon
    known."""

    def length(i: int) -> int:
        return len(items[i].task.text) + len(items[i].translation)

    def work(numbers: list[int]) -> list[dict]:
        tasks = [items[i].task._replace(reference=None) for i in numbers]
        found: list[list[Score]] = judge(tasks, [[items[i].translation] for i in numbers], 0)
        return [
            # A translation that does not fit the window was not judged.
            {"segment": i, "score": None if s.words == "too long to judge" else s.value,
             "judge": s.words}
            for i, (s,) in zip(numbers, found, strict=True)
        ]  # fmt: skip

    order = sorted(range(len(items)), key=length, reverse=True)
    return in_rounds(ranks, lambda: Rows(path, key, elsewhere="--folder"), "judged", order, work)


# ---------------------------------------------------------------------------------- agreement


class Pairs(NamedTuple):
    """Of all pairs of rows, by how two scores order them."""

    alike: int
    opposed: int
    tied_here: int
    """By the first score alone."""
    tied_there: int
    tied_both: int

    def accuracy(self) -> float:
        """How often the first prefers what the second does, where that has a preference; a tie of
        the first is half right."""
        known = self.alike + self.opposed + self.tied_here
        return (self.alike + self.tied_here / 2) / known if known else math.nan

    def tau(self) -> float:
        """Kendall's tau-b."""
        decided = self.alike + self.opposed
        scale = math.sqrt((decided + self.tied_here) * (decided + self.tied_there))
        return (self.alike - self.opposed) / scale if scale else math.nan


def count_pairs(here: list[float], there: list[float]) -> Pairs:
    """In n log n comparisons: sorted by the first score, what the second has out of order."""

    def ties(values) -> int:
        return sum(n * (n - 1) // 2 for n in Counter(values).values())

    both = list(zip(here, there, strict=True))
    opposed, before = 0, []
    for _, value in sorted(both):
        opposed += len(before) - bisect_right(before, value)
        insort(before, value)
    tied, tied_here, tied_there = ties(both), ties(here), ties(there)
    alike = len(both) * (len(both) - 1) // 2 - tied_here - tied_there + tied - opposed
    return Pairs(alike, opposed, tied_here - tied, tied_there - tied, tied)


class Agreement(NamedTuple):
    name: str
    rows: int
    """That have both scores."""
    pearson: float
    pearson_interval: tuple[float, float]
    kendall: float
    pairs: Pairs
    """Of all rows."""
    siblings: Pairs
    """Of translations of the same text alone."""
    siblings_interval: tuple[float, float]


def agreement(name: str, items: list[Item], scores: list[float | None]) -> Agreement:
    """Intervals (95%) by drawing texts, not rows: translations of one text are no strangers."""
    known = [(i, x) for i, x in enumerate(scores) if x is not None and name in items[i].given]
    groups: dict[tuple, list[tuple[float, float]]] = {}
    for i, x in known:
        groups.setdefault(items[i].task[:3], []).append((x, items[i].given[name]))
    here, there = [x for _, x in known], [items[i].given[name] for i, _ in known]
    # In standard deviations from the mean: whatever the scale, sums of squares keep their digits.
    (mx, sx), (my, sy) = standard(here), standard(there)
    moments = []
    for group in groups.values():
        points = [((x - mx) / sx, (y - my) / sy) for x, y in group]
        moments.append(np.sum([(1, x, y, x * x, y * y, x * y) for x, y in points], axis=0))
    inside = [count_pairs(*map(list, zip(*group, strict=True))) for group in groups.values()]
    counts = [(p.alike + p.tied_here / 2, p.alike + p.opposed + p.tied_here) for p in inside]
    pairs = count_pairs(here, there)
    siblings = Pairs(*(sum(p[k] for p in inside) for k in range(5)))
    return Agreement(
        name, len(known), pearson(np.sum(moments, axis=0)) if known else math.nan,
        drawn(moments, pearson), pairs.tau(), pairs, siblings, drawn(counts, share),
    )  # fmt: skip


def pearson(sums) -> float:
    n, x, y, xx, yy, xy = map(float, sums)
    below = (n * xx - x * x) * (n * yy - y * y)
    return (n * xy - x * y) / math.sqrt(below) if n and below > 1e-12 * n**4 else math.nan


def standard(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation; 1 where they are all the same."""
    if len(set(values)) < 2:
        return values[0] if values else 0.0, 1.0
    return statistics.fmean(values), statistics.pstdev(values)


def share(sums) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def drawn(table: list, total: Callable) -> tuple[float, float]:
    if len(table) < TOO_FEW:
        return math.nan, math.nan
    draws = replicates(Found(0.0, [], np.array(table, dtype=np.float64), total, ""))
    draws = draws[~np.isnan(draws)]
    return interval(draws) if len(draws) else (math.nan, math.nan)


# ------------------------------------------------------------------------------------- to read


def report(items: list[Item], rows: list[dict], who: str, against: list[Agreement]) -> str:
    """What a person wants to know of a judge, in words and numbers."""
    scores = [row["score"] for row in rows]
    known = [x for x in scores if x is not None]
    lines = [f"{who}: {len(rows):,} translations of {len({i.task[:3] for i in items}):,} texts"]
    if not known:
        return lines[0] + "\nnot one of the judge's answers is a score" + examples(rows)
    bad = len(rows) - len(known)
    mean, deviation = standard(known)
    most, often = Counter(round(x, 2) for x in known).most_common(1)[0]
    lines.append(
        f"scores: mean {100 * mean:.1f}, standard deviation "
        f"{100 * deviation if len(set(known)) > 1 else 0:.1f}, {len(set(known)):,} different; "
        f"{often / len(known):.0%} are {100 * most:.0f}; {bad / len(rows):.1%} of the answers are "
        "no score" + (examples(rows) if bad else "")
    )
    if not against:
        lines.append('no "score" is given to compare them with')
    for a in against:
        lines += ["\n" + said(a), extremes(a.name, items, rows)]
    return "\n".join(lines)


def examples(rows: list[dict]) -> str:
    bad = [row["judge"] for row in rows if row["score"] is None]
    words = dict.fromkeys(re.sub(r"\s{2,}", " … ", text)[-100:] for text in bad)
    return ", such as " + ", ".join(repr(w) for w in list(words)[:3])


def said(a: Agreement) -> str:
    def number(value: float, bounds: tuple | None = None) -> str:
        if math.isnan(value):
            return "–"
        return f"{value:.3f}" + (f"  [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")

    lines = [f'against "{a.name}" ({a.rows:,} rows)']
    lines.append(f"  Pearson            {number(a.pearson, a.pearson_interval)}")
    lines.append(f"  Kendall (tau-b)    {number(a.kendall)}")
    count = a.pairs.alike + a.pairs.opposed + a.pairs.tied_here
    lines.append(f"  pairwise accuracy  {number(a.pairs.accuracy())}  of {count:,} pairs, all rows")
    count = a.siblings.alike + a.siblings.opposed + a.siblings.tied_here
    inside = number(a.siblings.accuracy(), a.siblings_interval)
    lines.append(f"    same text        {inside}  of {count:,} pairs; 0.5 is chance")
    if count:
        lines[-1] += f"; {a.siblings.tied_here / count:.0%} the judge cannot tell apart"
    else:
        lines[-1] += "; give several translations of a text to learn what GRPO would"
    return "\n".join(lines)


def extremes(name: str, items: list[Item], rows: list[dict], count: int = 3) -> str:
    """Where the two differ most, by rank: scales may differ."""
    first = {(item.task[:3], item.translation): i for i, item in enumerate(items)}
    known = [i for i in first.values() if rows[i]["score"] is not None and name in items[i].given]
    if len(known) < TOO_FEW:
        return ""
    ours = ranks_of([rows[i]["score"] for i in known])
    theirs = ranks_of([items[i].given[name] for i in known])
    order = sorted(range(len(known)), key=lambda n: theirs[n] - ours[n])
    lines = []
    for title, chosen, sign in (("overrated", order, 1), ("underrated", order[::-1], -1)):
        for n in [n for n in chosen[:count] if sign * (ours[n] - theirs[n]) > 0]:
            score, item = rows[known[n]]["score"], items[known[n]]
            lines.append(
                f"  {title}: judge {100 * score:.0f}, {name} {item.given[name]:.4g}  "
                f"{item.task.text[:60]!r} → {item.translation[:60]!r}"
            )
    return "\n".join(lines)


def ranks_of(values: list[float]) -> list[float]:
    """0 … 1; equal values share the middle of theirs."""
    order = sorted(values)
    return [(bisect_left(order, v) + bisect_right(order, v)) / (2 * len(order)) for v in values]


def tell(items: list[Item], rows: list[dict], path: Path, who: str) -> None:
    """To a person, and as JSON beside the rows, for programs."""
    names = list(dict.fromkeys(name for item in items for name in item.given))
    scores = [row["score"] for row in rows]
    against = [agreement(name, items, scores) for name in names]
    print(f"\n{report(items, rows, who, against)}\n\n{path}: its score and words for each")
    content = {"judge": who, "rows": len(rows), "invalid": scores.count(None)}
    content["against"] = {a.name: as_json(a) for a in against}
    with whole(path.with_name(path.name.replace(".jsonl", ".agreement.json"))) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def as_json(a: Agreement) -> dict:
    """JSON has no NaN: a number that is not there is null."""

    def there(x):
        if isinstance(x, tuple):
            return [there(value) for value in x]
        return None if isinstance(x, float) and math.isnan(x) else x

    found = {name: there(value) for name, value in a._asdict().items()}
    for name, pairs in (("pairs", a.pairs), ("siblings", a.siblings)):
        found[name] = pairs._asdict() | {"accuracy": there(pairs.accuracy())}
    return found
