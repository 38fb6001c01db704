"""The table: a row a system, a column a set and metric, in the paper's order; Markdown, CSV, JSON.

Avg is the plain mean of a direction's columns, as in the paper: of COMET's. BLEU and chrF, which
measure on other scales, have no part in it; without COMET there is none.
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy import ndarray

from eval.rows import whole
from eval.score import SACREBLEU, SEED, Found, interval, p_value, replicates

PUBLISHED = Path(__file__).with_name("published.csv")
NEURAL = {"cometkiwi-xxl": "cometkiwi", "xcomet-xxl": "xcomet"}  # as the published table says
SETS = ("wmt23", "wmt24", "flores200")
FEW = 30  # segments, below which the bootstrap cannot tell a difference from chance


class Cell(NamedTuple):
    value: float
    draws: ndarray
    """Of the bootstrap; empty for a published number."""
    p: float | None = None
    """Against the first system; None for that one itself, and of few segments."""
    better: bool = False


class Column(NamedTuple):
    direction: str  # zh-en
    set: str  # wmt23
    metric: str

    def __str__(self) -> str:
        return "/".join(part for part in self if part)


class Row(NamedTuple):
    name: str
    cells: dict[Column, Cell]
    unreadable: dict[tuple[str, str], float | None]
    """By direction and set: the share of outputs without a readable answer; None: not known."""


def averaged(metrics: Iterable[str]) -> list[str]:
    """Those that Avg is made of."""
    return [name for name in metrics if name not in SACREBLEU]


def rows_of(found: dict[str, dict[Column, Found]], unreadable: dict[str, dict]) -> list[Row]:
    """Of each system, with averages, and chances against the first one."""
    rows: list[Row] = []
    for name, columns in found.items():
        # The same segments of a set for all systems and metrics, others for another set.
        cells = {
            c: Cell(x.value, replicates(x, seed=SEED + crc32(f"{c.direction} {c.set}".encode())))
            for c, x in columns.items()
        }
        cells |= averages(cells)
        if rows and min(len(x.segments) for x in columns.values()) >= FEW:
            first = rows[0].cells
            cells = {
                c: x._replace(
                    p=p_value(x.value, x.draws, first[c].value, first[c].draws),
                    better=x.value > first[c].value,
                )
                for c, x in cells.items()
            }
        rows.append(Row(name, cells, unreadable[name]))
    return rows


def averages(cells: dict[Column, Cell]) -> dict[Column, Cell]:
    """One for each direction. Its draws are means of the columns' draws: sets are independent, and
    metrics of one set were drawn with the same segments."""
    made = {}
    for direction in dict.fromkeys(c.direction for c in cells):
        mine = [c for c in cells if c.direction == direction]
        of = averaged(dict.fromkeys(c.metric for c in mine))
        chosen = [cells[c] for c in mine if c.metric in of]
        if not chosen:
            continue
        value = sum(cell.value for cell in chosen) / len(chosen)
        draws = np.mean([cell.draws for cell in chosen], axis=0)
        made[Column(direction, "avg", "")] = Cell(value, draws)
    return made


def published(columns: Iterable[Column]) -> list[Row]:
    """The paper's rows, in those of our columns that they have; an average only of the same six."""
    columns, six = list(columns), {(name, metric) for name in SETS for metric in NEURAL}
    whole = [
        d for d in dict.fromkeys(c.direction for c in columns)
        if six == {(c.set, c.metric) for c in columns
                   if c.direction == d and c.metric and c.metric not in SACREBLEU}
    ]  # fmt: skip
    columns = [c for c in columns if c.metric or c.direction in whole]
    rows = []
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            cells = {}
            for column in columns:
                name = column._replace(metric=NEURAL.get(column.metric, column.metric))
                if value := line.get(str(name)):
                    cells[column] = Cell(float(value), np.zeros(0))
            if cells:
                rows.append(Row(f"{line['model']} (published)", cells, {}))
    return rows


def complete(rows: list[Row]) -> list[Column]:
    """Directions in their order, each with its sets, its metrics and its average last."""
    columns = dict.fromkeys(column for row in rows for column in row.cells)
    return sorted(columns, key=lambda c: list(dict.fromkeys(x.direction for x in columns)).index(
        c.direction))  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """A table for each direction. ± is half of the 95% interval; an arrow where the first system is
    worse or better with p < 0.05."""
    blocks = []
    columns = complete(rows)
    for direction in dict.fromkeys(c.direction for c in columns):
        mine = [c for c in columns if c.direction == direction]
        sets = list(dict.fromkeys(c.set for c in mine if c.metric))
        heads = [direction.replace("-", "→")]
        heads += [f"{c.set} {c.metric}" if c.metric else "Avg" for c in mine]
        lines = [heads + [f"{s} unreadable" for s in sets]]
        for row in rows:
            if any(c in row.cells for c in mine):
                shares = [row.unreadable.get((direction, s)) for s in sets]
                words = ["–" if share is None else f"{share:.1%}" for share in shares]
                lines.append([row.name, *(shown(row.cells.get(c)) for c in mine), *words])
        blocks.append("\n".join(aligned(lines)))
    return "\n\n".join(blocks)


def aligned(lines: list[list[str]]) -> list[str]:
    """A Markdown table that is one for the eye, too."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(w.rjust(n) for w, n in zip(line[1:], widths[1:], strict=True))]
        for line in (lines[0], rule, *lines[1:])
    ]
    return [f"| {' | '.join(line)} |" for line in padded]


def shown(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    if not len(cell.draws):
        return f"{cell.value:.2f}"
    low, high = interval(cell.draws)
    beyond = cell.p is not None and cell.p < 0.05
    arrow = ("↑" if cell.better else "↓") if beyond else ""
    return f"{cell.value:.2f}{arrow} ± {(high - low) / 2:.2f}"


def as_csv(rows: list[Row], path: Path) -> None:
    """Named like the published table, with the ends of each interval and p beside each value."""
    columns = complete(rows)
    with whole(path) as file:
        writer = csv.writer(file)
        parts = ("", "/low", "/high", "/p")
        shares = list(dict.fromkeys(key for row in rows for key in row.unreadable))
        writer.writerow(
            ["model", *(f"{c}{part}" for c in columns for part in parts)]
            + ["/".join((*key, "unreadable")) for key in shares]
        )
        for row in rows:
            words = [row.name]
            for column in columns:
                words += numbers(row.cells.get(column))
            words += [row.unreadable.get(key, "") for key in shares]
            writer.writerow(["" if word is None else word for word in words])


def numbers(cell: Cell | None) -> list[float | None]:
    if cell is None:
        return [None] * 4
    ends = interval(cell.draws) if len(cell.draws) else (None, None)
    return [round(x, 4) if x is not None else None for x in (cell.value, *ends, cell.p)]


def as_json(rows: list[Row], about: dict, path: Path) -> None:
    systems = {}
    for row in rows:
        cells = {
            str(c): dict(zip(("value", "low", "high", "p"), numbers(x), strict=True))
            for c, x in row.cells.items()
        }
        shares = {"/".join(key): share for key, share in row.unreadable.items()}
        systems[row.name] = {"scores": cells, "unreadable": shares}
    with whole(path) as file:
        file.write(json.dumps(about | {"systems": systems}, indent=1, ensure_ascii=False) + "\n")
