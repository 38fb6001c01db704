"""One training run: the policy with its copies, and the loop that keeps them in step.

    device, ranks = init_device_and_ranks(s)
    policy = build_policy(folder, s, device, ranks, slots, window)
    for step in train_policy(policy, reward, batch, s, stop_ids, ranks, resume_from):
        ...                                             # weights are at rest: log, save, evaluate

`ssr.py` and R-Zero's turns are such runs.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.adamw import adamw

import grpo
from data.codec import PromptCodec, load_tokenizer
from kernels.decode import decode_attention
from kernels.fused import block_sums, decode_blocks
from model import Config, Transformer, load
from run.checkpoint import tensors_of
from run.distributed import Ranks, init_distributed, sync_weights
from sampler import CustomDecode, Kernels, Sampler, block_sums_torch

EMA_DECAY = 0.98  # per step, of --judge ema
PREVIOUS_EVERY = 10  # steps for which --judge previous keeps its weights


class HostAdamW(torch.optim.AdamW):
    """AdamW whose moments stay in host memory and visit the weights' device, one parameter's at a
    time: the same kernel on the same numbers gives the same bits. The copies are blocking."""

    def __init__(self, made: torch.optim.AdamW):
        super().__init__(made.param_groups)
        for p in self.param_groups[0]["params"]:
            zeros = {key: torch.zeros_like(p, device="cpu") for key in ("exp_avg", "exp_avg_sq")}
            self.state[p] = {"step": torch.zeros((), device=p.device), **zeros}

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            if p.grad is None:
                continue
            number, *host = self.state[p].values()
            visiting = [x.to(p.device, copy=True) for x in host]
            adamw(
                [p], [p.grad], *([x] for x in visiting), [], [number], fused=True, amsgrad=False,
                beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
                eps=group["eps"], maximize=False,
            )  # fmt: skip
            for kept, new in zip(host, visiting, strict=True):
                kept.copy_(new)


@dataclass
class Policy:
    """The weights that are trained, and the copies of them that sample, judge and stay."""

    model: Transformer
    """fp32, sharded over the ranks."""
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    """Of the model itself, or (on a GPU, or with several ranks) of a whole copy of it."""
    reference: Transformer | None
    """The starting weights, for the KL or as the judge."""
    judge_sampler: Sampler
    judge_average: list[Tensor] = field(default_factory=list)
    """EMA or previous weights, sharded and fp32: in bf16 an update would be rounded away."""

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint needs."""
        return tensors_of(self.model, self.optimizer, self.judge_average)

    def sync(self) -> None:
        """The copies take over restored weights."""
        grpo.sync_sampler(self.sampler, self.model)
        if self.judge_average:
            sync_weights(self.judge_sampler.model.parameters(), self.judge_average)

    def update_judge(self, number: int, s) -> None:
        if self.judge_average:
            decay = EMA_DECAY if s.judge == "ema" else float(number % PREVIOUS_EVERY > 0)
            sync_weights(self.judge_average, self.model.parameters(), decay)
            sync_weights(self.judge_sampler.model.parameters(), self.judge_average)


def init_device_and_ranks(s) -> tuple[torch.device, Ranks]:
    if s.preset.startswith("toy"):  # enough for so small a model, and the same numbers everywhere
        torch.set_num_threads(1)
    device, ranks = init_distributed(s.hang_timeout)
    settings = {f"--{k}".replace("_", "-"): value for k, value in asdict(s).items()}
    assert_same_on_all_ranks(ranks, settings)
    return device, ranks


def build_policy(
    folder: Path, s, device: torch.device, ranks: Ranks, slots: int, window: int,
    judge_slots: int = 1,
) -> Policy:  # fmt: skip
    """`window`: tokens of a sequence in the samplers. `judge_slots`: of a judge with weights of its
    own."""
    model = load(folder, dtype=torch.float32, device=device, shard=ranks.shard)
    # On a GPU the samplers have bf16 copies of the weights; the master weights stay fp32.
    half = torch.bfloat16 if device.type == "cuda" else None
    model.compute_dtype, model.checkpointing = half, half is not None
    judge = getattr(s, "judge", "live")
    alone = half is None and ranks.size == 1
    sampler = make_sampler(model if alone else unsharded_copy(model, half), slots, window)
    reference = unsharded_copy(model, half) if s.track_kl or s.kl or judge == "frozen" else None
    judge_sampler, average = sampler, []
    if judge == "frozen":
        judge_sampler = make_sampler(reference, judge_slots, window)
    if judge in ("ema", "previous"):
        average = [p.detach().clone() for p in model.parameters()]
        judge_sampler = make_sampler(unsharded_copy(model, half), judge_slots, window)
    if not (s.track_kl or s.kl):
        reference = None
    optimizer = grpo.make_optimizer(model, s)
    if s.offload_optimizer:
        optimizer = HostAdamW(optimizer)
    return Policy(model, optimizer, sampler, reference, judge_sampler, average)


def make_sampler(model: Transformer, slots: int, window: int) -> Sampler:
    """On a GPU, in bf16, our kernels decode; SSR_PLAIN_DECODE=1 leaves that to PyTorch."""
    weight = model.head_weight
    is_plain = os.environ.get("SSR_PLAIN_DECODE") or weight.dtype != torch.bfloat16
    if is_plain or not weight.is_cuda:
        return Sampler(model, slots, window)
    check_kernels(model.config)
    model.decode_blocks = decode_blocks
    return Sampler(model, slots, window, kernels=Kernels(decode_attention, block_sums))


@torch.no_grad()
def check_kernels(config: Config) -> None:
    """Raise unless the kernels agree with PyTorch on this GPU, where they may never have run."""
    with torch.device("cuda"):
        model = Transformer(replace(config, layers=1, vocab_size=1024)).to(torch.bfloat16)
        past = torch.randn(1, 2, 2, config.kv_heads, 512, config.head_dim).bfloat16()
        lengths, token = torch.tensor([3, 400]), torch.tensor([[1], [2]])
    results = []
    for impl in ("torch", "triton"):
        attention = partial(decode_attention, impl=impl)
        view = CustomDecode(past.clone(), lengths, 512, attention)
        hidden = model(token, lengths[:, None], cache=view)
        logits = model.logits(hidden[:, 0])
        sums = (block_sums if impl == "triton" else block_sums_torch)(logits, 512, 0.7)
        results.append((hidden, *sums))
        model.decode_blocks = decode_blocks
    gaps = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)]
    if not all(gap < 0.05 for gap in gaps):
        raise RuntimeError(
            f"kernels/ and PyTorch differ by {gaps} on {torch.cuda.get_device_name()}, which is a "
            "bug: SSR_PLAIN_DECODE=1 goes on with PyTorch's operators"
        )


def load_frozen(
    folder: Path, device: torch.device, chat: bool | str = False
) -> tuple[Transformer, PromptCodec]:
    """A model that is only sampled from, and its text codec."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load(folder, dtype=dtype, device=device), PromptCodec(load_tokenizer(folder), chat)


def unsharded_copy(model: Transformer, dtype: torch.dtype | None, device=None) -> Transformer:
    """Unsharded, on each rank; not to be trained."""
    with torch.device("meta"):
        twin = Transformer(model.config)
    device = device or model.head_weight.device
    twin = twin.to(dtype or torch.float32).to_empty(device=device).requires_grad_(False)
    sync_weights(twin.parameters(), model.parameters())
    return twin


def train_policy(
    policy: Policy, reward: Callable, batch: Callable[[int], list[grpo.Prompt]], s,
    stop_ids: Sequence[int], ranks: Ranks, resume_from: grpo.Step | None = None,
) -> Iterator[grpo.Step]:  # fmt: skip
    for step in grpo.train(
        policy.model, policy.sampler, reward, batch, s, policy.optimizer, stop_ids,
        policy.reference, ranks, resume_from,
    ):  # fmt: skip
        policy.update_judge(step.number, s)
        yield step


def assert_same_on_all_ranks(ranks: Ranks, values: dict) -> None:
    """One command line on every node, and the same files behind it."""
    first, *others = ranks.gather(values)
    for rank, theirs in enumerate(others, 1):
        for name in values:
            if theirs[name] != first[name]:
                raise ValueError(
                    f"the ranks disagree on {name}: rank 0 has {first[name]!r}, rank {rank} "
                    f"{theirs[name]!r}; start all nodes with the same command, files and code"
                )
