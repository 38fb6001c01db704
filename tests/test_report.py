"""The page of a run: its curves, verdict, sentences, training groups and settings."""

import html
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

import ssr
from report import charts, draw
from report.runs import RunData
from tests.processes import ROOT
from tests.runs import rows_of, write_rows

SMALL = [
    *("--preset=toy", "--prompts-per-step=4", "--samples-per-prompt=4", "--eval-prompts=16"),
    *("--eval-every=2", "--steps=5"),
    "--max-new-tokens=6",  # some are cut off, and so of the wrong form
]
PAIRS = [("the old cat", "the new cat sat"), ("他在十号房间开会", "他在九号房间开会吗")]
NASTY = 'a</script><img src=x onerror="throw 1"> & {{settings}} <b>'


def rewrite(path, change):
    write_rows(path, [change(row) or row for row in rows_of(path)])


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """A run, and a copy of it whose last evaluation is made bad and has an alarm."""
    folder = tmp_path_factory.mktemp("runs")
    good, bad = folder / "good", folder / "bad"
    ssr.main([*SMALL, f"--model={toy}", f"--folder={good}"])
    rows = rows_of(good / "evaluations.jsonl")
    rows[0]["reference"][:2] = [reference for reference, _ in PAIRS]
    rows[0]["source"][2] = NASTY
    write_rows(good / "evaluations.jsonl", rows)
    shutil.copytree(good, bad)
    values = {0: (0.75, 0.5), 2: (0.5, 0.6), 4: (0.125, 0.7), 5: (0.0, 0.9)}

    def spoil(row):
        last, greedy = row["step"] == 5, row["greedy"]
        row["alarm"] = "the judge's score is high" * last
        greedy["text"][:3] = [*(pair[last] for pair in PAIRS), NASTY if last else "x"]
        greedy["quality"] = [i / 100 if last else 1.0 for i in range(16)]
        greedy["self"], greedy["format"] = [0.9] * 16, [1.0] * 16

    def ring(row):
        if row["step"] in values:
            quality, own = values[row["step"]]
            row |= {"eval/exact_match": quality, "eval/best_by": quality, "eval/self": own}
            row["eval/alarm"] = float(row["step"] == 5)

    rewrite(bad / "evaluations.jsonl", spoil)
    rewrite(bad / "metrics.jsonl", ring)
    settings = json.loads((bad / "settings.json").read_text())
    (bad / "settings.json").write_text(json.dumps(settings | {"lr": 1.0}))
    return good, bad


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "both.html"
    draw.main([f"fine={runs[0]}", f"hacked={runs[1]}", f"--out={out}"])
    return out


def cells_of(text):
    """(class, head) of each translation on a page."""
    return re.findall(r'<div class="cell (\w+)"><b class="soft">(.*?)</b>', text)


def test_the_page_is_one_file_that_loads_nothing_and_no_text_becomes_a_part_of_it(page):
    text, ids, links = page.read_text(), [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag not in ("link", "img", "script") and "src" not in dict(attributes)
            ids.extend(value for name, value in attributes if name == "id")
            links.extend(value for name, value in attributes if name == "href")

    Reader().feed(text)
    assert len(set(ids)) == len(ids) and len(links) == 5 and set(links) <= {f"#{x}" for x in ids}
    assert set(re.findall(r"\{\{\w+\}\}", text)) == {"{{settings}}"}  # of a source text
    assert "@import" not in text and "https://" not in text and "url(" not in text
    assert NASTY in html.unescape(text) and html.escape(NASTY) in text
    titles = re.findall("<figure><h3>(.*?)</h3>", text)
    assert len(titles) == 13 and titles[-2:] == ["self, fine", "self, hacked"]


def test_sentences_are_shown_at_start_best_alarm_and_end_the_most_overrated_first(page, runs):
    articles = re.findall("(?s)<article>.*?</article>", page.read_text())
    sources = rows_of(runs[0] / "evaluations.jsonl")[0]["source"]
    assert len(articles) == len(set(sources))
    heads = cells_of(articles[0])
    assert heads[0][0] == "run0" and heads[0][1].startswith("fine, step 0")
    assert heads[-2:] == [("run1", "hacked, step 0 (best)"), ("run1", "hacked, step 5 (alarm)")]
    assert "self 0.900 · exact_match" in articles[0] and "quality 0.000" in articles[0]
    assert "quality 0.150" in articles[-1].rpartition("hacked, step 5")[2]
    marked = {x for article in articles for x in re.findall("<ins>(.*?)</ins>", article)}
    assert {"new", "sat", "九"} <= marked and not {"the", "在", "cat", " "} & marked


def test_curves_are_the_numbers_of_the_runs(runs):
    run = RunData(runs[0], "fine")
    axes = draw.draw_panel(draw.panels_for([run])["reward"], [run])
    assert list(axes.legend) == ["total", "format", "self"]
    totals = [row["reward/total"] for row in rows_of(runs[0] / "metrics.jsonl")[1:]]
    points = ["{:.1f} {:.1f}".format(*axes.point(*p)) for p in enumerate(totals, 1)]
    assert f'd="M{"L".join(points)}"' in axes.content
    assert f"<title>fine, total: {totals[0]:.4g} → {totals[-1]:.4g}</title>" in axes.content
    held_out = draw.draw_panel(draw.PANELS["held-out"], [run])
    assert held_out.x_range == (0, 5) and [*held_out.legend] == ["greedy", "sampled at T 1"]


def test_the_page_shows_the_share_in_a_wrong_language_with_an_example(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    groups = rows_of(runs[0] / "groups.jsonl") * 40
    groups = [json.loads(json.dumps(row | {"step": step})) for step, row in enumerate(groups)]
    samples = groups[101]["samples"]  # between those that are kept for the page
    samples[0] |= {"text": "Bonjour", "wrong_language": 1.0, "reward": 0.1, "advantage": -0.5}
    samples[1] |= {"reward": 0.7, "advantage": 0.5}
    text = "".join(json.dumps(row) + "\n" for row in groups)
    (tmp_path / "run" / "groups.jsonl").write_text(text)
    rewrite(
        tmp_path / "run" / "metrics.jsonl",
        lambda row: row | {"reward/wrong_language": row["step"] / 9},
    )
    draw.main([str(tmp_path / "run")])
    shown = (tmp_path / "run" / "report.html").read_text().split("<details>")[1:]
    assert draw.spread_out(list(range(10)), 4, [4, 9]) == [0, 3, 4, 6, 9]
    assert len(shown) < 20 and sum("Bonjour" in group for group in shown) == 1
    [group] = [group for group in shown if "Bonjour" in group]
    heads = cells_of(group)
    heads = [(kind, head.replace(", cut off", "")) for kind, head in heads]
    assert heads[0] == ("above", "reward 0.700, advantage 0.500")
    assert ("below", "reward 0.100, advantage -0.500, wrong language or copy") in heads
    run = RunData(tmp_path / "run", "a")
    panels = draw.panels_for([run])
    assert "wrong language" in draw.draw_panel(panels["unusable"], [run]).legend
    assert "reward/wrong_language" not in panels["reward"].keys


def test_axes_have_round_numbers_and_hold_every_value():
    assert charts.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert charts.ticks(0.013, 0.032) == pytest.approx([0.015, 0.02, 0.025, 0.03])
    assert charts.y_range([0.2, 0.4], True) == (0.0, 1.02)
    assert charts.y_range([3.0, 10.0], False)[0] == 0 < charts.y_range([9.0, 10.0], False)[0]
    for constant in (0.0, 5.0, -5.0):  # a curve that does not move can be drawn
        low, high = charts.y_range([constant], False)
        assert low <= constant < high and len(charts.ticks(low, high)) > 1


def test_a_heatmap_is_darkest_where_most_samples_are():
    axes = charts.Axes((0, 2), (0.0, 1.0))
    axes.add_heatmap([[0.0, 1.0], [0.5, 0.1]])
    shades = dict(re.findall(r'opacity="([\d.]+)" d="M([\d.]+ [\d.]+)', axes.content))
    left, middle = charts.LEFT, (charts.LEFT + charts.RIGHT) / 2
    low, high = charts.BOTTOM, (charts.TOP + charts.BOTTOM) / 2
    corners = {"1.0": (left, high), "0.7": (middle, low), "0.3": (middle, high)}
    assert shades == {shade: f"{x:.2f} {y:.2f}" for shade, (x, y) in corners.items()}


def test_the_verdict_says_how_it_went_and_which_weights_to_take(runs):
    good, bad = (RunData(folder, "a") for folder in runs)
    result = json.loads((runs[0] / "result.json").read_text())
    assert good.best == result["best_step"]
    numbers = [f"{good.eval_at(step, 'eval/exact_match'):.3f}" for step in (0, 5)]
    kind, text = draw.assess_run(good)
    start = "No step was better than the start: keep the model the run began with. "
    assert kind == "good" and text.endswith("No alarm.")
    assert text.startswith("5 of 5 steps in 0:00:")
    assert f". Held-out exact_match {numbers[0]} → {numbers[1]}, self " in text
    assert (f"Take best/, of step {good.best} (exact_match " if good.best else start) in text
    kind, text = draw.assess_run(bad)
    assert kind == "bad" and "Alarm at step 5: " in text and "score is high)" in text
    assert f"{start}Do not take last/" in text
    bad.best = 2
    seconds = {"seconds/train": 90.0, "seconds/judge": None, "groups/zero_variance": 0.0}
    bad.rows = [seconds] * 5
    assert "in 0:07:30. " in draw.assess_run(bad)[1]
    assert "Take best/, of step 2 (exact_match 0.500). " in draw.assess_run(bad)[1]
    for row in good.rows:
        row["groups/zero_variance"] = 1.0
    assert draw.assess_run(good)[1].startswith("Nothing was learned")


def test_a_run_without_a_measure_is_never_called_free_of_alarms(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    rewrite(
        run / "metrics.jsonl",
        lambda row: {k: v for k, v in row.items() if not re.search("match|quality|corr|alarm", k)},
    )
    (run / "evaluations.jsonl").unlink()
    draw.main([str(run)])
    text = (run / "report.html").read_text()
    assert "no alarm can ring" in text
    assert "No alarm." not in text and "Held-out quality" not in text
    rewrite(run / "metrics.jsonl", lambda row: row | {"eval/best_by": float(row["step"] == 2)})
    assert RunData(run, "a").best == 2  # best/ goes by what the log says


def test_rings_stand_where_the_alarm_rang(runs):
    run = RunData(runs[1], "a")
    axes = draw.draw_panel(draw.PANELS["held-out"], [run])
    ring = 'class="ring" cx="{:.1f}" cy="{:.1f}"'.format(*axes.point(5, 0.0))
    assert axes.content.count("ring") == axes.content.count(ring) == 1
    assert "ring" not in draw.draw_panel(draw.PANELS["judge"], [run]).content


def test_titles_are_distinct_and_labels_share_a_colour(runs, tmp_path):
    """Also with = in the name of a folder, and with two folders of one name."""
    odd = tmp_path / "lr=2e-4 $x" / "good"
    shutil.copytree(runs[0], odd)
    out = tmp_path / "out.html"

    def titles(*arguments):
        draw.main([*map(str, arguments), f"--out={out}"])
        heads = cells_of(out.read_text())
        return [*dict.fromkeys((k, x.split(", step")[0]) for k, x in heads if k[:3] == "run")]

    assert titles(odd, runs[0], f"mine={runs[1]}") == [
        *(("run0", str(odd)), ("run1", str(runs[0])), ("run2", "mine")),
    ]
    assert titles(f"a={runs[0]}", f"a={runs[1]}") == [
        *(("run0", f"a: {runs[0]}"), ("run0", f"a: {runs[1]}")),
    ]
    assert titles(odd) == [("run0", "good")]


def test_settings_that_differ_are_marked(runs):
    text = draw.settings_html([RunData(folder, "a") for folder in runs])
    assert re.findall(r'<tr class="differs"><th>(\w+)</th>', text) == ["lr"]
    keys = re.findall(r"<th>(\w+)</th>", text)
    assert keys.index("commit") < keys.index("lr") < keys.index("seed")


def test_players_of_r_zero_are_on_one_page(tmp_path):
    """They have no judge, no best weights, and steps of their own."""
    settings = {"steps": 200, "iterations": 2, "challenger_steps": 2, "solver_steps": 1}
    rows = {
        "challenger": [{"step": n, "questions/depth": n + 2.0} for n in range(5)],
        "solver": [{"step": n, "eval/accuracy": 0.6 + n / 10, "eval/sampled_accuracy": 0.5,
                    "groups/zero_variance": 0.5} for n in range(3)],
    }  # fmt: skip
    for name in rows:
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
        write_rows(tmp_path / name / "metrics.jsonl", rows[name])
    players = [str(tmp_path / name) for name in rows]
    challenger, solver = (RunData(Path(path), path) for path in players)
    text = "4 of 4 steps in 0:00:00. Nothing was measured on held-out texts."
    assert draw.assess_run(challenger) == ("unsure", text)
    text = "2 of 2 steps in 0:00:00. Held-out accuracy 0.600 → 0.800. "
    assert draw.assess_run(solver) == ("good", text)
    draw.main([*players, f"--out={tmp_path / 'x.html'}"])
    titles = re.findall("<figure><h3>(.*?)</h3>", (tmp_path / "x.html").read_text())
    assert titles == ["Held-out quality", "Difficulty of questions", "Groups"]


def test_a_page_can_be_made_at_any_moment_of_a_run(runs, tmp_path):
    """Before the first row, with a row half-written, and with one evaluation."""
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ValueError, match=r"is not the folder of a run: it has no settings\.json"):
        RunData(run, "a")
    shutil.copy(runs[0] / "settings.json", run)
    draw.main([str(run)])
    for name in ("metrics.jsonl", "evaluations.jsonl", "groups.jsonl"):
        lines = (runs[0] / name).read_bytes().split(b"\n")
        (run / name).write_bytes(lines[0] + b"\n" + lines[1][:20])
    draw.main([str(run)])
    sources = rows_of(runs[0] / "evaluations.jsonl")[0]["source"]
    assert (run / "report.html").read_text().count("<article>") == len(set(sources))
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        RunData(run, "a")


def test_the_folder_report_needs_nothing_but_python(runs, tmp_path):
    """A borrower, or a laptop without PyTorch, can look at runs."""
    shutil.copytree(ROOT / "report", tmp_path / "report")
    command = f"from report.draw import main; main([{str(runs[0])!r}, '--out=x.html']); import sys;"
    command += "assert not {'torch', 'numpy', 'matplotlib', 'run', 'ssr'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "x.html").exists()


def test_a_picture_is_svg_for_light_and_dark_pages(runs, tmp_path):
    out = tmp_path / "curve.svg"
    draw.main([f"a={runs[0]}", f"b={runs[1]}", f"--svg={out}", "--panels=held-out,entropy"])
    root = ET.fromstring(out.read_text())
    assert root.tag.endswith("svg") and "prefers-color-scheme: dark" in out.read_text()
    labels = {x.text for x in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Held-out quality", "Entropy", "a", "b", "step"} <= labels
    for name, message in (
        ("entropi", "is unknown; known: held-out"),
        ("lessons", "no run has any"),
    ):
        with pytest.raises(ValueError, match=f"--panels {name}.*{message}"):
            draw.main([str(runs[0]), f"--svg={out}", f"--panels={name}"])
