"""The loop: sample, judge, compare within the group, update. A generator yields one step per turn.

    for step in train(model, sampler, reward, batch, settings, optimizer, stop_ids=[eos]):
        print(step.metrics["reward/total"])        # evaluate, log, save here: weights are at rest

Interfaces the loop expects (it never inspects text):

- `batch(number)`: the prompts of step 1, 2, …;
- `reward(tasks, groups, number)`: for each group `.total` (N rewards, NaN where there is none),
  `.parts` (name -> N numbers; "format" is 1 where that was right), and optionally `.weight` (of its
  advantages) and `.part_weights` (for GDPO: name -> weight of the parts that the total sums);
  optionally `reward.finish(judged)`, which returns all ranks' results with rewards that need the
  whole batch;
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
  micro-batches add up (`set_loss_weights`).
- Identical samples of a prompt with equal advantages have the same gradient: they are trained once,
  with the weight of all.
- A sample of advantage 0 is not trained, unless a KL or an entropy bonus pulls at it. If there is
  nothing to train, no optimizer step is taken. What was cut off has no stop token to train.
- Each rank samples and judges its share of the prompts, then trains its share of the micro-batches
  of the whole batch; FSDP's backward sums the gradients (`Ranks.shard` in run/distributed.py).
  Every rank calls `train` with the same arguments, and gets the same steps.

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
from run.metrics import Clock, batch_metrics, mean_kl

MAX_BAD_STEPS = 5  # in a row without what ADVICE names
ADVICE = {
    "finite gradient": "such updates were skipped; lower --lr",
    "valid score": "groups.jsonl has the judge's words",
    "sample of the right format": "see groups.jsonl; the prompts may not suit the model, or "
    "--max-new-tokens",
}


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
    """Learning rate of AdamW, which warm-up and decay multiply."""
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


@dataclass(eq=False)
class TrainSample:
    """A distinct sample of a prompt, and what is trained of it."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]  # by the sampler: for metrics and importance_cap
    advantage: float
    copies: int  # samples that are the same
    weight: float = 0.0  # of a token in the loss
    reference: Tensor | None = None  # log-probs under the starting weights


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
        set_loss_weights(rows, s)
        if reference_model is not None:
            set_reference_logprobs(reference_model, rows, s, ranks)
        clock.end_stage("reference")
        rate = learning_rate(s, number)
        for group in optimizer.param_groups:
            group["lr"] = rate
        trained = update(model, optimizer, rows, s, ranks)
        sync_sampler(sampler, model)
        clock.end_stage("train")
        metrics = batch_metrics(groups, judged, rewards, advantages)
        if reference_model is not None:
            metrics["policy/kl"] = mean_kl(rows)
        tokens_trained = trained["train/tokens"] * s.updates_per_batch
        metrics |= trained | clock.metrics(groups, tokens_trained) | {"train/lr": rate}
        streaks = update_failure_streaks(metrics, streaks)
        yield Step(number, metrics, groups, streaks, prompts, judged, rewards, advantages)
        for what, count in streaks.items():
            if count >= MAX_BAD_STEPS:
                raise Stop(f"no {what} for {count} steps in a row: {ADVICE[what]}")


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
    excess = torch.zeros_like(rewards)
    if s.overlong == "mask":
        is_cut = torch.tensor([[not sample.stopped for sample in group] for group in groups])
        rewards = rewards.masked_fill(is_cut, math.nan)
    if s.overlong == "soft":  # DAPO's: from 0 to 1 in the last fifth
        lengths = tensor([[len(sample.ids) for sample in group] for group in groups])
        excess = (5 * lengths / s.max_new_tokens - 4).clamp(min=0)
        rewards = rewards - excess
    if s.advantage_scale == "each":
        weights = judged[0].part_weights.items()
        parts = [(w, tensor([x.parts[name] for x in judged])) for name, w in weights]
        missing = rewards.isnan()
        parts = [(w, x.masked_fill(missing, math.nan)) for w, x in (*parts, (-1.0, excess))]
        advantages = decoupled_advantage([(w, x.to(device)) for w, x in parts])
    else:
        advantages = group_advantage(rewards.to(device), s.advantage_scale)
    return rewards, advantages.cpu() * tensor([[getattr(x, "weight", 1.0)] for x in judged])


def merge_identical_samples(
    prompts: list[Prompt], groups: list[list], rewards: Tensor, advantages: Tensor, s: Settings
) -> list[TrainSample]:
    """One row for identical samples of a prompt with equal advantages: a noisy scorer may have
    given them different ones. Samples without a reward are left out, and with "effective" also
    groups without a difference."""
    rows = []
    for p, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        if s.loss_norm == "effective" and not advantages[p].any():
            continue
        distinct: dict[tuple, TrainSample] = {}
        for n, sample in enumerate(group):
            if not math.isnan(rewards[p, n]):
                advantage = float(advantages[p, n])
                row = TrainSample(prompt.ids, sample.ids, sample.logprobs, advantage, 0)
                distinct.setdefault((tuple(sample.ids), advantage), row).copies += 1
        rows += distinct.values()
    return rows


def set_loss_weights(rows: list[TrainSample], s: Settings) -> None:
    """Loss weight of a token, by row: its copies / the tokens of all rows' copies, those of
    advantage 0 included ("token", "effective"); its copies / (its tokens × all copies)
    ("sequence"); its copies / the most tokens that a batch can have ("constant")."""
    tokens, copies = sum(r.copies * len(r.ids) for r in rows), sum(r.copies for r in rows)
    most = s.prompts_per_step * s.samples_per_prompt * s.max_new_tokens
    for row in rows:
        total = {"sequence": len(row.ids) * copies, "constant": most}.get(s.loss_norm, tokens)
        row.weight = row.copies / total


def set_reference_logprobs(model, rows: list[TrainSample], s: Settings, ranks: Ranks) -> None:
    """Log-probs of rows under the starting weights."""
    packed = [x for x in pack_micro_batches(rows, s.micro_batch_tokens, ranks.size) if x]

    def score(mine: list[list[TrainSample]]) -> list[Tensor]:
        device = model.head_weight.device
        return [MicroBatch(x, device).logprobs(model, s.temperature).cpu() for x in mine]

    results = ranks.map_over_ranks("reference", packed, score)
    for batch_rows, logprobs in zip(packed, results, strict=True):
        sizes = [len(row.ids) for row in batch_rows]
        for row, own in zip(batch_rows, logprobs.split(sizes), strict=True):
            row.reference = own


def update(
    model, optimizer, rows: list[TrainSample], s: Settings, ranks: Ranks
) -> dict[str, float]:
    """Take `updates_per_batch` optimizer steps; return the metrics of the last one.

    "policy/…" compares sampler and trainer at the first one, while both have the same weights.
    "train/skipped" counts updates without a finite gradient, "train/clipped" is the share of the
    loss weight whose ratio was clipped, "train/grad_norm" the norm before scaling down.
    """
    stats = {"train/grad_norm": 0.0, "train/loss": 0.0, "train/clipped": 0.0, "train/skipped": 0.0}
    means = ["sampler_gap"] + ["importance_ratio", "importance_capped"] * (s.importance_cap > 0)
    stats |= {f"policy/{name}": math.nan for name in (*means, "sampler_gap_max")}  # unmeasured
    rows = [row for row in rows if row.advantage or s.kl or s.entropy_bonus]
    packed = pack_micro_batches(rows, s.micro_batch_tokens, ranks.size)
    stats |= {"train/rows": len(rows), "train/tokens": sum(map(num_tokens, packed))}
    if not rows:
        return stats
    device = model.head_weight.device
    batches = [MicroBatch(x, device) for x in packed[ranks.rank :: ranks.size]]
    # Listed before any forward: after it FSDP shows gathered copies, which no optimizer owns.
    parameters = [p for p in model.parameters() if p.requires_grad]
    if s.updates_per_batch > 1:
        for b in batches:
            b.old = b.logprobs(model, s.temperature)
    weight = sum(row.weight * len(row.ids) for row in rows)
    for number in range(s.updates_per_batch):
        optimizer.zero_grad(set_to_none=True)
        mine: list[dict[str, float]] = []
        for i, b in enumerate(batches, 1):
            ranks.set_stage(f"train, micro-batch {i} of {len(batches)}")
            loss, more = b.loss(model, s)
            loss.backward()
            mine.append({name: float(x) for name, x in {"loss": loss.detach(), **more}.items()})
        measured = [x for theirs in ranks.gather(mine) for x in theirs]
        totals = {  # sums, or maxima by name
            k: (max if k.endswith("_max") else sum)(x[k] for x in measured) for k in measured[0]
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


def pack_micro_batches(rows: list[TrainSample], most: int, size: int) -> list[list[TrainSample]]:
    """Micro-batches of similar size: at most `most` tokens, or one longer row. Rows of one prompt
    stay together as far as they fit, for the prompt is computed once for them.

    All `size` ranks need the same number of micro-batches, because forward and backward are
    collective: some may be empty. Largest first, so that each round is balanced between ranks.
    """
    prompts = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.prompt)]
    total = sum(map(num_tokens, prompts))
    limit = min(most, total / size)  # so that no rank is idle

    def halves(group: list[TrainSample]) -> list[list[TrainSample]]:
        half = len(group) // 2
        if half == 0 or num_tokens(group) <= limit:
            return [group]
        return halves(group[:half]) + halves(group[half:])

    groups = [part for group in prompts for part in halves(group)]
    groups.sort(key=num_tokens, reverse=True)
    lengths = [num_tokens(group) for group in groups]
    for count in itertools.count(size * max(1, math.ceil(total / most / size)), size):
        parts: list[list[TrainSample]] = [[] for _ in range(count)]
        tokens = [0] * count
        for group, added in zip(groups, lengths, strict=True):
            emptiest = tokens.index(min(tokens))
            parts[emptiest] += group
            tokens[emptiest] += added
        if all(n <= most or len(part) == 1 for n, part in zip(tokens, parts, strict=True)):
            return sorted(parts, key=num_tokens, reverse=True)


def segments_of(rows: list[TrainSample]) -> list[list[int]]:
    """For the model: the length of a prompt, then of what follows it in each sample. The last token
    of a sample is predicted, and not read."""
    groups = itertools.groupby(rows, key=lambda row: row.prompt)
    return [[len(prompt), *(len(r.ids) - 1 for r in group)] for prompt, group in groups]


def num_tokens(rows: list[TrainSample]) -> int:
    return sum(map(sum, segments_of(rows)))


class MicroBatch:
    """Rows packed into one sequence, each attending to its prompt and itself alone. No masks, no
    padding. The layout depends on lengths, never on token values."""

    def __init__(self, rows: list[TrainSample], device):
        if not rows:  # a rank without work still takes part: one token that weighs nothing
            rows = [TrainSample([0], [0], [0.0], 0.0, 1, 0.0, torch.zeros(1))]
        self.segments = segments_of(rows)
        ids: list[int] = []
        predictors: list[int] = []  # positions whose hidden states predict the targets
        for prompt, group in itertools.groupby(rows, key=lambda row: row.prompt):
            ids += prompt
            last = len(ids) - 1
            for row in group:
                predictors += [last, *range(len(ids), len(ids) + len(row.ids) - 1)]
                ids += row.ids[:-1]
        tensor = partial(torch.tensor, device=device)
        wide = partial(tensor, dtype=torch.float64)
        self.ids, self.predictors = tensor([ids]), tensor(predictors)
        self.targets = tensor([i for r in rows for i in r.ids])
        self.sampled = wide([x for r in rows for x in r.logprobs])
        self.advantages = wide([r.advantage for r in rows for _ in r.ids])
        self.weights = wide([r.weight for r in rows for _ in r.ids])
        reference = [r.reference for r in rows if r.reference is not None]
        self.reference = torch.cat(reference).to(device) if reference else None
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
            ref_logprobs=self.reference if s.kl else None, clip=(s.clip, s.clip), kl=s.kl,
            temperature=s.temperature, sampler_logprobs=self.sampled,
            entropy_bonus=s.entropy_bonus, importance_cap=s.importance_cap,
        )  # fmt: skip


# ---------------------------------------------------------------------- optimizer and health


def make_optimizer(model, s: Settings) -> torch.optim.AdamW:
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {parameter.dtype}, in which small updates are rounded "
                             "away: load fp32 weights and set model.compute_dtype")  # fmt: skip
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
