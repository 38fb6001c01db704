"""The evaluation: scores, significance, the table, what is kept and what is refused."""

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from eval import __main__ as program
from eval import score, table
from eval.__main__ import main
from eval.table import Column
from judge import Task
from sampler import Sampler
from tests import corpora
from tests.runs import write_rows
from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Two tiny models and two sets."""
    folder = tmp_path_factory.mktemp("eval")
    for seed, name in enumerate(("one", "two")):
        make_model(folder / name, vocab=400, positions=4096, seed=seed)
        make_tokenizer(folder / name)
    pairs = [(f"Sentence {i} is here.", f"这是第{i}句话。") for i in range(20)]
    write_rows(folder / "there.jsonl", [
        {"text": a, "source": "en", "target": "zh", "reference": b} for a, b in pairs])  # fmt: skip
    write_rows(folder / "back.jsonl", [
        {"text": b, "source": "zh", "target": "en", "reference": a} for a, b in pairs])  # fmt: skip
    return folder


def go(here, out, *words):
    main(["--sets", f"{here}/there.jsonl,{here}/back.jsonl", "--metrics=bleu,chrf",
          "--max-new-tokens=12", "--max-num-seqs=4", f"--out={out}", *words])  # fmt: skip
    return json.loads((out / "table.json").read_text())


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------------------------- scores

ENGLISH = [
    "The cat sat on the mat, and it purred.",
    "Nobody knows what will happen tomorrow.",
    "Prices rose by 3.5 % in May.",
    "She didn't say anything.",
]


def noisy(lines, share, seed):
    draw = random.Random(seed)
    return [" ".join(w for w in line.split() if draw.random() > share) for line in lines]


@pytest.mark.parametrize(("target", "code"), [("English", "en"), ("Chinese", "zh")])
def test_bleu_and_chrf_equal_sacrebleus_command_line(tmp_path, target, code):
    lines = ENGLISH * 5 if code == "en" else [f"这是第{i}句话，很短。" for i in range(20)]
    texts = [x[: len(x) - i % 4] for i, x in enumerate(lines)]
    (tmp_path / "ref").write_text("\n".join(lines) + "\n")
    (tmp_path / "hyp").write_text("\n".join(texts) + "\n")
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "hyp", "-l", f"xx-{code}"]
    command += ["-m", "bleu", "chrf", "-w", "12", "--force"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    theirs = {x["name"].lower().replace("2", ""): x for x in json.loads(run.stdout)}
    tasks = [Task("x", "German", target, line) for line in lines]
    for name, metric in score.SACREBLEU.items():
        ours = metric(tasks, texts)
        assert 20 < ours.score < 99
        assert ours.score == pytest.approx(theirs[name]["score"], abs=1e-9)
        assert ours.signature == theirs[name]["signature"]
        assert len(ours.segments) == 20


def bootstrap(result, draws=1000):
    return score.bootstrap(result.statistics, result.aggregate, draws)


def test_the_score_is_the_aggregate_of_its_statistics():
    tasks = [Task("x", "German", "English", line) for line in ENGLISH * 4]
    texts = noisy(ENGLISH * 4, 0.3, 0)
    for metric in score.SACREBLEU.values():
        result = metric(tasks, texts)
        sums = result.statistics.sum(0)
        assert result.aggregate(sums) == pytest.approx(result.score, abs=1e-9)
    assert score.mean_score([0.25, 0.5, 1.0], "").score == pytest.approx(175 / 3)


def test_the_bootstrap_agrees_with_sacrebleus():
    tasks = [Task("x", "German", "English", line) for line in ENGLISH * 10]
    texts = noisy(ENGLISH * 10, 0.3, 1)
    draws = bootstrap(score.bleu(tasks, texts))
    test = PairedTest([("a", texts), ("b", texts[::-1])], {"BLEU": BLEU()},
                      [[t.reference for t in tasks]], "bs", 1000)  # fmt: skip
    theirs = test()[1]["BLEU"][0]
    assert draws.mean() == pytest.approx(theirs.mean, abs=1e-3)
    low, high = score.interval(draws)
    assert (high - low) / 2 == pytest.approx(theirs.ci, abs=0.02)


def test_p_values_are_calibrated_and_find_a_paired_difference():
    draw = random.Random(1)
    below = 0
    for _ in range(200):  # two systems of the same quality
        a, b = (score.mean_score([draw.gauss(0.5, 0.1) for _ in range(50)], "") for _ in range(2))
        below += score.p_value(a.score, bootstrap(a, 200), b.score, bootstrap(b, 200)) < 0.1
    assert 8 <= below <= 36  # 20 of 200 expected
    base = [draw.gauss(0.5, 0.1) for _ in range(50)]
    better = score.mean_score([x + draw.gauss(0.01, 0.01) for x in base], "")
    a, b = bootstrap(better), bootstrap(score.mean_score(base, ""))
    # Unpaired it would be lost in the noise: 1 point, where one mean's error is 1.4.
    assert score.p_value(better.score, a, 100 * statistics.fmean(base), b) < 0.01
    assert score.p_value(better.score, a, better.score, a) == 1.0
    assert score.p_value(better.score, a, 0.0, 0 * a) == 1 / 1001  # never 0


def test_traditional_chinese_is_tokenised_like_chinese():
    texts = ["這是第一句話，很短。", "這是第二句話，也很短。"]
    for target in ("Chinese", "Traditional Chinese", "Cantonese"):
        tasks = [Task("x", "English", target, text) for text in texts]
        found = score.bleu(tasks, [t[:-2] for t in texts])
        assert found.score > 50 and "tok:zh" in found.signature


# ---------------------------------------------------------------------------------- the table


def columns_of(directions=("zh-en", "en-zh")):
    return [Column(d, s, m) for d in directions for s in table.SETS for m in table.NEURAL]


def test_the_published_averages_are_plain_means():
    """As Avg is computed here, for each row and direction of the published table."""
    with open(table.PUBLISHED, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    checked = 0
    for row, line in zip(table.published(columns_of()), lines, strict=True):
        assert row.name == f"{line['model']} (published)"
        cells = {c: x._replace(draws=np.zeros(1)) for c, x in row.cells.items()}
        for column, cell in table.averages(cells).items():
            assert cell.score == pytest.approx(float(line[str(column)]), abs=0.0051)
            checked += 1
    assert len(lines) == 20 and checked == 39  # one model was published in one direction only


def results_of(values):
    return {column: score.mean_score(segments, "") for column, segments in values.items()}


def test_the_table_has_a_block_for_each_direction_and_ends_with_the_average():
    columns = results_of({column: [0.2, 0.4] for column in columns_of()})
    (row,) = table.make_rows({"ours": columns}, {"ours": {}})
    lines = table.to_markdown([row]).splitlines()
    heads = [word.strip() for word in lines[0].split("|")]
    assert heads[1:4] == ["zh→en", "wmt23 cometkiwi-xxl", "wmt23 xcomet-xxl"] and heads[8] == "Avg"
    assert lines[4].startswith("| en→zh") and len(set(map(len, lines[:3]))) == 1


def lines_for(systems):
    found = {k: results_of({Column("zh-en", "x", "xcomet-xxl"): v}) for k, v in systems.items()}
    rows = table.make_rows(found, {name: {} for name in found})
    return table.to_markdown(rows).splitlines()[2:]


def test_a_difference_from_the_first_system_beyond_chance_has_an_arrow():
    draw = random.Random(0)
    base = [draw.random() for _ in range(100)]
    systems = {"base": base, "same": base[::-1], "better": [x + 0.1 for x in base]}
    lines = lines_for(systems | {"worse": [x - 0.1 for x in base]})
    assert [(x.count("↑"), x.count("↓")) for x in lines] == [(0, 0), (0, 0), (2, 0), (0, 2)]
    few = {name: values[:29] for name, values in systems.items()}
    assert not any("↑" in line for line in lines_for(few))


def test_sets_of_one_size_are_drawn_independently():
    draw = random.Random(0)
    values = sorted(draw.random() for _ in range(300))
    columns = results_of({Column("zh-en", name, "xcomet-xxl"): values for name in "abcd"})
    (row,) = table.make_rows({"x": columns}, {"x": {}})
    low, high = score.interval(row.cells[Column("zh-en", "avg", "")].draws)
    alone = score.interval(row.cells[Column("zh-en", "a", "xcomet-xxl")].draws)
    assert (high - low) / (alone[1] - alone[0]) == pytest.approx(0.5, abs=0.08)


def test_the_published_average_is_shown_only_beside_the_same_six_columns():
    six, avg = columns_of(["zh-en"]), Column("zh-en", "avg", "")
    assert table.published([*six, avg])[0].cells[avg].score == 86.94
    assert avg in table.published([*six, Column("zh-en", "wmt23", "bleu"), avg])[0].cells
    for columns in (six[:5], [*six, Column("zh-en", "mine", "xcomet-xxl")]):
        assert avg not in table.published([*columns, avg])[0].cells
    assert table.published([Column("zh-en", "wmt23", "bleu"), avg]) == []


# ------------------------------------------------------------------------- a whole evaluation


@pytest.fixture(scope="module")
def first(here, tmp_path_factory):
    """An evaluation of two models: its folder, its table and what it printed."""
    out, printed = tmp_path_factory.mktemp("first") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = go(here, out, f"--model={here}/one", f"--model=other={here}/two")
    return SimpleNamespace(out=out, table=found, printed=printed.getvalue())


@pytest.fixture
def out(first, tmp_path):
    """A copy of that evaluation's folder."""
    return shutil.copytree(first.out, tmp_path / "out")


def test_an_evaluation_writes_the_table_and_every_segment(first):
    systems, out = first.table["systems"], first.out
    assert list(systems) == ["one", "other"] and "20/20 segments, in " in first.printed
    markdown = (out / "table.md").read_text()
    assert markdown in first.printed and "100.0%" in markdown
    rows = rows_of(out / "one" / "there.en-zh.jsonl")
    assert rows[0]["of"]["prompts"] == "paper" and [r["segment"] for r in rows[1:]] == [*range(20)]
    segment = rows_of(out / "other" / "back.zh-en.segments.jsonl")[3]
    assert segment["text"] == "这是第3句话。" and [*segment["scores"]] == ["bleu", "chrf"]
    cell = systems["other"]["scores"]["en-zh/there/chrf"]
    assert cell["low"] <= cell["value"] <= cell["high"]
    assert "avg" not in str(systems)  # BLEU and chrF have none
    assert systems["one"]["unreadable"]["en-zh/there"] == 1.0
    signatures = first.table["metrics"]["bleu"]
    assert "tok:zh" in signatures[0] and "tok:13a" in signatures[1]


def test_segments_are_translated_once(here, first, out, monkeypatch):
    counts, real = [], Sampler.generate

    def generate(self, prompts, *rest, **more):
        counts.append(len(prompts))
        return real(self, prompts, *rest, **more)

    monkeypatch.setattr(Sampler, "generate", generate)
    file = out / "one" / "back.zh-en.jsonl"
    whole = file.read_bytes()
    lines = whole.split(b"\n")
    file.write_bytes(b"\n".join(lines[:8]) + b"\n" + lines[8][:20])  # a kill in the middle of a row
    words = [f"--model={here}/one", f"--model=other={here}/two"]
    again = go(here, out, *words)
    assert sum(counts) == 13 and file.read_bytes() == whole
    assert again["systems"] == first.table["systems"]
    go(here, out, *words, f"--model=third={here}/two")
    assert sum(counts) == 13 + 40


def test_answers_are_read_as_the_reward_reads_them(pupil, tmp_path):
    """A model that has learned the form: what it says ends, and its answers are scored alone."""
    rows = [{"text": corpora.english("news", i), "source": "en", "target": "zh",
             "reference": corpora.chinese("news", i)} for i in range(6)]  # fmt: skip
    file = write_rows(tmp_path / "x.jsonl", rows)
    main([f"--model=m={pupil}", f"--sets={file}", "--metrics=chrf", "--max-new-tokens=80",
          f"--out={tmp_path}/out"])  # fmt: skip
    read = rows_of(tmp_path / "out" / "m" / "x.en-zh.jsonl")[1:]
    assert sum(row["readable"] for row in read) >= 3
    for row in read:
        if row["readable"]:
            assert f"<answer> {row['translation']} </answer>" in row["output"]


def test_a_moved_model_is_the_same_and_another_tokenizer_is_not(here, out, tmp_path):
    before = (out / "one" / "there.en-zh.jsonl").read_bytes()
    moved = tmp_path / "run" / "one"
    shutil.copytree(here / "one", moved)
    go(here, out, f"--model={moved}")
    assert (out / "one" / "there.en-zh.jsonl").read_bytes() == before
    make_tokenizer(moved, ("other words entirely",), 390)
    with pytest.raises(SystemExit, match="its model was "):
        go(here, out, f"--model={moved}")
    with pytest.raises(SystemExit, match=r"run/config\.json \(a run's weights are in last/"):
        go(here, out, f"--model={tmp_path}/run")


def test_somebody_elses_translations_are_scored(here, first, out, tmp_path):
    reference = [row["reference"] for row in rows_of(here / "there.jsonl")]
    good, bad, folder = tmp_path / "good.txt", tmp_path / "bad.txt", out / "one"
    good.write_text("\n".join(reference) + "\n")
    bad.write_text("x\n" * 19 + "\n")  # an empty translation is one, too
    found = go(here, out, f"--translations=a={good},{bad}", f"--translations=ours={folder}",
               f"--translations=b={bad},{folder / 'back.zh-en.segments.jsonl'}")  # fmt: skip
    scores = {name: x["scores"] for name, x in found["systems"].items()}
    assert scores["a"]["en-zh/there/bleu"]["value"] == pytest.approx(100)
    assert scores["b"]["en-zh/there/bleu"]["value"] < 1
    notes = (out / "table.md").read_text().split("- wrong language: ")
    assert notes[1] == "b en-zh/there 95.0%, e.g. segment 0: x\n" and len(notes) == 2
    segments = rows_of(out / "b" / "there.en-zh.segments.jsonl")
    assert [row["wrong_language"] for row in segments] == [True] * 19 + [False]
    own = first.table["systems"]["one"]
    for name in ("b", "ours"):
        assert scores[name]["zh-en/back/chrf"] | {"p": None} == own["scores"]["zh-en/back/chrf"]
    assert found["systems"]["ours"]["unreadable"] == own["unreadable"]
    assert found["systems"]["a"]["unreadable"] == {"en-zh/there": None, "zh-en/back": None}


@pytest.mark.slow
def test_two_ranks_translate_as_one(here, tmp_path):
    words = [f"--sets={here}/there.jsonl", f"--model={here}/one", "--metrics=chrf",
             "--max-new-tokens=12", "--max-num-seqs=4"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    main([*words, f"--out={tmp_path / 'one'}"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--standalone", "-m", "eval", *words, f"--out={tmp_path / 'two'}"]
    run = subprocess.run(torchrun, cwd=ROOT, env=env, capture_output=True, text=True,
                         timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stderr
    one, two = ((tmp_path / n / "one/there.en-zh.jsonl").read_text() for n in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate: give --model or --translations"),
        (["--model=x/y", "--metrics=blue"], "'blue' is no checkpoint of COMET's: use comet22, "),
        (["--model=x/y", "--metrics=./gone"], r"'\./gone' is no checkpoint"),
        (["--model=x/y", "--metrics=bleu,bleu"], "the name bleu is taken: use NAME"),
        (["--model=x/y", "--compare", "--first=3"], "published numbers are for whole sets"),
        (["--model=a/x", "--model=b/x", "--metrics=bleu"], "two systems are called x: use NAME="),
        (["--model=nowhere/at/all", "--metrics=bleu"], "there is no nowhere/at/all/config.json"),
        (["--model=x", "--sets=gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--model=x", "--sets=,"], "--sets is empty"),
        (["--translations=a,b", "--metrics=bleu"], "2 files for 1 sets; give one for each"),
        (["--translations=gone.txt", "--metrics=bleu"], "No such file or directory: 'gone.txt'"),
        (["--model=x", "--max-num-seqs=0"], "--max-num-seqs: 0 must be at least 1"),
    ],
)
def test_a_command_that_cannot_work_is_refused_before_any_work(
    here, tmp_path, words, message, capsys
):
    sets = [] if any("--sets" in w for w in words) else [f"--sets={here}/there.jsonl"]
    with pytest.raises(SystemExit) as stop:
        main([*words, *sets, f"--out={tmp_path}/out"])
    assert re.search(message, f"{stop.value}{capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


def test_segments_that_do_not_fit_together_are_refused(here, tmp_path):
    row = {"text": "a", "source": "en", "target": "zh", "reference": "b"}
    bare = {k: v for k, v in row.items() if k != "reference"}
    files = {
        "short.txt": "x\n" * 19,
        "bad.jsonl": '{"translation": "x"}\n' * 4 + '{"translation": 3}\n',
        "bare.jsonl": json.dumps(row) + "\n" + json.dumps(bare) + "\n",
        "a b.jsonl": json.dumps(row) + "\n",
        "a_b.jsonl": json.dumps(row) + "\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    there, model, at = f"--sets={here}/there.jsonl", f"--model={here}/one", tmp_path
    for words, message in (
        ([there, f"--translations={at}/short.txt"], "19 translations, and .* has 20 segments"),
        ([there, f"--translations={at}/bad.jsonl"], r"bad.jsonl, line 5: .translation. is missing"),
        ([model, f"--sets={at}/bare.jsonl"], r"bleu needs references, .* none for segment 2 \(1"),
        ([model, f"--sets={at}/a b.jsonl,{at}/a_b.jsonl"], "two called a_b en-zh: rename a file"),
        ([model, there, "--max-new-tokens=4000"], "one has 4096 positions, .* 4000 does not fit"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*words, "--metrics=bleu", f"--out={tmp_path}/out"])


def test_translations_made_with_other_settings_are_not_mixed(here, out):
    before = (out / "one" / "there.en-zh.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="its max_new_tokens was 12, now 13: write to another"):
        go(here, out, f"--model={here}/one", "--max-new-tokens=13")
    with pytest.raises(SystemExit, match=r"its model was \w+ \w+, now \w+"):
        go(here, out, f"--model=one={here}/two")
    assert (out / "one" / "there.en-zh.jsonl").read_bytes() == before


def test_comet_scores_again_only_what_has_changed(here, tmp_path, monkeypatch):
    """COMET is a stub that records what it scores."""
    scored = []

    class Recorder(contextlib.nullcontext):
        about = dict.fromkeys(("checkpoint", "class", "comet", "dtype", "revision"), "x")
        about["takes_reference"] = True

        def __init__(self, checkpoint, *_, **__):
            self.checkpoint, self.enter_result = checkpoint, self

        def score(self, rows):
            scored.extend(rows)
            return [0.5] * len(rows)

    checkpoint = tmp_path / "kiwi" / "checkpoints" / "model.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"one")
    monkeypatch.setattr(program, "Comet", Recorder)
    monkeypatch.setenv("SSR_COMET_PYTHON", sys.executable)
    (tmp_path / "hyp.txt").write_text("x\n" * 20)
    rows = rows_of(here / "there.jsonl")
    words = [f"--translations=t={tmp_path}/hyp.txt", f"--sets={tmp_path}/set.jsonl",
             f"--metrics=m={tmp_path}/kiwi", f"--out={tmp_path}/out"]  # fmt: skip
    for count, change in ((20, {}), (20, {}), (40, {"reference": "other"}), (60, {"text": "new"})):
        write_rows(tmp_path / "set.jsonl", [row | change for row in rows])
        main(words)
        assert len(scored) == count
    assert scored[20]["ref"] == "other"
    checkpoint.write_bytes(b"two")  # another one in its place
    main(words)
    assert len(scored) == 80


def test_the_toy_is_evaluated_on_its_own_sets_in_both_directions(tmp_path, monkeypatch):
    """Also in a checkout, which has a folder toy/."""
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    main(["--prompts=toy", "--max-new-tokens=20", "--sets=toy:kasu-bevo,toy:bevo-kasu",
          "--metrics=chrf", "--first=10", "--model=before=toy", "--out=out"])  # fmt: skip
    before = json.loads((tmp_path / "out" / "table.json").read_text())["systems"]["before"]
    scores = before["scores"]
    assert list(scores) == ["kasu-bevo/toy/chrf", "bevo-kasu/toy/chrf"]
    assert scores["kasu-bevo/toy/chrf"]["value"] > 5
    assert "Only the first 10 segments" in (tmp_path / "out" / "table.md").read_text()


def test_a_file_with_two_directions_is_two_sets(here, tmp_path):
    both = (here / "there.jsonl").read_text() + (here / "back.jsonl").read_text()
    (tmp_path / "both.jsonl").write_text(both)
    (tmp_path / "hyp.txt").write_text("x\n" * 20)
    main([f"--translations=t={tmp_path}/hyp.txt,{tmp_path}/hyp.txt", "--metrics=chrf",
          f"--sets={tmp_path}/both.jsonl", f"--out={tmp_path}/out"])  # fmt: skip
    found = json.loads((tmp_path / "out" / "table.json").read_text())["systems"]["t"]["scores"]
    assert list(found) == ["en-zh/both/chrf", "zh-en/both/chrf"]
