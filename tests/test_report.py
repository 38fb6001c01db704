"""The page a run is looked at with: what is in it, what it does, how it looks at any width."""

import fcntl
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

import report
import ssr
from tests.browser import drive, needs_chromium

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--preset=toy", "--prompts-per-step=4", "--samples-per-prompt=4", "--eval-prompts=16"),
    *("--eval-every=2", "--no-report", "--steps=5"),
    "--max-new-tokens=6",  # some are cut off, and so of the wrong form
]
NASTY = 'a</script><img src=x onerror="throw 1"> & {{data}} <b>'


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(path, change):
    rows = [change(row) or row for row in rows_of(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """A run, and a copy of it whose last evaluation is made bad, and says so."""
    folder = tmp_path_factory.mktemp("runs")
    good, bad = folder / "good", folder / "bad"
    ssr.main([*SMALL, f"--model={toy}", f"--folder={good}"])
    shutil.copytree(good, bad)

    def worse(row):
        greedy = row["greedy"]
        if row["step"] == 0:  # the best one
            greedy["quality"] = [1.0] * 16
            greedy["exact_match"] = [1.0] * 16
        if row["step"] == 5:
            row["alarm"] = "the judge's score is high"
            greedy["text"][3] = NASTY
            greedy["quality"] = [1.0 if i < 3 else i / 100 for i in range(16)]
        for i in range(16):
            greedy["self"][i] = 0.9 if (row["step"], i) != (5, 4) else 0.0

    rewrite(bad / "evaluations.jsonl", worse)
    rewrite(
        bad / "metrics.jsonl",
        lambda r: (
            r | {"eval/alarm": float(r["step"] == 5), "eval/exact_match": float(r["step"] == 0)}
            if "eval/self" in r
            else r
        ),
    )
    return good, bad


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "both.html"
    report.main([f"fine={runs[0]}", f"hacked={runs[1]}", f"--out={out}"])
    return out


def data_in(page):
    text = page.read_text()
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*)</script>', text)[1]
    )


# ------------------------------------------------------------------------------- what is in it


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        for name, value in found.items():
            self.links += re.findall(r"url\(#([^)]+)\)", value or "")
            if name in ("href", "xlink:href", "src"):
                (self.links if value.startswith("#") else self.loads).append(value.lstrip("#"))


def test_the_page_is_one_file_that_loads_nothing(page):
    text = page.read_text()
    found = Reader(text)
    assert all(link.startswith("data:image/png") for link in found.loads) and found.loads
    assert len(set(found.ids)) == len(found.ids)
    assert set(found.links) <= set(found.ids)
    assert set(re.findall(r"\{\{\w+\}\}", text)) == {"{{data}}"}  # that is in a translation
    assert not re.search(r"#03\w\w03|#01010\w|#02020\w", text)  # every colour got its own
    assert "@import" not in text and "https://" not in text


def test_a_translation_cannot_become_a_part_of_the_page(page):
    assert "</script><img" not in page.read_text() and "<img" not in page.read_text()
    cells = [cell for row in data_in(page)["sentences"]["rows"] for cell in row["cells"]]
    assert NASTY in [cell["text"] for cell in cells]


def test_curves_are_the_runs_numbers(runs, page):
    rows = rows_of(runs[0] / "metrics.jsonl")
    series = data_in(page)["panels"]["entropy"]["series"]
    assert [line["of"] for line in series] == ["fine", "hacked"]
    assert series[0]["x"] == [1, 2, 3, 4, 5]
    assert series[0]["y"] == pytest.approx([r["policy/entropy"] for r in rows[1:]], abs=1e-5)
    held_out = data_in(page)["panels"]["held-out"]["series"]
    assert {line["name"] for line in held_out} == {"greedy", "sampled at T 1"}
    assert held_out[0]["x"] == [0, 2, 4, 5]
    wrong = data_in(page)["panels"]["unusable"]["series"]
    form = next(line for line in wrong if line["name"] == "wrong form")
    assert form["y"] == pytest.approx([1 - r["reward/format"] for r in rows[1:]], abs=1e-5)


def test_many_points_become_means_of_neighbours():
    assert report.thinned([0, 1, 2], [5.0, 6.0, 7.0], 3) == ([0, 1, 2], [5.0, 6.0, 7.0])
    assert report.thinned([0, 1, 2, 3, 4], [1.0, 3.0, 5.0, 7.0, 20.0], 3) == (
        [0.5, 2.5, 4],
        [2.0, 6.0, 20.0],
    )
    assert report.spread_out(list(range(10)), 4, {4, 9}) == [0, 3, 4, 6, 9]


def test_a_habit_is_found_without_a_reference():
    start = ["the cat.", "a dog.", "two birds.", "an owl."]
    later = ['"the cat."', '"a dog."', '"two birds"', "an owl."]
    spread = [f"{text} zobyl" for text in start]
    found = report.habits([start, later, spread])
    assert (
        found[0][0] == 0
        and found[1] in ((0.75, '"…'), (0.75, '…"'))
        and found[2] == (1.0, "… zobyl")
    )
    assert report.habits([]) == [] and report.habits([[""], [""]])[1][0] == 0


def test_the_best_step_is_that_of_best(runs):
    result = json.loads((runs[0] / "result.json").read_text())
    run = report.Run(runs[0], "a")
    assert run.best == result["best_step"] and run.step == 5
    assert run.at(5, "eval/self") == result["after"]["eval/self"]
    assert run.state() == "5 steps" and not run.running and not run.alarms


def test_an_alarm_shows_what_got_worse_while_its_score_held(runs):
    (alarm,) = report.alarms([report.Run(runs[1], "a")])
    assert (alarm["step"], alarm["best"], alarm["why"]) == (5, 0, "the judge's score is high")
    sources = rows_of(runs[1] / "evaluations.jsonl")[0]["source"]
    shown = [sources.index(example["source"]) for example in alarm["examples"]]
    assert shown == [3, 5, 6, 7, 8]  # the worst first; the judge saw what is wrong with number 4
    assert all(x["then"]["values"]["quality"] == 1.0 for x in alarm["examples"])


def test_the_page_says_first_what_to_know(runs, tmp_path):
    def verdict(folder):
        return report.verdict([report.Run(folder, "a")])

    good, bad = (report.Run(folder, "a") for folder in runs)
    numbers = [f"{good.at(step, 'eval/exact_match'):.3f}" for step in (0, 5)]
    assert f"5 steps: held-out exact_match {numbers[0]} → {numbers[1]}. " in verdict(runs[0])
    start = "No step was better than the start: keep the model the run began with"
    weights = f"Take best/, of step {good.best}" if good.best else start
    assert f"{weights}. No alarm." in verdict(runs[0])
    assert "Alarm at step 5: " in verdict(runs[1]) and "score is high)" in verdict(runs[1])
    assert f"{start}, not last/" in verdict(runs[1])
    bad.measured.append(bad.measured[-1] | {"step": 6, "eval/alarm": 0.0})
    assert "It does not ring any more." in report.verdict_of(bad)[1]
    for row in good.rows:
        row["groups/zero_variance"] = 1.0
    assert "nothing was learned" in report.verdict_of(good)[1]
    unmeasured = tmp_path / "unmeasured"
    shutil.copytree(runs[0], unmeasured)

    def forget(row):
        for kind in ("greedy", "sampled"):
            del row[kind]["quality"], row[kind]["exact_match"]

    rewrite(unmeasured / "evaluations.jsonl", forget)
    rewrite(
        unmeasured / "metrics.jsonl",
        lambda row: {k: v for k, v in row.items() if not re.search("match|quality|corr|alarm", k)},
    )
    assert "no alarm can ring" in verdict(unmeasured)
    report.main([str(unmeasured)])
    assert "held-out" not in data_in(unmeasured / "report.html")["panels"]
    rewrite(  # then best/ goes by the judge's score, where what has none counts 0: it is in the log
        unmeasured / "metrics.jsonl",
        lambda row: (
            row | {"eval/self": row["step"] / 9, "eval/best_by": float(row["step"] == 2)}
            if "eval/self" in row
            else row
        ),
    )
    assert report.Run(unmeasured, "a").best == 2


def test_an_alarm_is_compared_with_the_best_until_then(runs):
    run = report.Run(runs[1], "a")
    run.measured[-1]["eval/best_by"] = 2.0  # the last evaluation becomes the best of all
    run.evaluations[1]["alarm"] = "early"
    run.best = run.best_until(5)
    early, late = report.alarms([run])
    assert (early["step"], early["best"]) == (2, 0) and (late["step"], late["best"]) == (5, 5)


def test_the_overview_has_the_numbers_of_start_best_and_last(runs):
    run = report.Run(runs[1], "a")
    run.title = run.label = "a"
    run.about |= {"ranks": 8, "device": "NVIDIA H100"}
    for row, values in zip(
        run.measured, ((0.25, 0.5), (0.5, 0.6), (0.125, 0.7), (0.0, 0.9)), strict=True
    ):
        row |= {"eval/exact_match": values[0], "eval/self": values[1], "eval/best_by": values[0]}
    run.measured[-1]["eval/invalid"] = 0.5
    run.rows = [row | {"seconds/train": 90.0} for row in run.rows if row.get("seconds/train")][:5]
    for row in run.rows:
        for key in [k for k in row if k.startswith("seconds/") and k != "seconds/train"]:
            del row[key]
    run.best = run.best_until(5)
    cells = re.findall(r"<td>(.*?)</td>", report.overview([run], {"a": 0}))
    assert cells[3:6] == ["0.250", "0.500", "0.000"]
    assert cells[6:9] == ["0.500", "0.600", "0.900 (50% no score)"]
    assert cells[9] == "2" and ">1<" in cells[10]
    assert cells[11:] == ["7 min 30 s", "1 GPU hours"]


def test_where_time_went_is_said_of_the_whole_run(runs):
    run = report.Run(runs[0], "a")
    run.rows = [
        {"step": 1, "seconds/train": 3.0, "seconds/judge": 1.0, "per_second/train": 10.0},
        {"step": 2, "seconds/train": 3.0, "seconds/judge": 1.0, "per_second/train": 30.0},
        {"step": 3, "seconds/train": 0.0, "seconds/judge": None, "per_second/train": 90.0},
    ]
    text = report.stages([run], {"a": 0})
    assert "train 75%, 30 tokens/s" in text and "judge 25%<" in text
    assert text.index("train 75%") < text.index("judge 25%")


def drawings(monkeypatch, wanted="plot"):
    """What is drawn, instead of how it looks."""
    found = []
    from matplotlib.axes import Axes

    real = getattr(Axes, wanted)

    def draw(self, *args, **more):
        found.append((args, more, self))
        return real(self, *args, **more)

    monkeypatch.setattr(Axes, wanted, draw)
    return found


def test_rings_stand_where_the_alarm_rang(runs, monkeypatch):
    drawn = drawings(monkeypatch)
    run = report.Run(runs[1], "a")
    monkeypatch.setattr(report, "POINTS", 1)  # however few points the curve has
    plt = report.pyplot()
    report.draw_panel(plt.subplots()[1], report.PANELS["held-out"], [run], {"a": 0}, 1)
    rings = [args for args, more, _ in drawn if more.get("mfc") == "none"]
    assert rings == [([5], [0.0], "o")]
    run.alarms = []
    drawn.clear()
    report.draw_panel(plt.subplots()[1], report.PANELS["held-out"], [run], {"a": 0}, 1)
    assert not [more for _, more, _ in drawn if more.get("mfc") == "none"]


def test_the_scatter_shows_samples_of_its_own_step(runs, monkeypatch):
    drawn = drawings(monkeypatch)
    run = report.Run(runs[1], "a")
    run.evaluations[-1]["sampled"]["self"] = [None] * 16
    report.scatter(report.pyplot(), run, 0, 0)
    (first, _, axes), (last, _, _) = drawn
    sampled = run.evaluations[0]["sampled"]
    assert list(first[0]) == sampled["quality"] and list(first[1]) == sampled["self"]
    assert list(last[0]) == []  # a judge that gave no score has no points, and no ghost of one
    assert axes.get_title() == f"step 0, r = {run.at(0, 'eval/judge_correlation'):.2f}"


def test_a_long_histogram_adds_neighbours_up(runs, monkeypatch):
    drawn = drawings(monkeypatch, "imshow")
    run = report.Run(runs[0], "a")
    run.rows = [{"step": i, "histogram/self": [i % 2, 3 - i % 2, *[0] * 18]} for i in range(400)]
    report.histogram(report.pyplot(), run, 0, 0)
    picture = drawn[0][0][0]
    assert len(picture) == 20 and len(picture[0]) == 200
    shares = [picture[b][7][3] ** (1 / 0.6) for b in (0, 1)]
    assert shares[0] / shares[1] == pytest.approx(1 / 5)


def test_only_so_many_letters_go_into_a_page(runs, monkeypatch):
    run = report.Run(runs[0], "a")
    everything = report.sentences([run], {"a": 0})
    monkeypatch.setattr(report, "LETTERS", 1500)
    some = report.sentences([run], {"a": 0})
    assert 0 < len(some["rows"]) < len(everything["rows"]) == some["all"]


def test_names_are_each_their_own(runs, tmp_path):
    """Also with = or $ in a folder's name, and with two folders of one name."""
    odd = tmp_path / "lr=2e-4 $x" / "good"
    shutil.copytree(runs[0], odd)
    out = tmp_path / "out.html"
    report.main([str(odd), str(runs[0]), f"mine={runs[1]}", f"--out={out}"])
    text = out.read_text()
    titles = re.findall(r'<i class="dot run\d"></i>(.*?)</td>', text)
    assert titles == [str(odd), str(runs[0]), "mine"]
    report.main([f"a={runs[0]}", f"a={runs[1]}", f"--out={out}"])
    titles = re.findall(r'<i class="dot run\d"></i>(.*?)</td>', out.read_text())
    assert titles == ["a: good", "a: bad"] and data_in(out)["labels"] == ["a"]
    with pytest.raises(ValueError, match=r"no settings\.json; inside are .*/good"):
        report.main([str(odd.parent)])


def test_several_runs_say_where_they_differ(runs, toy, tmp_path):
    other = tmp_path / "other"
    ssr.main([*SMALL, f"--model={toy}", f"--folder={other}", "--lr=1e-4", "--steps=1"])
    text = report.settings_html([report.Run(folder, "a") for folder in (runs[0], other)])
    differing = re.findall(r'<tr class="differs"><th>(\w+)</th>', text)
    assert {"lr", "steps", "folder"} <= set(differing) and "seed" not in differing


# ----------------------------------------------------------------------- the players of R-Zero


@pytest.fixture
def players(tmp_path):
    """Two iterations of a game, of 2 steps of the Challenger and 4 of the Solver."""
    settings = {"steps": 200, "samples_per_prompt": 8, "lr": 4e-4, "iterations": 2}
    settings |= {"challenger_steps": 2, "challenger_samples": 4, "challenger_lr": 3e-4}
    settings |= {"solver_steps": 4, "solver_samples": 5, "folder": "runs/game"}
    common = {"reward/format": 1.0, "judge/invalid": 0.0, "groups/zero_variance": 0.25,
              "policy/entropy": 0.5, "policy/kl": 0.01, "length/mean": 7.0, "length/max": 9,
              "train/grad_norm": 0.3, "policy/sampler_gap": 1e-7, "tokens_per_second": 900.0,
              "seconds/judge": 3.0, "seconds/train": 1.0}  # fmt: skip
    asked = [
        {"step": n, "reward/total": 0.5 - n / 20, "reward/agreement": 0.5 + n / 10,
         "reward/repetition": 0.01, "questions/different": 1 - n / 100, "questions/depth": 2.0 + n,
         "histogram/agreement": [0] * 18 + [3, n]} for n in range(1, 5)
    ]  # fmt: skip
    solved = [
        {"step": n, "reward/total": 0.5, "reward/label": 0.5, "histogram/label": [4] + [0] * 19}
        for n in range(1, 9)
    ]
    for n, kept, right in ((1, 20, 0.9), (5, 15, 0.6)):
        solved[n - 1] |= {"lessons/kept": kept, "lessons/label_accuracy": right}
    for n, greedy, sampled in ((4, 0.65, 0.5), (8, 0.7, 0.6)):
        solved[n - 1] |= {"eval/accuracy": greedy, "eval/sampled_accuracy": sampled}
    start = {"step": 0, "eval/accuracy": 0.66, "eval/sampled_accuracy": 0.4}
    for name, first, rows in (("challenger", {"step": 0}, asked), ("solver", start, solved)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
        rows = [first, *(common | row for row in rows)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    return [tmp_path / "challenger", tmp_path / "solver"]


def drawn_together(players, tmp_path):
    out = tmp_path / "players.html"
    report.main([*map(str, players), f"--out={out}"])
    return out


def test_both_players_are_on_one_page(players, tmp_path):
    out = drawn_together(players, tmp_path)
    assert "<title>R-Zero: game – SSR report" in out.read_text()
    panels = {
        name: {(line["of"], line["name"]): (line["x"], line["y"]) for line in panel["series"]}
        for name, panel in data_in(out)["panels"].items()
    }
    assert panels["held-out"] == {
        ("solver", "greedy"): ([0, 4, 8], [0.66, 0.65, 0.7]),
        ("solver", "sampled at T 1"): ([0, 4, 8], [0.4, 0.5, 0.6]),
    }
    assert panels["difficulty"] == {("challenger", "depth"): ([1, 2, 3, 4], [3, 4, 5, 6])}
    assert panels["agreement"]["challenger", "mean"][1] == [0.6, 0.7, 0.8, 0.9]
    assert panels["different"].keys() == {("challenger", "different"), ("challenger", "penalty")}
    assert panels["labels"] == {("solver", "right"): ([1, 5], [0.9, 0.6])}
    assert panels["lessons"] == {("solver", "kept"): ([1, 5], [20, 15])}
    for name in ("reward", "entropy", "kl", "groups", "length", "gradient", "gap", "rate"):
        assert {of for of, _ in panels[name]} == {"challenger", "solver"}, name
    assert not panels.keys() & {"judge", "correlation", "habit"}
    shown = re.findall('data-panel="([^"]+)"', out.read_text())
    assert shown[:3] == ["held-out", "difficulty", "agreement"] and {*shown} == panels.keys()


def test_a_players_verdict_is_what_it_came_to(players):
    challenger, solver = (report.Run(folder, folder.name) for folder in players)
    words = "4 steps: depth of questions 3.000 → 6.000, different ones 0.990 → 0.960, "
    words += "agreement 0.600 → 0.900. Weights: iteration-2/challenger."
    assert report.verdict_of(challenger) == ("good", words, "")
    words = "8 steps: held-out accuracy 0.660 → 0.700, sampled 0.400 → 0.600. "
    assert report.verdict_of(solver) == ("good", words + "Weights: iteration-2/solver.", "")
    solver.rows, solver.step = solver.rows[:6], 5
    kind, words, _ = report.verdict_of(solver)
    assert kind == "unsure" and words.startswith("Stopped at step 5 of 8: held-out accuracy 0.660")
    assert words.endswith("Weights: iteration-1/solver.")  # those of the turn that is whole
    for row in solver.rows:
        row["groups/zero_variance"] = 1.0
    assert report.verdict_of(solver)[1].endswith("Look at what could not be used.")
    for run in (challenger, solver):
        run.rows, run.measured, run.step = [], [], 0
        assert report.verdict_of(run)[1] == "Nothing has been measured yet."
        assert "<td>–</td>" in report.overview([run], {run.label: 0})


def test_players_have_no_best_and_no_alarm(players):
    runs = [report.Run(folder, folder.name) for folder in players]
    text = report.overview(runs, {"challenger": 0, "solver": 1})
    challenger, solver = (re.findall(r"<td>(.*?)</td>", row) for row in text.split("</tr>")[:2])
    assert challenger[1:9] == [
        *("4 steps", "depth of questions", "3.000", "–", "6.000", "0.990", "–", "0.960"),
    ]
    assert solver[2:9] == ["held-out accuracy", "0.660", "–", "0.700", "0.400", "–", "0.600"]
    assert challenger[9:11] == solver[9:11] == ["–", "cannot ring"]
    assert "reward 75%" in report.stages(runs, {"challenger": 0, "solver": 1})
    own = [[run.settings[x] for x in ("steps", "samples_per_prompt", "lr")] for run in runs]
    assert own == [[4, 4, 3e-4], [8, 5, 4e-4]]


def test_only_scores_that_differ_by_more_than_right_and_wrong_are_a_histogram(players, monkeypatch):
    drawn = drawings(monkeypatch, "imshow")
    challenger, solver = (report.Run(folder, folder.name) for folder in players)
    assert report.histogram(report.pyplot(), solver, 1, 1) == "" and not drawn
    assert "agreement" in report.histogram(report.pyplot(), challenger, 0, 0)
    assert drawn[0][0][0][18][0][3] == 1.0  # 3 of 4, the most


def test_a_page_of_one_kind_has_no_words_of_the_other(players, page, tmp_path):
    players = drawn_together(players, tmp_path).read_text()
    for text, own, others in (
        (
            players,
            "How hard are the questions?",
            "Can the judge judge?|by the judge|what the model",
        ),
        (page.read_text(), "Can the judge judge?", "How hard are|Each player|R-Zero|sampled</th>"),
    ):
        assert (
            own in text and not re.search(others, text) and not re.search("</?(ssr|rzero)>", text)
        )
    panels = report.panels_for([])
    assert all(panels[name] != report.PANELS[name] for name in report.OF_PLAYERS)


@needs_chromium
def test_what_players_do_not_keep_is_not_looked_for(players, tmp_path):
    script = """
    const links = [...page.document.querySelectorAll("nav a")].map((x) => x.getAttribute("href"));
    return { text: page.document.body.innerText, width: page.document.documentElement.scrollWidth,
      hidden: links.filter((x) => !page.document.querySelector(x).getClientRects().length) };
    """
    found = drive(drawn_together(players, tmp_path), tmp_path, script, 390)
    wrong = r"judge's|judgement|best/|translated|None rang|shown-groups|Sentences|sentences|NaN"
    assert not re.findall(wrong, found["text"]) and found["hidden"] == []
    assert found["width"] == 390 and "Right pseudo-labels" in found["text"]


# ------------------------------------------------------------------------------ while it is made


def test_a_run_that_goes_on_is_said_to(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    with open(run / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert report.Run(run, "a").running and report.Run(run, "a").state() == "at step 5 of 5"
        assert not report.Run(run, "a", ended=True).running  # who asks holds the lock
        report.main([str(run)])
    again = "reads itself again"
    assert data_in(run / "report.html")["running"] and again in (run / "report.html").read_text()
    report.main([str(run)])
    text = (run / "report.html").read_text()
    assert not data_in(run / "report.html")["running"] and again not in text


def test_a_run_whose_alarm_cannot_ring_is_never_said_to_have_been_quiet(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    rewrite(run / "metrics.jsonl", lambda row: {
        k: v for k, v in row.items() if not re.search("exact_match|quality|alarm|best_by", k)
    })  # fmt: skip
    (run / "evaluations.jsonl").unlink()
    report.main([str(run)])
    text = (run / "report.html").read_text()
    assert "no alarm can ring" in text and "<td>cannot ring</td>" in text
    assert "They cannot ring" in text and "None rang" not in text
    report.main([str(runs[0]), "--out", str(tmp_path / "quiet.html")])
    text = (tmp_path / "quiet.html").read_text()
    assert "None rang." in text and "<td>none</td>" in text and "cannot ring" not in text


def test_a_page_can_be_made_at_any_moment_of_a_run(runs, tmp_path):
    """Before the first row, with a row half-written, and with one evaluation."""
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ValueError, match=r"is not the folder of a run: it has no settings\.json"):
        report.Run(run, "a")
    shutil.copy(runs[0] / "settings.json", run)
    report.main([str(run)])
    for name in ("metrics.jsonl", "evaluations.jsonl", "groups.jsonl"):
        lines = (runs[0] / name).read_bytes().split(b"\n")
        (run / name).write_bytes(lines[0] + b"\n" + lines[1][:20])
    report.main([str(run)])
    page = data_in(run / "report.html")
    assert len(page["sentences"]["rows"]) == len(
        set(rows_of(runs[0] / "evaluations.jsonl")[0]["source"])
    )
    for broken in ('{"step', "[]", "{}"):
        (run / "metrics.jsonl").write_text('{"step": 0}\n' + broken + "\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON with a step"):
            report.Run(run, "a")
    (run / "settings.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"settings\.json is not one of a run"):
        report.Run(run, "a")


def test_a_page_is_there_whole_or_not_at_all(runs, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    report.main([str(runs[0]), f"--out={out}"])
    whole = out.read_text()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError, match=r"cannot write .*report\.html: No space"):
        report.main([str(runs[0]), f"--out={out}"])
    assert out.read_text() == whole and [x.name for x in tmp_path.iterdir()] == ["report.html"]


def test_it_needs_nothing_of_ours_but_its_page(runs, tmp_path):
    """A borrower, or a laptop without PyTorch, can look at runs."""
    for name in ("report.py", "report_page.html"):
        shutil.copy(ROOT / name, tmp_path)
    command = f"import report; report.main([{str(runs[0])!r}, '--out=x.html']); import sys; "
    command += "assert not {'torch', 'ssr', 'grpo'} & set(sys.modules)"
    import subprocess

    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "x.html").stat().st_size > 50_000


def test_a_picture_is_svg_for_light_and_dark(runs, tmp_path, capsys):
    out = tmp_path / "curve.svg"
    report.main([f"a={runs[0]}", f"b={runs[1]}", f"--svg={out}", "--panels=held-out,entropy"])
    root = ET.fromstring(out.read_text())
    assert root.tag.endswith("svg") and "prefers-color-scheme:dark" in out.read_text()
    words = [x.text for x in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Held-out quality", "Entropy", "a", "b", "step"} <= set(words)
    with pytest.raises(ValueError, match="--panels entropi is unknown; known: held-out, judge"):
        report.main([str(runs[0]), f"--svg={out}", "--panels=entropi"])


# ------------------------------------------------------------------------------- in a browser


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_it_looks_right_at_any_width(page, tmp_path, width, dark):
    script = """
    const root = page.document.documentElement;
    const shown = [...page.document.querySelectorAll("figure > svg")];
    return { inner: page.innerWidth, width: root.scrollWidth, svgs: shown.length,
      narrowest: Math.min(...shown.map((x) => x.getBoundingClientRect().width)),
      ink: page.getComputedStyle(page.document.body).color,
      text: page.getComputedStyle(page.document.querySelector("figure svg text")).fill };
    """
    found = drive(page, tmp_path, script, width, dark)
    assert found["inner"] == found["width"] == width  # nothing sticks out
    assert found["svgs"] >= 15 and found["narrowest"] > 300
    light = [int(x) > 128 for x in re.findall(r"\d+", found["ink"])[:3]]
    assert light == [dark] * 3
    assert found["text"] == found["ink"]  # curves are labelled in the page's own colour


@needs_chromium
def test_a_person_can_choose_runs_steps_and_sentences(page, tmp_path):
    script = """
    const all = (q) => [...page.document.querySelectorAll(q)];
    const seen = (x) => page.getComputedStyle(x).display !== "none";
    const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new page.Event("input")); };
    const found = {};
    found.runs = all("#runs label").map((x) => x.textContent.trim());
    found.lines = all("figure .run1").filter(seen).length;
    all("#runs input")[1].click();
    found.hidden = all("figure .run1").filter(seen).length;
    found.first = all("figure .run0").filter(seen).length;
    all("#runs input")[1].click();
    found.again = all("figure .run1").filter(seen).length;
    found.cells = all("#rows article:first-child .cell").length;
    const chips = all("#columns button");
    found.chips = chips.map((x) => x.textContent);
    chips.filter((x) => x.getAttribute("aria-pressed") === "true").forEach((x) => x.click());
    found.none = all("#rows .cell").length;
    chips.at(-1).click();
    set("search", "ONERROR");
    found.hits = all("#rows article").length;
    found.marked = all("#rows ins, #rows del").length;
    set("base", "none");
    found.plain = all("#rows ins, #rows del").length;
    found.text = all("#rows .cell .text")[0].textContent;
    set("search", "no such words");
    found.empty = $("rows").textContent;
    set("search", "");
    $("more").click();
    found.more = all("#rows article").length;
    set("order", "proud");
    found.proud = all("#rows article:first-child .words").map((x) => x.textContent).join();
    found.group = $("group").textContent;
    $("group-back").click();
    found.before = $("group").textContent;
    found.alarms = all("#alarm-list article").length;
    found.images = all("img").length;
    const svg = page.document.querySelector("[data-panel=entropy] > svg"), box = svg.getBoundingClientRect();
    svg.dispatchEvent(new page.PointerEvent("pointermove",
      { clientX: box.left + 0.9 * box.width, clientY: box.top + 50 }));
    found.read = page.document.querySelector("[data-panel=entropy] output").textContent;
    return found;
    """  # noqa: E501
    found = drive(page, tmp_path, script)
    assert found["runs"] == ["fine", "hacked"]
    assert found["hidden"] == 0 and found["lines"] == found["again"] > 10 < found["first"]
    assert found["chips"][0].startswith("fine 0") and found["chips"][-1] == "hacked 5 (alarm)"
    assert found["cells"] >= 4 and found["none"] == 0
    assert found["hits"] == 1 and found["text"] == NASTY
    assert found["marked"] > 0 and found["plain"] == 0 and found["images"] == 0
    assert found["empty"] == "no sentence has that" and found["more"] > 8
    assert "judge 0.90 · exact_match 0.00 · quality 0.03" in found["proud"]
    assert found["group"].startswith("step 5 of hacked") and found["before"].startswith(
        "step 4 of hacked"
    )
    assert found["alarms"] == 5
    assert re.match(r"step 5: fine policy [\d.]+ · hacked policy [\d.]+$", found["read"])


@needs_chromium
def test_differences_are_marked_word_by_word_and_letter_by_letter(runs, tmp_path):
    """Of Chinese single letters; of what is too long to compare, all between the same ends."""
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    long = [" ".join(f"{word}{i}" for i in range(2500)) for word in ("old", "new")]
    pairs = [
        ("the old cat sat", "the new cat sat down"),
        ("他在十号房间开会", "他在九号房间开会吗"),
        (f"same {long[0]} end", f"same {long[1]} end"),
        ("a", "a\n\n\n\n\nb"),
    ]

    def change(row):
        for i, (reference, text) in enumerate(pairs):
            if "reference" in row:
                row["source"][i], row["reference"][i] = f"text number {i}", reference
            row["greedy"]["text"][i] = reference if row["step"] == 0 else text
            row["greedy"]["quality"][i] = 1.0 if row["step"] == 0 else i / 10
        if row["step"] == 0:
            row["greedy"]["quality"][5] = 0.0

    rewrite(run / "evaluations.jsonl", change)
    report.main([str(run)])
    script = """
    const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new page.Event("input")); };
    const marks = (tag, cell) => [...cell.querySelectorAll(tag)].map((x) => x.textContent);
    const cells = () => [...page.document.querySelectorAll("#rows article")].map((x) => x.querySelectorAll(".cell"));
    const found = {};
    set("base", "reference");
    set("search", "text number");
    found.marks = cells().map((x) => [marks("del", x[x.length - 1]), marks("ins", x[x.length - 1])]);
    found.first = cells().map((x) => x[0].querySelectorAll("ins, del").length);
    found.gap = cells()[3][1].querySelector(".text").textContent;
    set("base", "before");
    found.before = cells().map((x) => marks("ins", x[x.length - 1]).length);
    set("search", "");
    set("order", "fell");
    found.fell = page.document.querySelector("#rows article .text").textContent;
    set("order", "rose");
    found.rose = page.document.querySelector("#rows article .text").textContent;
    return found;
    """  # noqa: E501
    found = drive(run / "report.html", tmp_path, script)
    assert found["marks"][0] == [["old"], ["new", " down"]]
    assert found["marks"][1] == [["十"], ["九", "吗"]]
    assert found["marks"][2] == [[long[0]], [long[1]]]
    assert found["first"] == [0, 0, 0, 0] and min(found["before"]) > 0
    assert "⏎×5" in found["gap"]
    assert found["fell"] == "text number 0" and found["rose"] != "text number 0"
