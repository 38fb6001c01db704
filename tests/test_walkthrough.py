"""docs/walkthrough.md: its links, and its numbers against a run.

docs/walkthrough.py itself compares draws, rewards, advantages, the loss and the gradient with the
run before it writes them.
"""

import re

import pytest

from docs.walkthrough import BLOCK, LINK, PAGE, ROOT, blocks, fill, link_lines
from run import settings

TEXT = PAGE.read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def test_page_is_what_a_run_gives(toy):
    """In its first step, up to how it is rounded and another processor rounds."""
    page = dict(BLOCK.findall(TEXT))
    run = dict(BLOCK.findall(fill(TEXT, blocks(toy, "--steps=2", "--eval-prompts=8"))))
    for name in ("about", "task", "prompt", "drawn"):
        assert page[name] == run[name]
    for name in ("draws", "judge", "group", "weight", "pull"):
        assert NUMBER.sub("#", page[name]) == NUMBER.sub("#", run[name])
        shown, given = ([float(x) for x in NUMBER.findall(block[name])] for block in (page, run))
        for a, b in zip(shown, given, strict=True):
            assert a == pytest.approx(b, rel=0.006, abs=6e-4 if abs(b) > 0.01 else 1e-6), name


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
    assert (s.score_mode, s.judge) == ("expected", "live")
    assert (s.format_reward, s.advantage_scale) == ("product", "std")
