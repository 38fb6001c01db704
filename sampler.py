"""The sampler: many continuations of many prompts from one model, with a hand-written KV cache.

    sampler = Sampler(model, slots=64, max_length=512)
    groups = sampler.generate(prompts, n=8, max_new_tokens=64, stop_ids=[eos], seed=1)
    groups[2][5].ids, .logprobs, .stopped          # the sixth sample of the third prompt
    sampler.score(prompts, continuations)          # log-probs of given continuations
    sampler.next_logprobs(prompts, token_ids)      # how likely a few tokens are to come next

    python sampler.py --model DIR_OR_ID --prompt "…" -n 4

How it works. The cache has `slots`, each with room for one sequence. What all prompts of a call
begin with (an instruction, a judge's template) is computed once and copied to every slot in use;
each distinct prompt is then prefilled once, in the slot of its first sample, and copied to its
siblings' slots. All but its last token, that is: that one is what the first decoding step is fed,
so every token is drawn in one place, `step`. A step decodes one token for each live sequence:

    slot 0   | shared prefix | prompt A | drawn …        live: slots 0 … B-1
    slot 1   | shared prefix | prompt A | drawn
    slot 2   | shared prefix | prompt B | drawn ………
    slot 3   | shared prefix |                           free

When one ends, the last live one moves into its slot and waiting ones join at the end, so a step's
work follows the sequences that live. Siblings that do not fit wait, their prompt's rows `kept`.

What it asks of a model: `model(ids, positions, cache=view) -> hidden`, from (B, T) to (B, T, D),
where attention layer 0, 1, … calls `view.attend(layer, q, k, v) -> y`: q and y are (B, T, H, E), k
and v (B, T, K, E), positions already in q and k, the products scaled by E^-½; `model.logits` from
(M, D) to (M, V) in fp32; `model.parameters()`; and `model.config` with layers, kv_heads, head_dim,
max_length, vocab_size. Where it computes in another type than its weights have, that is
`model.compute_dtype`. On a GPU its forward may not wait for the host. `generate` calls it in
inference mode: a tensor that it makes there, and keeps, cannot be trained through later.

Given its logits, a draw depends on (seed, key, number of the sample, number of the token) alone.
Keys default to the prompts' places in the call; give `keys` to make samples independent of what
else is asked, in which order, by how many ranks. The logits of a batch of 3 and of 16 still differ
in the last bits, so a draw on the very edge of another token's share can flip, and what follows
with it: very rarely in fp32, more often in bf16. For the same reason `score` finds the log-probs of
`generate` again but for rounding.

Letters: B sequences in a step, T tokens, D width, H query heads, K key/value heads, E size of a
head, V vocabulary, S slots, L room of a slot.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Ids = Sequence[int]


class Sample(NamedTuple):
    ids: list[int]
    """The drawn tokens; a stop token that ended them is the last."""
    logprobs: list[float]
    """Of each token, under the distribution it was drawn from (temperature, top-k and top-p
    included); at temperature 0 under the model's own, untruncated, at temperature 1."""
    stopped: bool
    """True: ended with a stop token. False: cut at max_new_tokens."""


class Rules(NamedTuple):
    """How a token is drawn from logits."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(eq=False)
class Draft:
    """One sample in the making."""

    prompt: tuple[int, ...]
    place: int  # of the prompt in the call
    sample: int
    key: int
    made: int = 0  # tokens drawn; too high for one that ended since the last look


# ------------------------------------------------------------------------------------ the cache


class Prefill:
    """The cache as B prompts see it, padded on the right: a causal token never looks there.

    `kv` is (layers, 2, S, K, L, E). Positions before `shared` are in slot 0 (and in the others that
    will be used). The rest goes to `slots` (None: nowhere, the hidden states are all that is
    wanted), padding too: decoding hides it until it is overwritten.
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
        # A mask and grouped heads together have no fast kernel: the groups become query tokens,
        # all T of one head, then of the next.
        q = q.reshape(B, K, H // K * T, E)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return y.view(B, H, T, E).transpose(1, 2)


class Decode:
    """For decoding: one new token for each of the sequences in slots 0 … B-1.

    `lengths` (B,) tokens are cached before it; only the first `width` positions are looked at.
    """

    def __init__(self, kv: Tensor, lengths: Tensor, width: int):
        self.kv, self.width = kv, width
        _, _, _, K, L, _ = kv.shape
        B = lengths.shape[0]
        first = torch.arange(0, B * K * L, L, device=kv.device).view(B, K)
        self.places = (first + lengths[:, None]).flatten()  # (B·K,) among a layer's S·K·L
        unseen = torch.arange(width, device=kv.device) > lengths[:, None]
        bias = torch.zeros(unseen.shape, dtype=kv.dtype, device=kv.device)
        bias = bias.masked_fill_(unseen, -math.inf)[:, None]  # (B, 1, width)
        # Plain products are three times as fast on a CPU; in bf16 they would round the scores.
        self.plain = kv.dtype in (torch.float32, torch.float64)
        self.bias = bias.repeat_interleave(K, dim=0) if self.plain else bias[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, _, H, E = q.shape
        K = k.shape[2]
        keys, values = self.kv[layer]
        keys.view(-1, E).index_copy_(0, self.places, k.reshape(B * K, E))
        values.view(-1, E).index_copy_(0, self.places, v.reshape(B * K, E))
        keys, values = keys[:B, :, : self.width], values[:B, :, : self.width]  # (B, K, width, E)
        # The H/K query heads of a key head become query tokens: no key needs repeating.
        if self.plain:
            keys, values = keys.flatten(0, 1), values.flatten(0, 1)
            q = q.reshape(B * K, H // K, E)
            scores = torch.baddbmm(self.bias, q, keys.transpose(1, 2), alpha=E**-0.5)
            y = torch.bmm(scores.softmax(-1), values)
        else:
            q = q.reshape(B, K, H // K, E)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.bias)
        return y.reshape(B, 1, H, E)


# ------------------------------------------------------------------------------------ the draws


def draw(logits: Tensor, uniform: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """logits (B, V), fp32 or float64, uniform (B,) in [0, 1) -> tokens (B,), their log-probs (B,).

    Inverse transform: the token is the first whose cumulated share passes `uniform`. One number a
    row instead of V makes the draw easy to key. Shares are cumulated in fp64, over blocks of tokens
    first and then inside the chosen block (fp64 over all of V would cost more than the softmax). A
    token of zero share is passed over by rule, whatever the rounding.
    """
    if rules.temperature == 0:
        token = logits.argmax(-1)
        logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        return token, logprob
    if rules.temperature != 1:
        logits = logits / rules.temperature
    logits = truncate(logits, rules)
    B, V = logits.shape
    share = logits.softmax(-1)
    if V <= 512:  # one block
        reached = share.double().cumsum(-1)
        token = first((reached > uniform[:, None] * reached[:, -1:]) & (share > 0))
        return token, share.gather(1, token[:, None])[:, 0].log()
    size = next(d for d in range(512, 0, -1) if V % d == 0)
    share = share.view(B, -1, size)
    mass = share.sum(-1)  # (B, V/size)
    edge = mass.double().cumsum(-1)
    target = uniform[:, None] * edge[:, -1:]
    block = first((edge > target) & (mass > 0))[:, None]
    inside = share.gather(1, block[..., None].expand(B, 1, size))[:, 0]  # (B, size)
    reached = inside.double().cumsum(-1)
    # A block's mass and the sum of its shares differ in rounding: stay below the last edge.
    rest = target - (edge - mass).gather(1, block)
    rest = torch.minimum(rest, reached[:, -1:] * (1 - 2**-48))
    token = block[:, 0] * size + first((reached > rest) & (inside > 0))
    logprob = share.view(B, V).gather(1, token[:, None])[:, 0].log()
    return token, logprob


def first(condition: Tensor) -> Tensor:
    """(B, M) -> (B,) index of the first true column."""
    return condition.to(torch.uint8).argmax(-1)


def truncate(logits: Tensor, rules: Rules) -> Tensor:
    if rules.top_k and rules.top_k < logits.shape[-1]:
        least = logits.topk(rules.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if rules.top_p < 1:  # the smallest set whose probability reaches top_p
        ordered, order = logits.sort(dim=-1, descending=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= rules.top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    return logits


def uniforms(seed: int, keys: Ids, samples: Ids, count: int) -> Tensor:
    """(B, count) numbers in [0, 1), a function of (seed, key, sample, position): splitmix64."""

    def mix(x: Tensor) -> Tensor:  # int64 wraps around; the masks make the shifts logical
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
        return x ^ ((x >> 31) & 0x1FFFFFFFF)

    def absorb(state: Tensor, word: Tensor) -> Tensor:
        return mix((state ^ mix(word - 0x61C8864680B583EB)) - 0x61C8864680B583EB)

    def words(values: Ids) -> Tensor:
        return torch.tensor([(int(v) + 2**63) % 2**64 - 2**63 for v in values])

    state = absorb(absorb(words([seed]), words(keys)), words(samples))[:, None]
    state = absorb(state, torch.arange(count))  # (B, count)
    return ((state >> 16) & (2**48 - 1)).double() * 2.0**-48


# ---------------------------------------------------------------------------------- the sampler


class Sampler:
    def __init__(self, model, slots: int, max_length: int, check_every: int | None = None):
        """Room for `slots` sequences of `max_length` tokens, prompt included.

        The cache takes 2 * layers * slots * kv_heads * max_length * head_dim numbers, and stays.
        Its type is that in which the model computes; a model that casts fp32 weights as it goes
        would do so at each token, so give the sampler a copy of it in that type.
        `check_every`: steps between two looks at which sequences have ended. A look is free on a
        CPU (1) and stalls a GPU (16); tokens past a stop are thrown away.
        """
        c = model.config
        if slots < 1 or (check_every is not None and check_every < 1):
            raise ValueError(f"slots={slots}, check_every={check_every}: at least 1 is needed")
        if not 2 <= max_length <= c.max_length:
            raise ValueError(
                f"max_length={max_length} must lie in 2 … {c.max_length}, the model's positions"
            )
        weight = next(model.parameters())
        self.model, self.slots, self.max_length = model, slots, max_length
        self.device = device = weight.device
        self.check_every = check_every or (16 if device.type == "cuda" else 1)
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            raise ValueError(f"model on {device}: call torch.cuda.set_device({device}) first")
        self.room = -(-max_length // 8) * 8  # fused attention wants multiples of 8
        shape = (c.layers, 2, slots, c.kv_heads, self.room, c.head_dim)
        self.kv = torch.zeros(shape, dtype=self.dtype, device=device)
        self.prefill_tokens = max(max_length, 8192)  # in one forward, padding included
        self.logit_rows = max(1, 2**26 // c.vocab_size)  # scoring: 256 MB of logits at once
        self.shared = 0  # how many positions all prompts of this call have in common
        self.kept: tuple | None = None  # (prompt, its rows) for siblings that wait
        self.stops: frozenset[int] = frozenset()
        # The state of each slot, and the call's settings, where a captured graph reads them.
        self.token = torch.zeros(slots, dtype=torch.int64, device=device)  # fed next
        self.length = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens in the cache
        self.made = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens drawn
        self.alive = torch.zeros(slots, dtype=torch.bool, device=device)
        # A slot is dead from its end to the next look; it still decodes, into the column behind.
        wide = (slots, max_length + 1)
        self.uniform = torch.zeros(wide, dtype=torch.float64, device=device)
        self.ids = torch.zeros(wide, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(wide, dtype=self.logit_dtype, device=device)
        self.state = (self.token, self.length, self.made, self.alive)
        self.state += (self.uniform, self.ids, self.logprobs)
        self.limit = torch.zeros((), dtype=torch.int64, device=device)
        self.is_stop = torch.zeros(c.vocab_size, dtype=torch.bool, device=device)
        self.progress: Callable[[float], None] | None = None
        """Called at each look with the share of the call that is done, 0 to 1."""
        self.graphs: dict = {}
        self.addresses: list[int] = []  # of the weights that the graphs read
        self.busy = False

    @property
    def dtype(self) -> torch.dtype:
        weight = next(self.model.parameters())
        return getattr(self.model, "compute_dtype", None) or weight.dtype

    @property
    def logit_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @torch.inference_mode()  # a tenth less to do for each operator than under no_grad
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
        watch: Callable[[int, int, list[int], bool], None] | None = None,
    ) -> list[list[Sample]]:
        """n samples of each prompt, in the order of `prompts`.

        `keys` (default 0, 1, 2, …) name the prompts for the draws: the same key and seed give the
        same samples in any call. `watch(prompt, sample, ids_so_far, ended)` is called for each live
        sequence at each look; it costs a copy from the device.
        """
        rules = Rules(temperature, top_k, top_p)
        if temperature != 0 and not 1e-4 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or at least 0.0001")
        if top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(f"top_k={top_k} must be 0 (off) or above, top_p={top_p} in (0, 1]")
        prompts, stop_ids = plain(prompts), plain([stop_ids])[0]
        keys = range(len(prompts)) if keys is None else plain([keys])[0]
        if n < 1 or max_new_tokens < 1 or len(keys) != len(prompts):
            raise ValueError(
                f"n={n} and max_new_tokens={max_new_tokens} must be at least 1, and keys "
                f"({len(keys)}) as many as prompts ({len(prompts)})"
            )
        self.check(prompts, "prompt", max_new_tokens)
        self.check_vocabulary(stop_ids, "stop_ids")
        self.begin(prompts, n, max_new_tokens, stop_ids)
        # Long prompts first, equal ones side by side: `admit` relies on siblings in a row.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        waiting = [Draft(prompts[i], i, j, keys[i]) for i in order for j in range(n)]
        waiting.reverse()
        samples: list[list] = [[None] * n for _ in prompts]
        live: list[Draft] = []
        self.busy = True
        try:
            while waiting or live:
                free = min(self.slots - len(live), len(waiting))
                # Prefill in batches: wait until an eighth of the slots is free.
                if free and (not live or free >= self.slots // 8 or free == len(waiting)):
                    joining = [waiting.pop() for _ in range(free)]
                    self.admit(joining, len(live), waiting, seed, max_new_tokens)
                    live += joining
                steps = min(self.check_every, max_new_tokens - min(d.made for d in live))
                width = max(len(d.prompt) + d.made for d in live)
                for i in range(steps):
                    self.decode(len(live), min(width + i, self.room), rules)
                for draft in live:
                    draft.made += steps
                live = self.collect(live, samples, watch)
                if self.progress:
                    total = n * len(prompts)
                    drawn = sum(d.made for d in live) / max_new_tokens
                    self.progress((total - len(waiting) - len(live) + drawn) / total)
        finally:
            self.busy = False
        return samples

    def begin(self, prompts: list, n: int, max_new_tokens: int, stop_ids: Ids) -> None:
        """Set the device's copy of the call's settings; all slots are free."""
        addresses = [p.data_ptr() for p in self.model.parameters()]
        if addresses != self.addresses or len(self.graphs) > 64:
            self.graphs.clear()  # somebody replaced the weights, or used many sets of rules
            self.addresses = addresses
        self.share_prefix(prompts, min(self.slots, n * len(prompts)))
        self.stops, self.kept = frozenset(stop_ids), None
        self.limit.fill_(max_new_tokens)
        self.is_stop.zero_()
        self.is_stop[torch.tensor(stop_ids, dtype=torch.int64, device=self.device)] = True
        self.alive.zero_()

    def check(self, sequences: Sequence[Ids], what: str, more: int = 0) -> None:
        """Raise on what no sampler could continue: never cut, never skipped."""
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
        if len(ids) and not 0 <= min(ids) <= max(ids) < size:
            bad = next(i for i in ids if not 0 <= i < size)
            raise ValueError(f"{what} holds the id {bad}, outside the vocabulary of {size}")

    # ------------------------------------------------------------------------- prompts

    def share_prefix(self, prompts: Sequence[Ids], copies: int) -> None:
        """Compute what all prompts begin with, and put it into the first `copies` slots."""
        if self.busy:
            raise RuntimeError("this sampler is in the middle of a call: `watch` may not use it")
        if self.kv.dtype != self.dtype:
            raise RuntimeError(
                f"the model computes in {self.dtype} now, the cache in {self.kv.dtype}: make a new "
                "Sampler"
            )
        shared, self.shared = common_prefix(prompts), 0
        if shared:
            for _ in self.prefill([prompts[0][:shared]], [0]):
                self.kv[:, :, 1:copies, :, :shared] = self.kv[:, :, :1, :, :shared]
        self.shared = shared

    def prefill(
        self, sequences: Sequence[Ids], slots: Ids | None = None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Run sequences past the shared prefix, in batches of less than half padding.

        Yields (which of the sequences, hidden (B, T, D) from position `shared` on).
        """
        todo = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        todo = [i for i in todo if len(sequences[i]) > self.shared]
        budget = self.prefill_tokens
        while todo:
            T = len(sequences[todo[0]]) - self.shared
            # The prefix is not computed again, but each sequence reads a copy of its keys: its
            # tokens count for an eighth.
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

    def admit(self, joining, start: int, waiting, seed: int, max_new_tokens: int) -> None:
        """Give slots `start`, `start + 1`, … to new sequences and prefill what is new of them."""
        slots_of: dict[tuple, list[int]] = {}
        for slot, s in enumerate(joining, start):
            slots_of.setdefault(s.prompt, []).append(slot)
        kept_prompt, kept = self.kept or (None, None)
        self.kept = None
        fresh = [p for p in slots_of if p != kept_prompt]
        for _ in self.prefill([p[:-1] for p in fresh], [slots_of[p][0] for p in fresh]):
            pass  # all that is wanted is in the cache
        for prompt, slots in slots_of.items():
            span = slice(self.shared, len(prompt) - 1)
            if prompt == kept_prompt:
                self.kv[:, :, slots[0] : slots[-1] + 1, :, span] = kept
            else:
                mine = self.kv[:, :, slots[0] : slots[0] + 1, :, span]
                self.kv[:, :, slots[0] + 1 : slots[-1] + 1, :, span] = mine
        # If the last group did not fit whole: keep its prompt for the siblings who wait.
        if waiting and waiting[-1].prompt == prompt:
            self.kept = prompt, self.kv[:, :, slots[0] : slots[0] + 1, :, span].clone()

        here = slice(start, start + len(joining))
        self.token[here] = torch.tensor([s.prompt[-1] for s in joining], device=self.device)
        self.length[here] = torch.tensor([len(s.prompt) - 1 for s in joining], device=self.device)
        self.made[here] = 0
        self.alive[here] = True
        draws = [s.key for s in joining], [s.sample for s in joining]
        self.uniform[here, :max_new_tokens] = uniforms(seed, *draws, max_new_tokens).to(self.device)

    # ------------------------------------------------------------------------- decoding

    def step(self, B: int, width: int, rules: Rules) -> None:
        """One token for each of the slots 0 … B-1, without waiting for the host."""
        token, length, made = self.token[:B], self.length[:B], self.made[:B]
        alive = self.alive[:B]
        view = Decode(self.kv, length, width)
        hidden = self.model(token[:, None], positions=length[:, None], cache=view)
        column = made[:, None]
        uniform = self.uniform[:B].gather(1, column)[:, 0]
        drawn, logprob = draw(self.model.logits(hidden[:, 0]), uniform, rules)
        self.ids[:B].scatter_(1, column, drawn[:, None])
        self.logprobs[:B].scatter_(1, column, logprob[:, None])
        token.copy_(drawn)
        length += alive
        made += alive
        alive &= ~self.is_stop[drawn] & (made < self.limit)

    def decode(self, count: int, width: int, rules: Rules) -> None:
        if self.device.type != "cuda":
            self.step(count, width, rules)
            return
        # A graph replays fixed shapes: round up. A slot beyond the live ones is dead, and writes at
        # its own `length`: past this call's prefix, as all slots that have one were filled when the
        # call began. Whoever joins there overwrites it.
        B = min(self.slots, 1 << (count - 1).bit_length())
        width = min(self.room, max(256, 1 << (width - 1).bit_length()))
        if (B, width, rules) not in self.graphs:
            self.graphs[B, width, rules] = self.capture(B, width, rules)
        self.graphs[B, width, rules].replay()

    def capture(self, B: int, width: int, rules: Rules) -> "torch.cuda.CUDAGraph":
        before = [t.clone() for t in self.state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up outside the capture
            for _ in range(2):
                self.step(B, width, rules)
        torch.cuda.current_stream().wait_stream(side)
        for t, old in zip(
            self.state, before, strict=True
        ):  # what the warm-up cached is written again
            t.copy_(old)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self.step(B, width, rules)
        return graph

    def collect(self, live: list[Draft], samples: list[list], watch) -> list[Draft]:
        """Take out the sequences that ended, close the gaps, return those that live on."""
        B = len(live)
        alive = self.alive[:B].tolist()
        seen = [i for i in range(B) if watch or not alive[i]]
        if not seen:
            return live
        index = torch.tensor(seen, device=self.device)
        made = self.made[index].tolist()
        ids = self.ids[index, : max(made)].tolist()
        logprobs = self.logprobs[index, : max(made)].tolist()
        for row, i in enumerate(seen):
            draft, drawn, their = live[i], ids[row][: made[row]], logprobs[row][: made[row]]
            if not all(map(math.isfinite, their)):
                self.kv.zero_()  # 0 × NaN is NaN: what is masked would spoil all later calls
                where = f"prompt {draft.place}, sample {draft.sample}"
                raise FloatingPointError(f"{where}: the model's logits are not finite")
            if not alive[i]:
                samples[draft.place][draft.sample] = Sample(drawn, their, drawn[-1] in self.stops)
            if watch:
                watch(draft.place, draft.sample, drawn, not alive[i])

        rest = [i for i in range(B) if alive[i]]
        holes = [i for i in range(len(rest)) if not alive[i]]
        movers = rest[len(rest) - len(holes) :]
        if holes:
            width = max(len(live[i].prompt) + live[i].made for i in movers)
            span = slice(self.shared, width)
            self.kv[:, :, holes, :, span] = self.kv[:, :, movers, :, span]
            for state in self.state:
                state[holes] = state[movers]
            self.alive[movers] = False
        for hole, mover in zip(holes, movers, strict=True):
            live[hole] = live[mover]
        return live[: len(rest)]

    # ------------------------------------------------------------------------- reading

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Ids], continuations: Sequence[Ids], temperature: float = 1.0
    ) -> list[Tensor]:
        """Log-probs of the tokens of each continuation after its prompt, on the device; in fp32, or
        in float64 if the model computes in that."""
        prompts, continuations = plain(prompts), plain(continuations)
        if len(prompts) != len(continuations):
            raise ValueError(f"{len(prompts)} prompts, but {len(continuations)} continuations")
        self.check(prompts, "prompt")
        whole = [p + c for p, c in zip(prompts, continuations, strict=True)]
        self.check(whole, "prompt and continuation")
        self.share_prefix(prompts, 1)
        columns = [torch.tensor(c, dtype=torch.int64)[:, None] for c in continuations]
        starts = [len(p) - 1 for p in prompts]
        return [s[:, 0] for s in self.read([w[:-1] for w in whole], starts, columns, temperature)]

    @torch.no_grad()
    def next_logprobs(
        self, prompts: Sequence[Ids], token_ids: Ids, temperature: float = 1.0
    ) -> Tensor:
        """(len(prompts), len(token_ids)): log-probs of these tokens right after each prompt.

        Normalised over the whole vocabulary.
        """
        prompts, token_ids = plain(prompts), plain([token_ids])[0]
        self.check(prompts, "prompt")
        self.check_vocabulary(token_ids, "token_ids")
        distinct = list(dict.fromkeys(prompts))
        self.share_prefix(distinct, 1)
        columns = [torch.tensor([token_ids], dtype=torch.int64)] * len(distinct)
        rows = self.read(distinct, [len(p) - 1 for p in distinct], columns, temperature)
        answers = dict(zip(distinct, rows, strict=True))
        empty = torch.zeros(0, len(token_ids), dtype=self.logit_dtype, device=self.device)
        return torch.cat([empty, *(answers[p] for p in prompts)])

    def read(
        self, sequences: list, starts: Ids, columns: list[Tensor], temperature: float
    ) -> list[Tensor]:
        """Log-probs of the tokens columns[i] (rows, k): row r asks about what follows position
        starts[i] + r of sequence i."""
        if not temperature >= 1e-4:
            raise ValueError(f"temperature={temperature} must be at least 0.0001")
        like = {"dtype": self.logit_dtype, "device": self.device}
        answers = [torch.zeros(c.shape, **like) for c in columns]
        for batch, hidden in self.prefill(sequences):
            starts_here = [starts[i] - self.shared for i in batch]
            sizes = [len(columns[i]) for i in batch]
            rows = zip(hidden, starts_here, sizes, strict=True)
            hidden = torch.cat([h[start : start + size] for h, start, size in rows])
            wanted = torch.cat([columns[i] for i in batch]).to(self.device)
            parts = [torch.zeros(0, wanted.shape[1], **like)]
            for start in range(0, len(hidden), self.logit_rows):
                part = slice(start, start + self.logit_rows)
                h, column = hidden[part], wanted[part]
                logits = self.model.logits(h) / temperature
                parts.append(logits.gather(1, column) - logits.logsumexp(-1, keepdim=True))
            found = torch.cat(parts)
            if found.isnan().any():
                self.kv.zero_()
                raise FloatingPointError("the model's logits are not finite")
            for i, part in zip(batch, found.split(sizes), strict=True):
                answers[i] = part
        return answers


def plain(sequences: Sequence[Ids]) -> list[tuple[int, ...]]:
    """Lists, tuples, arrays or tensors of ids -> tuples of int, which compare and hash as such."""
    return [tuple(map(int, ids)) for ids in sequences]


def common_prefix(prompts: Sequence[Ids]) -> int:
    """How many tokens all prompts begin with, leaving each at least its last one."""
    if not prompts:
        return 0
    # The first and the last in dictionary order share just what all share.
    smallest, largest = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if smallest[i] != largest[i]), most)


# ------------------------------------------------------------------------------ the command line


def main() -> None:
    import argparse
    import sys

    from transformers import AutoTokenizer, GenerationConfig

    from model import find_folder, load

    parser = argparse.ArgumentParser(description="Stream samples of a prompt; print tokens/s.")
    option = parser.add_argument
    option("--model", required=True, help="a Hugging Face folder, or a hub id")
    option("--prompt", required=True)
    option("-n", type=int, default=1, help="samples (default 1)")
    option("--max-new-tokens", type=int, help="default: 128, or what the model has room for")
    option("--temperature", type=float, default=1.0, help="0: greedy")
    option("--top-k", type=int, default=0, help="0: off")
    option("--top-p", type=float, default=1.0)
    option("--seed", type=int, default=0)
    option("--chat", action="store_true", help="use the tokenizer's chat template")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    option("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    args = parser.parse_args()
    texts, counts, shown = [""] * max(args.n, 1), [0] * max(args.n, 1), 0
    start = time.perf_counter()

    def watch(_: int, sample: int, ids: list[int], ended: bool) -> None:
        """The first sample streams; the others are printed at the end."""
        nonlocal shown
        texts[sample] = tokenizer.decode(ids, skip_special_tokens=True)
        counts[sample] = len(ids)
        if sample == 0:
            ready = texts[0] if ended else texts[0].rstrip("\ufffd")  # half a character waits
            print(ready[shown:], end="", flush=True)
            shown = len(ready)

    try:
        folder = find_folder(args.model)
        dtype = getattr(torch, args.dtype) if args.dtype else None
        model = load(folder, dtype=dtype, device=args.device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = args.prompt
        if args.chat:
            turn = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=not args.chat).input_ids
        stops = {tokenizer.eos_token_id}
        if (folder / "generation_config.json").is_file():
            more = GenerationConfig.from_pretrained(folder).eos_token_id
            stops |= set(more if isinstance(more, list) else [more])
        room = model.config.max_length - len(prompt)
        new = min(128, room) if args.max_new_tokens is None else args.max_new_tokens
        if not 0 < new <= room:
            raise ValueError(
                f"a prompt of {len(prompt)} and --max-new-tokens {new}: the model has "
                f"{model.config.max_length} positions"
            )
        rules = new, args.temperature, args.top_k, args.top_p
        sampler = Sampler(model, slots=args.n, max_length=len(prompt) + new)
        start = time.perf_counter()
        print("[1] ", end="")
        sampler.generate([prompt], args.n, *rules, stops - {None}, args.seed, watch=watch)
    except KeyboardInterrupt:
        print(" … stopped", end="")
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"sampler.py: {error}")
    seconds = time.perf_counter() - start
    print("".join(f"\n[{i}] {text}" for i, text in enumerate(texts[1:], 2)))
    print(f"{sum(counts)} tokens in {seconds:.2f} s: {sum(counts) / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
