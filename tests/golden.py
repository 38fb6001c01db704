"""Ten steps of the whole loop on a tiny float64 model: python -m tests.golden writes golden.txt.

Everything computes in float64, so machines agree to about 1e-14 and the comparison allows 1e-10: no
BLAS or instruction set breaks that (tests/perturb.py imitates others), and a term that is wrong by
1e-5 cannot pass. The samples must be the same. Weights, sentences, prompts, judge and
reward are the real ones, but for two things that let an untrained model get a reward: most of its
vocabulary stops a translation or is a score. If a change moves these numbers on purpose, write them
anew with the command above and say in the commit why they moved.
"""

import dataclasses
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch

import grpo
from data.codec import PromptCodec
from data.languages import is_plausible_translation
from judge import TOY, Judge, Reward
from model import Config, Transformer
from sampler import Sampler
from toy.languages import KASU, Languages
from toy.pretrain import make_tokenizer

TOLERANCE = 1e-10
FILE = Path(__file__).with_name("golden.txt")
SHOWN = {
    "reward/total": "reward", "judge/invalid": "invalid", "groups/distinct": "distinct",
    "length/mean": "length", "policy/entropy": "entropy", "policy/kl": "kl",
    "train/loss": "loss", "train/grad_norm": "norm",
}  # fmt: skip


def steps(ranks=None, **changes):
    """Metrics step by step; with many ranks, and whatever their number, the same."""
    pair = Languages(0)
    tokenizer = make_tokenizer(pair)
    codec = PromptCodec(tokenizer)
    words = pair.vocabulary[KASU]
    stop_ids = [tokenizer.convert_tokens_to_ids(w) for w in words[::4]]
    vocabulary = tokenizer.get_vocab()
    scores = {w: i / len(vocabulary) for w, i in sorted(vocabulary.items()) if w[0] != "<"}
    prompts = dataclasses.replace(TOY, scores=scores)

    def make_model(shard=None):
        config = Config("qwen2", len(tokenizer), 24, 40, 2, 3, 1, 8, 96, tied=True)
        model = Transformer(config).double()
        with torch.no_grad():  # no generator: those differ between processors
            for i, p in enumerate(model.parameters()):
                values = torch.arange(p.numel(), dtype=torch.int64) * 7919 + 104729 * i
                p.copy_((values % 1009 / 1009 - 0.5).view_as(p) * (0.9 if p.dim() > 1 else 0.2))
                if p.dim() == 1:
                    p += 1
        if shard:
            shard(model)
        return model

    many = ranks is not None and ranks.size > 1
    model = make_model(ranks.shard if many else None)
    sampler = Sampler(make_model() if many else model, 24, 96)
    judge = Judge(sampler, codec, prompts, "expected")
    s = grpo.Settings(
        steps=10, prompts_per_step=6, samples_per_prompt=4, max_new_tokens=8, lr=3e-3,
        micro_batch_tokens=128, warmup_steps=3, kl=0.01,
    )  # fmt: skip
    s = dataclasses.replace(s, **changes)

    def batch(number):
        P = s.prompts_per_step
        tasks = [pair.task("train", P * number + i) for i in range(P)]
        ids = codec.encode([prompts.ask(task) for task in tasks])
        return [grpo.Prompt(*both) for both in zip(ids, tasks, strict=True)]

    scorers = {"self": (1.0, judge)}
    reward = Reward(codec, prompts, scorers, is_translation=is_plausible_translation)
    optimizer = grpo.make_optimizer(model, s)
    start = make_model()
    for step in grpo.train(model, sampler, reward, batch, s, optimizer, stop_ids, start, ranks):
        if many:  # every rank holds the same weights
            whole = [p.detach().numpy().tobytes() for p in sampler.model.parameters()]
            assert len(set(ranks.gather(zlib.crc32(b"".join(whole))))) == 1
        ids = [sample.ids for group in step.groups for sample in group]
        samples = zlib.crc32(repr(ids).encode())
        yield {label: step.metrics[name] for name, label in SHOWN.items()} | {"samples": samples}


def to_text(rows: Iterable[dict]) -> str:
    rows = [{"step": number} | row for number, row in enumerate(rows, 1)]
    lines = ["".join(f"{name:>24}" for name in rows[0])]
    lines += ["".join(f"{value:24.15g}" for value in row.values()) for row in rows]
    return "\n".join(lines) + "\n"


def from_text(text: str) -> list[dict]:
    names, *rows = (line.split() for line in text.splitlines())
    rows = [dict(zip(names, map(float, row), strict=True)) for row in rows]
    return [{name: value for name, value in row.items() if name != "step"} for row in rows]


def differences(rows: list[dict], expected: list[dict]) -> list[str]:
    """Numbers further apart than TOLERANCE, relative to the expected one where that is above 1."""
    assert len(rows) == len(expected)
    return [
        f"step {number}, {name}: {row[name]!r} instead of {value!r}"
        for number, (row, wanted) in enumerate(zip(rows, expected, strict=True), 1)
        for name, value in wanted.items()
        if not abs(row[name] - value) <= TOLERANCE * max(1, abs(value))
        or (name == "samples" and row[name] != value)
    ]


if __name__ == "__main__":
    FILE.write_text(to_text(steps()))
    print(FILE.read_text(), end="")
