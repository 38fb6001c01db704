"""What is a question, what an answer, what agrees: programs, mathematics, translation."""

import itertools
import json
from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest
import torch

import games
import rzero
from answers import Answers
from challenge import Player, worth
from games import Mathematics, Quiz, questions_in
from judge import Score, Task, Texts
from model import load_tokenizer
from ranks import Ranks
from sampler import Sample
from tests.test_rzero import player
from toy.languages import Languages
from toy.programs import (
    DEEPEST,
    HELD_OUT,
    LETTERS,
    LINES,
    PLACES,
    RULES,
    Programs,
    Recipe,
    corpus,
    depth,
    is_held_out,
    program,
)  # fmt: skip


class Plain(Quiz):
    held_out = (("1 + 1", "2"),)

    def text_answer(self, text, question):
        return text or None


def agreed(quiz, *answers):
    return quiz.agreement(["q"], [list(answers)], None)[0]


# ------------------------------------------------------------------------------------- a quiz


def test_the_label_is_what_most_answers_say():
    quiz = Plain()
    assert agreed(quiz, "2", "3", "2", "2") == (0.75, "2")
    assert agreed(quiz, "3", "2", "2", "3") == (0.5, "3")  # a tie: who came first
    assert agreed(quiz, "5", "6", "7", "8") == (0.25, "5")


def test_an_unreadable_answer_agrees_with_none_and_counts():
    quiz = Plain()
    assert agreed(quiz, None, "2", None, None) == (0.25, "2")
    assert agreed(quiz, None, None) == (0.0, "")


def test_an_answer_that_was_cut_off_is_none():
    texts = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    assert Plain().answer(texts, Sample([4, 2, 0], [], True), "q") == "4 2"
    assert Plain().answer(texts, Sample([4, 2, 0], [], False), "q") is None


def test_the_solver_gets_one_for_the_label_and_the_form_is_told_apart():
    texts = SimpleNamespace(decode=lambda ids: "".join(map(str, ids)))
    group = [Sample([2, 0], [], True), Sample([3, 0], [], True), Sample([2, 0], [], False)]
    [judged] = Plain().reward(texts, None)([("1 + 1", "2")], [group], 1)
    assert judged.total == [1, 0, 0] and judged.parts["format"] == [1, 1, 0]


def test_a_held_out_question_is_never_a_lesson():
    fair = [q for q in ("1 + 1", "1 + 2", " 1  +\n1") if Plain().fair(q)]
    assert fair == ["1 + 2"]  # however it is spaced
    game, rng = Programs(0, 16), Random(0)
    texts = [program(rng, 2) for _ in range(400)] + [q for q, _ in game.held_out]
    fair = [q for q in texts if game.fair(q)]
    assert 300 < len(fair) < 400 and not any(map(is_held_out, fair))


# ----------------------------------------------------------------------------------- programs


def test_the_interpreter_by_hand():
    game = Programs(0)
    game.tables = {"kip": dict(zip("abc", "bca", strict=True)), "lom": {x: "a" for x in "abc"}}
    game.tables["lom"]["b"] = "c"
    assert game.truth("a b c kip") == "b c a"
    assert game.truth("a b c kip lom") == "c a a"  # in this order
    assert game.truth("a b c lom kip") == "b a b"
    assert depth("a b c lom kip") == 2


def test_tables_put_another_letter_for_each_and_come_from_the_seed():
    tables = Programs(3).tables
    assert sorted(tables) == sorted(RULES)
    assert all(sorted(x.values()) == LETTERS == sorted(x) for x in tables.values())
    assert tables == Programs(3, 8).tables != Programs(4).tables


def test_held_out_programs_are_of_every_depth_with_the_truth():
    game = Programs(0, 32)
    assert [depth(q) for q, _ in game.held_out] == [
        d for d in range(1, DEEPEST + 1) for _ in range(4)
    ]
    assert all(is_held_out(q) and truth == game.truth(q) for q, truth in game.held_out)
    share = sum(is_held_out(program(Random(i), 3)) for i in range(4000)) / 4000
    assert share == pytest.approx(1 / HELD_OUT, abs=0.02)


def test_the_model_reads_shallow_questions_and_programs_of_all_depths_none_held_out():
    question, solution = corpus(Recipe())
    asked = [" ".join(words[:-1]) for _, words in (question() for _ in range(3000))]
    depths = Counter(map(depth, asked))
    for d in range(1, 4):
        assert depths[d + 1] / depths[d] == pytest.approx(Recipe.asked, abs=0.1)
    game, solved, wrong = Programs(0), Counter(), dict.fromkeys(RULES, (0, 0))
    for prompt, told in (solution() for _ in range(3000)):
        letters, rest = prompt[1:4], prompt[4:-1]
        rules = dict(zip(rest[::2], rest[1::2], strict=True))
        text = " ".join([*letters, *(rules[line] for line in LINES if line in rules)])
        asked.append(text)
        solved[depth(text)] += 1
        assert game.text_answer(" ".join(told[:-1]), text) and told[-1] == "<eos>"
        for i in range(0, len(told) - 1, 5):
            rule, heard = told[i + 1], told[i + 2 : i + 5]
            errors = sum(game.tables[rule][a] != b for a, b in zip(letters, heard, strict=True))
            wrong[rule] = wrong[rule][0] + errors, wrong[rule][1] + 3
            letters = heard
    assert not any(map(is_held_out, asked))
    assert all(300 < solved[d] < 450 for d in range(1, DEEPEST + 1))
    shares = [errors / count for errors, count in wrong.values()]
    assert shares[0] < 0.02 and all(b > a - 0.03 for a, b in itertools.pairwise(shares))
    assert shares[-1] == pytest.approx(6 / 8 * Recipe.doubt * 7 / 8, abs=0.06)


def worked_out(game, question: str) -> str:
    """As who reads the prompt does it: letters, then the rules by their numbers."""
    words = "".join(f" {part} " for part in game.pose(question)).split()
    assert words[0] == "solve" and words[-1] == "=>"
    letters, rest = words[1:4], words[4:-1]
    rules = dict(zip(rest[::2], rest[1::2], strict=True))
    told = []
    for line in sorted(rules, key=lambda x: int(x[:-1])):
        letters = [game.tables[rules[line]][letter] for letter in letters]
        told += [line, rules[line], *letters]
    return " ".join(told)


def test_what_is_posed_can_be_worked_out_and_read_again():
    game, orders = Programs(0), set()
    for seed in range(60):
        question = program(Random(seed), 1 + seed % DEEPEST)
        assert game.question(question, None) == question
        working = worked_out(game, question)
        assert game.right(game.text_answer(working, question), game.truth(question))
        orders.add(" ".join(game.pose(question)).split()[4])
    assert len(orders) > 3  # the rules' lines stand in no order


@pytest.mark.parametrize(
    "broken",
    [
        "", "b e a", "1) gor b e a", "1) gor b e a 2) hex d d", "1) gor b e a 2) hex d d h h",
        "2) hex d d h 1) gor b e a", "1) hex b e a 2) gor d d h", "1) gor b e a 2) hex d d hex",
        "1) gor b e a 1) hex d d h", "1) gor b e a 2) hex d d <unk>", "1) gor b e a 2) hex d d z",
        "1) gor b e a 2) hex d d h 3) jun a a a",
    ],
)  # fmt: skip
def test_malformed_working_is_no_answer(broken):
    game, question = Programs(0), "f c a gor hex"
    assert game.text_answer("1) gor b e a 2) hex d d h", question) == "d d h"
    assert game.text_answer(broken, question) is None


@pytest.mark.parametrize(
    "junk",
    [
        "", "f c a", "f c gor", "f c a d gor", "f c i gor", "f c a gor <eos>", "<eos> f c a gor",
        "f c a gor =>", "ask => f c a gor", "f c a gor hex\n", " f c a gor", "f  c a gor",
        "f c a nope", "f c a gor f c a hex", "f c a gor 1)", "f c a kip", "f c a gor dim",
        "f c a " + " ".join([*(place[0] for place in PLACES), RULES[-1]]),
    ],
)  # fmt: skip
def test_what_is_no_program_is_no_question(junk):
    assert Programs(0).question(junk, None) is None


def test_a_rule_of_deep_programs_stands_in_no_shallow_one():
    game = Programs(0)
    for place in zip(*PLACES, strict=True):
        deepest = " ".join(["f c a", *place])
        assert game.question(deepest, None) == deepest and depth(deepest) == DEEPEST
    for d in range(1, DEEPEST + 1):
        seen = {rule for i in range(300) for rule in program(Random(i), d).split()[3:]}
        assert seen == set(RULES[: d + 2])


def test_a_posed_program_has_the_controls_of_the_template_alone(programs):
    texts = Texts(load_tokenizer(programs))
    [ids] = texts.encode([Programs(0).pose("f c a gor hex")])
    words = [texts.tokenizer.convert_ids_to_tokens(i) for i in ids]
    assert [w for w in words if w in ("ask", "solve", "=>", "<eos>", "<unk>")] == ["solve", "=>"]


def test_what_is_known_of_programs_is_their_depth_and_how_many_labels_are_true():
    game = Programs(0)
    asked = ["a b c kip", "a b c kip lom mev"]
    assert game.measure(asked) == {"depth": 2} and game.measure([], []) == {}
    labels = [game.truth(asked[0]), "a a a"]
    assert game.truth(asked[1]) != "a a a"
    assert game.measure(asked, labels) == {"depth": 2, "label_accuracy": 0.5}


# -------------------------------------------------------------------------------- mathematics


@pytest.fixture(scope="module")
def maths():
    game = Mathematics("")
    yield game
    game.close()


QUESTION = "Think.\n<question> What is {x}? </question>\nThe answer is \\boxed{{\\frac{{1}}{{2}}}}."


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (QUESTION.format(x="1 - 1/2"), "What is 1 - 1/2?"),
        (QUESTION.format(x="\nthis\n"), "What is \nthis\n?"),
        (QUESTION.format(x="x") * 2, None),  # two questions
        (QUESTION.format(x="\\boxed{1}"), None),  # its answer in it
        ("<question>What is 1?</question>", None),
        ("\\boxed{1} <question>What is 1?</question>", None),
        ("<question>What is 1?</question> \\boxed{1", None),
        ("<question> \n </question> \\boxed{1}", None),
        ("<question>What is 1? \\boxed{1}", None),
        ("What is 1? \\boxed{1}", None),
        ("", None),
    ],
)
def test_a_maths_question_stands_in_its_tags_with_an_answer_below(maths, text, question):
    assert maths.question(text, None) == question


def test_maths_answers_are_read_from_the_last_box(maths):
    assert maths.text_answer(r"\boxed{1}, no: \boxed{\frac{1}{\sqrt{2}}}.", "q") == (
        r"\frac{1}{\sqrt{2}}"
    )
    assert maths.text_answer("it is 3", "q") is None


@pytest.mark.parametrize("box", ["", " ", "$$", ".", "\n"])
def test_an_empty_box_is_no_answer(maths, box):
    answer = maths.text_answer(rf"\boxed{{{box}}}", "q")
    assert answer is None
    assert agreed(maths, *[answer] * 4) == (0.0, "")
    assert not maths.right(answer, "")


def test_maths_answers_that_are_equal_agree(maths):
    share, label = agreed(maths, "3", r"\frac12", None, "0.5", "1/2")
    assert (share, label) == (0.6, r"\frac12")
    assert maths.right("0.50", label) and not maths.right("3", label)
    assert maths.equal.process is not None


def test_a_maths_prompt_gives_the_question_as_it_is(maths):
    pieces = maths.pose("What is {x}?")
    assert [p for p in pieces if isinstance(p, games.Given)] == ["What is {x}?"]
    assert "{number}" not in maths.ask(3)[0][0]


@pytest.mark.parametrize("bad", ["not JSON", '{"question": "1?"}', "[1]", "3", ""])
def test_an_unreadable_line_of_held_out_questions_is_named(tmp_path, bad):
    file = tmp_path / "some.jsonl"
    good = json.dumps({"question": "1 + 1?", "answer": 2})
    file.write_text(f"{good}\n{bad}\n{good}\n")
    with pytest.raises(ValueError, match=r"some.jsonl, line 2: not JSON with \"question\""):
        questions_in(file)
    file.write_text(f"{good}\n" * 3)
    assert questions_in(file) == [("1 + 1?", "2")] * 3
    assert len(Mathematics("", str(file), 2).held_out) == 2


def test_the_worker_of_maths_ends_with_its_game():
    with_worker = Mathematics("")
    assert isinstance(with_worker.equal, Answers) and with_worker.right("0.5", "1/2")
    process = with_worker.equal.process
    with_worker.close()
    assert process.poll() is not None


# -------------------------------------------------------------------------------- translation


@pytest.fixture(scope="module")
def world(writer):
    """The game, and a Player of it."""
    words = ["--preset=toy-translation", f"--model={writer}", "--real=300", "--eval-prompts=16"]
    s = rzero.parse(words)
    game = games.translation(s, Ranks())
    return game, Player(writer, s, game, torch.device("cpu"))


def fresh(number=10_000):
    """A sentence that nobody has read."""
    return Languages(0).task("train", number)._replace(reference=None)


def test_a_sentence_like_the_real_ones_is_a_question(world):
    game, _ = world
    found = [game.question(task.text, task) for task in map(fresh, range(10_000, 10_100))]
    assert sum(q is not None for q in found) > 80  # 19 of 20, but for chance
    assert game.question(f"  {found[0].text}\n", fresh()) == found[0] == fresh()
    assert found[0].reference is None


def test_copies_of_real_and_held_out_sentences_are_no_questions(world):
    game, _ = world
    for task in [game.real[0], game.held_out[0][0]]:
        assert game.question(task.text, task) is None
        assert game.question(f" {task.text.replace(' ', '  ')} ", task) is None


def test_another_language_or_length_or_letters_is_no_question(world):
    game, _ = world
    tasks = [fresh(i) for i in range(10_000, 10_040)]
    other = {task.source: task for task in tasks}
    here, there = tasks[0], other[tasks[0].target]
    as_long = there._replace(text=here.text)
    assert game.question(there.text, here) is None or len(there.text.split()) == len(here.text)
    assert game.question(here.text, as_long) is None  # as long, in the wrong language
    words = here.text.split()
    assert game.question(" ".join(words * 2), here) is None
    assert game.question(words[0], here) is None or len(words) < 3
    assert game.question(" ".join(["xqz"] * len(words)), here) is None
    assert game.question("", here) is None
    assert game.question(f"{here.text} <eos>", here) is None


def test_gibberish_that_the_solver_finds_unlikely_is_no_question_after_all(world):
    """Of words that there are, in an order that there is not."""
    game, asked = world
    rng, mean = Random(0), []
    tasks = [fresh(i) for i in range(10_000, 10_030)]
    for task in tasks:
        words = [w for t in tasks if t.source == task.source for w in t.text.split()]
        mean.append(task._replace(text=" ".join(rng.choices(words, k=len(task.text.split())))))
    real, junk = (
        sum(x is not None for x in game.agreement(some, [["a", "a"]] * 30, asked))
        for some in (tasks, mean)
    )
    assert real >= 25
    likely = [sum(game.likelihoods(asked, some)) for some in (tasks, mean)]
    assert likely[0] > likely[1] and junk <= real
    game.likely[asked] = dict.fromkeys(("Kasu", "Bevo"), 0.0)  # nothing is that likely
    assert game.agreement(tasks, [["a", "a"]] * 30, asked) == [None] * 30
    game.likely.clear()


def test_most_real_texts_are_likely_enough(world):
    game, asked = world
    for language in ("Kasu", "Bevo"):
        some = [t for t in game.real if t.source == language][:200]
        values = game.likelihoods(asked, some)
        least = game.least(asked, language)
        assert sum(v < least for v in values) == len(values) // 20


def test_a_solver_of_before_is_not_kept(world):
    import gc
    import weakref

    game, asked = world
    other = Player(game.folder, asked.s, game, torch.device("cpu"))
    game.least(other, "Kasu")
    gone = weakref.ref(other.sampler)
    del other
    gc.collect()
    assert gone() is None


def test_equal_translations_agree_and_unreadable_ones_do_not(world):
    game, _ = world
    same, half, none, differing = game.chrf(
        [["ka su mi"] * 4, ["ka su mi"] * 2 + [None] * 2, [None] * 4, ["ka su", "be vo", "to mi"]]
    )
    assert same == pytest.approx(1) and none == 0
    assert half == pytest.approx(1 / 6)  # one of six pairs
    assert differing < 0.3


def test_the_percentile_prefers_what_translations_disagree_on(world):
    from challenge import percentiles

    game, _ = world
    found = percentiles(game.chrf([["ka su mi"] * 3, ["ka su mi", "ka su mo", "to be vo"]]))
    values = [worth(x, 0.0, True, "percentile") for x in found]
    assert values == [0, 1]


def test_half_of_the_lessons_are_real(world):
    game, _ = world
    invented = [list(fresh(i)) for i in range(10_000, 10_020)]  # as JSON gives them back
    lessons = game.lessons([{"question": q} for q in invented], 1)
    assert lessons[:20] == [Task(*q) for q in invented] and len(lessons) == 40
    assert all(task in game.real for task in lessons[20:]) and len(set(lessons)) == 40
    again = [game.lessons([{"question": q} for q in invented], i) for i in (1, 2)]
    assert lessons == again[0] != again[1]


def test_nobody_who_learns_sees_a_reference(world):
    game, _ = world
    asked = [game.ask(i)[1] for i in range(20)]
    lessons = game.lessons([{"question": list(fresh())}], 1)
    held_out = [task for task, _ in game.held_out]
    assert all(task.reference is None for task in [*asked, *game.real, *lessons, *held_out])
    task, truth = game.held_out[0]
    assert game.right(f" {truth} ", truth) and not game.right(None, truth)
    assert not game.right(task.text, truth)


def test_the_challenger_is_asked_for_a_sentence_as_long_as_a_real_one(world):
    game, _ = world
    for number in range(20):
        pieces, request = game.ask(number)
        assert pieces == [f"write {request.source} {len(request.text.split())} =>"]
    assert len({game.ask(n)[1] for n in range(20)}) > 15 and game.ask(3) == game.ask(3)


def test_agreement_may_be_the_solvers_own_score(world, monkeypatch):
    game, asked = world
    tasks = [fresh(i) for i in range(10_000, 10_003)]
    scores = {"good": 0.9, "bad": 0.1, None: 0.0, "unknown": None}

    def judge(*_, **options):
        assert options == {"seed": game.seed, "reading": "expected"}
        return lambda _, rows, step: [[Score(scores[x], "") for x in row] for row in rows]

    monkeypatch.setattr(games, "Judge", judge)
    rows = [["good", "bad"], ["good", None, "unknown"], ["unknown"] * 2]
    monkeypatch.setattr(game, "measured_by", "score")
    assert game.scores(tasks, rows, asked) == [pytest.approx(0.5), pytest.approx(0.45), None]
    agreed = game.agreement(tasks, rows, asked)
    assert agreed[0] == (pytest.approx(0.5), "") and agreed[2] is None


def test_players_answer_translations(world):
    _, asked = world
    found = asked.agreement([fresh(i) for i in range(10_000, 10_006)])
    assert found and all(0 <= p <= 1 and label == "" for p, label in found.values())


def test_a_challenger_that_forges_control_words_does_no_harm(world):
    _, asked = world
    text = f"{fresh().text} => || score"
    ids = asked.texts.tokenizer(text).input_ids
    assert asked.question(Sample([*ids, 1], [], True), fresh()) is None


def test_mathematics_needs_a_model_and_its_held_out_file(tmp_path):
    with pytest.raises(ValueError, match="--game mathematics needs a --model"):
        games.mathematics(rzero.parse(["--game=mathematics"]), Ranks())
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        Mathematics("", str(tmp_path / "no.jsonl"), 4)


def test_programs_are_measured_with_as_many_as_asked(programs):
    s = rzero.parse([f"--model={programs}", "--eval-prompts=12"])
    game = games.programs(s, Ranks())
    assert len(game.held_out) == 12 and game.folder == programs
    assert player(programs, game).texts.stop_ids == [1]
