"""The Challenger's reward: formulas by hand, BLEU and clusters against slower implementations."""

import itertools
import math
from random import Random
from types import SimpleNamespace

import pytest

from rzero.challenger import (
    ChallengerReward,
    challenger_reward,
    cluster_shares,
    pairwise_bleu,
)
from sampler import Sample
from tests.test_rzero import make_player

# ------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    ("share", "penalty", "paper", "released"),
    [(0.5, 0, 1, 0.5), (0, 0, 0, 0), (1, 0, 0, 0), (0.8, 0, 0.4, 0.2), (0.2, 0, 0.4, 0.2),
     (0.5, 0.25, 0.75, 0.25), (0.8, 0.5, 0, -0.3)],
)  # fmt: skip
def test_rewards_are_highest_at_one_half(share, penalty, paper, released):
    assert challenger_reward(share, penalty, True, "paper") == pytest.approx(paper)
    assert challenger_reward(share, penalty, False, "paper") == 0
    assert challenger_reward(share, penalty, True, "released") == pytest.approx(released)
    assert challenger_reward(share, penalty, False, "released") == -1 - penalty


# ----------------------------------------------------------------------------------- repetition


def random_texts(rng: Random, count: int) -> list[str]:
    return [" ".join(rng.choices("abcde", k=rng.randint(1, 9))) for _ in range(count)]


def test_pairwise_bleu_is_sacrebleus_where_anything_matches_and_small_elsewhere():
    from sacrebleu import sentence_bleu

    texts = random_texts(Random(2), 12)
    ours = pairwise_bleu(texts)
    for (i, a), (j, b) in itertools.product(enumerate(texts), repeat=2):
        if set(a.split()) & set(b.split()):
            score = sentence_bleu(
                a, [b], tokenize="none", use_effective_order=True, smooth_method="floor"
            ).score
            assert ours[i, j] == pytest.approx(score / 100)
    nothing = math.sqrt(0.1 / 2 * 0.1 / 1)  # a tenth of a match of 2 words and of 1 pair
    assert pairwise_bleu(["a b", "c d"])[0, 1] == pytest.approx(nothing)


def naive_clusters(texts: list[str], threshold: float) -> list[float]:
    """All texts one by one, all pairs of clusters anew each time."""
    bleu = pairwise_bleu(texts)
    apart = 1 - (bleu + bleu.T) / 2
    clusters = [[i] for i in range(len(texts))]
    while len(clusters) > 1:
        far, a, b = min(
            (sum(apart[i][j] for i in x for j in y) / (len(x) * len(y)), k, m)
            for m, y in enumerate(clusters)
            for k, x in enumerate(clusters[:m])
        )
        if far >= threshold:
            break
        clusters[a] += clusters.pop(b)
    size = {i: len(cluster) for cluster in clusters for i in cluster}
    return [size[i] / len(texts) for i in range(len(texts))]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_clusters_are_those_of_average_linkage(threshold):
    shares = set()
    for seed in range(4):
        texts = random_texts(Random(seed), 16)
        texts += texts[:3]  # copies count
        ours = cluster_shares(texts, threshold)
        assert ours == pytest.approx(naive_clusters(texts, threshold))
        shares |= set(ours)
    assert len(shares) > 2


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("求方程的所有实数解的和", "求方程的所有实数解的积", True),  # no space divides them
        ("2x+3=7", "2x+3=8", True),
        ("Find the sum of all roots of x.", "Find the sum of all zeros of x.", True),
        ("", "", True),
        ("求方程的所有实数解的和", "一共有多少个不同质数", False),
        ("How many primes are below 30?", "Integrate x sin x from zero to one.", False),
        ("", "a b c", False),
    ],
)
def test_near_copies_share_a_cluster_and_unrelated_questions_do_not(one, other, alike):
    assert cluster_shares([one, other]) == ([1.0, 1.0] if alike else [0.5, 0.5])


def test_order_of_a_batch_does_not_matter():
    """Nor where a text is as near to one as to another."""
    texts = ["a b c d e f", "a b c d e f g h", "c d e f g h"]
    first = dict(zip(texts, cluster_shares(texts, 0.36), strict=True))
    assert sorted(first.values()) == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    for order in itertools.permutations(texts):
        assert dict(zip(order, cluster_shares([*order], 0.36), strict=True)) == first


# -------------------------------------------------------------------------------- a whole batch

AGREED = {"f c a kip": 0.5, "a a a lom mev": 0.8, "b d e dim": 1.0, "j j h hex hex": 0.3}
GROUPS = [
    ["f c a kip", "a a a lom mev"], ["junk", "f c a kip"], ["b d e dim", "other junk"],
    ["j j h hex hex", "a a a lom mev"],
]  # fmt: skip


class KnownSolver:
    """Samples are texts, and the agreement on each question is known."""

    def __init__(self, agreed: dict[str, float]):
        self.agreed = agreed

    def parse_question(self, sample):
        return sample if sample in self.agreed else None

    def agreement(self, questions):
        return {q: (self.agreed[q], "label") for q in questions if q is not None}


def reward_batch(challenge, groups=GROUPS, agreed=AGREED, ranks=1, repetition=1.0, seed=0):
    """Each rank scores its share of the groups; the whole batch is finished together."""
    s = SimpleNamespace(challenge=challenge, repetition=repetition, seed=seed)
    reward = ChallengerReward(s, KnownSolver(agreed))
    judged = [None] * len(groups)
    for rank in range(ranks):
        mine = groups[rank::ranks]
        judged[rank::ranks] = reward([None] * len(mine), mine, 1)
    return reward.finish(judged)


def test_batch_is_rewarded_as_by_hand():
    rows = reward_batch("paper")
    assert [row.parts["format"] for row in rows] == [[1, 1], [0, 1], [1, 0], [1, 1]]
    twice = 1 - 2 / 8
    assert rows[0].total == pytest.approx([twice, 0.4 - 2 / 8])
    assert rows[1].total == pytest.approx([0, twice])
    assert rows[2].total == [0, 0]
    assert rows[3].total == pytest.approx([0.6 - 1 / 8, 0.4 - 2 / 8])
    assert rows[0].parts["agreement"] == [0.5, 0.8] and rows[0].parts["repetition"] == [0.25] * 2
    released = reward_batch("released")
    assert released[0].total == pytest.approx([0.5 - 0.25, 0.2 - 0.25])
    assert released[2].total[1] == pytest.approx(-1 - 0.25)  # all junk is one cluster
    assert reward_batch("paper", repetition=0.0)[0].total == pytest.approx([1, 0.4])
    assert reward_batch("paper", groups=[["junk", "junk"]])[0].total == [0, 0]


@pytest.mark.parametrize("name", ["paper", "released", "random"])
def test_rewards_do_not_depend_on_the_number_of_ranks(name):
    assert reward_batch(name) == reward_batch(name, ranks=2) == reward_batch(name, ranks=4)
    alone = [reward_batch(name, groups=[group])[0] for group in GROUPS]
    assert alone != reward_batch(name)  # they do depend on the batch


def test_random_reward_does_not_depend_on_the_agreement():
    one = reward_batch("random")
    other = reward_batch("random", agreed={q: 1 - p for q, p in AGREED.items()})
    assert [row.total for row in one] == [row.total for row in other]
    values = [x for row in one for x in row.total]
    assert len(set(values)) == len(values) and all(0 <= x < 1 for x in values)
    assert reward_batch("random", seed=1)[0].total != one[0].total


# ----------------------------------------------------------------------------------- a Solver


def test_question_that_was_cut_off_or_is_too_long_for_the_solver_is_none(programs):
    solver = make_player(programs, "--max-prompt-tokens=9")
    vocabulary = solver.game.codec.tokenizer.get_vocab()

    def parse(text, stopped=True):
        ids = [vocabulary[word] for word in text.split()]
        return solver.parse_question(Sample([*ids, 1] if stopped else ids, [], stopped))

    assert parse("f c a gor hex") == "f c a gor hex"  # its prompt has 9 tokens
    assert parse("f c a gor hex jun") is None
    assert parse("f c a gor hex", stopped=False) is None


def test_agreement_does_not_depend_on_the_other_questions(programs):
    solver = make_player(programs)
    questions = ["f c a gor", "a a a fal", "b d e dim", "h h g gor"]
    together = solver.agreement([*questions, None, *questions])
    assert list(together) == sorted(questions)
    for q in questions:
        assert solver.agreement([q]) == {q: together[q]}
    assert solver.agreement([]) == {}
