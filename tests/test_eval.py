"""The table of the evaluation: scores, chances, what is kept, what is refused."""

import csv
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from eval import score, table
from eval.__main__ import main
from eval.table import Column
from judge import Task
from tests import corpora
from tests.test_data import write
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
    write(folder / "there.jsonl", [
        {"text": a, "source": "en", "target": "zh", "reference": b} for a, b in pairs])  # fmt: skip
    write(folder / "back.jsonl", [
        {"text": b, "source": "zh", "target": "en", "reference": a} for a, b in pairs])  # fmt: skip
    return folder


def go(here, out, *words):
    main(["--sets", f"{here}/there.jsonl,{here}/back.jsonl", "--metrics=bleu,chrf",
          "--max-new-tokens=12", "--slots=4", f"--out={out}", *words])  # fmt: skip
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
def test_bleu_and_chrf_are_those_of_sacrebleus_command_line(tmp_path, target, code):
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
        assert 20 < ours.value < 99
        assert round(ours.value, 12) == theirs[name]["score"]
        assert ours.about == theirs[name]["signature"]
        assert len(ours.segments) == 20


def test_the_total_of_the_whole_table_is_the_value():
    tasks = [Task("x", "German", "English", line) for line in ENGLISH * 4]
    texts = noisy(ENGLISH * 4, 0.3, 0)
    for metric in score.SACREBLEU.values():
        found = metric(tasks, texts)
        assert found.total(found.table.sum(0)) == pytest.approx(found.value, abs=1e-12)
    mean = score.mean_of([0.25, 0.5, 1.0], "")
    assert mean.value == mean.total(mean.table.sum(0)) == pytest.approx(175 / 3)


def test_chances_are_as_sacrebleu_draws_them():
    """Its own paired bootstrap on the same draws: the same mean and interval."""
    tasks = [Task("x", "German", "English", line) for line in ENGLISH * 10]
    systems = [noisy(ENGLISH * 10, share, seed) for share, seed in ((0.3, 1), (0.25, 2))]
    (ours, theirs) = (score.bleu(tasks, texts) for texts in systems)
    a, b = score.replicates(ours), score.replicates(theirs)
    test = PairedTest([("a", systems[0]), ("b", systems[1])], {"BLEU": BLEU()},
                      [[t.reference for t in tasks]], "bs", 1000)  # fmt: skip
    _, found = test()
    assert a.mean() == pytest.approx(found["BLEU"][0].mean, abs=1e-3)
    low, high = score.interval(a)
    assert (high - low) / 2 == pytest.approx(found["BLEU"][0].ci, abs=0.02)
    assert b.mean() == pytest.approx(found["BLEU"][1].mean, abs=1e-3)


def test_the_interval_of_a_mean_is_that_of_statistics():
    draw = random.Random(0)
    values = [draw.gauss(0.5, 0.1) for _ in range(400)]
    found = score.mean_of(values, "")
    low, high = score.interval(score.replicates(found))
    error = 100 * statistics.stdev(values) / 20
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (high + low) / 2 == pytest.approx(found.value, abs=0.3 * error)


def test_p_is_right_about_chance_and_about_a_difference():
    draw = random.Random(1)
    below = 0
    for _ in range(200):  # two systems of the same worth
        pair = [score.mean_of([draw.gauss(0.5, 0.1) for _ in range(50)], "") for _ in range(2)]
        a, b = (score.replicates(x, 200) for x in pair)
        below += score.p_value(pair[0].value, a, pair[1].value, b) < 0.1
    assert 8 <= below <= 36  # 20 of 200 expected
    base = [draw.gauss(0.5, 0.1) for _ in range(50)]
    better = score.mean_of([x + draw.gauss(0.01, 0.01) for x in base], "")
    a, b = score.replicates(better), score.replicates(score.mean_of(base, ""))
    # Unpaired it would be lost in the noise: 1 point, where one mean's error is 1.4.
    assert score.p_value(better.value, a, 100 * statistics.fmean(base), b) < 0.01
    assert score.p_value(better.value, a, better.value, a) == 1.0
    assert score.p_value(better.value, a, 0.0, 0 * a) == 1 / 1001  # never 0


# ---------------------------------------------------------------------------------- the table


def test_the_published_averages_are_plain_means():
    """Of every row and direction, from the published columns: as Avg is computed here."""
    with open(table.PUBLISHED, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    checked = 0
    columns = [
        Column(d, s, m)
        for d in ("zh-en", "en-zh")
        for s in ("wmt23", "wmt24", "flores200")
        for m in ("cometkiwi-xxl", "xcomet-xxl")
    ]
    for row, line in zip(table.published(columns), lines, strict=True):
        assert row.name == f"{line['model']} (published)"
        for column, cell in table.averages(
            {c: x._replace(draws=np.zeros(1)) for c, x in row.cells.items()}
        ).items():
            assert cell.value == pytest.approx(float(line[str(column)]), abs=0.0051)
            checked += 1
    assert len(lines) == 20 and checked == 39  # one model was published in one direction alone


def found_of(values, metrics=("cometkiwi-xxl", "xcomet-xxl")):
    """values by (direction, set, metric number), each a list of segments."""
    return {
        Column(d, s, metrics[m]): score.mean_of(segments, "")
        for (d, s, m), segments in values.items()
    }


def test_the_average_is_the_mean_of_comets_columns():
    draw = random.Random(0)
    values = {
        (d, s, m): [draw.random() for _ in range(10)]
        for d in ("zh-en", "en-zh") for s in ("wmt23", "wmt24", "flores200") for m in (0, 1)
    }  # fmt: skip
    columns = found_of(values) | {Column("zh-en", "wmt23", "bleu"): score.mean_of([0.3] * 10, "")}
    (row,) = table.rows_of({"ours": columns}, {"ours": {}})
    for direction in ("zh-en", "en-zh"):
        by_hand = sum(10 * sum(x) for (d, _, _), x in values.items() if d == direction) / 6
        assert row.cells[Column(direction, "avg", "")].value == pytest.approx(by_hand)
    assert table.averaged(["bleu", "chrf"]) == []
    text = table.markdown([row])
    head = text.splitlines()[0]
    heads = [word.strip() for word in head.split("|")]
    assert heads[1:4] == ["zh→en", "wmt23 cometkiwi-xxl", "wmt23 xcomet-xxl"]
    assert "Avg" in heads and "en→zh" in text and len(set(map(len, text.splitlines()[:3]))) == 1


def rows_for(systems):
    found = {name: found_of({("zh-en", "x", 0): v}) for name, v in systems.items()}
    return table.markdown(table.rows_of(found, {name: {} for name in found})).splitlines()[2:]


def test_what_differs_from_the_first_system_has_an_arrow():
    draw = random.Random(0)
    base = [draw.random() for _ in range(100)]
    systems = {"base": base, "same": base[::-1], "better": [x + 0.1 for x in base]}
    rows = rows_for(systems | {"worse": [x - 0.1 for x in base]})
    assert [(row.count("↑"), row.count("↓")) for row in rows] == [(0, 0), (0, 0), (2, 0), (0, 2)]
    few = {name: values[:29] for name, values in systems.items()}
    assert not any("↑" in row for row in rows_for(few))  # of few segments nothing can be said


def test_sets_of_one_size_are_drawn_apart():
    """Their averages' interval is that of independent sets."""
    draw = random.Random(0)
    values = sorted(draw.random() for _ in range(300))
    columns = found_of({("zh-en", name, 0): values for name in ("a", "b", "c", "d")})
    (row,) = table.rows_of({"x": columns}, {"x": {}})
    low, high = score.interval(row.cells[Column("zh-en", "avg", "")].draws)
    alone = score.interval(row.cells[Column("zh-en", "a", "cometkiwi-xxl")].draws)
    assert (high - low) / (alone[1] - alone[0]) == pytest.approx(0.5, abs=0.08)


def test_the_published_average_stands_beside_the_same_six_columns_alone():
    six = [Column("zh-en", s, m) for s in table.SETS for m in table.NEURAL]
    avg = Column("zh-en", "avg", "")
    assert table.published([*six, avg])[0].cells[avg].value == 86.94
    assert avg in table.published([*six, Column("zh-en", "wmt23", "bleu"), avg])[0].cells
    for columns in (six[:5], [*six, Column("zh-en", "mine", "xcomet-xxl")]):
        assert avg not in table.published([*columns, avg])[0].cells
    assert table.published([Column("zh-en", "wmt23", "bleu"), avg]) == []


def test_traditional_chinese_is_split_like_chinese():
    texts = ["這是第一句話，很短。", "這是第二句話，也很短。"]
    for target in ("Chinese", "Traditional Chinese", "Cantonese"):
        found = score.bleu(
            [Task("x", "English", target, x) for x in texts], [t[:-2] for t in texts]
        )
        assert found.value > 50 and "tok:zh" in found.about


# ------------------------------------------------------------------------- a whole evaluation


def test_an_evaluation_writes_what_it_says(here, tmp_path, capsys):
    out = tmp_path / "out"
    found = go(here, out, f"--model={here}/one", f"--model=other={here}/two")
    assert list(found["systems"]) == ["one", "other"]
    said = capsys.readouterr().out
    assert "one " in said and "20/20 segments in 0:" in said
    assert (out / "table.md").read_text() in said
    rows = rows_of(out / "one" / "there.en-zh.jsonl")
    assert rows[0]["of"]["prompts"] == "paper" and [r["segment"] for r in rows[1:]] == [*range(20)]
    segments = rows_of(out / "other" / "back.zh-en.segments.jsonl")
    assert segments[3]["text"] == "这是第3句话。" and segments[3]["scores"].keys() == {
        "bleu",
        "chrf",
    }
    with open(out / "table.csv", newline="") as file:
        lines = {line["model"]: line for line in csv.DictReader(file)}
    cell = found["systems"]["other"]["scores"]["en-zh/there/chrf"]
    assert float(lines["other"]["en-zh/there/chrf"]) == cell["value"]
    assert float(lines["other"]["en-zh/there/chrf/low"]) == cell["low"] <= cell["value"]
    assert "avg" not in str(found["systems"])  # of BLEU and chrF there is none
    assert lines["one"]["en-zh/there/unreadable"] == "1.0"
    assert "tok:zh" in found["metrics"]["bleu"][0] and "tok:13a" in found["metrics"]["bleu"][1]


def test_systems_with_the_same_outputs_are_named(here, tmp_path, capsys):
    words = [f"--model=base={here}/one", f"--model=ours={here}/one", f"--model=other={here}/two"]
    go(here, tmp_path / "out", *words)
    said = capsys.readouterr().out
    same = "gave the same translation of every segment: are they the same weights?"
    assert f"- ours and base {same}" in said and said.count(same) == 1


def test_what_is_done_is_not_done_again(here, tmp_path, monkeypatch):
    from sampler import Sampler

    out, asked = tmp_path / "out", []
    real = Sampler.generate

    def generate(self, prompts, *rest, **more):
        asked.append(len(prompts))
        return real(self, prompts, *rest, **more)

    monkeypatch.setattr(Sampler, "generate", generate)
    first = go(here, out, f"--model={here}/one")
    assert sum(asked) == 40
    file = out / "one" / "back.zh-en.jsonl"
    whole = file.read_bytes()
    lines = whole.split(b"\n")
    file.write_bytes(b"\n".join(lines[:8]) + b"\n" + lines[8][:20])  # a kill in the middle of a row
    again = go(here, out, f"--model={here}/one")
    assert sum(asked) == 53 and file.read_bytes() == whole
    assert again["systems"] == first["systems"]
    go(here, out, f"--model={here}/one", f"--model={here}/two")
    assert sum(asked) == 93


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(here, tmp_path):
    """Real processes: stopped by a signal or killed, then run to the end as if nothing had been."""
    words = [f"--sets={here}/there.jsonl", "--metrics=chrf", "--max-new-tokens=150", "--slots=1",
             f"--model={here}/one"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    main([*words, f"--out={whole}"])
    file = out / "one" / "there.en-zh.jsonl"
    for name in (signal.SIGTERM, signal.SIGKILL):
        before = file.stat().st_size if file.exists() else 0
        command = [sys.executable, "-m", "eval", *words, f"--out={out}"]
        process = subprocess.Popen(command, cwd=ROOT, env=env, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        while process.poll() is None and (not file.exists() or file.stat().st_size <= before):
            time.sleep(0.005)
        process.send_signal(name)
        _, error = process.communicate(timeout=300)
        if name == signal.SIGTERM:
            assert process.returncode == 1 and "stopped; the same command goes on" in error
    done = len(rows_of(file)) - 1
    assert 2 <= done < 20
    main([*words, f"--out={out}"])
    assert file.read_bytes() == (whole / "one" / "there.en-zh.jsonl").read_bytes()
    assert (out / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()


def test_answers_are_read_as_the_reward_reads_them(pupil, tmp_path):
    """A model that has learned the form: what it says ends, and its answers are scored alone."""
    rows = [{"text": corpora.english("news", i), "source": "en", "target": "zh",
             "reference": corpora.chinese("news", i)} for i in range(6)]  # fmt: skip
    file = write(tmp_path / "x.jsonl", rows)
    main([f"--model=m={pupil}", f"--sets={file}", "--metrics=chrf", "--max-new-tokens=80",
          f"--out={tmp_path}/out"])  # fmt: skip
    read = rows_of(tmp_path / "out" / "m" / "x.en-zh.jsonl")[1:]
    assert sum(row["readable"] for row in read) >= 3
    for row in read:
        if row["readable"]:
            assert f"<answer> {row['translation']} </answer>" in row["output"]


def test_a_file_with_two_directions_is_two_sets(here, tmp_path):
    both = (here / "there.jsonl").read_text() + (here / "back.jsonl").read_text()
    (tmp_path / "both.jsonl").write_text(both)
    main([f"--model={here}/one", f"--sets={tmp_path}/both.jsonl", "--metrics=chrf",
          "--max-new-tokens=12", f"--out={tmp_path}/out"])  # fmt: skip
    found = json.loads((tmp_path / "out" / "table.json").read_text())["systems"]["one"]["scores"]
    assert list(found) == ["en-zh/both/chrf", "zh-en/both/chrf"]


def test_names_of_files_do_not_meet(here, tmp_path):
    for name in ("a b", "a_b"):
        shutil.copy(here / "there.jsonl", tmp_path / f"{name}.jsonl")
    with pytest.raises(SystemExit, match="--sets has two called a_b en-zh: rename a file"):
        main([f"--model={here}/one", f"--sets={tmp_path}/a b.jsonl,{tmp_path}/a_b.jsonl",
              "--metrics=chrf", f"--out={tmp_path}/out"])  # fmt: skip


@pytest.fixture
def made(here, tmp_path):
    """An evaluation's folder, and what it has of one set."""
    out = tmp_path / "out"
    go(here, out, f"--model={here}/one")
    return out, (out / "one" / "there.en-zh.jsonl").read_bytes()


def test_a_moved_model_is_the_same_and_another_tokenizer_is_not(here, made, tmp_path):
    out, before = made
    shutil.copytree(here / "one", tmp_path / "moved" / "one")
    go(here, out, f"--model={tmp_path}/moved/one")
    assert (out / "one" / "there.en-zh.jsonl").read_bytes() == before
    make_tokenizer(tmp_path / "moved" / "one", ("other words entirely",), 390)
    with pytest.raises(SystemExit, match="its set or tokenizer was "):
        go(here, out, f"--model={tmp_path}/moved/one")
    (tmp_path / "run").mkdir()
    shutil.copytree(here / "one", tmp_path / "run" / "best")
    with pytest.raises(SystemExit, match=r"run/config\.json; did you mean .*run/best\?"):
        go(here, out, f"--model={tmp_path}/run")


def test_how_a_model_was_asked_in_training_is_said(here, tmp_path, capsys):
    shutil.copytree(here / "one", tmp_path / "run" / "best")
    (tmp_path / "run" / "settings.json").write_text('{"prompts": "paper", "chat": true}')
    go(here, tmp_path / "out", f"--model={tmp_path}/run/best")
    assert "was trained with chat True, and is asked with chat False" in capsys.readouterr().out


def test_a_broken_row_is_named(here, tmp_path):
    out = tmp_path / "out"
    go(here, out, f"--model={here}/one")
    file = out / "one" / "there.en-zh.jsonl"
    lines = file.read_text().splitlines()
    for number, line in ((4, '{"segment": 3, "tra'), (1, "[]")):
        file.write_text("\n".join([*lines[: number - 1], line, *lines[number:]]) + "\n")
        with pytest.raises(SystemExit, match=rf"en-zh\.jsonl, line {number} is not what we wrote"):
            go(here, out, f"--model={here}/one")


def test_a_full_disk_leaves_the_table_that_was_there(here, tmp_path):
    out = tmp_path / "out"
    go(here, out, f"--model={here}/one")
    before = {f: f.read_bytes() for f in (*out.glob("table.*"), *out.glob("one/*.segments.jsonl"))}
    words = [sys.executable, "-m", "eval", f"--sets={here}/there.jsonl,{here}/back.jsonl",
             "--metrics=chrf", "--max-new-tokens=12", f"--model={here}/one"]  # fmt: skip
    words.append(f"--out={out}")
    limited = f"ulimit -f 2; exec {' '.join(words)}"
    run = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True,
                         timeout=300)  # fmt: skip
    assert run.returncode == 1 and "cannot write" in run.stderr and "make room" in run.stderr
    assert all(file.read_bytes() == content for file, content in before.items())


def test_somebody_elses_translations_are_scored(here, tmp_path):
    reference = [row["reference"] for row in rows_of(here / "there.jsonl")]
    (tmp_path / "good.txt").write_text("\n".join(reference) + "\n")
    (tmp_path / "bad.txt").write_text("x\n" * 19 + "\n")  # an empty translation is one, too
    ours = tmp_path / "out"
    back = ours / "one" / "back.zh-en.jsonl"
    go(here, ours, f"--model={here}/one")
    found = go(
        here, ours, f"--translations=a={tmp_path}/good.txt,{tmp_path}/bad.txt",
        f"--translations=b={tmp_path}/bad.txt,{back}",
    )  # fmt: skip
    scores = {name: x["scores"] for name, x in found["systems"].items()}
    assert scores["a"]["en-zh/there/bleu"]["value"] == pytest.approx(100)
    assert scores["b"]["en-zh/there/bleu"]["value"] < 1
    own = go(here, ours, f"--model={here}/one")["systems"]["one"]["scores"]
    assert scores["b"]["zh-en/back/chrf"] | {"p": None} == own["zh-en/back/chrf"]
    assert found["systems"]["b"]["unreadable"]["zh-en/back"] == 1.0
    assert found["systems"]["a"]["unreadable"] == {"en-zh/there": None, "zh-en/back": None}
    again = go(here, tmp_path / "again", f"--translations={ours}/one")  # a folder of ours
    assert again["systems"]["one"] == go(here, ours, f"--model={here}/one")["systems"]["one"]


@pytest.mark.slow
def test_two_ranks_translate_as_one(here, tmp_path):
    words = [f"--sets={here}/there.jsonl", "--metrics=chrf", "--max-new-tokens=12", "--slots=4"]
    words += [f"--model={here}/one"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    main([*words, f"--out={tmp_path / 'one'}"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--standalone", "-m", "eval", *words, f"--out={tmp_path / 'two'}"]
    run = subprocess.run(torchrun, cwd=ROOT, env=env, capture_output=True, text=True,
                         timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stderr
    one, two = ((tmp_path / n / "one/there.en-zh.jsonl").read_text() for n in ("one", "two"))
    assert one == two


def test_the_toys_models_are_evaluated_on_its_own_sets(toy, tmp_path):
    main([f"--model={toy}", "--prompts=toy", "--sets=toy:kasu-bevo,toy:bevo-kasu", "--first=20",
          "--metrics=chrf", "--max-new-tokens=20", f"--out={tmp_path}/out"])  # fmt: skip
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    (system,) = found["systems"].values()
    assert system["scores"]["kasu-bevo/toy/chrf"]["value"] > 5
    assert "Only the first 20 segments" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate: give --model or --translations"),
        (["--model=x/y", "--metrics=blue"], r"--metrics blue is unknown: did you mean bleu\?"),
        (["--model=x/y", "--metrics=bleu,bleu"], "a metric cannot be called bleu: name it"),
        (["--model=x/y", "--metrics=segments=a/b"], "a metric cannot be called segments"),
        (["--model=x/y", "--metrics=mine=bleu"], "bleu and chrf are sacreBLEU's, under these"),
        (["--model=x/y", "--metrics=bleu:no-ref"], "bleu and chrf are sacreBLEU's, under these"),
        (["--model=x/y", "--metrics=chrf=a/b"], "bleu and chrf are sacreBLEU's, under these"),
        (["--model=x/y", "--metrics=./gone"], r"\./gone: there is no such checkpoint"),
        (["--model=x/y", "--compare", "--first=3"], "what was published is of whole sets"),
        (["--model=base=", "--metrics=bleu"], "--model base=: there is no config.json"),
        (["--translations=..=x.txt", "--metrics=bleu"], r"'\.\.' is no name for a file"),
        (["--model=a/x", "--model=b/x", "--metrics=bleu"], "two systems are called x: name them"),
        (["--model=nowhere/at/all", "--metrics=bleu"], "there is no nowhere/at/all/config.json"),
        (["--model=x", "--sets=gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--model=x", "--sets=,"], "--sets names none"),
        (["--translations=a,b", "--metrics=bleu"], "2 files for 1 sets; give one for each"),
        (["--translations=gone.txt", "--metrics=bleu"], "--translations gone.txt: cannot be read"),
        (["--model=x", "--first=-1"], "--first -1 must be at least 1"),
        (["--model=x", "--slots=0"], "--slots must be at least 1"),
        (["--model=x", "--device=cuda", "--metrics=bleu"], "--device cuda is not there: use cpu"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(here, tmp_path, words, message, capsys):
    sets = [] if any("--sets" in w for w in words) else [f"--sets={here}/there.jsonl"]
    with pytest.raises(SystemExit) as stop:
        main([*words, *sets, f"--out={tmp_path}/out"])
    said = f"{stop.value}{capsys.readouterr().err}"
    assert re.search(message, said) and said.count("\n") <= 1
    assert not list((tmp_path / "out").glob("*/*.jsonl")) if (tmp_path / "out").exists() else True


def test_a_missing_reference_is_named(here, tmp_path):
    rows = [{"text": "a", "source": "en", "target": "zh", "reference": "b"}]
    file = write(
        tmp_path / "x.jsonl", [*rows, {k: v for k, v in rows[0].items() if k != "reference"}]
    )
    with pytest.raises(
        SystemExit, match=r"bleu needs references, and .*x\.jsonl has none for segment 2"
    ):
        main([f"--model={here}/one", f"--sets={file}", "--metrics=bleu", f"--out={tmp_path}/out"])


def test_translations_of_another_length_are_refused(here, tmp_path):
    (tmp_path / "short.txt").write_text("x\n" * 19)
    (tmp_path / "bad.jsonl").write_text('{"translation": "x"}\n' * 4 + '{"translation": 3}\n')
    for file, message in {
        "short.txt": "19 translations, and .* has 20 segments",
        "bad.jsonl": r'bad.jsonl, line 5: not a JSON row with a "translation"',
    }.items():
        with pytest.raises(SystemExit, match=message):
            main([f"--translations={tmp_path}/{file}", f"--sets={here}/there.jsonl",
                  "--metrics=bleu", f"--out={tmp_path}/out"])  # fmt: skip


def test_translations_made_otherwise_are_not_mixed(here, made):
    out, before = made
    with pytest.raises(SystemExit, match="its max_new_tokens was 12, now 13: name another --out"):
        go(here, out, f"--model={here}/one", "--max-new-tokens=13")
    with pytest.raises(SystemExit, match=r"its model was \w+ \w+, now \w+"):
        go(here, out, f"--model=one={here}/two")
    assert (out / "one" / "there.en-zh.jsonl").read_bytes() == before


def test_scores_of_other_references_are_not_taken_for_these(here, tmp_path, monkeypatch):
    """COMET is a counter here: what it is asked again is what has changed."""
    from eval import __main__ as program

    asked = []

    class Counter:
        def __init__(self, *_, **__):
            self.about = dict.fromkeys(("checkpoint", "class", "comet", "dtype", "revision"), "x")
            self.about["takes_reference"] = True

        def score(self, rows):
            asked.extend(rows)
            return [0.5] * len(rows)

        ready = close = lambda self: None

    checkpoint = tmp_path / "kiwi" / "checkpoints" / "model.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"one")
    monkeypatch.setattr(program, "Comet", Counter)
    monkeypatch.setenv("SSR_COMET_PYTHON", sys.executable)
    (tmp_path / "hyp.txt").write_text("x\n" * 20)
    rows = rows_of(here / "there.jsonl")
    words = [f"--translations=t={tmp_path}/hyp.txt", f"--sets={tmp_path}/set.jsonl",
             f"--metrics=m={tmp_path}/kiwi,n={tmp_path}/kiwi:no-ref",
             f"--out={tmp_path}/out"]  # fmt: skip
    for change in ({}, {"reference": "other"}, {"text": "other"}):
        write(tmp_path / "set.jsonl", [row | change for row in rows])
        main(words)
    assert len(asked) == 100  # n does not see the references
    assert asked[40]["ref"] == "other" and "ref" not in asked[20]
    checkpoint.write_bytes(b"two")  # another one in its place
    main(words)
    assert len(asked) == 140


def test_a_window_that_is_too_small_is_said(here, tmp_path):
    with pytest.raises(SystemExit, match=r"one has 4096 positions, .*--max-new-tokens 4000 does"):
        go(here, tmp_path / "out", f"--model={here}/one", "--max-new-tokens=4000")


def test_the_toys_name_is_known_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    """As in a checkout, which has a folder toy/."""
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["--prompts=toy", "--max-new-tokens=20", "--sets=toy:kasu-bevo", "--metrics=chrf"]
    main([*words, "--first=4", "--model=before=toy", "--out=out"])
    assert "before" in json.loads((tmp_path / "out" / "table.json").read_text())["systems"]
