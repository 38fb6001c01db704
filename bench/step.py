"""A whole step of GRPO, ours beside TRL's GRPOTrainer: python -m bench step [ROW …]

Both sides have the same weights, prompts in the same order, numbers of samples and tokens, reward,
loss (clipped, token-normalised, no KL), AdamW, learning rate and threads. In each round both run,
one after the other, in a process of their own. Peak memory is each process's, above what it had
before it loaded the model.

    hidden 64      2 prompts x 4 samples x 16 tokens, 2 layers, vocabulary 320
    hidden 256     4 prompts x 8 samples x 64 tokens, 4 layers, vocabulary 320
    vocabulary     the same at hidden 64 and a vocabulary of 151,936: what memory is about
    toy            the toy's own model and sentences, 24 prompts x 8 samples, rewarded by the truth

The toy is trained until 0.8 of 500 held-out sentences are translated right; measuring that is not
counted.
"""

import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import grpo
from bench.measure import DEVICE, call_in_new_process, resident
from data.codec import PromptCodec, load_tokenizer
from data.languages import is_plausible_translation
from judge import PLAIN, TOY, Judge, Reward, RewardOutput, Task
from model import Config, Transformer, save
from run import driver
from run.distributed import Ranks
from run.settings import RunSettings
from toy.languages import Languages, quality


def small(hidden: int, layers: int, vocabulary: int) -> Config:
    return Config(
        "qwen2", vocabulary, hidden, 2 * hidden, layers, 4, 2, hidden // 4, 1024, tied=True
    )


ROWS = {  # model; prompts, samples, new tokens; reward; steps
    "hidden 64": (small(64, 2, 320), (2, 4, 16), "letters", 100),
    "hidden 256": (small(256, 4, 320), (4, 8, 64), "letters", 12),
    "vocabulary": (small(64, 2, 151_936), (4, 8, 64), "letters", 3),
    "toy": (None, (24, 8, 20), "truth", 100),
}
LR, WARMUP = 2e-4, 10
TARGET, EVERY = 0.8, 5  # the toy's aim, measured every five steps


def letters(texts: list[str], tasks: list[dict]) -> list[float]:
    """A reward that costs nothing and seldom ties."""
    return [sum(letter < "n" for letter in text) / max(len(text), 1) for text in texts]


def truth(texts: list[str], tasks: list[dict]) -> list[float]:
    return [quality(text, t["reference"]) for text, t in zip(texts, tasks, strict=True)]


SCORES = {"letters": letters, "truth": truth}


def share_exact(texts: list[str], tasks: list[dict]) -> float:
    return statistics.mean(
        text.split() == task["reference"].split() for text, task in zip(texts, tasks, strict=True)
    )


def warm_up() -> None:
    """Libraries that are mapped on first use are not the step's memory."""
    some = torch.randn(256, 256, requires_grad=True)
    torch.optim.AdamW([some], fused=True).zero_grad()
    (some @ some).softmax(-1).square().sum().backward()


# ----------------------------------------------------------------------------------------- ours


class Ours:
    def __init__(self, folder: str, track_kl: bool = False):
        """`folder`: see `prepare`."""
        self.work = work = json.loads(Path(folder, "work.json").read_text())
        self.codec = PromptCodec(load_tokenizer(Path(folder)))
        self.stop_ids = [self.codec.tokenizer.eos_token_id]
        P, N, new = work["sizes"]
        s = RunSettings(
            steps=10_000_000, prompts_per_step=P, samples_per_prompt=N, max_new_tokens=new, lr=LR,
            warmup_steps=WARMUP, min_lr_ratio=1.0, track_kl=track_kl,
        )  # fmt: skip
        window = max(map(len, work["ids"])) + 2 * new + 8
        window += 1500 if work["reward"] == "judged letters" else 0
        policy = driver.build_policy(
            Path(folder), s, DEVICE, Ranks(), driver.SamplerRoom(window, P * N)
        )
        self.sampler = policy.sampler
        if work["reward"] == "self":
            judge = Judge(self.sampler, self.codec, TOY, "expected")
            self.self_reward = Reward(
                self.codec, TOY, {"self": (1.0, judge)}, is_translation=is_plausible_translation
            )
        self.judge = Judge(self.sampler, self.codec, PLAIN, "written", max_new_tokens=8)
        self.loop = driver.train_policy(
            policy, lambda *args: self.reward(*args), self.batch, s, self.stop_ids, Ranks()
        )

    def decode(self, groups: list[list]) -> list[list[str]]:
        decode = self.codec.tokenizer.batch_decode
        return [decode([s.ids for s in group], skip_special_tokens=True) for group in groups]

    def reward(self, tasks: list[dict], groups: list[list], number: int) -> list:
        if self.work["reward"] == "self":
            mine = [Task(t["text"], t["source"], t["target"]) for t in tasks]
            return self.self_reward(mine, groups, number)
        answers, judged = self.decode(groups), []
        if self.work["reward"] == "judged letters":  # an untrained judge costs time, and gives none
            mine = [Task(t["prompt"], "English", "German") for t in tasks]
            self.judge(mine, answers, number)
        score = SCORES[self.work["reward"].split()[-1]]
        for task, texts in zip(tasks, answers, strict=True):
            values = score(texts, [task] * len(texts))
            judged.append(RewardOutput(values, {"reward": values}, texts))
        return judged

    def batch(self, number: int) -> list[grpo.Prompt]:
        P, tasks, ids = self.work["sizes"][0], self.work["tasks"], self.work["ids"]
        indices = [i % len(tasks) for i in range((number - 1) * P, number * P)]
        return [grpo.Prompt(ids[i], tasks[i]) for i in indices]

    def step(self) -> dict:
        begun = time.perf_counter()
        metrics = next(self.loop).metrics
        seconds = time.perf_counter() - begun
        stages = {k.split("/")[1]: v for k, v in metrics.items() if k.startswith("seconds/")}
        return {"seconds": seconds, "stages": stages}

    def accuracy(self) -> float:
        tasks, new = self.work["held_out"], self.work["sizes"][2]
        ids = self.codec.encode([[task["prompt"]] for task in tasks])
        groups = self.sampler.generate(ids, 1, new, 0.0, stop_ids=self.stop_ids)
        return share_exact([text for [text] in self.decode(groups)], tasks)


def run_ours(folder: str, steps: int, until: bool) -> dict:
    torch.set_num_threads(1)
    warm_up()
    before = resident("VmRSS")
    ours, seconds, curve = Ours(folder), [], []
    while len(seconds) < steps and not (curve and curve[-1] >= TARGET):
        seconds.append(ours.step()["seconds"])
        if until and len(seconds) % EVERY == 0:
            curve.append(ours.accuracy())
    return {"seconds": seconds, "curve": curve, "memory": resident("VmHWM") - before}


# ------------------------------------------------------------------------------------------ TRL


def run_trl(folder: str, steps: int, until: bool) -> dict:
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from trl import GRPOConfig, GRPOTrainer

    work = json.loads(Path(folder, "work.json").read_text())
    torch.set_num_threads(1)
    warm_up()
    transformers.utils.logging.set_verbosity_error()
    before = resident("VmRSS")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for task, ids in zip(work["tasks"], work["ids"], strict=True):
        assert tokenizer(task["prompt"]).input_ids == ids, "other tokens than ours"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    P, N, new = work["sizes"]

    @torch.no_grad()
    def accuracy() -> float:
        tasks = work["held_out"]
        inputs = tokenizer([t["prompt"] for t in tasks], return_tensors="pt", padding=True)
        config = GenerationConfig(
            max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        was, model.training = model.training, False
        out = model.generate(**inputs, generation_config=config)[:, inputs.input_ids.shape[1] :]
        model.train(was)
        return share_exact(tokenizer.batch_decode(out, skip_special_tokens=True), tasks)

    def reward(prompts, completions, completion_ids, task, **_):
        return SCORES[work["reward"]](completions, task)

    seconds, curve = [], []

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            seconds.append(time.perf_counter() - self.begun)
            if until and len(seconds) % EVERY == 0:
                curve.append(accuracy())
                control.should_training_stop = curve[-1] >= TARGET

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
    return {"seconds": seconds, "curve": curve, "memory": resident("VmHWM") - before}


# ------------------------------------------------------------------------------------ both sides


def prepare(folder: Path, config: Config | None, sizes, reward: str) -> None:
    """The model's folder and work.json: what both sides read. Without a config, the toy's."""
    from tests.tiny import make_tokenizer
    from toy.pretrain import Recipe, language_model

    held_out: list[dict] = []
    if config:
        torch.manual_seed(0)
        make_tokenizer(folder, size=300)
        save(Transformer(dataclasses.replace(config, hub={"eos_token_id": 0})), folder)
        tasks = [{"prompt": f"translate: the cat sat on the mat {i}"} for i in range(64)]
    else:
        shutil.copytree(language_model(Recipe()), folder, dirs_exist_ok=True)
        pair = Languages(0)
        tasks, held_out = (
            [t._asdict() | {"prompt": "".join(TOY.ask(t))} for t in sentences]
            for sentences in (
                [pair.task("train", i) for i in range(100 * sizes[0])],
                [pair.task("held-out", i) for i in range(500)],
            )
        )
    ids = PromptCodec(load_tokenizer(folder)).encode([[t["prompt"]] for t in tasks])
    work = {"sizes": sizes, "tasks": tasks, "held_out": held_out, "ids": ids, "reward": reward}
    (folder / "work.json").write_text(json.dumps(work))


def compare(row: str, peer: str, rounds: int) -> dict:
    config, sizes, reward, steps = ROWS[row]
    env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
           "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    sides = {"ours": (run_ours, sys.executable)} | ({"trl": (run_trl, peer)} if peer else {})
    results: dict[str, list[dict]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), config, sizes, reward)
        for number in range(1, rounds + 1):
            for name, (function, python) in sides.items():
                result = call_in_new_process(
                    function, folder, steps, row == "toy", python=python, env=env
                )
                result["step"] = statistics.median(result["seconds"][1:])  # the first warms up
                results[name].append(result)
                print(f"  {row}, round {number}: {name} {result['step']:.4g} s", flush=True)
    middle = {name: statistics.median(r["step"] for r in x) for name, x in results.items()}
    memory = {name: max(r["memory"] for r in x) for name, x in results.items()}
    outcome: dict = {"row": row, "rounds": rounds, "seconds": middle, "memory": memory}
    if peer:
        ratios = [t["step"] / o["step"] for o, t in zip(*results.values(), strict=True)]
        outcome |= {"ratio": statistics.median(ratios), "ratios": sorted(ratios)}
    if row == "toy":
        outcome["until"] = {
            name: {"seconds": statistics.median(sum(r["seconds"]) for r in x),
                   "steps": len(x[0]["seconds"]), "curve": x[0]["curve"]}
            for name, x in results.items()
        }  # fmt: skip
    return outcome


def run(rows: list[str], rounds: int, peer: str = "") -> dict:
    """`peer`: the Python that has TRL."""
    return {"rows": [compare(row, peer, rounds) for row in rows or ROWS]}
