"""A whole step of GRPO, ours beside TRL's GRPOTrainer: python -m bench step [ROW …]

Both sides have the same weights, prompts in the same order, numbers of samples and tokens, reward,
loss (clipped, token-normalised, no KL), AdamW, learning rate and threads. In each round both run,
one after the other, each in a process of its own. Peak memory is above what the process had before
it loaded the model. The mean reward of the last steps shows that both learn alike.

    hidden 64      2 prompts x 4 samples x 16 tokens, 2 layers, vocabulary 320
    hidden 256     4 prompts x 8 samples x 64 tokens, 4 layers, vocabulary 320
    vocabulary     the same at hidden 64 and a vocabulary of 151,936: what memory is about
    toy            the toy's own model and sentences, 24 prompts x 8 samples, rewarded by the truth
"""

import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import grpo
from bench.measure import DEVICE, PEER, call_in_new_process, peak_bytes
from data.codec import PromptCodec, load_tokenizer
from judge import PLAIN, TOY, Judge, RewardOutput, Task
from model import Config, Transformer, save
from run import driver
from run.distributed import Ranks
from run.settings import RunSettings
from toy.languages import Languages, quality


def small(hidden: int, layers: int, vocabulary: int) -> Config:
    return Config(
        "qwen2", vocabulary, hidden, 2 * hidden, layers, 4, 2, hidden // 4, 1024, tied=True
    )


ROWS = {  # model, or the toy's; prompts, samples, new tokens; steps
    "hidden 64": (small(64, 2, 320), (2, 4, 16), 100),
    "hidden 256": (small(256, 4, 320), (4, 8, 64), 12),
    "vocabulary": (small(64, 2, 151_936), (4, 8, 64), 3),
    "toy": (None, (24, 8, 20), 30),
}
LR, WARMUP = 2e-4, 10
ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
       "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


def score(text: str, task: dict) -> float:
    """The truth, where there is one; else what costs nothing and seldom ties."""
    if "reference" in task:
        return quality(text, task["reference"])
    return sum(letter < "n" for letter in text) / max(len(text), 1)


def prepare(folder: Path, config: Config | None, sizes: tuple[int, int, int]) -> None:
    """The model's folder and work.json: what both sides read. Without a config, the toy's."""
    from tests.tiny import make_tokenizer
    from toy.pretrain import Recipe, language_model

    if config:
        torch.manual_seed(0)
        make_tokenizer(folder, size=300)
        save(Transformer(dataclasses.replace(config, hub={"eos_token_id": 0})), folder)
        tasks = [{"prompt": f"translate: the cat sat on the mat {i}"} for i in range(64)]
    else:
        shutil.copytree(language_model(Recipe()), folder, dirs_exist_ok=True)
        sentences = [Languages(0).task("train", i) for i in range(100 * sizes[0])]
        tasks = [t._asdict() | {"prompt": "".join(TOY.ask(t))} for t in sentences]
    ids = PromptCodec(load_tokenizer(folder)).encode([[t["prompt"]] for t in tasks])
    (folder / "work.json").write_text(json.dumps({"sizes": sizes, "tasks": tasks, "ids": ids}))


# Each side: the folder and a number of steps -> seconds and mean reward of each step.


def our_steps(folder: str, steps: int, judge_room: int = 0) -> Iterator[tuple[float, dict]]:
    """Seconds and metrics. With `judge_room`, the tokens of its prompt and answer beyond ours, the
    judge is asked, which costs time, and ignored: an untrained one gives no scores. The KL is then
    tracked, too."""
    work = json.loads(Path(folder, "work.json").read_text())
    codec, (P, N, new) = PromptCodec(load_tokenizer(Path(folder))), work["sizes"]
    s = RunSettings(
        steps=steps, prompts_per_step=P, samples_per_prompt=N, max_new_tokens=new, lr=LR,
        warmup_steps=WARMUP, min_lr_ratio=1.0, track_kl=judge_room > 0,
    )  # fmt: skip
    window = max(map(len, work["ids"])) + new + judge_room
    policy = driver.build_policy(Path(folder), s, DEVICE, Ranks(), P * N, window)
    judge = Judge(policy.sampler, codec, PLAIN, "written", max_new_tokens=8)

    def reward(tasks: list[dict], groups: list[list], number: int) -> list[RewardOutput]:
        decode = codec.tokenizer.batch_decode
        answers = [decode([x.ids for x in group], skip_special_tokens=True) for group in groups]
        if judge_room:
            judge([Task(t["prompt"], "English", "German") for t in tasks], answers, number)
        both = zip(tasks, answers, strict=True)
        rows = [([score(text, task) for text in texts], texts) for task, texts in both]
        return [RewardOutput(values, {"reward": values}, texts) for values, texts in rows]

    def batch(number: int) -> list[grpo.Prompt]:
        indices = [i % len(work["ids"]) for i in range((number - 1) * P, number * P)]
        return [grpo.Prompt(work["ids"][i], work["tasks"][i]) for i in indices]

    loop = driver.train_policy(policy, reward, batch, s, [codec.tokenizer.eos_token_id], Ranks())
    begun = time.perf_counter()
    for step in loop:
        yield time.perf_counter() - begun, step.metrics
        begun = time.perf_counter()


def run_ours(folder: str, steps: int) -> list[tuple[float, float]]:
    return [(seconds, metrics["reward/total"]) for seconds, metrics in our_steps(folder, steps)]


def run_trl(folder: str, steps: int) -> list[tuple[float, float]]:
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    transformers.utils.logging.set_verbosity_error()
    work = json.loads(Path(folder, "work.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for task, ids in zip(work["tasks"], work["ids"], strict=True):
        assert tokenizer(task["prompt"]).input_ids == ids, "other tokens than ours"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    P, N, new = work["sizes"]
    seconds, rewards = [], []

    def reward(prompts, completions, completion_ids, task, **_):
        values = [score(text, one) for text, one in zip(completions, task, strict=True)]
        rewards.append(statistics.mean(values))
        return values

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.begun = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.begun)

    rows = [{"prompt": task["prompt"], "task": task} for task in work["tasks"]]
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch, use_cpu=True, bf16=False, fp16=False, max_steps=steps,
            per_device_train_batch_size=P * N, num_generations=N, max_completion_length=new,
            temperature=1.0, beta=0.0, loss_type="dapo", learning_rate=LR, warmup_steps=WARMUP,
            lr_scheduler_type="constant_with_warmup", adam_beta2=0.95, max_grad_norm=1.0,
            optim="adamw_torch_fused", logging_steps=1_000_000, report_to=[], save_strategy="no",
            gradient_checkpointing=False, seed=0, shuffle_dataset=False, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        GRPOTrainer(
            model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Timer()],
        ).train()  # fmt: skip
    return list(zip(seconds, rewards, strict=True))


def measure(side: str, folder: str, steps: int) -> dict:
    """In a process of its own."""
    torch.set_num_threads(1)
    # Libraries that are mapped on first use are not the step's memory.
    some = torch.randn(256, 256, requires_grad=True)
    torch.optim.AdamW([some], fused=True).zero_grad()
    (some @ some).softmax(-1).square().sum().backward()
    run, rows = {"ours": run_ours, "trl": run_trl}[side], []
    memory = peak_bytes(lambda: rows.extend(run(folder, steps)))
    seconds, rewards = zip(*rows, strict=True)
    return {
        "ms": 1e3 * statistics.median(seconds[1:]),  # the first warms up
        "MB": memory / 1e6,
        "reward": statistics.mean(rewards[-5:]),
    }


def compare(row: str, rounds: int) -> dict:
    config, sizes, steps = ROWS[row]
    sides = {"ours": sys.executable} | ({"trl": str(PEER)} if PEER.exists() else {})
    results: dict[str, list[dict]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), config, sizes)
        for number in range(1, rounds + 1):
            for name, python in sides.items():
                one = call_in_new_process(measure, name, folder, steps, python=python, env=ENV)
                results[name].append(one)
                print(f"  {row}, round {number}: {name} {one}", flush=True)
    outcome: dict = {"row": row, "rounds": rounds}
    for name, values in results.items():
        outcome[name] = {key: statistics.median(x[key] for x in values) for key in values[0]}
    if "trl" in sides:
        ratios = [trl["ms"] / ours["ms"] for ours, trl in zip(*results.values(), strict=True)]
        outcome |= {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    return outcome


def run(rows: list[str], rounds: int) -> dict:
    return {"rows": [compare(row, rounds) for row in rows or ROWS]}
