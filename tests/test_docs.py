"""What the documents say is there: files, headings, options."""

import dataclasses
import re
from pathlib import Path

import pytest

import rzero
import ssr

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """As GitHub makes them of headings."""
    titles = re.findall(r"(?m)^#+ (.*)", page.read_text())
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, place = link.partition("#")
        if link.startswith("http"):
            continue
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if place and target.suffix == ".md":
            assert place in anchors(target), link


def known_options():
    """Of all our commands, and of those of others that the documents show."""
    kinds = (ssr.Settings, rzero.Settings)
    found = {ssr.option(f.name) for kind in kinds for f in dataclasses.fields(kind)}
    for file in [*ROOT.glob("*.py"), *ROOT.glob("eval/*.py"), *ROOT.glob("bench/*.py")]:
        found |= set(re.findall(r'(?:option|add_argument)\(\s*"(--[a-z-]+)"', file.read_text()))
    torchrun = "nproc_per_node nnodes rdzv-backend rdzv-endpoint max-restarts shutdown-timeout"
    return found | {f"--{x}" for x in torchrun.split()} | {"--help", "--check", "--standalone"}


def test_options_that_are_shown_exist():
    known = known_options()
    for page in PAGES:
        shown = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", page.read_text()))
        shown = {word.replace("--no-", "--") for word in shown}
        assert shown <= known, page.name
