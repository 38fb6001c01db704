"""Our sampler beside transformers' `generate`: python -m bench sampler [SHAPE …]

The same weights, prompts, stop tokens and threads: 8 prompts x 8 samples, up to 64 new tokens,
about one token in 32 is a stop token. Tokens after a sequence's stop are waste and not counted.
Both sides take turns in one process, so that a busy machine slows both.
"""

import itertools
import statistics
import tempfile
from collections.abc import Callable
from functools import partial

import torch
import transformers

import model as ours
from bench.measure import DEVICE, DTYPE, seconds_of, take_turns
from sampler import Sampler

SHAPES = {
    "small": ours.Config("qwen2", 8_000, 256, 704, 4, 4, 2, 64, 1024, tied=True),
    "qwen2.5-0.5b": ours.Config("qwen2", 151_936, 896, 4864, 24, 14, 2, 64, 32_768, tied=True),
}
PROMPTS, SAMPLES, NEW = 8, 8, 64


# Each side: a seed -> the number of tokens that it samples.


def our_side(folder: str, prompts: list[list[int]], stop_ids: list[int]) -> Callable[[int], int]:
    model, window = ours.load(folder, device=DEVICE), max(map(len, prompts)) + NEW
    sampler = Sampler(model, PROMPTS * SAMPLES, window)

    def run(seed: int) -> int:
        groups = sampler.generate(prompts, SAMPLES, NEW, stop_ids=stop_ids, seed=seed)
        return sum(len(sample.ids) for group in groups for sample in group)

    return run


def their_side(folder: str, prompts: list[list[int]], stop_ids: list[int]) -> Callable[[int], int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    model, width = model.to(DEVICE).eval(), max(map(len, prompts))
    pads = [[0] * (width - len(p)) for p in prompts]
    ids = [pad + p for pad, p in zip(pads, prompts, strict=True)]
    mask = [pad + [1] * len(p) for pad, p in zip(pads, prompts, strict=True)]
    inputs = {
        "input_ids": torch.tensor(ids, device=DEVICE),
        "attention_mask": torch.tensor(mask, device=DEVICE),
    }
    config = transformers.GenerationConfig(
        do_sample=True, top_k=0, num_return_sequences=SAMPLES, max_new_tokens=NEW,
        eos_token_id=stop_ids, pad_token_id=0,
    )  # fmt: skip

    @torch.no_grad()
    def run(seed: int) -> int:
        torch.manual_seed(seed)
        ids = model.generate(**inputs, generation_config=config)[:, width:]
        stop = torch.isin(ids, torch.tensor(stop_ids, device=DEVICE))
        return int((stop.cumsum(1) - stop.long() == 0).sum())

    return run


def tokens_per_second(side: Callable[[int], int], seeds) -> float:
    tokens: list[int] = []
    seconds = seconds_of(lambda: tokens.append(side(next(seeds))))
    return tokens[0] / seconds


def compare(shape: str, rounds: int) -> dict:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config, draw = SHAPES[shape], torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 65, (PROMPTS,), generator=draw).tolist()
    prompts = [torch.randint(config.vocab_size, (n,), generator=draw).tolist() for n in lengths]
    stop_ids = torch.randperm(config.vocab_size, generator=draw)[::32].tolist()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        ours.save(ours.Transformer(config).to(DTYPE), folder)
        sides = {"ours": our_side, "transformers": their_side}
        turns = {
            name: partial(tokens_per_second, side(folder, prompts, stop_ids), itertools.count())
            for name, side in sides.items()
        }
        rates = take_turns(turns, rounds)
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    return {
        "shape": shape,
        **{f"{name} tokens/s": statistics.median(x) for name, x in rates.items()},
        "ratio": statistics.median(ratios),
        "ratio range": [min(ratios), max(ratios)],
    }


def run(shapes: list[str], rounds: int) -> dict:
    return {"rows": [compare(shape, rounds) for shape in shapes or SHAPES]}
