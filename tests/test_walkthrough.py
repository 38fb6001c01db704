"""docs/walkthrough.md: its links, its numbers among themselves, and both against a run."""

import math
import re
import shutil
import statistics

import pytest
import torch

import ssr
from docs.walkthrough import BLOCK, LINK, PAGE, ROOT, blocks, differences, filled, linked, similar
from model import load, save

TEXT = PAGE.read_text(encoding="utf-8")
HEADINGS = re.findall(r"^#+ .*", TEXT, re.M)


class Page:
    """The numbers of a page, by block."""

    def __init__(self, text):
        self.blocks = dict(BLOCK.findall(text))

    def rows(self, name):
        """Of a block's table, without its head."""
        lines = [x for x in self.blocks[name].splitlines() if x.startswith("|")]
        return [[number(x.strip()) for x in line.split("|")[1:-1]] for line in lines[2:]]

    def find(self, name, pattern):
        return [float(x) for x in re.search(pattern, self.blocks[name]).groups()]


def number(text):
    try:
        return float(text)
    except ValueError:
        return text.strip("`")


def close(a, b):
    """As far as both were rounded."""
    return a == pytest.approx(b, rel=0.006, abs=6e-4 if abs(b) > 0.01 else 1e-8)


def test_the_numbers_on_the_page_follow_from_each_other():
    page = Page(TEXT)
    samples, group = page.rows("drawn"), page.rows("group")
    words = [text.split() for _, text, _ in samples]

    rewards, advantages = ([row[i] for row in group] for i in (2, 3))
    mean, std = page.find("group", r"mean = (.+), standard deviation = (.+)")
    assert close(mean, statistics.mean(rewards)) and close(std, statistics.stdev(rewards))
    for reward, advantage in zip(rewards, advantages, strict=True):
        assert close(advantage, (reward - mean) / std)
    best, reward, m, s, advantage = page.find(
        "group", r"advantage of sample (\d) = \((.+) - (.+)\) / (.+) = (.+)"
    )
    best = int(best)
    assert (reward, m, s, advantage) == (rewards[best], mean, std, advantages[best])
    assert advantage == max(advantages)

    ids = [i for row in page.rows("prompt") for i in str(row[2]).replace(".0", "").split()]
    assert [row[0] for row in page.rows("prompt")][1] == page.rows("task")[0][2]
    [asked] = page.find("judge", r"Sample (\d)")
    question, answer = page.blocks["judge"].split("```")[1].strip().splitlines()
    assert question.endswith(f"|| {samples[int(asked)][1]} =>".replace("  ", " "))
    assert answer.split()[1:3] == ids[1:3] and answer.split()[-1] == ids[-1]
    [_, *shares], [_, *worth] = page.rows("judge")
    expected = sum(p * x for p, x in zip(shares, worth, strict=True)) / sum(shares)
    score, form, again, reward = page.find(
        "judge", r"shares = (.+)\nreward = format × score = (.+) × (.+) = (.+)"
    )
    assert close(score, expected) and score == again and close(reward, form * score)
    assert reward == rewards[int(asked)]

    draws, total = page.rows("draws"), 0.0
    assert len(draws) == samples[best][2]
    key, step, prompts, place = page.find("draws", r"(?=.*= (\d+):).*key (\d+) × (\d+) \+ (\d+)")
    assert key == step * prompts + place and f"Task {place:.0f}:" in TEXT
    for _, at, stretch, _, _, logprob in draws:
        low, high = map(float, stretch.split(" to "))
        assert low - 1e-4 <= at <= high + 1e-4 and abs(math.exp(logprob) - (high - low)) < 2e-4
        total += logprob

    distinct, w, copies, tokens = page.find(
        "weight", r"samples, (\d+) distinct\n(?=.*\n.* = (.+)\n).*\n.* = (\d+) / (\d+) ="
    )
    assert distinct == len({x for _, x, _ in samples}) and close(w, copies / tokens)
    assert copies == [x for _, x, _ in samples].count(samples[best][1])

    at, siblings = page.find("pull", r"position (\d+), with (\d+) siblings")
    at, pulls = int(at), page.rows("pull")
    there = [n for n, x in enumerate(words) if x[:at] == words[best][:at]]
    assert len(there) == siblings + 1
    for token, p, drawn, mine, every in pulls[:-1]:
        assert close(mine, -w * advantage * (drawn - p))
        chose = [[*words[n], "<eos>"][at] == token for n in there]
        pull = [-w / copies * advantages[n] * (x - p) for n, x in zip(there, chose, strict=True)]
        assert every == pytest.approx(sum(pull), rel=0.006, abs=3e-7)
    for column in (3, 4):  # what one gains the others lose
        assert sum(row[column] for row in pulls) == pytest.approx(0, abs=2e-5)
    assert sum(row[1] for row in pulls) == pytest.approx(1, abs=3e-4)
    a, b, p, temperature, slope = page.find(
        "pull", r"of .+ = -(.+) × (.+) × \(1 - (.+)\) / (.+) = (.+)\n"
    )
    assert (a, b, p) == (w, advantage, pulls[0][1])
    assert close(slope, pulls[0][3]) and close(slope, -a * b * (1 - p) / temperature)

    norm, most, scale = page.find("update", r"= (.+), at most (.+): scaled by (.+)")
    assert close(scale, min(1, most / norm))
    *parts, rate = page.find(
        "update", r"rate = (.+) × (.+) / (.+) × \(1 - (.+) × (.+) / (.+)\) = (.+)"
    )
    lr, first, warm, decay, now, steps = parts
    assert close(rate, lr * first / warm * (1 - decay * now / steps))
    [moved] = page.find("update", r"moved = (.+)")
    assert moved <= 1.05 * rate  # a weight near 2 is rounded to 1e-7

    before = page.rows("after")[0]
    assert close(before[1], pulls[0][1]) and close(before[2], math.exp(total))


def test_every_link_leads_to_a_line_with_the_name_it_says():
    assert len(LINK.findall(TEXT)) > 20
    for file, name, target in LINK.findall(TEXT):
        path, line = target.split("#L")
        assert (PAGE.parent / path).resolve() == ROOT / file
        there = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        last = name.rpartition(".")[2] if name.replace(".", "").isidentifier() else name
        assert re.search(rf"(?<!\w){re.escape(last)}(?!\w)", there), f"{name} in {there!r}"
    assert linked(TEXT) == TEXT, "line numbers have moved: python -m docs.walkthrough --links"
    for path in re.findall(r"\]\(([^)#]+)", TEXT):
        assert (PAGE.parent / path).exists()


def test_the_words_around_them_are_those_of_the_preset():
    s = ssr.parse(["--preset=toy"])
    assert (s.prompts_per_step, s.samples_per_prompt, s.steps, s.warmup_steps) == (24, 8, 100, 10)
    assert (s.final_lr, s.kl, s.updates_per_batch, s.loss_norm) == (0.1, 0, 1, "token")
    assert (s.reading, s.judge, s.gate, s.advantage_scale) == ("expected", "live", "product", "std")


def test_another_model_gives_the_same_page_with_other_numbers(toy, tmp_path):
    folder = shutil.copytree(toy, tmp_path / "other")
    model = load(toy)
    with torch.no_grad():
        model.norm.weight *= 0.9
    save(model, folder)
    place = int(re.search(r"Task (\d+):", TEXT)[1])
    found = blocks(folder, place, "--steps=2", "--eval-prompts=8")
    text = filled(TEXT, found)
    assert found.keys() == Page(TEXT).blocks.keys() and all(found.values())
    for name in ("task", "prompt"):  # there the weights have no say
        assert Page(text).blocks[name] == Page(TEXT).blocks[name]
    assert re.findall(r"^#+ .*", text, re.M) == HEADINGS
    assert Page(text).rows("group") != Page(TEXT).rows("group")


def test_lines_differ_by_more_than_rounding():
    assert similar("mean = 0.8011, 12 tokens", "mean = 0.8012, 12 tokens")
    assert similar("w = -2.105e-05", "w = -2.106e-05") and not similar(
        "w = -2.1e-05", "w = 2.1e-05"
    )
    assert not similar("mean = 0.8011, 12 tokens", "mean = 0.8011, 13 tokens")
    assert not similar("mean = 0.8011", "mean = 0.8111") and not similar("a 0.80", "b 0.80")
    assert similar("| after step 100 | 0.1 | `a` |", "| after step 100 | 0.9 | `b` |")
    assert not similar("| after step 1 | 0.1 | `a` |", "| after step 1 | 0.9 | `a` |")


@pytest.mark.slow
def test_the_page_is_what_a_run_gives(toy):
    assert not differences(TEXT, toy)
