"""The table: a row a system, a column a set and metric, in the paper's order; Markdown and JSON.

Avg is the plain mean of a direction's COMET columns, as in the paper. BLEU and chrF have another
scale and do not enter it; without COMET there is no average.
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy import ndarray

from eval.score import SACREBLEU, SEED, Result, bootstrap, interval, p_value

PUBLISHED = Path(__file__).with_name("published.csv")
NEURAL = {"cometkiwi-xxl": "cometkiwi", "xcomet-xxl": "xcomet"}  # name in the published table
SETS = ("wmt23", "wmt24", "flores200")
TOO_FEW = 30  # segments, below which the bootstrap cannot tell a difference from chance


class Cell(NamedTuple):
    score: float
    draws: ndarray
    """Of the bootstrap; empty for a published number."""
    p: float | None = None
    """Against the first system; None for that system itself, and for too few segments."""
    better: bool = False


class Column(NamedTuple):
    direction: str  # zh-en
    set: str  # wmt23
    metric: str  # empty for the average

    def __str__(self) -> str:
        return "/".join(part for part in self if part)


class Row(NamedTuple):
    name: str
    cells: dict[Column, Cell]
    unreadable: dict[tuple[str, str], float | None]
    """By direction and set: the share of outputs without a readable answer; None: not given."""


def make_rows(results: dict[str, dict[Column, Result]], unreadable: dict[str, dict]) -> list[Row]:
    """Rows with averages and p-values against the first system; `results` by system."""
    rows: list[Row] = []
    for name, columns in results.items():
        # One seed for each set: the same draws for all systems and metrics, others for other sets.
        cells = {}
        for c, x in columns.items():
            seed = SEED + crc32(f"{c.direction} {c.set}".encode())
            cells[c] = Cell(x.score, bootstrap(x.statistics, x.aggregate, seed=seed))
        cells |= averages(cells)
        if rows and min((len(x.segments) for x in columns.values()), default=0) >= TOO_FEW:
            for c, x in cells.items():
                first = rows[0].cells[c]
                p = p_value(x.score, x.draws, first.score, first.draws)
                cells[c] = x._replace(p=p, better=x.score > first.score)
        rows.append(Row(name, cells, unreadable[name]))
    return rows


def averages(cells: dict[Column, Cell]) -> dict[Column, Cell]:
    """An average for each direction. Its draws are the means of its columns' draws: sets are
    independent, and metrics of one set share their segments."""
    means = {}
    for direction in dict.fromkeys(c.direction for c in cells):
        of = [x for c, x in cells.items() if c.direction == direction and is_averaged(c.metric)]
        if of:
            draws = np.mean([cell.draws for cell in of], axis=0)
            score = sum(cell.score for cell in of) / len(of)
            means[Column(direction, "avg", "")] = Cell(score, draws)
    return means


def is_averaged(metric: str) -> bool:
    return bool(metric) and metric not in SACREBLEU


def published(columns: Iterable[Column]) -> list[Row]:
    """The paper's rows in our columns; averages only where they are of the same six columns."""
    columns, six = list(columns), {(name, metric) for name in SETS for metric in NEURAL}

    def is_comparable(column: Column) -> bool:
        same = [c for c in columns if c.direction == column.direction and is_averaged(c.metric)]
        return bool(column.metric) or {(c.set, c.metric) for c in same} == six

    rows = []
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            cells = {}
            for column in filter(is_comparable, columns):
                name = column._replace(metric=NEURAL.get(column.metric, column.metric))
                if value := line.get(str(name)):
                    cells[column] = Cell(float(value), np.zeros(0))
            if cells:
                rows.append(Row(f"{line['model']} (published)", cells, {}))
    return rows


def to_markdown(rows: list[Row]) -> str:
    """A table for each direction. ± is half of the 95% interval; an arrow marks what is better or
    worse than the first system with p < 0.05."""
    blocks = []
    columns = list(dict.fromkeys(column for row in rows for column in row.cells))
    for direction in dict.fromkeys(c.direction for c in columns):
        mine = [c for c in columns if c.direction == direction]
        sets = list(dict.fromkeys(c.set for c in mine if c.metric))
        heads = [direction.replace("-", "→")]
        heads += [f"{c.set} {c.metric}" if c.metric else "Avg" for c in mine]
        lines = [heads + [f"{s} unreadable" for s in sets]]
        for row in rows:
            if any(c in row.cells for c in mine):
                shares = [row.unreadable.get((direction, s)) for s in sets]
                shares = ["–" if share is None else f"{share:.1%}" for share in shares]
                cells = [format_cell(row.cells.get(c)) for c in mine]
                lines.append([row.name, *cells, *shares])
        blocks.append(aligned(lines))
    return "\n\n".join(blocks)


def aligned(lines: list[list[str]]) -> str:
    """A Markdown table whose source has straight columns, too; its first line is the head."""
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    padded = [
        [head.ljust(first), *map(str.rjust, cells, others)]
        for head, *cells in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def format_cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    if not len(cell.draws):
        return f"{cell.score:.2f}"
    low, high = interval(cell.draws)
    significant = cell.p is not None and cell.p < 0.05
    arrow = ("↑" if cell.better else "↓") if significant else ""
    return f"{cell.score:.2f}{arrow} ± {(high - low) / 2:.2f}"


def to_json(rows: list[Row], about: dict) -> str:
    systems = {}
    for row in rows:
        cells = {}
        for column, x in row.cells.items():
            low, high = interval(x.draws)
            cells[str(column)] = {"value": x.score, "low": low, "high": high, "p": x.p}
        shares = {"/".join(key): share for key, share in row.unreadable.items()}
        systems[row.name] = {"scores": cells, "unreadable": shares}
    return json.dumps(about | {"systems": systems}, indent=1, ensure_ascii=False) + "\n"
