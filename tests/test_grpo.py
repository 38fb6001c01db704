"""The training signal, in float64 against loops a reader can check, and what keeps a run sound."""

import dataclasses
import math

import pytest
import torch

import grpo
from grpo import Prompt, Row, Settings
from judge import Judged
from model import Config, Transformer
from ranks import Ranks
from sampler import Sample, Sampler

EOS, V = 1, 23
ALONE = Ranks()


def tiny_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = Transformer(Config("qwen2", V, 24, 40, 2, 4, 2, 6, 64, tied=True)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def settings(**changes):
    small = Settings(
        steps=4, prompts_per_step=3, samples_per_prompt=4, max_prompt_tokens=8, max_new_tokens=6,
        micro_batch_tokens=64, lr=1e-2, warmup_steps=0, final_lr=1.0, max_norm=1e9,
    )  # fmt: skip
    return dataclasses.replace(small, **changes)


def judged(total, words="said"):
    return [Judged(row, {}, [words] * len(row)) for row in total]


def loop(model, score, s, batch=None, start=None, sampler=None, stop_ids=(EOS,)):
    """`score(prompt, ids, n) -> reward` in a loop on three fixed prompts."""

    def reward(tasks, groups, number):
        return judged(
            [
                [score(p, g.ids, n) for n, g in enumerate(r)]
                for p, r in zip(tasks, groups, strict=True)
            ]
        )

    batch = batch or (lambda number: [Prompt([2 + p, 7, 5 + p], p) for p in range(3)])
    sampler = sampler or Sampler(model, slots=12, max_length=24)
    optimizer = grpo.make_optimizer(model, s)
    return grpo.train(model, sampler, reward, batch, s, optimizer, stop_ids, start)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Still:
    """An optimizer that leaves the weights, but keeps the gradient for us to see."""

    def __init__(self, model):
        self.model, self.param_groups, self.seen = model, [], []

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none=set_to_none)

    def step(self):
        self.seen.append(gradients(self.model))


def gradient_of_update(model, rows, s, reference=None):
    optimizer = Still(model)
    stats = grpo.update(model, optimizer, rows, reference, grpo.weights_of(rows, s), s, ALONE)
    return optimizer.seen[-1], stats


def naive_gradient(model, rows, s, reference=None):
    """Every copy of every row alone, its log-probs from log_softmax: the definition."""
    model.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    tokens = sum(r.copies * len(r.ids) for r in rows)
    sequences = sum(r.copies for r in rows)
    for i, row in enumerate(rows):
        ids = torch.tensor([row.prompt + row.ids])
        logits = model.logits(model(ids))[0] / s.temperature
        log_p = logits.log_softmax(-1)[len(row.prompt) - 1 : -1]
        log_p = log_p.gather(1, ids[0, len(row.prompt) :, None])[:, 0]
        for _ in range(row.copies):
            per_token = -row.advantage * (log_p - log_p.detach()).exp()
            if reference is not None:  # the gradient of KL(policy || reference), as documented
                per_token = per_token + s.kl * log_p * (log_p - reference[i]).detach()
            whole = per_token.sum()
            loss = loss + (
                whole / tokens if s.loss_norm == "token" else whole / len(row.ids) / sequences
            )
    loss.backward()
    return gradients(model)


def some_rows(model, dtype=torch.float64):
    """Ragged, with the ids 0 and EOS inside, with and without a stop token at the end."""
    rows = []
    for i, (p, c) in enumerate([(3, 5), (1, 1), (6, 2), (2, 6), (4, 4), (3, 3)]):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(2, V, (p + c,), generator=generator).tolist()
        ids[p:] = [*ids[p : p + c - 1], EOS] if i % 2 else [0, EOS, 0, EOS, 3][:c]
        prompt, ids = ids[:p], ids[p:]
        with torch.no_grad():
            whole = torch.tensor([prompt + ids])
            log_p = model.logits(model(whole))[0].log_softmax(-1)[p - 1 : -1]
        logprobs = log_p.gather(1, whole[0, p:, None])[:, 0].tolist()
        rows.append(Row(prompt, ids, logprobs, (-1.0) ** i * (0.5 + i), 1 + i % 3))
    return rows


def assert_same(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


# ------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("norm", ["token", "sequence"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_gradient_is_that_of_the_definition(norm, temperature):
    """Masks inferred from ids 0 or EOS, a dropped stop token, a missing temperature fail it."""
    model, s = tiny_model(), settings(loss_norm=norm, temperature=temperature)
    rows = some_rows(model)
    assert_same(gradient_of_update(model, rows, s)[0], naive_gradient(model, rows, s))


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_gradients_do_not_depend_on_micro_batches_or_order(norm):
    model, s = tiny_model(), settings(loss_norm=norm)
    rows = some_rows(model)
    whole, stats = gradient_of_update(model, rows, s)
    for tokens in (1, 9, 14, 20):
        cut, other = gradient_of_update(
            model, rows, settings(loss_norm=norm, micro_batch_tokens=tokens)
        )
        assert_same(whole, cut)
        assert other["train/grad_norm"] == pytest.approx(stats["train/grad_norm"], abs=1e-12)
        assert other["train/loss"] == pytest.approx(stats["train/loss"], abs=1e-12)
    assert_same(whole, gradient_of_update(model, rows[::-1], s)[0])


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_identical_samples_trained_once_give_the_gradient_of_all(updates, norm):
    """With two updates, the clip sees the advantages' signs: copies that differ stay apart."""
    s = settings(updates_per_batch=updates, loss_norm=norm, lr=0.1, clip_low=0.05, clip_high=0.05)
    model, apart = tiny_model(), tiny_model()
    groups = [[Sample([3, 4, EOS], [-1.0] * 3, True)] * 3 + [Sample([5, EOS], [-1.0] * 2, True)]]
    rewards = torch.tensor([[0.9, 0.1, 0.9, 0.4]])
    advantages = grpo.group_advantage(rewards)
    prompts = [Prompt([2, 7], None)]
    merged = grpo.distinct_rows(prompts, groups, rewards, advantages, s)
    assert len(merged) == (2 if updates == 1 else 3)
    single = [
        Row([2, 7], g.ids, g.logprobs, float(a), 1)
        for g, a in zip(groups[0], advantages[0], strict=True)
    ]
    for m, rows in ((model, merged), (apart, single)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.3)
        grpo.update(m, optimizer, rows, None, grpo.weights_of(rows, s), s, ALONE)
    assert_same(dict(model.named_parameters()), dict(apart.named_parameters()))


def test_the_kl_pulls_with_the_gradient_of_the_exact_kl():
    model, start = tiny_model(0), tiny_model(1)
    s = settings(kl=0.3)
    rows = [row._replace(advantage=0.0) for row in some_rows(model)]  # nothing but the KL
    reference = grpo.reference_logprobs(start, rows, s, ALONE)
    found = Sampler(start, slots=4, max_length=24).score(
        [r.prompt for r in rows], [r.ids for r in rows]
    )
    for one, other in zip(reference, found, strict=True):  # the sampler's are fp32
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    ours, _ = gradient_of_update(model, rows, s, reference)
    assert_same(ours, naive_gradient(model, rows, s, reference))
    assert max(g.abs().max() for g in ours.values()) > 1e-3


def test_tokens_that_pass_are_counted_a_prompt_once():
    model, s = tiny_model(), settings()
    rows = [grpo.Row([7, 8, 9], ids, [0.0] * len(ids), 1.0, 1) for ids in ([1, 2], [3], [4, 5, 6])]
    rows += [grpo.Row([7, 8], [1, 2], [0.0] * 2, 1.0, 1), rows[0]._replace(advantage=0.0)]
    _, stats = gradient_of_update(model, rows, s)
    assert stats["train/tokens"] == 3 + 1 + 0 + 2 + 2 + 1 and stats["train/rows"] == 4


def test_the_ratio_is_exactly_one_when_old_is_new():
    """The first of two updates has the gradient of one, and clips nothing."""
    model, s = tiny_model(), settings(clip_low=0.0, clip_high=0.0)
    rows = some_rows(model)
    once, _ = gradient_of_update(model, rows, s)
    twice, stats = gradient_of_update(model, rows, dataclasses.replace(s, updates_per_batch=2))
    assert_same(once, twice)  # Still: the weights did not move, so the second is like the first
    assert stats["train/clipped"] == 0.0


# --------------------------------------------------------------------------------- what it learns


def test_the_stop_token_is_trained():
    """Where short samples win, stopping becomes likelier."""
    model = tiny_model(dtype=torch.float32)

    def stop_probability():
        with torch.no_grad():
            ids = torch.tensor([[2, 7, 5], [3, 7, 6], [4, 7, 7]])
            return model.logits(model(ids)[:, -1]).softmax(-1)[:, EOS].mean().item()

    before = stop_probability()
    s = settings(steps=10, samples_per_prompt=16)
    for _ in loop(model, lambda p, ids, n: -len(ids), s):
        pass
    assert stop_probability() > 2 * before


def test_the_loop_makes_what_is_rewarded_likelier():
    model = tiny_model(dtype=torch.float32)
    rewards = [
        step.metrics["reward/total"]
        for step in loop(
            model, lambda p, ids, n: ids.count(9), settings(steps=25, samples_per_prompt=16)
        )
    ]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 5


def test_a_tie_teaches_nothing_and_costs_nothing():
    """No forward, no optimizer step: AdamW's momentum would move the weights without a gradient."""
    model = tiny_model(dtype=torch.float32)
    s = settings(steps=3)
    constants = iter([51.33, 0.1, 1 / 3])
    value = next(constants)
    before = [p.clone() for p in model.parameters()]
    forward = model.forward
    calls = []
    sampler = Sampler(model, slots=12, max_length=24)
    train = loop(model, lambda p, ids, n: value, s, sampler=sampler)
    model.forward = lambda *a, **k: calls.append("segments" in k) or forward(*a, **k)
    for step in train:
        assert step.metrics["groups/zero_variance"] == 1.0 and step.metrics["train/rows"] == 0
        value = next(constants, 0.0)
    assert not any(calls)
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_truncated_samples_with_one_reward_are_a_tie_and_no_nan():
    model = tiny_model(dtype=torch.float32)
    for step in loop(model, lambda p, ids, n: 0.0, settings(steps=1), stop_ids=[]):
        assert step.metrics["length/truncated"] == 1.0 and step.metrics["length/mean"] == 6
        unmeasured = {k for k, v in step.metrics.items() if not math.isfinite(v)}
        assert unmeasured == {"policy/sampler_gap", "policy/sampler_gap_max"}


def test_a_missing_reward_is_left_out_of_group_and_denominator():
    s = settings()
    groups = [[Sample([3, 4, EOS], [-1.0] * 3, True), Sample([5, EOS], [-1.0] * 2, True)] * 2]
    groups[0][3] = Sample([6, 6, 6, EOS], [-1.0] * 4, True)
    rewards = torch.tensor([[1.0, 0.0, 1.0, math.nan]])
    advantages = grpo.group_advantage(rewards)
    rows = grpo.distinct_rows([Prompt([2], None)], groups, rewards, advantages, s)
    assert [(r.ids, r.copies) for r in rows] == [([3, 4, EOS], 2), ([5, EOS], 1)]
    weights = grpo.weights_of(rows, s)
    assert weights == [2 / 8, 1 / 8]
    assert sum(w * len(r.ids) for w, r in zip(weights, rows, strict=True)) == 1


def test_sampler_and_trainer_agree():
    for temperature in (0.7, 1.0, 1.3):
        model = tiny_model(dtype=torch.float32)
        s = settings(temperature=temperature, steps=1)
        for step in loop(model, lambda p, ids, n: ids.count(9) + n, s):
            assert 0 < step.metrics["policy/sampler_gap"] < 1e-5
            assert step.metrics["policy/sampler_gap_max"] < 1e-5


def test_the_sampler_follows_the_weights_when_it_has_its_own_copy():
    model, twin = tiny_model(dtype=torch.float32), tiny_model(1, torch.float32)
    addresses = [p.data_ptr() for p in twin.parameters()]
    sampler = Sampler(twin, slots=12, max_length=24)
    for step in loop(model, lambda p, ids, n: ids.count(9) + n, settings(steps=2), sampler=sampler):
        assert step.metrics["policy/sampler_gap_max"] < 1e-5
    assert addresses == [p.data_ptr() for p in twin.parameters()]  # graphs read these


def test_an_ema_moves_by_its_share():
    a, b = tiny_model(0), tiny_model(1)
    before, model = [p.clone() for p in a.parameters()], list(b.parameters())
    grpo.follow(a.parameters(), b.parameters(), 0.9)
    for old, target, new in zip(before, model, a.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * target)


# --------------------------------------------------------------------------- what keeps it sound


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    model = tiny_model(dtype=torch.float32)
    before = [p.clone() for p in model.parameters()]
    train = loop(
        model, lambda p, ids, n: 1e30 * n, settings(advantage_scale="none", max_bad_steps=3)
    )
    seen = []
    with pytest.raises(grpo.Stop, match="no finite gradient for 3 steps in a row"):
        for step in train:
            seen.append(step.metrics["train/skipped"])
    assert seen == [1.0] * 3
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_judge_that_never_gives_a_score_stops_the_run_and_shows_its_words():
    model = tiny_model(dtype=torch.float32)
    s = settings(max_bad_steps=2, steps=9)
    seen = []
    with pytest.raises(grpo.Stop, match=r"no valid score for 2 steps in a row(.|\n)*'said'"):
        for step in loop(model, lambda p, ids, n: math.nan, s):
            seen.append(step.metrics)
    assert (
        len(seen) == 2 and seen[0]["judge/invalid"] == 1.0 and math.isnan(seen[0]["reward/total"])
    )


def test_half_precision_master_weights_are_refused():
    with pytest.raises(ValueError, match=r"is torch\.bfloat16: at lr"):
        grpo.make_optimizer(tiny_model(dtype=torch.bfloat16), settings())


def test_the_rate_rises_and_falls_as_logged():
    model = tiny_model(dtype=torch.float32)
    s = settings(steps=6, warmup_steps=3, final_lr=0.5, lr=0.6)
    optimizer = grpo.make_optimizer(model, s)
    sampler = Sampler(model, slots=12, max_length=24)
    rates = []
    train = grpo.train(
        model, sampler, lambda t, g, i: judged([[0.0] * 4] * 3),
        lambda number: [Prompt([2 + p, 7], p) for p in range(3)], s, optimizer, [EOS],
    )  # fmt: skip
    for step in train:
        assert {g["lr"] for g in optimizer.param_groups} == {step.metrics["train/lr"]}
        rates.append(step.metrics["train/lr"])
    expected = [0.6 * min(1, i / 3) * (1 - 0.5 * i / 6) for i in range(1, 7)]
    assert rates == pytest.approx(expected)


def test_samples_of_a_step_differ_between_prompts_and_steps_but_not_between_runs():
    def samples(seed):
        model = tiny_model(dtype=torch.float32)
        same = [Prompt([2, 7], 0)] * 3
        s = settings(steps=2, seed=seed)
        steps = loop(model, lambda p, ids, n: 0.0, s, batch=lambda number: same)
        return [[tuple(map(tuple, (x.ids for x in g))) for g in step.groups] for step in steps]

    first = samples(0)
    assert len({group for step in first for group in step}) == 6
    assert samples(0) == first and samples(1) != first


def test_metrics_are_what_they_say():
    """By hand: two groups, one a tie, one with a missing reward."""
    groups = [
        [Sample([3, EOS], [-1.0, -2.0], True), Sample([4, 5, 6], [-0.5, -0.5, -1.0], False)],
        [Sample([3, EOS], [-1.0, -1.0], True)] * 2,
    ]
    rewards = torch.tensor([[0.25, 0.75], [0.5, math.nan]], dtype=torch.float64)
    about = [
        Judged([0.25, 0.75], {"self": [0.25, 0.75], "format": [1.0, 1.0]}, []),
        Judged([0.5, math.nan], {"self": [0.5, math.nan], "format": [1.0, 1.0]}, []),
    ]
    s = settings()
    prompts = [Prompt([2], None), Prompt([2], None)]
    rows = grpo.distinct_rows(prompts, groups, rewards, grpo.group_advantage(rewards), s)
    reference = [torch.tensor(r.logprobs) + 0.1 for r in rows]
    advantages = grpo.group_advantage(rewards)
    metrics = grpo.describe(groups, about, rewards, advantages, rows, reference)
    counts = [0] * 20
    counts[5] = counts[15] = counts[10] = 1  # 0.25, 0.75, 0.5; what is missing is nowhere
    assert metrics.pop("histogram/self") == counts
    expected = {
        "reward/total": 0.5,
        "reward/self": 0.5,
        "reward/format": 1.0,
        "judge/invalid": 0.25,
        "groups/zero_variance": 0.5,
        "groups/distinct": 0.75,
        "policy/entropy": 9 / 9,
        "length/mean": 9 / 4,
        "length/max": 3,
        "length/truncated": 0.25,
        "policy/kl": math.exp(0.1) - 1 - 0.1,
    }
    assert metrics == pytest.approx(expected, abs=1e-7)


def test_a_histogram_counts_what_was_judged():
    """1 belongs to the last part, beyond to the nearest, NaN and what was not judged nowhere."""
    values = [0.0, 0.049, 0.05, 0.99, 1.0, 1.2, -0.1, math.nan]
    assert grpo.histogram(values) == [3, 1, *[0] * 17, 3]
    samples = [[Sample([EOS], [-1.0], True), Sample([3, EOS], [-1.0, -1.0], True)]]
    about = [Judged([0.0, 0.5], {"self": [0.0, 0.5], "format": [0.0, 1.0]}, [])]
    rewards = torch.tensor([[0.0, 0.5]])
    metrics = grpo.describe(samples, about, rewards, rewards, [], None)
    assert metrics["histogram/self"] == [*[0] * 10, 1, *[0] * 9]


def test_rates_are_what_was_done_over_its_time():
    clock = grpo.Clock()
    clock.seconds = {"sample": 2.0, "judge": 4.0, "train": 5.0}
    clock.start, clock.last = 0.0, 10.0
    group = [Sample([3, EOS], [-1.0, -1.0], True), Sample([4, 5, 6], [-1.0] * 3, False)]
    found = clock.metrics([group], 50)
    rates = {k: v for k, v in found.items() if "per" in k}
    assert rates == {
        "per_second/sample": 2.5, "per_second/judge": 0.5, "per_second/train": 10.0,
        "tokens_per_second": 0.5,
    }  # fmt: skip


def test_ten_golden_steps_are_reproduced():
    """Bit for bit from run to run; within 1e-10 on whatever machine."""
    from tests import golden

    once, again = list(golden.steps()), list(golden.steps())
    assert once == again
    assert not golden.differences(once, golden.from_text(golden.FILE.read_text()))


def test_golden_steps_hold_on_a_machine_that_rounds_otherwise():
    from tests import golden
    from tests.perturb import perturbed

    with perturbed(seed=0) as machine:
        rows = list(golden.steps())
    assert min(machine.count[name] for name in ("mm", "bmm", "exp", "_log_softmax")) > 10
    assert not golden.differences(rows, golden.from_text(golden.FILE.read_text()))


def scale_loss(real):
    def loss(*args, **options):
        value, stats = real(*args, **options)
        return value * (1 + 1e-5), stats

    return loss


def drop_last_token(real):
    def loss(hidden, head, targets, advantages, weights, **options):
        weights = weights.clone()
        weights[-1] = 0
        return real(hidden, head, targets, advantages, weights, **options)

    return loss


def flip_kl(real):
    return lambda *args, kl, **options: real(*args, kl=-kl, **options)


@pytest.mark.parametrize("mistake", [scale_loss, drop_last_token, flip_kl])
def test_golden_steps_are_not_those_of_a_small_mistake(monkeypatch, mistake):
    from tests import golden

    expected = golden.from_text(golden.FILE.read_text())[:3]
    monkeypatch.setattr(grpo, "linear_policy_loss", mistake(grpo.linear_policy_loss))
    rows = [row for row, _ in zip(golden.steps(), range(3), strict=False)]
    assert golden.differences(rows, expected)


def test_the_gap_between_sampler_and_trainer_is_measured_before_the_weights_move():
    model = tiny_model(dtype=torch.float32)
    s = settings(steps=2, updates_per_batch=3, lr=0.05)
    for step in loop(model, lambda p, ids, n: ids.count(9) + n, s):
        assert step.metrics["policy/sampler_gap_max"] < 1e-5


def plain_ppo(model, rows, s, steps, reference):
    """Token by token, copy by copy: the clipped objective as the papers write it."""
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    tokens = sum(r.copies * len(r.ids) for r in rows)

    def log_probs(row):
        ids = torch.tensor([row.prompt + row.ids])
        log_p = (model.logits(model(ids))[0] / s.temperature).log_softmax(-1)
        return log_p[len(row.prompt) - 1 : -1].gather(1, ids[0, len(row.prompt) :, None])[:, 0]

    with torch.no_grad():
        old = [log_probs(row) for row in rows]
    clipped = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        loss, clipped = torch.zeros((), dtype=torch.float64), 0.0
        for row, before, ref in zip(rows, old, reference, strict=True):
            for log_p, o, r in zip(log_probs(row), before, ref, strict=True):
                ratio = (log_p - o).exp()
                kept = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
                objective = torch.minimum(ratio * row.advantage, kept * row.advantage)
                clipped += row.copies / tokens * float(kept * row.advantage < ratio * row.advantage)
                pull = s.kl * (ratio * (log_p - r)).detach() * log_p  # the exact KL's gradient
                loss = loss + row.copies / tokens * (pull - objective)
        loss.backward()
        optimizer.step()
    return clipped


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("kl", [0.0, 0.2])
def test_several_updates_are_those_of_the_clipped_objective(temperature, kl):
    s = settings(
        updates_per_batch=3, temperature=temperature, kl=kl, clip_low=0.05, clip_high=0.3,
        micro_batch_tokens=14,
    )  # fmt: skip
    model, twin = tiny_model(), tiny_model()
    rows = some_rows(model)
    reference = [torch.linspace(-3, -1, len(r.ids), dtype=torch.float64) for r in rows]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    stats = grpo.update(model, optimizer, rows, reference, grpo.weights_of(rows, s), s, ALONE)
    clipped = plain_ppo(twin, rows, s, 3, reference)
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()), 1e-9)
    assert 0.05 < clipped == pytest.approx(stats["train/clipped"], abs=1e-9)


def test_the_kl_is_measured_at_the_temperature_of_the_samples():
    for temperature in (0.7, 1.3):
        model, start = tiny_model(0, torch.float32), tiny_model(0, torch.float32)
        s = settings(temperature=temperature, steps=1)
        for step in loop(model, lambda p, ids, n: n, s, start=start):
            assert 0 <= step.metrics["policy/kl"] < 1e-9  # the same weights


def test_the_gap_is_a_mean_over_the_tokens_that_are_trained():
    model, s = tiny_model(), settings()
    rows = [
        r._replace(logprobs=[x + 0.1 for x in r.logprobs], advantage=r.advantage * (i > 1))
        for i, r in enumerate(some_rows(model))
    ]
    stats = gradient_of_update(model, rows, s)[1]
    assert stats["policy/sampler_gap"] == pytest.approx(0.1, abs=1e-9)
    assert stats["policy/sampler_gap_max"] == pytest.approx(0.1, abs=1e-9)


def test_settings_reach_those_who_need_them(monkeypatch):
    seen, numbers = [], []
    real = grpo.group_advantage
    monkeypatch.setattr(grpo, "group_advantage", lambda *a: seen.append(a[1:]) or real(*a))
    model = tiny_model(dtype=torch.float32)
    s = settings(advantage_scale="none", advantage_baseline="leave-one-out", weight_decay=0.3)
    optimizer = grpo.make_optimizer(model, s)

    def reward(tasks, groups, number):
        numbers.append(number)
        return judged([[0.0] * 4] * 3)

    prompts = [Prompt([2 + p, 7], p) for p in range(3)]
    sampler = Sampler(model, slots=12, max_length=24)
    list(grpo.train(model, sampler, reward, lambda number: prompts, s, optimizer, [EOS]))
    assert seen == [("none", "leave-one-out")] * 4 and numbers == [1, 2, 3, 4]
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.3}


def test_trouble_must_come_in_a_row_to_stop_a_run():
    model = tiny_model(dtype=torch.float32)
    values = {1: math.nan, 2: math.nan, 3: 0.5, 4: math.nan, 5: math.nan}
    s, number = settings(steps=5, max_bad_steps=3), [0]
    for step in loop(model, lambda p, ids, n: values[number[0] + 1], s):
        number[0] = step.number
    assert number == [5]


def test_a_run_without_one_right_format_stops():
    wrong = {"train/skipped": 0, "judge/invalid": 0.0, "reward/format": 0.0}
    bad = grpo.still_missing(wrong, {})
    grpo.check_health(bad, None, 2)
    with pytest.raises(grpo.Stop, match="no sample of the right format for 2 steps in a row"):
        grpo.check_health(grpo.still_missing(wrong, bad), None, 2)


def test_steps_in_a_row_are_counted_across_a_restart():
    s = settings(max_bad_steps=3, steps=9)
    first = next(loop(tiny_model(dtype=torch.float32), lambda p, ids, n: math.nan, s))
    model = tiny_model(dtype=torch.float32)
    sampler = Sampler(model, slots=12, max_length=24)
    train = grpo.train(
        model, sampler, lambda t, g, i: judged([[math.nan] * 4] * 3),
        lambda number: [Prompt([2 + p, 7], p) for p in range(3)], s, grpo.make_optimizer(model, s),
        [EOS], done=first,
    )  # fmt: skip
    seen = []
    with pytest.raises(grpo.Stop, match="no valid score for 3 steps in a row"):
        for step in train:
            seen.append(step.number)
    assert seen == [2, 3]
