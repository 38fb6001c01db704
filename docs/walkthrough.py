"""Keeps docs/walkthrough.md true: its numbers come from a real run, its links lead where they say.

    python -m docs.walkthrough             # runs the toy and writes numbers and links
    python -m docs.walkthrough --links     # the line numbers of the links alone, without a run

Everything between `<!-- name -->` and `<!-- end -->` is written here; all other text is the page's
own. What is computed a second time must agree with the run, or nothing is written.
"""

import re
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

import grpo
import ssr
from kernels.logprob import linear_policy_loss
from run import settings
from run.checkpoint import fingerprint
from sampler import Sampler, uniforms
from toy.languages import Languages, quality
from toy.pretrain import Recipe, language_model

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "walkthrough.md"
BLOCK = re.compile(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", re.S)
LINK = re.compile(r"\[`([\w/]+\.py)`: `([^`]+)`\]\(([^)]*)\)")
TASK = 1  # a short sentence, with translations of different rewards, two of them the same
NAMES = ("task", "prompt", "drawn", "draws", "judge", "group", "weight", "pull", "update")


class Trip:
    """One sentence through step 1. Each method of NAMES writes the block of its name."""

    def __init__(self, step: grpo.Step, reward, s, start: Sampler):
        """`start`: a sampler with the weights from before the step."""
        self.step, self.s, self.start = step, s, start
        self.codec, self.templates = reward.codec, reward.prompts
        self.ids, self.source = step.prompts[TASK]
        self.samples, self.judged = step.groups[TASK], step.judged[TASK]
        self.advantages = step.advantages[TASK].tolist()
        self.truth = Languages(s.seed).task("train", TASK).reference
        self.answers = list(map(self.text, self.samples))
        self.n = max(range(len(self.samples)), key=lambda n: self.advantages[n])
        self.best = self.samples[self.n]
        self.hard = min(range(len(self.best.ids)), key=lambda k: self.best.logprobs[k])
        self.copies = sum(x.ids == self.best.ids for x in self.samples)
        self.tokens = sum(len(x.ids) for group in step.groups for x in group)
        self.p, self.gradient = self.gradients()

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """p and d loss / d logits at the best sample's tokens; kernel and formula must agree."""
        T, ids = self.s.temperature, torch.tensor([*self.ids, *self.best.ids])
        with torch.no_grad():
            z = self.start.model.logits(self.start.model(ids[None]))[0, len(self.ids) - 1 : -1]
        z, targets = z.double().requires_grad_(), ids[len(self.ids) :]
        one = torch.eye(z.shape[1], dtype=z.dtype)
        advantage, weight = (
            torch.full((len(targets),), x)
            for x in (self.advantages[self.n], self.copies / self.tokens)
        )
        loss, _ = linear_policy_loss(z, one, targets, advantage, weight, temperature=T)
        loss.backward()  # z stands for z @ one
        p = (z.detach() / T).softmax(-1)
        formula = -(weight * advantage)[:, None] * (one[targets] - p) / T
        torch.testing.assert_close(z.grad, formula, rtol=1e-6, atol=1e-15)
        return p, z.grad

    def text(self, sample) -> str:
        return self.codec.decode(sample.ids[: len(sample.ids) - sample.stopped])

    def token(self, i: int) -> str:
        return f"`{self.codec.decode([i])}`"

    def task(self) -> str:
        rows = [["source", self.source.source, f"`{self.source.text}`"]]
        rows += [["the truth", self.source.target, f"`{self.truth}`"]]
        return f"Task {TASK}:\n\n" + table(["", "language", "sentence"], rows)

    def prompt(self) -> str:
        rows = [
            [f"`{piece.strip()}`", "template" if type(piece) is str else "given",
             spaced(self.codec.encode([[piece]])[0])]
            for piece in self.templates.ask(self.source)
        ]  # fmt: skip
        return table(["piece", "from", "ids"], rows)

    def drawn(self) -> str:
        both = enumerate(zip(self.answers, self.samples, strict=True))
        rows = [[n, f"`{text}`", len(sample.ids)] for n, (text, sample) in both]
        return table(["sample", "translation", "tokens"], rows)

    def draws(self) -> str:
        best, P = self.best, len(self.step.prompts)
        key, rows = self.step.number * P + TASK, []
        numbers = uniforms(self.s.seed, [key], [self.n], len(best.ids))[0].tolist()
        for k, (i, u, p) in enumerate(zip(best.ids, numbers, self.p, strict=True)):
            low, high = float(p[:i].sum()), float(p[: i + 1].sum())
            assert_agree(min(max(u, low), high), u, f"the draw of token {k}")
            stretch = f"{low:.4f} to {high:.4f}"
            rows.append([k, f"{u:.4f}", stretch, self.token(i), i, best.logprobs[k]])
        head = ["position", "number", "falls on", "token", "id", "log-prob"]
        return (f"Sample {self.n}, with seed {self.s.seed} and key {self.step.number} × {P} + "
                f"{TASK} = {key}:\n\n" + table(head, rows))  # fmt: skip

    def judge(self) -> str:
        prompts = [
            self.templates.ask_judge(self.source, x, self.s.score_mode) for x in self.answers
        ]
        encoded, values = self.codec.encode(prompts), self.templates.scores
        score_ids = [self.codec.one_token(score) for score in values]
        shares = self.start.next_logprobs(encoded, score_ids).double().exp()
        n = int(shares.amax(1).argmin())  # it is least sure of this one
        p = shares[n].tolist()
        mean = sum(v * x for v, x in zip(values.values(), p, strict=True)) / sum(p)
        form, reward = self.judged.parts["format"][n], self.judged.total[n]
        assert_agree(form * mean, reward, "the reward")
        rows = [
            ["share", *(f"{x:.4f}" for x in p)],
            ["worth", *(f"{x:g}" for x in values.values())],
        ]
        return "\n\n".join([
            f"Sample {n}:", formulas("".join(prompts[n]), spaced(encoded[n])),
            table(["token", *values], rows),
            formulas(f"score = sum of share × worth / sum of shares = {mean:.4f}",
                     f"reward = format × score = {form:g} × {mean:.4f} = {reward:.4f}"),
        ])  # fmt: skip

    def group(self) -> str:
        rewards, n = self.judged.total, self.n
        mean, std = statistics.mean(rewards), statistics.stdev(rewards)
        a = (rewards[n] - mean) / (std + 1e-6)
        assert_agree(a, self.advantages[n], "the advantage")
        truth = [f"{quality(text, self.truth):.2f}" for text in self.answers]
        rows = zip(self.judged.judge_text, rewards, self.advantages, truth, strict=True)
        head = ["sample", "the judge's likeliest", "reward", "advantage", "in truth"]
        return table(head, [[n, *row] for n, row in enumerate(rows)]) + "\n\n" + formulas(
            f"mean = {mean:.4f}, standard deviation = {std:.4f}",
            f"advantage of sample {n} = ({rewards[n]:.4f} - {mean:.4f}) / {std:.4f} = {a:.4f}",
        )  # fmt: skip

    def weight(self) -> str:
        lengths = torch.tensor([[len(x.ids) for x in group] for group in self.step.groups])
        loss = -float((lengths * self.step.advantages).sum()) / self.tokens
        assert_agree(loss, self.step.metrics["train/loss"], "the loss")
        return formulas(
            f"the step: {lengths.numel()} samples, {self.tokens} tokens, loss {loss:.4f}",
            f"weight of a token of sample {self.n} = copies / tokens = {self.copies} / "
            f"{self.tokens} = {self.copies / self.tokens:.4g}",
        )

    def pull(self) -> str:
        k, n, w = self.hard, self.n, self.copies / self.tokens
        p, mine, t, a = self.p[k], self.gradient[k], self.best.ids[k], self.advantages[n]
        shown = [t, *[i for i in p.topk(5).indices.tolist() if i != t][:4]]
        rows = [[self.token(i), float(p[i]), float(i == t), float(mine[i])] for i in shown]
        rest = [float(x.sum() - x[shown].sum()) for x in (p, mine)]
        begun = (
            "".join(self.templates.ask(self.source)) + " " + self.codec.decode(self.best.ids[:k])
        )
        return "\n\n".join([
            f"Sample {n}, position {k}, after `{begun.strip()}`:",
            table(["next token", "p", "drawn", "pull"],
                  [*rows, ["all others", rest[0], 0.0, rest[1]]]),
            formulas("d loss / d logit = -weight × advantage × (drawn - p) / T",
                     f"of {self.codec.decode([t])} = -{w:.4g} × {a:.4f} × (1 - {p[t]:.4f}) / "
                     f"{self.s.temperature:g} = {mine[t]:.4g}"),
        ])  # fmt: skip

    def update(self) -> str:
        metrics = self.step.metrics
        return formulas(
            f"length of the gradient = {metrics['train/grad_norm']:.4f}",
            f"learning rate = {metrics['train/lr']:.4g}",
        )

    def describe(self, sampler: Sampler, stop_ids) -> list:
        """What a sampler's weights make of the sentence."""
        logprobs = sampler.score([self.ids], [self.best.ids], self.s.temperature)[0]
        [[greedy]] = sampler.generate([self.ids], 1, self.s.max_new_tokens, 0.0, stop_ids=stop_ids)
        return [float(logprobs[self.hard].exp()), f"`{self.text(greedy)}`"]


def blocks(folder: Path, *options: str) -> dict[str, str]:
    """Name -> text, of a run from the model in `folder`."""
    train, rows, trip = grpo.train, [], None

    def watch(model, sampler, reward, batch, s, optimizer, stop_ids, start, *rest):
        nonlocal trip
        for step in train(model, sampler, reward, batch, s, optimizer, stop_ids, start, *rest):
            if step.number == 1:
                first = Sampler(start, 24, sampler.max_length)
                trip = Trip(step, reward, s, first)
                rows.append(["before", *trip.describe(first, stop_ids)])
            if step.number in (1, s.steps):
                rows.append([f"after step {step.number}", *trip.describe(sampler, stop_ids)])
            yield step

    with tempfile.TemporaryDirectory() as temporary, mock.patch.object(grpo, "train", watch):
        argv = ["--preset=toy", f"--model={folder}", f"--folder={temporary}/run"]
        ssr.run_training(settings.parse([*argv, *options]))
    head = ["", f"p of {trip.token(trip.best.ids[trip.hard])}", "greedy translation"]
    return {name: getattr(trip, name)() for name in NAMES} | {
        "about": f"Its weights at the start have the fingerprint `{fingerprint(folder)}`; "
        f"PyTorch {torch.__version__.split('+')[0]}.",
        "after": table(head, rows),
    }


# -------------------------------------------------------------------------------------- the page


def assert_agree(value: float, logged: float, what: str) -> None:
    """Within what fp32 rounds."""
    if not abs(value - logged) <= 1e-5 * max(0.01, abs(logged)):
        raise ValueError(f"{what}: {value} here, {logged} in the run")


def cell(value) -> str:
    if not isinstance(value, float):
        return str(value)
    value = value if abs(value) > 1e-9 else 0.0
    return f"{value:.3g}" if abs(value) < 0.01 or value.is_integer() else f"{value:.4f}"


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def formulas(*lines: str) -> str:
    return "\n".join(["```", *lines, "```"])


def spaced(values) -> str:
    return " ".join(map(str, values))


def line_of(file: str, name: str) -> int:
    """Of a function, class or variable ("Sampler.step"), or of code that stands in one line."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    last = re.escape(name.rpartition(".")[2])
    definition = re.compile(rf" *(def|class) {last}\b|{last} = ")
    numbers = [n for n, x in enumerate(lines, 1) if definition.match(x)]
    numbers = numbers or [n for n, x in enumerate(lines, 1) if name in x]
    if len(numbers) != 1:
        raise ValueError(f"{file}: {name!r} is there {len(numbers)} times")
    return numbers[0]


def link_lines(text: str) -> str:
    return LINK.sub(lambda m: f"[`{m[1]}`: `{m[2]}`](../{m[1]}#L{line_of(m[1], m[2])})", text)


def fill(text: str, content: dict[str, str]) -> str:
    return BLOCK.sub(lambda m: f"<!-- {m[1]} -->\n{content[m[1]]}\n<!-- end -->", link_lines(text))


def main(argv: list[str]) -> None:
    if argv not in ([], ["--links"]):
        sys.exit(__doc__)
    text = PAGE.read_text(encoding="utf-8")
    text = link_lines(text) if argv else fill(text, blocks(language_model(Recipe())))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
