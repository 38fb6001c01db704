import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import model as ours
from sampler import Rules, Sampler, common_prefix, draw, uniforms
from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parent.parent
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


# ------------------------------------------------------------------------------ right


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
    drawn = theirs.generate(
        input_ids=padded,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=stops,
        pad_token_id=0,
    )[:, width:].tolist()
    ends = [
        next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in drawn
    ]
    assert min(ends) < 10 and len(set(ends)) > 3  # early stops, ragged
    assert [group[0].ids for group in mine] == [
        row[:end] for row, end in zip(drawn, ends, strict=True)
    ]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampled_logprobs_equal_a_full_forward(model, temperature):
    prompts = some_prompts(6)
    groups = Sampler(model, 7, 64).generate(prompts, 4, 30, temperature, stop_ids=STOPS, seed=5)
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            want = forward_logprobs(model, prompt, sample.ids, temperature)
            got = torch.tensor(sample.logprobs)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("begin", [(), (4, 5, 6)])
def test_bf16_samples_agree_with_a_full_forward(folder, begin):
    """Below fp32 decoding takes the fused attention, the way of every GPU run."""
    model = ours.load(folder, dtype=torch.bfloat16)
    prompts = some_prompts(6, begin=begin)
    groups = Sampler(model, 7, 64).generate(prompts, 4, 30, stop_ids=STOPS, seed=5)
    gaps = [
        (torch.tensor(sample.logprobs) - forward_logprobs(model, prompt, sample.ids)).abs()
        for prompt, group in zip(prompts, groups, strict=True)
        for sample in group
    ]
    assert torch.cat(gaps).max() < 0.06 and torch.cat(gaps).mean() < 0.01


def test_greedy_logprobs_are_the_models_own(model):
    prompts = some_prompts(3)
    for prompt, (sample,) in zip(
        prompts, Sampler(model, 2, 64).generate(prompts, 1, 20, temperature=0), strict=True
    ):
        want = forward_logprobs(model, prompt, sample.ids)
        torch.testing.assert_close(torch.tensor(sample.logprobs), want, atol=1e-5, rtol=0)


def test_truncated_logprobs_are_renormalised(model):
    """top-k and top-p leave a smaller distribution: its log-probs, not the whole one's."""
    prompt = some_prompts(1)[0]
    sampler = Sampler(model, 8, 64)
    hidden = model(torch.tensor([prompt]))[0, -1]
    share = model.logits(hidden).div(0.8).softmax(-1)
    ordered = share.sort(descending=True)
    beyond = (ordered.values.cumsum(0) < 0.5).sum() + 1  # the smallest set that reaches 0.5
    for rules, keep in (({"top_k": 5}, 5), ({"top_p": 0.5}, int(beyond))):
        kept = set(ordered.indices[:keep].tolist())
        mass = ordered.values[:keep].sum()
        drawn = set()
        for (sample,) in sampler.generate([prompt] * 200, 1, 1, temperature=0.8, **rules):
            drawn.add(sample.ids[0])
            want = (share[sample.ids[0]] / mass).log().item()
            assert sample.logprobs[0] == pytest.approx(want, abs=1e-5)
        assert drawn <= kept and len(drawn) > 1


def test_stop_token_is_part_of_the_sample(model):
    groups = Sampler(model, 8, 64).generate(some_prompts(8), 8, 30, stop_ids=STOPS)
    samples = [sample for group in groups for sample in group]
    assert {s.stopped for s in samples} == {True, False}
    for sample in samples:
        assert len(sample.ids) == len(sample.logprobs) <= 30
        assert not set(sample.ids[:-1]) & set(STOPS)
        assert sample.stopped == (sample.ids[-1] in STOPS)
        assert sample.stopped or len(sample.ids) == 30


def test_a_stop_at_the_limit_counts_as_stopped(model):
    for (sample,) in Sampler(model, 8, 64).generate(some_prompts(8), 1, 1, stop_ids=range(VOCAB)):
        assert sample.stopped and len(sample.ids) == 1


# ------------------------------------------------------------------------------ keyed draws


@pytest.mark.parametrize("slots", [2, 8, 100])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_samples_do_not_depend_on_batch_slots_or_order(exact_model, slots, size):
    prompts = some_prompts(16, begin=(4, 5, 6))
    rules = {"n": 3, "max_new_tokens": 20, "stop_ids": STOPS, "seed": 9}
    want = Sampler(exact_model, 16, 64).generate(prompts, **rules)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    sampler = Sampler(exact_model, slots, 64)
    for start in range(0, 16, size):
        part = order[start : start + size]
        got = sampler.generate([prompts[i] for i in part], keys=part, **rules)
        for i, group in zip(part, got, strict=True):
            assert [s.ids for s in group] == [s.ids for s in want[i]]
            for one, other in zip(group, want[i], strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)


def test_looking_rarely_changes_nothing(exact_model):
    """A GPU looks every 16 steps: tokens past a stop are computed and thrown away."""
    prompts = some_prompts(7)
    rules = {"n": 4, "max_new_tokens": 21, "stop_ids": STOPS, "seed": 2}
    often = Sampler(exact_model, 9, 64).generate(prompts, **rules)
    rarely = Sampler(exact_model, 9, 64, check_every=16).generate(prompts, **rules)
    assert [[s.ids for s in g] for g in often] == [[s.ids for s in g] for g in rarely]


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


def test_uniforms_are_uniform_and_unrelated():
    table = uniforms(1, range(100), range(100), 1000)
    assert 0 <= table.min() and table.max() < 1
    counts = torch.histc(table.float(), 100, 0, 1)
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 160  # 99 degrees of freedom: p < 1e-4
    assert torch.corrcoef(table).fill_diagonal_(0).abs().max() < 0.16  # 5 sigma of 1/sqrt(1000)
    assert torch.corrcoef(table.T[:100]).fill_diagonal_(0).abs().max() < 0.51


@pytest.mark.parametrize("vocab", [5, 99, 1003, 4096])
def test_chi_square_of_the_draws(vocab):
    random = torch.Generator().manual_seed(vocab)
    logits = torch.randn(vocab, generator=random) * 2
    rows = 1000
    table = uniforms(3, range(rows), [0] * rows, 200)
    counts = torch.zeros(vocab)
    for column in table.T:
        tokens, logprobs = draw(logits.expand(rows, vocab), column, Rules(temperature=1.3))
        counts += torch.bincount(tokens, minlength=vocab)
    want = (logits.double() / 1.3).softmax(0)
    torch.testing.assert_close(logprobs.double(), want[tokens].log(), atol=1e-5, rtol=0)
    expected = want * counts.sum()
    big = expected >= 5
    chi2 = ((counts - expected)[big] ** 2 / expected[big]).sum().item()
    freedom = int(big.sum()) - 1
    assert abs(chi2 - freedom) < 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("vocab", "draws"), [(5, 10**6), (99, 10**6), (1003, 10**5), (4096, 10**5)]
)
def test_a_minus_infinity_logit_is_never_drawn(vocab, draws):
    random = torch.Generator().manual_seed(vocab)
    logits = torch.randn(1000, vocab, generator=random) * 20
    banned = torch.rand(1000, vocab, generator=random) < 0.5
    banned[:, 0] = True  # the first and the last are where an edge goes wrong
    banned[:, -1] = True
    banned[:, 2] = False
    logits[banned] = -math.inf
    zero = torch.zeros(1000, dtype=torch.float64)
    edges = [zero, zero + 2**-48, zero + 1 - 2**-48]
    for uniform in [*uniforms(0, range(1000), [0] * 1000, draws // 1000).T, *edges]:
        tokens, logprobs = draw(logits, uniform, Rules())
        assert not banned.gather(1, tokens[:, None]).any()
        assert logprobs.isfinite().all()


def test_sampled_tokens_follow_the_models_distribution(model):
    prompt = some_prompts(1)[0]
    groups = Sampler(model, 100, 32).generate([prompt], 20_000, 1)
    counts = torch.bincount(torch.tensor([s.ids[0] for s in groups[0]]), minlength=VOCAB)
    want = model.logits(model(torch.tensor([prompt]))[0, -1]).double().softmax(0).detach()
    chi2 = ((counts - 20_000 * want) ** 2 / (20_000 * want)).sum().item()
    assert abs(chi2 - (VOCAB - 1)) < 4.5 * math.sqrt(2 * (VOCAB - 1))


# ------------------------------------------------------------------------------ no work twice


def test_each_distinct_prompt_and_the_shared_prefix_are_prefilled_once(model):
    counted = Counted(model)
    prompts = [[9, 8, 7, *p] for p in some_prompts(5, 6, 6)]
    Sampler(counted, 40, 64).generate([*prompts, prompts[2], prompts[0]], 4, 5)
    # 3 shared tokens; 5 x 6 of their own, the last of each fed by the first decoding step
    assert counted.tokens("Prefill") == 3 + 5 * 5
    assert counted.tokens("Decode") == 7 * 4 * 5


def test_a_group_larger_than_the_slots_is_prefilled_once(model):
    counted = Counted(model)
    prompts = some_prompts(2, 6, 6)
    groups = Sampler(counted, 3, 64).generate(prompts, 8, 9, stop_ids=STOPS, seed=4)
    assert counted.tokens("Prefill") == 2 * 5
    wide = Sampler(model, 16, 64).generate(prompts, 8, 9, stop_ids=STOPS, seed=4)
    assert [[s.ids for s in g] for g in groups] == [[s.ids for s in g] for g in wide]


def test_steps_follow_the_live_sequences(model):
    counted = Counted(model)
    sampler = Sampler(counted, 8, 64)
    groups = sampler.generate(some_prompts(10), 4, 30, stop_ids=STOPS)
    assert not sampler.alive.any()  # a graph runs slots beyond the live ones: they must be dead
    drawn = sum(len(s.ids) for group in groups for s in group)
    assert counted.tokens("Decode") == drawn
    assert drawn < 10 * 4 * 30 * 0.8  # some stopped early, and their slots went to others
    full = [rows for kind, (rows, _) in counted.calls if kind == "Decode" and rows == 8]
    assert len(full) > drawn / 8 * 0.6


# ------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("begin", [(), (4, 5, 6, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_equals_a_full_forward(model, begin, temperature):
    prompts = some_prompts(12, 1, 20, begin)
    continuations = [p[::-1][:i] for i, p in enumerate(some_prompts(12, 12, 15))]
    sampler = Sampler(model, 4, 64)
    sampler.prefill_tokens, sampler.logit_rows = 60, 3  # several batches, several chunks
    scores = sampler.score(prompts, continuations, temperature)
    assert [len(s) for s in scores] == list(range(12))
    for prompt, ids, got in list(zip(prompts, continuations, scores, strict=True))[1:]:
        want = forward_logprobs(model, prompt, ids, temperature)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_empty_continuations_have_no_scores(model):
    assert [len(x) for x in Sampler(model, 4, 64).score([[1, 2, 3], [4, 5, 6, 7]], [[], []])] == [
        0,
        0,
    ]


def test_scores_of_samples_are_their_logprobs(model):
    prompts = some_prompts(4)
    sampler = Sampler(model, 4, 64)
    groups = sampler.generate(prompts, 2, 20, temperature=1.3, stop_ids=STOPS)
    repeated = [p for p in prompts for _ in range(2)]
    samples = [s for group in groups for s in group]
    for got, sample in zip(
        sampler.score(repeated, [s.ids for s in samples], 1.3), samples, strict=True
    ):
        torch.testing.assert_close(got, torch.tensor(sample.logprobs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("begin", [(), (4, 5, 6, 4)])
def test_next_logprobs_equal_a_full_forward(model, begin):
    prompts = some_prompts(9, 1, 20, begin)
    prompts += [prompts[3]]
    tokens = [5, 0, 98]
    got = Sampler(model, 4, 64).next_logprobs(prompts, tokens, temperature=0.7)
    for row, prompt in enumerate(prompts):
        logits = model.logits(model(torch.tensor([prompt]))[0, -1]).detach()
        want = (logits / 0.7).log_softmax(-1)[tokens]
        torch.testing.assert_close(got[row], want, atol=1e-5, rtol=0)


def test_calls_do_not_disturb_each_other(exact_model):
    sampler = Sampler(exact_model, 6, 64)
    prompts, other = some_prompts(5, begin=(3, 3)), some_prompts(4, begin=(8, 8, 8))
    rules = {"n": 2, "max_new_tokens": 15, "stop_ids": STOPS}
    first = sampler.generate(prompts, **rules)
    sampler.generate(other, 3, 30, temperature=0.5, seed=3)
    sampler.score(other, prompts[:4])
    sampler.next_logprobs(other, [1, 2])
    assert sampler.generate(prompts, **rules) == first


def test_stop_ids_of_an_earlier_call_are_forgotten(model):
    sampler = Sampler(model, 4, 64)
    sampler.generate([[1, 2]], 2, 9, stop_ids=range(VOCAB))
    assert all(len(s.ids) == 9 for s in sampler.generate([[1, 2]], 4, 9)[0])


def test_slots_that_died_early_stay_in_the_window(exact_model):
    """Old and fresh sequences side by side in a full window, looked at every 16 steps of 20."""
    prompts = some_prompts(6, 12, 12)
    rules = {"n": 2, "max_new_tokens": 20, "stop_ids": STOPS, "seed": 6}
    want = Sampler(exact_model, 12, 64).generate(prompts, **rules)
    got = Sampler(exact_model, 5, 32, check_every=16).generate(prompts, **rules)
    assert [[s.ids for s in g] for g in got] == [[s.ids for s in g] for g in want]


def test_watch_may_not_use_the_sampler(model):
    sampler = Sampler(model, 4, 64)
    with pytest.raises(RuntimeError, match="in the middle of a call"):
        sampler.generate([[1, 2]], 2, 9, watch=lambda *_: sampler.score([[1]], [[2]]))
    sampler.score([[1]], [[2]])


def test_ids_may_be_arrays_or_tensors(model):
    sampler = Sampler(model, 4, 64)
    prompts = some_prompts(3, 5, 5)
    want = sampler.generate(prompts, 2, 9, stop_ids=STOPS, keys=[4, 5, 6], seed=3)
    for kind in (torch.tensor, numpy.array):
        keys, seed = kind([4, 5, 6]), numpy.int64(3)
        got = sampler.generate(kind(prompts), 2, 9, stop_ids=kind(STOPS), keys=keys, seed=seed)
        assert got == want
        assert sampler.next_logprobs(kind(prompts), kind(STOPS)).shape == (3, 4)


def test_another_compute_type_is_refused(folder):
    model = ours.load(folder)
    sampler = Sampler(model, 4, 64)
    model.compute_dtype = torch.bfloat16
    with pytest.raises(RuntimeError, match="make a new Sampler"):
        sampler.generate([[1, 2]], 1, 9)


def test_an_interrupted_call_leaves_a_clean_sampler(exact_model):
    sampler = Sampler(exact_model, 6, 64)
    prompts = some_prompts(5)
    want = sampler.generate(prompts, 2, 15, stop_ids=STOPS)

    def interrupt(prompt, sample, ids, ended):
        if len(ids) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.generate(prompts, 2, 15, stop_ids=STOPS, seed=8, watch=interrupt)
    assert sampler.generate(prompts, 2, 15, stop_ids=STOPS) == want


def test_new_weights_are_seen_at_once(folder):
    model = ours.load(folder)
    sampler = Sampler(model, 4, 64)
    prompts = some_prompts(2, begin=(1, 2))
    before = sampler.generate(prompts, 1, 10, temperature=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = sampler.generate(prompts, 1, 10, temperature=0)
    assert after != before
    for prompt, (sample,) in zip(prompts, after, strict=True):
        want = forward_logprobs(model, prompt, sample.ids)
        torch.testing.assert_close(torch.tensor(sample.logprobs), want, atol=1e-5, rtol=0)


def test_progress_rises_to_one(model):
    sampler, seen = Sampler(model, 3, 64), []
    sampler.progress = seen.append
    sampler.generate(some_prompts(3), 2, 12, stop_ids=STOPS)
    assert len(seen) > 2 and seen == sorted(seen) and 0 < seen[0] < seen[-1] == 1


def test_watch_sees_every_sequence_grow_and_end(model):
    seen = {}

    def watch(prompt, sample, ids, ended):
        past = seen.setdefault((prompt, sample), [])
        assert ids[: len(past) and len(past[-1][0])] == (past[-1][0] if past else [])
        past.append((ids, ended))

    groups = Sampler(model, 3, 64).generate(some_prompts(3), 2, 12, stop_ids=STOPS, watch=watch)
    for p, group in enumerate(groups):
        for s, sample in enumerate(group):
            assert seen[p, s][-1] == (sample.ids, True)
            assert [end for _, end in seen[p, s]].count(True) == 1


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
    assert sampler.next_logprobs([], [1]).shape == (0, 1)


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1] * 25]}, "prompt 0 has 25 tokens and 8 are to come.*window is 32"),
        ({"prompts": [[1, 99]]}, "prompt 0 holds the id 99, outside the vocabulary of 99"),
        ({"prompts": [[1, -1]]}, "prompt 0 holds the id -1"),
        ({"n": 0}, "n=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1 must be 0"),
        ({"temperature": 1e-5}, "temperature=1e-05 must be 0"),
        ({"temperature": math.nan}, "temperature=nan must be 0"),
        ({"temperature": math.inf}, "temperature=inf must be 0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"stop_ids": [99]}, "stop_ids holds the id 99"),
        ({"keys": [1, 2]}, r"keys \(2\) as many as prompts \(1\)"),
    ],
)
def test_bad_arguments_are_named(model, arguments, match):
    sampler = Sampler(model, 2, 32)
    with pytest.raises(ValueError, match=match) as caught:
        sampler.generate(**{"prompts": [[1, 2, 3]], "max_new_tokens": 8, **arguments})
    assert len(str(caught.value).splitlines()) == 1


def test_bad_samplers_and_readings_are_refused(model):
    with pytest.raises(ValueError, match="slots=0"):
        Sampler(model, 0, 32)
    with pytest.raises(ValueError, match="check_every=-3"):
        Sampler(model, 1, 32, check_every=-3)
    with pytest.raises(ValueError, match="max_length=513 must lie in 2"):
        Sampler(model, 1, 513)
    sampler = Sampler(model, 2, 32)
    with pytest.raises(ValueError, match="1 prompts, but 2 continuations"):
        sampler.score([[1]], [[1], [2]])
    with pytest.raises(ValueError, match="prompt and continuation 0 has 40 tokens"):
        sampler.score([[1] * 20], [[1] * 20])
    model_of_nan = ours.Transformer(model.config)
    torch.nn.init.constant_(model_of_nan.norm.weight, math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        Sampler(model_of_nan, 2, 32).score([[1, 2]], [[3]])
    with pytest.raises(ValueError, match="temperature=0"):
        sampler.next_logprobs([[1]], [1], temperature=0)
    with pytest.raises(ValueError, match="token_ids holds the id 99"):
        sampler.next_logprobs([[1]], [99])


def test_logits_that_are_not_finite_are_an_error(folder):
    model = ours.load(folder)
    sampler = Sampler(model, 2, 32)
    ragged = [[1, 2], [3, 4, 5, 6, 7, 8]]
    want = sampler.generate(ragged, 1, 9)
    weight = model.blocks[0].attention_norm.weight
    old = weight[3].item()
    with torch.no_grad():
        weight[3] = math.nan
    with pytest.raises(FloatingPointError, match=r"prompt 0, sample \d: .* not finite"):
        sampler.generate([[1, 2, 3, 4, 5]], 2, 20)
    with torch.no_grad():
        weight[3] = old
    assert sampler.generate(ragged, 1, 9) == want  # nothing of it lingers in the cache


# ------------------------------------------------------------------------------ the command line


def command(*arguments):
    return subprocess.run(
        [sys.executable, "sampler.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_command_line_streams_samples_and_prints_the_rate(tmp_path):
    make_model(tmp_path, vocab=400)
    make_tokenizer(tmp_path)
    run = command("--model", tmp_path, "--prompt", "a small", "-n", 3, "--max-new-tokens", 12)
    assert run.returncode == 0, run.stderr
    assert all(f"[{i}] " in run.stdout for i in (1, 2, 3)) and "[4]" not in run.stdout
    assert "tokens/s" in run.stdout.splitlines()[-1]


def test_command_line_says_what_is_wrong(tmp_path):
    run = command("--model", tmp_path / "nowhere", "--prompt", "x")
    assert run.returncode != 0
    assert "no such folder" in run.stderr and "Traceback" not in run.stderr


# ------------------------------------------------------------------------------ borrowed alone


def test_sampler_alone_drives_any_model_that_calls_attend(tmp_path):
    """Only sampler.py is copied; ten lines of model are all that it needs."""
    shutil.copy(ROOT / "sampler.py", tmp_path)
    (tmp_path / "borrow.py").write_text(
        """
import types, torch
from sampler import Sampler

class Tiny(torch.nn.Module):
    config = types.SimpleNamespace(layers=1, kv_heads=1, head_dim=8, max_length=64, vocab_size=20)
    def __init__(self):
        super().__init__()
        self.embed, self.qkv = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 24)
    def forward(self, ids, positions, cache):
        x = self.embed(ids) + positions[..., None].sin()
        q, k, v = self.qkv(x)[:, :, None].chunk(3, dim=-1)      # one head
        return x + cache.attend(0, q, k, v)[:, :, 0]
    def logits(self, hidden):
        return hidden @ self.embed.weight.T

torch.manual_seed(0)
sampler = Sampler(Tiny(), slots=4, max_length=32)
prompts = [[1, 2, 3], [1, 2, 4, 5]]
groups = sampler.generate(prompts, n=3, max_new_tokens=8, stop_ids=[0])
for prompt, group in zip(prompts, groups):
    for sample in group:
        (score,) = sampler.score([prompt], [sample.ids])
        assert torch.allclose(score, torch.tensor(sample.logprobs), atol=1e-5)
print("borrowed")
"""
    )
    run = subprocess.run(
        [sys.executable, "borrow.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.stdout == "borrowed\n", run.stderr
