"""The loop: sample, judge, compare within the group, update; one generator, one step per turn.

    for step in train(model, sampler, reward, batch, settings, optimizer, stop_ids=[eos]):
        print(step.metrics["reward/total"])        # evaluate, log, save here: weights are at rest

What the loop needs of others; text it passes on, and reads none:

- `batch(number)`: the prompts of step 1, 2, …;
- `reward(tasks, groups, number)`: for each group `.total` (N rewards; NaN: none), `.parts` (by name
  N numbers; "format" is 1 where the form was right, and only then was anything judged), `.words`,
  maybe `.weight` (of its advantages); maybe `reward.finish(judged)`, which sees all ranks';
- `sampler`: `.model`, `.generate(prompts, n, max_new_tokens, temperature, stop_ids=, seed=, keys=)`
  as sampler.py has it;
- `model(ids (1, T), segments=lengths)`: hidden states (1, T, D) of sequences end to end in one row,
  a prompt once before all its samples (`Transformer.forward` says how); `.head_weight` (V, D),
  whose product with them are the logits.

Group Relative Policy Optimisation, as it is done here:

- advantage: the reward against the other samples of its prompt (kernels/advantage.py);
- a tie gives exactly 0, and so does a group of one; a sample without a reward is left out of its
  group's mean, and out of the loss;
- loss: clipped policy gradient (kernels/logprob.py), one optimizer step a batch by default. Then
  the ratio of new to old probability is exactly 1 (the sampler's log-probs are compared with, and
  never divided by), clipping takes no part, and the loss is minus the mean advantage: about 0,
  whatever is learned. Its gradient is what matters;
- one denominator, of the samples that have a reward: all their completion tokens ("token"), or for
  each its own length times how many they are ("sequence"). It is known before the first backward,
  so losses and gradients of micro-batches simply add up (`weights_of`);
- truncated samples are trained like others, and count; they only have no stop token to train;
- identical samples of a prompt have identical gradients, so they are trained once with the weight
  of all. With several updates a batch only those whose advantages are equal are;
- a prompt is computed once for all its samples, which see it and themselves alone;
- a sample of advantage 0 teaches nothing (unless a KL pulls at it) and is not trained. A step in
  which all are 0 takes no optimizer step;
- with many ranks each samples and judges its share of the prompts, all of them then know the whole
  batch, and each takes its share of the micro-batches; gradients are summed, not averaged, in
  backward (ranks.py, where `share` deals work and gives every rank all of its results in order).
  Every rank calls `train` with the same arguments, and gets the same steps.

Letters: P prompts, N samples of each, T tokens, D width, V vocabulary.
"""

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.advantage import group_advantage
from kernels.logprob import linear_logprob, linear_policy_loss
from ranks import Ranks, clip_gradients, follow


@dataclass
class Settings:
    """Of the loop, and of the callers who make its prompts and samplers."""

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
    """Tokens in one forward and backward, where a prompt counts once, and an eighth for each other
    sample of it; memory, not the result, depends on it."""
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
    """A distinct sample of a prompt, and what is trained of it."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    """By the sampler: to measure with, not to train with."""
    advantage: float
    """The mean of its copies."""
    copies: int
    """How many of them have a reward."""


@dataclass
class Step:
    number: int
    metrics: dict[str, float | list[int]]
    """Numbers, and under "histogram/…" counts."""
    groups: Sequence[list]
    """The samples, (P, N): drawn before this step's update."""
    missing: dict[str, int]
    """What there was none of -> for how many steps in a row, this one included."""
    prompts: Sequence[Prompt] = ()
    judged: Sequence = ()
    """What the reward said of each group."""
    advantages: Tensor | None = None
    """(P, N)"""


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
    ranks: Ranks | None = None,
    done: Step | None = None,
) -> Iterator[Step]:
    """Steps 1 … s.steps; or those after `done`, the last one of a run that goes on. `start`: a
    model with the weights of the start, whole on every rank, for the KL.

    What a step does depends on the settings, the weights, the optimizer's state and the step's
    number alone. A run's health is looked at after the yield: the caller has the step by then.
    """
    if s.kl > 0 and start is None:
        raise ValueError(f"kl={s.kl} needs `start`, a model with the weights of the start")
    ranks = ranks or Ranks()
    missing = dict(done.missing) if done else {}
    refresh(sampler, model)
    for number in range(done.number + 1 if done else 1, s.steps + 1):
        clock, ranks.step = Clock(), number
        prompts = batch(number)
        groups, judged = roll_out(prompts, number, sampler, reward, s, stop_ids, ranks, clock)
        if hasattr(reward, "finish"):
            judged = reward.finish(judged)
        rewards = torch.tensor([group.total for group in judged], dtype=torch.float64)  # (P, N)
        advantages = group_advantage(rewards, s.advantage_scale, s.advantage_baseline)
        importance = [getattr(group, "weight", 1.0) for group in judged]
        advantages *= torch.tensor(importance, dtype=advantages.dtype)[:, None]
        rows = distinct_rows(prompts, groups, rewards, advantages, s)
        reference = reference_logprobs(start, rows, s, ranks)
        clock.stage("reference")
        rate = learning_rate(s, number)
        for group in optimizer.param_groups:
            group["lr"] = rate
        trained = update(model, optimizer, rows, reference, weights_of(rows, s), s, ranks)
        refresh(sampler, model)
        clock.stage("train")
        metrics = describe(groups, judged, rewards, advantages, rows, reference)
        passed = trained["train/tokens"] * s.updates_per_batch
        metrics |= trained | clock.metrics(groups, passed) | {"train/lr": rate}
        missing = still_missing(metrics, missing)
        yield Step(number, metrics, groups, missing, prompts, judged, advantages)
        check_health(missing, judged, s.max_bad_steps)


def refresh(sampler, model) -> None:
    """The sampler sees the new weights; there is nothing to do where they are the same ones."""
    if sampler.model is not model:
        follow(sampler.model.parameters(), model.parameters())


def roll_out(
    prompts: list[Prompt], number: int, sampler, reward, s: Settings, stop_ids, ranks: Ranks, clock
) -> tuple[tuple, tuple]:
    """The samples of each prompt and what they are worth: made by one rank, known to all."""

    def work(mine: Sequence[int]) -> list[tuple]:
        groups = sampler.generate(
            [prompts[i].ids for i in mine], s.samples_per_prompt, s.max_new_tokens, s.temperature,
            stop_ids=stop_ids, seed=s.seed, keys=[number * len(prompts) + i for i in mine],
        )  # fmt: skip
        clock.stage("sample")
        ranks.at("judge")
        judged = reward([prompts[i].task for i in mine], groups, number)
        clock.stage("judge")
        return list(zip(groups, judged, strict=True))

    groups, judged = zip(*ranks.share("sample", range(len(prompts)), work), strict=True)
    clock.stage("wait")
    return groups, judged


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
    """What a token of each row weighs in the loss, its copies counted; all rows' tokens sum to 1.

    Rows of advantage 0 count here, too, though they are not trained: what others weigh must not
    depend on them.
    """
    if s.loss_norm == "token":
        total = sum(r.copies * len(r.ids) for r in rows)
        return [r.copies / total for r in rows]
    total = sum(r.copies for r in rows)
    return [r.copies / (len(r.ids) * total) for r in rows]


def reference_logprobs(start, rows: list[Row], s: Settings, ranks: Ranks) -> list[Tensor] | None:
    """Of each row's tokens, by the weights of the start."""
    if start is None:
        return None
    parts = [x for x in pack(range(len(rows)), rows, s.micro_batch_tokens, ranks.size) if x]

    def score(mine: list[list[int]]) -> list[list[Tensor]]:
        found = []
        for part in mine:
            b = MicroBatch(
                [rows[i] for i in part], [0.0] * len(part), None, start.head_weight.device
            )
            logprobs = b.logprobs(start, s.temperature).cpu()
            sizes = [len(rows[i].ids) for i in part]
            found.append([x.clone() for x in logprobs.split(sizes)])  # to send no more than it is
        return found

    of: dict[int, Tensor] = {}
    for part, logprobs in zip(parts, ranks.share("reference", parts, score), strict=True):
        of |= zip(part, logprobs, strict=True)
    return [of[i] for i in range(len(rows))]


def update(
    model,
    optimizer,
    rows: list[Row],
    reference: list[Tensor] | None,
    weights: list[float],
    s,
    ranks: Ranks,
) -> dict[str, float]:
    """`updates_per_batch` optimizer steps. What is measured is the last one's, but for the gap
    between sampler and trainer: that is the first's, while both have the same weights; and for
    "train/skipped", which counts those without a finite gradient.

    "train/clipped" is the share of the loss's weight whose ratio was clipped, "train/grad_norm" the
    norm before gradients are scaled down.
    """
    stats = {"train/grad_norm": 0.0, "train/loss": 0.0, "train/clipped": 0.0, "train/skipped": 0.0}
    stats |= {"policy/sampler_gap": math.nan, "policy/sampler_gap_max": math.nan}  # unmeasured
    taught = [i for i, row in enumerate(rows) if row.advantage != 0 or s.kl > 0]
    parts = pack(taught, rows, s.micro_batch_tokens, ranks.size)
    passed = sum(sum(map(sum, segments_of([rows[i] for i in part]))) for part in parts)
    stats |= {"train/rows": len(taught), "train/tokens": passed}
    if not taught:
        return stats
    batches = [
        MicroBatch(
            [rows[i] for i in part],
            [weights[i] for i in part],
            None if s.kl == 0 else [reference[i] for i in part],
            model.head_weight.device,
        )
        for part in parts[ranks.rank :: ranks.size]
    ]
    # Listed before any forward: after it FSDP shows gathered copies, which no optimizer owns.
    parameters = [p for p in model.parameters() if p.requires_grad]
    if s.updates_per_batch > 1:
        for b in batches:
            b.old = b.logprobs(model, s.temperature)
    weight = sum(weights[i] * len(rows[i].ids) for i in taught)  # gaps: over what is trained
    for again in range(s.updates_per_batch):
        optimizer.zero_grad(set_to_none=True)
        mine: list[dict[str, float]] = []
        for i, b in enumerate(batches, 1):
            ranks.at(f"train, micro-batch {i} of {len(batches)}")
            loss, more = b.loss(model, s)
            loss.backward()
            mine.append({name: float(x) for name, x in {"loss": loss.detach(), **more}.items()})
        found = merge([x for theirs in ranks.gather(mine) for x in theirs])
        if not again:
            stats["policy/sampler_gap"] = found["sampler_gap"] / weight
            stats["policy/sampler_gap_max"] = found["sampler_gap_max"]
        norm = clip_gradients(parameters, s.max_norm)
        if math.isfinite(norm):  # one number: the ranks cannot disagree
            optimizer.step()
        else:
            stats["train/skipped"] += 1
    optimizer.zero_grad(set_to_none=True)
    names = {"train/loss": "loss", "train/clipped": "clipped"}
    return stats | {"train/grad_norm": norm} | {name: found[x] for name, x in names.items()}


def merge(found: list[dict[str, float]]) -> dict[str, float]:
    """Statistics of micro-batches are sums, or maxima by name."""
    return {
        name: (max if name.endswith("_max") else sum)([x[name] for x in found]) for name in found[0]
    }


def pack(which: Sequence[int], rows: list[Row], most: int, size: int) -> list[list[int]]:
    """Micro-batches of about the same number of tokens, at most `most` unless one row is longer.

    Rows of one prompt stay together, as far as they fit: the prompt is computed once for them. Each
    still reads a copy of its keys, for which its tokens count an eighth.

    Each of `size` ranks needs the same number of them, because forward and backward are collective:
    some may be empty. Largest first, so that the ranks have about as much to do in each round.
    """

    def length(group: list[int]) -> int:
        prompt = len(rows[group[0]].prompt)
        return prompt + sum(len(rows[i].ids) - 1 for i in group) + (len(group) - 1) * (prompt // 8)

    waiting = [list(g) for _, g in itertools.groupby(which, key=lambda i: rows[i].prompt)]
    groups = []
    while waiting:  # in halves, until it fits
        group = waiting.pop(0)
        if length(group) > most and len(group) > 1:
            waiting[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]
        else:
            groups.append(group)
    while len(groups) < size and (several := [g for g in groups if len(g) > 1]):  # work for each
        group = max(several, key=length)
        place = groups.index(group)
        groups[place : place + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    lengths = [length(group) for group in groups]
    order = sorted(range(len(groups)), key=lambda g: -lengths[g])
    count = min(sum(lengths) / most, len(groups))  # of which none need be empty
    count = size * max(1, math.ceil(count / size))
    while True:
        parts: list[list[int]] = [[] for _ in range(count)]
        heap = [(0, part) for part in range(count)]  # the emptiest first
        for g in order:
            tokens, part = heapq.heappop(heap)
            parts[part].append(g)
            heapq.heappush(heap, (tokens + lengths[g], part))
        full = dict((part, tokens) for tokens, part in heap)
        if all(full[part] <= most or len(parts[part]) == 1 for part in range(count)):
            fullest = sorted(range(count), key=lambda part: -full[part])
            return [[i for g in parts[part] for i in groups[g]] for part in fullest]
        count += size


def segments_of(rows: list[Row]) -> list[list[int]]:
    """As the model wants them: the length of a prompt, then of what follows it in each sample. The
    last token of a sample is predicted, and not read."""
    groups = itertools.groupby(rows, key=lambda row: row.prompt)
    return [[len(prompt), *(len(r.ids) - 1 for r in group)] for prompt, group in groups]


class MicroBatch:
    """Some rows end to end in one row of tokens, each seeing its prompt and itself alone. No masks,
    no padding. What lies where follows from lengths, never from token values."""

    def __init__(
        self, rows: list[Row], weights: list[float], reference: list[Tensor] | None, device
    ):
        if not rows:  # a rank without work still takes part: one token that weighs nothing
            rows, weights = [Row([0], [0], [0.0], 0.0, 1)], [0.0]
            reference = None if reference is None else [torch.zeros(1)]
        self.segments = segments_of(rows)
        ids: list[int] = []
        places: list[int] = []  # of the hidden states that predict: the prompt's last, and so on
        waiting = iter(rows)
        for _, *more in self.segments:
            group = [next(waiting) for _ in more]
            ids += group[0].prompt
            last = len(ids) - 1
            for row in group:
                places += [last, *range(len(ids), len(ids) + len(row.ids) - 1)]
                ids += row.ids[:-1]
        self.ids = torch.tensor([ids], device=device)
        self.places = torch.tensor(places, device=device)
        sizes = torch.tensor([len(r.ids) for r in rows])
        self.targets = torch.tensor([i for r in rows for i in r.ids], device=device)

        def per_token(values: list[float]) -> Tensor:
            wide = torch.tensor(values, dtype=torch.float64)
            return wide.repeat_interleave(sizes).to(device)

        self.advantages, self.weights = per_token([r.advantage for r in rows]), per_token(weights)
        sampled = [x for r in rows for x in r.logprobs]
        self.sampled = torch.tensor(sampled, dtype=torch.float64, device=device)
        self.reference = None if reference is None else torch.cat(reference).to(device)
        self.old: Tensor | None = None

    def hidden(self, model) -> Tensor:
        return model(self.ids, segments=self.segments)[0, self.places]

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


# ------------------------------------------------------------------------------- what is logged


class Clock:
    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def stage(self, name: str) -> None:
        """What was done since the last one ended."""
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now

    def metrics(self, groups: list[list], trained: int) -> dict[str, float]:
        """Seconds by stage, and what was done in a second of each."""
        drawn = sum(len(sample.ids) for group in groups for sample in group)
        done = {
            "sample": drawn,  # tokens
            "judge": sum(map(len, groups)),  # translations
            "train": trained,  # tokens, prompts included
        }
        found = {f"seconds/{name}": value for name, value in self.seconds.items()}
        for name in done.keys() & self.seconds:
            found[f"per_second/{name}"] = done[name] / self.seconds[name]
        return found | {"tokens_per_second": drawn / (self.last - self.start)}


def describe(
    groups, judged, rewards: Tensor, advantages: Tensor, rows: list[Row], reference
) -> dict[str, float | list[int]]:
    """Means over all samples, trained or not; rewards and KL over those that have a reward.

    What each means, docs/run-folder.md says in a table.
    """
    samples = [sample for group in groups for sample in group]
    known = ~rewards.isnan()
    lengths = [len(sample.ids) for sample in samples]
    logprobs = [x for sample in samples for x in sample.logprobs]
    # What is of a wrong format is not judged.
    forms = [x for row in judged for x in row.parts.get("format", [1.0] * len(row.total))]
    metrics = {"reward/total": mean(rewards[known].tolist())}
    for name in judged[0].parts:
        values = [x for row in judged for x in row.parts[name]]
        metrics[f"reward/{name}"] = mean([x for x in values if not math.isnan(x)])
        if name != "format":
            asked = [x for x, right in zip(values, forms, strict=True) if right]
            metrics[f"histogram/{name}"] = histogram(asked)
    metrics |= {
        # A reward is missing when a judgement is no score.
        "judge/invalid": int(rewards.isnan().sum()) / max(sum(forms), 1),
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
            (r.copies, theirs.double() - torch.tensor(r.logprobs, dtype=torch.float64))
            for r, theirs in zip(rows, reference, strict=True)
        ]
        total = sum(copies * len(x) for copies, x in gaps) or math.nan
        # The estimator called k3, exp(x) - 1 - x: never negative, right on average.
        k3 = [copies * float((x.expm1() - x).sum()) for copies, x in gaps]
        metrics["policy/kl"] = sum(k3) / total
    return metrics


def histogram(values: Sequence[float], bins: int = 20) -> list[int]:
    """How many of them lie in each part of 0 … 1; beyond counts to the nearest, NaN nowhere."""
    counts = [0] * bins
    for x in values:
        if not math.isnan(x):
            counts[min(max(int(x * bins), 0), bins - 1)] += 1
    return counts


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if len(values) else math.nan


def still_missing(metrics: dict, before: dict[str, int]) -> dict[str, int]:
    """What there was none of, and for how many steps in a row."""
    none = {
        "finite gradient": metrics["train/skipped"] > 0,
        "valid score": metrics["judge/invalid"] == 1,
        "sample of the right format": metrics.get("reward/format") == 0,
    }
    return {what: before.get(what, 0) + 1 for what, nothing in none.items() if nothing}


def check_health(missing: dict[str, int], judged, most: int) -> None:
    """Stop a run whose gradient, judge or format was of no use for `most` steps in a row."""
    for what in [what for what, steps in missing.items() if steps >= most]:
        advice = "the weights were left alone; lower --lr"
        if what == "valid score":
            words = [w for row in judged for w in row.words if w != "not judged"][:3]
            advice = "the judge's last words:" + "".join(f"\n  {w[-300:]!r}" for w in words)
        elif what == "sample of the right format":
            advice = "see groups.jsonl; the prompts may not suit the model, or --max-new-tokens"
        raise Stop(f"no {what} for {most} steps in a row: {advice}")
