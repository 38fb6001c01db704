"""Keeps docs/walkthrough.md true: its numbers are a real run's, its links point where they say.

    python -m docs.walkthrough             # runs the toy
    python -m docs.walkthrough --check     # the same; says what differs on disk, and ends with 1
    python -m docs.walkthrough --links     # line numbers alone, without a run

What stands between `<!-- name -->` and `<!-- end -->` is written here, and the line numbers of
links; all other words are the page's own. The run is ssr.py's: `watched` looks on while it goes
through grpo.train. What is computed a second time must agree with the run, or nothing is written.
"""

import difflib
import json
import math
import re
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

import grpo
import ssr
from checkpoint import fingerprint
from kernels.logprob import linear_policy_loss
from sampler import Sampler, uniforms
from toy.languages import Languages, quality
from toy.pretrain import Recipe, make

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "walkthrough.md"
BLOCK = re.compile(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", re.S)
LINK = re.compile(r"\[`([\w/]+\.py)`: `([^`]+)`\]\(([^)]*)\)")
NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?|-?\d+e[-+]?\d+")  # whole ones are counts, or ids


class Trip:
    """One sentence through step 1. Most methods write the block of their name."""

    def __init__(self, step: grpo.Step, reward, s, start: Sampler, place: int):
        """`start`: a sampler of the weights from before the step."""
        self.step, self.s, self.start, self.place = step, s, start, place
        self.texts, self.templates = reward.texts, reward.prompts
        self.ids, self.asked = step.prompts[place]
        self.samples, self.judged = step.groups[place], step.judged[place]
        self.advantages = step.advantages[place].tolist()
        self.truth = Languages(s.seed).task("train", place).reference
        self.said = list(map(self.text, self.samples))
        self.known = [n for n, x in enumerate(self.judged.total) if not math.isnan(x)]
        self.best = max(self.known, key=lambda n: self.advantages[n])
        best = self.samples[self.best]
        self.hard = min(range(len(best.ids)), key=lambda k: best.logprobs[k])
        rewards = torch.tensor([x.total for x in step.judged], dtype=torch.float64)
        self.rows = grpo.distinct_rows(step.prompts, step.groups, rewards, step.advantages, s)
        self.weights = grpo.weights_of(self.rows, s)
        own = [i for i, row in enumerate(self.rows) if row.prompt == self.ids]
        self.row = next(i for i in own if self.rows[i].ids == best.ids)
        self.p, self.gradient = self.gradients(own)
        self.begin: dict[tuple, int] = {}  # distinct sample -> where its tokens begin in these two
        for i in own:
            self.begin[tuple(self.rows[i].ids)] = sum(map(len, self.begin))

    def gradients(self, own: list[int]) -> tuple:
        """p and d loss / d logits at each token; formula, autograd and the kernel must agree."""
        rows, weights = [self.rows[i] for i in own], [self.weights[i] for i in own]
        batch, T = grpo.MicroBatch(rows, weights, None, torch.device("cpu")), self.s.temperature
        with torch.no_grad():
            z = self.start.model.logits(batch.hidden(self.start.model)).double()
        one = torch.eye(z.shape[1], dtype=z.dtype)
        p, factor = (z / T).softmax(-1), (batch.weights * batch.advantages)[:, None]
        formula = -factor * (one[batch.targets] - p) / T
        a, b = (z.clone().requires_grad_() for _ in range(2))
        logprobs = (a / T).log_softmax(-1).gather(1, batch.targets[:, None])
        (-factor * logprobs).sum().backward()
        columns = batch.targets, batch.advantages, batch.weights
        linear_policy_loss(b, one, *columns, temperature=T)[0].backward()  # z as z @ one
        for other in (a.grad, b.grad):
            torch.testing.assert_close(other, formula, rtol=1e-6, atol=1e-15)
        return p, formula

    def text(self, sample) -> str:
        return self.texts.decode(sample.ids[: len(sample.ids) - sample.stopped])

    def word(self, i: int) -> str:
        return f"`{self.texts.decode([i])}`"

    def task(self) -> str:
        rows = [["source", self.asked.source, f"`{self.asked.text}`"]]
        rows += [["the truth", self.asked.target, f"`{self.truth}`"]]
        return f"Task {self.place}:\n\n" + table("", "language", "sentence", *rows)

    def prompt(self) -> str:
        pieces = self.templates.ask(self.asked)
        ids = [spaced(self.texts.encode([[piece]])[0]) for piece in pieces]
        kinds = ["template" if type(piece) is str else "given" for piece in pieces]
        texts = [f"`{piece.strip()}`" for piece in pieces]
        return table("piece", "from", "ids", *map(list, zip(texts, kinds, ids, strict=True)))

    def drawn(self) -> str:
        rows = enumerate(zip(self.said, self.samples, strict=True))
        rows = [[n, f"`{text}`", len(sample.ids)] for n, (text, sample) in rows]
        return table("sample", "translation", "tokens", *rows)

    def draws(self) -> str:
        best, P = self.samples[self.best], len(self.step.prompts)
        key, rows = self.step.number * P + self.place, []
        numbers = uniforms(self.s.seed, [key], [self.best], len(best.ids))[0].tolist()
        p = self.p[self.begin[tuple(best.ids)] :]
        for k, (i, u) in enumerate(zip(best.ids, numbers, strict=True)):
            low, high = float(p[k, :i].sum()), float(p[k, : i + 1].sum())
            agree(min(max(u, low), high), u, f"the draw of token {k}")
            stretch = f"{low:.4f} to {high:.4f}"
            rows.append([k, f"{u:.4f}", stretch, self.word(i), i, best.logprobs[k]])
        said = f"Sample {self.best}, with seed {self.s.seed} and key {self.step.number} × {P} + "
        head = "position", "number", "falls on", "token", "id", "log-prob"
        return f"{said}{self.place} = {key}:\n\n" + table(*head, *rows)

    def judge(self) -> str:
        asked = [self.templates.ask_judge(self.asked, x, self.s.reading) for x in self.said]
        questions, worth = self.texts.encode(asked), self.templates.scores
        scores = [self.texts.one_token(score) for score in worth]
        every = self.start.next_logprobs(questions, scores).double().exp()
        n = min(self.known, key=lambda n: float(every[n].max()))  # it is least sure of this one
        shares = every[n].tolist()
        mean = sum(v * p for v, p in zip(worth.values(), shares, strict=True)) / sum(shares)
        form, reward = self.judged.parts["format"][n], self.judged.total[n]
        agree(form * mean, reward, "the reward")
        rows = (
            ["share", *(f"{x:.4f}" for x in shares)],
            ["worth", *(f"{x:g}" for x in worth.values())],
        )
        return "\n\n".join([
            f"Sample {n}:", formulas("".join(asked[n]), spaced(questions[n])),
            table("token", *worth, *rows),
            formulas(f"score = sum of share × worth / sum of shares = {mean:.4f}",
                     f"reward = format × score = {form:g} × {mean:.4f} = {reward:.4f}"),
        ])  # fmt: skip

    def group(self) -> str:
        rewards, n = self.judged.total, self.best
        known = [rewards[i] for i in self.known]
        mean, std = statistics.mean(known), statistics.stdev(known)
        a = (rewards[n] - mean) / (std + 1e-6)
        agree(a, self.advantages[n], "the advantage")
        truth = [f"{quality(text, self.truth):.2f}" for text in self.said]
        rows = zip(self.judged.words, rewards, self.advantages, truth, strict=True)
        head = "sample", "the judge's likeliest", "reward", "advantage", "in truth"
        return table(*head, *([n, *row] for n, row in enumerate(rows))) + "\n\n" + formulas(
            f"mean = {mean:.4f}, standard deviation = {std:.4f}",
            f"advantage of sample {n} = ({rewards[n]:.4f} - {mean:.4f}) / {std:.4f} = {a:.4f}",
        )  # fmt: skip

    def weight(self) -> str:
        samples = [sample for group in self.step.groups for sample in group]
        tokens, copies = sum(x.copies * len(x.ids) for x in self.rows), self.rows[self.row].copies
        both = zip(self.weights, self.rows, strict=True)
        loss = -math.fsum(w * len(row.ids) * row.advantage for w, row in both)
        agree(loss, self.step.metrics["train/loss"], "the loss")
        return formulas(
            f"our sentence: {len(self.samples)} samples, {len(self.begin)} distinct",
            f"the step:     {len(samples)} samples, {len(self.rows)} distinct, {tokens} tokens, "
            f"mean reward {self.step.metrics['reward/total']:.4f}, loss {loss:.4f}",
            f"weight of a token of sample {self.best} = copies / tokens = {copies} / {tokens}"
            f" = {self.weights[self.row]:.4g}",
        )

    def pull(self) -> str:
        k, n = self.hard, self.best
        ids, row = self.samples[n].ids, self.rows[self.row]
        there = [i for i, x in enumerate(self.samples) if x.ids[:k] == ids[:k] and len(x.ids) > k]
        places = {self.begin[tuple(self.samples[i].ids)] + k for i in there}
        at, t, w = self.begin[tuple(ids)] + k, ids[k], self.weights[self.row]
        p, mine, every = self.p[at], self.gradient[at], self.gradient[sorted(places)].sum(0)
        shown = [t, *[i for i in p.topk(5).indices.tolist() if i != t][:4]]
        rows = [[self.word(i), *map(float, (p[i], i == t, mine[i], every[i]))] for i in shown]
        rest = [float(x.sum() - x[shown].sum()) for x in (p, mine, every)]
        begun = "".join(self.templates.ask(self.asked)) + " " + self.texts.decode(ids[:k])
        head = "next token", "p", "drawn", f"pull of sample {n}", "with the siblings'"
        return "\n\n".join([
            f"Sample {n}, position {k}, with {len(there) - 1} siblings, after `{begun.strip()}`:",
            table(*head, *rows, ["all others", rest[0], 0.0, *rest[1:]]),
            formulas("d loss / d logit = -weight × advantage × (drawn - p) / T",
                     f"of {self.texts.decode([t])} = -{w:.4g} × {row.advantage:.4f} × "
                     f"(1 - {p[t]:.4f}) / {self.s.temperature:g} = {mine[t]:.4g}"),
        ])  # fmt: skip

    def update(self) -> str:
        s, norm, rate = self.s, *map(self.step.metrics.get, ("train/grad_norm", "train/lr"))
        return formulas(
            f"length of the gradient = {norm:.4f}, at most {s.max_norm:g}: scaled by "
            f"{min(1.0, s.max_norm / norm):.4g}",
            f"learning rate = {s.lr:g} × 1 / {s.warmup_steps} × (1 - {1 - s.final_lr:g} × 1 / "
            f"{s.steps}) = {rate:.4g}",
            f"the furthest that any weight moved = {self.moved:.4g}",
        )

    def now(self, sampler: Sampler, stop_ids) -> list:
        """What a sampler's weights make of the sentence."""
        best = self.samples[self.best]
        logprobs = sampler.score([self.ids], [best.ids], self.s.temperature)[0]
        found = sampler.generate([self.ids], 1, self.s.max_new_tokens, 0.0, stop_ids=stop_ids)
        text = self.text(found[0][0])
        return [float(logprobs[self.hard].exp()), float(logprobs.sum().exp()), f"`{text}`"]

    def compare(self, run: Path) -> None:
        """With what the run has written down."""
        metrics, groups = ([json.loads(x) for x in (run / f"{name}.jsonl").read_text().splitlines()]
                           for name in ("metrics", "groups"))  # fmt: skip
        step = [x["reward"] for g in groups if g["step"] == 1 for x in g["samples"]]
        total = grpo.mean([x for x in step if x is not None])
        agree(total, metrics[1]["reward/total"], "reward/total")
        for n in self.known:
            told = {"text": self.said[n], "reward": self.judged.total[n]}
            told |= {"advantage": self.advantages[n], "judge": self.judged.words[n]}
            if not told.items() <= groups[self.place]["samples"][n].items():
                raise ValueError(f"sample {n} is another one in groups.jsonl: {told}")


def choose(step: grpo.Step) -> int:
    """The first short sentence with three different rewards, and two samples that are the same."""
    for place, (prompt, group) in enumerate(zip(step.prompts, step.groups, strict=True)):
        rewards, distinct = step.judged[place].total, {tuple(sample.ids) for sample in group}
        short = len(prompt.task.text.split()) <= 5
        if short and len(set(rewards)) >= 3 and len(distinct) < len(group):
            return place
    raise ValueError("step 1 has no sentence to tell of")


def blocks(folder: Path, place: int | None = None, *options: str) -> dict[str, str]:
    """Name -> text, of a run from the model in `folder`. `place`: the task, if not by the rule."""
    train, now, later = grpo.train, [], []

    def watched(model, sampler, reward, batch, s, optimizer, stop_ids, start, *rest):
        nonlocal trip
        for step in train(model, sampler, reward, batch, s, optimizer, stop_ids, start, *rest):
            if step.number == 1:
                first = Sampler(start, 24, sampler.max_length)
                trip = Trip(step, reward, s, first, choose(step) if place is None else place)
                pairs = zip(start.parameters(), model.parameters(), strict=True)
                trip.moved = max(float((a - b.detach()).abs().max()) for a, b in pairs)
                now.append(["before", *trip.now(first, stop_ids)])
            if step.number in (1, s.steps):
                now.append([f"after step {step.number}", *trip.now(sampler, stop_ids)])
            yield step
        later.extend(prompt.ids == trip.ids for n in range(2, s.steps + 1) for prompt in batch(n))

    trip: Trip | None = None
    with tempfile.TemporaryDirectory() as temporary, mock.patch.object(grpo, "train", watched):
        run = Path(temporary, "run")
        words = ["--preset=toy", "--device=cpu", "--shown-groups=24", "--no-report", *options]
        ssr.run(ssr.parse([*words, f"--model={folder}", f"--folder={run}"]))
        trip.compare(run)
    names = ("task", "prompt", "drawn", "draws", "judge", "group", "weight", "pull", "update")
    token = trip.word(trip.samples[trip.best].ids[trip.hard])
    head = "", f"p of {token}", f"p of all of sample {trip.best}", "greedy translation"
    return {name: getattr(trip, name)() for name in names} | {
        "about": f"Its weights at the start have the fingerprint `{fingerprint(folder)}`; "
        f"PyTorch {torch.__version__.split('+')[0]}.",
        "after": f"{table(*head, *now)}\n\nOf the {len(later):,} sentences of the later steps, "
        f"{sum(later) or 'none'} were this one.",
    }


# -------------------------------------------------------------------------------------- the page


def agree(mine: float, theirs: float, what: str) -> None:
    """Within what fp32 rounds."""
    if not abs(mine - theirs) <= 1e-5 * max(0.01, abs(theirs)):
        raise ValueError(f"{what}: {mine} here, {theirs} in the run")


def cell(value) -> str:
    if not isinstance(value, float):
        return str(value)
    value = value if abs(value) > 1e-9 else 0.0
    return f"{value:.3g}" if abs(value) < 0.01 or value.is_integer() else f"{value:.4f}"


def table(*cells) -> str:
    """The columns' names, then each row as a list."""
    rows = [[cell(x) for x in row] for row in cells if isinstance(row, list)]
    head = [name for name in cells if not isinstance(name, list)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def formulas(*lines: str) -> str:
    return "\n".join(["```", *lines, "```"])


def spaced(values) -> str:
    return " ".join(map(str, values))


def line_of(file: str, name: str) -> int:
    """Of a function, class or variable ("Sampler.step"), or of words that stand in one line."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    last = re.escape(name.rpartition(".")[2])
    found = [n for n, x in enumerate(lines, 1) if re.match(rf" *(def|class) {last}\b|{last} = ", x)]
    found = found or [n for n, x in enumerate(lines, 1) if name in x]
    if len(found) != 1:
        raise ValueError(f"{file}: {name!r} is there {len(found)} times")
    return found[0]


def linked(text: str) -> str:
    return LINK.sub(lambda m: f"[`{m[1]}`: `{m[2]}`](../{m[1]}#L{line_of(m[1], m[2])})", text)


def filled(text: str, found: dict[str, str]) -> str:
    return BLOCK.sub(lambda m: f"<!-- {m[1]} -->\n{found[m[1]]}\n<!-- end -->", linked(text))


def differences(text: str, folder: Path) -> str:
    """Between the page and what a run from `folder` makes of it: words, and numbers beyond what
    another processor's rounding does to them. A hundred steps add up to more than that, so what is
    said of the last step is not compared."""
    run = filled(text, blocks(folder)).splitlines()
    page = text.splitlines()
    if len(page) == len(run):
        page = [a if similar(a, b) else b for a, b in zip(run, page, strict=True)]
    return "\n".join(difflib.unified_diff(page, run, "the page", "the run", lineterm=""))


def similar(a: str, b: str) -> bool:
    if re.match(r"\| after step (?!1 )", a):
        return a.split("|")[1] == b.split("|")[1]
    if a == b or NUMBER.sub("", a) != NUMBER.sub("", b):
        return a == b
    pairs = zip(*(map(float, NUMBER.findall(x)) for x in (a, b)), strict=True)
    return all(abs(x - y) <= 1e-6 + 2e-3 * max(abs(x), abs(y)) for x, y in pairs)


def main(words: list[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    fresh = linked(text)
    if words not in ([], ["--check"], ["--links"]):
        sys.exit(__doc__)
    if words == ["--links"]:
        PAGE.write_text(fresh, encoding="utf-8")
        return
    torch.set_num_threads(1)  # as in the preset
    folder = make(Recipe())
    if not words:
        PAGE.write_text(filled(fresh, blocks(folder)), encoding="utf-8")
    elif found := differences(text, folder):
        sys.exit(found)


if __name__ == "__main__":
    main(sys.argv[1:])
