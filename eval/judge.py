"""Can a model judge? Compare its scores of given translations with scores from elsewhere.

    python -m eval.judge rows.jsonl --model DIR_OR_ID
    python -m eval.judge rows.jsonl --judge-url http://host:8000/v1 --model NAME
    python -m eval.judge kasu-bevo.jsonl --model toy --prompts toy --score-mode expected

    {"text": "Good night.", "source": "en", "target": "zh", "translation": "晚安。", "score": 97.5}

Each line is a translation. Its "score" (or "scores": {"human": 97.5, "comet": 0.91}), on any scale,
is what the judge is compared with; it is optional. The segments.jsonl of `python -m eval` are such
files. Several translations of each text tell most, as GRPO compares siblings: column "same
text" is how often the judge prefers the better of two.

Writes FILE.judged-by-MODEL.jsonl, a row for each translation, and the printed table beside it as
.agreement.md. The same command continues after an interruption.
"""

import argparse
import math
import os
import re
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # as in ssr.py
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from data.loading import hash_json, tasks_of
from eval import cli
from eval.score import bootstrap, interval
from eval.table import aligned
from eval.translate import parse_lines, parse_translation
from judge import Judge, Task
from model import load
from rewards.build import build_judge, build_remote_judge
from run.cache import JsonlCache, map_cached
from run.distributed import Ranks, init_distributed, run_with_error_reporting
from run.driver import make_sampler
from run.folder import atomic_write
from run.problem import load_codec
from run.settings import CHAT, TEMPLATES, check_scoring

TOO_LONG = "too long to judge"  # the text of judge.Judge's score
TOO_FEW = 3  # texts, for an interval
SETTINGS = ("model", "prompts", "score_mode", "judge_samples", "judge_max_new_tokens", "chat")
"""The options that scores depend on."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Also a settings object for rewards/build.py."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.judge", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    option = parser.add_argument
    option("file", type=Path, help="JSON lines")
    option("--model", required=True, help="folder, hub id or toy: the judge")
    option("--judge-url", default="", help="OpenAI-compatible endpoint that serves --model")
    option("--prompts", choices=list(TEMPLATES), default="paper", help="default: %(default)s")
    option("--chat", default=False, help="use the tokenizer's chat template", **CHAT)
    option("--score-mode", choices=["written", "expected"], default="written",
           help="the number the judge writes, or its mean under the probabilities")  # fmt: skip
    option("--judge-samples", type=cli.positive, default=1, help="judgements to average")
    option("--judge-max-new-tokens", type=cli.positive, default=512, help="default: %(default)s")
    option("--max-num-seqs", type=cli.positive, default=64, help="sequences decoded together")
    option("--out", type=Path, help="folder to write to; default: that of the file")
    args = parser.parse_args(argv)
    args.judge_model, args.seed = args.model, 0
    args.judge_temperature = 0.0 if args.judge_samples == 1 else 1.0
    check_scoring(args)
    return args


# ------------------------------------------------------------------------------ the translations


class Translation(NamedTuple):
    task: Task
    text: str
    scores: dict[str, float]
    """From elsewhere, by name."""


def parse_scored(line: bytes) -> Translation:
    row = parse_translation(line)
    [task] = tasks_of(row, [], hint="")
    scores = row.get("scores") or {}
    if not isinstance(scores, dict):
        raise ValueError('"scores" must be an object with a number for each name')
    scores = {k: v for k, v in (scores | {"score": row.get("score")}).items() if v is not None}
    for name, x in scores.items():
        if not (isinstance(x, int | float) and math.isfinite(x)):
            raise ValueError(f'the score "{name}" is {x!r}, no number')
    return Translation(task, row["translation"], scores)


# ------------------------------------------------------------------------------------- the judge


def load_judge(args, folder: Path, translations: list[Translation], device: torch.device) -> Judge:
    """A judge whose KV cache fits the longest of the translations that the model has positions
    for."""
    codec, prompts = load_codec(folder, args.chat), TEMPLATES[args.prompts]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load(folder, dtype=dtype, device=device)
    positions = model.config.max_length
    questions = [prompts.ask_judge(t.task, t.text, args.score_mode) for t in translations]
    new_tokens = args.judge_max_new_tokens if args.score_mode == "written" else 1
    windows = [len(ids) + new_tokens for ids in codec.encode(questions)]
    window = max((w for w in windows if w <= positions), default=0)
    if not window:
        raise ValueError(
            f"no translation can be judged within the model's {positions} positions: lower "
            f"--judge-max-new-tokens {args.judge_max_new_tokens}"
        )
    slots = min(args.max_num_seqs, len(windows) * args.judge_samples)
    return build_judge(args, make_sampler(model, slots, window), codec, prompts)


def judge_translations(
    translations: list[Translation], judge: Callable, ranks: Ranks, path: Path, key: dict,
    round_size: int,
) -> list[dict]:  # fmt: skip
    """A row for each with the judge's "score", 0 … 1 or null, and its text; kept in `path`.

    Long ones come first: those of a round are about as long, and lack of memory shows at once.
    """

    def length(i: int) -> int:
        return len(translations[i].task.text) + len(translations[i].text)

    def work(indices) -> list[dict]:
        tasks = [translations[i].task._replace(reference=None) for i in indices]
        scores = judge(tasks, [[translations[i].text] for i in indices], 0)
        rows = []
        for i, (score,) in zip(indices, scores, strict=True):
            value = None if score.judge_text == TOO_LONG else score.value
            rows.append({"segment": i, "score": value, "judge": score.judge_text})
        return rows

    order = sorted(range(len(translations)), key=length, reverse=True)
    return map_cached(ranks, lambda: JsonlCache(path, key), "judged", order, work, round_size)


# ------------------------------------------------------------------------------------- agreement


class RankAgreement(NamedTuple):
    """Counts of pairs of rows, by how the judge's score and the given one order them."""

    concordant: int
    discordant: int
    ties_judge: int
    """In the judge's score only."""
    ties_given: int

    @property
    def decided(self) -> int:
        """Pairs for which the given score has a preference."""
        return self.concordant + self.discordant + self.ties_judge

    def accuracy(self) -> float:
        """How often the judge shares that preference; its ties count half."""
        return divide(self.concordant + self.ties_judge / 2, self.decided)

    def tau_b(self) -> float:
        untied = self.concordant + self.discordant + self.ties_given
        return divide(self.concordant - self.discordant, math.sqrt(self.decided * untied))


def divide(a: float, b: float) -> float:
    return float(a / b) if b else math.nan


def count_pairs(rows: list[tuple[float, float]]) -> RankAgreement:
    judge, given = np.array(rows, dtype=np.float64).T
    counts = np.zeros(4, dtype=np.int64)
    for i in range(1, len(rows)):
        a, b = np.sign(judge[i] - judge[:i]), np.sign(given[i] - given[:i])
        cases = a * b > 0, a * b < 0, (a == 0) & (b != 0), (a != 0) & (b == 0)
        counts += [case.sum() for case in cases]
    return RankAgreement(*counts.tolist())


class Agreement(NamedTuple):
    rows: int
    pearson: float
    kendall: float
    siblings: RankAgreement
    """Pairs of translations of the same text."""
    interval: tuple[float, float]
    """95% confidence, of their accuracy."""


def compute_agreement(texts: list[list[tuple[float, float]]]) -> Agreement:
    """Of two scores, of the translations of each text. The interval resamples texts, because
    translations of one text are not independent."""
    rows = [row for text in texts for row in text]
    try:
        pearson = statistics.correlation(*zip(*rows, strict=True))
    except statistics.StatisticsError:  # a single row, or one score is constant
        pearson = math.nan
    pairs = [count_pairs(text) for text in texts]
    correct = np.array([[p.concordant + p.ties_judge / 2, p.decided] for p in pairs])
    draws = bootstrap(correct, lambda sums: divide(*sums))
    draws = draws[~np.isnan(draws)]
    ends = interval(draws) if len(texts) >= TOO_FEW and len(draws) else (math.nan, math.nan)
    siblings = RankAgreement(*np.sum(pairs, axis=0).tolist())
    return Agreement(len(rows), pearson, count_pairs(rows).tau_b(), siblings, ends)


# ------------------------------------------------------------------------------------ the report


def print_agreement(
    translations: list[Translation], rows: list[dict], path: Path, judge: str
) -> None:
    """Print the table, and write it beside the rows."""
    scored: dict[str, dict] = {}  # name -> text -> both scores of its translations
    for t, row in zip(translations, rows, strict=True):
        for name, score in t.scores.items() if row["score"] is not None else ():
            texts = scored.setdefault(name, {})
            texts.setdefault(t.task[:3], []).append((row["score"], score))
    agreements = {name: compute_agreement([*texts.values()]) for name, texts in scored.items()}
    texts = len({t.task[:3] for t in translations})
    text = f"{judge}: {len(rows):,} translations of {texts:,} texts\n{describe_scores(rows)}\n\n"
    if not any(t.scores for t in translations):
        text += 'There is no "score" to compare them with.'
    elif scored:
        text += to_markdown(agreements)
    text = text.rstrip()
    print(f"\n{text}\n\n{path}: the judge's score and text for each")
    atomic_write(path.with_suffix(".agreement.md"), text + "\n")


def describe_scores(rows: list[dict]) -> str:
    scores = [100 * row["score"] for row in rows if row["score"] is not None]
    bad = [re.sub(r"\s+", " ", row["judge"])[-100:] for row in rows if row["score"] is None]
    examples = f", such as {', '.join(map(repr, list(dict.fromkeys(bad))[:3]))}" if bad else ""
    if not scores:
        return f"not one of the judge's answers is a score{examples}"
    mode, count = Counter(map(round, scores)).most_common(1)[0]
    return (
        f"scores: mean {np.mean(scores):.1f}, standard deviation {np.std(scores):.1f}, "
        f"{len(set(scores)):,} different; {count / len(scores):.0%} are {mode}; "
        f"{len(bad) / len(rows):.1%} of the answers are no score{examples}"
    )


def to_markdown(agreements: dict[str, Agreement]) -> str:
    def number(value: float, ends: tuple = ()) -> str:
        bounds = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
        return "–" if math.isnan(value) else f"{value:.3f}{bounds}"

    lines = [["against", "rows", "Pearson", "Kendall τ-b", "same text", "undecided"]]
    for name, a in agreements.items():
        lines.append([
            name, f"{a.rows:,}", number(a.pearson), number(a.kendall),
            number(a.siblings.accuracy(), a.interval),
            number(divide(a.siblings.ties_judge, a.siblings.decided)),
        ])  # fmt: skip
    return (
        f"{aligned(lines)}\n\nsame text: how often the judge prefers the better of two "
        "translations of a text; 0.5 is chance.\nundecided: share of those pairs that it scores "
        "the same. [ ]: 95% bootstrap interval."
    )


def evaluate_judge(argv: list[str]) -> None:
    args = parse(argv)
    device, ranks = init_distributed(cli.HANG_TIMEOUT)
    file = args.file.expanduser()
    translations = ranks.on_rank0("read the translations", lambda: parse_lines(file, parse_scored))
    key, name = {name: getattr(args, name) for name in SETTINGS}, args.model
    if args.judge_url:
        judge = build_remote_judge(args, ranks, TEMPLATES[args.prompts])
        key["model"] = f"{args.model} {args.judge_url}"
    else:
        folder = ranks.rank0_then_all("fetch the model", lambda: cli.locate_model(args.model))
        judge, name = load_judge(args, folder, translations, device), folder.resolve().name
        key |= {"model": f"{folder} {cli.identify_weights(folder)}", "device": device.type}
    key["translations"] = hash_json([(t.task[:3], t.text) for t in translations])
    path = (args.out or file.parent) / f"{file.stem}.judged-by-{cli.slug(name)}.jsonl"
    print(f"judged by {name}, score {args.score_mode}; writing {path}", flush=True)
    round_size = args.max_num_seqs * ranks.size
    rows = judge_translations(translations, judge, ranks, path, key, round_size)
    ranks.on_rank0("report", lambda: print_agreement(translations, rows, path, name))


def main(argv: list[str]) -> None:
    run_with_error_reporting("python -m eval.judge", lambda: evaluate_judge(argv), cli.HINT)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main(sys.argv[1:])
