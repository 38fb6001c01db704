"""The other self-rewards: the numbers that define them, untrusted candidates, and whole runs."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.codec import PromptCodec, load_tokenizer
from judge import PAPER, PLAIN, TOY, Judge, Reward, Score, Task
from model import load
from rewards import family
from rewards.family import ask_pair
from run import driver, estimate, problem, settings
from sampler import Sample, Sampler
from tests import corpora, test_problem
from tests.test_distributed import assert_same_run
from tests.test_judge import Scripted, sample, well_formed
from tests.test_ssr import go, rows_of
from tests.tiny import make_model, make_tokenizer
from toy.languages import Languages
from toy.pretrain import Recipe, build_and_save, pretrain_languages

TASK = Task("The sun is shining.", "English", "Chinese")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model; its tokenizer merges a full stop with what follows, as Qwen's does."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder, vocab=430, positions=2048)
    make_tokenizer(folder, ["<answer>好。</answer> <think> </think>"] * 9, 430)
    return folder


@pytest.fixture(scope="module")
def codec(folder):
    return PromptCodec(AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A toy that has seen its skills."""
    recipe = Recipe(tokens=6e4, batch=16, width=48, layers=1, mlp=96, muon=0.02, adamw=6e-3,
                    skills=("compare", "rate"))  # fmt: skip
    folder = tmp_path_factory.mktemp("taught")
    build_and_save(pretrain_languages, recipe, folder)
    return folder


# ------------------------------------------------------------------------ its own probabilities


def test_certainty_is_the_divergence_of_uniform_from_p():
    torch.manual_seed(0)
    for scale, shift in ((1.0, 0.0), (10.0, 0.0), (1.0, 3000.0)):
        logits = scale * torch.randn(5, 1000) + shift
        p = logits.double().softmax(-1)
        expected = (1e-3 * (1e-3 / p).log()).sum(-1)
        certainty = family.self_certainty(logits).double()
        torch.testing.assert_close(certainty, expected, rtol=1e-5, atol=1e-6)
    for value in (0.0, 7.3, -1e4):
        assert torch.equal(family.self_certainty(torch.full((3, 152_064), value)), torch.zeros(3))


def logits_of(folder, codec, prompts, ids, task=TASK):
    """The logits that drew a sample, in fp64, from transformers: (tokens, V)."""
    prompt = codec.encode([prompts.ask(task)])[0]
    theirs = AutoModelForCausalLM.from_pretrained(folder).double()
    with torch.no_grad():
        logits = theirs(torch.tensor([[*prompt, *ids]])).logits[0]
    return logits[len(prompt) - 1 : -1] / 0.7


def gaps(logits):
    p = logits.softmax(-1).sort(-1, descending=True).values
    return p[:, 0] - p[:, 1]


def confidences(folder, codec, prompts, reward, groups, tasks=(TASK,)):
    s = settings.Settings(reward=reward, temperature=0.7, micro_batch_tokens=300)
    sampler = SimpleNamespace(model=load(folder))
    judge = SimpleNamespace(codec=codec, prompts=prompts, sampler=sampler)
    return Reward(codec, prompts, family.self_scorers(s, judge))(list(tasks), groups, 1)


def drawn(codec, text):
    ids = sample(codec, text).ids
    return Sample(ids, [0.0] * len(ids), True)


def test_certainty_is_its_mean_over_all_tokens_the_stop_too(folder, codec, monkeypatch):
    """Whatever else is in the batch, so for any number of ranks; a wrong form is not scored."""
    monkeypatch.setattr(family, "LOGITS", 430 * 7)  # so many rows at once, and the rest
    tasks = [TASK, TASK._replace(text="Two and three.")]
    answers = (well_formed("阳光灿烂"), well_formed("太阳"), "no tags", well_formed("阳光灿烂"))
    group = [drawn(codec, answer) for answer in answers]
    judged = confidences(folder, codec, PAPER, "certainty", [group] * 2, tasks)
    for task, row in zip(tasks, judged, strict=True):
        for i in (0, 1):
            logits = logits_of(folder, codec, PAPER, group[i].ids, task)
            expected = (logits.logsumexp(-1) - logits.mean(-1) - math.log(430)).mean()
            assert row.total[i] == pytest.approx(float(expected), rel=1e-5)
        assert row.total[3] == row.total[0] and row.total[2] == 0.0


@pytest.mark.parametrize(
    ("prompts", "text"),
    [(PAPER, "<think> hm 阳 </think> <answer>日。好。</answer>"), (PLAIN, "日。好。")],
)
def test_an_answers_confidence_is_that_of_its_own_tokens(folder, codec, prompts, text):
    """The tokenizer's offsets say which they are: it merges the end of the answer with the tag."""
    x = drawn(codec, text)
    offsets = codec.tokenizer(text, return_offsets_mapping=True).offset_mapping
    begin = text.index("日")
    inside = [i for i, (a, b) in enumerate(offsets) if a < begin + 4 and b > begin]
    assert (offsets[inside[-1]][1] > begin + 4) == (prompts is PAPER)
    (judged,) = confidences(folder, codec, prompts, "confidence", [[x]])
    expected = gaps(logits_of(folder, codec, prompts, x.ids))[inside].mean()
    assert judged.total[0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("pieces", "inside"),
    [
        (["<think>a</think><answer", ">b", "c", "d<", "/answer>", "<eos>"], range(1, 4)),
        (["<think>a</think>", "<answer>", " ", "b", " ", "</answer>", "<eos>"], range(3, 4)),
        (["<think>a</think>", "<answer>b</answer>", " ", "<eos>"], range(1, 2)),
        (["<think>a<answer>", "</think>", "\n", "b", " c", " ", "<eos>"], range(3, 5)),
    ],
)  # fmt: skip
def test_a_token_that_holds_a_part_of_the_answer_is_inside(pieces, inside):
    codec = SimpleNamespace(decode=lambda ids: "".join(pieces[i] for i in ids))
    assert family.answer_span(codec, list(range(len(pieces)))) == inside


# ------------------------------------------------------------------------------ pairs and groups


def ask(codec, answer, answers, most=None, step=1, **options):
    """Scores and prompts of `Pairs`, or of `Group` with so many in a prompt."""
    sampler = Scripted(codec, answer)
    sampler.stops = options.pop("stops", True)
    sampler.max_length = options.pop("max_length", 4000)
    judge = Judge(sampler, codec, PAPER, max_new_tokens=20, **options)
    scorer = family.GroupJudge(judge, most, 20) if most else family.PairwiseJudge(judge)
    return scorer([TASK], [answers], step)[0], sampler.asked


def places(prompt, *words):
    return [prompt.index(f"\n{word}\n") for word in words]


def longer(prompt, i=0):
    """A judge that prefers the longer one."""
    _, _, _, first, _, second, _ = prompt.split("```")
    return well_formed("first" if len(first) > len(second) else "second")


def test_the_win_rate_is_over_the_others_in_both_orders(codec):
    answers = ["aaa", "a", None, "aa", "a"]
    scores, prompts = ask(codec, longer, answers)
    assert [s.value for s in scores] == [1.0, 0.5 / 3, 0.0, 2 / 3, 0.5 / 3]
    assert scores[2].judge_text == "not judged"
    assert len(prompts) == len(set(prompts)) == 6  # the ordered pairs of three that differ


@pytest.mark.parametrize("answer", ["first", " Second\n"])
def test_a_preference_for_a_position_is_no_advantage(codec, answer):
    scores, _ = ask(codec, lambda *_: well_formed(answer), ["a", "b", "c", "a"])
    assert [s.value for s in scores] == [0.5] * 4
    for answers in (["a", "a"], ["a", None]):  # equal, or alone: no question
        scores, prompts = ask(codec, longer, answers)
        assert scores[0].value == 0.5 and prompts == []


@pytest.mark.parametrize("answer", ["the first", "first second", "<answer>first", ""])
def test_a_pair_without_a_readable_judgement_is_left_out(codec, answer):
    def judge(prompt, i):
        return answer if "\nccc\n" in prompt else longer(prompt)

    scores, _ = ask(codec, judge, ["aa", "a", "ccc"])
    assert [s.value for s in scores] == [1.0, 0.0, None] and scores[2].judge_text == answer


@pytest.mark.parametrize("most", [None, 2], ids=["pairs", "group"])
def test_what_is_cut_off_or_too_long_to_judge_has_no_score(codec, most):
    scores, _ = ask(codec, longer, ["aa", "a"], most, stops=False)
    assert [s.value for s in scores] == [None, None]
    scores, prompts = ask(codec, longer, ["aa", "a"], most, max_length=300)
    assert scores[0] == Score(None, "too long to judge") and prompts == []


def test_the_expected_win_is_the_first_words_share(taught):
    """Against transformers' probabilities."""
    codec = PromptCodec(load_tokenizer(taught))
    judge = Judge(Sampler(load(taught), 4, 150), codec, TOY, "expected")
    scorer = family.PairwiseJudge(judge)
    task = Languages(0).task("train", 0)
    a, b = task.reference, " ".join(task.reference.split()[::-1])
    theirs = AutoModelForCausalLM.from_pretrained(taught)
    ids = torch.tensor(codec.encode([ask_pair(TOY, task, *x) for x in ((a, b), (b, a))]))
    with torch.no_grad():
        p = theirs(ids).logits[:, -1].double().softmax(-1)
    first, second = (p[:, codec.one_token(word)] for word in ("first", "second"))
    share = first / (first + second)
    assert (first + second > 0.5).all()
    expected = float(1 + share[0] - share[1]) / 2
    found = [score.value for score in scorer([task], [[a, b]], 1)[0]]
    assert found == pytest.approx([expected, 1 - expected], rel=1e-4)


def in_order(values):
    """A judge that scores candidates by this table."""

    def judge(prompt, i):
        there = sorted((k for k in values if f"\n{k}\n" in prompt), key=lambda k: places(prompt, k))
        return well_formed(", ".join(str(values[k]) for k in there))

    return judge


def test_a_groups_scores_go_to_those_they_are_for(codec):
    values = {"aa": 10, "bb": 20, "cc": "30/100", "dd": 40.5, "ee": 50}
    answers = ["dd", "aa", None, "cc", "aa", "ee", "bb"]
    for most, count in ((5, 1), (4, 2), (2, 3)):
        scores, prompts = ask(codec, in_order(values), answers, most)
        expected = [0.405, 0.1, 0.0, 0.3, 0.1, 0.5, 0.2]
        assert [s.value for s in scores] == pytest.approx(expected) and len(prompts) == count
        assert all(sum(f"\n{key}\n" in prompt for prompt in prompts) == 1 for key in values)
        assert all(f"Chinese translation {most + 1}:" not in prompt for prompt in prompts)


def test_a_groups_order_is_drawn_for_the_step_and_the_text(codec):
    answers = list("abcdefgh")
    orders = [
        places(ask(codec, in_order({}), answers, 8, step=step, seed=seed)[1][0], *answers)
        for step, seed in ((1, 0), (1, 0), (2, 0), (1, 1))
    ]
    assert orders[0] == orders[1] and len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize(
    ("answer", "values"),
    [
        (well_formed("10,20"), {0.1, 0.2}), (well_formed("10 20"), {0.1, 0.2}),
        ("Score: 10\uff0c 20 out of 100", {0.1, 0.2}), (well_formed("10"), {None}),
        (well_formed("10, 20, 30"), {None}), (well_formed("10, 120"), {None}),
        (well_formed("the scores are 10, 20"), {None}), ("<answer>10, 20", {None}),
    ],
)  # fmt: skip
def test_a_group_has_a_score_for_each_or_for_none(codec, answer, values):
    scores, _ = ask(codec, lambda *_: answer, ["a", "b"], 4)
    assert {s.value for s in scores} == values


# ---------------------------------------------------------------------------- majority and CREAM


def test_the_majority_is_the_most_frequent_answer_and_of_several_the_first():
    def values(*row):
        return [s.value for s in family.majority([TASK], [list(row)], 1)[0]]

    assert values("a", "b  c", None, "b c\n") == [0.0, 1.0, 0.0, 1.0]
    assert values("b", "a", "a", "b") == [1.0, 0.0, 0.0, 1.0]
    assert values(None, None) == [0.0, 0.0]


def test_kendalls_tau_of_equal_reversed_and_tied_rankings():
    assert family.kendall([1, 2, 2, 3], [0.1, 0.2, 0.2, 0.9]) == 1.0
    assert family.kendall([1, 2, 3], [3, 2, 1]) == -1.0
    assert family.kendall([1, 1, 1], [2, 2, 2]) == 0.0
    assert family.kendall([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(2 / 6)
    assert family.kendall([1, 2, None, 4], [5, 6, 7, None]) == 1.0
    assert family.kendall([1, 2, 2], [1, 1, 2]) == pytest.approx(1 / 3)  # tied in one: counted


def test_a_groups_weight_is_its_judges_agreement(codec):
    def judge(*values):
        def score(tasks, answers, step):
            assert not any(task.reference for task in tasks)  # nobody is shown the truth
            return [[Score(v, "") for v in row] for row in values]

        return score

    now, then = judge([1, 2, 3], [1, 2, 3], [1, 2, 3]), judge([1, 2, 3], [3, 2, 1], [2, 2, 2])
    reward = Reward(codec, PAPER, {"self": (1.0, now)}, weigh=partial(family.agreement, then))
    group = [sample(codec, well_formed(x)) for x in "甲乙丙"]
    judged = reward([TASK._replace(reference="the truth")] * 3, [group] * 3, 1)
    assert [group.weight for group in judged] == [1.0, -1.0, 0.0]
    assert [group.total for group in judged] == [[1, 2, 3]] * 3


def test_groups_without_agreement_move_nothing(taught, tmp_path, monkeypatch):
    monkeypatch.setattr(family, "kendall", lambda a, b: 0.0)
    rows = go(tmp_path / "run", taught, "--steps=2", "--reward=cream", "--judge=frozen")
    assert rows[2]["train/rows"] == 0 and rows[2]["reward/weight"] == 0
    groups = rows_of(tmp_path / "run" / "groups.jsonl")
    assert any(len({x["reward"] for x in row["samples"]}) > 1 for row in groups)
    assert all(x["advantage"] == 0 for row in groups for x in row["samples"])


def test_a_run_with_a_previous_judge_resumes_bit_for_bit(taught, tmp_path, monkeypatch):
    """Ended between two of its updates: step 4 is judged by the weights of step 2."""
    monkeypatch.setattr(driver, "PREVIOUS_EVERY", 2)
    words = ["--reward=cream", "--judge=previous", "--eval-every=3", "--eval-prompts=4"]
    words += ["--lr=0.003", "--min-lr-ratio=1"]  # a rate that does not depend on the last step
    go(tmp_path / "whole", taught, "--steps=6", *words)
    for steps in (3, 6):
        go(tmp_path / "parts", taught, f"--steps={steps}", *words, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# ------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize(
    "words",
    ["certainty", "confidence --temperature=0.8", "pairs", "group --judge=frozen", "majority"],
)
def test_every_reward_runs_on_the_toy(taught, tmp_path, words):
    name, *more = words.split()
    rows = go(tmp_path / "run", taught, "--steps=1", f"--reward={name}", *more)
    assert not math.isnan(rows[0]["eval/self"])
    assert name == "group" or rows[1][f"reward/{name}"] > 0  # so young a toy may not rate


@pytest.mark.parametrize(("reward", "more"), [("pairs", ["--chat"]), ("group", [])])
def test_the_papers_prompts_can_compare_candidates(pupil, tmp_path, reward, more):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(corpora.english("news", i) for i in range(12)))
    options = ["--source=en", "--target=zh", "--eval-metrics=none", f"--reward={reward}", *more]
    assert f"reward/{reward}" in test_problem.go(pupil, file, tmp_path / "run", *options)[1]


def test_the_estimate_counts_candidates_and_questions():
    def parts(**changes):
        s = settings.parse(["--preset=ssr-zero-0.5b", "--dry-run"])
        s = dataclasses.replace(s, **changes)
        shape, template = estimate.find_config("Qwen/Qwen2.5-0.5B"), problem.judge_template(s)
        work = estimate.Workload(s, shape, 1, template, True)
        return estimate.memory(work), estimate.seconds(work, estimate.MACHINES["h100"])

    (live, time), (ema, _) = parts(), parts(judge="ema")
    previous, twice = parts(judge="previous", reward="cream")
    assert previous["--judge previous"] == ema["--judge ema"]
    assert twice["judge"] == pytest.approx(2 * time["judge"])
    pairs, group = (parts(reward=x)[0]["its KV cache"] for x in ("pairs", "group"))
    assert group > pairs > live["its KV cache"]
