"""Will it fit, and how long is a step? An estimate from shapes and settings, without a GPU.

    python ssr.py --preset ssr-zero-7b --dry-run 8xh100
    python ssr.py --preset ssr-zero-7b --model Qwen/Qwen2.5-32B --dry-run 64xh200

Memory: what lives all the time, tensor by tensor, and what training needs for a while; sampling
needs less. Time: the larger of matrix products and memory traffic, at the share of the peak
that good code reaches (`EFFICIENCY`: a guess until it is measured on a GPU), for the longest
prompts and translations that the settings allow.

Letters: G GPUs, which share one set of fp32 weights, N parameters.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

from kernels.logprob import CHUNK_BYTES
from model import Config, Transformer, read_config

SHAPES = {  # Config's numbers, tied or not: these models need no network
    "Qwen/Qwen2.5-0.5B": (151_936, 896, 4_864, 24, 14, 2, True),
    "Qwen/Qwen2.5-1.5B": (151_936, 1_536, 8_960, 28, 12, 2, True),
    "Qwen/Qwen2.5-3B": (151_936, 2_048, 11_008, 36, 16, 2, True),
    "Qwen/Qwen2.5-7B": (152_064, 3_584, 18_944, 28, 28, 4, False),
    "Qwen/Qwen2.5-14B": (152_064, 5_120, 13_824, 48, 40, 8, False),
    "Qwen/Qwen2.5-32B": (152_064, 5_120, 27_648, 64, 40, 8, False),
    "Qwen/Qwen2.5-72B": (152_064, 8_192, 29_568, 80, 64, 8, False),
    "Qwen/Qwen3-4B-Base": (151_936, 2_560, 9_728, 36, 32, 8, True),
}
# Billions of parameters by eval/comet.py's names; the others have about 0.6.
COMETS = {"cometkiwi-xl": 3.5, "xcomet-xl": 3.5, "cometkiwi-xxl": 10.7, "xcomet-xxl": 10.7}
EFFICIENCY = {"products": 0.45, "bytes": 0.65}
HOST_RATE = 8.0  # GB a second between a GPU and pageable host memory, over PCIe: assumed
# Seconds to start a block's operators: measured on a CPU; on a GPU 10 in a graph, a guess.
BLOCK_START = {"cpu": 4e-4, "cuda": 1.8e-5}
ROOM = 0.8  # share of a GPU's memory up to which an estimate is trusted to fit


class Machine(NamedTuple):
    """One GPU (or CPU) of many. GB and TB are 10^9 and 10^12 bytes."""

    name: str
    gigabytes: float
    teraflops: float  # of dense products in the type that computes
    terabytes_a_second: float  # from its memory
    link: float  # GB a second to the other ones
    is_gpu: bool = True


MACHINES = {  # makers' data sheets (bf16, dense, SXM); what is called 80 GB has 80 * 2^30 bytes
    "a100": Machine("A100 (80 GB)", 85, 312, 2.0, 300),
    "h100": Machine("H100 (80 GB)", 85, 989, 3.35, 450),
    "h200": Machine("H200 (141 GB)", 150, 989, 4.8, 450),
    "b200": Machine("B200 (180 GB)", 190, 2_250, 8.0, 900),
    "l40s": Machine("L40S (48 GB)", 48, 362, 0.86, 32),
    "rtx4090": Machine("RTX 4090 (24 GB)", 25, 165, 1.0, 16),
}


def find_config(name: str) -> Config:
    """A folder's config.json, a known model's, or the hub's."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return read_config(folder)
    if name in SHAPES:
        vocab, width, mlp, layers, heads, kv_heads, tied = SHAPES[name]
        family, E = ("qwen3", 128) if "Qwen3" in name else ("qwen2", width // heads)
        return Config(family, vocab, width, mlp, layers, heads, kv_heads, E, 32_768, tied)
    from huggingface_hub import hf_hub_download

    try:
        return read_config(Path(hf_hub_download(name, "config.json")).parent)
    except (OSError, ValueError) as error:  # no network and not in its cache is an OSError
        raise ValueError(f"{name}: no folder with a config.json, none of {', '.join(SHAPES)}, and "
                         f"the hub does not give it ({error})") from None  # fmt: skip


def machines(gpus: str, any_gpu: bool) -> tuple[Machine, int]:
    """The value of --dry-run: 8xh100, or "here", measured. Without GPUs here and with `any_gpu`,
    "here" is eight H100s."""
    if gpus == "here":
        if torch.cuda.is_available():
            return measure_machine(torch.device("cuda")), torch.cuda.device_count()
        return (MACHINES["h100"], 8) if any_gpu else (measure_machine(torch.device("cpu")), 1)
    count, _, name = gpus.partition("x") if gpus[0].isdigit() else ("1", "", gpus)
    if name not in MACHINES or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"--dry-run {gpus}: use COUNTxGPU, such as 8xh100, with one of "
                         f"{', '.join(MACHINES)}")  # fmt: skip
    return MACHINES[name], int(count)


def measure_machine(device: torch.device) -> Machine:
    cuda = device.type == "cuda"
    dtype, size = (torch.bfloat16, 8192) if cuda else (torch.float32, 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(2**28 if cuda else 2**25, device=device)
    copy = torch.zeros_like(source)  # written once: a new page costs more than a copy

    def seconds(work: str) -> float:
        names = {"a": a, "b": b, "copy": copy, "source": source}
        timer = Timer(work, globals=names, num_threads=torch.get_num_threads())
        return timer.timeit(5).mean

    products = 2 * size**3 / seconds("a @ b") / 1e12
    traffic = 2 * copy.nbytes / seconds("copy.copy_(source)") / 1e12
    name = torch.cuda.get_device_name(device) if cuda else "this CPU"
    link = 16  # PCIe, assumed
    gigabytes = available_bytes(device) / 1e9
    return Machine(f"{name}, measured", gigabytes, products, traffic, link, cuda)


def available_bytes(device: torch.device) -> float:
    """The memory of this GPU, or what is free on this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux: unknown, so nothing is refused
        return math.inf
    lines = meminfo.read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))


class Workload(NamedTuple):
    """A run, in the numbers that its memory and time depend on."""

    s: object  # the settings
    c: Config
    G: int  # GPUs
    template: int  # tokens of the judge's prompt without source and translation
    cuda: bool
    judge: Config | None = None  # of another model that judges here
    asked: "Workload | None" = None  # what R-Zero's other player samples in each step
    recompute: bool = True  # to save memory, where there is a GPU

    def changed(self, **settings) -> "Workload":
        asked = self.asked and self.asked.changed(**settings)
        return self._replace(s=dataclasses.replace(self.s, **settings), asked=asked)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight that samples or judges."""
        return 2 if self.cuda else 4

    @property
    def recomputes(self) -> bool:
        """The blocks, once more in the backward pass."""
        return self.cuda and self.recompute

    @property
    def offloaded(self) -> bool:
        """On a CPU host memory is the memory."""
        return self.cuda and self.s.offload_optimizer

    @property
    def comets(self) -> list[str]:
        """The checkpoints that a rank has a worker for."""
        names = [x.strip() for x in self.s.eval_metrics.split(",")]
        names += [self.s.comet] * ("comet" in self.s.reward.split("+"))
        return [name for name in dict.fromkeys(names) if name not in ("", "chrf", "none")]

    @property
    def judgements(self) -> int:
        """Of each sample, at most; a group's candidates are counted as if judged apart."""
        per_sample = {"pairs": self.s.samples_per_prompt - 1, "cream": 2, "group": 1}
        return per_sample.get(self.s.reward, int("self" in self.s.reward.split("+")))

    @property
    def judge_tokens(self) -> int:
        """What a judgement writes, at most; a score that is read takes one token."""
        writes = self.s.score_mode == "written" or self.s.reward == "group"
        return self.s.judge_max_new_tokens if writes else 1

    @property
    def longest(self) -> int:
        return self.s.max_prompt_tokens + self.s.max_new_tokens

    @property
    def sequences(self) -> int:
        """Samples of the busiest rank."""
        return -(-self.s.prompts_per_step // self.G) * self.s.samples_per_prompt

    @property
    def slots(self) -> int:
        """As many as a rank ever decodes together."""
        most = max(self.sequences, -(-self.s.eval_prompts // self.G))
        return min(self.s.max_num_seqs, most * self.s.judge_samples)

    @property
    def judge_slots(self) -> int:
        """Of a judge with weights of its own."""
        return self.slots if self.judge_tokens > 1 else 1

    @property
    def train_tokens(self) -> int:
        """Read in training: a prompt once for all samples that fit into its micro-batch."""
        s = self.s
        fit = max(1, (s.micro_batch_tokens - s.max_prompt_tokens) // s.max_new_tokens)
        prompts = self.sequences // s.samples_per_prompt * -(-s.samples_per_prompt // fit)
        return prompts * s.max_prompt_tokens + self.sequences * s.max_new_tokens


def token_bytes(c: Config, itemsize: int) -> int:
    """One token's keys and values, and its state in the sampler."""
    return 2 * c.layers * c.kv_heads * c.head_dim * itemsize + 20


def params_of(c: Config) -> tuple[int, int, int]:
    """All parameters, those of a block, those outside the blocks."""
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(c, layers=1))
    whole, block = (sum(p.numel() for p in part.parameters()) for part in (model, model.blocks[0]))
    return whole + (c.layers - 1) * block, block, whole - block


def memory(k: Workload) -> dict[str, float]:
    """Bytes on each GPU by part."""
    s, c, size = k.s, k.c, k.itemsize
    N, block, root = params_of(c)
    window = min(k.template + k.longest + k.judge_tokens + 64, c.max_length)
    slot = window * token_bytes(c, k.itemsize)
    parts = {"weights, fp32": 4 * N / k.G, "gradients, fp32": 4 * N / k.G}
    if not k.offloaded:
        parts["AdamW"] = 8 * N / k.G
    if k.cuda or k.G > 1:
        parts["the sampler's copy"] = size * N
    parts["its KV cache"] = k.slots * slot
    if s.track_kl or s.kl or s.judge == "frozen":
        parts["the starting weights"] = size * N + (s.judge == "frozen") * k.judge_slots * slot
    if s.judge in ("ema", "previous"):
        parts[f"--judge {s.judge}"] = 4 * N / k.G + size * N + k.judge_slots * slot
    if k.judge:
        cache = k.slots * window * token_bytes(k.judge, k.itemsize)
        parts["the judge"] = size * params_of(k.judge)[0] + cache
    if k.asked:
        parts["the other player"] = size * N + k.asked.slots * slot
    for name in k.comets:  # a process of its own; what a batch needs is guessed
        parts[f"COMET ({Path(name).name})"] = 1e9 * (size * COMETS.get(name, 0.6) + 2.5 * k.cuda)
    if k.cuda:
        parts["CUDA and its libraries"] = 1.5e9

    # Kept of a token in a block for the backward: norms, q, k, v with their rotated and packed
    # copies, the attention's output, the MLP's three; and what the backward itself takes.
    H, K, E = c.heads, c.kv_heads, c.head_dim
    in_block = 6 * c.hidden_size + 4 * (H + 2 * K) * E + 2 * H * E + 4 * c.intermediate_size
    between = c.layers * c.hidden_size if k.recomputes else (c.layers - 1) * in_block
    kept = min(max(s.micro_batch_tokens, k.longest), k.train_tokens) * (
        between + in_block + 2 * c.intermediate_size
    )
    # Gathered weights and their gradients, then in fp32 on their way to their shards.
    whole = (2 * block + root) * (2 * size + 4) if k.G > 1 else size * c.vocab_size * c.hidden_size
    chunk = min(CHUNK_BYTES["cuda" if k.cuda else "cpu"], 4 * k.train_tokens * c.vocab_size)
    if k.cuda and k.G == 1 and not k.recompute:  # the bf16 casts of fp32 weights are kept, too
        whole += size * c.layers * block
    parts["while training"] = size * kept + whole + 2 * chunk
    return parts


def plan_recompute(k: Workload, room: float) -> Workload:
    """Blocks are recomputed only if all they keep might not fit `room` bytes: it costs time."""
    s, kept = k.s, k._replace(recompute=False)
    parts = memory(kept)
    # Attention reads a copy of the prompt for each sample, in every block that keeps it.
    N = s.samples_per_prompt
    copies = N * k.longest / (s.max_prompt_tokens + N * s.max_new_tokens)
    needed = sum(parts.values()) + (copies - 1) * parts["while training"]
    return kept if needed < ROOM * room else k


def host_bytes(k: Workload) -> float:
    """Host memory for each GPU under --offload-optimizer: AdamW's state, and the copy of it and of
    the weights while a checkpoint is written."""
    return k.offloaded * (8 + 12) * params_of(k.c)[0] / k.G


def check_room(k: Workload, device: torch.device) -> None:
    """Before anything is loaded. The ranks of a machine share its memory, but have a GPU each."""
    host = torch.device("cpu")
    advice = "that is host memory, of which --offload-optimizer takes 20 bytes a parameter"
    for needed, where, hint in (
        (sum(memory(k).values()), device, "--dry-run shows what for, and what would help"),
        (host_bytes(k), host, advice),
    ):
        ranks = 1 if where.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        room = available_bytes(where) / ranks
        if needed > 1.1 * room:
            raise ValueError(f"this run needs about {needed / 1e9:.1f} GB on each rank, and "
                             f"{room / 1e9:.1f} are there: {hint}")  # fmt: skip


def seconds(k: Workload, m: Machine) -> dict[str, float]:
    """Of a step, by stage, when every prompt and translation is as long as it may be."""
    s, c, N, count = k.s, k.c, params_of(k.c)[0], k.sequences
    flops = m.teraflops * 1e12 * EFFICIENCY["products"]
    bandwidth = m.terabytes_a_second * 1e12 * EFFICIENCY["bytes"]
    head = 2 * c.vocab_size * c.hidden_size

    def forward(count: float, tokens: int) -> float:
        """Flops, without logits."""
        attention = 2 * c.layers * c.heads * c.head_dim * tokens**2
        return count * ((2 * N - head) * tokens + attention)

    def decode(before: int, new: int) -> float:
        together = min(count, k.slots)
        cached = together * (before + new / 2) * token_bytes(c, k.itemsize)
        step = max((k.itemsize * N + cached) / bandwidth, 2 * N * together / flops)
        step += c.layers * BLOCK_START["cuda" if k.cuda else "cpu"]
        return count / together * new * step

    prefill = forward(count / s.samples_per_prompt, s.max_prompt_tokens) / flops
    parts = {"sample": prefill + decode(s.max_prompt_tokens, s.max_new_tokens)}
    if k.judgements:
        each = forward(count, k.longest) / flops
        if k.judge_tokens > 1:
            each += decode(k.template + k.longest, k.judge_tokens)
        parts["judge"] = s.judge_samples * k.judgements * each
    if k.asked:
        parts["answers"] = seconds(k.asked, m)["sample"]
    logits = count * s.max_new_tokens * head
    whole = forward(count, k.longest) - (2 * N - head) * (count * k.longest - k.train_tokens)
    if s.reward in ("certainty", "confidence"):  # read from the policy: the samples once more
        parts[s.reward] = (whole + logits) / flops
    if s.track_kl or s.kl:
        parts["reference"] = (whole + logits) / flops
    passes = 4 if k.recomputes else 3  # a forward; a backward is twice that
    compute = (passes * whole + 3 * logits) / flops
    micro_batches = math.ceil(k.train_tokens / s.micro_batch_tokens)
    traffic = micro_batches * (2 * k.itemsize + 4) * N / (m.link * 1e9) * (k.G > 1)
    parts["train"] = s.updates_per_batch * max(compute, traffic)
    if k.offloaded:  # both moments, there and back
        parts["offload"] = s.updates_per_batch * 16 * N / k.G / (HOST_RATE * 1e9)
    return parts


def evaluation_seconds(k: Workload, m: Machine) -> float:
    """Two translations of each held-out text, both judged, by the policy if by nobody else."""
    k = k.changed(prompts_per_step=k.s.eval_prompts, samples_per_prompt=1, reward="self")
    parts = seconds(k, m)
    return 2 * (parts["sample"] + parts["judge"])


def format_estimate(k: Workload, m: Machine, name: str) -> str:
    """The two tables and the verdict."""
    parts, s = memory(k), k.s
    evaluations = 1 + -(-s.steps // s.eval_every) if s.eval_prompts else 0  # one before training

    def column(k: Workload) -> dict[str, float]:
        times = seconds(k, m)
        times["step"], total = sum(times.values()), s.steps * sum(times.values())
        if evaluations:
            each = times[f"evaluation, {evaluations} of them"] = evaluation_seconds(k, m)
            total += evaluations * each
        return times | {f"{s.steps} steps, hours": total / 3600}

    lengths = ("max_prompt_tokens", "max_new_tokens", "judge_max_new_tokens")
    quarter = k.changed(**{name: max(1, getattr(s, name) // 4) for name in lengths})
    longest, short = column(k), column(quarter)
    lines = [
        f"{name}: {params_of(k.c)[0] / 1e9:.4g} B parameters on {k.G} × {m.name}",
        "",
        f"{'memory of each':28}       GB",
        *(f"{part:28} {amount / 1e9:8.2f}" for part, amount in parts.items()),
        f"{'peak':28} {sum(parts.values()) / 1e9:8.2f} of {m.gigabytes:,.0f}",
        *[f"{'host memory':28} {host_bytes(k) / 1e9:8.2f}"] * k.offloaded,
        "",
        f"{'seconds of a step':28} longest  a quarter as long",
        *(f"{stage:28} {time:7.3g}  {short[stage]:7.3g}" for stage, time in longest.items()),
        "",
        f"Estimates: {EFFICIENCY['products']:.0%} of the products' and {EFFICIENCY['bytes']:.0%} "
        f"of the memory's rate{'; COMET is not in it' * bool(k.comets)}."
        + " Blocks are computed again in the backward pass, to save memory."
        * k.recomputes,
        fit_verdict(k, m),
    ]
    return "\n".join(lines)


def missing(k: Workload, m: Machine) -> float:
    """Bytes on each GPU; negative: to spare."""
    return sum(memory(k).values()) - m.gigabytes * 1e9


def fit_verdict(k: Workload, m: Machine) -> str:
    if missing(k, m) <= 0:
        return f"It fits, with {-missing(k, m) / 1e9:.1f} GB to spare."
    options = "--micro-batch-tokens, --max-num-seqs or the lengths"
    options += "; --offload-optimizer" * (k.cuda and not k.offloaded)
    return (
        f"It does NOT fit: {missing(k, m) / 1e9:.1f} GB too much on each. What helps: lower "
        f"{options}; more or larger GPUs."
    )
