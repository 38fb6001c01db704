"""What a question is worth: the formulas by hand, repetition against slower ways to the same."""

import itertools
import math
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest

from challenge import Challenge, bleu, percentiles, repetition, words_of, worth
from sampler import Sample


def like(*texts, alike=0.5):
    return repetition(list(texts), alike)


# ------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    ("share", "penalty", "value"),
    [
        (0.5, 0, 1), (0, 0, 0), (1, 0, 0), (0.8, 0, 0.4), (0.2, 0, 0.4), (0.3, 0, 0.6),
        (0.8, 0.1, 0.3), (0.5, 0.25, 0.75), (0.8, 0.5, 0), (1, 0.1, 0),
    ],
)  # fmt: skip
def test_the_papers_reward_is_highest_at_one_half_and_never_below_zero(share, penalty, value):
    assert worth(share, penalty, True, "paper") == pytest.approx(value)


@pytest.mark.parametrize(
    ("share", "penalty", "value"),
    [(0.5, 0, 0.5), (0.8, 0, 0.2), (0.3, 0.1, 0.2), (1, 0.25, -0.25), (0, 1, -1)],
)
def test_the_released_reward_is_the_minoritys_share_and_may_be_negative(share, penalty, value):
    assert worth(share, penalty, True, "released") == pytest.approx(value)


def test_what_is_no_question_is_worth_nothing_or_less():
    assert worth(0.5, 0.1, False, "paper") == worth(0.5, 0.1, False, "percentile") == 0
    assert worth(0.5, 0.25, False, "released") == -1.25


def test_a_percentile_is_the_share_of_the_others_that_are_higher():
    assert percentiles([0.1, 0.9, 0.5]) == [1, 0, 0.5]
    assert percentiles([0.3, 0.3, 0.7]) == [0.75, 0.75, 0]
    assert percentiles([0.2] * 5) == [0.5] * 5
    assert percentiles([0.4]) == [0] and percentiles([]) == []


# ----------------------------------------------------------------------------------- repetition


def naive_bleu(hypothesis: list[str], reference: list[str]) -> float:
    logs = []
    for n in range(1, 5):
        of, other = (
            [tuple(x[i : i + n]) for i in range(len(x) - n + 1)] for x in (hypothesis, reference)
        )
        if not of:
            break
        same = sum(min(of.count(gram), other.count(gram)) for gram in set(of))
        logs.append(math.log((same or 0.1) / len(of)))
    short = min(0.0, 1 - len(reference) / len(hypothesis))
    return math.exp(sum(logs) / len(logs) + short)


def random_texts(rng: Random, count: int) -> list[str]:
    return [" ".join(rng.choices("abcde", k=rng.randint(1, 9))) for _ in range(count)]


def test_bleu_is_what_counting_by_hand_gives():
    texts = random_texts(Random(1), 12)
    expected = [[naive_bleu(a.split(), b.split()) for b in texts] for a in texts]
    np.testing.assert_allclose(bleu(texts), expected)


def test_bleu_is_sacrebleus_where_anything_is_the_same():
    from sacrebleu import sentence_bleu

    texts = random_texts(Random(2), 12)
    found, compared = bleu(texts), 0
    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            if set(a.split()) & set(b.split()):
                score = sentence_bleu(
                    a, [b], tokenize="none", use_effective_order=True, smooth_method="floor"
                ).score
                assert found[i, j] == pytest.approx(score / 100)
                compared += 1
    assert compared > 50


def naive_clusters(texts: list[str], alike: float) -> list[float]:
    """All texts one by one, all pairs of clusters anew each time."""
    split = [words_of(text) for text in texts]
    apart = [
        [1 - (naive_bleu(a, b) + naive_bleu(b, a)) / 2 if a != b else 0.0 for b in split]
        for a in split
    ]
    clusters = [[i] for i in range(len(texts))]
    while len(clusters) > 1:
        far, a, b = min(
            (sum(apart[i][j] for i in x for j in y) / (len(x) * len(y)), k, m)
            for m, y in enumerate(clusters)
            for k, x in enumerate(clusters[:m])
        )
        if far >= alike:
            break
        clusters[a] += clusters.pop(b)
    size = {i: len(cluster) for cluster in clusters for i in cluster}
    return [size[i] / len(texts) for i in range(len(texts))]


@pytest.mark.parametrize("alike", [0.3, 0.5, 0.7])
def test_clusters_are_those_of_average_linkage(alike):
    shares = set()
    for seed in range(4):
        texts = random_texts(Random(seed), 16)
        texts += texts[:3]  # copies count as often as they are there
        found = repetition(texts, alike)
        assert found == pytest.approx(naive_clusters(texts, alike))
        shares |= set(found)
    assert len(shares) > 2


def test_equal_questions_are_one_cluster_and_different_ones_are_alone():
    assert like(*["How many primes are below 30?"] * 5) == [1.0] * 5
    different = ["How many primes are below 30?", "Integrate x sin x.", "a b c d", "2+2", "你好吗"]
    assert like(*different) == [0.2] * 5
    assert like("a b c d", "x y", "a b c d") == pytest.approx([2 / 3, 1 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("求方程的所有实数解的和", "求方程的所有实数解的积"),
        ("2x+3=7", "2x+3=8"),
        ("x^2+y^2=25", "x^2+y^2=26"),
        ("素数はいくつありますか", "素数はいくつありますよ"),
        ("Find the sum of all roots of x.", "Find the sum of all zeros of x."),
    ],
)
def test_near_copies_are_alike_though_no_space_divides_them(one, other):
    assert like(one, other) == [1.0, 1.0]
    assert like(one, one) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("求方程的所有实数解的和", "一共有多少个不同质数"),
        ("2x+3=7", "sin(t)/5<9"),
        ("How many primes are below 30?", "Integrate x sin x from zero to one."),
        ("a", "b"),
        ("", "a b c"),
        ("x^2", "x^2+3y-sin(z)/7=0, find every integer z below 40"),
    ],
)
def test_unrelated_questions_are_not_alike(one, other):
    assert like(one, other) == [0.5, 0.5]


def test_letters_and_digits_are_words_of_their_own():
    assert words_of("Find 12x+3") == ["Find", "1", "2", "x", "+", "3"]
    assert words_of("质数p") == ["质", "数", "p"] and words_of(" \n") == []


def test_texts_without_words_are_alike_only_when_they_are_equal():
    assert like("", "") == [1.0, 1.0] and like("") == [1.0]


def test_the_order_of_a_batch_does_not_matter():
    """Nor where a text is as near to one as to another: which of them it joins is the text's."""
    texts = ["a b c d e f", "a b c d e f g h", "c d e f g h"]
    first = dict(zip(texts, like(*texts, alike=0.36), strict=True))
    assert sorted(first.values()) == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    for order in itertools.permutations(texts):
        assert dict(zip(order, like(*order, alike=0.36), strict=True)) == first


# -------------------------------------------------------------------------------- a whole batch

SETTINGS = SimpleNamespace(alike=0.5, repetition=1.0, seed=0, challenge="paper")


class Known:
    """A Solver whose agreement on a question is known, and its game."""

    def __init__(self, agreed: dict[str, float]):
        self.agreed = agreed

    def question(self, sample, request):
        return sample if sample in self.agreed or sample == "refused" else None

    def agreement(self, questions):
        return {q: (self.agreed[q], "label") for q in set(questions) if q in self.agreed}

    def words(self, question):
        return question


AGREED = {"f c a kip": 0.5, "a a a lom mev": 0.8, "b d e dim": 1.0, "j j h hex hex": 0.3}
GROUPS = [
    ["f c a kip", "a a a lom mev"], ["junk", "f c a kip"], ["b d e dim", "refused"],
    ["j j h hex hex", "a a a lom mev"],
]  # fmt: skip


def challenge(name, groups=GROUPS, agreed=AGREED, parts=1, **changes):
    """What `parts` ranks say of their groups, finished together."""
    known = Known(agreed)
    reward = Challenge(SimpleNamespace(**vars(SETTINGS) | {"challenge": name} | changes),
                       known, known)  # fmt: skip
    judged = [None] * len(groups)
    for rank in range(parts):
        judged[rank::parts] = reward([None] * len(groups[rank::parts]), groups[rank::parts], 1)
    return reward.finish(judged)


def test_a_batch_by_hand():
    found = challenge("paper")
    assert [row.parts["format"] for row in found] == [[1, 1], [0, 1], [1, 0], [1, 1]]
    twice = 1 - 2 / 8
    assert found[0].total == pytest.approx([twice, 0.4 - 2 / 8])
    assert found[1].total == pytest.approx([0, twice])
    assert found[2].total == [0, 0]
    assert found[3].total == pytest.approx([0.6 - 1 / 8, 0.4 - 2 / 8])
    assert found[0].parts["agreement"] == [0.5, 0.8] and found[0].parts["repetition"] == [0.25] * 2
    released = challenge("released")
    assert released[0].total == pytest.approx([0.5 - 0.25, 0.2 - 0.25])
    assert released[2].total[1] == pytest.approx(-1 - 0.25)  # two are no question: alike
    assert challenge("paper", repetition=0.0)[0].total == pytest.approx([1, 0.4])


def test_the_percentile_looks_at_what_is_a_question_alone():
    found = challenge("percentile", repetition=0.0)
    # Of 0.5 0.8 0.5 1.0 0.3 0.8: who is refused does not stand at 0.
    assert found[0].total == pytest.approx([3.5 / 5, 1.5 / 5])
    assert found[2].total == [0, 0] and found[3].total == pytest.approx([1, 1.5 / 5])


@pytest.mark.parametrize("name", ["paper", "released", "percentile", "random"])
def test_a_batch_is_worth_the_same_whichever_rank_judged_what(name):
    assert challenge(name) == challenge(name, parts=2) == challenge(name, parts=4)
    alone = [challenge(name, groups=[group])[0] for group in GROUPS]
    assert alone != challenge(name)  # there is something to see


def test_chance_does_not_know_the_agreement():
    one = challenge("random")
    other = challenge("random", agreed={q: 1 - p for q, p in AGREED.items()})
    assert [row.total for row in one] == [row.total for row in other]
    values = [x for row in one for x in row.total]
    assert len(set(values)) == len(values) and all(0 <= x < 1 for x in values)
    assert challenge("random", seed=1)[0].total != one[0].total


def test_a_batch_without_a_question_is_worth_nothing():
    found = challenge("percentile", groups=[["junk", "junk"]])
    assert found[0].total == [0, 0] and found[0].words == ["", ""]


# ----------------------------------------------------------------------------------- a Solver


def test_a_question_that_was_cut_off_or_is_too_long_for_the_solver_is_none(programs):
    from tests.test_rzero import player

    asked = player(programs, max_prompt_tokens=9)
    vocabulary = asked.texts.tokenizer.get_vocab()

    def written(text, stopped=True):
        ids = [vocabulary[word] for word in text.split()]
        return asked.question(Sample([*ids, 1] if stopped else ids, [], stopped), None)

    assert written("f c a gor hex") == "f c a gor hex"  # 9 tokens, as it is posed
    assert written("f c a gor hex jun") is None
    assert written("f c a gor hex", stopped=False) is None


def test_agreement_does_not_depend_on_what_else_is_asked(programs):
    from tests.test_rzero import player

    asked = player(programs)
    questions = ["f c a gor", "a a a fal", "b d e dim", "h h g gor"]
    together = asked.agreement([*questions, *questions])
    assert list(together) == sorted(questions)
    for q in questions:
        assert asked.agreement([q]) == {q: together[q]}
    assert asked.agreement([]) == {}
