"""The front door: what a run writes, what it refuses, how it ends."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import problem
import show
import ssr
import watch
from judge import TOY, Judge, Score, Texts
from model import load, save
from sampler import Sampler
from toy.languages import Languages
from toy.pretrain import Recipe, make

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--preset=toy", "--prompts-per-step=4", "--samples-per-prompt=4", "--eval-prompts=16"),
    *("--eval-every=2", "--no-report"),
]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def go(folder, toy, *words):
    try:
        ssr.main([*SMALL, f"--model={toy}", f"--folder={folder}", *words])
    except SystemExit as error:
        if error.code != 3:  # nothing was learned: so short a run may do that
            raise
    return rows_of(folder / "metrics.jsonl")


def untimed(rows):
    return [{k: v for k, v in r.items() if "second" not in k} for r in rows]


# ------------------------------------------------------------------------------- what it writes


def test_a_run_leaves_what_the_readme_says(toy, tmp_path, capsys):
    run = tmp_path / "run"
    rows = go(run, toy, "--steps=3")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    evaluated = [row["step"] for row in rows if "eval/exact_match" in row]
    assert evaluated == [0, 2, 3]
    assert not any(key.startswith(("reward", "train")) for key in rows[0])
    for key in ("reward/total", "reward/self", "reward/format", "judge/invalid", "policy/entropy"):
        assert all(key in row for row in rows[1:])
    for key in ("policy/kl", "policy/sampler_gap_max", "groups/zero_variance", "groups/distinct"):
        assert all(key in row for row in rows[1:])
    for stage in ("sample", "judge", "reference", "train"):
        assert all(row[f"seconds/{stage}"] > 0 for row in rows[1:])
    evaluations = rows_of(run / "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    for row in evaluations:
        logged = rows[row["step"]]
        for kind, prefix in (("greedy", "eval/"), ("sampled", "eval/sampled_")):
            assert len(row[kind]["text"]) == len(row[kind]["judge"]) == 16
            quality = sum(row[kind]["quality"]) / 16
            assert quality == pytest.approx(logged[f"{prefix}quality"], abs=1e-4)
    assert len(evaluations[0]["source"]) == 16 and "source" not in evaluations[1]
    assert rows[3]["eval/best_by"] == rows[3]["eval/exact_match"]
    settings = json.loads((run / "settings.json").read_text())
    assert settings["samples_per_prompt"] == 4 and settings["about"]["commit"]
    result = json.loads((run / "result.json").read_text())
    assert result["before"]["eval/exact_match"] == rows[0]["eval/exact_match"]
    assert result["after"]["eval/exact_match"] == rows[3]["eval/exact_match"]
    out = capsys.readouterr().out
    assert "3 steps of 4 prompts × 4 samples = 16 translations, 1 update each" in out
    assert "before   after" in out and "SSR-Zero, preset toy (as asked)" in out


def test_training_groups_are_kept_with_what_they_were_worth(toy, tmp_path):
    """Two of each step's; what was cut off is shown to its last word."""
    run = tmp_path / "run"
    go(run, toy, "--steps=2", "--shown-groups=2", "--max-new-tokens=3")
    groups = rows_of(run / "groups.jsonl")
    assert [row["step"] for row in groups] == [1, 1, 2, 2]
    assert groups[0]["source"] != groups[1]["source"]
    for row in groups:
        rewards = torch.tensor([x["reward"] for x in row["samples"]], dtype=torch.float64)
        advantages = ssr.grpo.group_advantage(rewards[None])[0]
        assert [x["advantage"] for x in row["samples"]] == pytest.approx(advantages.tolist())
        for x in row["samples"]:
            assert x["self"] == x["reward"] == x["reward"] * x["format"]
            assert len(x["text"].split()) == 3 if x["cut"] else x["format"] in (0, 1)
    assert any(x["cut"] for row in groups for x in row["samples"])


def test_best_and_last_are_hugging_face_folders_with_the_tokenizer(toy, tmp_path, monkeypatch):
    above = watch.Evaluation.__call__
    monkeypatch.setattr(watch.Evaluation, "__call__", lambda *a: (*above(*a)[:2], True))
    run = tmp_path / "run"
    go(run, toy, "--steps=2")
    text = "translate Kasu Bevo tasu =>"
    for name in ("best", "last"):
        theirs = AutoModelForCausalLM.from_pretrained(run / name)
        ids = AutoTokenizer.from_pretrained(run / name)(text, return_tensors="pt").input_ids
        ours = load(run / name)
        with torch.no_grad():
            torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits)
    before, after = load(toy), load(run / "last")
    assert not torch.equal(before.head_weight, after.head_weight)


def test_the_best_weights_are_those_of_the_best_evaluation(toy, tmp_path, monkeypatch):
    """Of four steps the second is best: the same weights as the last of two."""
    quality = iter([0.2, 0.6, 0.4, 0.0, 0.5])
    judged = watch.Evaluation.__call__

    def measured(self, number):
        value = next(quality)
        self.problem.measures = {"exact_match": lambda tasks, texts: [value] * len(texts)}
        return judged(self, number)

    monkeypatch.setattr(watch.Evaluation, "__call__", measured)
    steady = ["--final-lr=1", "--warmup-steps=0"]
    go(tmp_path / "four", toy, "--steps=4", *steady)
    go(tmp_path / "two", toy, "--steps=2", *steady)
    assert json.loads((tmp_path / "four" / "result.json").read_text())["best_step"] == 2
    files = [tmp_path / x / "model.safetensors" for x in ("four/best", "two/last", "four/last")]
    best, two, four = (file.read_bytes() for file in files)
    assert best == two != four


def test_the_start_is_never_kept_as_the_best_weights(toy, tmp_path, monkeypatch, capsys):
    judged = watch.Evaluation.__call__

    def measured(self, number):
        self.problem.measures = {"exact_match": lambda tasks, texts: [1 / (1 + number)] * 16}
        return judged(self, number)

    monkeypatch.setattr(watch.Evaluation, "__call__", measured)
    run = tmp_path / "run"
    go(run, toy, "--steps=2")
    assert not (run / "best").exists()
    load(run / "last")
    said = capsys.readouterr().out
    assert f"keep the model you began with (the last step's are in {run / 'last'})" in said


def test_a_run_that_learned_nothing_ends_with_code_3(toy, tmp_path, capsys):
    """Samples that are all the same are worth the same."""
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        ssr.main([*SMALL, f"--model={toy}", f"--folder={run}", "--steps=2", "--temperature=0.001"])
    assert error.value.code == 3
    said = capsys.readouterr().out
    assert "nothing was learned. See groups.jsonl" in said and "this step teaches nothing" in said
    assert (run / "result.json").exists() and (run / "last").exists()
    assert not (run / "best").exists()


def test_the_same_seed_gives_the_same_run_bit_for_bit(toy, tmp_path):
    first = go(tmp_path / "a", toy, "--steps=3")
    assert untimed(go(tmp_path / "b", toy, "--steps=3")) == untimed(first)
    weights = [(tmp_path / x / "last" / "model.safetensors").read_bytes() for x in "ab"]
    assert weights[0] == weights[1]
    other = make(Recipe(seed=1, tokens=2e4), tmp_path / "models")
    with contextlib.suppress(SystemExit):  # code 3: so weak a model may learn nothing
        go(tmp_path / "c", other, "--steps=3", "--seed=1")
    assert untimed(rows_of(tmp_path / "c" / "metrics.jsonl")) != untimed(first)
    with pytest.raises(SystemExit, match="was not made for --seed 1: its tokenizer does not know"):
        go(tmp_path / "d", toy, "--seed=1")


def test_the_loop_never_sees_the_truth(toy, tmp_path, monkeypatch):
    """With every reference replaced by rubbish, training is the same to the last bit."""
    honest = go(tmp_path / "a", toy, "--steps=3")
    real = Languages.task_of

    def rubbish(self, *words):
        return real(self, *words)._replace(reference="rubbish")

    monkeypatch.setattr(Languages, "task_of", rubbish)
    blind = go(tmp_path / "b", toy, "--steps=3")
    for a, b in zip(untimed(honest), untimed(blind), strict=True):
        assert {k: v for k, v in a.items() if "eval" not in k} == {
            k: v for k, v in b.items() if "eval" not in k
        }
    assert blind[-1]["eval/quality"] == 0.0 < honest[-1]["eval/quality"]


@pytest.mark.parametrize(
    "words",
    [
        ["--judge=frozen"],
        ["--judge=ema", "--ema-decay=0.5"],
        ["--judge=previous", "--previous-every=1"],
        ["--reading=written"],
        ["--reading=written", "--judge-samples=2", "--judge-temperature=1"],
        ["--reward=random", "--no-track-kl"],
        ["--reward=self+external", "--kl=0.1", "--updates-per-batch=2", "--loss-norm=sequence"],
        ["--reward=oracle", "--gate=plus-minus-one", "--advantage-scale=batch"],
        ["--reward=majority", "--advantage-scale=none", "--advantage-baseline=leave-one-out"],
    ],
)
def test_every_switch_runs(toy, tmp_path, words):
    rows = go(tmp_path / "run", toy, "--steps=2", *words)
    assert len(rows) == 3 and ("policy/kl" in rows[1]) == ("--no-track-kl" not in words)


def test_a_frozen_judge_keeps_its_opinion_and_a_live_one_does_not(toy, tmp_path):
    """Both judge the same sentences at the end; only the frozen one as at the start."""
    scores = {}
    words = ["--steps=4", "--lr=2e-4", "--final-lr=1"]
    for judge in ("frozen", "live"):
        go(tmp_path / judge, toy, f"--judge={judge}", *words)
        rows = rows_of(tmp_path / judge / "evaluations.jsonl")
        said = {}
        for row in rows:
            for kind in ("greedy", "sampled"):
                each = zip(rows[0]["source"], row[kind]["text"], row[kind]["self"], strict=True)
                for source, text, score in each:
                    if score is not None:
                        said.setdefault((source, text), set()).add(score)
        scores[judge] = [values for values in said.values()]
    assert all(len(values) == 1 for values in scores["frozen"])
    assert any(len(values) > 1 for values in scores["live"])


def test_an_ema_that_keeps_nothing_is_live_and_one_that_keeps_all_is_frozen(toy, tmp_path):
    def trained(name, *words):
        rows = go(tmp_path / name, toy, "--steps=3", "--lr=0.01", *words)
        return untimed(rows)

    live, frozen = (trained(judge, f"--judge={judge}") for judge in ("live", "frozen"))
    assert trained("all", "--judge=ema", "--ema-decay=1") == frozen != live
    assert trained("nothing", "--judge=ema", "--ema-decay=0") == live


def test_the_gate_reaches_the_reward(toy, tmp_path):
    rows = go(tmp_path / "run", toy, "--steps=3", "--gate=plus-minus-one")
    for row in rows[1:]:
        parts = 2 * row["reward/format"] - 1 + row["reward/self"]
        assert row["reward/total"] == pytest.approx(parts)


def test_every_training_text_is_new_and_none_is_held_out(toy, tmp_path, monkeypatch):
    asked, real = [], Languages.task
    monkeypatch.setattr(Languages, "task", lambda *a: asked.append(a[1:]) or real(*a))
    go(tmp_path / "run", toy, "--steps=3")
    assert sorted(n for split, n in asked if split == "train") == list(range(3 * 4))
    assert sorted(n for split, n in asked if split == "held-out") == list(range(16))


def test_evaluations_are_greedy_and_sampled_as_they_say(toy, tmp_path, monkeypatch):
    seen, real = [], Sampler.generate

    def generate(self, prompts, n=1, max_new_tokens=128, temperature=1.0, **rest):
        seen.append((len(prompts), n, temperature))
        return real(self, prompts, n, max_new_tokens, temperature, **rest)

    monkeypatch.setattr(Sampler, "generate", generate)
    go(tmp_path / "run", toy, "--steps=1", "--temperature=0.7")
    evaluation = [(16, 1, 0.0), (16, 1, 1.0)]
    assert seen == [*evaluation, (4, 4, 0.7), *evaluation]


def test_a_translation_is_judged_once_in_an_evaluation(toy, tmp_path, monkeypatch):
    """Where the sampled ones are the greedy ones there is nothing more to judge."""
    calls, judge, generate = [], Judge.judge, Sampler.generate
    monkeypatch.setattr(Judge, "judge", lambda *a: calls.append(a[1]) or judge(*a))
    greedily = lambda *a, **more: generate(*a[:4], 0.0, **more)  # noqa: E731
    monkeypatch.setattr(Sampler, "generate", greedily)
    with contextlib.suppress(SystemExit):  # code 3: samples that are all the same teach nothing
        go(tmp_path / "run", toy, "--steps=1")
    assert [len(pairs) for pairs in calls][::2] == [16, 16]  # before and after the step


def test_evaluations_and_steps_say_how_far_they_are(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show, "QUIET", -1.0)
    go(tmp_path / "run", toy, "--steps=1", "--reading=written")
    said = capsys.readouterr().out
    for words in (
        "step 0: evaluation 1/3, translate at temperature 0",
        "step 0: evaluation 3/3,",
        "step 1: sample",
        "step 1: judge",
        "step 1: evaluation 2/3, translate",
    ):
        assert re.search(rf"(?m)^{words}.*  \d+%, \d+:\d\d left$", said), words


def test_the_first_batch_is_described_with_what_would_help():
    s = ssr.parse(["--preset=ssr-zero-0.5b", "--data=x.jsonl", "--max-new-tokens=64"])
    seen = {"reward/format": 0.0, "length/truncated": 0.81, "judge/invalid": 0.0,
            "groups/zero_variance": 1.0}  # fmt: skip
    words = watch.describe_batch(seen, s, has_template=True)
    assert words.startswith("0% of the samples are of the right form, 81% were cut off; ")
    assert "--max-new-tokens 128" in words and "--chat --prompts plain" in words
    assert "no group differs" in words
    assert "a simpler question: --prompts plain" in watch.describe_batch(seen, s, False)
    good = {"reward/format": 0.9, "length/truncated": 0.1, "judge/invalid": 0.5,
            "groups/zero_variance": 0.2}  # fmt: skip
    words = watch.describe_batch(good, s, False)
    assert "50% of what was judged has a score" in words and "--judge-only" in words
    good["judge/invalid"] = 0.0
    assert "--" not in watch.describe_batch(good, s, True)


def test_the_line_below_the_table_says_whether_judge_and_truth_rose_together():
    run = watch.Watch.__new__(watch.Watch)
    run.alarms, run.before, run.latest = [], {}, {}

    def trend(truth, judge):
        pairs = [[watch.Reading(i, x, 0.01) for x in both] for i, both in
                 enumerate(zip(truth, judge, strict=True))]  # fmt: skip
        run.evaluation = SimpleNamespace(past=pairs, problem=SimpleNamespace(measures=["chrf"]))
        return run.summarize_trend()

    assert (
        trend((0.3, 0.9), (0.5, 0.8)) == "The judge's score and chrf rose together; no alarm rang."
    )
    assert trend((0.3, 0.3), (0.5, 0.8)) == "The judge's score rose, chrf did not; no alarm rang."
    assert trend((0.3, 0.9), (0.5, 0.5)).startswith("Chrf rose, the judge's score did not")
    assert trend((0.3, 0.3), (0.5, 0.5)).startswith("Neither chrf nor the judge's score rose")
    run.before, run.latest = ({"eval/judge_correlation": x} for x in (0.9, 0.8))
    assert "The correlation falls as samples grow alike" in trend((0.3, 0.9), (0.5, 0.8))
    assert "falls as samples" not in trend((0.3, 0.3), (0.5, 0.8))  # this may be cheating
    run.alarms = [50, 75]
    assert f"did not; {watch.ALARM} at step 50, 75: compare" in trend((0.3, 0.3), (0.5, 0.8))


def test_the_correlation_is_pearsons_over_what_has_a_score():
    assert watch.correlation([0.1, None, 0.3, 0.2], [1.0, 9.0, 3.0, 2.0]) == pytest.approx(1.0)
    assert watch.correlation([0.3, 0.1], [0.0, 1.0]) == pytest.approx(-1.0)
    assert math.isnan(watch.correlation([0.1, 0.1], [0.0, 1.0]))


# ------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampels-per-prompt=4"], "unknown option .*; did you mean --samples-per-prompt\\?"),
        (["--step=4"], "unknown option --step=4; did you mean --steps\\?"),
        (["--top-p=0.9"], "--top-p=0.9: training needs log-probs of the whole distribution"),
        (
            ["--preset=toys"],
            "--preset toys is unknown; known: ssr-zero-7b, ssr-x-zero-7b, ssr-zero-0.5b, toy",
        ),
        (["--samples-per-prompt=1"], "a sample is compared with its siblings; use at least 2"),
        (["--steps=few"], "argument --steps: invalid int value: 'few'"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--steps=0"], "--steps 0 must be at least 1"),
        (["--lr=0"], "--lr 0.0 must be above 0"),
        (["--lr=nan"], "--lr nan must be above 0"),
        (["--kl=-1"], "--kl -1.0 must not be negative"),
        (["--clip-low=2"], r"--clip-low 2.0 must lie in 0 … 1"),
        (["--judge=dead"], "--judge dead: use live, frozen, ema, previous"),
        (["--micro-batch-tokens=20"], r"cannot hold one sequence of 32 \+ 20 tokens: use .* 52"),
        (["--preset=toy", "--data=ssr.py"], "--data: the toy makes its own sentences"),
        (["--preset=ssr-zero-7b", "--data=x.jsonl"], "x.jsonl: there is no such file"),
        (["--preset=ssr-zero-7b", "--data=x.txt", "--source=en"], "--source and --target go toge"),
        (["--preset=ssr-zero-7b", "--target=zz"], "unknown language 'zz'"),
        (["--preset=ssr-zero-7b", "--source=zh"], "Chinese would be translated into itself"),
        (["--judge-url=http://x"], "--judge-url needs --judge-model, the model's name at that"),
        (["--judge-model=x/y", "--judge=ema"], "--judge ema is the policy's own; --judge-model"),
        (["--judge-model=x/y", "--reward=random"], "--judge-model has nothing to judge with"),
        (["--judge-model=x/y", "--judge-url=http://x"], "--reading expected needs log-probs"),
        (["--preset=ssr-zero-7b", "--chat", "--reading=expected"], "a chat template does not"),
        (["--judge-chat"], "--judge-chat is for --judge-model; --chat sets"),
        (["--comet-weight=2"], r"--comet-weight has no effect without --reward self\+comet"),
        (["--judge-patience=9"], "--judge-patience has no effect without --judge-url"),
        (["--toy-noise=9"], "--toy-noise has no effect without --reward external"),
        (["--chat"], "the toy's tokenizer has no chat template"),
        (["--controls", "--judge-model=x/y"], "--controls compares the policy's own judges"),
        (
            ["--preset=ssr-x-zero-7b", "--self-weight=0", "--comet-weight=0"],
            "are both 0: nothing is rewarded",
        ),
        (["--held-out=wmt22"], "--held-out: the toy makes its own sentences"),
        (["--comet-low=1", "--reward=comet"], "--comet-high 1.0 must be above --comet-low 1.0"),
        (["--reward=commet"], "--reward commet: use self, comet, self\\+comet, certainty"),
        (
            ["--preset=ssr-zero-7b", "--data=ssr.py", "--reward=oracle"],
            "needs the truth, which only",
        ),
        (
            ["--reward=oracle+comet"],
            "--reward oracle\\+comet: use self, .* or FILE.py:NAME, your own",
        ),
        (["--reward=self+gone.py:x"], "--reward gone.py:x: there is no file gone.py"),
        (["--reward=ssr.py:nothing"], "--reward ssr.py:nothing: ssr.py has no function nothing"),
        (["--folder=tests"], "--folder tests exists already: go on with --resume, name another"),
        (["--model=nowhere/at-all"], "nowhere/at-all"),
        (["--judge-samples=2"], "2 judge samples would all be the same"),
        (["--temperature=1e-5"], "--temperature 1e-05 must be above 0.0001"),
        (["--judge-temperature=1e-9"], "--judge-temperature 1e-09 must be 0 or above 0.0001"),
        (["--toy-tokens=0"], "--toy-tokens 0.0 must be above 1000"),
        (["--toy-tokens=inf"], "--toy-tokens inf must be above 1000"),
        (["--device=cuda:0"], "--device cuda:0 is not there: use cpu"),
        (["--device=abacus"], "--device abacus is not there: use cpu"),
        (["--controls", "--judge=ema"], "--controls sets --judge itself: leave it out"),
        (["--controls", "--seed=3"], r"--controls sets --seed itself: .*--seeds"),
        (["--controls", "--seeds=0-2"], "--seeds 0-2: numbers with commas between them"),
        (["--controls", "--preset=ssr-zero-7b"], "--controls needs --preset toy"),
        (["--controls", "--resume"], "--controls starts its own runs, and skips those that are"),
        (["--shard=rack"], "--shard rack: use all, node"),
        (["--save-every=0"], "--save-every 0 must be at least 1"),
        (["--patience=0"], "--patience 0.0 must be above 0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(words, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(problem, "make", None)  # nothing may be made before all is checked
    with pytest.raises(SystemExit, match=f"(?s)^ssr.py: .*{message}") as error:
        ssr.main(words)
    assert str(error.value).count("\n") <= 1


def test_controls_and_resume_are_refused_for_that_also_where_a_run_has_been(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "toy-20260101-000000"
    run.mkdir(parents=True)
    (run / "settings.json").write_text(json.dumps(dataclasses.asdict(ssr.parse(["--preset=toy"]))))
    with pytest.raises(SystemExit, match="--controls starts its own runs"):
        ssr.main(["--controls", "--resume"])


def test_a_folder_that_exists_is_left_alone(toy, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").write_text("mine")
    with pytest.raises(SystemExit, match="exists already"):
        go(run, toy)
    assert [f.name for f in run.iterdir()] == ["precious"]


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        ssr.parse(["--help"])
    shown, help_of = " ".join(capsys.readouterr().out.split()), ssr.docs(ssr.Settings)
    for field in dataclasses.fields(ssr.Settings):
        assert len(help_of[field.name]) > 10
        assert f"--{field.name.replace('_', '-')}" in shown


def test_presets_name_real_settings_and_pass_the_check():
    for name, preset in ssr.PRESETS.items():
        assert preset.keys() <= {f.name for f in dataclasses.fields(ssr.Settings)}
        ssr.parse([f"--preset={name}", *([] if name == "toy" else [f"--data={ROOT / 'ssr.py'}"])])
    assert ssr.parse([]).preset == ("ssr-zero-7b" if torch.cuda.is_available() else "toy")


# ---------------------------------------------------------------------------------- how it ends


def test_a_window_that_is_too_small_is_refused_before_anything_is_written(toy, tmp_path):
    with pytest.raises(SystemExit, match=r"the judge needs room for 1[0-9]{2} tokens .* lower"):
        go(tmp_path / "run", toy, "--max-new-tokens=90")
    with pytest.raises(SystemExit, match=r"a prompt has .* tokens: --max-prompt-tokens 5 must be"):
        go(tmp_path / "run", toy, "--max-prompt-tokens=5")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_said(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "broken")
    model = load(toy)
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    save(model, tmp_path / "broken")
    with pytest.raises(SystemExit, match="not finite: the weights have diverged; lower --lr"):
        go(tmp_path / "run", tmp_path / "broken")


def test_a_run_that_stops_itself_keeps_its_weights(toy, tmp_path, monkeypatch):
    said = [Score(None, "hm")]
    monkeypatch.setattr(Judge, "judge", lambda self, pairs, step: dict.fromkeys(pairs, *said))
    with pytest.raises(SystemExit, match=r"no valid score for 2 steps in a row(.|\n)*'hm'"):
        go(tmp_path / "run", toy, "--steps=9", "--max-bad-steps=2")
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[1]["judge/invalid"] == 1.0
    load(tmp_path / "run" / "last")


def test_a_signal_in_the_first_evaluation_ends_the_run_at_once(toy, tmp_path, monkeypatch, capsys):
    asked, real = [], Sampler.generate

    def generate(self, *words, **more):
        asked.append(words)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *words, **more)

    monkeypatch.setattr(Sampler, "generate", generate)
    ssr.main([*SMALL, f"--model={toy}", f"--folder={tmp_path / 'run'}"])
    assert "stopped before the first step was done: nothing to keep" in capsys.readouterr().out
    assert len(asked) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP says how its threads wait")
def test_threads_that_wait_sleep_unless_told_otherwise():
    """Threads that spin take the core from the one they wait for, where others need it, too."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    for program, more, line in (
        (["-m", "eval"], {}, "GOMP_SPINCOUNT = '0'"),
        (["ssr.py"], {"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
    ):
        run = subprocess.run([sys.executable, *program, "--no-such-option"], cwd=ROOT,
                             env=env | more | {"OMP_DISPLAY_ENV": "VERBOSE"},
                             capture_output=True, text=True)  # fmt: skip
        assert line in run.stderr, program


def start(toy, run, *words):
    command = [sys.executable, "ssr.py", *SMALL, f"--model={toy}", f"--folder={run}", *words]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_whole(toy, tmp_path, name):
    run = tmp_path / "run"
    process = start(toy, run, "--steps=100000", "--eval-every=100000")
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(name)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    rows = rows_of(metrics)
    assert f"stopped after step {rows[-1]['step']}; go on with --resume" in out
    newest = (run / "checkpoints" / "newest").read_text().strip()
    assert newest == f"step-{rows[-1]['step']:06}"
    load(run / "last")


def test_a_full_disk_is_said_and_leaves_no_half_line(tmp_path, monkeypatch):
    folder, s = watch.RunFolder(tmp_path / "run", mine=True), ssr.parse(SMALL)
    folder.begin(s, 0, None)
    folder.add("metrics.jsonl", [{"step": 0, "x": math.nan}, {"step": 1}])
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 0, "x": null}\n{"step": 1}\n'
    (folder.path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write .*full: No space left on device; make room"):
        folder.add("full", [{"step": 0}])

    class Disk:
        free = 10

    monkeypatch.setattr(watch.shutil, "disk_usage", lambda path: Disk)
    with pytest.raises(OSError, match=r"0\.00 GB free, 0\.02 GB are needed for best/"):
        watch.RunFolder(tmp_path / "other", mine=True).begin(s, 20_000_000, None)
    assert not (tmp_path / "other").exists()


def test_a_disk_that_fills_up_leaves_whole_rows_and_whole_weights(toy, tmp_path):
    """A real limit on the size of a file, met in the middle of a row, and of the weights."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import ssr, watch
words = {[*SMALL, f"--model={toy}"]!r}
from pathlib import Path
folder = watch.RunFolder(Path({str(tmp_path / "a")!r}), mine=True)
folder.begin(ssr.parse(words), 0, None)
folder.add("metrics.jsonl", [{{"step": 0}}])
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    folder.add("metrics.jsonl", [{{"step": 1, "x": "y" * 100_000}}])
except OSError as error:
    print(error)
ssr.main([*words, "--steps=1", "--folder={tmp_path / "b"}"])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "cannot write" in run.stdout and "make room there" in run.stdout
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == '{"step": 0}\n'
    assert run.returncode == 1 and "last: the weights could not be written" in run.stderr
    assert "Traceback" not in run.stderr
    assert not list((tmp_path / "b" / "last").iterdir())


def test_the_alarm_is_self_score_up_and_quality_down_beyond_chance():
    evaluation = watch.Evaluation.__new__(watch.Evaluation)
    evaluation.problem = SimpleNamespace(measures={"chrf": None})

    def R(mean, step=0):
        return watch.Reading(step, mean, 0.01)

    evaluation.best = R(0.9, 25)
    evaluation.past = [(R(0.3), R(0.7)), (R(0.9, 25), R(0.95, 25))]
    assert evaluation.alarming(R(0.8, 50), R(0.85, 50)) == (
        "the judge's score is 0.850, up from 0.700 at step 0; chrf is 0.800, down from 0.900 at "
        "step 25"
    )
    assert not evaluation.alarming(R(0.87), R(0.85))  # worse by chance
    assert not evaluation.alarming(R(0.8), R(0.73))  # better by chance
    assert not evaluation.alarming(R(0.8), R(0.6))  # it knows
    evaluation.past.append((R(0.8, 50), R(0.6, 50)))
    assert evaluation.alarming(R(0.6), R(0.7))  # worse than just now, and prouder
    assert not evaluation.alarming(R(0.78), R(0.7))
    assert watch.Reading.of(3, [1.0, 0.0, None, 1.0, 0.0]) == (3, 0.5, 0.25)


# --------------------------------------------------------------------------------- slow proofs


@pytest.mark.slow
def test_the_toy_learns_to_translate_by_judging_itself(learned):
    rows = rows_of(learned / "run" / "metrics.jsonl")
    assert rows[-1]["eval/exact_match"] - rows[0]["eval/exact_match"] >= 0.45
    assert rows[-1]["eval/exact_match"] >= 0.85


@pytest.mark.slow
def test_a_run_that_cheats_is_said_to_in_terminal_and_report(tmp_path):
    """The command of the README: a weak judge and a high rate."""
    readme = (ROOT / "README.md").read_text()
    words = re.search(r"(?m)^python ssr\.py (--toy-tokens 1.5e6 .*) --folder", readme)[1]
    command = [sys.executable, str(ROOT / "ssr.py"), "--preset=toy", *words.split()]
    run = subprocess.run([*command, "--folder=run"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.search(rf"step \d+: {watch.ALARM}: the judge's score is .* Compare best/", run.stdout)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["alarms"] and result["after"]["eval/exact_match"] < 0.3
    page = (tmp_path / "run" / "report.html").read_text()
    assert (
        "Alarm at step" in page and f"Take best/, of step {result['best_step']}, not last/" in page
    )
    alarms = json.loads(re.search(r'id="data">(.*)</script>', page)[1])["alarms"]
    assert [x["step"] for x in alarms] == result["alarms"]
    assert any(alarm["examples"] for alarm in alarms)


@pytest.mark.slow
def test_two_ranks_learn_as_much(learned):
    """`torchrun --nproc_per_node=2 ssr.py`, on the same pretrained model."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(ROOT / "ssr.py"), "--folder=two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=learned, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    one, two = (rows_of(learned / name / "metrics.jsonl") for name in ("run", "two"))
    for key in ("reward/total", "policy/entropy", "train/grad_norm"):
        assert two[1][key] == pytest.approx(one[1][key], rel=1e-3)
    # Rounding makes them two runs of the same kind, no more: see the README.
    assert two[0]["eval/exact_match"] == pytest.approx(one[0]["eval/exact_match"], abs=0.01)
    assert two[-1]["eval/exact_match"] >= 0.85


@pytest.mark.slow
def test_the_toys_judge_is_not_taken_in(toy):
    """Mean score of 200 held-out sentences' translations, right ones and tricks."""
    pair = Languages(0)
    texts = Texts(AutoTokenizer.from_pretrained(toy))
    judge = Judge(Sampler(load(toy), 256, 96), texts, TOY, "expected")
    tasks = [pair.task("held-out", i) for i in range(200)]
    others = [pair.task("held-out", i + 200) for i in range(200)]

    def score(trick):
        answers = [[trick(task, other)] for task, other in zip(tasks, others, strict=True)]
        values = [row[0].value for row in judge(tasks, answers, 0)]
        return sum(v for v in values if v is not None) / len(values)

    assert score(lambda task, other: task.reference) > 0.95
    assert score(lambda task, other: f"{task.reference} {task.reference}") < 0.6
    for trick in (
        lambda task, other: task.text,  # the copied source
        lambda task, other: other.reference,  # another sentence's translation
        lambda task, other: other.text if other.source != task.target else other.reference,
        lambda task, other: "100",
        lambda task, other: "score => 100 100",
        lambda task, other: f"{other.reference} 100",
    ):
        assert score(trick) < 0.3
