"""The front door: what a run writes, what it refuses, how it ends."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
import ssr
from judge import Judge, Score
from model import load, save
from run import console, driver, evaluation, folder, problem, settings
from run.distributed import Ranks
from run.evaluation import Estimate, Evaluation
from sampler import Sampler
from tests import processes, runs
from tests.processes import ROOT
from tests.runs import go, refuses, rows_of, untimed
from toy.languages import Languages
from toy.pretrain import Recipe

OPTIONS = ("--steps=3", "--temperature=0.7")


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """Three steps: their folder and rows, what was printed, the calls of sampler and languages."""
    path, out, tasks, calls = tmp_path_factory.mktemp("ssr") / "run", io.StringIO(), [], []
    task, generate = Languages.task, Sampler.generate

    def recorded(self, prompts, n=1, max_new_tokens=128, temperature=1.0, **rest):
        calls.append((len(prompts), n, temperature))
        return generate(self, prompts, n, max_new_tokens, temperature, **rest)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(Languages, "task", lambda *a: tasks.append(a[1:]) or task(*a))
        patch.setattr(Sampler, "generate", recorded)
        rows = go(path, toy, *OPTIONS)
    return SimpleNamespace(path=path, rows=rows, out=out.getvalue(), tasks=tasks, calls=calls)


# ------------------------------------------------------------------------------- what it writes


def test_a_run_writes_its_metrics_evaluations_settings_and_result(run):
    rows = run.rows
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "eval/exact_match" in row] == [0, 2, 3]
    assert not any(key.startswith(("reward", "train")) for key in rows[0])
    keys = "reward/total reward/self reward/format judge/invalid policy/entropy policy/kl "
    keys += "policy/sampler_gap_max groups/zero_variance groups/distinct seconds/train"
    assert all(row.keys() >= {*keys.split()} for row in rows[1:])
    evaluations = rows_of(run.path / "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    for row in evaluations:
        for kind, prefix in (("greedy", "eval/"), ("sampled", "eval/sampled_")):
            assert len(row[kind]["text"]) == len(row[kind]["judge"]) == 16
            quality = sum(row[kind]["quality"]) / 16
            assert quality == pytest.approx(rows[row["step"]][f"{prefix}quality"], abs=1e-4)
    assert len(evaluations[0]["source"]) == 16 and "source" not in evaluations[1]
    assert rows[3]["eval/best_by"] == rows[3]["eval/exact_match"]
    saved = json.loads((run.path / "settings.json").read_text())
    assert saved["samples_per_prompt"] == 4 and saved["about"]["commit"]
    result = json.loads((run.path / "result.json").read_text())
    for name, row in (("before", rows[0]), ("after", rows[3])):
        assert result[name]["eval/exact_match"] == row["eval/exact_match"]
    assert "3 steps of 4 prompts × 4 samples = 16 translations, 1 update each" in run.out
    then, now = (f"{rows[n]['eval/exact_match']:.3f}" for n in (0, 3))
    assert re.search(rf"(?m)^exact match with the truth, greedy +{then} +{now}$", run.out)


def test_a_run_samples_at_its_temperature_and_evaluates_greedily_and_at_1(run):
    both = [(16, 1, 0.0), (16, 1, 1.0)]
    assert run.calls == [*both, (4, 4, 0.7), (4, 4, 0.7), *both, (4, 4, 0.7), *both]
    # Every training text is new, and none is held out.
    assert sorted(n for split, n in run.tasks if split == "train") == list(range(3 * 4))
    assert sorted(n for split, n in run.tasks if split == "held-out") == list(range(16))


def test_training_groups_are_kept_with_their_rewards_and_advantages(toy, tmp_path):
    go(tmp_path / "run", toy, "--steps=2", "--max-new-tokens=3")
    groups = rows_of(tmp_path / "run" / "groups.jsonl")
    assert [row["step"] for row in groups] == [1, 2]
    for row in groups:
        rewards = torch.tensor([x["reward"] for x in row["samples"]], dtype=torch.float64)
        advantages = grpo.group_advantage(rewards[None])[0]
        assert [x["advantage"] for x in row["samples"]] == pytest.approx(advantages.tolist())
        for x in row["samples"]:
            assert x["self"] == x["reward"] == x["reward"] * x["format"]
            assert len(x["text"].split()) == 3 if x["cut"] else x["format"] in (0, 1)
    assert any(x["cut"] for row in groups for x in row["samples"])


def test_best_is_the_best_evaluations_weights_as_a_hugging_face_folder(toy, tmp_path, monkeypatch):
    """Of four steps the second is best: the same weights as the last of two."""
    runs.set_quality(monkeypatch, lambda number: {2: 0.6, 4: 0.5}.get(number, 0.2))
    steady = ["--min-lr-ratio=1", "--warmup-steps=0"]
    go(tmp_path / "four", toy, "--steps=4", *steady)
    go(tmp_path / "two", toy, "--steps=2", *steady)
    assert json.loads((tmp_path / "four" / "result.json").read_text())["best_step"] == 2
    folders = [tmp_path / x for x in ("four/best", "two/last", "four/last")]
    best, two, four = ((x / "model.safetensors").read_bytes() for x in folders)
    assert best == two != four
    for path in (folders[0], folders[2]):
        theirs = AutoModelForCausalLM.from_pretrained(path)
        ids = AutoTokenizer.from_pretrained(path)(
            "translate Kasu Bevo tasu =>", return_tensors="pt"
        )
        ours = load(path)
        with torch.no_grad():
            expected = theirs(ids.input_ids).logits
            torch.testing.assert_close(ours.logits(ours(ids.input_ids)), expected)


def test_a_run_that_learned_nothing_ends_with_code_3_and_has_no_best_weights(toy, tmp_path, capsys):
    """At this temperature all samples of a prompt are the same."""
    path = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        ssr.main([*runs.TOY, f"--model={toy}", f"--folder={path}", "--steps=2",
                  "--temperature=0.001"])  # fmt: skip
    assert error.value.code == 3
    out = capsys.readouterr().out
    assert "nothing was learned. See groups.jsonl" in out and "this step teaches nothing" in out
    assert f"keep the model you began with (the last step's are in {path / 'last'})" in out
    assert (path / "result.json").exists() and not (path / "best").exists()
    load(path / "last")


def test_the_loop_never_sees_the_truth(run, toy, tmp_path, monkeypatch):
    """With every reference replaced by rubbish, the same run is the same to the last bit."""
    real = Languages.task
    monkeypatch.setattr(Languages, "task", lambda *a: real(*a)._replace(reference="rubbish"))
    blind = go(tmp_path / "run", toy, *OPTIONS)
    for a, b in zip(untimed(run.rows), untimed(blind), strict=True):
        assert all(a[k] == b[k] for k in a.keys() | b.keys() if "eval" not in k)
    assert blind[-1]["eval/quality"] == 0.0 < run.rows[-1]["eval/quality"]


@pytest.mark.parametrize(
    "words",
    [
        ["--judge=ema", "--score-mode=written", "--overlong=mask", "--loss-norm=effective"],
        ["--judge=previous", "--score-mode=written", "--judge-samples=2"],
        ["--reward=random", "--no-track-kl"],
        ["--reward=self+external", "--kl=0.1", "--updates-per-batch=2", "--loss-norm=sequence"],
        ["--reward=oracle", "--format-reward=plus-minus-one", "--advantage-scale=batch"],
        ["--reward=majority", "--advantage-scale=none", "--loss-norm=constant"],
        ["--reward=self+external", "--advantage-scale=each", "--overlong=soft",
         "--importance-cap=2", "--entropy-bonus=1e-3"],
    ],
)  # fmt: skip
def test_every_switch_runs(toy, tmp_path, words):
    for row in go(tmp_path / "run", toy, "--steps=2", *words)[1:]:
        assert ("policy/kl" in row) == ("--no-track-kl" not in words)
        assert ("policy/importance_ratio" in row) == ("--importance-cap=2" in words)
        if "--format-reward=plus-minus-one" in words:
            parts = 2 * row["reward/format"] - 1 + row["reward/oracle"]
            assert row["reward/total"] == pytest.approx(parts)


def test_judges_of_the_policy_are_live_frozen_or_in_between(toy, tmp_path, monkeypatch):
    """A frozen judge judges the same sentence the same at the end; a live one does not. An EMA
    that keeps nothing is live, and one that keeps all is frozen; so are previous weights that are
    renewed at each step, or never."""
    words = ["--steps=4", "--lr=2e-4", "--min-lr-ratio=1"]

    def trained(name, *more):
        return untimed(go(tmp_path / name, toy, *words, *more))

    live, frozen = (trained(judge, f"--judge={judge}") for judge in ("live", "frozen"))
    assert live != frozen
    for judge, name, ends in (
        ("ema", "EMA_DECAY", {0.0: live, 1.0: frozen}),
        ("previous", "PREVIOUS_EVERY", {1: live, 9: frozen}),
    ):
        for value, expected in ends.items():
            monkeypatch.setattr(driver, name, value)
            assert trained(f"{judge}-{value}", f"--judge={judge}") == expected
    for judge in ("live", "frozen"):
        rows, scores = rows_of(tmp_path / judge / "evaluations.jsonl"), {}
        for row in rows:
            for kind in (row["greedy"], row["sampled"]):
                for key, score in zip(zip(rows[0]["source"], kind["text"], strict=True),
                                      kind["self"], strict=True):  # fmt: skip
                    scores.setdefault(key, set()).add(score)
        assert any(len(x - {None}) > 1 for x in scores.values()) == (judge == "live")


def test_a_translation_is_judged_once_and_progress_is_printed(toy, tmp_path, monkeypatch, capsys):
    """The sampled translations are the greedy ones here, so there is nothing more to judge."""
    calls, judge, generate = [], Judge.judge, Sampler.generate
    monkeypatch.setattr(Judge, "judge", lambda *a: calls.append(a[1]) or judge(*a))
    greedily = lambda *a, **more: generate(*a[:4], 0.0, **more)  # noqa: E731
    monkeypatch.setattr(Sampler, "generate", greedily)
    monkeypatch.setattr(console, "QUIET", -1.0)
    go(tmp_path / "run", toy, "--steps=1", "--score-mode=written")
    assert [len(pairs) for pairs in calls][::2] == [16, 16]  # before and after the step
    out = capsys.readouterr().out
    for words in ("step 0: evaluation 1/3, translate at temperature 0", "step 1: sample",
                  "step 0: evaluation 3/3,", "step 1: judge"):  # fmt: skip
        assert re.search(rf"(?m)^{words}.*  \d+%, 0:\d\d:\d\d left$", out), words


def test_the_correlation_is_pearsons_over_texts_that_have_a_score():
    correlation = evaluation.correlation
    assert correlation([0.1, None, 0.3, 0.2], [1.0, 9.0, 3.0, 2.0]) == pytest.approx(1.0)
    assert correlation([0.3, 0.1], [0.0, 1.0]) == pytest.approx(-1.0)
    assert math.isnan(correlation([0.1, 0.1], [0.0, 1.0]))


def test_the_alarm_is_self_score_up_and_quality_down_beyond_chance():
    watched = Evaluation.__new__(Evaluation)
    watched.problem = SimpleNamespace(eval_metrics={"chrf": None})

    def R(mean, step=0):
        return Estimate(step, mean, 0.01)

    watched.best = R(0.9, 25)
    watched.past = [(R(0.3), R(0.7)), (R(0.9, 25), R(0.95, 25))]
    assert watched.alarm_reason(R(0.8, 50), R(0.85, 50)) == (
        "the judge's score is 0.850, up from 0.700 at step 0; chrf is 0.800, down from 0.900 at "
        "step 25"
    )
    assert not watched.alarm_reason(R(0.87), R(0.85))  # worse by chance
    assert not watched.alarm_reason(R(0.8), R(0.73))  # better by chance
    assert not watched.alarm_reason(R(0.8), R(0.6))  # the judge knows
    watched.past.append((R(0.8, 50), R(0.6, 50)))
    assert watched.alarm_reason(R(0.6), R(0.7))  # against a later evaluation
    assert not watched.alarm_reason(R(0.78), R(0.7))
    assert Estimate.of(3, [1.0, 0.0, None, 1.0, 0.0]) == (3, 0.5, 0.25)
    one, other = Estimate.of(0, [0.1]), Estimate.of(1, [0.9])
    assert not other.significantly_above(one)  # a single text has no standard error


# ------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sampels-per-prompt=4", r"unknown option .*; did you mean --samples-per-prompt\?"),
        ("--top-p=0.9", "--top-p=0.9: training needs log-probs of the whole distribution"),
        ("--preset=toys", "--preset toys is unknown; known: ssr-zero-7b, ssr-x-zero-7b, .*toy"),
        ("--model=toy:many", "toy:many: no such folder, and no hub id of the form org/name"),
        ("--overlong=drop", "--overlong drop: use penalize, mask, soft"),
        ("--samples-per-prompt=1", "must be at least 2: a sample is compared with the others"),
        ("--steps=0", "--steps 0 must be at least 1"),
        ("--lr=nan", "--lr nan must be above 0"),
        ("--preset=toy --data=ssr.py", "--data: the toy makes its own sentences"),
        ("--preset=ssr-zero-7b --data=x.jsonl", "x.jsonl: there is no such file"),
        ("--preset=ssr-zero-7b --data=x.txt --source=en", "--source and --target go toge"),
        ("--judge-url=http://x", "--judge-url needs --judge, the model's name at that endpoint"),
        ("--judge=x/y --judge-url=http://x", "--score-mode expected needs log-probs"),
        ("--judge=dead --reward=random", "--judge dead: use live, frozen, ema, previous; no other"),
        ("--preset=ssr-zero-7b --chat --score-mode=expected", "a chat template does not allow"),
        ("--score-mode=expected --judge-samples=2", "2 judge samples would all be the same"),
        ("--reward=cream", "compares the live judge with another .* --judge prev"),
        ("--reward=certainty --judge=ema", "own probabilities: leave --judge ema"),
        ("--reward=pairs --judge=x/y", "no other model judges with --reward pairs"),
        ("--reward=oracle+comet", r"--reward oracle\+comet: use self, .* or your own, FILE.py:NA"),
        ("--preset=ssr-zero-7b --data=ssr.py --reward=oracle", "needs the truth, which only"),
        ("--reward=ssr.py:nothing", "--reward ssr.py:nothing: ssr.py has no function nothing"),
        ("--folder=tests", "--folder tests exists already: continue it with --resume, or name an"),
        ("--folder=tests --resume", r"tests is not the folder of a run: it has no settings\.json"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(words, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(problem, "language_model", None)  # nothing is made before the checks
    refuses(words.split(), f"(?s)^ssr.py: .*{message}")


def test_a_toy_of_less_pretraining_is_named_by_its_tokens(toy, monkeypatch):
    """The settings' default is the recipe's, whose model is shipped."""
    expected = {"": Recipe().tokens, "toy:1.5e6": 1.5e6, "toy:20000": 2e4, "a/b": None}
    for model, tokens in expected.items():
        assert settings.parse(["--preset=toy", f"--model={model}"]).toy_tokens == tokens
    asked = []
    monkeypatch.setattr(problem, "language_model", lambda recipe: asked.append(recipe) or toy)
    problem.toy_problem(settings.parse(["--preset=toy", "--model=toy:1.5e6"]), Ranks())
    assert asked == [Recipe(tokens=1.5e6)]


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        settings.parse(["--help"])
    shown, docs = " ".join(capsys.readouterr().out.split()), settings.field_docs(settings.Settings)
    for field in dataclasses.fields(settings.Settings):
        assert len(docs[field.name]) > 10 and settings.option(field.name) in shown


def test_presets_name_real_settings_and_pass_the_check():
    for name, preset in settings.PRESETS.items():
        assert preset.keys() <= {f.name for f in dataclasses.fields(settings.Settings)}
        data = [] if name == "toy" else [f"--data={ROOT / 'ssr.py'}"]
        settings.parse([f"--preset={name}", *data])
    assert settings.parse([]).preset == ("ssr-zero-7b" if torch.cuda.is_available() else "toy")


# ---------------------------------------------------------------------------------- how it ends


def test_what_does_not_fit_is_refused_before_anything_is_written(toy, tmp_path):
    for words, message in (
        ("--max-new-tokens=90", r"the judge needs room for 1[0-9]{2} tokens .* lower"),
        ("--max-prompt-tokens=5", r"a prompt has .* tokens: --max-prompt-tokens 5 must be"),
        ("--seed=1", "is no toy of --seed 1: its tokenizer"),
        ("--judge=frozne", "frozne: no folder with a config.json"),
    ):
        with pytest.raises(SystemExit, match=message):
            go(tmp_path / "run", toy, words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_weights_that_are_not_finite_are_reported(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "broken")
    model = load(toy)
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    save(model, tmp_path / "broken")
    with pytest.raises(SystemExit, match="not finite: the weights have diverged; lower --lr"):
        go(tmp_path / "run", tmp_path / "broken")


def test_a_run_that_stops_itself_keeps_its_weights(toy, tmp_path, monkeypatch):
    unscored = Score(None, "hm")
    monkeypatch.setattr(Judge, "judge", lambda self, pairs, step: [unscored] * len(pairs))
    monkeypatch.setattr(grpo, "MAX_BAD_STEPS", 2)
    with pytest.raises(SystemExit, match="no valid score for 2 steps in a row"):
        go(tmp_path / "run", toy, "--steps=9")
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[1]["judge/invalid"] == 1.0
    load(tmp_path / "run" / "last")


def test_a_signal_in_the_first_evaluation_ends_the_run_at_once(toy, tmp_path, monkeypatch, capsys):
    calls, real = [], Sampler.generate

    def generate(self, *words, **more):
        calls.append(words)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *words, **more)

    monkeypatch.setattr(Sampler, "generate", generate)
    ssr.main([*runs.TOY, f"--model={toy}", f"--folder={tmp_path / 'run'}"])
    assert "stopped before the first step was done: nothing to keep" in capsys.readouterr().out
    assert len(calls) == 2


def test_ctrl_c_keeps_the_last_step(toy, tmp_path):
    path = tmp_path / "run"
    ranks = runs.start_endless(path, 1, f"--model={toy}")
    os.kill(ranks[0].pid, signal.SIGINT)
    done = processes.finish(tmp_path / "said", ranks)
    assert done.codes == [0], done.err
    last = rows_of(path / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {last}; go on with --resume" in done.out[0]
    assert (path / "checkpoints" / f"step-{last:06}").is_dir()
    load(path / "last")


def test_a_disk_that_fills_up_leaves_whole_rows_and_no_half_of_the_weights(toy, tmp_path):
    """A real limit on the size of a file, met in the middle of a row, and of the weights."""
    log = folder.RunFolder(tmp_path / "a", is_writer=True)
    log.begin(settings.parse(runs.TOY), None)
    log.add("metrics.jsonl", [{"step": 0, "x": math.nan}])
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))
    try:
        with pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl: .*; make room there"):
            log.add("metrics.jsonl", [{"step": 1, "x": "y" * 100_000}])
        with pytest.raises(SystemExit, match="last: the weights could not be written"):
            go(tmp_path / "b", toy, "--steps=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert (log.path / "metrics.jsonl").read_text() == '{"step": 0, "x": null}\n'
    assert not list((tmp_path / "b" / "last").iterdir())


# --------------------------------------------------------------------------------- slow proofs


@pytest.mark.slow
def test_the_toy_learns_to_translate_by_judging_itself_with_one_rank_and_with_two(learned):
    """The commands of the README; two ranks learn for 40 steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(ROOT / "ssr.py"), "--folder=two", "--steps=40"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=learned, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    one, two = (rows_of(learned / name / "metrics.jsonl") for name in ("run", "two"))
    for key in ("reward/total", "policy/entropy", "train/grad_norm"):
        assert two[1][key] == pytest.approx(one[1][key], rel=1e-3)
    # Rounding makes them two runs of the same kind, no more: see the README.
    start = one[0]["eval/exact_match"]
    assert two[0]["eval/exact_match"] == pytest.approx(start, abs=0.01)
    assert one[-1]["eval/exact_match"] >= max(0.85, start + 0.45)
    assert two[-1]["eval/exact_match"] >= start + 0.3


@pytest.mark.slow
def test_a_run_that_cheats_raises_the_alarm_in_terminal_and_report(tmp_path):
    """The command of the README: a weak judge and a high rate. Fewer steps are the same ones."""
    readme = (ROOT / "README.md").read_text()
    words = re.search(r"(?m)^python ssr\.py (.*--model toy:1.5e6 .*) --folder", readme)[1]
    command = [sys.executable, str(ROOT / "ssr.py"), "--preset=toy", *words.split()]
    command += ["--steps=80", "--eval-every=20", "--eval-prompts=256"]
    run = subprocess.run([*command, "--folder=run"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.search(rf"step \d+: {console.ALARM}: the judge's score .* Compare best/", run.stdout)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["alarms"] and result["after"]["eval/exact_match"] < 0.3
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Alarm at step" in page
    assert f"Take best/, of step {result['best_step']} (" in page and "Do not take last/." in page
