"""The sampler: many continuations of many prompts from one model, with a hand-written KV cache.

    sampler = Sampler(model, slots=64, max_length=512)
    groups = sampler.generate(prompts, n=8, max_new_tokens=64, stop_ids=[eos], seed=1)
    groups[2][5].ids, .logprobs, .stopped          # the sixth sample of the third prompt
    sampler.score(prompts, continuations)          # log-probs of given continuations
    sampler.next_logprobs(prompts, token_ids)      # log-probs of a few tokens to come next

The cache has `slots`, each with room for one sequence. The prefix that all prompts of a call share
(an instruction, a judge's template) is computed once and copied to every slot in use. Each distinct
prompt is then prefilled once, in the slot of its first sample, and copied to its siblings' slots.
Its last token is left out: the first decoding step is fed with it, so every token is drawn in one
place, `step`. A step decodes one token for each active sequence:

    slot 0   | shared prefix | prompt A | generated …        active: slots 0 … B-1
    slot 1   | shared prefix | prompt A | generated
    slot 2   | shared prefix | prompt B | generated ………
    slot 3   | shared prefix |                               free

When a sequence ends, the last active one moves into its slot and waiting ones join at the end, so
the cost of a step follows the number of active sequences.

Requirements on a model: `model(ids, positions, cache=view) -> hidden`, from (B, T) to (B, T, D),
where attention layer 0, 1, … calls `view.attend(layer, q, k, v) -> y`: q and y are (B, T, H, E), k
and v (B, T, K, E), with positions already applied to q and k, and scores scaled by E^-½;
`model.logits` from (M, D) to (M, V) in fp32; `model.parameters()`; and `model.config` with layers,
kv_heads, head_dim, max_length, vocab_size. A model that computes in another dtype than its weights
has `model.compute_dtype`. On a GPU its forward must not synchronise with the host. `generate` calls
it in inference mode, so tensors that the model caches there cannot be trained through later.

Given its logits, a draw depends on (seed, key, sample index, token index) only. Keys default to the
prompts' indices in the call; pass `keys` to make samples independent of the other prompts, their
order and the number of ranks. The logits of a batch of 3 and of 16 still differ in the last bits,
so a draw on the edge between two tokens can flip, and the rest of the sample with it: very rarely
in fp32, more often in bf16. For the same reason `score` matches the log-probs of `generate` only up
to rounding.

Letters: B sequences in a step, T tokens, D width, H query heads, K key/value heads, E head size,
V vocabulary, S slots, L positions of a slot.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Ids = Sequence[int]


class Sample(NamedTuple):
    ids: list[int]
    """The generated tokens, including the stop token that ended them."""
    logprobs: list[float]
    """Of each token, under the distribution it was drawn from (temperature and top-p included); at
    temperature 0 under the model's own distribution at temperature 1."""
    stopped: bool
    """True: ended with a stop token. False: cut off at max_new_tokens."""


class SamplingParams(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Kernels(NamedTuple):
    """Functions that replace PyTorch's operators in decoding."""

    attention: Callable | None = None
    """Such as kernels.decode.decode_attention."""
    block_sums: Callable | None = None
    """Such as kernels.fused.block_sums."""


@dataclass(eq=False)
class UnfinishedSample:
    """A sample that waits or is being generated."""

    prompt: tuple[int, ...]
    prompt_index: int
    sample_index: int
    key: int
    num_steps: int = 0  # since it joined: its number of tokens, unless it has ended in between


# -------------------------------------------------------------------------------------- cache


class Prefill:
    """Cache view for B prompts, padded on the right, where causal attention never looks.

    `kv` is (layers, 2, S, K, L, E). Positions before `shared` are read from slot 0. The rest is
    written to `slots` (None: nowhere, only the hidden states are needed), padding included:
    decoding masks it until it is overwritten.
    """

    def __init__(self, kv: Tensor, slots: Tensor | None, shared: int):
        self.kv, self.slots, self.shared = kv, slots, shared
        self.mask: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, E)
        B, H, T, E = q.shape
        K, shared = k.shape[1], self.shared
        keys, values = self.kv[layer]  # (S, K, L, E)
        if self.slots is not None:
            keys[self.slots, :, shared : shared + T] = k
            values[self.slots, :, shared : shared + T] = v
        if shared == 0:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
            return y.transpose(1, 2)
        k = torch.cat((keys[:1, :, :shared].expand(B, -1, -1, -1), k), dim=2)
        v = torch.cat((values[:1, :, :shared].expand(B, -1, -1, -1), v), dim=2)
        if self.mask is None:  # token t sees shared + t + 1 columns, in each of the H/K query heads
            mask = torch.ones(T, shared + T, dtype=torch.bool, device=q.device).tril(shared)
            self.mask = mask.repeat(H // K, 1)
        # A mask and grouped heads together have no fast kernel: stack each group's query heads
        # along the token axis.
        q = q.reshape(B, K, H // K * T, E)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return y.view(B, H, T, E).transpose(1, 2)


class Decode:
    """Cache view for one new token in each of the slots 0 … B-1.

    `lengths` (B,) tokens are cached before it; only the first `width` positions are read.
    """

    def __init__(self, kv: Tensor, lengths: Tensor, width: int):
        self.kv, self.width = kv, width
        _, _, _, K, L, _ = kv.shape
        B = lengths.shape[0]
        starts = torch.arange(0, B * K * L, L, device=kv.device).view(B, K)
        self.rows = (starts + lengths[:, None]).flatten()  # (B·K,) of a layer's S·K·L
        masked = torch.arange(width, device=kv.device) > lengths[:, None]
        bias = torch.zeros(masked.shape, dtype=kv.dtype, device=kv.device)
        bias = bias.masked_fill_(masked, -math.inf)[:, None]  # (B, 1, width)
        # Matrix products are three times as fast on a CPU; in bf16 they would round the scores.
        self.use_matmul = kv.dtype in (torch.float32, torch.float64)
        self.bias = bias.repeat_interleave(K, dim=0) if self.use_matmul else bias[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, _, H, E = q.shape
        K = k.shape[2]
        keys, values = self.kv[layer]
        keys.view(-1, E).index_copy_(0, self.rows, k.reshape(B * K, E))
        values.view(-1, E).index_copy_(0, self.rows, v.reshape(B * K, E))
        keys, values = keys[:B, :, : self.width], values[:B, :, : self.width]  # (B, K, width, E)
        # The H/K query heads of a key head become query tokens, so no key is repeated.
        if self.use_matmul:
            keys, values = keys.flatten(0, 1), values.flatten(0, 1)
            q = q.reshape(B * K, H // K, E)
            scores = torch.baddbmm(self.bias, q, keys.transpose(1, 2), alpha=E**-0.5)
            y = torch.bmm(scores.softmax(-1), values)
        else:
            q = q.reshape(B, K, H // K, E)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.bias)
        return y.reshape(B, 1, H, E)


class CustomDecode(NamedTuple):
    """`Decode` by a function such as kernels.decode.decode_attention."""

    kv: Tensor
    lengths: Tensor
    width: int
    attention: Callable

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v, self.kv[layer], self.lengths, self.width)


# -------------------------------------------------------------------------------------- draws


def draw(
    logits: Tensor, uniform: Tensor, params: SamplingParams, block_sums: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """logits (B, V), fp32 or float64, uniform (B,) in [0, 1) -> tokens (B,), their log-probs (B,).

    Inverse transform sampling: the token is the first whose cumulative probability exceeds
    `uniform`. One number a row instead of V makes draws easy to key. Probabilities are summed in
    fp64, over blocks of tokens first and then inside the chosen block (fp64 over all of V would
    cost more than the softmax). A token of probability 0 is never drawn, whatever the rounding.
    """
    if params.temperature == 0:
        token = logits.argmax(-1)
        logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        return token, logprob
    logits = apply_top_k_top_p(logits, params)
    B, V = logits.shape
    if V <= 512:  # one block
        prob = (logits / params.temperature).softmax(-1)
        cumulative = prob.double().cumsum(-1)
        token = first_true((cumulative > uniform[:, None] * cumulative[:, -1:]) & (prob > 0))
        return token, prob.gather(1, token[:, None])[:, 0].log()
    size = next(d for d in range(512, 0, -1) if V % d == 0)
    scale = 1 / params.temperature
    maxima, sums = (block_sums or block_sums_torch)(logits, size, scale)  # (B, V/size)
    peak = maxima.amax(-1, keepdim=True)
    mass = sums * ((maxima - peak) * scale).exp()
    edge = mass.double().cumsum(-1)
    target = uniform[:, None] * edge[:, -1:]
    block = first_true((edge > target) & (mass > 0))[:, None]
    inside = logits.view(B, -1, size).gather(1, block[..., None].expand(B, 1, size))[:, 0]
    scaled = (inside - peak) * scale  # (B, size)
    prob = scaled.exp()
    cumulative = prob.double().cumsum(-1)
    # A block's mass and the sum of its probabilities round differently: stay inside the block.
    rest = target - (edge - mass).gather(1, block)
    rest = torch.minimum(rest, cumulative[:, -1:] * (1 - 2**-48))
    column = first_true((cumulative > rest) & (prob > 0))[:, None]
    logprob = scaled.gather(1, column) - edge[:, -1:].log().to(scaled.dtype)
    return (block * size + column)[:, 0], logprob[:, 0]


def block_sums_torch(logits: Tensor, size: int, scale: float) -> tuple[Tensor, Tensor]:
    """(B, V) -> over blocks of `size` tokens the maximum z* and Σ exp(scale (z - z*)), (B, V/size)
    each. A block of -inf has the sum 0."""
    blocks = logits.view(logits.shape[0], -1, size)
    maxima = blocks.amax(-1)
    below = blocks - maxima.clamp(min=-3e38)[..., None]
    return maxima, below.mul_(scale).exp_().sum(-1)


def first_true(condition: Tensor) -> Tensor:
    """(B, M) -> (B,) index of the first true column."""
    return condition.to(torch.uint8).argmax(-1)


def apply_top_k_top_p(logits: Tensor, params: SamplingParams) -> Tensor:
    """-inf outside the top_k likeliest tokens (0: all), and outside the smallest set of what is
    left whose probability reaches top_p."""
    if 0 < params.top_k < logits.shape[-1]:
        smallest = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        prob = (ordered / params.temperature).softmax(-1)
        removed = prob.cumsum(-1) - prob >= params.top_p
        removed[:, 0] = False
        logits = logits.masked_fill(removed.scatter(1, order, removed), -math.inf)
    return logits


def uniforms(seed: int, keys: Ids, samples: Ids, count: int) -> Tensor:
    """(B, count) numbers in [0, 1), a function of (seed, key, sample, position): splitmix64."""

    def mix(x: Tensor) -> Tensor:  # int64 wraps around; the masks make the shifts logical
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
        return x ^ ((x >> 31) & 0x1FFFFFFFF)

    def absorb(state: Tensor, word: Tensor) -> Tensor:
        return mix((state ^ mix(word - 0x61C8864680B583EB)) - 0x61C8864680B583EB)

    def as_int64(values: Ids) -> Tensor:
        return torch.tensor([(int(v) + 2**63) % 2**64 - 2**63 for v in values])

    state = absorb(absorb(as_int64([seed]), as_int64(keys)), as_int64(samples))[:, None]
    state = absorb(state, torch.arange(count))  # (B, count)
    return ((state >> 16) & (2**48 - 1)).double() * 2.0**-48


# ---------------------------------------------------------------------------------- the sampler


class Sampler:
    def __init__(self, model, slots: int, max_length: int, kernels: Kernels | None = None):
        """Room for `slots` sequences of `max_length` tokens, prompt included.

        The cache holds 2 * layers * slots * kv_heads * max_length * head_dim numbers in the dtype
        the model computes in, for the sampler's lifetime. A model that casts fp32 weights on the
        fly would do so for each token, so give the sampler a copy in the compute dtype.
        """
        c = model.config
        if slots < 1 or not 2 <= max_length <= c.max_length:
            raise ValueError(
                f"slots={slots} must be at least 1, and max_length={max_length} in 2 … "
                f"{c.max_length}, the model's positions"
            )
        self.model, self.slots, self.max_length = model, slots, max_length
        self.kernels = kernels or Kernels()
        self.device = device = next(model.parameters()).device
        # Steps between checks for ended sequences. A check is free on a CPU and stalls a GPU;
        # tokens past a stop are discarded.
        self.check_every = 16 if device.type == "cuda" else 1
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            raise ValueError(f"model on {device}: call torch.cuda.set_device({device}) first")
        dtype = getattr(model, "compute_dtype", None) or next(model.parameters()).dtype
        self.logit_dtype = torch.promote_types(dtype, torch.float32)
        self.padded_length = -(-max_length // 8) * 8  # fused attention wants multiples of 8
        shape = (c.layers, 2, slots, c.kv_heads, self.padded_length, c.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.prefill_tokens = max(max_length, 8192)  # in one forward, padding included
        self.logit_rows = max(1, 2**26 // c.vocab_size)  # scoring: 256 MB of logits at once
        self.shared = 0  # length of the prefix that all prompts of this call share
        self.stops: frozenset[int] = frozenset()
        # The state of each slot and the call's settings, at addresses that captured graphs read.
        self.token = torch.zeros(slots, dtype=torch.int64, device=device)  # to be fed next
        self.length = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens in the cache
        self.num_generated = torch.zeros(slots, dtype=torch.int64, device=device)
        self.alive = torch.zeros(slots, dtype=torch.bool, device=device)
        # Between its end and the next check, a slot still decodes: it rewrites the column after its
        # last token, which is never read.
        shape = (slots, max_length)
        self.uniform = torch.zeros(shape, dtype=torch.float64, device=device)
        self.ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(shape, dtype=self.logit_dtype, device=device)
        self.state = (self.token, self.length, self.num_generated, self.alive)
        self.state += (self.uniform, self.ids, self.logprobs)
        self.limit = torch.zeros((), dtype=torch.int64, device=device)
        self.is_stop = torch.zeros(c.vocab_size, dtype=torch.bool, device=device)
        self.progress: Callable[[float], None] | None = None
        """Called at each check with the finished share of the call, 0 to 1."""
        self.graphs: dict = {}
        self.addresses: list[int] = []  # of the weights that the graphs read

    @torch.inference_mode()  # a tenth less overhead per operator than no_grad
    def generate(
        self,
        prompts: Sequence[Ids],
        n: int = 1,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_ids: Ids = (),
        seed: int = 0,
        keys: Ids | None = None,
    ) -> list[list[Sample]]:
        """n samples of each prompt, in the order of `prompts`.

        `keys` (default 0, 1, 2, …) identify the prompts for the draws: the same key and seed give
        the same samples in any call.
        """
        params = SamplingParams(temperature, top_k, top_p)
        is_valid = (temperature == 0 or 1e-4 <= temperature < math.inf) and 0 < top_p <= 1
        if not is_valid or top_k < 0 or max_new_tokens < 1:
            raise ValueError(
                f"{params} and max_new_tokens={max_new_tokens}: give a temperature of 0 or at "
                "least 0.0001, top_k of 0 (off) or more, top_p in (0, 1] and at least 1 token"
            )
        prompts, stop_ids = to_tuples(prompts), to_tuples([stop_ids])[0]
        keys = range(len(prompts)) if keys is None else to_tuples([keys])[0]
        if len(keys) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(keys)} keys")
        self.check_vocabulary(stop_ids, "stop_ids")
        self.check_sequences(prompts, "prompt", max_new_tokens)
        self.start_call(prompts, n, max_new_tokens, stop_ids)
        # Long prompts first, equal ones side by side: `admit` relies on siblings in a row.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        waiting = [UnfinishedSample(prompts[i], i, j, keys[i]) for i in order for j in range(n)]
        waiting.reverse()
        samples: list[list] = [[None] * n for _ in prompts]
        active: list[UnfinishedSample] = []
        while waiting or active:
            fits = min(self.slots - len(active), len(waiting))
            # Prefill in batches: wait until an eighth of the slots is free.
            if fits and (not active or fits >= self.slots // 8 or fits == len(waiting)):
                joining = [waiting.pop() for _ in range(fits)]
                self.admit(joining, len(active), seed, max_new_tokens)
                active += joining
            steps = min(self.check_every, max_new_tokens - min(s.num_steps for s in active))
            width = max(len(s.prompt) + s.num_steps for s in active)
            for i in range(steps):
                self.decode(len(active), min(width + i, self.padded_length), params)
            for sequence in active:
                sequence.num_steps += steps
            active = self.collect_finished(active, samples)
            if self.progress:
                total = n * len(prompts)
                partial = sum(s.num_steps for s in active) / max_new_tokens
                self.progress((total - len(waiting) - len(active) + partial) / total)
        return samples

    def start_call(self, prompts: list, n: int, max_new_tokens: int, stop_ids: Ids) -> None:
        """Copy the call's settings to the device and free all slots."""
        addresses = [p.data_ptr() for p in self.model.parameters()]
        if addresses != self.addresses:
            self.graphs.clear()  # the weights were replaced
            self.addresses = addresses
        self.share_prefix(prompts, min(self.slots, n * len(prompts)))
        self.stops = frozenset(stop_ids)
        self.limit.fill_(max_new_tokens)
        self.is_stop.zero_()
        self.is_stop[torch.tensor(stop_ids, dtype=torch.int64, device=self.device)] = True
        self.alive.zero_()

    def check_sequences(self, sequences: Sequence[Ids], what: str, more: int = 0) -> None:
        """Refuse sequences that cannot be continued: they are never cut or skipped."""
        for i, ids in enumerate(sequences):
            if len(ids) == 0:
                raise ValueError(f"{what} {i} is empty: a model continues at least one token")
            if len(ids) + more > self.max_length:
                raise ValueError(
                    f"{what} {i} has {len(ids)} tokens and {more} are to come, but the window is "
                    f"{self.max_length}: shorten it or make Sampler(max_length=…) larger"
                )
            self.check_vocabulary(ids, f"{what} {i}")

    def check_vocabulary(self, ids: Ids, what: str) -> None:
        size = self.model.config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            bad = next(i for i in ids if not 0 <= i < size)
            raise ValueError(f"{what} holds the id {bad}, outside the vocabulary of {size}")

    # ------------------------------------------------------------------------- prompts

    def share_prefix(self, prompts: Sequence[Ids], copies: int) -> None:
        """Compute the prefix that all prompts share, and copy it to the first `copies` slots."""
        shared, self.shared = common_prefix(prompts), 0
        if shared:
            for _ in self.prefill([prompts[0][:shared]], [0]):
                self.kv[:, :, 1:copies, :, :shared] = self.kv[:, :, :1, :, :shared]
        self.shared = shared

    def prefill(
        self, sequences: Sequence[Ids], slots: Ids | None = None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Run sequences from the shared prefix on, in batches that are less than half padding.

        Yields (indices of the sequences, hidden (B, T, D) from position `shared` on).
        """
        todo = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        todo = [i for i in todo if len(sequences[i]) > self.shared]
        budget = self.prefill_tokens
        while todo:
            T = len(sequences[todo[0]]) - self.shared
            # The prefix is not computed again, but each sequence reads a copy of its keys: allow
            # eight budgets of keys in all.
            fits = max(1, min(budget // T, 8 * budget // (self.shared + T)))
            batch = [i for i in todo[:fits] if 2 * (len(sequences[i]) - self.shared) > T]
            todo = todo[len(batch) :]
            ids = torch.zeros(len(batch), T, dtype=torch.int64)
            for row, i in enumerate(batch):
                tail = sequences[i][self.shared :]
                ids[row, : len(tail)] = torch.tensor(tail)
            rows = slots and torch.tensor([slots[i] for i in batch], device=self.device)
            positions = torch.arange(self.shared, self.shared + T, device=self.device)
            view = Prefill(self.kv, rows, self.shared)
            ids = ids.to(self.device)
            yield batch, self.model(ids, positions=positions.expand_as(ids), cache=view)

    def admit(self, joining: list, start: int, seed: int, max_new_tokens: int) -> None:
        """Give slots `start`, `start + 1`, … to new sequences and prefill their prompts."""
        slots_of: dict[tuple, list[int]] = {}
        for slot, s in enumerate(joining, start):
            slots_of.setdefault(s.prompt, []).append(slot)
        first_slots = [slots[0] for slots in slots_of.values()]
        for _ in self.prefill([prompt[:-1] for prompt in slots_of], first_slots):
            pass  # only the cache is needed, not the hidden states
        for prompt, slots in slots_of.items():
            span = slice(self.shared, len(prompt) - 1)
            own = self.kv[:, :, slots[0] : slots[0] + 1, :, span]
            self.kv[:, :, slots[0] + 1 : slots[-1] + 1, :, span] = own

        joined = slice(start, start + len(joining))
        self.token[joined] = torch.tensor([s.prompt[-1] for s in joining], device=self.device)
        self.length[joined] = torch.tensor([len(s.prompt) - 1 for s in joining], device=self.device)
        self.num_generated[joined] = 0
        self.alive[joined] = True
        keys, samples = [s.key for s in joining], [s.sample_index for s in joining]
        drawn = uniforms(seed, keys, samples, max_new_tokens)
        self.uniform[joined, :max_new_tokens] = drawn.to(self.device)

    # ------------------------------------------------------------------------- decoding

    def step(self, B: int, width: int, params: SamplingParams) -> None:
        """One token for each of the slots 0 … B-1, without waiting for the host."""
        token, length, alive = self.token[:B], self.length[:B], self.alive[:B]
        num_generated = self.num_generated[:B]
        attention, block_sums = self.kernels
        cached = self.kv, length, width
        view = CustomDecode(*cached, attention) if attention else Decode(*cached)
        hidden = self.model(token[:, None], positions=length[:, None], cache=view)
        column = num_generated[:, None]
        uniform = self.uniform[:B].gather(1, column)[:, 0]
        drawn, logprob = draw(self.model.logits(hidden[:, 0]), uniform, params, block_sums)
        self.ids[:B].scatter_(1, column, drawn[:, None])
        self.logprobs[:B].scatter_(1, column, logprob[:, None])
        token.copy_(drawn)
        length += alive
        num_generated += alive
        alive &= ~self.is_stop[drawn] & (num_generated < self.limit)

    def decode(self, count: int, width: int, params: SamplingParams) -> None:
        if self.device.type != "cuda":
            self.step(count, width, params)
            return
        # A graph replays fixed shapes, so B is rounded up and may include dead slots. A dead slot
        # writes one key and value at its own `length`. That is past the shared prefix:
        # every slot that holds one got a sequence at the start. The next sequence in the slot
        # overwrites the stray entry.
        B = min(self.slots, 1 << (count - 1).bit_length())
        if self.kernels.attention:  # it reads each sequence's length: `width` is a bound, 512 · 4^i
            width = max(512, 1 << ((width - 1).bit_length() | 1))
        width = min(self.padded_length, -(-width // 256) * 256)
        if (B, width, params) not in self.graphs:
            self.graphs[B, width, params] = self.capture(B, width, params)
        self.graphs[B, width, params].replay()

    def capture(self, B: int, width: int, params: SamplingParams) -> "torch.cuda.CUDAGraph":
        before = [t.clone() for t in self.state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries initialise themselves outside the capture
            for _ in range(2):
                self.step(B, width, params)
        torch.cuda.current_stream().wait_stream(side)
        for t, old in zip(self.state, before, strict=True):
            t.copy_(old)  # the warm-up's rows in the cache are overwritten
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        # Another thread, which writes a checkpoint, may synchronise during the capture.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.step(B, width, params)
        return graph

    def collect_finished(self, active: list[UnfinishedSample], samples: list[list]) -> list:
        """Take out the sequences that ended, close the gaps, return those that go on."""
        alive = self.alive[: len(active)].tolist()
        ended = [i for i, lives in enumerate(alive) if not lives]
        if not ended:
            return active
        index = torch.tensor(ended, device=self.device)
        counts = self.num_generated[index].tolist()
        ids = self.ids[index, : max(counts)].tolist()
        logprobs = self.logprobs[index, : max(counts)].tolist()
        for i, count, row_ids, row_logprobs in zip(ended, counts, ids, logprobs, strict=True):
            s, drawn = active[i], Sample(row_ids[:count], row_logprobs[:count], False)
            if not all(map(math.isfinite, drawn.logprobs)):
                self.kv.zero_()  # 0 × NaN is NaN: masked positions would spoil all later calls
                where = f"prompt {s.prompt_index}, sample {s.sample_index}"
                raise FloatingPointError(f"{where}: the model's logits are not finite")
            stopped = drawn.ids[-1] in self.stops
            samples[s.prompt_index][s.sample_index] = drawn._replace(stopped=stopped)

        rest = [i for i, lives in enumerate(alive) if lives]
        holes = [i for i in range(len(rest)) if not alive[i]]
        movers = rest[len(rest) - len(holes) :]
        if holes:
            width = max(len(active[i].prompt) + active[i].num_steps for i in movers)
            span = slice(self.shared, width)
            self.kv[:, :, holes, :, span] = self.kv[:, :, movers, :, span]
            for state in self.state:
                state[holes] = state[movers]
            self.alive[movers] = False
        for hole, mover in zip(holes, movers, strict=True):
            active[hole] = active[mover]
        return active[: len(rest)]

    # ------------------------------------------------------------------------- scoring

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Ids], continuations: Sequence[Ids], temperature: float = 1.0
    ) -> list[Tensor]:
        """Log-probs of the tokens of each continuation after its prompt, on the device, in
        `logit_dtype`."""
        prompts, continuations = to_tuples(prompts), to_tuples(continuations)
        self.check_sequences(prompts, "prompt")
        whole = [p + c for p, c in zip(prompts, continuations, strict=True)]
        self.check_sequences(whole, "prompt and continuation")
        tokens = [torch.tensor(c, dtype=torch.int64)[:, None] for c in continuations]
        scores = self.logprobs_of(prompts, [w[:-1] for w in whole], tokens, temperature)
        return [score[:, 0] for score in scores]

    @torch.no_grad()
    def next_logprobs(
        self, prompts: Sequence[Ids], token_ids: Ids, temperature: float = 1.0
    ) -> Tensor:
        """(len(prompts), len(token_ids)): log-probs of these tokens right after each prompt,
        normalised over the whole vocabulary."""
        prompts, [token_ids] = to_tuples(prompts), to_tuples([token_ids])
        self.check_vocabulary(token_ids, "token_ids")
        self.check_sequences(prompts, "prompt")
        tokens = [torch.tensor([token_ids], dtype=torch.int64)] * len(prompts)
        rows = self.logprobs_of(prompts, prompts, tokens, temperature)
        empty = torch.zeros(0, len(token_ids), dtype=self.logit_dtype, device=self.device)
        return torch.cat([empty, *rows])

    def logprobs_of(
        self, prompts: list, sequences: list, tokens: list[Tensor], temperature: float
    ) -> list[Tensor]:
        """Log-probs of the ids tokens[i] (rows, k): the last token of prompt i, which sequence i
        begins with, predicts row 0, the token after it row 1."""
        self.share_prefix(prompts, 1)
        empty = torch.zeros(0, 1, dtype=self.logit_dtype, device=self.device)
        results = [empty] * len(tokens)  # of empty continuations; the others follow
        for batch, hidden in self.prefill(sequences):
            sizes = [len(tokens[i]) for i in batch]
            starts = [len(prompts[i]) - 1 - self.shared for i in batch]
            rows = zip(hidden, starts, sizes, strict=True)
            hidden = torch.cat([h[start : start + size] for h, start, size in rows])
            targets = torch.cat([tokens[i] for i in batch]).to(self.device)
            parts, n = [], self.logit_rows
            for h, column in zip(hidden.split(n), targets.split(n), strict=True):
                logits = self.model.logits(h) / temperature
                parts.append(logits.gather(1, column) - logits.logsumexp(-1, keepdim=True))
            logprobs = torch.cat(parts)
            if logprobs.isnan().any():
                self.kv.zero_()
                raise FloatingPointError("the model's logits are not finite")
            for i, part in zip(batch, logprobs.split(sizes), strict=True):
                results[i] = part
        return results


def to_tuples(sequences: Sequence[Ids]) -> list[tuple[int, ...]]:
    """Lists, tuples, arrays or tensors of ids -> tuples of int, which compare and hash by value."""
    return [tuple(map(int, ids)) for ids in sequences]


def common_prefix(prompts: Sequence[Ids]) -> int:
    """How many tokens all prompts begin with, leaving each at least its last one."""
    if not prompts:
        return 0
    # The first and the last in lexicographic order share exactly what all share.
    smallest, largest = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if smallest[i] != largest[i]), limit)
