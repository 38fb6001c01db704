"""R-Zero end to end: what a run writes, how it is stopped and continued, what it refuses."""

import gc
import json
import math
import os
import shutil
import signal
import time
import weakref
from random import Random

import pytest
import torch

from run import driver
from run.checkpoint import fingerprint
from run.distributed import Ranks, Stopping
from rzero import selfplay
from rzero.challenger import ChallengerReward, Player
from rzero.games import Mathematics
from tests import processes
from tests.tiny import make_pupil, make_tokenizer
from toy.programs import Programs, is_held_out

SMALL = [
    *("--prompts-per-step=4", "--challenger-samples=3", "--challenger-steps=3", "--solver-steps=4"),
    *("--solver-samples=4", "--questions=48", "--answers=4", "--iterations=2", "--eval-prompts=8"),
    *("--save-every=2", "--max-num-seqs=64", "--lr=0.003", "--band=0-1"),
    "--max-new-tokens=12",
]
TEXT_ANSWER = Programs.text_answer
WEIGHTS = [f"iteration-{i}/{x}/model.safetensors" for i in (1, 2) for x in ("challenger", "solver")]
slow = pytest.mark.slow


def make_player(folder, *words):
    s = selfplay.parse(["--answers=4", *words])
    return Player(folder, s, Programs(0, folder=folder), torch.device("cpu"))


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_untimed(path):
    return [{k: v for k, v in row.items() if "second" not in k} for row in read_rows(path)]


def first_letter(*args):
    """The answers of so young a model rarely agree otherwise, and nobody would learn."""
    return (TEXT_ANSWER(*args) or "")[:1] or None


def change(patch):
    patch.setattr(Programs, "text_answer", first_letter)


@pytest.fixture(autouse=True)
def changes(monkeypatch):
    change(monkeypatch)


def play(folder, model, *words):
    selfplay.main([*SMALL, f"--model={model}", f"--folder={folder}", *words])


def play_in_process(rank, words):
    change(pytest.MonkeyPatch())
    selfplay.main(words)


def assert_same_run(a, b):
    """Bit for bit, except for times."""
    for name in selfplay.PLAYERS:
        assert read_untimed(a / name / "metrics.jsonl") == read_untimed(b / name / "metrics.jsonl")
    for name in (*WEIGHTS, *(f"iteration-{i}/questions.jsonl" for i in (1, 2)), "result.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(programs, tmp_path_factory):
    """A run that was not stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        play(folder, programs)
    return folder


# ------------------------------------------------------------------------------ what it writes


def test_run_writes_metrics_questions_weights_and_result(whole, programs):
    challenger, solver = (read_rows(whole / x / "metrics.jsonl") for x in selfplay.PLAYERS)
    assert [row["step"] for row in challenger] == list(range(1, 7))  # 3 and 3: they count on
    assert [row["step"] for row in solver] == list(range(9))
    for name in ("reward/total", "reward/agreement", "reward/repetition", "questions/depth"):
        assert all(name in row for row in challenger)
    assert [row["step"] for row in solver if "eval/accuracy" in row] == [0, 4, 8]
    assert [row["step"] for row in solver if "lessons/kept" in row] == [1, 5]
    assert any(row["train/grad_norm"] > 0 for row in solver[1:5])
    assert any(row["train/grad_norm"] > 0 for row in challenger[:3])
    assert len({(whole / name).read_bytes() for name in WEIGHTS}) == 4
    for i, old_solver in ((1, programs), (2, whole / "iteration-1" / "solver")):
        header, *rows = read_rows(whole / f"iteration-{i}" / "questions.jsonl")
        writers = whole / f"iteration-{i}" / "challenger", old_solver
        assert header["of"]["weights"] == [fingerprint(folder) for folder in writers]
        assert [row["segment"] for row in rows] == list(range(48))
        assert all((row["question"] is None) == (row["label"] is None) for row in rows)
        shares = {row["agreement"] for row in rows} - {None}
        assert shares <= {0, 0.25, 0.5, 0.75, 1} and len(shares) > 1
    result = json.loads((whole / "result.json").read_text())
    assert result["eval/accuracy"] == [solver[k]["eval/accuracy"] for k in (0, 4, 8)]
    assert result["lessons/kept"] == [None, *(solver[k]["lessons/kept"] for k in (1, 5))]
    assert not [*whole.glob("iteration-*/*.checkpoints"), *whole.rglob("*.partial")]


@pytest.mark.parametrize(("low", "high"), [(0.25, 0.75), (0.25, 0.25)])
def test_solver_learns_from_distinct_questions_in_the_band_that_are_not_held_out(
    whole, programs, tmp_path, capsys, low, high
):
    rows = read_rows(whole / "iteration-1" / "questions.jsonl")[1:]
    shares = {row["question"]: row["agreement"] for row in rows if row["question"]}
    kept = sum(low <= p <= high and not is_held_out(q) for q, p in shares.items())
    band = f"--band={low}-{high}"
    play(tmp_path / "run", programs, band, "--iterations=1", "--solver-steps=1")
    assert read_rows(tmp_path / "run/solver/metrics.jsonl")[1]["lessons/kept"] == kept
    assert f"of 48 questions {len(shares)} different ones, {kept} to" in capsys.readouterr().out
    assert any(map(is_held_out, shares)) and len(set(shares.values())) > 2


def test_truth_does_not_reach_training(whole, programs, tmp_path, monkeypatch):
    """An interpreter that lies, and the same seed: the same weights. With another seed others."""
    monkeypatch.setattr(Programs, "truth", lambda self, text: "a a a")
    play(tmp_path / "lied", programs, "--iterations=1")
    for name in WEIGHTS[:2]:
        assert (whole / name).read_bytes() == (tmp_path / "lied" / name).read_bytes()
    play(tmp_path / "other", programs, "--seed=1", "--iterations=1", "--solver-steps=1")
    assert (whole / WEIGHTS[0]).read_bytes() != (tmp_path / "other" / WEIGHTS[0]).read_bytes()


def test_released_challenge_runs_and_the_report_is_drawn(programs, tmp_path, monkeypatch):
    sizes, finish = [], ChallengerReward.finish
    monkeypatch.setattr(
        ChallengerReward, "finish", lambda self, x: sizes.append(len(x)) or finish(self, x)
    )
    words = ["--iterations=1", "--challenger-steps=1", "--solver-steps=1", "--challenge=released"]
    play(tmp_path / "run", programs, *words, "--challenger-prompts=2")
    assert sizes == [2]  # and the Solver's batch stays
    solver = read_rows(tmp_path / "run" / "solver" / "metrics.jsonl")[1]
    assert sum(solver["histogram/label"]) <= 16 < 2 * sum(solver["histogram/label"])
    row = read_rows(tmp_path / "run" / "challenger" / "metrics.jsonl")[0]
    assert math.isfinite(row["reward/total"]) and row["train/grad_norm"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "run/challenger" in page and "run/solver" in page


@slow
def test_maths_is_played_in_a_chat_template(tmp_path):
    """By a model that has heard problems and solutions in the turns that it is asked in."""
    model, file = tmp_path / "model", tmp_path / "held-out.jsonl"
    model.mkdir()
    make_tokenizer(model)
    game, lessons = Mathematics(model), []
    for n in range(1, 9):
        question = f"What is {n} + {n}?"
        prompts = game.codec.encode([game.challenger_prompt, game.solver_prompt(question)])
        asking, solving = map(game.codec.decode, prompts)
        text = f"<question>{question}</question>\n\\boxed{{{2 * n}}}<|im_end|>"
        lessons += [(asking, text), (solving, f"It is \\boxed{{{2 * n}}}.<|im_end|>")]
    make_pupil(model, lessons, steps=90)
    file.write_text('{"question": "What is 4 + 4?", "answer": "8.0"}\n')
    words = ["--preset=r-zero-4b-script", f"--held-out={file}", "--challenger-prompts=3"]
    words += [*SMALL[1:], "--iterations=1", "--max-new-tokens=64", "--lr=1e-4"]
    play(tmp_path / "run", model, *words)
    rows = read_rows(tmp_path / "run" / "iteration-1" / "questions.jsonl")[1:]
    asked = [row for row in rows if row["question"]]
    assert len(asked) > 12 and all("What is" in row["question"] for row in asked[:3])
    assert sum(row["agreement"] > 0.5 for row in asked) > 3
    challenger, solver = (
        read_rows(tmp_path / "run" / x / "metrics.jsonl") for x in selfplay.PLAYERS
    )
    assert challenger[0]["reward/format"] > 0.3 and solver[1]["reward/format"] > 0.3
    assert solver[-1]["eval/sampled_accuracy"] >= 0 and solver[1]["lessons/words"] > 2


# ------------------------------------------------------------------------- stopped and continued


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=slow) for i in range(1, 3))])
def test_run_killed_at_random_moments_continues_to_the_same_end(whole, programs, tmp_path, seed):
    rng, folder = Random(seed), tmp_path / "run"
    words = [*SMALL, f"--model={programs}", f"--folder={folder}"]
    for number in range(8):
        output = tmp_path / f"output-{number}"
        resume = ["--resume"] if folder.exists() else []
        [process] = processes.start(output, 1, play_in_process, [*words, *resume])
        if number < 3:
            while not (folder / "settings.json").exists() and process.is_alive():
                time.sleep(0.005)
            time.sleep(rng.uniform(0.05, 1.0))
            if process.is_alive():
                os.kill(process.pid, rng.choice([signal.SIGTERM, signal.SIGKILL]))
        process.join()
        if (folder / "result.json").exists():
            break
        codes = (0, -signal.SIGTERM, -signal.SIGKILL)  # the handler may not have been set yet
        assert process.exitcode in codes, (output / "err-0").read_text()
    assert_same_run(whole, folder)


class Interrupted(Ranks):
    """Stopped in the middle of the n-th piece of work of that name."""

    def __init__(self, what, number):
        super().__init__()
        self.what, self.number = what, number

    def map_over_ranks(self, what, items, work):
        def cut(items):
            results = work(items)
            self.number -= what == self.what
            if what == self.what and self.number == 0:
                raise Stopping
            return results

        return super().map_over_ranks(what, items, cut)


@pytest.mark.parametrize(
    ("what", "number"),
    [("measure", 3), ("keep", 2), ("write iteration 1, questions", 2), ("sample", 3)]
    + [
        pytest.param(*at, marks=slow)
        for at in (("measure", 6), ("save", 1), ("look for checkpoints", 2))
    ],
)
def test_run_stopped_in_the_middle_of_any_work_continues_to_the_same_end(
    whole, programs, tmp_path, monkeypatch, what, number
):
    """While it measures, the weights are a step ahead of the log."""
    with monkeypatch.context() as patch:
        begin = (torch.device("cpu"), Interrupted(what, number))
        patch.setattr(driver, "init_device_and_ranks", lambda s: begin)
        play(tmp_path / "run", programs)
    assert not (tmp_path / "run" / "result.json").exists()
    play(tmp_path / "run", programs, "--resume")
    assert_same_run(whole, tmp_path / "run")


def test_finished_iterations_are_not_repeated_and_more_can_follow(
    whole, programs, tmp_path, capsys
):
    run = tmp_path / "run"  # killed when only the first of its folders was made
    run.mkdir()
    shutil.copyfile(whole / "settings.json", run / "settings.json")
    play(run, programs, "--resume", "--iterations=1")
    capsys.readouterr()
    play(run, programs, "--resume", "--iterations=2")
    out = capsys.readouterr().out
    assert "iteration 1" not in out and "iteration 2, solver" in out
    assert_same_run(whole, run)
    play(run, programs, "--resume")
    out = capsys.readouterr().out
    assert "iteration 2, " not in out and "eval/accuracy" in out
    assert_same_run(whole, run)


def test_a_players_model_is_freed_after_its_turn(programs, tmp_path, monkeypatch):
    models, build_policy = [], driver.build_policy

    def build(*args):
        gc.collect()
        assert not any(model() for model in models), "the model of the turn before"
        policy = build_policy(*args)
        models.append(weakref.ref(policy.model))
        return policy

    monkeypatch.setattr(driver, "build_policy", build)
    play(tmp_path / "run", programs, "--iterations=1", "--challenger-steps=1", "--solver-steps=1")
    assert len(models) == 2


# ------------------------------------------------------------------------------------ two ranks


def test_two_ranks_begin_as_one_does(programs, tmp_path):
    words = ["--iterations=1", "--challenger-steps=1", "--solver-steps=1"]
    words += ["--prompts-per-step=1"]  # one rank has no prompt
    play(tmp_path / "one", programs, *words)
    words = [*SMALL, f"--model={programs}", f"--folder={tmp_path / 'two'}", *words]
    done = processes.run(tmp_path / "output", 2, play_in_process, words)
    assert done.codes == [0, 0], (done.err, done.out)
    one, two = (read_rows(tmp_path / x / "challenger" / "metrics.jsonl") for x in ("one", "two"))
    assert [row["step"] for row in two] == [1]
    for key in ("reward/total", "reward/agreement", "reward/repetition", "length/mean"):
        assert one[0][key] == pytest.approx(two[0][key], abs=1e-6), key
    sizes = [(tmp_path / x / WEIGHTS[1]).stat().st_size for x in ("one", "two")]
    assert sizes[0] == sizes[1]
    assert (tmp_path / "two" / "result.json").exists()


# ------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--challange=paper"], "unknown option --challange=paper; did you mean --challenge"),
        (["--challenge=best"], "--challenge best: use paper, released, random"),
        (["--steps=3"], "--steps=3: each player has its own: --challenger-steps, --"),
        (["--band=0.6"], "--band 0.6 must be the lowest and the highest agreement, such as"),
        (["--band=0.8-0.3"], "--band 0.8-0.3 must be the lowest and the highest agreement"),
        (["--band=0.3-1.8"], "--band 0.3-1.8 must be the lowest and the highest agreement"),
        (["--challenger-prompts=-1"], "--challenger-prompts -1 must not be negative"),
        (["--answers=1"], "--answers 1 must be at least 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        selfplay.parse(words)


def test_presets_have_the_papers_numbers_and_the_scripts():
    paper, script = (selfplay.parse([f"--preset={x}"]) for x in ("r-zero-4b", "r-zero-4b-script"))
    assert (paper.challenger_prompts, paper.challenger_steps, paper.band) == (128, 5, "0.25-0.75")
    assert (script.challenger_prompts, script.challenger_steps) == (16, 160)  # 5 x 512 questions
    assert (script.prompts_per_step, script.solver_steps) == (128, 60)  # 15 x 512
    assert (script.challenge, script.band, script.lr) == ("released", "0.3-0.8", paper.lr)
    given = ["--preset=r-zero-4b-script", "--challenger-prompts=32", "--challenger-lr=1e-5"]
    s = selfplay.parse(given)
    assert (s.challenger_prompts, s.challenger_lr, script.challenger_lr) == (32, 1e-5, 1e-6)


def test_resume_accepts_settings_that_change_no_result_and_refuses_others(whole, tmp_path):
    with pytest.raises(ValueError, match="exists already: continue it with --resume"):
        selfplay.parse([f"--folder={whole}"])
    with pytest.raises(ValueError, match="--folder tests is not the folder of a run"):
        selfplay.parse(["--folder=tests", "--resume"])
    (tmp_path / "settings.json").write_text(json.dumps({"preset": "toy", "reward": "self"}))
    with pytest.raises(ValueError, match="is no run of R-Zero"):
        selfplay.parse([f"--folder={tmp_path}", "--resume"])
    for words in ("--band=0-0.9", "--preset=r-zero-4b", "--seed=4", "--answers=5"):
        with pytest.raises(ValueError, match=words.split("=")[0]):
            selfplay.parse([f"--folder={whole}", "--resume", words])
    words = ["--max-num-seqs=4", "--iterations=5", "--offload-optimizer"]
    s = selfplay.parse([f"--folder={whole}", "--resume", *words])
    assert (s.max_num_seqs, s.iterations, s.questions, s.band) == (4, 5, 48, "0-1")


@pytest.mark.parametrize("method", ["text_answer", "parse_question"])
def test_run_without_a_question_in_the_band_says_what_to_do(
    programs, tmp_path, monkeypatch, method
):
    monkeypatch.setattr(Programs, method, lambda *_: None)
    with pytest.raises(SystemExit, match=r"in --band 0.25-0.75 is left .* a wider --band"):
        play(tmp_path / "run", programs, "--band=0.25-0.75", "--challenger-steps=1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset=r-zero-4b", "--model=MODEL", "--held-out=no.jsonl"], r"no\.jsonl"),
        (["--model=nowhere/at-all"], "nowhere/at-all"),
        (["--max-prompt-tokens=5", "--model=MODEL"], "-tokens 5: the Challenger's prompt or a hel"),
        (["--preset=r-zero-4b", "--max-prompt-tokens=5", "--model=MODEL"], "-tokens 5: the Chal"),
    ],
)
def test_missing_inputs_are_named_before_anything_is_written(programs, tmp_path, words, message):
    words = [word.replace("MODEL", str(programs)) for word in words]
    with pytest.raises(SystemExit, match=message):
        selfplay.main([f"--folder={tmp_path / 'run'}", *words])
    assert not (tmp_path / "run").exists()
