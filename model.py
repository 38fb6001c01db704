"""The transformer: Qwen2, Qwen2.5, Qwen3 and Llama 3.x, from and to Hugging Face folders.

    model = load("Qwen/Qwen2.5-0.5B")              # a folder or a hub id
    hidden = model(ids)                            # (B, T) -> (B, T, D)
    logits = model.logits(hidden)                  # (B, T, V), never below fp32
    hidden = model(row, segments=[5, 9, 3])        # three sequences packed in one row, no padding
    hidden = model(ids, positions, cache=cache)    # prefill and decoding: the cache is an argument
    save(model, "folder")                          # config.json and safetensors for transformers

Weights may be fp32 masters while activations are bf16: set `model.compute_dtype = torch.bfloat16`.
Every layer casts its own weights to its input's dtype, so no autocast is needed.

Letters: B rows, T tokens of a row, D width, H query heads, K key/value heads, E head size,
V vocabulary.
"""

import json
import math
import os
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
HUB_KEYS = {  # our field -> the key in config.json
    "family": "model_type", "vocab_size": "vocab_size", "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}  # fmt: skip
SUPPORTED = {  # keys that would change the computation, and the only value implemented here
    "hidden_act": "silu", "use_sliding_window": False, "attention_bias": False, "mlp_bias": False,
    "quantization_config": None, "partial_rotary_factor": 1.0,
}  # fmt: skip
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Config:
    """The model's shape. `hub` keeps the rest of config.json, so that `save` can write it back."""

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


# ------------------------------------------------------------------------------------- forward


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.heads, self.kv_heads = c.heads, c.kv_heads
        # One product instead of three. Hugging Face stores q, k and v apart: see `hub_pieces`.
        size = (c.heads + 2 * c.kv_heads) * c.head_dim
        self.qkv = Linear(c.hidden_size, size, bias=c.family == "qwen2")
        self.out = Linear(c.heads * c.head_dim, c.hidden_size, bias=False)
        has_qk_norm = c.family == "qwen3"
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if has_qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if has_qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], packing, cache) -> Tensor:
        B, T, _ = x.shape
        H, K = self.heads, self.kv_heads
        qkv = self.qkv(x).view(B, T, H + 2 * K, self.head_dim)
        qk, v = qkv.split((H + K, K), dim=2)  # (B, T, H+K, E), (B, T, K, E)
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])), dim=2)
        q, k = rotate(qk, *rope).split((H, K), dim=2)
        if cache is not None:  # it holds the past, so it computes the attention over it
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
        """Random weights (normal, 0.02), ready to train; `load` reads a folder instead."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None  # tied: one parameter, one gradient, nothing to keep in sync
        if not config.tied:
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compute_dtype: torch.dtype | None = None  # None: the dtype of the weights
        self.checkpointing = False  # recompute each block in the backward pass: memory for time
        # With a cache: (model, x, rope, cache) -> hidden, such as kernels.fused.decode_blocks.
        self.decode_blocks: Callable | None = None
        self._frequencies: Tensor | None = None
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the factor of `logits`, for kernels that never form the logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def activation_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.embedding.weight.dtype

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, cache=None, segments=None
    ) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, D) after the last norm.

        `segments`: the lengths of the sequences packed in the one row of `ids`, so that no mask is
        inferred from token values. Each attends to itself only. The tuple (9, 3, 4) is a prefix of
        9 tokens and two continuations of 3 and 4 that attend to it but not to each other: a prompt
        is computed once for all its samples.
        `cache`: anything with `attend(layer, q, k, v) -> y`, q and y (B, T, H, E), k and v
        (B, T, K, E); it stores the keys and values and computes the attention (see sampler.py).
        `positions` (B, T) default to 0, 1, 2, … in each row or segment; a cache requires them.
        """
        if cache is not None and (positions is None or segments is not None):
            raise ValueError("with a cache, give `positions` and no `segments`")
        packing = None if segments is None else make_packing(segments, ids)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            positions = positions if packing is None else packing.positions[None]

        x = F.embedding(ids, self.embedding.weight).to(self.activation_dtype)  # (B, T, D)
        rope = self.rope(positions)
        if cache is not None and self.decode_blocks is not None:
            return self.decode_blocks(self, x, rope, cache)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, packing, cache, use_reentrant=False)
            else:
                x = block(x, rope, packing, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), accumulated and returned in fp32 even for bf16 activations.

        Logits rounded to bf16 shift probabilities by up to 0.4%, which a policy ratio would see.
        """
        weight = self.head_weight.to(hidden.dtype)
        if hidden.is_cuda and hidden.dtype.itemsize == 2 and not torch.is_grad_enabled():
            flat = hidden.reshape(-1, hidden.shape[-1])  # fp32 output: CUDA only, no backward
            return torch.mm(flat, weight.t(), out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(wide), weight.to(wide))

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, T, 1, E) of the rotary embedding, in the activations' dtype."""
        # Not a buffer: never below fp32, and neither in the state dict nor on the meta device.
        wide = torch.promote_types(self.activation_dtype, torch.float32)
        cached = self._frequencies
        if cached is None or (cached.device, cached.dtype) != (positions.device, wide):
            self._frequencies = rope_frequencies(self.config, wide).to(positions.device)
        angles = positions[..., None].to(wide) * self._frequencies  # (B, T, E/2)
        angles = torch.cat((angles, angles), dim=-1)[:, :, None]
        return angles.cos().to(self.activation_dtype), angles.sin().to(self.activation_dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's layout: dimension i rotates together with dimension i + E/2."""
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-right, left), dim=-1), sin)


def rope_frequencies(c: Config, dtype: torch.dtype = torch.float32) -> Tensor:
    """(E/2,) radians per position. Llama 3 slows low frequencies down to stretch the context."""
    exponents = torch.arange(0, c.head_dim, 2, dtype=dtype) / c.head_dim
    frequencies = 1.0 / c.rope_theta**exponents
    scaling = c.rope_scaling
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns_in_window = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    # 0: slowed down by `factor`, 1: unchanged
    blend = ((turns_in_window - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling["factor"])


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, T, H, E), k and v (B, T, K, E) -> (B, T, H, E)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2)


class Packing(NamedTuple):
    grids: list[Tensor]  # per bucket (sequences, longest): the row index of each token
    back: Tensor  # (T,) row index -> index into the buckets' grids, laid end to end
    positions: Tensor  # (T,) 0, 1, 2, … in each sequence


def make_packing(segments: Sequence[int | Sequence[int]], ids: Tensor) -> Packing:
    """Group sequences so that the longest of a bucket is less than twice the shortest, and less
    than half of its grid is padding. A shared prefix is in the grid once for each sequence."""
    lengths = [s if isinstance(s, Sequence) else (s,) for s in segments]
    malformed = any(not s or s[0] < 1 or min(s) < 0 for s in lengths)
    if malformed or (1, sum(map(sum, lengths))) != ids.shape:
        raise ValueError(f"segments {segments} do not fill the one row of ids {tuple(ids.shape)}")
    positions: list[int] = []
    buckets: dict[int, list[list[int]]] = {}
    for prefix_length, *rest in lengths:
        prefix = list(range(len(positions), len(positions) + prefix_length))
        positions += range(prefix_length)
        for more in rest or [0]:
            sequence = prefix + list(range(len(positions), len(positions) + more))
            positions += range(prefix_length, prefix_length + more)
            buckets.setdefault(len(sequence).bit_length(), []).append(sequence)
    back, grids, filled = [0] * len(positions), [], 0
    for sequences in buckets.values():
        width = max(map(len, sequences))
        for sequence in sequences:
            for index, position in enumerate(sequence, filled):
                back[position] = index
            filled += width
        padded = [s + s[-1:] * (width - len(s)) for s in sequences]
        grids.append(torch.tensor(padded, device=ids.device))
    return Packing(grids, *(torch.tensor(x, device=ids.device) for x in (back, positions)))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """`causal_attention` for sequences that share one row: q (1, T, H, E), k and v (1, T, K, E).

    Only attention lays the sequences of a bucket side by side, padded on the right, where a causal
    token never looks: no mask, so the fast kernels of every device apply.
    """
    H, K = q.shape[2], k.shape[2]
    qkv = torch.cat((q, k, v), dim=2)[0]  # (T, H+2K, E)
    outputs = []
    for grid in packing.grids:
        rows = qkv.index_select(0, grid.flatten()).view(*grid.shape, H + 2 * K, -1)
        outputs.append(causal_attention(*rows.split((H, K, K), dim=2)).flatten(0, 1))
    return torch.cat(outputs).index_select(0, packing.back)[None]


# --------------------------------------------------------------------------- from Hugging Face


def load(
    source: str | Path, dtype: torch.dtype | None = None, device=None, shard: Callable | None = None
) -> Transformer:
    """Read a folder, or fetch one by its hub id; `dtype=None` keeps the dtype of the files.

    `shard(model)` shards the parameters, still without values, and returns
    `local_shard(name, tensor)`, which is called tensor by tensor (see run/distributed.py).
    """
    folder = find_folder(source)
    config, files = check_folder(folder)
    with torch.device("meta"):  # shapes only: a 7B model takes its memory once
        model = Transformer(config)
    local_shard = shard(model) if shard else lambda name, tensor: tensor
    state = {}
    for ours, pieces in hub_pieces(config).items():
        parts = [files[n].get_tensor(n).to(device=device, dtype=dtype) for n in pieces]
        state[ours] = local_shard(ours, torch.cat(parts) if len(parts) > 1 else parts[0])
    model.load_state_dict(state, assign=True)  # nothing can be copied to the meta device
    return model


def find_folder(source: str | Path) -> Path:
    folder, text = Path(source).expanduser(), str(source)
    if folder.is_dir():
        return folder
    if text.count("/") != 1 or text[0] in "./~":
        raise FileNotFoundError(f"{source}: no such folder, and no hub id of the form org/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except OSError as error:  # all of the hub's errors are
        raise FileNotFoundError(
            f"{source}: no such folder, and the hub did not give it ({error}). Offline, give a "
            "folder; for a gated model, accept its licence and set HF_TOKEN"
        ) from error


def check_folder(folder: Path) -> tuple[Config, dict]:
    """Compare the tensors' names and shapes with config.json; no value is read.

    Returns the config and, by tensor name, the open file.
    """
    config, files = read_config(folder), open_tensors(folder)
    expected = {n: shape for pieces in hub_pieces(config).values() for n, shape in pieces.items()}
    actual = {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}
    if config.tied:
        actual.pop(LM_HEAD, None)  # some files repeat the embedding
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise ValueError(
                f"{folder}: tensor {name} is {actual.get(name, 'missing')} in the files, but "
                f"config.json asks for {expected.get(name, 'no such tensor')}"
            )
    return config, files


def open_tensors(folder: Path) -> dict:
    """Tensor name -> the open file that holds it."""
    names, index = {"model.safetensors"}, folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").is_file():
        if not index.is_file():
            raise FileNotFoundError(f"{folder} holds neither model.safetensors nor {index.name}")
        names = set(json.loads(index.read_text())["weight_map"].values())
    files = {}
    for path in (folder / name for name in sorted(names)):
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is incomplete, fetch or save it again: {error}") from error
        files |= dict.fromkeys(file.keys(), file)
    return files


def read_config(folder: Path) -> Config:
    """config.json of either generation: transformers 5 (`rope_parameters`) or older."""
    path = folder / "config.json"
    try:
        hub = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    values = {ours: hub.get(key) for ours, key in HUB_KEYS.items()}
    family, heads = values["family"], values["heads"]
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type {family!r} is unknown; known: {', '.join(FAMILIES)}")
    for ours, value in values.items():
        if not value:
            raise ValueError(f"{path} lacks the key {HUB_KEYS[ours]}")
    for key, supported in SUPPORTED.items():
        value = {**(hub.get("rope_parameters") or {}), **hub}.get(key)
        if value not in (None, supported):
            raise ValueError(f"{path}: {key}={value!r} is not supported, only {supported!r}")
    kv_heads = hub.get("num_key_value_heads") or heads
    head_dim = hub.get("head_dim") or (128 if family == "qwen3" else values["hidden_size"] // heads)
    tied = bool(hub.get("tie_word_embeddings"))  # the default of all three families is no
    # The new `rope_parameters`, or the older `rope_theta` and `rope_scaling`.
    rope = {"rope_theta": hub.get("rope_theta"), **(hub.get("rope_scaling") or {})}
    rope |= hub.get("rope_parameters") or {}
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    theta, scaling = rope.pop("rope_theta"), None if kind == "default" else rope
    if kind not in ("default", "llama3") or not theta:
        raise ValueError(f"{path}: rope type {kind!r} and rope_theta={theta} are not supported")
    return Config(
        **values, kv_heads=kv_heads, head_dim=head_dim, tied=tied, rope_theta=float(theta),
        rope_scaling=scaling, hub=hub,
    )  # fmt: skip


def hub_pieces(c: Config) -> dict[str, dict[str, tuple[int, ...]]]:
    """Our parameter -> the tensors, with shapes, whose rows it stacks."""
    D, inner, E = c.hidden_size, c.intermediate_size, c.head_dim
    rows = {"q": c.heads * E, "k": c.kv_heads * E, "v": c.kv_heads * E}
    layer = {
        "attention_norm.weight": {"input_layernorm.weight": (D,)},
        "attention.qkv.weight": {f"self_attn.{x}_proj.weight": (n, D) for x, n in rows.items()},
        "attention.out.weight": {"self_attn.o_proj.weight": (D, rows["q"])},
        "mlp_norm.weight": {"post_attention_layernorm.weight": (D,)},
        "mlp.gate_up.weight": {f"mlp.{x}_proj.weight": (inner, D) for x in ("gate", "up")},
        "mlp.down.weight": {"mlp.down_proj.weight": (D, inner)},
    }
    if c.family == "qwen2":
        layer["attention.qkv.bias"] = {f"self_attn.{x}_proj.bias": (n,) for x, n in rows.items()}
    if c.family == "qwen3":
        for norm in ("q_norm.weight", "k_norm.weight"):
            layer[f"attention.{norm}"] = {f"self_attn.{norm}": (E,)}
    pieces = {"embedding.weight": {"model.embed_tokens.weight": (c.vocab_size, D)}}
    for i in range(c.layers):
        for ours, parts in layer.items():
            named = {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
            pieces[f"blocks.{i}.{ours}"] = named
    pieces["norm.weight"] = {"model.norm.weight": (D,)}
    if not c.tied:
        pieces["head.weight"] = {LM_HEAD: (c.vocab_size, D)}
    return pieces


# ----------------------------------------------------------------------------- to Hugging Face


def save(model: Transformer, folder: str | Path) -> None:
    """Write config.json and model.safetensors that `load` and transformers 4.57 and 5.x read.

    Files are written as `….partial`, synced, and renamed at the end, so a save that fails or is
    killed leaves an earlier one intact.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state, tensors = model.state_dict(), {}
    for ours, pieces in hub_pieces(model.config).items():
        parts = state[ours].detach().cpu().split([shape[0] for shape in pieces.values()])
        tensors |= {name: part.clone() for name, part in zip(pieces, parts, strict=True)}
    config = json.dumps(hub_config(model.config, model.embedding.weight.dtype), indent=2)
    partial = {x: folder / f"{x}.partial" for x in ("model.safetensors", "config.json")}
    try:
        save_file(tensors, partial["model.safetensors"], {"format": "pt"})
        partial["config.json"].write_text(config + "\n", encoding="utf-8")
        for path in partial.values():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for name, path in partial.items():
            os.replace(path, folder / name)
    except (SafetensorError, OSError) as error:
        for path in partial.values():
            path.unlink(missing_ok=True)
        raise OSError(f"{folder}: the weights could not be written; an earlier save there is "
                      f"intact ({error})") from None  # fmt: skip


def hub_config(c: Config, dtype: torch.dtype) -> dict:
    """The config.json that was read, updated, with the keys of both generations of transformers."""
    dtype_name = str(dtype).removeprefix("torch.")
    rope = {"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_theta}
    return {
        **c.hub,
        **{key: getattr(c, ours) for ours, key in HUB_KEYS.items()},
        "architectures": [FAMILIES[c.family]],
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "tie_word_embeddings": c.tied,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling,
        "rope_parameters": rope,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }
