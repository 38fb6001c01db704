"""The loop: sample, judge, compare within the group, update. A generator yields one step per turn.

    for step in train(model, sampler, reward, batch, settings, optimizer, stop_ids=[eos]):
        print(step.metrics["reward/total"])        # evaluate, log, save here: weights are at rest

Interfaces the loop expects (it never inspects text):

- `batch(number)`: the prompts of step 1, 2, …;
- `reward(tasks, groups, number)`: for each group `.total` (N rewards, NaN where there is none),
  `.parts` (name -> N numbers; "format" is 1 where that was right), `.judge_text`, and
  optionally `.weight` (of its advantages) and `.part_weights` (name -> weight of the parts that
  the total is the sum of); optionally `reward.finish(judged)`, given all ranks' groups;
- `sampler`: `.model` and `.generate`, as in sampler.py;
- `model(ids (1, T), segments=lengths)`: hidden states (1, T, D) of packed sequences, each prompt
  once before all its samples (`Transformer.forward`), and `.head_weight` (V, D).

Group Relative Policy Optimisation, as it is done here:

- Advantage: the reward against the other samples of the prompt (kernels/advantage.py). A tie gives
  exactly 0. A sample without a reward is left out of its group's mean and out of the loss.
- Loss: clipped policy gradient (kernels/logprob.py). With one update a batch (default) the ratio of
  new to old probability is exactly 1, so nothing is clipped and the loss, -mean(advantage), is
  about 0 whatever is learned. The sampler's log-probs only serve metrics and `importance_cap`.
- One normaliser for all tokens of a step, known before the first backward, so that gradients of
  micro-batches add up (`token_loss_weights`).
- Identical samples of a prompt have the same gradient: they are trained once, with the weight of
  all. With several updates a batch, only those with equal advantages are.
- A sample of advantage 0 is not trained, unless a KL or an entropy bonus pulls at it. If there is
  nothing to train, no optimizer step is taken. What was cut off has no stop token to train.
- Each rank samples and judges its share of the prompts, then trains its share of the micro-batches
  of the whole batch; gradients are summed (run/distributed.py). Every rank calls `train` with the
  same arguments, and gets the same steps.

Letters: P prompts, N samples of each, T tokens, D width, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.advantage import decoupled_advantage, group_advantage
from kernels.logprob import linear_logprob, linear_policy_loss
from run.distributed import Ranks, clip_gradients, sync_weights
from run.metrics import Clock, batch_metrics

MAX_BAD_STEPS = 5  # in a row without a finite gradient, a score or a well-formed sample


@dataclass
class Settings:
    """Settings of the loop, and of those who build its prompts and samplers."""

    steps: int = 200
    """Number of training steps, one batch each."""
    seed: int = 0
    """Random seed of prompts, samples and toy languages."""
    prompts_per_step: int = 128
    """Prompts per batch."""
    samples_per_prompt: int = 8
    """Samples drawn for each prompt (the group)."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are trained at the same one."""
    max_prompt_tokens: int = 512
    """Maximum length of a prompt in tokens; longer ones are left out."""
    max_new_tokens: int = 1024
    """Maximum length of a sample; a longer one is cut off and counts as wrong format."""
    advantage_scale: str = "std"
    """What advantages are divided by: "std", the standard deviation of their group; "batch", that
    of the whole batch; "none", nothing; "each": each part of the reward by its own, before they are
    added with their weights (GDPO)."""
    clip: float = 0.2
    """Clip the probability ratio to 1 ± this. It has no effect with one update per batch."""
    kl: float = 0.0
    """Weight of a KL penalty towards the starting weights."""
    entropy_bonus: float = 0.0
    """Weight of the policy's entropy in the objective."""
    importance_cap: float = 0.0
    """Truncated importance sampling: weight each token by its probability under the trained weights
    over that under the sampler's (bf16 on GPUs), at most this, such as 2. 0 is off;
    policy/sampler_gap shows whether it is needed."""
    overlong: str = "penalize"
    """What becomes of samples that are cut off: "penalize", the reward of a wrong format; "mask",
    they are left out; "soft", as "penalize", and a sample loses up to 1 in the last fifth of
    --max-new-tokens (DAPO)."""
    track_kl: bool = False
    """Log the KL divergence from the starting weights even if --kl is 0. It takes a whole copy of
    those weights on every GPU, and a forward pass a step."""
    updates_per_batch: int = 1
    """Optimizer steps per batch; 1 is strictly on-policy."""
    loss_norm: str = "token"
    """Give each "token" the same weight in the loss, or each "sequence"; "constant": each token,
    divided by samples × --max-new-tokens (Dr. GRPO); "effective": each token, without the groups
    whose samples are all equally good (DAPO)."""
    micro_batch_tokens: int = 16384
    """Maximum number of tokens in one forward and backward pass. Affects memory and speed, not the
    result."""
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step as a share of --lr (linear decay); 1 keeps it constant."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, applied to every weight."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm; longer gradients are scaled down."""


class Prompt(NamedTuple):
    ids: list[int]
    task: object  # for the reward


class TrainSample(NamedTuple):
    """A distinct sample of a prompt, and what is trained of it."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]  # by the sampler: for metrics and importance_cap
    advantage: float  # the mean of its copies
    copies: int  # those that have a reward


@dataclass
class Step:
    number: int
    metrics: dict[str, float | list[int]]  # numbers, and under "histogram/…" counts
    groups: Sequence[list]  # samples (P, N), drawn before this step's update
    failure_streaks: dict[str, int]  # "valid score" … -> steps in a row without one, this included
    prompts: Sequence[Prompt] = ()
    judged: Sequence = ()  # the reward's results, by group
    rewards: Tensor | None = None  # (P, N), NaN where there is none
    advantages: Tensor | None = None  # (P, N)


class Stop(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


def train(
    model, sampler, reward: Callable, batch: Callable[[int], list[Prompt]], s: Settings,
    optimizer: torch.optim.Optimizer, stop_ids: Sequence[int], reference_model=None,
    ranks: Ranks | None = None, resume_from: Step | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Steps 1 … s.steps; or those after `resume_from`, the last step of a run that goes on.
    `reference_model`: the starting weights, whole on every rank, for the KL.

    What a step does depends on the settings, the weights, the optimizer's state and the step's
    number alone. A run's health is looked at after the yield: the caller has the step by then.
    """
    if s.kl > 0 and reference_model is None:
        raise ValueError(f"kl={s.kl} needs `reference_model`, the starting weights")
    ranks = ranks or Ranks()
    streaks = dict(resume_from.failure_streaks) if resume_from else {}
    sync_sampler(sampler, model)
    for number in range(resume_from.number + 1 if resume_from else 1, s.steps + 1):
        clock, ranks.step = Clock(), number
        prompts = batch(number)
        groups, judged = rollout(prompts, number, sampler, reward, s, stop_ids, ranks, clock)
        if hasattr(reward, "finish"):
            judged = reward.finish(judged)
        rewards, advantages = rewards_and_advantages(groups, judged, s, model.head_weight.device)
        rows = merge_identical_samples(prompts, groups, rewards, advantages, s)
        reference = reference_logprobs(reference_model, rows, s, ranks)
        clock.end_stage("reference")
        rate = learning_rate(s, number)
        for group in optimizer.param_groups:
            group["lr"] = rate
        trained = update(model, optimizer, rows, reference, token_loss_weights(rows, s), s, ranks)
        sync_sampler(sampler, model)
        clock.end_stage("train")
        metrics = batch_metrics(groups, judged, rewards, advantages, rows, reference)
        num_tokens = trained["train/tokens"] * s.updates_per_batch
        metrics |= trained | clock.metrics(groups, num_tokens) | {"train/lr": rate}
        streaks = update_failure_streaks(metrics, streaks)
        yield Step(number, metrics, groups, streaks, prompts, judged, rewards, advantages)
        check_health(streaks, judged)


def sync_sampler(sampler, model) -> None:
    """Copy the new weights to the sampler, unless it uses the same model."""
    if sampler.model is not model:
        sync_weights(sampler.model.parameters(), model.parameters())


def rollout(
    prompts: list[Prompt], number: int, sampler, reward, s: Settings, stop_ids, ranks: Ranks, clock
) -> tuple[tuple, tuple]:
    """The samples of all prompts and their rewards. Each rank makes those of its share of the
    prompts; the results are gathered on every rank."""

    def work(mine: Sequence[int]) -> list[tuple]:
        groups = sampler.generate(
            [prompts[i].ids for i in mine], s.samples_per_prompt, s.max_new_tokens, s.temperature,
            stop_ids=stop_ids, seed=s.seed, keys=[number * len(prompts) + i for i in mine],
        )  # fmt: skip
        clock.end_stage("sample")
        ranks.set_stage("judge")
        judged = reward([prompts[i].task for i in mine], groups, number)
        clock.end_stage("judge")
        return list(zip(groups, judged, strict=True))

    groups, judged = zip(*ranks.map_over_ranks("sample", range(len(prompts)), work), strict=True)
    clock.end_stage("wait")
    return groups, judged


# --------------------------------------------------------------------------- what is trained


def rewards_and_advantages(groups, judged, s: Settings, device) -> tuple[Tensor, Tensor]:
    """(P, N) each. On a GPU the Triton kernel computes the advantages."""
    tensor = partial(torch.tensor, dtype=torch.float64)
    rewards = tensor([group.total for group in judged])
    weights = getattr(judged[0], "part_weights", None) or {}
    parts = [(w, tensor([x.parts[name] for x in judged])) for name, w in weights.items()]
    parts = parts or [(1.0, rewards)]
    if s.overlong == "mask":
        is_cut = torch.tensor([[not sample.stopped for sample in group] for group in groups])
        rewards = rewards.masked_fill(is_cut, math.nan)
    if s.overlong == "soft":  # DAPO's: from 0 to 1 in the last fifth
        lengths = tensor([[len(sample.ids) for sample in group] for group in groups])
        excess = (5 * lengths / s.max_new_tokens - 4).clamp(min=0)
        rewards, parts = rewards - excess, [*parts, (1.0, -excess)]
    if s.advantage_scale == "each":
        known = [(w, x.masked_fill(rewards.isnan(), math.nan).to(device)) for w, x in parts]
        advantages = decoupled_advantage(known)
    else:
        advantages = group_advantage(rewards.to(device), s.advantage_scale)
    return rewards, advantages.cpu() * tensor([[getattr(x, "weight", 1.0)] for x in judged])


def merge_identical_samples(
    prompts: list[Prompt], groups: list[list], rewards: Tensor, advantages: Tensor, s: Settings
) -> list[TrainSample]:
    """Identical samples of a prompt become one row, though a noisy scorer may have given them
    different rewards; samples without a reward are left out, and with "effective" also groups
    without a difference."""
    rows = []
    for p, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        if s.loss_norm == "effective" and not advantages[p].any():
            continue
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
            rows.append(TrainSample(prompt.ids, sample.ids, sample.logprobs, advantage, len(same)))
    return rows


def token_loss_weights(rows: list[TrainSample], s: Settings) -> list[float]:
    """Loss weight of a token, by row: its copies / the tokens of all rows' copies, those of
    advantage 0 included ("token", "effective"); its copies / (its tokens × all copies)
    ("sequence"); its copies / the most tokens that a batch can have ("constant")."""
    if s.loss_norm == "sequence":
        total = sum(r.copies for r in rows)
        return [r.copies / (len(r.ids) * total) for r in rows]
    total = sum(r.copies * len(r.ids) for r in rows)
    if s.loss_norm == "constant":
        total = s.prompts_per_step * s.samples_per_prompt * s.max_new_tokens
    return [r.copies / total for r in rows]


def reference_logprobs(
    model, rows: list[TrainSample], s: Settings, ranks: Ranks
) -> list[Tensor] | None:
    """Log-probs of rows under the starting weights."""
    if model is None:
        return None
    parts = [
        x for x in pack_micro_batches(range(len(rows)), rows, s.micro_batch_tokens, ranks.size) if x
    ]

    def score(mine: list[list[int]]) -> list[Tensor]:
        device = model.head_weight.device
        batches = (
            MicroBatch([rows[i] for i in part], [0.0] * len(part), None, device) for part in mine
        )
        return [b.logprobs(model, s.temperature).cpu() for b in batches]

    by_row: dict[int, Tensor] = {}
    for part, logprobs in zip(parts, ranks.map_over_ranks("reference", parts, score), strict=True):
        by_row |= zip(part, logprobs.split([len(rows[i].ids) for i in part]), strict=True)
    return [by_row[i] for i in range(len(rows))]


def update(
    model, optimizer, rows: list[TrainSample], reference: list[Tensor] | None,
    weights: list[float], s: Settings, ranks: Ranks,
) -> dict[str, float]:  # fmt: skip
    """Take `updates_per_batch` optimizer steps; return the metrics of the last one.

    "policy/…" compares sampler and trainer at the first one, while both have the same weights.
    "train/skipped" counts updates without a finite gradient, "train/clipped" is the share of the
    loss weight whose ratio was clipped, "train/grad_norm" the norm before scaling down.
    """
    stats = {"train/grad_norm": 0.0, "train/loss": 0.0, "train/clipped": 0.0, "train/skipped": 0.0}
    means = ["sampler_gap"] + ["importance_ratio", "importance_capped"] * (s.importance_cap > 0)
    stats |= {f"policy/{name}": math.nan for name in (*means, "sampler_gap_max")}  # unmeasured
    trainable = [i for i, row in enumerate(rows) if row.advantage or s.kl or s.entropy_bonus]
    parts = pack_micro_batches(trainable, rows, s.micro_batch_tokens, ranks.size)
    num_tokens = sum(sum(map(sum, segments_of([rows[i] for i in part]))) for part in parts)
    stats |= {"train/rows": len(trainable), "train/tokens": num_tokens}
    if not trainable:
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
    weight = sum(weights[i] * len(rows[i].ids) for i in trainable)
    for number in range(s.updates_per_batch):
        optimizer.zero_grad(set_to_none=True)
        mine: list[dict[str, float]] = []
        for i, b in enumerate(batches, 1):
            ranks.set_stage(f"train, micro-batch {i} of {len(batches)}")
            loss, more = b.loss(model, s)
            loss.backward()
            mine.append({name: float(x) for name, x in {"loss": loss.detach(), **more}.items()})
        parts = [x for theirs in ranks.gather(mine) for x in theirs]
        totals = {  # sums, or maxima by name
            k: (max if k.endswith("_max") else sum)(x[k] for x in parts) for k in parts[0]
        }
        if number == 0:
            stats |= {f"policy/{name}": totals[name] / weight for name in means}
            stats["policy/sampler_gap_max"] = totals["sampler_gap_max"]
        norm = clip_gradients(parameters, s.max_grad_norm)
        if math.isfinite(norm):  # one number: the ranks cannot disagree
            optimizer.step()
        else:
            stats["train/skipped"] += 1
    optimizer.zero_grad(set_to_none=True)
    stats |= {"train/loss": totals["loss"], "train/clipped": totals["clipped"] / weight}
    return stats | {"train/grad_norm": norm}


def pack_micro_batches(
    which: Sequence[int], rows: list[TrainSample], most: int, size: int
) -> list[list[int]]:
    """The rows `which` in micro-batches of similar size: at most `most` tokens, or one longer row.

    Rows of one prompt stay together as far as they fit: the prompt is computed once for them. Every
    further row reads a copy of its keys, which counts as an eighth of the prompt's tokens.

    All `size` ranks need the same number of micro-batches, because forward and backward are
    collective: some may be empty. Largest first, so that each round is balanced between ranks.
    """

    def length(group: list[int]) -> int:
        prompt = len(rows[group[0]].prompt)
        return prompt + sum(len(rows[i].ids) - 1 for i in group) + (len(group) - 1) * (prompt // 8)

    def halves(group: list[int]) -> list[list[int]]:
        half = len(group) // 2
        if half == 0 or length(group) <= most:
            return [group]
        return halves(group[:half]) + halves(group[half:])

    by_prompt = itertools.groupby(which, key=lambda i: rows[i].prompt)
    groups = [part for _, group in by_prompt for part in halves(list(group))]
    while len(groups) < size and (several := [g for g in groups if len(g) > 1]):  # no rank is idle
        longest = max(several, key=length)
        at, half = groups.index(longest), len(longest) // 2
        groups[at : at + 1] = [longest[:half], longest[half:]]
    groups.sort(key=length, reverse=True)
    lengths = [length(group) for group in groups]
    count = min(sum(lengths) / most, len(groups))
    count = size * max(1, math.ceil(count / size))
    while True:
        parts: list[list[list[int]]] = [[] for _ in range(count)]
        tokens = [0] * count
        for group, added in zip(groups, lengths, strict=True):
            emptiest = tokens.index(min(tokens))
            parts[emptiest].append(group)
            tokens[emptiest] += added
        if all(n <= most or len(part) == 1 for n, part in zip(tokens, parts, strict=True)):
            break
        count += size
    order = sorted(range(count), key=lambda part: -tokens[part])
    return [[i for group in parts[part] for i in group] for part in order]


def segments_of(rows: list[TrainSample]) -> list[list[int]]:
    """For the model: the length of a prompt, then of what follows it in each sample. The last token
    of a sample is predicted, and not read."""
    groups = itertools.groupby(rows, key=lambda row: row.prompt)
    return [[len(prompt), *(len(r.ids) - 1 for r in group)] for prompt, group in groups]


class MicroBatch:
    """Rows packed into one sequence, each attending to its prompt and itself alone. No masks, no
    padding. The layout depends on lengths, never on token values."""

    def __init__(
        self, rows: list[TrainSample], weights: list[float], reference: list[Tensor] | None, device
    ):
        if not rows:  # a rank without work still takes part: one token that weighs nothing
            rows, weights = [TrainSample([0], [0], [0.0], 0.0, 1)], [0.0]
            reference = None if reference is None else [torch.zeros(1)]
        self.segments = segments_of(rows)
        ids: list[int] = []
        predictors: list[int] = []  # positions whose hidden states predict the targets
        for prompt, group in itertools.groupby(rows, key=lambda row: row.prompt):
            ids += prompt
            last = len(ids) - 1
            for row in group:
                predictors += [last, *range(len(ids), len(ids) + len(row.ids) - 1)]
                ids += row.ids[:-1]
        self.ids = torch.tensor([ids], device=device)
        self.predictors = torch.tensor(predictors, device=device)
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
        return model(self.ids, segments=self.segments)[0, self.predictors]

    @torch.no_grad()
    def logprobs(self, model, temperature: float) -> Tensor:
        hidden = self.hidden(model)
        head = model.head_weight.to(hidden.dtype)
        return linear_logprob(hidden, head, self.targets, temperature)[0]

    def loss(self, model, s: Settings) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.hidden(model)
        head = model.head_weight.to(hidden.dtype)
        return linear_policy_loss(
            hidden, head, self.targets, self.advantages, self.weights, old_logprobs=self.old,
            ref_logprobs=self.reference, clip=(s.clip, s.clip), kl=s.kl, temperature=s.temperature,
            sampler_logprobs=self.sampled, entropy_bonus=s.entropy_bonus,
            importance_cap=s.importance_cap,
        )  # fmt: skip


# ---------------------------------------------------------------------- optimizer and health


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
    return s.lr * rising * (1 - (1 - s.min_lr_ratio) * number / s.steps)


def update_failure_streaks(metrics: dict, before: dict[str, int]) -> dict[str, int]:
    """For how many steps in a row each thing has been missing, this step included."""
    absent = {
        "finite gradient": metrics["train/skipped"] > 0,
        "valid score": metrics["judge/invalid"] == 1,
        "sample of the right format": metrics.get("reward/format") == 0,
    }
    return {what: before.get(what, 0) + 1 for what, happened in absent.items() if happened}


def check_health(streaks: dict[str, int], judged) -> None:
    """Raise Stop if anything has been missing for MAX_BAD_STEPS steps in a row."""
    for what in [what for what, steps in streaks.items() if steps >= MAX_BAD_STEPS]:
        advice = "such updates were skipped; lower --lr"
        if what == "valid score":
            texts = [w for row in judged for w in row.judge_text if w != "not judged"][:3]
            advice = "the judge's last words:" + "".join(f"\n  {w[-300:]!r}" for w in texts)
        elif what == "sample of the right format":
            advice = "see groups.jsonl; the prompts may not suit the model, or --max-new-tokens"
        raise Stop(f"no {what} for {MAX_BAD_STEPS} steps in a row: {advice}")
