"""The page of a run: what is in it, what it does in a browser, how it looks at any width."""

import fcntl
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
from tests.browser import drive, needs_chromium
from tests.processes import ROOT
from tests.runs import rows_of, write_rows

SMALL = [
    *("--preset=toy", "--prompts-per-step=4", "--samples-per-prompt=4", "--eval-prompts=16"),
    *("--eval-every=2", "--steps=5"),
    "--max-new-tokens=6",  # some are cut off, and so of the wrong form
]
PAIRS = [("the old cat", "the new cat sat"), ("他在十号房间开会", "他在九号房间开会吗")]
NASTY = 'a</script><img src=x onerror="throw 1"> & {{data}} <b>'


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
    write_rows(good / "evaluations.jsonl", rows)
    shutil.copytree(good, bad)
    values = {0: (0.75, 0.5), 2: (0.5, 0.6), 4: (0.125, 0.7), 5: (0.0, 0.9)}

    def spoil(row):
        last, greedy = row["step"] == 5, row["greedy"]
        row["alarm"] = "the judge's score is high" * last
        greedy["text"][:3] = [*(pair[last] for pair in PAIRS), NASTY if last else "x"]
        greedy["quality"] = [i / 100 if last else 1.0 for i in range(16)]
        greedy["self"] = [0.9] * 16

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


def data_in(page):
    return json.loads(re.search(r' id="data">(.*)</script>', page.read_text())[1])


def test_the_page_is_one_file_that_loads_nothing_and_no_text_becomes_a_part_of_it(page):
    text, ids, links = page.read_text(), [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag not in ("link", "img") and "src" not in dict(attributes)
            ids.extend(value for name, value in attributes if name == "id")
            links.extend(value for name, value in attributes if name == "href")

    Reader().feed(text)
    assert len(set(ids)) == len(ids) and set(links) <= {f"#{x}" for x in ids}
    assert set(re.findall(r"\{\{\w+\}\}", text)) == {"{{data}}"}  # that is in a translation
    assert "@import" not in text and "https://" not in text and "url(" not in text
    cells = [cell for row in data_in(page)["rows"] for cell in row["cells"]]
    assert NASTY in [cell["text"] for cell in cells] and "<img" not in text
    titles = re.findall("<figure><h3>(.*?)</h3>", text)
    assert len(titles) == 13 and titles[-2:] == ["self, fine", "self, hacked"]


def test_curves_are_the_numbers_of_the_runs(runs):
    run = RunData(runs[0], "fine")
    axes = draw.draw_panel(draw.panels_for([run])["reward"], [run])
    assert list(axes.legend) == ["total", "format"]  # self equals the total, and is not repeated
    totals = [row["reward/total"] for row in rows_of(runs[0] / "metrics.jsonl")[1:]]
    points = ["{:.1f} {:.1f}".format(*axes.point(*p)) for p in enumerate(totals, 1)]
    assert f'd="M{"L".join(points)}"' in axes.content
    assert f"<title>fine, total: {totals[0]:.4g} → {totals[-1]:.4g}</title>" in axes.content
    held_out = draw.draw_panel(draw.PANELS["held-out"], [run])
    assert held_out.x_range == (0, 5) and [*held_out.legend] == ["greedy", "sampled at T 1"]


def test_the_page_shows_the_share_in_a_wrong_language_with_an_example(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    groups = rows_of(runs[0] / "groups.jsonl") * 40
    groups = [row | {"step": step} for step, row in enumerate(groups)]
    samples = groups[101]["samples"]  # between those that are kept for the page
    groups[101]["samples"] = [samples[0] | {"text": "Bonjour", "wrong_language": 1.0}, *samples[1:]]
    text = "".join(json.dumps(row) + "\n" for row in groups)
    (tmp_path / "run" / "groups.jsonl").write_text(text)
    rewrite(
        tmp_path / "run" / "metrics.jsonl",
        lambda row: row | {"reward/wrong_language": row["step"] / 9},
    )
    draw.main([str(tmp_path / "run")])
    page = tmp_path / "run" / "report.html"
    shown = {row["step"]: row for row in data_in(page)["groups"]}
    assert shown[101]["samples"][0]["text"] == "Bonjour" and len(shown) < 50
    run = RunData(tmp_path / "run", "a")
    panels = draw.panels_for([run])
    assert "wrong language" in draw.draw_panel(panels["unusable"], [run]).legend
    assert "reward/wrong_language" not in panels["reward"].keys


def test_many_points_become_means_of_neighbours(runs):
    run = RunData(runs[0], "a")
    run.rows = [{"step": i, "x": x} for i, x in enumerate((1.0, 3.0, None, 5.0, 7.0, 20.0))]
    assert run.series("x", 5) == ([0, 1, 3, 4, 5], [1, 3, 5, 7, 20])
    assert run.series("x", 3) == ([0.5, 3.5, 5], [2, 6, 20])
    assert draw.spread_out(list(range(10)), 4, (4, 9)) == [0, 3, 4, 6, 9]


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
    assert f"5 steps: held-out exact_match {numbers[0]} → {numbers[1]}" in text
    assert (f"Take best/, of step {good.best}. " if good.best else start) in text
    kind, text = draw.assess_run(bad)
    assert kind == "bad" and "Alarm at step 5: " in text and "score is high)" in text
    assert f"{start}Do not take last/" in text
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
    assert "no alarm can ring" in text and "<td>cannot ring</td>" in text
    assert "No alarm." not in text and "Held-out quality" not in text
    rewrite(run / "metrics.jsonl", lambda row: row | {"eval/best_by": float(row["step"] == 2)})
    assert RunData(run, "a").best == 2  # best/ goes by what the log says


def test_the_overview_has_the_numbers_of_start_best_and_last(runs):
    run = RunData(runs[1], "a")
    run.best = 2
    run.rows = [{"step": i, "seconds/train": 90.0, "seconds/judge": None} for i in range(5)]
    cells = re.findall(r"<td>(.*?)</td>", draw.overview_row(run))
    assert cells[1] == "5 steps" and cells[2:6] == ["exact_match", "0.750", "0.500", "0.000"]
    assert cells[6:10] == ["self", "0.500", "0.600", "0.900"]
    assert cells[10] == "2" and ">1<" in cells[11] and cells[12] == "0:07:30"


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
        return re.findall(r'<i class="dot run(\d)"></i>([^<]*?)</td>', out.read_text())

    assert titles(odd, runs[0], f"mine={runs[1]}") == [
        *(("0", str(odd)), ("1", str(runs[0])), ("2", "mine")),
    ]
    assert titles(f"a={runs[0]}", f"a={runs[1]}") == [
        *(("0", f"a: {runs[0]}"), ("0", f"a: {runs[1]}")),
    ]
    assert titles(odd) == [("0", "good")]


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
    text = "4 steps: nothing was measured on held-out texts."
    assert draw.assess_run(challenger) == ("unsure", text)
    assert draw.assess_run(solver) == ("good", "2 steps: held-out accuracy 0.600 → 0.800. ")
    assert "<td>accuracy</td><td>0.600</td><td>–</td><td>0.800</td>" in draw.overview_row(solver)
    draw.main([*players, f"--out={tmp_path / 'x.html'}"])
    titles = re.findall("<figure><h3>(.*?)</h3>", (tmp_path / "x.html").read_text())
    assert titles == ["Held-out quality", "Difficulty of questions", "Groups"]


def test_the_page_of_a_run_that_goes_on_says_so(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    with open(run / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert RunData(run, "a").state() == "at step 5 of 5"
        assert not RunData(run, "a", ended=True).running  # its own process asks
        draw.main([str(run)])
    assert data_in(run / "report.html")["running"]
    draw.main([str(run)])
    assert not data_in(run / "report.html")["running"]


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
    assert len(data_in(run / "report.html")["rows"]) == len(set(sources))
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


@needs_chromium
def test_a_person_can_choose_steps_sentences_and_groups_on_a_phone(page, tmp_path):
    result = drive(page, tmp_path, """
    const all = (q) => [...page.document.querySelectorAll(q)];
    const texts = (q) => all(q).map((x) => x.textContent.trim());
    const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new page.Event("input")); };
    const result = { colours: texts("#colours span"), links: all("nav a").length };
    const boxes = all("#columns label");
    result.columns = texts("#columns label");
    result.cells = all("#rows article:first-child .cell").length;
    boxes.map((x) => x.firstChild).filter((x) => x.checked).forEach((x) => x.click());
    result.none = all("#rows .cell").length;
    boxes.at(-1).click();
    for (const query of ["old cat", "十号", "ONERROR", "no such words"]) {
      set("query", query);
      result[query] = [all("#rows article").length, ...texts("#rows ins")];
    }
    set("query", "");
    result.all = all("#rows article").length;
    boxes[result.columns.findIndex((x) => x.startsWith("hacked step 0"))].click();
    result.first = all("#rows article:first-child .cell:last-child .soft").map((x) => x.textContent).join();
    result.group = $("samples").textContent;
    set("group", 0);
    result.before = $("samples").textContent;
    result.images = all("img").length;
    result.width = page.document.documentElement.scrollWidth;
    result.ink = page.getComputedStyle(page.document.body).color;
    result.label = page.getComputedStyle(page.document.querySelector("figure svg text")).fill;
    return result;
    """, width=390)  # noqa: E501  # fmt: skip
    assert result["colours"] == ["fine", "hacked"] and result["links"] == 6
    assert result["columns"][0].startswith("fine step 0")
    assert result["columns"][-1] == "hacked step 5 (alarm)"
    assert result["cells"] >= 4 and result["none"] == 0
    assert result["old cat"] == [1, "new", "sat"] and result["十号"][0] == 1
    assert "九" in "".join(result["十号"][1:]) and "在" not in "".join(result["十号"][1:])
    assert result["ONERROR"][0] == 1 and "b" in result["ONERROR"] and result["images"] == 0
    assert result["no such words"] == [0] and result["all"] > 8
    assert "self 0.90 · exact_match" in result["first"] and "quality 0.00" in result["first"]
    assert result["group"].startswith("step 5 of hacked")
    assert result["before"].startswith("step 1 of fine")
    assert result["width"] == 390 and result["label"] == result["ink"]  # nothing sticks out
    assert int(re.search(r"\d+", result["ink"])[0]) > 128  # a dark page, as the browser asks for
