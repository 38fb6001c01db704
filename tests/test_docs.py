"""What the documents say is there: files, headings, options."""

import dataclasses
import re
from pathlib import Path

import pytest

from report import draw
from run import settings
from tests.processes import ROOT
from tests.runs import go, rows_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = "nproc_per_node nnodes rdzv-backend rdzv-endpoint max-restarts shutdown-timeout standalone"
OTHERS += " help check deps"


def anchors(page):
    """As GitHub makes them of headings."""
    titles = re.findall(r"(?m)^#+ (.*)", page.read_text())
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, place = link.partition("#")
        if not link.startswith("http"):
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            assert not place or target.suffix != ".md" or place in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_are_shown_exist(page):
    """In one of our commands, or in torchrun's."""
    from rzero import selfplay

    kinds = (settings.Settings, selfplay.Settings)
    options = {settings.option(f.name) for kind in kinds for f in dataclasses.fields(kind)}
    options |= {f"--{name}" for name in OTHERS.split()}
    for file in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]:
        options |= set(re.findall(r'(?:option|add|argument)\(\s*"(--[a-z-]+)"', file.read_text()))
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", page.read_text()))
    assert {option.replace("--no-", "--") for option in shown} <= options


def test_the_rewards_of_the_page_run_and_are_drawn(toy, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "your-own-reward.md").read_text()
    (code,), (commands,) = (re.findall(rf"(?s)```{x}\n(.*?)```", page) for x in ("python", "bash"))
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(code)
    small = ["--steps=2", "--prompts-per-step=4", "--eval-prompts=4"]
    for number, arguments in enumerate(re.findall(r"(?m)^python ssr\.py (.*)", commands)):
        run = tmp_path / f"run{number}"
        rows = go(run, toy, *small, small=arguments.split())
        name = re.search(r"mine\.py:(\w+)", arguments)[1]
        assert 0 < rows[1][f"reward/{name}"] < 1
        if "self" in arguments:
            for x in rows_of(run / "groups.jsonl")[0]["samples"]:
                if None not in x.values():
                    assert x["reward"] == pytest.approx(x["format"] * (x["self"] + x[name]))
            draw.main([str(run)])
            assert f">{name}</span>" in (run / "report.html").read_text()
