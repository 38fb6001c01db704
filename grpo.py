"""The loop: sample, judge, compare within the group, update; one generator, one step per turn.

    for step in train(model, sampler, reward, batch, settings, optimizer, stop_ids=[eos]):
        print(step.metrics["reward/total"])        # evaluate, log, save here: weights are at rest

`batch(number)` gives the prompts of step 1, 2, …; `reward(tasks, groups, number)` gives `.total`
(P, N) and `.parts`. What the loop needs of them is that alone: it never sees text.

Group Relative Policy Optimisation, as it is done here:

- advantage: the reward against the other samples of its prompt (kernels/advantage.py);
- loss: clipped policy gradient (kernels/logprob.py), one optimizer step a batch by default. Then
  the ratio of new to old probability is exactly 1, and clipping takes no part;
- one denominator: the completion tokens of all samples of the step that have a reward ("token"),
  or each sample's own length times their number ("sequence"). It is known before the first
  backward, so losses and gradients of micro-batches simply add up;
- truncated samples are trained like others, and count; they only have no stop token to train;
- identical samples of a prompt have identical gradients, so they are trained once with the weight
  of all. With several updates a batch that is exact only where their advantages agree, too;
- a sample of advantage 0 teaches nothing (unless a KL pulls at it) and costs nothing. A step in
  which there is no other takes no optimizer step at all.

Letters: P prompts, N samples of each, T tokens.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.advantage import group_advantage
from kernels.logprob import linear_logprob, linear_policy_loss


@dataclass
class Settings:
    steps: int = 200
    """How many batches to learn from."""
    seed: int = 0
    """Of everything that is drawn: prompts, samples, toy languages."""
    prompts_per_step: int = 128
    """Source texts in a batch."""
    samples_per_prompt: int = 8
    """Candidate translations of each: a group."""
    temperature: float = 1.0
    """At which translations are sampled, and at which their log-probs are trained."""
    max_prompt_tokens: int = 512
    """Longest actor prompt."""
    max_new_tokens: int = 1024
    """Longest candidate; one that is longer is cut, and its format is wrong."""
    advantage_scale: str = "std"
    """Divide a group's advantages by: its own "std", the "batch"'s, or "none"."""
    advantage_baseline: str = "mean"
    """Compare a sample with: the group's "mean", or the mean of the others, "leave-one-out"."""
    clip_low: float = 0.2
    """The ratio of new to old probability is kept above 1 - this …"""
    clip_high: float = 0.2
    """… and below 1 + this (with one update a batch it is 1)."""
    kl: float = 0.0
    """Weight of the KL divergence from the weights at the start."""
    track_kl: bool = True
    """Measure that divergence at each step, whatever its weight: keeps a copy of the weights."""
    updates_per_batch: int = 1
    """Optimizer steps on each batch; 1 is strictly on-policy."""
    loss_norm: str = "token"
    """Each "token" weighs the same, or each "sequence"."""
    micro_batch_tokens: int = 16384
    """Tokens in one forward and backward; memory, not the result, depends on it."""
    lr: float = 1e-6
    """Learning rate of AdamW, before warm-up and decay are multiplied in."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises from 0."""
    final_lr: float = 0.1
    """Share of it that is left at the last step, by a linear decay from the first; 1: constant."""
    weight_decay: float = 0.0
    """AdamW's, of every weight."""
    max_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    max_bad_steps: int = 5
    """Stop after so many steps in a row without a finite gradient, a valid score, or a sample of
    the right format."""


class Prompt(NamedTuple):
    ids: list[int]
    task: object
    """What the reward wants to know about it."""


class Row(NamedTuple):
    """One distinct sample of a prompt."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    """The sampler's."""
    advantage: float
    """The mean of its copies."""
    copies: int
    """How many of them have a reward."""


@dataclass
class Step:
    number: int
    metrics: dict[str, float]
    groups: list[list]
    """The samples, (P, N)."""


class Stop(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


def train(
    model,
    sampler,
    reward: Callable,
    batch: Callable[[int], list[Prompt]],
    s: Settings,
    optimizer: torch.optim.Optimizer,
    stop_ids: Sequence[int],
    start=None,
) -> Iterator[Step]:
    """Steps 1 … s.steps. `start`: a sampler of the weights at the start, for the KL."""
    if s.kl > 0 and start is None:
        raise ValueError(f"kl={s.kl} needs `start`, a sampler of the weights at the start")
    bad: dict[str, int] = {}  # trouble -> steps in a row
    follow(sampler.model, model)  # copies the weights, where the sampler has its own
    for number in range(1, s.steps + 1):
        clock = Clock()
        prompts = batch(number)
        keys = range(number * len(prompts), (number + 1) * len(prompts))  # new draws each step
        groups = sampler.generate(
            [p.ids for p in prompts], s.samples_per_prompt, s.max_new_tokens, s.temperature,
            stop_ids=stop_ids, seed=s.seed, keys=keys,
        )  # fmt: skip
        clock.stage("sample")
        judged = reward([p.task for p in prompts], groups, number)
        clock.stage("judge")
        rewards = torch.tensor(judged.total, dtype=torch.float64)  # (P, N)
        advantages = group_advantage(rewards, s.advantage_scale, s.advantage_baseline)
        rows = distinct_rows(prompts, groups, rewards, advantages, s)
        reference = reference_logprobs(start, rows, s)
        clock.stage("reference")
        rate = learning_rate(s, number)
        for group in optimizer.param_groups:
            group["lr"] = rate
        trained = update(model, optimizer, rows, reference, weights_of(rows, s), s)
        follow(sampler.model, model)
        clock.stage("train")
        metrics = describe(groups, judged, rewards, advantages, rows, reference)
        metrics |= trained | clock.metrics(groups) | {"train/lr": rate}
        yield Step(number, metrics, groups)
        check_health(metrics, judged, bad, s.max_bad_steps)


# --------------------------------------------------------------------------- what is trained


def distinct_rows(
    prompts: list[Prompt], groups: list[list], rewards: Tensor, advantages: Tensor, s: Settings
) -> list[Row]:
    """Identical samples of a prompt become one row; samples without a reward are left out.

    Their rewards may differ all the same: by chance, if a judge is sampled or a scorer noisy.
    """
    rows = []
    for p, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        copies: dict[tuple, list[int]] = {}
        for n in range(len(group)):
            if not math.isnan(rewards[p, n]):
                # A ratio that moves may be clipped for one sign of the advantage and not for the
                # other: then only equal advantages can be trained as one.
                alike = 0.0 if s.updates_per_batch == 1 else float(advantages[p, n])
                copies.setdefault((tuple(group[n].ids), alike), []).append(n)
        for same in copies.values():
            sample = group[same[0]]
            advantage = math.fsum(float(advantages[p, n]) for n in same) / len(same)
            rows.append(Row(prompt.ids, sample.ids, sample.logprobs, advantage, len(same)))
    return rows


def weights_of(rows: list[Row], s: Settings) -> list[float]:
    """What one token of each row weighs in the loss; over all copies' tokens they sum to 1.

    Rows of advantage 0 count here, too, though they are not trained: what others weigh must not
    depend on them.
    """
    if s.loss_norm == "token":
        total = sum(r.copies * len(r.ids) for r in rows)
        return [r.copies / total for r in rows]
    total = sum(r.copies for r in rows)
    return [r.copies / (len(r.ids) * total) for r in rows]


def reference_logprobs(start, rows: list[Row], s: Settings) -> list[Tensor] | None:
    if start is None:
        return None
    return start.score([r.prompt for r in rows], [r.ids for r in rows], s.temperature)


def update(
    model, optimizer, rows: list[Row], reference: list[Tensor] | None, weights: list[float], s
) -> dict[str, float]:
    """`updates_per_batch` optimizer steps; statistics are those of the last, but for the gap
    between sampler and trainer: that is the first's, while both have the same weights."""
    stats = {"train/grad_norm": 0.0, "train/loss": 0.0, "train/clipped": 0.0, "train/skipped": 0.0}
    stats |= {"policy/sampler_gap": math.nan, "policy/sampler_gap_max": math.nan}  # unmeasured
    taught = [i for i, row in enumerate(rows) if row.advantage != 0 or s.kl > 0]
    stats["train/rows"] = len(taught)
    if not taught:
        return stats
    device = model.head_weight.device
    batches = [
        MicroBatch(
            [rows[i] for i in part],
            [weights[i] for i in part],
            None if s.kl == 0 else torch.cat([reference[i] for i in part]),
            device,
        )
        for part in cut(
            taught, [len(r.prompt) + len(r.ids) - 1 for r in rows], s.micro_batch_tokens
        )
    ]
    if s.updates_per_batch > 1:
        for b in batches:
            b.old = b.logprobs(model, s.temperature)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weight = sum(weights[i] * len(rows[i].ids) for i in taught)  # gaps: over what is trained
    for again in range(s.updates_per_batch):
        optimizer.zero_grad(set_to_none=True)
        found: dict[str, float] = {}
        for b in batches:
            loss, more = b.loss(model, s)
            loss.backward()
            for name, value in {"loss": loss.detach(), **more}.items():
                join = max if name.endswith("_max") else float.__add__
                found[name] = join(found[name], float(value)) if name in found else float(value)
        if not again:
            stats["policy/sampler_gap"] = found["sampler_gap"] / weight
            stats["policy/sampler_gap_max"] = found["sampler_gap_max"]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, s.max_norm))
        if math.isfinite(norm):
            optimizer.step()
        else:
            stats["train/skipped"] += 1
    optimizer.zero_grad(set_to_none=True)
    stats |= {
        "train/grad_norm": norm,
        "train/loss": found["loss"],
        "train/clipped": found["clipped"],
    }
    return stats


def cut(which: list[int], lengths: list[int], most: int) -> list[list[int]]:
    """Pack rows, longest first, into micro-batches of at most `most` tokens, or of one row."""
    parts: list[list[int]] = []
    room = 0
    for i in sorted(which, key=lambda i: -lengths[i]):
        if lengths[i] > room:
            parts.append([])
            room = most
        parts[-1].append(i)
        room -= lengths[i]
    return parts


class MicroBatch:
    """Some rows end to end in one row of tokens, each seeing itself alone. No masks, no padding."""

    def __init__(self, rows: list[Row], weights: list[float], reference: Tensor | None, device):
        # The last token is predicted, not read; the first completion token comes from the prompt's
        # last position. Where completions lie follows from lengths, never from token values.
        sequences = [r.prompt + r.ids[:-1] for r in rows]
        self.lengths = [len(x) for x in sequences]
        self.ids = torch.tensor([[i for x in sequences for i in x]], device=device)
        sizes = torch.tensor([len(r.ids) for r in rows])
        ends = torch.tensor(self.lengths).cumsum(0)
        places = [
            torch.arange(e - n, e) for e, n in zip(ends.tolist(), sizes.tolist(), strict=True)
        ]
        self.places = torch.cat(places).to(device)
        self.targets = torch.tensor([i for r in rows for i in r.ids], device=device)

        def per_token(values: list[float]) -> Tensor:
            wide = torch.tensor(values, dtype=torch.float64)
            return wide.repeat_interleave(sizes).to(device)

        self.advantages, self.weights = per_token([r.advantage for r in rows]), per_token(weights)
        sampled = [x for r in rows for x in r.logprobs]
        self.sampled = torch.tensor(sampled, dtype=torch.float64, device=device)
        self.reference = reference
        self.old: Tensor | None = None

    def hidden(self, model) -> Tensor:
        return model(self.ids, segments=self.lengths)[0, self.places]

    @torch.no_grad()
    def logprobs(self, model, temperature: float) -> Tensor:
        hidden = self.hidden(model)
        head = model.head_weight.to(hidden.dtype)
        return linear_logprob(hidden, head, self.targets, temperature)[0]

    def loss(self, model, s: Settings) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.hidden(model)
        return linear_policy_loss(
            hidden,
            model.head_weight.to(hidden.dtype),
            self.targets,
            self.advantages,
            self.weights,
            old_logprobs=self.old,
            ref_logprobs=self.reference,
            clip=(s.clip_low, s.clip_high),
            kl=s.kl,
            temperature=s.temperature,
            sampler_logprobs=self.sampled,
        )


# ---------------------------------------------------------------------- weights and their rate


def make_optimizer(model, s: Settings) -> torch.optim.AdamW:
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} is {parameter.dtype}: at lr {s.lr:g} its updates would be rounded away. "
                "Load fp32 weights and set model.compute_dtype instead"
            )
    return torch.optim.AdamW(
        model.parameters(), lr=s.lr, betas=(0.9, 0.95), weight_decay=s.weight_decay, fused=True
    )


def learning_rate(s: Settings, number: int) -> float:
    rising = min(1.0, number / max(s.warmup_steps, 1))
    return s.lr * rising * (1 - (1 - s.final_lr) * number / s.steps)


@torch.no_grad()
def follow(copy, model, decay: float = 0.0) -> None:
    """copy = decay * copy + (1 - decay) * model, in place: captured graphs read these addresses."""
    if copy is model:
        return
    for mine, theirs in zip(copy.parameters(), model.parameters(), strict=True):
        if decay == 0:
            mine.copy_(theirs)
        else:
            mine.lerp_(theirs.to(mine.dtype), 1 - decay)


# ------------------------------------------------------------------------------- what is logged


class Clock:
    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now

    def metrics(self, groups: list[list]) -> dict[str, float]:
        """Seconds by stage; tokens that were drawn, over the time of the whole step."""
        tokens = sum(len(sample.ids) for group in groups for sample in group)
        seconds = {f"seconds/{name}": value for name, value in self.seconds.items()}
        return seconds | {"tokens_per_second": tokens / (self.last - self.start)}


def describe(
    groups, judged, rewards: Tensor, advantages: Tensor, rows: list[Row], reference
) -> dict[str, float]:
    """Means over all samples, trained or not; rewards and KL over those that have a reward."""
    samples = [sample for group in groups for sample in group]
    known = ~rewards.isnan()
    lengths = [len(sample.ids) for sample in samples]
    logprobs = [x for sample in samples for x in sample.logprobs]
    metrics = {"reward/total": mean(rewards[known].tolist())}
    for name, part in judged.parts.items():
        metrics[f"reward/{name}"] = mean([x for row in part for x in row if not math.isnan(x)])
    metrics |= {
        "judge/invalid": judged.invalid,
        "groups/zero_variance": float((advantages == 0).all(1).double().mean()),
        "groups/distinct": mean([len({tuple(x.ids) for x in g}) / len(g) for g in groups]),
        # An estimate from the tokens drawn: right on average, over trained and untrained groups.
        "policy/entropy": -mean(logprobs),
        "length/mean": mean(lengths),
        "length/max": max(lengths),
        "length/truncated": mean([not sample.stopped for sample in samples]),
    }
    if reference is not None:
        gaps = [
            (r.copies, theirs.double().cpu() - torch.tensor(r.logprobs, dtype=torch.float64))
            for r, theirs in zip(rows, reference, strict=True)
        ]
        total = sum(copies * len(x) for copies, x in gaps) or math.nan
        # k3: never negative, right on average.
        k3 = [copies * float((x.expm1() - x).sum()) for copies, x in gaps]
        metrics["policy/kl"] = sum(k3) / total
    return metrics


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if len(values) else math.nan


def check_health(metrics: dict[str, float], judged, bad: dict[str, int], most: int) -> None:
    """Stop a run whose gradient, judge or format was of no use for `most` steps in a row."""
    trouble = {
        "finite gradient": metrics["train/skipped"] > 0,
        "valid score": metrics["judge/invalid"] == 1,
        "sample of the right format": metrics.get("reward/format") == 0,
    }
    for what, now in trouble.items():
        bad[what] = bad.get(what, 0) + 1 if now else 0
        if bad[what] < most:
            continue
        advice = "the weights were left alone; lower --lr"
        if what == "valid score":
            words = [w for row in judged.words for w in row if w != "not judged"][:3]
            advice = "the judge's last words:" + "".join(f"\n  {w[-300:]!r}" for w in words)
        elif what == "sample of the right format":
            advice = "see samples.jsonl; the prompts may not suit the model, or --max-new-tokens"
        raise Stop(f"no {what} for {most} steps in a row: {advice}")
