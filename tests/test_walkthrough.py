"""docs/walkthrough.md: its links, its numbers among themselves, and both against a run.

docs/walkthrough.py itself compares draws, rewards, advantages, the loss and the gradient with the
run before it writes them.
"""

import re
import shutil
import statistics

import pytest
import torch

from docs.walkthrough import BLOCK, LINK, PAGE, ROOT, blocks, fill, link_lines
from model import load, save
from run import settings

TEXT = PAGE.read_text(encoding="utf-8")


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


NUMBERS = Page(TEXT)
ROWS, FIND = NUMBERS.rows, NUMBERS.find
REWARDS, ADVANTAGES = ([row[i] for row in ROWS("group")] for i in (2, 3))
BEST = ADVANTAGES.index(max(ADVANTAGES))


def test_advantages_of_the_page_follow_from_its_rewards():
    mean, std = FIND("group", r"mean = (.+), standard deviation = (.+)")
    assert close(mean, statistics.mean(REWARDS)) and close(std, statistics.stdev(REWARDS))
    for reward, advantage in zip(REWARDS, ADVANTAGES, strict=True):
        assert close(advantage, (reward - mean) / std)
    shown = FIND("group", r"advantage of sample (\d) = \((.+) - (.+)\) / (.+) = (.+)")
    assert shown == [BEST, REWARDS[BEST], mean, std, ADVANTAGES[BEST]]


def test_pulls_of_the_page_follow_from_weight_advantage_and_p():
    samples = [text for _, text, _ in ROWS("drawn")]
    distinct, w, copies, tokens = FIND(
        "weight", r"samples, (\d+) distinct\n(?=.*\n.* = (.+)\n).*\n.* = (\d+) / (\d+) ="
    )
    assert distinct == len(set(samples)) and close(w, copies / tokens)
    assert copies == samples.count(samples[BEST])
    pulls = ROWS("pull")
    for _, p, drawn, pull in pulls[:-1]:
        assert close(pull, -w * ADVANTAGES[BEST] * (drawn - p))
    assert sum(pull for *_, pull in pulls) == pytest.approx(0, abs=2e-5)
    assert sum(p for _, p, *_ in pulls) == pytest.approx(1, abs=3e-4)
    a, b, p, temperature, slope = FIND(
        "pull", r"of .+ = -(.+) × (.+) × \(1 - (.+)\) / (.+) = (.+)\n"
    )
    assert (a, b, p) == (w, ADVANTAGES[BEST], pulls[0][1])
    assert close(slope, pulls[0][3]) and close(slope, -a * b * (1 - p) / temperature)
    assert close(ROWS("after")[0][1], pulls[0][1])


def test_every_link_leads_to_a_line_with_the_name_it_shows():
    assert len(LINK.findall(TEXT)) > 20
    for file, name, target in LINK.findall(TEXT):
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        last = name.rpartition(".")[2] if name.replace(".", "").isidentifier() else name
        assert re.search(rf"(?<!\w){re.escape(last)}(?!\w)", lines[int(target.split("#L")[1]) - 1])
    assert link_lines(TEXT) == TEXT, "line numbers have moved: python -m docs.walkthrough --links"


def test_text_of_the_page_agrees_with_the_preset():
    s = settings.parse(["--preset=toy"])
    assert (s.prompts_per_step, s.samples_per_prompt, s.steps, s.warmup_steps) == (24, 8, 100, 10)
    assert (s.min_lr_ratio, s.kl, s.updates_per_batch, s.loss_norm) == (0.1, 0, 1, "token")
    assert (s.score_mode, s.judge, s.format_reward, s.advantage_scale) == (
        "expected",
        "live",
        "product",
        "std",
    )


def test_another_model_gives_the_same_page_with_other_numbers(toy, tmp_path):
    folder = shutil.copytree(toy, tmp_path / "other")
    model = load(toy)
    with torch.no_grad():
        model.norm.weight *= 0.9
    save(model, folder)
    content = blocks(folder, "--steps=2", "--eval-prompts=8")
    page = Page(fill(TEXT, content))
    assert content.keys() == NUMBERS.blocks.keys() and all(content.values())
    for name in ("task", "prompt"):  # there the weights have no say
        assert page.blocks[name] == NUMBERS.blocks[name]
    assert page.rows("group") != ROWS("group")


@pytest.mark.slow
def test_page_is_what_a_run_gives(toy):
    """Up to another processor's rounding, which adds up over the steps after the first."""
    page = Page(fill(TEXT, blocks(toy)))
    for name in ("about", "task", "prompt", "drawn"):
        assert page.blocks[name] == NUMBERS.blocks[name]
    for name in ("draws", "judge", "group", "pull"):
        for ours, theirs in zip(ROWS(name), page.rows(name), strict=True):
            assert [x if isinstance(x, str) else pytest.approx(x, rel=2e-3, abs=1e-6)
                    for x in ours] == theirs  # fmt: skip
