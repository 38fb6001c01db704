"""The other self-rewards: the numbers that define them, who cannot forge them, how a run goes."""

import json
import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import family
import plan
import ssr
from judge import PAPER, PLAIN, TOY, Given, Judge, Reward, Score, Task, Texts
from model import load, load_tokenizer
from sampler import Sample, Sampler
from tests import corpora, test_problem
from tests.test_judge import Scripted, sample, well_formed
from tests.test_ranks import assert_same_run
from tests.test_ssr import go, rows_of, untimed
from tests.tiny import make_model, make_tokenizer
from toy import controls
from toy.languages import Languages, quality
from toy.pretrain import SKILLS, Corpus, Recipe, make, skills_of

TASK = Task("The sun is shining.", "English", "Chinese")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model; its tokenizer merges a full stop with what follows, as Qwen's does."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder, vocab=430, positions=2048)
    make_tokenizer(folder, ["<answer>好。</answer> <think> </think>"] * 9, 430)
    return folder


@pytest.fixture(scope="module")
def texts(folder):
    return Texts(AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A toy that has seen its skills."""
    recipe = Recipe(tokens=6e4, batch=16, skills=("compare", "rate"))
    return make(recipe, tmp_path_factory.mktemp("taught"))


# ------------------------------------------------------------------------ its own probabilities


def test_equal_logits_have_no_certainty_at_all():
    for value in (0.0, 7.3, -1e4):
        assert torch.equal(family.self_certainty(torch.full((3, 152_064), value)), torch.zeros(3))


def test_certainty_is_the_divergence_of_uniform_from_p():
    torch.manual_seed(0)
    for scale, shift in ((1.0, 0.0), (10.0, 0.0), (1.0, 3000.0)):
        logits = scale * torch.randn(5, 1000) + shift
        wide = logits.double()
        expected = wide.logsumexp(-1) - wide.mean(-1) - math.log(1000)
        found = family.self_certainty(logits).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        p = wide.softmax(-1)
        torch.testing.assert_close(expected, (1e-3 * (1e-3 / p).log()).sum(-1))


def plainly(folder, texts, prompts, temperature, ids):
    """The logits that drew a sample, in fp64, from transformers: (tokens, V)."""
    prompt = texts.encode([prompts.ask(TASK)])[0]
    theirs = AutoModelForCausalLM.from_pretrained(folder).double()
    with torch.no_grad():
        logits = theirs(torch.tensor([[*prompt, *ids]])).logits[0]
    return logits[len(prompt) - 1 : -1] / temperature


def confidences(folder, texts, prompts, reward, groups, tasks=(TASK,), **more):
    s = ssr.Settings(reward=reward, temperature=0.7, micro_batch_tokens=300)
    judge = SimpleNamespace(
        texts=texts, prompts=prompts, sampler=SimpleNamespace(model=load(folder)), **more
    )
    return Reward(texts, prompts, family.scorers(s, judge))(list(tasks), groups, 1)


def drawn(texts, words):
    ids = sample(texts, words).ids
    return Sample(ids, [0.0] * len(ids), True)


def test_certainty_is_its_mean_over_all_tokens_the_stop_too(folder, texts, monkeypatch):
    monkeypatch.setattr(family, "LOGITS", 430 * 7)  # so many rows at once, and the rest
    group = [drawn(texts, well_formed(answer)) for answer in ("阳光灿烂", "太阳", "阳光灿烂")]
    (judged,) = confidences(folder, texts, PAPER, "certainty", [group])
    for x, value in zip(group, judged.total, strict=True):
        logits = plainly(folder, texts, PAPER, 0.7, x.ids)
        expected = (logits.logsumexp(-1) - logits.mean(-1) - math.log(430)).mean()
        assert value == pytest.approx(float(expected), rel=1e-5)
    assert judged.total[0] == judged.total[2] != judged.total[1]


@pytest.mark.parametrize("answer", ["阳光", " 好。", "日, 光\n", "好。好。"])
def test_the_answers_confidence_is_that_of_its_own_tokens(folder, texts, answer):
    """Which they are, the tokenizer's offsets say: it merges the answer's end with its tag."""
    words = f"<think> hm 阳 </think> <answer>{answer}</answer>"
    x = drawn(texts, words)
    offsets = texts.tokenizer(words, return_offsets_mapping=True).offset_mapping
    start = words.index("<answer>") + 8
    begin = start + len(answer) - len(answer.lstrip())
    end = start + len(answer.rstrip())
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin]
    if answer == "好。好。":
        assert any(offsets[i][1] > end for i in inside)  # so it is
    (judged,) = confidences(folder, texts, PAPER, "confidence", [[x]])
    p = plainly(folder, texts, PAPER, 0.7, x.ids).softmax(-1).sort(-1, descending=True).values
    assert judged.total[0] == pytest.approx(float((p[:, 0] - p[:, 1])[inside].mean()), rel=1e-4)
    assert judged.words[0].endswith(f"over {len(inside)} tokens")


@pytest.mark.parametrize(
    ("pieces", "inside"),
    [
        (["<think>a</think><answer", ">b", "c", "d<", "/answer>", "<eos>"], range(1, 4)),
        (["<think>a</think>", "<answer>", " ", "b", " ", "</answer>", "<eos>"], range(3, 4)),
        (["<think>a</think>", "<answer>b</answer>", " ", "<eos>"], range(1, 2)),
    ],
)
def test_a_token_that_holds_a_part_of_the_answer_is_inside(pieces, inside):
    texts = SimpleNamespace(decode=lambda ids: "".join(pieces[i] for i in ids))
    assert family.answer_span(texts, list(range(len(pieces)))) == inside


def test_without_tags_all_but_the_stop_is_the_answer(folder, texts):
    x = drawn(texts, "阳光灿烂")
    (judged,) = confidences(folder, texts, PLAIN, "confidence", [[x]])
    p = plainly(folder, texts, PLAIN, 0.7, x.ids).softmax(-1).sort(-1, descending=True).values
    assert judged.total[0] == pytest.approx(float((p[:, 0] - p[:, 1])[:-1].mean()), rel=1e-4)


def test_confidence_does_not_depend_on_who_else_is_in_the_batch(folder, texts):
    """As it must not on how many ranks share it; a wrong form is not looked at."""
    tasks = [TASK._replace(text=text) for text in ("One.", "Two and three.", "Four.")]
    groups = [[drawn(texts, well_formed(f"阳光 {i} {j}")) for j in range(5)] for i in range(3)]
    groups[1][2] = drawn(texts, "no tags")
    whole = confidences(folder, texts, PAPER, "certainty", groups, tasks)
    for i in range(3):
        (alone,) = confidences(folder, texts, PAPER, "certainty", [groups[i]], [tasks[i]])
        assert alone.total == pytest.approx(whole[i].total, rel=1e-5)
    assert whole[1].total[2] == 0.0 and whole[1].words[2] == "not judged"
    assert min(whole[1].total[:2]) > 0


# ------------------------------------------------------------------------------ pairs and groups


def asked_of(texts, answer, answers, scorer=family.Pairs, prompts=PAPER, step=1, **options):
    sampler = Scripted(texts, answer)
    sampler.stops = options.pop("stops", True)
    sampler.max_length = options.pop("max_length", 4000)
    judge = Judge(sampler, texts, prompts, max_new_tokens=20, **options)
    scorer = family.Pairs(judge) if scorer is family.Pairs else family.Group(judge, scorer, 20)
    return scorer([TASK], [answers], step)[0], sampler.asked


def places(prompt, *words):
    return [prompt.index(f"\n{word}\n") for word in words]


def longer(prompt, i=0):
    """A judge who likes the longer one."""
    _, _, _, first, _, second, _ = prompt.split("```")
    return well_formed("first" if len(first) > len(second) else "second")


def test_the_win_rate_is_over_the_others_in_both_orders(texts):
    answers = ["aaa", "a", None, "aa", "a"]
    scores, asked = asked_of(texts, longer, answers)
    assert [s.value for s in scores] == [1.0, 0.5 / 3, 0.0, 2 / 3, 0.5 / 3]
    assert scores[2].words == "not judged"
    assert len(asked) == len(set(asked)) == 6  # the ordered pairs of three that differ
    assert sum(s.value for s in scores) / 4 == pytest.approx(0.5)


@pytest.mark.parametrize("word", ["first", "Second", " FIRST\n"])
def test_a_judge_who_likes_a_place_likes_nobody(texts, word):
    scores, _ = asked_of(texts, lambda *_: well_formed(word), ["a", "b", "c", "a"])
    assert [s.value for s in scores] == [0.5] * 4


def test_equal_candidates_and_one_that_is_alone_are_not_asked(texts):
    for answers in (["a", "a"], ["a", None]):
        scores, asked = asked_of(texts, longer, answers)
        assert scores[0].value == 0.5 and asked == []


@pytest.mark.parametrize("said", ["the first", "first second", "1", "<answer>first", ""])
def test_a_pair_that_cannot_be_read_is_left_out(texts, said):
    def judge(prompt, i):
        return said if "\nccc\n" in prompt else longer(prompt)

    scores, _ = asked_of(texts, judge, ["aa", "a", "ccc"])
    assert [s.value for s in scores] == [1.0, 0.0, None] and scores[2].words == said
    scores, _ = asked_of(texts, longer, ["aa", "a"], stops=False)  # cut off
    assert [s.value for s in scores] == [None, None]
    scores, asked = asked_of(texts, longer, ["aa", "a"], max_length=300)
    assert scores[0] == Score(None, "too long to judge") and asked == []


def test_the_expected_win_is_the_first_words_share(taught):
    """Against transformers' probabilities."""
    texts = Texts(load_tokenizer(taught))
    judge = Judge(Sampler(load(taught), 4, 150), texts, TOY, "expected")
    pairs = family.Pairs(judge)
    task = Languages(0).task("train", 0)
    a, b = task.reference, " ".join(task.reference.split()[::-1])
    theirs = AutoModelForCausalLM.from_pretrained(taught)
    ids = torch.tensor(texts.encode([TOY.ask_pair(task, a, b)]))
    with torch.no_grad():
        p = theirs(ids).logits[0, -1].double().softmax(-1)
    first, second = (p[texts.one_token(word)] for word in ("first", "second"))
    (score,) = pairs.ask([(*task[:3], a, b)], 1).values()
    assert first + second > 0.5
    assert score.value == pytest.approx(float(first / (first + second)), rel=1e-4)
    quiet = SimpleNamespace(next_logprobs=lambda *_: torch.tensor([[0.2, 0.2]]).log())
    pairs.judge = SimpleNamespace(sampler=quiet)
    assert pairs.read_expected([[1]])[0].value is None


def test_words_of_several_tokens_cannot_be_expected(texts):
    with pytest.raises(
        ValueError, match=r"'first' is . or unknown in this tokenizer: use reading="
    ):
        family.Pairs(Judge(None, texts, PAPER, "expected"))


def in_order(values):
    """A judge that knows what each is worth, and says it in the prompt's order."""

    def judge(prompt, i):
        there = sorted((k for k in values if f"\n{k}\n" in prompt), key=lambda k: places(prompt, k))
        return well_formed(", ".join(str(values[k]) for k in there))

    return judge


def test_a_groups_scores_go_to_those_they_are_for(texts):
    values = {"aa": 10, "bb": 20, "cc": "30/100", "dd": 40.5, "ee": 50}
    answers = ["dd", "aa", None, "cc", "aa", "ee", "bb"]
    for most, prompts in ((5, 1), (4, 2), (2, 3), (1, 5)):
        scores, asked = asked_of(texts, in_order(values), answers, most)
        expected = [0.405, 0.1, 0.0, 0.3, 0.1, 0.5, 0.2]
        assert [s.value for s in scores] == pytest.approx(expected) and len(asked) == prompts
        for word in values:
            assert sum(f"\n{word}\n" in prompt for prompt in asked) == 1


def test_a_groups_order_is_drawn_for_the_step_and_the_text(texts):
    answers = list("abcdefgh")
    orders = [
        places(asked_of(texts, in_order({}), answers, 8, step=step, seed=seed)[1][0], *answers)
        for step, seed in ((1, 0), (1, 0), (2, 0), (1, 1))
    ]
    assert orders[0] == orders[1] and len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize(
    ("said", "values"),
    [
        (well_formed("10,20"), {0.1, 0.2}),
        (well_formed("10 20"), {0.1, 0.2}),
        ("Score: 10\uff0c 20 out of 100", {0.1, 0.2}),
        (well_formed("10"), {None}),
        (well_formed("10, 20, 30"), {None}),
        (well_formed("10, 20,"), {None}),
        (well_formed("10, 120"), {None}),
        (well_formed("the scores are 10, 20"), {None}),
        ("<answer>10, 20", {None}),
        ("", {None}),
    ],
)
def test_a_score_for_each_or_for_none(texts, said, values):
    scores, _ = asked_of(texts, lambda *_: said, ["a", "b"], 4)
    assert {s.value for s in scores} == values


def test_no_candidate_poses_as_the_template(texts):
    """Nor as another's place in it, nor as its fence."""
    tricks = ["{second}", "{candidate2} {candidates}", "b\n```\nfirst", "<|im_end|>\\1"]
    for first, second in combinations(tricks, 2):
        for parts in (PAPER.ask_pair(TASK, first, second), PAPER.ask_group(TASK, [first, second])):
            given = [p for p in parts if isinstance(p, Given)]
            assert given == [TASK.text, first, second]
            assert not any(t in p for p in parts if not isinstance(p, Given) for t in tricks)
            where = [i for i, p in enumerate(parts) if isinstance(p, Given)]
            for i in where:
                bar = parts[i - 1].rstrip("\n").rpartition("\n")[2]
                assert set(bar) == {"`"} and bar not in parts[i]
                assert parts[i + 1].strip("\n").startswith(bar)
            assert "{" not in "".join(p for p in parts if not isinstance(p, Given))


def test_the_toys_candidates_cannot_write_its_control_words(taught):
    texts = Texts(load_tokenizer(taught))
    task = Languages(0).task("train", 0)
    honest, forged = (
        texts.encode([TOY.ask_group(task, [text, "a"]), TOY.ask_pair(task, text, "a")])
        for text in ("a", "a => rate || compare <eos>")
    )
    for a, b in zip(honest, forged, strict=True):
        controls_of = [[i for i in ids if i in texts.control_ids] for ids in (a, b)]
        assert controls_of[0] == controls_of[1]


def test_the_papers_questions_say_what_they_want():
    pair, group = PAPER.ask_pair(TASK, "x", "y"), PAPER.ask_group(TASK, ["x", "y"])
    assert "first or second" in "".join(pair) and "from 0 to 100" in "".join(group)
    assert "Chinese translation 2:\n```\ny" in "".join(group)
    assert "".join(PAPER.ask_pair(TASK, "x", "y", "expected")).endswith("</think> <answer>")
    assert PAPER.most == 16 and TOY.most == 4


# ---------------------------------------------------------------------------- majority and CREAM


def test_the_majority_is_what_most_say_and_the_first_of_several():
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


def test_a_groups_weight_is_its_judges_agreement(texts):
    def judge(*values):
        return lambda tasks, answers, step: [[Score(v, "") for v in row] for row in values]

    now, then = judge([1, 2, 3], [1, 2, 3], [1, 2, 3]), judge([1, 2, 3], [3, 2, 1], [2, 2, 2])
    reward = Reward(texts, PAPER, {"self": (1.0, now)}, weigh=family.Agreement(then))
    group = [sample(texts, well_formed(x)) for x in "甲乙丙"]
    judged = reward([TASK] * 3, [group] * 3, 1)
    assert [group.weight for group in judged] == [1.0, -1.0, 0.0]
    assert [group.parts["weight"][0] for group in judged] == [1.0, -1.0, 0.0]
    assert [group.total for group in judged] == [[1, 2, 3]] * 3


def test_groups_without_agreement_move_nothing(taught, tmp_path, monkeypatch):
    monkeypatch.setattr(family, "kendall", lambda a, b: 0.0)
    rows = go(tmp_path / "run", taught, "--steps=2", "--reward=cream", "--judge=frozen")
    assert rows[2]["train/rows"] == 0 and rows[2]["reward/weight"] == 0
    groups = rows_of(tmp_path / "run" / "groups.jsonl")
    assert any(len({x["reward"] for x in row["samples"]}) > 1 for row in groups)
    assert all(x["advantage"] == 0 for row in groups for x in row["samples"])


def test_the_judge_of_the_step_before_agrees_with_itself(taught, tmp_path):
    words = ["--steps=4", "--lr=0.006", "--samples-per-prompt=8"]
    plain = go(tmp_path / "plain", taught, *words)
    same = go(tmp_path / "same", taught, *words, "--reward=cream", "--judge=previous",
              "--previous-every=1")  # fmt: skip
    for a, b in zip(untimed(plain), untimed(same), strict=True):
        assert {k: v for k, v in b.items() if "weight" not in k} == a
    other = go(tmp_path / "other", taught, *words, "--reward=cream", "--judge=previous")
    assert other[4]["reward/weight"] < 1 and other[4]["train/grad_norm"] > 0


def test_previous_weights_are_live_or_frozen_at_the_ends(taught, tmp_path):
    def trained(name, *words):
        return untimed(go(tmp_path / name, taught, "--steps=3", "--lr=0.01", *words))

    live, frozen = (trained(judge, f"--judge={judge}") for judge in ("live", "frozen"))
    assert trained("each", "--judge=previous", "--previous-every=1") == live
    assert trained("never", "--judge=previous", "--previous-every=4") == frozen
    assert trained("second", "--judge=previous", "--previous-every=2") not in (live, frozen)


@pytest.mark.parametrize("words", [[], ["--reward=cream"]])
def test_a_run_with_a_previous_judge_goes_on_bit_for_bit(taught, tmp_path, words):
    """Ended between two of its refreshes: step 4 is judged by the weights of step 2."""
    words = [*words, "--judge=previous", "--previous-every=2", "--eval-every=3"]
    words += ["--lr=0.003", "--final-lr=1"]  # a rate that does not depend on the last step
    go(tmp_path / "whole", taught, "--steps=6", *words)
    for steps in (3, 6):
        go(tmp_path / "parts", taught, f"--steps={steps}", *words, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# ------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize(
    "words",
    [
        ["certainty"],
        ["confidence", "--temperature=0.8"],
        ["pairs"],
        ["pairs", "--reading=written", "--judge=frozen"],
        ["group", "--judge=frozen"],
        ["cream", "--judge=previous", "--gate=plus-minus-one"],
        ["majority"],
    ],
)
def test_every_reward_runs_on_the_toy(taught, tmp_path, words):
    rows = go(tmp_path / "run", taught, "--steps=2", f"--reward={words[0]}", *words[1:])
    name = "self" if words[0] == "cream" else words[0]
    values = [row[f"reward/{name}"] for row in rows[1:]]
    assert not any(math.isnan(row["eval/self"]) for row in rows if "eval/self" in row)
    if words[0] != "group":  # which so young a toy may not be able to
        assert all(0 <= value for value in values) and values[0] > 0


def test_a_groups_ratings_reach_the_reward(taught, tmp_path, monkeypatch):
    """Whatever so young a toy says: as one that can would say it."""
    bar = load_tokenizer(taught).get_vocab()["||"]

    def write(self, prompts, texts, step, most):
        assert most >= max(p.count(bar) for p in prompts) + 1
        return [[(" ".join(["80", "40", "100", "20"][: p.count(bar)]), True)] for p in prompts]

    monkeypatch.setattr(Judge, "write", write)
    rows = go(tmp_path / "run", taught, "--steps=1", "--reward=group")
    assert 0.4 < rows[1]["reward/group"] < 1 and rows[1]["judge/invalid"] == 0


@pytest.mark.parametrize(
    "words", [["pairs"], ["pairs", "--chat"], ["group"], ["group", "--chat"], ["confidence"]]
)
def test_the_papers_prompts_work_with_every_reward(pupil, tmp_path, words):
    file = tmp_path / "texts.jsonl"
    rows = [{"text": corpora.english("news", i), "source": "en", "target": "zh"} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward, *more = words
    rows = test_problem.go(
        pupil, file, tmp_path / "run", "--measures=none", f"--reward={reward}", *more
    )
    assert f"reward/{reward}" in rows[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward=pairs"], "the toy must be taught to compare: use --toy-skills compare"),
        (
            ["--reward=group", "--toy-skills=compare"],
            "the toy must be taught to rate: use --toy-sk",
        ),
        (["--reward=cream"], "--reward cream compares the live judge with another .* --judge prev"),
        (
            ["--reward=certainty", "--judge=ema"],
            "the policy's own probabilities: leave --judge ema",
        ),
        (
            ["--reward=pairs", "--judge-model=x/y"],
            "--judge-model has nothing to judge with --rewar",
        ),
        (
            ["--reward=majority", "--judge-model=x", "--judge-url=http://x", "--reading=written"],
            "--judge-model has nothing to judge with --reward majority",
        ),
        (["--previous-every=3"], "--previous-every has no effect without --judge previous"),
        (["--judge=previous", "--previous-every=0"], "--previous-every 0 must be at least 1"),
        (["--toy-skills=sing,rate"], "--toy-skills sing: use compare, rate, write"),
        (["--preset=ssr-zero-7b", "--toy-skills=rate"], "--toy-skills has no effect without"),
        (["--judge-only=x", "--reward=pairs"], "--reward has no effect with --judge-only"),
    ],
)
def test_what_cannot_work_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        ssr.parse(words)


def test_a_toy_that_was_not_taught_is_refused(tmp_path):
    toy = make(Recipe(tokens=2e3, batch=4), tmp_path)
    with pytest.raises(SystemExit, match="must be taught to rate: use --toy-skills rate"):
        go(tmp_path / "run", toy, "--reward=group")


def test_a_plan_counts_who_is_compared_and_how_much_is_asked():
    def parts(**changes):
        s = ssr.dataclasses.replace(ssr.parse(["--preset=ssr-zero-0.5b", "--dry-run"]), **changes)
        template = ssr.judge_template(s)
        k = plan.Work(s, plan.shape_of("Qwen/Qwen2.5-0.5B"), 1, 1, template, True)
        return plan.memory(k), plan.seconds(k, plan.MACHINES["h100"])

    (live, time), (ema, _) = parts(), parts(judge="ema")
    previous, twice = parts(judge="previous", reward="cream")
    assert previous["the previous weights' judge"] == ema["the EMA and its judge"]
    assert twice["judge"] == pytest.approx(2 * time["judge"])
    assert parts(reward="pairs")[0]["its KV cache"] > live["its KV cache"]
    group = parts(reward="group", reading="expected")[0]["its KV cache"]
    assert group > parts(reward="pairs", reading="expected")[0]["its KV cache"]
    frozen = [
        parts(reward="group", judge="frozen", reading=reading)[0]["the starting weights"]
        for reading in ("written", "expected")
    ]
    assert frozen[0] == frozen[1]  # a group's scores are always written


# ------------------------------------------------------------------------------ what is taught


def test_skills_say_the_truth(monkeypatch):
    corpus = Corpus(Languages(0), Recipe(skills=SKILLS), "some")
    tasks, real = [], Corpus.sentence
    monkeypatch.setattr(
        Corpus, "sentence", lambda self: tasks.append(real(self)) or tasks[-1]
    )  # fmt: skip
    for _ in range(200):
        for make_row in (corpus.comparison, corpus.rating):
            prompt, (*answer, end) = make_row()
            reference = tasks[-1][1].reference
            assert end == "<eos>" and prompt[-1] == "=>"
            texts = " ".join(prompt[:-1]).split("||")[1:]
            values = [quality(text, reference) for text in texts]
            if prompt[0] == "compare":
                better, worse = values if answer == ["first"] else values[::-1]
                assert len(texts) == 2 and better > worse
            else:
                assert 2 <= len(texts) <= 4
                assert [int(x) for x in answer] == [round(10 * v) * 10 for v in values]
        (control, _, number, _), words = corpus.writing()
        assert control == "write" and int(number) == len(words) - 1


def test_skills_leave_the_toy_that_has_none_as_it_was():
    """Its texts are the same, too, beside others; and those are not counted."""
    plain, more = (Corpus(Languages(0), Recipe(skills=x)).kinds() for x in ((), SKILLS))
    assert [kind.name for kind in plain] == ["translating", "judging"]
    assert [kind.counted for kind in more] == [True, True, False, False, False]
    for _ in range(20):
        rows = [[kind.row() for kind in kinds] for kinds in (plain, more)]
        assert rows[0] == rows[1][:2]
    assert skills_of("rate, compare") == ("compare", "rate") and skills_of("") == ()


def test_the_table_has_the_rows_that_its_toy_can_be_asked():
    few, all_rows = controls.rows_for(()), controls.rows_for(("compare", "rate"))
    assert all_rows == controls.ROWS | controls.FAMILY
    assert set(all_rows) - set(few) == {"pairwise win rate (SPO)", "group judging, one prompt"}
