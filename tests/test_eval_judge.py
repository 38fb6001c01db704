"""Can a model judge: statistics by hand, files that cannot be read, the command as it is used."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch

from eval import judge as program
from eval.judge import Translation, compute_agreement, count_pairs, main, parse_scored
from eval.translate import parse_lines
from judge import Score, Task
from rewards import build
from run.distributed import Ranks
from tests.tiny import make_model, make_tokenizer
from toy.languages import Languages, quality


def translations_of(scores, **more):
    return [
        Translation(
            Task(f"text {i}", "English", "German", **more), f"translation {i}", {"human": x}
        )
        for i, x in enumerate(scores)
    ]


# ----------------------------------------------------------------------------------- statistics


def test_kendall_and_accuracy_of_a_small_case():
    """tau-b of scipy.stats.kendalltau([1, 2, 2, 2, 5, 4], [2, 1, 3, 3, 5, 5])."""
    pairs = count_pairs([(1, 2), (2, 1), (2, 3), (2, 3), (5, 5), (4, 5)])
    assert pairs == (10, 1, 2, 1)
    assert pairs.tau_b() == pytest.approx(9 / (13 * 12) ** 0.5)
    assert pairs.accuracy() == pytest.approx(11 / 13)  # a tie of the judge is half right
    nothing = count_pairs([(1, 1), (1, 1)])
    assert math.isnan(nothing.tau_b()) and math.isnan(nothing.accuracy())


def test_correlations_of_a_constant_score_are_not_a_number():
    constant = compute_agreement([[(0.1 * i, 0.7)] for i in range(10)])
    assert math.isnan(constant.pearson) and math.isnan(constant.kendall)
    assert compute_agreement([[(1, 3)], [(2, 5)], [(4, 9)]]).pearson == pytest.approx(1)


def test_siblings_are_compared_only_with_siblings():
    """Within each text the judge is right, between texts wrong."""
    texts = [[(0.7, 1), (0.8, 2), (0.9, 3)], [(0.4, 11), (0.5, 12), (0.6, 13)],
             [(0.1, 21), (0.2, 22), (0.3, 23)]]  # fmt: skip
    agreement = compute_agreement(texts)
    assert agreement.siblings.accuracy() == 1 and agreement.siblings.concordant == 9
    assert agreement.kendall == pytest.approx((9 - 27) / 36) and agreement.interval == (1, 1)
    undecided = compute_agreement([[(0.5, 1), (0.5, 2)]] * 6)
    assert undecided.interval == (0.5, 0.5)


def test_the_interval_draws_texts_not_pairs():
    """Forty rows of a text, all right or all wrong, are no more evidence than two."""
    rng = random.Random(2)
    signs = [rng.choice([1, 1, -1]) for _ in range(30)]
    few, many = (
        compute_agreement([[(k * sign, k) for k in range(n)] for sign in signs]) for n in (2, 40)
    )
    assert few.interval == pytest.approx(many.interval) and 0.2 < np.ptp(few.interval) < 0.5
    assert all(map(math.isnan, compute_agreement([[(1, 1), (2, 2)]] * 2).interval))


# --------------------------------------------------------------------------------------- report


def reported(translations, scores, tmp_path):
    rows = [{"score": x, "judge": "I cannot\n say" if x is None else f"{x}"} for x in scores]
    path = tmp_path / "x.judged-by-y.jsonl"
    program.print_agreement(translations, rows, path, "somebody")
    return (tmp_path / "x.judged-by-y.agreement.md").read_text()


def test_the_report_leaves_out_rows_without_a_score_and_counts_them(tmp_path, capsys):
    items = translations_of([1.0, 2.0, 3.0, 4.0])
    items[3] = items[3]._replace(scores={})
    text = reported(items, [0.1, None, 0.3, 0.9], tmp_path)
    assert text.strip() in capsys.readouterr().out
    assert "somebody: 4 translations of 4 texts" in text
    assert "25.0% of the answers are no score, such as 'I cannot say'" in text
    table = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line[:1] == "|"]
    row = dict(zip(table[0], table[2], strict=True))
    assert row["against"] == "human" and row["rows"] == "2" and row["Kendall τ-b"] == "1.000"
    assert row["same text"].startswith("–") and row["undecided"] == "–"  # there are no siblings
    for given, says_none in (items, False), (items[3:], True):
        nothing = reported(given, [None] * len(given), tmp_path)
        assert "not one of the judge's answers is a score, such as 'I cannot say'" in nothing
        assert ('There is no "score" to compare them with' in nothing) == says_none


def test_the_judge_sees_no_reference_and_what_does_not_fit_has_no_score(tmp_path):
    judged = []

    def judge(tasks, answers, step):
        judged.extend(tasks)
        return [
            [Score(0.0, "too long to judge") if "1" in a else Score(0.5, "50")] for [a] in answers
        ]

    items = translations_of([1, 2, 3], reference="secret")
    rows = program.judge_translations(items, judge, Ranks(), tmp_path / "x.jsonl", {}, 2)
    assert [row["score"] for row in rows] == [0.5, None, 0.5]
    assert len(judged) == 3 and all(task.reference is None for task in judged)


# ---------------------------------------------------------------------------------------- files

GOOD = {"text": "a", "translation": "b", "source": "en", "target": "de"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        (json.dumps({**GOOD, "translation": None}), '"translation" is missing'),
        (json.dumps({**GOOD, "target": None}), "'target' missing"),
        (json.dumps({**GOOD, "text": None}), "'text' missing"),
        (json.dumps({**GOOD, "score": "5"}), "the score \"score\" is '5', no number"),
        (json.dumps({**GOOD, "translation": "b\ud800"}), "'utf-8' codec can't encode"),
        (json.dumps({**GOOD, "scores": [5]}), '"scores" must be an object'),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: " + re.escape(message)):
        parse_lines(file, parse_scored)


def test_scores_come_from_either_key(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {**GOOD, "score": 3, "scores": {"comet": 0.5, "human": None}}
    file.write_text(json.dumps(row) + "\n" + json.dumps(GOOD) + "\n")
    assert [t.scores for t in parse_lines(file, parse_scored)] == [{"score": 3, "comet": 0.5}, {}]


# ---------------------------------------------------------------------------------- the command


@pytest.fixture
def toy_rows(tmp_path):
    """24 translations of 6 sentences, each worse than the one before."""
    lines = []
    for i in range(6):
        task = Languages(0).task("held-out", i)
        words = task.reference.split()
        for n in range(4):
            text = " ".join(words[: len(words) - n])
            row = task._asdict() | {"translation": text, "score": quality(text, task.reference)}
            lines.append(json.dumps(row) + "\n")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(lines))
    return file


def test_a_file_is_judged_and_the_same_command_continues(toy_rows, tmp_path, capsys):
    words = [str(toy_rows), "--model=toy", "--prompts=toy", "--score-mode=expected"]
    main(words)
    out = capsys.readouterr().out
    assert "24 translations of 6 texts" in out and "| score " in out
    (path,) = tmp_path.glob("rows.judged-by-*.jsonl")
    header, *rows = map(json.loads, path.read_text().splitlines())
    assert header["of"]["score_mode"] == "expected"
    scores = {row["segment"]: row["score"] for row in rows}
    assert sorted(scores) == [*range(24)] and all(0 <= x <= 1 for x in scores.values())
    kept = path.read_text().splitlines()[:9]
    path.write_text("".join(line + "\n" for line in kept))
    main(words)
    assert "judged: 24/24 segments, in " in capsys.readouterr().out
    lines = path.read_text().splitlines()
    assert lines[:9] == kept
    again = {row["segment"]: row["score"] for row in map(json.loads, lines[1:])}
    assert [again[i] for i in range(24)] == pytest.approx([scores[i] for i in range(24)], abs=1e-4)
    with pytest.raises(SystemExit, match="its score_mode was expected, now written: write to an"):
        main([*words[:-1], "--judge-max-new-tokens=2"])
    toy_rows.write_text(toy_rows.read_text().replace('"score"', '"other"').replace("Kasu", "kasu"))
    main(words)  # the judge is asked the same
    toy_rows.write_text("".join(toy_rows.read_text().splitlines(True)[1:]))
    with pytest.raises(SystemExit, match="its translations was "):
        main(words)
    main([*words, f"--out={tmp_path / 'elsewhere'}"])
    assert (tmp_path / "elsewhere" / path.name).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model=x", "--score-mode=expected", "--chat"], "use --score-mode written"),
        (["--model=x", "--judge-samples=2", "--score-mode=expected"], "would all be the same"),
        (["--judge-url=http://x/v1", "--model=y", "--score-mode=expected"], "needs log-probs"),
        (["--model=nowhere/at/all"], r"No such file or directory: '.*rows\.jsonl'"),
    ],
)
def test_a_command_that_cannot_work_is_refused(words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main([f"{tmp_path}/rows.jsonl", *words])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tokenizer(folder)
    make_model(folder, vocab=400, positions=4096)
    return folder


def judge_of(tiny, lengths, *words):
    """A judge loaded for translations of so many letters."""
    words = ["x", f"--model={tiny}", "--prompts=plain", "--judge-max-new-tokens=4", *words]
    items = [Translation(Task(f"Night {i:02}", "English", "German"), "x" * n, {})
             for i, n in enumerate(lengths)]  # fmt: skip
    return program.load_judge(program.parse(words), tiny, items, torch.device("cpu")), items


@pytest.mark.parametrize(
    ("words", "slots"),
    [([], 7), (["--max-num-seqs=4"], 4), (["--judge-samples=3"], 21)],
)
def test_the_cache_has_room_for_all_rows_that_fit_and_no_more(tiny, words, slots):
    judge, items = judge_of(tiny, [20_000, *range(5, 11)], *words)
    assert judge.sampler.slots == slots
    scores = judge([t.task for t in items], [[t.text] for t in items], 0)
    too_long = [score.judge_text == "too long to judge" for [score] in scores]
    assert too_long == [True, *[False] * 6]
    with pytest.raises(ValueError, match="within the model's 4096 positions: lower --judge-max"):
        judge_of(tiny, [20_000])


def test_an_endpoint_judges(toy_rows, tmp_path, monkeypatch):
    class Endpoint:
        def __init__(self, url, model, *_):
            assert (url, model) == ("http://x/v1", "org/big judge")

        def check(self):
            pass

        def __call__(self, tasks, answers, step):
            return [[Score(len(a) / 100, f"{len(a)}")] for [a] in answers]

    monkeypatch.setattr(build, "RemoteJudge", Endpoint)
    main([str(toy_rows), "--judge-url=http://x/v1", "--model=org/big judge"])
    text = (tmp_path / "rows.judged-by-org_big_judge.agreement.md").read_text()
    assert re.search(r"\| score *\| *24 \|.* 1\.000 \[1\.000, 1\.000\] \| *0\.000 \|", text)
