"""Can a model judge: statistics by hand, files that cannot be read, the command as it is used."""

import json
import math
import random
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import plan
import problem
import ssr
from eval import agreement
from eval import rows as eval_rows
from eval.agreement import Item, count_pairs, read, scores_in
from judge import Score, Task
from ranks import Ranks
from sampler import Sampler
from tests.tiny import make_model, make_tokenizer
from toy.languages import Languages, quality


def items_of(given, texts=None):
    texts = texts or range(len(given))
    return [
        Item(Task(f"text {t}", "English", "German"), f"translation {i}", {"human": x})
        for i, (t, x) in enumerate(zip(texts, given, strict=True))
    ]


def test_pairs_are_counted_as_one_by_one():
    rng = random.Random(0)
    for _ in range(50):
        here, there = ([rng.randrange(6) for _ in range(30)] for _ in range(2))
        signs = [
            ((a > b) - (a < b), (c > d) - (c < d))
            for i, (a, c) in enumerate(zip(here, there, strict=True))
            for b, d in zip(here[:i], there[:i], strict=True)
        ]
        found = count_pairs(here, there)
        assert found.alike == sum(x * y == 1 for x, y in signs)
        assert found.opposed == sum(x * y == -1 for x, y in signs)
        assert found.tied_here == sum(x == 0 != y for x, y in signs)
        assert found.tied_there == sum(y == 0 != x for x, y in signs)
        assert found.tied_both == sum(x == y == 0 for x, y in signs)


def test_kendall_and_accuracy_of_a_known_case():
    """tau-b of scipy.stats.kendalltau([1, 2, 2, 2, 5], [2, 1, 3, 3, 5])."""
    found = count_pairs([1, 2, 2, 2, 5], [2, 1, 3, 3, 5])
    assert found == (6, 1, 2, 0, 1)
    assert found.tau() == pytest.approx(5 / 63**0.5)
    assert found.accuracy() == pytest.approx(7 / 9)  # a tie of the judge is half right
    assert math.isnan(count_pairs([1, 1], [1, 1]).tau())
    assert math.isnan(count_pairs([], []).accuracy())


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e100])
def test_pearson_is_the_usual_one_on_whatever_scale(scale):
    rng = random.Random(1)
    given = [scale * (1e6 + rng.random()) for _ in range(40)]
    scores = [x / scale - 1e6 + 0.3 * rng.random() for x in given]
    found = agreement.agreement("human", items_of(given), scores)
    assert found.pearson == pytest.approx(statistics.correlation(scores, given), abs=1e-6)
    low, high = found.pearson_interval
    assert low < found.pearson < high and high - low < 0.3
    constant = agreement.agreement("human", items_of([5.0] * 10), [0.1 * i for i in range(10)])
    assert math.isnan(constant.pearson) and math.isnan(constant.kendall)


def test_siblings_are_compared_with_siblings_alone():
    """Within each text the judge is right, between texts wrong."""
    given = [1, 2, 3, 11, 12, 13, 21, 22, 23]
    scores = [0.7, 0.8, 0.9, 0.4, 0.5, 0.6, 0.1, 0.2, 0.3]
    found = agreement.agreement("human", items_of(given, [0, 0, 0, 1, 1, 1, 2, 2, 2]), scores)
    assert found.siblings.accuracy() == 1 and found.siblings.alike == 9
    assert found.pairs.accuracy() == 9 / 36
    assert found.siblings_interval == (1, 1)


def test_the_same_words_into_two_languages_are_two_texts():
    items = items_of([1.0, 2.0], ["a", "a"])
    items[1] = items[1]._replace(task=items[1].task._replace(target="French"))
    found = agreement.agreement("human", items, [0.1, 0.2])
    assert sum(found.siblings) == 0 and found.pairs.alike == 1


def test_the_interval_of_siblings_counts_half_for_ties():
    """A judge that never decides is at chance, whichever texts are drawn."""
    found = agreement.agreement("human", items_of([1, 2] * 6, sorted([*range(6)] * 2)), [0.5] * 12)
    assert found.siblings_interval == (0.5, 0.5)


def test_what_differs_most_is_shown_by_rank_and_on_its_own_side():
    items = items_of([10.0, 20.0, 30.0, 40.0])
    rows = [{"score": x, "judge": ""} for x in (0.9, 0.2, 0.3, 0.1)]
    lines = agreement.extremes("human", items, rows, 1).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["overrated", "underrated"]
    assert "judge 90, human 10 " in lines[0] and "judge 10, human 40 " in lines[1]
    constant = [{"score": 0.5, "judge": ""}] * 4
    shown = agreement.extremes("human", items, constant, 4).splitlines()
    assert len(shown) == len(set(shown)) == 4 and shown[0].split(":")[1] not in shown[2]


def test_what_is_not_there_is_null_in_json(tmp_path, capsys):
    items = [item._replace(given={"NaN metric": 1.0}) for item in items_of([1, 2, 3])]
    rows = [{"score": 0.5, "judge": "50"}] * 3
    agreement.tell(items, rows, tmp_path / "x.judged-by-y.jsonl", "NaN judge")
    text = (tmp_path / "x.judged-by-y.agreement.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["judge"] == "NaN judge" and found["against"]["NaN metric"]["kendall"] is None


def test_the_judge_sees_no_reference_and_what_does_not_fit_has_no_score(tmp_path):
    asked = []

    def judge(tasks, answers, step):
        asked.extend(tasks)
        return [
            [Score(0.0, "too long to judge") if "1" in a else Score(0.5, "50")] for [a] in answers
        ]

    items = [i._replace(task=i.task._replace(reference="secret")) for i in items_of([1, 2, 3])]
    rows = agreement.judged(items, judge, Ranks(), tmp_path / "x.jsonl", {"model": "m"})
    assert [row["score"] for row in rows] == [0.5, None, 0.5]
    assert len(asked) == 3 and all(task.reference is None for task in asked)


def test_intervals_draw_texts_not_rows():
    """Ten copies of each row are no more evidence than the row."""
    rng = random.Random(2)
    given = [rng.random() for _ in range(30)]
    scores = [x + rng.random() for x in given]
    once = agreement.agreement("human", items_of(given), scores)
    many = agreement.agreement("human", items_of(given * 10, [*range(30)] * 10), scores * 10)
    assert np.allclose(once.pearson_interval, many.pearson_interval)


def test_rows_without_a_score_are_left_out_and_counted():
    items = items_of([1.0, 2.0, 3.0, 4.0])
    items[3] = items[3]._replace(given={})
    rows = [{"score": x, "judge": "?"} for x in (0.1, None, 0.3, 0.9)]
    found = agreement.agreement("human", items, [row["score"] for row in rows])
    assert found.rows == 2 and found.pairs.alike == 1
    text = agreement.report(items, rows, "somebody", [found])
    assert "25.0% of the answers are no score, such as '?'" in text and "(2 rows)" in text
    nothing = [{"score": None, "judge": "I cannot"}] * 4
    assert "not one of the judge's answers is a score, such as 'I cannot'" in agreement.report(
        items, nothing, "somebody", []
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ('{"text": "a", "source": "en", "target": "de"}', 'line 2: "translation" is missing'),
        ('{"text": "a", "translation": "b", "source": "en"}', "line 2: 'target' missing"),
        ('{"translation": "b", "source": "en", "target": "de"}', "line 2: 'text' missing"),
        (
            '{"text": "a", "translation": "b", "source": "en", "target": "de", "score": "5"}',
            "line 2: the score \"score\" is '5', no number",
        ),
        (
            '{"text": "a", "translation": "b\\ud800", "source": "en", "target": "de"}',
            "line 2: 'utf-8' codec can't encode",
        ),
        (
            '{"text": "a", "translation": "b", "source": "en", "target": "de", "score": 1%s}'
            % ("0" * 400),
            "line 2: int too large",
        ),
        (
            '{"text": "a", "translation": "b", "source": "en", "target": "de", "scores": [5]}',
            'line 2: "scores" must be an object',
        ),
    ],
)
def test_a_bad_line_is_named(line, words, tmp_path):
    file = tmp_path / "rows.jsonl"
    good = {"text": "a", "translation": "b", "source": "en", "target": "de", "score": 1}
    file.write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, " + words.replace("(", r"\(")):
        read([file])
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no translations"):
        read([file])
    with pytest.raises(SystemExit, match="there is no such file"):
        ssr.main(["--preset=toy", f"--judge-only={tmp_path / 'nowhere'}"])


def test_scores_come_from_either_key():
    assert scores_in({"score": 3, "scores": {"comet": 0.5, "human": None}}) == {
        "score": 3,
        "comet": 0.5,
    }
    assert scores_in({"translation": "b"}) == {}


def test_a_file_is_judged_and_the_agreement_said(toy, tmp_path, capsys):
    pair = Languages(0)
    rows = []
    for i in range(6):
        task = pair.task("held-out", i)
        words = task.reference.split()
        for n in range(4):
            text = " ".join(words[: len(words) - n])
            rows.append(task._asdict() | {"translation": text, "score": quality(text, task[3])})
    for row in rows:  # Kasu and Bevo are in no table
        row |= {"source": f"xk={row['source']}", "target": f"xb={row['target']}"}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--preset=toy", f"--model={toy}", f"--judge-only={file}", "--slots=1"]
    ssr.main(words)
    out = capsys.readouterr().out
    assert "24 translations of 6 texts" in out and 'against "score"' in out
    path = tmp_path / f"rows.judged-by-{toy.name}.jsonl"
    judged = [json.loads(line) for line in path.read_text().splitlines()][1:]
    judged.sort(key=lambda row: row["segment"])
    assert [row["segment"] for row in judged] == list(range(24))
    assert all(0 <= row["score"] <= 1 for row in judged if row["score"] is not None)
    found = json.loads(path.with_suffix(".agreement.json").read_text())
    scores = [row["score"] for row in judged]
    again = agreement.agreement("score", read([file]), scores)
    assert found["against"]["score"]["kendall"] == pytest.approx(again.kendall, nan_ok=True)
    # It goes on where it was, and does not mix judges.
    kept = path.read_text().splitlines()[:9]
    path.write_text("".join(line + "\n" for line in kept))
    ssr.main(words)
    assert "judged: 24/24 segments in 0:" in capsys.readouterr().out
    lines = path.read_text().splitlines()
    assert lines[:9] == kept
    later = {row["segment"]: row["score"] for row in map(json.loads, lines[1:])}
    assert [later[i] for i in range(24)] == pytest.approx(scores, abs=1e-4)
    with pytest.raises(SystemExit, match="its reading was expected, now written: name another --f"):
        ssr.main([*words, "--reading=written"])
    file.write_text(file.read_text().replace("xk=Kasu", "xk=Kusu"))
    with pytest.raises(SystemExit, match="its translations was "):
        ssr.main(words)
    ssr.main([*words, f"--folder={tmp_path / 'elsewhere'}"])
    assert (tmp_path / "elsewhere" / path.name).exists()
    for more in ("--resume", "--data=x", "--judge-model=x"):
        with pytest.raises(
            SystemExit, match=r"has no effect with --judge-only|judges with --model"
        ):
            ssr.main([*words, more])
    assert len(read([file, file])) == 48  # of several systems, say


# ------------------------------------------------------------------- how much is done at a time


@pytest.fixture
def clock(monkeypatch):
    """Time passes when a test says so."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(eval_rows, "time", clock)
    return clock


def rounds_of(clock, path, count, cost, **more):
    """How many segments each round had, and whether those before lay on the disk."""
    sizes = []

    def work(numbers):
        there = path.read_text().splitlines()[1:] if path.stat().st_size else []
        assert len(there) == sum(sizes)
        sizes.append(len(numbers))
        clock.now += cost(len(numbers))
        return [{"segment": i} for i in numbers]

    eval_rows.in_rounds(
        Ranks(), lambda: eval_rows.Rows(path, {"v": 1}), "work", range(count), work, **more
    )
    return sizes


def test_rounds_grow_until_one_takes_a_few_seconds(clock, tmp_path, capsys):
    sizes = rounds_of(clock, tmp_path / "slow.jsonl", 40, lambda n: 2.0 * n)
    assert sizes == [1, 2, *[4] * 9, 1]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "work: 3/40 segments, 2.0 s each, 1:14 left"
    assert lines[-1] == "work: 40/40 segments in 1:20" and len(lines) == len(sizes) - 1
    sizes = rounds_of(clock, tmp_path / "fast.jsonl", 1000, lambda n: n / 64)
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 128, 256, 489]
    assert capsys.readouterr().out.splitlines() == [
        "work: 511/1000 segments, 64.0/s, 0:07 left", "work: 1000/1000 segments in 0:15"
    ]  # fmt: skip


def test_rounds_grow_as_long_as_that_is_faster(clock, tmp_path):
    """A sampler of 16 slots takes a minute for one sequence, and for sixteen."""
    sizes = rounds_of(clock, tmp_path / "x.jsonl", 100, lambda n: 60.0 * -(-n // 16))
    assert sizes == [1, 2, 4, 8, 16, 32, 32, 5]


def test_rounds_of_a_given_size_do_not_follow_the_clock(clock, tmp_path):
    assert rounds_of(clock, tmp_path / "x.jsonl", 10, lambda n: 100.0, size=4) == [4, 4, 2]


def test_what_was_judged_is_kept_when_a_run_is_interrupted(clock, tmp_path):
    items, path, asked = items_of(range(100)), tmp_path / "x.jsonl", []

    def judge(tasks, answers, step):
        clock.now += 3.0 * len(tasks)
        asked.extend(tasks)
        if len(asked) == 15:
            raise KeyboardInterrupt
        return [[Score(0.5, "50")] for _ in tasks]

    with pytest.raises(KeyboardInterrupt):
        agreement.judged(items, judge, Ranks(), path, {"model": "m"})
    assert len(path.read_text().splitlines()) > 12
    rows = agreement.judged(items, judge, Ranks(), path, {"model": "m"})
    assert [row["segment"] for row in rows] == list(range(100)) and len(asked) < 105


# ------------------------------------------------------------------------ how much memory it takes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tokenizer(folder)
    make_model(folder, vocab=400, positions=4096)
    return folder


def pairs_of_lengths(*letters):
    return [(Task(f"Night {i:02}", "English", "German"), "x" * n) for i, n in enumerate(letters)]


def judge_of_pairs(tiny, pairs, monkeypatch, *words):
    """The judge, and what samplers it has made so far: slots and length of each."""
    made = []

    def sampler(model, slots, max_length):
        made.append((slots, max_length))
        return Sampler(model, slots, max_length)

    monkeypatch.setattr(problem, "Sampler", sampler)
    words = ["--judge-only=x", f"--model={tiny}", "--prompts=plain", "--device=cpu", *words]
    s = ssr.parse(["--judge-max-new-tokens=4", *words])
    judge, _ = problem.judge_alone(s, Ranks(), pairs, torch.device("cpu"))

    def ask(*numbers):
        found = judge([pairs[i][0] for i in numbers], [[pairs[i][1]] for i in numbers], 0)
        assert all(score.words != "too long to judge" for [score] in found)
        return made

    return ask


def test_a_judge_has_the_slots_that_its_rows_can_use(tiny, monkeypatch):
    pairs = pairs_of_lengths(*[5] * 7)
    for words, slots in (
        ([], 7),
        (["--slots=4"], 4),
        (["--judge-samples=3", "--judge-temperature=1"], 21),
        (["--reading=expected"], 1),  # to read takes one
    ):
        if "--reading=expected" in words:
            monkeypatch.setattr(problem.Texts, "one_token", lambda self, text: 5)
        ask = judge_of_pairs(tiny, pairs, monkeypatch, *words)
        made = ask(0, 1)
        assert ask(*range(7)) == made and [n for n, _ in made] == [slots], words


def test_one_long_row_does_not_size_the_memory_of_all(tiny, monkeypatch):
    pairs = pairs_of_lengths(3300, *[5] * 20)
    made = judge_of_pairs(tiny, pairs, monkeypatch)(0, 1, 2)[:]
    alone = judge_of_pairs(tiny, pairs, monkeypatch)(*range(1, 21))[:]
    (few, long), (many, short) = made[0], alone[0]
    assert many == 21 and long > 4 * short and few < 6
    assert few * long <= max(long, many * 1.1 * short)
    ask = judge_of_pairs(tiny, pairs, monkeypatch)
    ask(0, 1)
    assert ask(*range(2, 21)) == [(few, long), (many, short)]


def test_a_row_that_the_model_has_no_room_for_takes_none(tiny, monkeypatch):
    pairs = pairs_of_lengths(20_000, 5)
    judged = judge_of_pairs(tiny, pairs, monkeypatch)(1)
    assert judged == judge_of_pairs(tiny, pairs[1:], monkeypatch)(0)
    with pytest.raises(ValueError, match="within the model's 4096 positions: lower --judge-max"):
        judge_of_pairs(tiny, pairs[:1], monkeypatch)


def test_a_judge_without_room_is_refused_before_it_is_loaded(tiny, monkeypatch):
    pairs = pairs_of_lengths(*[2000] * 9, 2001)
    monkeypatch.setattr(problem, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(plan, "room", lambda device: 10e6)
    with pytest.raises(ValueError, match=r"needs about .* GB .* lower --slots 256, or leave out l"):
        judge_of_pairs(tiny, pairs, monkeypatch)


# ------------------------------------------------------------------------------- who judges


def test_a_judge_must_be_named():
    with pytest.raises(ValueError, match="which model judges"):
        ssr.parse(["--judge-only=rows.jsonl"])
    assert ssr.parse(["--judge-only=rows.jsonl", "--preset=toy"]).preset == "toy"


def test_a_chat_template_that_is_not_used_is_pointed_out(tiny, monkeypatch, capsys):
    pairs = pairs_of_lengths(5)
    judge_of_pairs(tiny, pairs, monkeypatch)
    assert "ask it in that, with --chat\n" in capsys.readouterr().out
    judge_of_pairs(tiny, pairs, monkeypatch, "--chat")
    assert "--chat" not in capsys.readouterr().out
