"""What the documents say is there: files, headings, options."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import report
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


def test_the_rewards_of_the_page_run_and_are_drawn(toy, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "your-own-reward.md").read_text()
    (code,), (commands,) = (re.findall(rf"(?s)```{x}\n(.*?)```", page) for x in ("python", "bash"))
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(code)
    small = f"--model={toy} --steps=2 --prompts-per-step=4 --eval-prompts=4 --no-report".split()
    for number, words in enumerate(re.findall(r"(?m)^python ssr\.py (.*)", commands)):
        ssr.main([*words.split(), *small, f"--folder=run{number}"])
        name = re.search(r"mine\.py:(\w+)", words)[1]
        rows = [json.loads(x) for x in Path(f"run{number}/metrics.jsonl").read_text().splitlines()]
        assert 0 < rows[1][f"reward/{name}"] < 1
        if "self" in words:
            group = json.loads(Path(f"run{number}/groups.jsonl").read_text().splitlines()[0])
            for x in group["samples"]:
                if None not in x.values():
                    assert x["reward"] == pytest.approx(x["format"] * (0.5 * x["self"] + x[name]))
            report.main([f"run{number}"])
            assert f">{name}</span>" in Path(f"run{number}/report.html").read_text()
