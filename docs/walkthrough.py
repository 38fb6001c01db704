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

    def __init__(self, step: grpo.Step, reward, s, start: Sampler, moved: float):
        """`start`: a sampler with the weights from before the step."""
        self.step, self.s, self.start, self.moved = step, s, start, moved
        self.codec, self.templates = reward.codec, reward.prompts
        self.ids, self.source = step.prompts[TASK]
        self.samples, self.judged = step.groups[TASK], step.judged[TASK]
        self.advantages = step.advantages[TASK].tolist()
        self.truth = Languages(s.seed).task("train", TASK).reference
        self.answers = list(map(self.text, self.samples))
        self.n = max(range(len(self.samples)), key=lambda n: self.advantages[n])
        self.best = self.samples[self.n]
        self.hard = min(range(len(self.best.ids)), key=lambda k: self.best.logprobs[k])
        rewards = torch.tensor([x.total for x in step.judged], dtype=torch.float64)
        self.rows = grpo.merge_identical_samples(
            step.prompts, step.groups, rewards, step.advantages, s
        )
        grpo.set_loss_weights(self.rows, s)
        self.row = next(x for x in self.rows if x.prompt == self.ids and x.ids == self.best.ids)
        self.p, self.gradient = self.gradients()

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """p and d loss / d logits at the best sample's tokens; three ways must agree."""
        device, T = torch.device("cpu"), self.s.temperature
        batch = grpo.MicroBatch([self.row], device)
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
        tokens, copies = sum(x.copies * len(x.ids) for x in self.rows), self.row.copies
        loss = -sum(row.weight * len(row.ids) * row.advantage for row in self.rows)
        assert_agree(loss, self.step.metrics["train/loss"], "the loss")
        reward, distinct = self.step.metrics["reward/total"], len(set(self.answers))
        return formulas(
            f"our sentence: {len(self.samples)} samples, {distinct} distinct",
            f"the step:     {sum(map(len, self.step.groups))} samples, {len(self.rows)} distinct, "
            f"{tokens} tokens, mean reward {reward:.4f}, loss {loss:.4f}",
            f"weight of a token of sample {self.n} = copies / tokens = {copies} / {tokens}"
            f" = {self.row.weight:.4g}",
        )

    def pull(self) -> str:
        k, n, w = self.hard, self.n, self.row.weight
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
        s, norm, rate = self.s, *map(self.step.metrics.get, ("train/grad_norm", "train/lr"))
        return formulas(
            f"length of the gradient = {norm:.4f}, at most {s.max_grad_norm:g}: scaled by "
            f"{min(1.0, s.max_grad_norm / norm):.4g}",
            f"learning rate = {s.lr:g} × 1 / {s.warmup_steps} × (1 - {1 - s.min_lr_ratio:g} × 1 / "
            f"{s.steps}) = {rate:.4g}",
            f"the furthest that any weight moved = {self.moved:.4g}",
        )

    def describe(self, sampler: Sampler, stop_ids) -> list:
        """What a sampler's weights make of the sentence."""
        logprobs = sampler.score([self.ids], [self.best.ids], self.s.temperature)[0]
        [[greedy]] = sampler.generate([self.ids], 1, self.s.max_new_tokens, 0.0, stop_ids=stop_ids)
        p = float(logprobs[self.hard].exp()), float(logprobs.sum().exp())
        return [*p, f"`{self.text(greedy)}`"]


def blocks(folder: Path, *options: str) -> dict[str, str]:
    """Name -> text, of a run from the model in `folder`."""
    train, rows, trip = grpo.train, [], None

    def watch(model, sampler, reward, batch, s, optimizer, stop_ids, start, *rest):
        nonlocal trip
        for step in train(model, sampler, reward, batch, s, optimizer, stop_ids, start, *rest):
            if step.number == 1:
                pairs = zip(start.parameters(), model.parameters(), strict=True)
                moved = max(float((a - b.detach()).abs().max()) for a, b in pairs)
                first = Sampler(start, 24, sampler.max_length)
                trip = Trip(step, reward, s, first, moved)
                rows.append(["before", *trip.describe(first, stop_ids)])
            if step.number in (1, s.steps):
                rows.append([f"after step {step.number}", *trip.describe(sampler, stop_ids)])
            yield step

    with tempfile.TemporaryDirectory() as temporary, mock.patch.object(grpo, "train", watch):
        argv = ["--preset=toy", f"--model={folder}", f"--folder={temporary}/run"]
        ssr.run_training(settings.parse([*argv, *options]))
    token = trip.token(trip.best.ids[trip.hard])
    head = ["", f"p of {token}", f"p of all of sample {trip.n}", "greedy translation"]
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
