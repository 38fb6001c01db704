"""Will it fit, and how long is a step? An estimate from shapes and settings, without a GPU.

    python ssr.py --dry-run --preset ssr-zero-7b --gpus 8                    # of H100s
    python ssr.py --dry-run --model Qwen/Qwen2.5-32B --gpus 64 --gpu h200 --shard node

Memory is added up tensor by tensor: what lives all the time, and on top of it the larger of what
sampling and what training need for a while. Time is the larger of two limits, the products and the
bytes they read, at the share of them that well-made code reaches (`REACHED`, our guess until it has
been measured on a GPU), for the longest prompts and translations that the settings allow.

Letters: G GPUs, S of them share one set of weights, N parameters.
"""

import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.logprob import CHUNK_BYTES
from model import Config, Transformer, read_config

SHAPES = {  # so that a question about them needs no network: Config's numbers, tied or not
    "Qwen/Qwen2.5-0.5B": (151_936, 896, 4_864, 24, 14, 2, True),
    "Qwen/Qwen2.5-1.5B": (151_936, 1_536, 8_960, 28, 12, 2, True),
    "Qwen/Qwen2.5-3B": (151_936, 2_048, 11_008, 36, 16, 2, True),
    "Qwen/Qwen2.5-7B": (152_064, 3_584, 18_944, 28, 28, 4, False),
    "Qwen/Qwen2.5-14B": (152_064, 5_120, 13_824, 48, 40, 8, False),
    "Qwen/Qwen2.5-32B": (152_064, 5_120, 27_648, 64, 40, 8, False),
    "Qwen/Qwen2.5-72B": (152_064, 8_192, 29_568, 80, 64, 8, False),
    "Qwen/Qwen3-4B-Base": (151_936, 2_560, 9_728, 36, 32, 8, True),
}
COMETS = {"comet22": 0.58, "cometkiwi": 0.57}  # billions of parameters, of eval/comet.py's names
COMETS |= dict.fromkeys(("cometkiwi-xl", "xcomet-xl"), 3.5)
COMETS |= dict.fromkeys(("cometkiwi-xxl", "xcomet-xxl"), 10.7)
REACHED = {"products": 0.45, "bytes": 0.65}
# Seconds that a block of a decoding step takes on a CPU to start its operators, fitted to what
# bench.scaling measured; a GPU replays a graph.
STARTING = 4e-4
SAMPLING, TRAINING = "while sampling, or", "while training"


class Machine(NamedTuple):
    """One GPU (or CPU) of many. GB and TB are 10^9 and 10^12 bytes."""

    name: str
    gigabytes: float
    teraflops: float  # of dense products in the type that computes
    terabytes_a_second: float  # from its memory
    link: float  # GB a second to the other ones


MACHINES = {  # makers' data sheets (bf16, dense, SXM); what is called 80 GB has 80 * 2^30 bytes
    "a100": Machine("A100 (80 GB)", 85, 312, 2.0, 300),
    "h100": Machine("H100 (80 GB)", 85, 989, 3.35, 450),
    "h200": Machine("H200 (141 GB)", 150, 989, 4.8, 450),
    "b200": Machine("B200 (180 GB)", 190, 2_250, 8.0, 900),
    "rtx4090": Machine("RTX 4090 (24 GB)", 25, 165, 1.0, 16),
}


def shape_of(name: str) -> Config:
    """A folder's config.json, a known model's, or the hub's."""
    if (Path(name).expanduser() / "config.json").is_file():
        return read_config(Path(name).expanduser())
    if name in SHAPES:
        vocab, width, mlp, layers, heads, kv_heads, tied = SHAPES[name]
        family, E = ("qwen3", 128) if "Qwen3" in name else ("qwen2", width // heads)
        return Config(family, vocab, width, mlp, layers, heads, kv_heads, E, 32_768, tied)
    from huggingface_hub import hf_hub_download

    try:
        if name.count("/") != 1:
            raise ValueError("not a hub id of the form org/name")
        return read_config(Path(hf_hub_download(name, "config.json")).parent)
    except (OSError, ValueError) as error:  # no network and not in its cache is an OSError
        raise ValueError(
            f"--model {name}: no folder with a config.json, none of {', '.join(SHAPES)}, and the "
            f"hub does not give it ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from None


def machine_of(words: str, device: torch.device) -> Machine:
    """By name, by four numbers, or (neither) this one, measured."""
    if words in MACHINES:
        return MACHINES[words]
    if words:
        try:
            given = Machine("as given", *(float(word) for word in words.split(",")))
            if min(given[1:]) > 0:
                return given
            raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"--gpu {words}: use {', '.join(MACHINES)}, or four numbers with commas: GB, dense "
                "bf16 TFLOP/s, TB/s of its memory, GB/s to the others"
            ) from None
    cuda = device.type == "cuda"
    dtype, size = (torch.bfloat16, 8192) if cuda else (torch.float32, 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    many = torch.empty(2**28 if cuda else 2**25, device=device)
    rates = []
    other = torch.zeros_like(many)  # written once: a new page costs more than a copy
    products = (lambda: a @ b), 2 * size**3
    for work, amount in (products, ((lambda: other.copy_(many)), 2 * many.nbytes)):
        best = 1e9
        for _ in range(5):
            start = time.perf_counter()
            copy = work()
            copy.flatten()[0].item()  # waits for it
            best = min(best, time.perf_counter() - start)
        rates.append(amount / best / 1e12)
    name = (
        torch.cuda.get_device_name(device)
        if cuda
        else f"this CPU, {torch.get_num_threads()} threads"
    )
    return Machine(f"{name}, measured", room(device) / 1e9, *rates, link=16)  # PCIe, assumed


def room(device: torch.device) -> float:
    """Bytes of this GPU, or those that are free on this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: nothing is known, nothing is refused
        return float("inf")
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))


class Work(NamedTuple):
    """What is asked of the machines, in numbers that memory and time are made of."""

    s: object  # the settings
    c: Config
    G: int  # GPUs
    S: int  # of them share one set of weights
    template: int  # tokens of the judge's prompt without source and translation
    cuda: bool
    judge: Config | None = None
    """Of another model that judges here."""
    asked: "Work | None" = None
    """What a model that does not learn answers in each step, as if it were sampled for training."""

    def changed(self, **settings) -> "Work":
        asked = self.asked and self.asked.changed(**settings)
        return self._replace(s=dataclasses.replace(self.s, **settings), asked=asked)

    @property
    def params(self) -> tuple[int, int, int]:
        return params_of(self.c)

    @property
    def comets(self) -> list[str]:
        """The checkpoints that a rank has a worker for."""
        named = [w.strip() for w in self.s.measures.split(",")] if self.s.measures else []
        named += [self.s.comet] if "comet" in self.s.reward.split("+") else []
        return [name for name in dict.fromkeys(named) if name not in ("chrf", "none")]

    @property
    def wide(self) -> int:
        """Bytes of a number that computes."""
        return 2 if self.cuda else 4

    @property
    def alone(self) -> bool:
        """The sampler computes with the very weights that are trained."""
        return not self.cuda and self.G == 1

    @property
    def keeps_start(self) -> bool:
        """The starting weights, for the KL or as the judge."""
        return bool(self.s.track_kl or self.s.kl or self.s.judge == "frozen")

    @property
    def judge_slots(self) -> int:
        """Of a judge that is another than the actor. To read takes one slot."""
        return self.slots if self.writes else 1

    @property
    def writes(self) -> bool:
        """Whether the judge does; to score a group it always does."""
        return self.s.reading == "written" or self.s.reward == "group"

    @property
    def judge_words(self) -> int:
        return self.s.judge_max_new_tokens if self.writes else 1

    @property
    def questions(self) -> int:
        """To the judge about each sample, at most; a group's candidates are counted as if apart."""
        known = {"pairs": self.s.samples_per_prompt - 1, "cream": 2, "group": 1}
        return known.get(self.s.reward, int("self" in self.s.reward.split("+")))

    @property
    def longest(self) -> int:
        return self.s.max_prompt_tokens + self.s.max_new_tokens

    @property
    def sequences(self) -> int:
        """Of the busiest rank."""
        return -(-self.s.prompts_per_step // self.G) * self.s.samples_per_prompt

    @property
    def training(self) -> tuple[int, int, int]:
        """At most: tokens that are read, as `grpo.pack` counts them (an eighth of a prompt for each
        sample but its first), and micro-batches. A prompt is read once for the samples that fit."""
        s, P = self.s, self.s.max_prompt_tokens
        prompts, together = self.sequences // s.samples_per_prompt, s.samples_per_prompt

        def counted(samples: int) -> int:
            return P + samples * s.max_new_tokens + (samples - 1) * (P // 8)

        while counted(together) > s.micro_batch_tokens and together > 1:
            together = -(-together // 2)
        groups = prompts * -(-s.samples_per_prompt // together)
        fit = max(1, s.micro_batch_tokens // counted(together))
        read = groups * P + self.sequences * s.max_new_tokens
        more = (self.sequences - groups) * (P // 8)
        return read, read + more, -(-groups // fit)

    @property
    def slots(self) -> int:
        """As many as a rank ever decodes together."""
        s = self.s
        most = max(self.sequences, -(-s.eval_prompts // self.G))
        return min(s.slots, most * s.judge_samples)

    @property
    def cache_bytes(self) -> int:
        return self.cache_of(self.c)

    def cache_of(self, c: Config) -> int:
        """Bytes of one token's keys and values."""
        return 2 * c.layers * c.kv_heads * c.head_dim * self.wide


def params_of(c: Config) -> tuple[int, int, int]:
    """All parameters, those of a block, those outside the blocks."""
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(c, layers=1))
    whole, block = (sum(p.numel() for p in part.parameters()) for part in (model, model.blocks[0]))
    return whole + (c.layers - 1) * block, block, whole - block


def memory(k: Work) -> dict[str, float]:
    """Bytes on each GPU by part. "while sampling" and "while training" share their place."""
    s, c, wide = k.s, k.c, k.wide
    N, block, root = k.params
    window = min(k.template + k.longest + k.judge_words + 64, c.max_length)
    slot = window * (k.cache_bytes + 20)  # and the state of what is drawn
    E, H, K = c.head_dim, c.heads, c.kv_heads
    parts = {"weights, fp32": 4 * N / k.S, "gradients, fp32": 4 * N / k.S, "AdamW": 8 * N / k.S}
    if not k.alone:
        parts["the sampler's copy"] = wide * N
    parts["its KV cache"] = k.slots * slot
    if k.keeps_start:
        parts["the starting weights"] = wide * N + (s.judge == "frozen") * k.judge_slots * slot
    if s.judge in ("ema", "previous"):
        name = "the EMA and its judge" if s.judge == "ema" else "the previous weights' judge"
        parts[name] = 4 * N / k.S + wide * N + k.judge_slots * slot
    if k.judge:
        room = k.slots * window * (k.cache_of(k.judge) + 20)
        parts["the judge"] = wide * params_of(k.judge)[0] + room
    if k.asked:
        parts["who answers, its cache"] = wide * N + k.asked.slots * slot
    for name in k.comets:  # a process of its own; what it needs for a batch is guessed
        each = 2e9 * COMETS.get(name, 0.6) * (2 if s.comet_dtype == "float32" else 1)
        parts[f"COMET ({Path(name).name})"] = each + 2.5e9 * k.cuda
    if k.cuda:
        parts["CUDA and its libraries"] = 1.5e9
    prefill = prefill_bytes(k, min(8192, k.sequences * (k.template + k.longest)))
    logits = min(3 * 2**28, 12 * k.sequences * c.vocab_size)  # of scores that are read at once
    parts[SAMPLING] = prefill + max(4 * 4 * k.slots * c.vocab_size, logits)
    # Of a token in a block, kept for the way back: norms, q, k, v and their turned and packed
    # copies, the attention's output, the MLP's three; and what the way back itself takes.
    in_block = wide * (
        6 * c.hidden_size + 4 * (H + 2 * K) * E + 2 * H * E + 4 * c.intermediate_size
    )
    between = c.layers * wide * c.hidden_size if k.cuda else (c.layers - 1) * in_block
    read, counted, _ = k.training
    tokens = min(s.micro_batch_tokens, counted)
    tokens *= between + in_block + 2 * wide * c.intermediate_size
    # Gathered weights and their gradients, then in fp32 on their way to their shares.
    whole = (2 * block + root) * (2 * wide + 4) if k.S > 1 else wide * c.vocab_size * c.hidden_size
    chunk = min(CHUNK_BYTES["cuda" if k.cuda else "cpu"], 4 * read * c.vocab_size)
    parts[TRAINING] = tokens + whole + 2 * chunk
    return parts


def check_room(k: Work, device: torch.device, processes: int) -> None:
    """Before anything is loaded; `processes` share what this machine has."""
    advice = "--dry-run shows what for, and what would help"
    refuse_without_room(peak(memory(k)), device, processes, advice)


def check_judge_room(k: Work, tokens: int, device: torch.device, processes: int, advice: str):
    """Of a model that only judges, with a cache of so many tokens."""
    needed = k.wide * k.params[0] + tokens * (k.cache_bytes + 20) + prefill_bytes(k, 8192)
    refuse_without_room(needed + 1.5e9 * k.cuda, device, processes, advice)


def refuse_without_room(needed: float, device: torch.device, processes: int, advice: str) -> None:
    there = room(device) / processes
    what = f"about {needed / 1e9:.1f} GB on each rank, and {there / 1e9:.1f} are there"
    if needed > 1.1 * there:
        raise ValueError(f"this run needs {what}: {advice}")
    if needed > 0.95 * there:
        print(f"Memory will be tight: {what}; {advice}")


def prefill_bytes(k: Work, tokens: int) -> float:
    c, heads = k.c, k.c.heads + 2 * k.c.kv_heads
    return tokens * k.wide * (2 * c.hidden_size + 3 * heads * c.head_dim + 3 * c.intermediate_size)


def peak(parts: dict[str, float]) -> float:
    return sum(parts.values()) - min(parts[SAMPLING], parts[TRAINING])


def seconds(k: Work, m: Machine) -> dict[str, float]:
    """Of a step, by stage, when every prompt and translation is as long as it may be."""
    s, c = k.s, k.c
    N = k.params[0]
    flops = m.teraflops * 1e12 * REACHED["products"]
    reads = m.terabytes_a_second * 1e12 * REACHED["bytes"]
    head = 2 * c.vocab_size * c.hidden_size
    sequences = k.sequences

    def forward(count: float, tokens: int) -> float:
        """Flops, without logits."""
        attention = 2 * c.layers * c.heads * c.head_dim * tokens**2
        return count * (2 * N * tokens - head * tokens + attention)

    def decode(count: int, before: int, new: int) -> float:
        together = min(count, k.slots)
        cached = together * (before + new / 2) * k.cache_bytes
        step = max((k.wide * N + cached) / reads, 2 * N * together / flops)
        step += 0 if k.cuda else c.layers * STARTING
        return count / together * new * step

    asked = s.judge_samples * k.questions
    parts = {
        "sample": forward(sequences / s.samples_per_prompt, s.max_prompt_tokens) / flops
        + decode(sequences, s.max_prompt_tokens, s.max_new_tokens),
    }
    if asked:
        parts["judge"] = asked * forward(sequences, k.longest) / flops
    if asked and k.writes:
        parts["judge"] += asked * decode(sequences, k.template + k.longest, k.judge_words)
    if k.asked:
        parts["answers"] = seconds(k.asked, m)["sample"]
    logits = sequences * s.max_new_tokens * head
    read, _, rounds = k.training
    whole = forward(sequences, k.longest) - (2 * N - head) * (sequences * k.longest - read)
    if s.reward in ("certainty", "confidence"):  # how sure the policy is: the samples once more
        parts[s.reward] = (whole + logits) / flops
    if s.track_kl or s.kl:
        parts["reference"] = (whole + logits) / flops
    passes = 4 if k.cuda else 3  # forward, twice that on the way back, where blocks run again
    work = (passes * whole + 3 * logits) / flops
    moved = rounds * (2 * k.wide + 4) * N / (m.link * 1e9) * (k.S > 1)
    parts["train"] = s.updates_per_batch * max(work, moved)
    if not k.alone:
        parts["refresh the copy"] = k.wide * N / (m.link * 1e9 if k.S > 1 else reads)
    return parts


def evaluation_seconds(k: Work, m: Machine) -> float:
    """Two translations of each held-out text, both judged, by the policy if by nobody else."""
    asked = {"prompts_per_step": k.s.eval_prompts, "samples_per_prompt": 1, "reward": "self"}
    parts = seconds(k.changed(**asked), m)
    return 2 * (parts["sample"] + parts["judge"])


def report(k: Work, m: Machine, name: str) -> str:
    """The two tables, the verdict, and what would make it fit."""
    parts, times = memory(k), seconds(k, m)
    long = ("max_prompt_tokens", "max_new_tokens", "judge_max_new_tokens")
    shorter = k.changed(**{name: max(1, getattr(k.s, name) // 4) for name in long})
    quick = seconds(shorter, m)
    steps, totals = k.s.steps, [k.s.steps * sum(x.values()) for x in (times, quick)]
    evaluation = []
    if k.s.eval_prompts:
        each = [evaluation_seconds(x, m) for x in (k, shorter)]
        count = 1 + -(-steps // k.s.eval_every)  # the first before any training
        words = f"evaluation, {count} of them"
        evaluation = [f"{words:28} {each[0]:7.3g}  {each[1]:7.3g}"]
        totals = [total + count * one for total, one in zip(totals, each, strict=True)]
    unit_of_time, length = ("hours", 3600) if totals[0] > 3600 else ("minutes", 60)
    label = f"{steps} steps, {unit_of_time}"
    share = f", weights shared by {k.S}" if k.G > 1 else ""
    scale, unit = (1e9, "GB") if peak(parts) > 2e9 else (1e6, "MB")
    lines = [
        f"{name}: {k.params[0] / 1e9:.4g} B parameters on {k.G} × {m.name}{share}",
        "",
        f"{'memory of each':28}       {unit}",
        *(f"{part:28} {size / scale:8.2f}" for part, size in parts.items()),
        f"{'peak':28} {peak(parts) / scale:8.2f} of {m.gigabytes * 1e9 / scale:,.0f}",
        "",
        f"{'seconds of a step':28} longest  a quarter as long",
        *(f"{part:28} {time:7.3g}  {quick[part]:7.3g}" for part, time in times.items()),
        f"{'step':28} {sum(times.values()):7.3g}  {sum(quick.values()):7.3g}",
        *evaluation,
        f"{label:28} {totals[0] / length:7.3g}  {totals[1] / length:7.3g}",
        "",
        f"Estimates: {REACHED['products']:.0%} of the products' and {REACHED['bytes']:.0%} of the "
        f"memory's rate{'; COMET is not in it' * bool(k.comets)}.",
        verdict(k, m),
    ]
    return "\n".join(lines)


def missing(k: Work, m: Machine) -> float:
    """Bytes on each GPU; negative: to spare."""
    return peak(memory(k)) - m.gigabytes * 1e9


def verdict(k: Work, m: Machine) -> str:
    if missing(k, m) <= 0:
        return f"It fits, with {-missing(k, m) / 1e9:.1f} GB to spare."
    now = f"It does NOT fit: {missing(k, m) / 1e9:.1f} GB too much on each."
    # Least harmful first; each is added to those before until it fits.
    changes, other = {}, k
    tries = [("shard", "all"), ("micro_batch_tokens", max(k.longest, 8192)), ("slots", 64)]
    for name, value in [*tries, ("track_kl", False), ("slots", 32), ("slots", 16), ("slots", 8)]:
        old = k.slots if name == "slots" else getattr(k.s, name)
        if old == value or (type(value) is int and old < value):
            continue
        if name == "track_kl" and (k.s.kl or k.s.judge == "frozen"):
            continue  # the starting weights stay
        changes[name] = value
        other = k.changed(**changes)
        other = other._replace(S=k.G if other.s.shard == "all" else k.S)
        if missing(other, m) <= 0:
            break
    words = " ".join(
        "--no-track-kl" if name == "track_kl" else f"--{name.replace('_', '-')} {value}"
        for name, value in changes.items()
    )
    if missing(other, m) <= 0:
        return f"{now} It would with {words}."
    left = f"{words} would leave {missing(other, m) / 1e9:.1f} GB too much: " if words else ""
    return f"{now} {left}use more or larger GPUs."
