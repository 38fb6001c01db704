import math
from unittest import mock

import numpy
import pytest
import torch

import model as ours
from kernels.decode import decode_attention
from sampler import (
    Kernels,
    Sampler,
    SamplingParams,
    block_sums_torch,
    common_prefix,
    draw,
    uniforms,
)
from tests.tiny import make_model

VOCAB = 99
STOPS = [1, 7, 30, 61]


def some_prompts(count, shortest=3, longest=24, begin=()):
    random = torch.Generator().manual_seed(3)
    sizes = torch.randint(shortest, longest + 1, (count,), generator=random).tolist()
    return [[*begin, *torch.randint(VOCAB, (n,), generator=random).tolist()] for n in sizes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder, "qwen2", kv_heads=2)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return ours.load(folder)


@pytest.fixture(scope="module")
def exact_model(folder):
    """In float64 a batch of 3 and one of 16 agree to 1e-15, so no draw can lie on an edge."""
    return ours.load(folder, dtype=torch.float64)


@torch.no_grad()
def forward_logprobs(model, prompt, ids, temperature=1.0):
    """The reference: one full forward of one sequence, log-softmax over the whole vocabulary."""
    hidden = model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
    logprobs = (model.logits(hidden) / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0]


class Counted:
    """A model that notes the shape of every call."""

    def __init__(self, model):
        self.model, self.config, self.calls = model, model.config, []
        self.parameters, self.logits = model.parameters, model.logits

    def __call__(self, ids, positions, cache):
        self.calls.append((type(cache).__name__, tuple(ids.shape)))
        return self.model(ids, positions=positions, cache=cache)

    def tokens(self, kind):
        return sum(rows * columns for name, (rows, columns) in self.calls if name == kind)


# -------------------------------------------------------------------------- correctness


@pytest.mark.parametrize(
    ("family", "kv_heads", "head_dim"),
    [("qwen2", 2, 8), ("qwen2", 1, 24), ("qwen3", 4, 24), ("llama3", 2, 16)],
)
def test_greedy_equals_transformers_token_for_token(tmp_path, family, kv_heads, head_dim):
    theirs = make_model(tmp_path, family, kv_heads=kv_heads, head_dim=head_dim)
    prompts = some_prompts(16)
    stops = list(range(0, VOCAB, 4))
    sampler = Sampler(ours.load(tmp_path), slots=5, max_length=64)
    mine = sampler.generate(prompts, 1, 40, temperature=0, stop_ids=stops)

    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = {"do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
    drawn = theirs.generate(padded, attention_mask=mask, max_new_tokens=40, **options)
    drawn = drawn[:, width:].tolist()
    ends = [next((i + 1 for i, x in enumerate(row) if x in stops), len(row)) for row in drawn]
    assert min(ends) < 10 and len(set(ends)) > 3  # early stops, ragged
    want = [row[:end] for row, end in zip(drawn, ends, strict=True)]
    assert [group[0].ids for group in mine] == want


@pytest.mark.parametrize("begin", [(), (4, 5, 6, 4)])
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_logprobs_and_scores_of_samples_equal_a_full_forward(model, begin, temperature):
    """Greedy log-probs are the model's own, at temperature 1."""
    prompts = some_prompts(6, begin=begin)
    sampler = Sampler(model, 7, 64)
    sampler.prefill_tokens, sampler.logit_rows = 60, 3  # several batches, several chunks
    groups = sampler.generate(prompts, 2, 20, temperature, stop_ids=STOPS, seed=5)
    pairs = [(p, sample) for p, group in zip(prompts, groups, strict=True) for sample in group]
    continuations = [sample.ids for _, sample in pairs]
    scores = sampler.score([p for p, _ in pairs], continuations, temperature or 1)
    for (prompt, sample), score in zip(pairs, scores, strict=True):
        want = forward_logprobs(model, prompt, sample.ids, temperature or 1)
        torch.testing.assert_close(torch.tensor(sample.logprobs), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(score, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("begin", [(), (4, 5, 6)])
def test_bf16_samples_agree_with_a_full_forward(folder, begin):
    """Below fp32, decoding uses the fused attention, as every GPU run does."""
    model = ours.load(folder, dtype=torch.bfloat16)
    prompts = some_prompts(6, begin=begin)
    groups = Sampler(model, 7, 64).generate(prompts, 4, 30, stop_ids=STOPS, seed=5)
    gaps = [
        (torch.tensor(sample.logprobs) - forward_logprobs(model, prompt, sample.ids)).abs()
        for prompt, group in zip(prompts, groups, strict=True)
        for sample in group
    ]
    assert torch.cat(gaps).max() < 0.06 and torch.cat(gaps).mean() < 0.01


def test_truncated_logprobs_are_renormalised(model):
    prompt = some_prompts(1)[0]
    sampler = Sampler(model, 8, 64)
    hidden = model(torch.tensor([prompt]))[0, -1]
    share = model.logits(hidden).div(0.8).softmax(-1)
    ordered = share.sort(descending=True)
    beyond = (ordered.values.cumsum(0) < 0.5).sum() + 1  # the smallest set that reaches 0.5
    for params, count in (({"top_k": 5}, 5), ({"top_p": 0.5}, int(beyond))):
        kept, mass = set(ordered.indices[:count].tolist()), ordered.values[:count].sum()
        drawn = set()
        for (sample,) in sampler.generate([prompt] * 200, 1, 1, temperature=0.8, **params):
            drawn.add(sample.ids[0])
            want = (share[sample.ids[0]] / mass).log().item()
            assert sample.logprobs[0] == pytest.approx(want, abs=1e-5)
        assert drawn <= kept and len(drawn) > 1


def test_stop_token_is_part_of_the_sample(model):
    sampler = Sampler(model, 8, 64)
    groups = sampler.generate(some_prompts(8), 4, 20, stop_ids=STOPS)
    samples = [sample for group in groups for sample in group]
    assert {s.stopped for s in samples} == {True, False}
    for sample in samples:
        assert len(sample.ids) == len(sample.logprobs) <= 20
        assert not set(sample.ids[:-1]) & set(STOPS)
        assert sample.stopped == (sample.ids[-1] in STOPS)
        assert sample.stopped or len(sample.ids) == 20
    for (sample,) in sampler.generate(some_prompts(8), 1, 1, stop_ids=range(VOCAB)):
        assert sample.stopped and len(sample.ids) == 1  # a stop token at the limit
    assert all(len(s.ids) == 9 for s in sampler.generate([[1, 2]], 4, 9)[0])  # no stop remains


# -------------------------------------------------------------------------- keyed draws


@pytest.mark.parametrize(
    ("slots", "size", "every", "window"),
    [(2, 3, 1, 64), (8, 1, 1, 64), (8, 16, 16, 64), (100, 3, 1, 64), (5, 16, 16, 48)],
)
def test_samples_do_not_depend_on_batch_slots_or_order(exact_model, slots, size, every, window):
    """Nor on checks every 16 steps, as on a GPU: tokens past a stop are discarded, even where the
    window is full."""
    prompts = some_prompts(16, begin=(4, 5, 6))
    settings = {"n": 3, "max_new_tokens": 20, "stop_ids": STOPS, "seed": 9}
    want = Sampler(exact_model, 16, 64).generate(prompts, **settings)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    sampler = Sampler(exact_model, slots, window)
    sampler.check_every = every
    for start in range(0, 16, size):
        part = order[start : start + size]
        got = sampler.generate([prompts[i] for i in part], keys=part, **settings)
        for i, group in zip(part, got, strict=True):
            assert [s.ids for s in group] == [s.ids for s in want[i]]
            for one, other in zip(group, want[i], strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)


def test_kernels_replace_pytorch_and_give_the_same_samples(tmp_path):
    make_model(tmp_path, vocab=1003)
    model = ours.load(tmp_path, dtype=torch.float64)
    settings = {"n": 3, "max_new_tokens": 25, "stop_ids": range(1, 1003, 32), "seed": 5}
    prompts, results = some_prompts(7, begin=(4, 5)), []

    def blocks(model, x, rope, cache):
        for block in model.blocks:
            x = block(x, rope, None, cache)
        return model.norm(x)

    functions = [mock.Mock(wraps=f) for f in (blocks, decode_attention, block_sums_torch)]
    for model.decode_blocks, *kernels in ((None, None, None), functions):
        sampler = Sampler(model, 5, 64, kernels=Kernels(*kernels))
        results.append(sampler.generate(prompts, **settings))
    assert all(f.called for f in functions)
    for mine, theirs in zip(*results, strict=True):
        assert [x.ids for x in mine] == [x.ids for x in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-9)


def test_seed_key_and_sample_each_change_the_draw(model):
    prompt = some_prompts(1)[0]
    sampler = Sampler(model, 8, 64)
    draws = {
        tuple(sample.ids)
        for seed in (0, 1)
        for group in sampler.generate([prompt] * 4, 2, 12, seed=seed)
        for sample in group
    }
    assert len(draws) == 16
    (again,) = sampler.generate([prompt], 2, 12, seed=1, keys=[3])
    among = sampler.generate([prompt] * 4, 2, 12, seed=1)[3]
    assert [s.ids for s in again] == [s.ids for s in among]


def test_uniforms_are_splitmix64_of_the_key():
    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    got = uniforms(-5, [0, 2**64 - 1, 12345], [0, 7, 2], 4)
    for row, (key, sample) in enumerate([(0, 0), (2**64 - 1, 7), (12345, 2)]):
        for position in range(4):
            state = -5 % 2**64
            for word in (key, sample, position):
                state = mix(((state ^ mix((word + gamma) % 2**64)) + gamma) % 2**64)
            assert got[row, position].item() == (state >> 16) / 2**48


@pytest.mark.parametrize("vocab", [5, 1003, 4096])
def test_draws_follow_the_distribution(vocab):
    random = torch.Generator().manual_seed(vocab)
    logits = torch.randn(vocab, generator=random) * 2
    rows = 1000
    table = uniforms(3, range(rows), [0] * rows, 80)
    counts = torch.zeros(vocab)
    for column in table.T:
        tokens, logprobs = draw(logits.expand(rows, vocab), column, SamplingParams(1.3))
        counts += torch.bincount(tokens, minlength=vocab)
    want = (logits.double() / 1.3).softmax(0)
    torch.testing.assert_close(logprobs.double(), want[tokens].log(), atol=1e-5, rtol=0)
    expected = want * counts.sum()
    big = expected >= 5
    chi2 = ((counts - expected)[big] ** 2 / expected[big]).sum().item()
    freedom = int(big.sum()) - 1
    assert abs(chi2 - freedom) < 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("vocab", "block"), [(5, 1), (1003, 59), (4096, 512)])
def test_a_minus_infinity_logit_is_never_drawn(vocab, block):
    """Uniforms at the edges of blocks, where rounding would reach a banned first or last token."""
    random = torch.Generator().manual_seed(vocab)
    logits = torch.randn(1000, vocab, generator=random) * 20
    banned = torch.rand(1000, vocab, generator=random) < 0.5
    banned[:, [0, -1]], banned[:, 2] = True, False
    logits[banned] = -math.inf
    edges = logits.softmax(-1).view(1000, -1, block).sum(-1).double().cumsum(-1)
    edges = torch.cat((torch.zeros(1000, 1), edges / edges[:, -1:]), dim=1)
    for column in edges.T:
        for offset in (0, 1e-16, 3e-16, 2**-48):
            uniform = (column + offset).clamp(max=1 - 2**-48)
            tokens, logprobs = draw(logits, uniform, SamplingParams())
            assert not banned.gather(1, tokens[:, None]).any()
            assert logprobs.isfinite().all()


# -------------------------------------------------------------------------- no work twice


def test_each_distinct_prompt_and_the_shared_prefix_are_prefilled_once(model):
    counted = Counted(model)
    prompts = [[9, 8, 7, *p] for p in some_prompts(5, 6, 6)]
    Sampler(counted, 40, 64).generate([*prompts, prompts[2], prompts[0]], 4, 5)
    # 3 shared tokens; 5 x 6 of their own, the last of each fed by the first decoding step
    assert counted.tokens("Prefill") == 3 + 5 * 5
    assert counted.tokens("Decode") == 7 * 4 * 5


def test_cost_of_a_step_follows_the_active_sequences(model):
    counted = Counted(model)
    sampler = Sampler(counted, 8, 64)
    groups = sampler.generate(some_prompts(10), 4, 30, stop_ids=STOPS)
    assert not sampler.alive.any()  # a graph runs slots beyond the active ones: these are dead
    drawn = sum(len(s.ids) for group in groups for s in group)
    assert counted.tokens("Decode") == drawn
    assert drawn < 10 * 4 * 30 * 0.8  # some stopped early, and their slots went to others
    full = [rows for kind, (rows, _) in counted.calls if kind == "Decode" and rows == 8]
    assert len(full) > drawn / 8 * 0.6


# -------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("begin", [(), (4, 5, 6, 4)])
def test_next_logprobs_equal_a_full_forward(model, begin):
    prompts = some_prompts(9, 1, 20, begin)
    tokens = [5, 0, 98]
    got = Sampler(model, 4, 64).next_logprobs(prompts, tokens)
    for row, prompt in zip(got, prompts, strict=True):
        want = torch.cat([forward_logprobs(model, prompt, [t]) for t in tokens])
        torch.testing.assert_close(row, want, atol=1e-5, rtol=0)


def test_ids_may_be_arrays_or_tensors(model):
    sampler, prompts = Sampler(model, 4, 64), some_prompts(3, 5, 5)
    for kind in (torch.tensor, numpy.array):
        settings = {"stop_ids": kind(STOPS), "keys": kind([4, 5, 6]), "seed": numpy.int64(3)}
        got = sampler.generate(kind(prompts), 2, 9, **settings)
        assert got == sampler.generate(prompts, 2, 9, stop_ids=STOPS, keys=[4, 5, 6], seed=3)
        assert sampler.next_logprobs(kind(prompts), kind(STOPS)).shape == (3, 4)


def test_other_and_interrupted_calls_leave_no_trace(exact_model):
    sampler, shares = Sampler(exact_model, 6, 64), []
    prompts, other = some_prompts(5, begin=(3, 3)), some_prompts(4, begin=(8, 8, 8))
    settings = {"n": 2, "max_new_tokens": 15, "stop_ids": STOPS}
    want = sampler.generate(prompts, **settings)
    sampler.score(other, prompts[:4])
    sampler.next_logprobs(other, [1, 2])

    def interrupt(share):
        shares.append(share)
        if share > 0.5:
            raise KeyboardInterrupt

    sampler.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        sampler.generate(other, 3, 30, temperature=0.5, seed=3)
    sampler.progress = shares.append
    assert sampler.generate(prompts, **settings) == want
    rising = shares[-3:]
    assert shares[0] > 0 and rising == sorted(rising) and rising[-1] == 1


def test_common_prefix_leaves_each_its_last_token():
    assert common_prefix([]) == 0
    assert common_prefix([[1, 2, 3]]) == 2
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9]]) == 2
    assert common_prefix([[1, 2], [2, 1]]) == 0
    assert common_prefix([[1], [1, 2]]) == 0


def test_nothing_to_do(model):
    sampler = Sampler(model, 2, 32)
    assert sampler.generate([], 4) == []
    assert sampler.score([], []) == []
    assert [len(x) for x in sampler.score([[1, 2, 3], [4, 5, 6], [8]], [[], [], [3]])] == [0, 0, 1]
    assert sampler.next_logprobs([], [1]).shape == (0, 1)


# -------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1] * 25]}, "prompt 0 has 25 tokens and 8 are to come.*window is 32"),
        ({"prompts": [[1, 99]]}, "prompt 0 .* outside the vocabulary of 99"),
        ({"stop_ids": [-1]}, "stop_ids .* outside the vocabulary of 99"),
        ({"keys": [1, 2]}, "1 prompts, but 2 keys"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: .* at least 1 token"),
        ({"temperature": math.nan}, "temperature=nan, .* temperature of 0 or"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_bad_arguments_are_named(model, arguments, match):
    sampler = Sampler(model, 2, 32)
    with pytest.raises(ValueError, match=match):
        sampler.generate(**{"prompts": [[1, 2, 3]], "max_new_tokens": 8, **arguments})


def test_bad_samplers_and_scores_are_refused(model):
    with pytest.raises(ValueError, match="slots=0"):
        Sampler(model, 0, 32)
    with pytest.raises(ValueError, match="max_length=513 in 2"):
        Sampler(model, 1, 513)
    sampler = Sampler(model, 2, 32)
    with pytest.raises(ValueError, match="prompt and continuation 0 has 40 tokens"):
        sampler.score([[1] * 20], [[1] * 20])


def test_logits_that_are_not_finite_are_an_error(folder):
    model = ours.load(folder)
    sampler = Sampler(model, 2, 32)
    ragged = [[1, 2], [3, 4, 5, 6, 7, 8]]
    want = sampler.generate(ragged, 1, 9)
    weight = model.blocks[0].attention_norm.weight.requires_grad_(False)
    old = weight[3].item()
    weight[3] = math.nan
    with pytest.raises(FloatingPointError, match=r"prompt 0, sample \d: .* not finite"):
        sampler.generate([[1, 2, 3, 4, 5]], 2, 20)
    assert sampler.kv.isfinite().all()
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler.score([[1, 2]], [[3]])
    weight[3] = old
    assert sampler.generate(ragged, 1, 9) == want  # nothing of it lingers in the cache
