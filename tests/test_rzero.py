"""R-Zero from end to end: what a run writes, how it is stopped and goes on, what it refuses."""

import dataclasses
import gc
import json
import math
import os
import re
import shutil
import signal
import time
import weakref
from random import Random

import pytest
import torch

import eval.rows
import rzero
from challenge import Player
from checkpoint import fingerprint
from games import Translation
from judge import Task
from ranks import Ranks, Stopping
from tests import processes
from toy.programs import Programs, is_held_out

SMALL = [
    *("--prompts-per-step=4", "--challenger-samples=3", "--challenger-steps=3", "--solver-steps=4"),
    *("--solver-samples=4", "--questions=48", "--answers=4", "--iterations=2", "--eval-prompts=8"),
    *("--eval-every=2", "--save-every=2", "--no-report", "--slots=64", "--lr=0.003", "--band=0.5"),
    "--max-new-tokens=12",
]


def player(folder, game=None, **changes):
    s = dataclasses.replace(rzero.parse([]), answers=4, **changes)
    return Player(folder, s, game or Programs(0), torch.device("cpu"))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(path):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows_of(path)]


def letters_alone(monkeypatch=None):
    """An answer is its first letter. So young a model's are rarely the same otherwise, and nobody
    would learn."""
    real = Programs.text_answer
    set_ = monkeypatch.setattr if monkeypatch else setattr
    set_(Programs, "text_answer", lambda *a: (real(*a) or "")[:1] or None)


def all_are_sentences():
    """So young a writer's hardly ever are."""
    Translation.question = lambda self, text, request: request._replace(text=text) if text else None
    Translation.least = lambda *_: -math.inf


def train(rank, words, at=None, after=0.0, sig=signal.SIGTERM):
    """A run in a process of its own, which gets a signal so many seconds after `at` is printed."""
    letters_alone()
    all_are_sentences()
    rounds = rzero.in_rounds
    rzero.in_rounds = lambda *a, size: rounds(*a, size=32)  # else all questions are one
    eval.rows.FEW = 0  # each round has its line
    if at:
        put_signal(at, after, sig)
    rzero.main(words)


def put_signal(at: str, after: float, sig) -> None:
    import builtins
    import threading

    real, pid = builtins.print, os.getpid()

    def told(*what, **more):
        real(*what, **more)
        if " ".join(map(str, what)).startswith(at) and not begun:
            begun.append(threading.Timer(after, os.kill, (pid, sig)))
            begun[0].daemon = True
            begun[0].start()

    begun: list = []
    builtins.print = told


def go(folder, model, *words, size=1, code=0, **more):
    words = [*SMALL, f"--model={model}", f"--folder={folder}", *words]
    said = folder.parent / f"{folder.name}-said"
    done = processes.run(said, size, train, words, *more.values())
    assert done.codes == [code] * size, (done.err, done.out)
    return done


def run_here(folder, model, *words):
    rzero.main([*SMALL, f"--model={model}", f"--folder={folder}", *words])


WEIGHTS = [f"iteration-{i}/{x}/model.safetensors" for i in (1, 2) for x in ("challenger", "solver")]


def assert_same_run(a, b):
    """To the last bit, but for the time."""
    for name in ("challenger", "solver"):
        assert untimed(a / name / "metrics.jsonl") == untimed(b / name / "metrics.jsonl")
    files = [*WEIGHTS, "iteration-1/questions.jsonl", "iteration-2/questions.jsonl", "result.json"]
    for name in files:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(programs, tmp_path_factory):
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    go(folder, programs)
    return folder


# ------------------------------------------------------------------------------ what it writes


def test_a_run_writes_what_it_says(whole):
    challenger, solver = (rows_of(whole / x / "metrics.jsonl") for x in ("challenger", "solver"))
    assert [row["step"] for row in challenger] == list(range(7))  # 3 and 3: they go on
    assert [row["step"] for row in solver] == list(range(9))
    for name in ("reward/total", "reward/agreement", "reward/repetition", "questions/depth"):
        assert all(name in row for row in challenger[1:])
    assert [row["step"] for row in solver if "eval/accuracy" in row] == [0, 2, 4, 6, 8]
    assert [row["step"] for row in solver if "lessons/kept" in row] == [1, 5]
    assert any(row["train/grad_norm"] > 0 for row in solver[1:5])
    assert any(row["train/grad_norm"] > 0 for row in challenger[1:4])
    weights = {(whole / name).read_bytes() for name in WEIGHTS}
    assert len(weights) == 4
    for i in (1, 2):
        (header, *rows) = rows_of(whole / f"iteration-{i}" / "questions.jsonl")
        assert [row["segment"] for row in rows] == list(range(48)) and len(header["of"]) > 5
        assert all((row["question"] is None) == (row["label"] is None) for row in rows)
        shares = {row["agreement"] for row in rows} - {None}
        assert shares <= {0, 0.25, 0.5, 0.75, 1} and len(shares) > 1
    result = json.loads((whole / "result.json").read_text())
    evaluated = [solver[k]["eval/accuracy"] for k in (0, 4, 8)]
    assert result["eval/accuracy"] == evaluated
    assert result["lessons/kept"] == [None, *(solver[k]["lessons/kept"] for k in (1, 5))]
    assert not list(whole.glob("iteration-*/*.checkpoints"))
    assert not list(whole.rglob("*.partial")) and not (whole / "report.html").exists()


@pytest.mark.parametrize("band", [0.25, 0.5])
def test_the_band_decides_what_is_learned_from(whole, programs, tmp_path, monkeypatch, band):
    """And that it is not measured with."""
    letters_alone(monkeypatch)
    rows = [r for r in rows_of(whole / "iteration-1" / "questions.jsonl")[1:] if r["question"]]
    there = {row["question"]: row["agreement"] for row in rows}
    fair = sum(abs(p - 0.5) <= band and not is_held_out(q) for q, p in there.items())
    run_here(tmp_path / "run", programs, f"--band={band}", "--iterations=1", "--solver-steps=1")
    kept = rows_of(tmp_path / "run" / "solver" / "metrics.jsonl")[1]["lessons/kept"]
    assert kept == fair < len(there) and any(map(is_held_out, there))


def test_the_same_seed_plays_the_same_and_another_does_not(whole, programs, tmp_path, monkeypatch):
    letters_alone(monkeypatch)
    run_here(tmp_path / "again", programs)
    assert_same_run(whole, tmp_path / "again")
    run_here(tmp_path / "other", programs, "--seed=1", "--iterations=1")
    file = "iteration-1/questions.jsonl"
    assert (whole / file).read_bytes() != (tmp_path / "other" / file).read_bytes()


def test_the_players_learn_in_turn_each_from_its_own_weights(whole, programs):
    """Who asks and who answers when questions are written, and who is frozen meanwhile."""
    for i in (1, 2):
        of = rows_of(whole / f"iteration-{i}" / "questions.jsonl")[0]["of"]["weights"]
        before = whole / "iteration-1" / "solver" if i == 2 else programs
        assert of == [fingerprint(whole / f"iteration-{i}" / "challenger"), fingerprint(before)]


def test_truth_reaches_the_log_alone(whole, programs, tmp_path, monkeypatch):
    """With an interpreter that lies about everything that is not held out, all learn the same."""
    letters_alone(monkeypatch)
    monkeypatch.setattr(Programs, "truth", lambda self, text: "a a a")
    run_here(tmp_path / "lied", programs)
    for name in WEIGHTS:
        assert (whole / name).read_bytes() == (tmp_path / "lied" / name).read_bytes()


@pytest.mark.parametrize("name", ["released", "percentile", "random"])
def test_every_challenge_runs(programs, tmp_path, monkeypatch, name):
    letters_alone(monkeypatch)
    words = ["--iterations=1", "--challenger-steps=1", "--solver-steps=1", f"--challenge={name}"]
    run_here(tmp_path / "run", programs, *words)
    row = rows_of(tmp_path / "run" / "challenger" / "metrics.jsonl")[1]
    assert math.isfinite(row["reward/total"]) and row["train/grad_norm"] > 0


@pytest.mark.slow
def test_translation_runs_and_goes_on(writer, tmp_path):
    """Stopped while questions are written: those read back are the same as new ones."""
    words = ["--preset=toy-translation", "--iterations=1", "--real=200", "--challenger-steps=1",
             "--solver-steps=2", "--questions=48", "--max-new-tokens=20"]  # fmt: skip
    go(tmp_path / "whole", writer, *words)
    rows = rows_of(tmp_path / "whole" / "iteration-1" / "questions.jsonl")
    questions = [row["question"] for row in rows[1:] if row["question"]]
    assert len(questions) > 1 and isinstance(questions[0], list)
    go(tmp_path / "run", writer, *words, at="iteration 1, questions: 32", after=0)
    assert not (tmp_path / "run" / "result.json").exists()
    go(tmp_path / "run", writer, *words, "--resume")
    for name in ("challenger", "solver"):
        file = f"iteration-1/{name}/model.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_question_that_was_read_back_is_the_same_as_one_that_is_new(programs, tmp_path):
    run = rzero.Run.__new__(rzero.Run)
    run.s, run.iteration, run.ranks = rzero.parse([*SMALL, "--questions=2"]), 1, Ranks()
    run.path, run.game = tmp_path, type("Game", (), {"folder": programs})
    task = Task("a b", "Kasu", "Bevo")
    row = {"agreement": 0.5, "label": ""}
    made = [{"segment": 0, "question": list(task)} | row, {"segment": 1, "question": task} | row]
    folder = tmp_path / "iteration-1" / "challenger"
    shutil.copytree(programs, folder)
    real = rzero.in_rounds
    try:
        rzero.in_rounds = lambda *_, size: made
        assert [row["segment"] for row in run.questions()] == [0]
    finally:
        rzero.in_rounds = real


# ------------------------------------------------------------------------- stopped and continued


@pytest.mark.parametrize(
    ("at", "after"),
    [
        pytest.param("iteration 1, challenger   1/3", 0.0, marks=pytest.mark.slow),
        ("iteration 1, questions: 32", 0.0),
        pytest.param("iteration 1, solver       3/4", 0.0, marks=pytest.mark.slow),
        pytest.param("iteration 1: of 48", 0.02, marks=pytest.mark.slow),
        pytest.param("iteration 2, challenger   3/3", 0.005, marks=pytest.mark.slow),
        pytest.param("iteration 2, solver       4/4", 0.0, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_ends_where_it_would_have_ended(
    whole, programs, tmp_path, at, after
):
    done = go(tmp_path / "run", programs, at=at, after=after)
    assert "stopped; go on with --resume" in done.out[0]
    assert not (tmp_path / "run" / "result.json").exists()
    done = go(tmp_path / "run", programs, "--resume")
    if at.startswith("iteration 1, "):  # what was done is not done again
        assert at not in done.out[0]
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 9))]
)
def test_a_run_that_was_killed_again_and_again_ends_where_it_would_have_ended(
    whole, programs, tmp_path, seed
):
    """At random moments, by either signal; a kill may cut what is being written."""
    rng, folder = Random(seed), tmp_path / "run"
    words = [*SMALL, f"--model={programs}", f"--folder={folder}"]
    for number in range(8):
        again = ["--resume"] if folder.exists() else []
        said = tmp_path / f"said-{number}"
        running = processes.start(said, 1, train, [*words, *again])
        if number < 4:
            limit = rng.uniform(0.05, 1.0)
            while not (folder / "settings.json").exists() and running[0].is_alive():
                time.sleep(0.005)
            time.sleep(limit)
            sig = rng.choice([signal.SIGTERM, signal.SIGKILL])
            if running[0].is_alive():
                os.kill(running[0].pid, sig)
        while running[0].is_alive():
            time.sleep(0.01)
        if (folder / "result.json").exists():
            break
        codes = (0, -signal.SIGTERM, -signal.SIGKILL)  # it may not have looked out for it yet
        assert running[0].exitcode in codes, (said / "err-0").read_text()
    assert_same_run(whole, folder)


class Interrupted(Ranks):
    """A signal reaches it in the middle of the n-th piece of work of that name."""

    def __init__(self, what, number):
        super().__init__()
        self.what, self.number = what, number

    def share(self, what, items, work):
        def cut(items):
            found = work(items)
            self.number -= what == self.what
            if what == self.what and self.number == 0:
                raise Stopping
            return found

        return super().share(what, items, cut)


@pytest.mark.parametrize(
    ("what", "number"),
    [("measure", 3), ("keep", 2), ("write iteration 1, questions", 1)]
    + [
        pytest.param(*at, marks=pytest.mark.slow)
        for at in (("measure", 1), ("measure", 6), ("keep", 1), ("save", 1), ("begin", 1),
                   ("sample", 2), ("reference", 6), ("end", 1), ("look for checkpoints", 2))
    ],
)  # fmt: skip
def test_a_stop_in_the_middle_of_any_work_is_made_good(
    whole, programs, tmp_path, monkeypatch, what, number
):
    """While it measures the weights are a step ahead of the log: they must not be kept as those of
    the step before."""
    letters_alone(monkeypatch)
    place = rzero.place

    def interrupted(s):
        device, _ = place(s)
        return device, Interrupted(what, number)

    monkeypatch.setattr(rzero, "place", interrupted)
    run_here(tmp_path / "run", programs)
    assert not (tmp_path / "run" / "result.json").exists() or what == "end"
    monkeypatch.setattr(rzero, "place", place)
    run_here(tmp_path / "run", programs, "--resume")
    assert_same_run(whole, tmp_path / "run")


def test_a_run_that_was_killed_before_all_its_folders_were_made_goes_on(
    whole, programs, tmp_path, monkeypatch
):
    letters_alone(monkeypatch)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copyfile(whole / "settings.json", run / "settings.json")
    run_here(run, programs, "--resume")
    assert_same_run(whole, run)


def test_what_is_done_is_not_done_again_and_more_iterations_can_follow(
    whole, programs, tmp_path, monkeypatch, capsys
):
    letters_alone(monkeypatch)
    run_here(tmp_path / "run", programs, "--iterations=1")
    assert "1." in capsys.readouterr().out
    run_here(tmp_path / "run", programs, "--resume", "--iterations=2")
    out = capsys.readouterr().out
    assert "iteration 1" not in out and "iteration 2, solver" in out
    assert_same_run(whole, tmp_path / "run")
    run_here(tmp_path / "run", programs, "--resume")  # nothing is left to do
    out = capsys.readouterr().out
    assert "iteration 2, " not in out and "eval/accuracy" in out
    assert_same_run(whole, tmp_path / "run")


def test_a_players_model_is_gone_after_its_turn(programs, tmp_path, monkeypatch):
    letters_alone(monkeypatch)
    alive, load = [], rzero.load

    def counted(*args, **more):
        gc.collect()
        model = load(*args, **more)
        assert sum(one() is not None for one in alive) == 0, "the model of the turn before"
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(rzero, "load", counted)
    run_here(tmp_path / "run", programs)
    assert len(alive) == 4


# ------------------------------------------------------------------------------------ two ranks


def test_two_ranks_begin_as_one_does(whole, programs, tmp_path):
    words = ["--iterations=1", "--prompts-per-step=1", "--patience=600"]  # one has no prompt
    go(tmp_path / "one", programs, *words)
    go(tmp_path / "two", programs, *words, size=2)
    one, two = (rows_of(tmp_path / x / "challenger" / "metrics.jsonl") for x in ("one", "two"))
    assert [row["step"] for row in two] == [0, 1, 2, 3]
    for key in ("reward/total", "reward/agreement", "reward/repetition", "length/mean"):
        assert one[1][key] == pytest.approx(two[1][key], abs=1e-6), key
    weights = [(tmp_path / x / WEIGHTS[1]).stat().st_size for x in ("one", "two")]
    assert weights[0] == weights[1]
    assert (tmp_path / "two" / "result.json").exists()


@pytest.mark.slow
def test_two_ranks_stopped_go_on(programs, tmp_path):
    words = ["--patience=600"]
    go(tmp_path / "whole", programs, *words, size=2)
    go(tmp_path / "run", programs, *words, size=2, at="iteration 1, solver       2/4", after=0.0)
    assert not (tmp_path / "run" / "result.json").exists()
    go(tmp_path / "run", programs, *words, "--resume", size=2)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# ----------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--challange=paper"], "unknown option --challange=paper; did you mean --challenge"),
        (["--challenge=best"], "--challenge best: use paper, released, percentile, random"),
        (["--game=chess"], "--game chess: use programs, mathematics, translation"),
        (["--preset=large"], "--preset large is unknown; known: toy, toy-translation, r-zero-4b"),
        (["--steps=3"], "--steps=3: each player has its own: --challenger-steps, --"),
        (["--samples-per-prompt=3"], "--samples-per-prompt=3: each player has its own"),
        (["--band=0.6"], "--band 0.6 must lie in 0 … 0.5"),
        (["--top-p=0"], "--top-p 0.0 must be above 0 and at most 1"),
        (["--answers=1"], "--answers 1 must be at least 2"),
        (["--repetition=-1"], "--repetition -1.0 must not be negative"),
        (["--micro-batch-tokens=10"], "--micro-batch-tokens 10"),
        (["--likeness=bleu"], "--likeness bleu: use chrf, score"),
        (["--iterations=0"], "--iterations 0 must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        rzero.parse(words)


def test_help_lists_no_option_that_is_refused(capsys):
    with pytest.raises(SystemExit):
        rzero.parse(["--help"])
    listed = re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.M)
    assert "--solver-steps" in listed and not {"--steps", "--samples-per-prompt"} & {*listed}


def test_another_run_is_not_written_over_nor_contradicted(whole):
    with pytest.raises(ValueError, match="exists already: --resume, or name another"):
        rzero.parse([f"--folder={whole}"])
    for words in ("--band=0.1", "--game=translation", "--seed=4", "--answers=5"):
        with pytest.raises(ValueError, match=f"{words.split('=')[0]} was .* and is "):
            rzero.parse([f"--folder={whole}", "--resume", words])
    s = rzero.parse([f"--folder={whole}", "--resume", "--slots=4", "--iterations=5"])
    assert (s.slots, s.iterations, s.questions, s.band) == (4, 5, 48, 0.5)


def test_a_band_that_keeps_nothing_says_what_to_do(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(Programs, "text_answer", lambda *_: None)  # nobody can answer
    with pytest.raises(SystemExit, match=r"no question within --band 0.25 .* a wider --band"):
        run_here(tmp_path / "run", programs, "--band=0.25", "--challenger-steps=1")


def test_a_challenger_that_writes_no_question_ends_the_run_in_words(
    programs, tmp_path, monkeypatch
):
    monkeypatch.setattr(Programs, "question", lambda *_: None)
    with pytest.raises(SystemExit, match="no question within --band"):
        run_here(tmp_path / "run", programs, "--challenger-steps=1")


def test_a_solver_that_cannot_answer_can_be_gone_on_with(programs, tmp_path, monkeypatch):
    """All shares are 0, with --band 0.5 all are kept: their label is no answer, nobody gets it."""
    monkeypatch.setattr(Programs, "text_answer", lambda *_: None)
    run_here(tmp_path / "run", programs, "--challenger-steps=1", "--iterations=1")
    rows = rows_of(tmp_path / "run" / "solver" / "metrics.jsonl")
    assert all(row["reward/total"] == 0 == row["train/grad_norm"] for row in rows[1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--game=mathematics"], "--game mathematics needs a --model"),
        (["--game=mathematics", "--model=MODEL", "--held-out=no.jsonl"], r"no\.jsonl"),
        (["--model=nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_what_is_missing_is_named(programs, tmp_path, words, message):
    words = [word.replace("MODEL", str(programs)) for word in words]
    with pytest.raises(SystemExit, match=message):
        rzero.main([f"--folder={tmp_path / 'run'}", *words])
    assert not (tmp_path / "run").exists()
