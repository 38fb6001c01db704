"""The transformer: Qwen2/Qwen2.5, Qwen3 and Llama 3.x in one class, from and to hub folders.

    model = load("Qwen/Qwen2.5-0.5B")              # a folder, or a hub id
    hidden = model(ids)                            # (B, T) -> (B, T, D)
    logits = model.logits(hidden)                  # (B, T, V), never below fp32
    hidden = model(row, segments=[5, 9, 3])        # three sequences packed in one row, no padding
    hidden = model(ids, positions, cache=cache)    # prefill and decoding: the cache is an argument
    save(model, "folder")                          # config.json and safetensors for transformers

Weights may be fp32 masters while activations are bf16: set `model.compute_dtype = torch.bfloat16`.
Every layer casts its own weights to the type of what flows through it, so no autocast is needed.

Letters: B rows, T tokens of a row, D width, H query heads, K key/value heads, E size of a head,
V vocabulary.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
HUB_KEYS = {  # our field -> the key of config.json
    "family": "model_type",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
SUPPORTED = {  # keys that would change the computation, and the one value that we compute
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
ROPE_KEYS = {"default": [], "linear": ["factor"], "llama3": LLAMA3}
EMBEDDING = "model.embed_tokens.weight"
SHARD_BYTES = 5_000_000_000
STALE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Config:
    """What shapes the computation. `hub` keeps the rest of config.json for `save` to write back."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    tied: bool
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    norm_eps: float = 1e-6
    hub: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"


# ---------------------------------------------------------------------------------- the forward


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = (
            layer,
            c.heads,
            c.kv_heads,
            c.head_dim,
        )
        # One product instead of three. The hub keeps q, k and v apart: see `hub_pieces`.
        self.qkv = Linear(c.hidden_size, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        self.out = Linear(c.heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], packing, cache) -> Tensor:
        B, T, _ = x.shape
        H, K = self.heads, self.kv_heads
        qkv = self.qkv(x).view(B, T, H + 2 * K, self.head_dim)
        qk, v = qkv.split((H + K, K), dim=2)  # (B, T, H+K, E), (B, T, K, E)
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])), dim=2)
        q, k = rotate(qk, *rope).split((H, K), dim=2)
        if cache is not None:  # the cache owns the past, so it does the attention over it
            y = cache.attend(self.layer, q, k, v)
        elif packing is not None:
            y = packed_attention(q, k, v, packing)
        else:
            y = causal_attention(q, k, v)
        return self.out(y.reshape(B, T, H * self.head_dim))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_up = Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.attention = Attention(c, layer)
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], packing, cache) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, packing, cache)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    def __init__(self, config: Config):
        """Random weights (normal, 0.02), ready to train; `load` takes a folder's instead."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        # A tied model has no head of its own: one parameter, one gradient, nothing to keep in step.
        head = None if config.tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head = head
        self.compute_dtype: torch.dtype | None = None  # None: the type of the weights
        self.checkpointing = False  # recompute each block on the way back: memory for time
        self._frequencies: Tensor | None = None
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): what `logits` multiplies with, for kernels that never form the logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def activation_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.embedding.weight.dtype

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        cache=None,
        segments: Sequence[int | Sequence[int]] | None = None,
    ) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, D) after the last norm.

        `segments`: the lengths of the sequences that lie end to end in the one row of `ids`. Each
        sees itself alone. They are plain integers, so no mask is ever inferred from token values.
        (9, 3, 4) stands for 9 tokens that two sequences begin with, and for the 3 and the 4 with
        which they go on, without seeing each other: a prompt is computed once for all its samples.
        `cache`: anything with `attend(layer, q, k, v) -> y`, q and y (B, T, H, E), k and v
        (B, T, K, E); it stores the keys and values and does the attention (see sampler.py).
        `positions` (B, T) default to 0, 1, 2, … in each row or segment; a cache requires them.
        """
        if ids.dim() != 2 or ids.numel() == 0:
            raise ValueError(f"ids must be (rows, tokens), not empty; not {tuple(ids.shape)}")
        B, T = ids.shape
        # On a GPU this look would stall the stream; a sampler has looked before it fills a cache.
        if ids.device.type == "cpu" and cache is None:
            low, high = ids.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                bad, size = int(low if low < 0 else high), self.config.vocab_size
                raise ValueError(
                    f"token id {bad} is outside the vocabulary of {size}: is this the model's own "
                    "tokenizer?"
                )
        if cache is not None and (positions is None or segments is not None):
            raise ValueError("with a cache, give `positions` and no `segments`")
        if positions is not None and positions.shape != ids.shape:
            raise ValueError(f"positions {tuple(positions.shape)} for ids {tuple(ids.shape)}")
        packing = None
        if segments is not None:
            segments = [
                tuple(map(int, s)) if isinstance(s, Sequence) else (int(s),) for s in segments
            ]
            if (
                B != 1
                or sum(map(sum, segments)) != T
                or min((s[0] if s else 0 for s in segments), default=1) < 1
                or min(map(min, segments)) < 0
            ):
                raise ValueError(
                    f"segments {segments} must be positive lengths that fill the one row of "
                    f"ids, which has the shape {tuple(ids.shape)}"
                )
            packing = pack(segments, ids.device)
            if positions is None:
                positions = packing.positions[None]
        if positions is None:
            positions = torch.arange(T, device=ids.device).expand(B, T)

        x = F.embedding(ids, self.embedding.weight).to(self.activation_dtype)  # (B, T, D)
        rope = self.rope(positions)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, packing, cache, use_reentrant=False)
            else:
                x = block(x, rope, packing, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), accumulated and kept in fp32 whatever the activations are.

        Logits rounded to bf16 shift probabilities by up to 0.4%, which a policy ratio would see.
        """
        weight = self.head_weight.to(hidden.dtype)
        # The product with fp32 output has no backward, and exists on CUDA alone.
        half = hidden.dtype in (torch.bfloat16, torch.float16)
        if hidden.is_cuda and half and not torch.is_grad_enabled():
            flat = hidden.reshape(-1, hidden.shape[-1])
            out = torch.mm(flat, weight.t(), out_dtype=torch.float32)
            return out.view(*hidden.shape[:-1], -1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(wide), weight.to(wide))

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, T, 1, E) of the rotary embedding, in the activations' type."""
        # Not a buffer: never below fp32, and out of the state dict and of the meta device.
        wide = torch.promote_types(self.activation_dtype, torch.float32)
        known = self._frequencies
        if known is None or (known.device, known.dtype) != (positions.device, wide):
            self._frequencies = rope_frequencies(self.config, wide).to(positions.device)
        angles = positions[..., None].to(wide) * self._frequencies  # (B, T, E/2)
        angles = torch.cat((angles, angles), dim=-1)[:, :, None]
        return angles.cos().to(self.activation_dtype), angles.sin().to(self.activation_dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The hub's layout: dimension i turns together with dimension i + E/2."""
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-right, left), dim=-1), sin)


def rope_frequencies(c: Config, dtype: torch.dtype = torch.float32) -> Tensor:
    """(E/2,) radians per position. Llama 3 slows the long waves down to stretch the context."""
    exponents = torch.arange(0, c.head_dim, 2, dtype=dtype) / c.head_dim
    frequencies = 1.0 / c.rope_theta**exponents
    scaling = c.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns_in_window = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = ((turns_in_window - low) / (high - low)).clamp(
        0, 1
    )  # 0: slowed by `factor`, 1: left alone
    return frequencies * (blend + (1 - blend) / scaling["factor"])


# ---------------------------------------------------------------- attention without a cache


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, T, H, E), k and v (B, T, K, E) -> (B, T, H, E); each token sees itself and before."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2)


class Packing(NamedTuple):
    grids: list[Tensor]  # for each bucket (sequences, longest): where in the row its tokens lie
    back: Tensor  # (T,) row position -> place in the buckets' grids, laid end to end
    positions: Tensor  # (T,) 0, 1, 2, … in each sequence


def pack(segments: Sequence[Sequence[int]], device: torch.device) -> Packing:
    """Group sequences so that the longest of a bucket is less than twice the shortest.

    Less than half of a bucket's grid is padding then, whatever the mixture of lengths. What several
    sequences begin with stands in the row once, and in the grid for each of them.
    """
    positions: list[int] = []
    buckets: dict[int, list[list[int]]] = {}
    for first, *rest in segments:
        shared = list(range(len(positions), len(positions) + first))
        positions += range(first)
        for more in rest or [0]:
            whole = shared + list(range(len(positions), len(positions) + more))
            positions += range(first, first + more)
            buckets.setdefault(len(whole).bit_length(), []).append(whole)
    back, grids, filled = [0] * len(positions), [], 0
    for members in buckets.values():
        width = max(map(len, members))
        for whole in members:
            for place, position in enumerate(whole, filled):
                back[position] = place
            filled += width
        padded = [whole + whole[-1:] * (width - len(whole)) for whole in members]
        grids.append(torch.tensor(padded, device=device))
    return Packing(grids, *(torch.tensor(x, device=device) for x in (back, positions)))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """`causal_attention` for sequences that share one row: q (1, T, H, E), k and v (1, T, K, E).

    Products, norms and the MLP are most of the work and never see padding. Attention alone lays
    the sequences of a bucket side by side, padded on the right, where a causal token never looks:
    no mask, so the fast kernels of every device apply.
    """
    H, K = q.shape[2], k.shape[2]
    qkv = torch.cat((q, k, v), dim=2)[0]  # (T, H+2K, E)
    outputs = []
    for grid in packing.grids:
        rows = qkv.index_select(0, grid.flatten()).view(*grid.shape, H + 2 * K, -1)
        outputs.append(causal_attention(*rows.split((H, K, K), dim=2)).flatten(0, 1))
    return torch.cat(outputs).index_select(0, packing.back)[None]


# ------------------------------------------------------------------------------- from the hub


def load(
    source: str | Path, dtype: torch.dtype | None = None, device=None, shard: Callable | None = None
) -> Transformer:
    """Read a hub folder, or fetch one by its id; `dtype=None` keeps the file's type.

    `shard(model)` spreads the parameters, still without values, over processes and returns
    `place(name, tensor) -> share`; each tensor is read whole, one after another (see ranks.py).
    """
    folder = find_folder(source)
    config, tensors = check_folder(folder)
    with torch.device("meta"):  # shapes only: a 7B model takes its memory once
        model = Transformer(config)
    place = shard(model) if shard else lambda name, tensor: tensor
    state = {}
    for ours, pieces in hub_pieces(config).items():
        parts = []
        for name, _ in pieces:
            path, file = tensors[name]
            part = file.get_tensor(name)
            if part.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                found = f"has the type {part.dtype}; quantised weights are not supported"
                raise ValueError(f"{path}: tensor {name} {found}")
            parts.append(part.to(device=device, dtype=dtype))
        state[ours] = place(ours, torch.cat(parts) if len(parts) > 1 else parts[0])
    if config.tied and "lm_head.weight" in tensors:
        head, embedding = (tensors[n][1].get_tensor(n) for n in ("lm_head.weight", EMBEDDING))
        if not torch.equal(head.to(embedding), embedding):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from the "
                "embedding; set tie_word_embeddings to false in config.json to use that head"
            )
    model.load_state_dict(state, assign=True)  # assigned: nothing can be copied to meta
    return model


def check_folder(folder: Path) -> tuple[Config, dict]:
    """Read config.json and check the tensors' names and shapes against it; no value is read."""
    config, tensors = read_config(folder), find_tensors(folder)
    check_names(config, tensors, folder)
    for name, shape in itertools.chain(*hub_pieces(config).values()):
        path, file = tensors[name]
        found = tuple(file.get_slice(name).get_shape())
        if found != shape:
            raise ValueError(
                f"{path}: tensor {name} has the shape {found}, but config.json asks for {shape}"
            )
    return config, tensors


def find_folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    words = str(source)
    if folder.exists() or words.count("/") != 1 or words[0] in "./~" or words.endswith("/"):
        raise FileNotFoundError(f"{source}: no such folder (and not a hub id of the form org/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except (HfHubHTTPError, OSError) as error:  # offline and not in the cache is an OSError too
        raise FileNotFoundError(
            f"{source}: no folder here, and the hub did not give it. Check the name; offline, give "
            f"a folder; for a gated model, accept its licence and set HF_TOKEN. ({error})"
        ) from error


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: not a Hugging Face model folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not an object")
    return content


def read_config(folder: Path) -> Config:
    """config.json of either generation: transformers 5 (`rope_parameters`) or before."""
    path = folder / "config.json"
    hub = read_json(path)

    kinds = {"family": (str,), "norm_eps": (int, float)}
    for ours, key in HUB_KEYS.items():
        if type(hub.get(key)) not in kinds.get(ours, (int,)):
            raise ValueError(f"{path}: the key {key!r} is missing or not of its type")
        if ours not in kinds and hub[key] < 1:
            raise ValueError(f"{path}: {key} {hub[key]} must be at least 1")
    known = {ours: hub[key] for ours, key in HUB_KEYS.items()}
    family, heads = known["family"], known["heads"]
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type {family!r} is unknown; known: {', '.join(FAMILIES)}")
    for key, allowed in SUPPORTED.items():
        if hub.get(key) not in (None, allowed):
            raise ValueError(f"{path}: {key}={hub[key]!r} is not supported, only {allowed!r}")
    if set(hub.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"{path}: layer_types other than 'full_attention' are not supported")
    kv_heads = hub.get("num_key_value_heads") or heads
    head_dim = hub.get("head_dim") or (128 if family == "qwen3" else known["hidden_size"] // heads)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads "
            f"{kv_heads}, and the head size {head_dim} even"
        )
    theta, scaling = read_rope(hub, path)
    tied = bool(hub.get("tie_word_embeddings", False))  # all three families: silence means no
    return Config(
        **known,
        kv_heads=kv_heads,
        head_dim=head_dim,
        tied=tied,
        rope_theta=theta,
        rope_scaling=scaling,
        hub=hub,
    )


def read_rope(hub: dict, path: Path) -> tuple[float, dict | None]:
    old = {"rope_theta": hub.get("rope_theta"), **(hub.get("rope_scaling") or {})}
    old["rope_type"] = old.get("rope_type") or old.pop("type", None)
    new = hub.get("rope_parameters") or {}
    rope = {key: value for key, value in (old | new).items() if value is not None and key != "type"}
    for key, value in old.items():
        if value is not None and new.get(key, value) != value:
            raise ValueError(
                f"{path}: rope_parameters say {key}={new[key]!r}, the older keys {value!r}: "
                "remove the wrong one"
            )
    theta = rope.pop("rope_theta", None)
    if theta is None:
        raise ValueError(
            f"{path} has neither rope_theta nor rope_parameters.rope_theta; "
            'add "rope_theta": 10000.0 if that is what this model was trained with'
        )
    kind = rope.setdefault("rope_type", "default")
    if kind not in ROPE_KEYS:
        known = ", ".join(ROPE_KEYS)
        raise ValueError(f"{path}: rope type {kind!r} is not supported; known: {known}")
    missing = [key for key in ROPE_KEYS[kind] if key not in rope]
    if missing:
        raise ValueError(f"{path}: rope type {kind!r} needs the key {missing[0]!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor other than 1 is not supported")
    return float(theta), None if kind == "default" else rope


def hub_pieces(c: Config) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Our parameter -> the hub's tensors, with shapes, that it is stacked from by rows."""
    width, inner, E = c.hidden_size, c.intermediate_size, c.head_dim
    rows = {"q": c.heads * E, "k": c.kv_heads * E, "v": c.kv_heads * E}
    pieces = {"embedding.weight": [(EMBEDDING, (c.vocab_size, width))]}
    for i in range(c.layers):
        layer = {
            "attention_norm.weight": [("input_layernorm.weight", (width,))],
            "attention.qkv.weight": [
                (f"self_attn.{x}_proj.weight", (n, width)) for x, n in rows.items()
            ],
            "attention.out.weight": [("self_attn.o_proj.weight", (width, rows["q"]))],
            "mlp_norm.weight": [("post_attention_layernorm.weight", (width,))],
            "mlp.gate_up.weight": [
                (f"mlp.{x}_proj.weight", (inner, width)) for x in ("gate", "up")
            ],
            "mlp.down.weight": [("mlp.down_proj.weight", (width, inner))],
        }
        if c.qkv_bias:
            biases = [(f"self_attn.{x}_proj.bias", (n,)) for x, n in rows.items()]
            layer["attention.qkv.bias"] = biases
        if c.qk_norm:
            for x in ("q", "k"):
                layer[f"attention.{x}_norm.weight"] = [(f"self_attn.{x}_norm.weight", (E,))]
        for ours, parts in layer.items():
            named = [(f"model.layers.{i}.{name}", shape) for name, shape in parts]
            pieces[f"blocks.{i}.{ours}"] = named
    pieces["norm.weight"] = [("model.norm.weight", (width,))]
    if not c.tied:
        pieces["head.weight"] = [("lm_head.weight", (c.vocab_size, width))]
    return pieces


def find_tensors(folder: Path) -> dict:
    """Tensor name -> (path, open file). An index names the files; files name their tensors."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        paths = [single]
    elif index.is_file():
        paths = sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
    else:
        raise FileNotFoundError(
            f"{folder} holds neither {single.name} nor {index.name}; other formats must "
            "be saved again with transformers' save_pretrained"
        )
    tensors: dict = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is named in {index.name} but missing: fetch it again")
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}): fetch or save it again"
            ) from error
        for name in file.keys():  # noqa: SIM118
            if name in tensors:
                raise ValueError(f"tensor {name} stands in both {tensors[name][0]} and {path}")
            tensors[name] = path, file
    return tensors


def check_names(config: Config, tensors: dict, folder: Path) -> None:
    wanted = {name for pieces in hub_pieces(config).values() for name, _ in pieces}
    missing = sorted(wanted - set(tensors))
    if missing == ["lm_head.weight"]:
        raise ValueError(
            f"{folder}: lm_head.weight is missing although tie_word_embeddings is not true in "
            "config.json; set it to true if the head is the embedding; else the head is lost"
        )
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}")
    ignored = {"lm_head.weight"} if config.tied else set()  # `load` compares it
    ignored |= {t for t in tensors if t.endswith("rotary_emb.inv_freq")}  # old Llama, derivable
    extra = sorted(set(tensors) - wanted - ignored)
    if extra:
        raise ValueError(
            f"{folder}: {len(extra)} tensors have no place in a {config.family} model of "
            f"{config.layers} layers, first {extra[0]} in {tensors[extra[0]][0].name}"
        )


# --------------------------------------------------------------------------------- to the hub


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever its parsers raise: the file is to blame
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder}: no tokenizer could be read there ({first})") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer names no eos_token to end a translation")
    return tokenizer


def save(model: Transformer, folder: str | Path) -> None:
    """Write config.json and safetensors that `load` and transformers 4.57 and 5.x read.

    All files are written beside the old ones first and renamed at the end, so a save that fails
    leaves an earlier one as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    state = model.state_dict()
    for ours, pieces in hub_pieces(model.config).items():
        parts = state[ours].split([shape[0] for _, shape in pieces])
        tensors.update({name: part for (name, _), part in zip(pieces, parts, strict=True)})
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    config = {"config.json": hub_config(model.config, model.embedding.weight.dtype)}
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        weight_map = {n: f for f, shard in zip(files, shards, strict=True) for n in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        config["model.safetensors.index.json"] = index
    partial = {name: folder / (name + ".partial") for name in [*files, *config]}
    try:
        for file, shard in zip(files, shards, strict=True):
            # One shard at a time leaves the device. safetensors refuses pieces that share memory.
            pieces = {name: tensor.detach().cpu().clone() for name, tensor in shard.items()}
            save_file(pieces, partial[file], {"format": "pt"})
        for file, content in config.items():
            partial[file].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in partial.values():
            with open(path, "rb") as written:
                os.fsync(written.fileno())
        for path in folder.iterdir():  # without its index a mixture of old and new does not load
            if STALE.fullmatch(path.name) and path.name not in files:
                path.unlink()
        for file, path in partial.items():
            os.replace(path, folder / file)
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{folder}: the weights could not be written ({error}); make room there. What was in "
            "it before is whole"
        ) from None
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def hub_config(c: Config, dtype: torch.dtype) -> dict:
    """What was read, with the keys that we own in the spelling of both generations."""
    scaling = c.rope_scaling or {"rope_type": "default"}
    stored = str(dtype).removeprefix("torch.")
    return {
        **c.hub,
        **{key: getattr(c, ours) for ours, key in HUB_KEYS.items()},
        "architectures": [FAMILIES[c.family]],
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "tie_word_embeddings": c.tied,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling,
        "rope_parameters": {**scaling, "rope_theta": c.rope_theta},
        "dtype": stored,
        "torch_dtype": stored,
    }
