"""A whole step of GRPO, ours beside TRL's GRPOTrainer: python -m bench.step [ROW …]

Both sides load the same folder, take the same prompts in the same order, sample as many tokens, and
have the same reward function, loss (clipped, token-normalised, no KL), AdamW, learning rate and
threads. Each lives in a process of its own and takes one step when it is told to, in turn: a busy
machine slows both. Peak memory is each process's, above what it had before loading the model.

    hidden 64      2 prompts x 4 samples x 16 tokens, 2 layers, vocabulary 320
    hidden 256     4 prompts x 8 samples x 64 tokens, 4 layers, vocabulary 320
    vocabulary     the same at hidden 64 and a vocabulary of 151,936: what memory is about
    toy, truth     the toy's own model and sentences, 24 prompts x 8 samples, rewarded by the truth
    toy, self      the same, judged by itself: in our loop; theirs asks its model with `generate`

`products` is what our step's matrix products take when nothing else is run. The toy's rows also
translate 500 held-out sentences greedily (`evaluation`). `--until 0.8` trains them from the start
until so many of those are right, and prints the seconds that took.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = {  # hidden, layers, vocabulary; prompts, samples, new tokens; reward
    "hidden 64": ((64, 2, 320), (2, 4, 16), "letters"),
    "hidden 256": ((256, 4, 320), (4, 8, 64), "letters"),
    "vocabulary": ((64, 2, 151_936), (4, 8, 64), "letters"),
    "toy, truth": (None, (24, 8, 20), "truth"),
    "toy, self": (None, (24, 8, 20), "self"),
}
LR, WARMUP = 2e-4, 10
TURN = 0.5  # seconds, at least, before it is the other's turn: caches are warm again


def letters(texts: list[str], tasks: list[dict]) -> list[float]:
    """A reward that costs nothing and is seldom the same twice."""
    return [sum(letter < "n" for letter in text) / max(len(text), 1) for text in texts]


def truth(texts: list[str], tasks: list[dict]) -> list[float]:
    from toy.languages import quality

    return [quality(text, t["reference"]) for text, t in zip(texts, tasks, strict=True)]


def right(texts: list[str], tasks: list[dict]) -> float:
    return statistics.mean(
        text.split() == task["reference"].split() for text, task in zip(texts, tasks, strict=True)
    )


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def warm_up() -> None:
    """Libraries that are mapped on first use are not the step's memory."""
    import torch

    some = torch.randn(256, 256, requires_grad=True)
    torch.optim.AdamW([some], fused=True).zero_grad()
    (some @ some).softmax(-1).square().sum().backward()


def obey(answer: dict) -> str:
    """Tell the parent, wait for its next word."""
    print("BENCH " + json.dumps(answer), flush=True)
    word = sys.stdin.readline().strip()
    if not word:
        sys.exit(0)
    return word


# ------------------------------------------------------------------------------------- one side


class Ours:
    def __init__(self, folder: Path, work: dict):
        import torch
        from transformers import AutoTokenizer

        import grpo
        from judge import TOY, Judge, Judged, Reward, Task, Texts
        from model import load
        from sampler import Sampler

        torch.set_num_threads(work["threads"])
        warm_up()
        self.before = resident("VmRSS")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.texts, self.work = Texts(tokenizer), work
        self.model = load(folder, dtype=torch.float32)
        P, N, new = work["sizes"]
        room = max(len(ids) for ids in work["ids"]) + 2 * new + 8
        self.sampler = Sampler(self.model, slots=P * N, max_length=room)
        self.settings = grpo.Settings(
            steps=10_000_000, prompts_per_step=P, samples_per_prompt=N, max_new_tokens=new, lr=LR,
            warmup_steps=WARMUP, final_lr=1.0, track_kl=False,
        )  # fmt: skip
        if work["reward"] == "self":
            judge = Judge(self.sampler, self.texts, TOY, "expected")
            self_reward = Reward(self.texts, TOY, {"self": (1.0, judge)})

        def reward(tasks, groups, number):
            if work["reward"] == "self":
                known = [Task(t["text"], t["source"], t["target"]) for t in tasks]
                return self_reward(known, groups, number)
            rows = []
            for task, group in zip(tasks, groups, strict=True):
                texts = tokenizer.batch_decode([s.ids for s in group], skip_special_tokens=True)
                score = truth if work["reward"] == "truth" else letters
                values = score(texts, [task] * len(group))
                rows.append(Judged(values, {"reward": values}, texts))
            return rows

        def batch(number: int):
            which = [i % len(work["tasks"]) for i in range((number - 1) * P, number * P)]
            tasks = [work["tasks"][i] for i in which]
            return [
                grpo.Prompt(ids, task) for ids, task in zip(self.encode(tasks), tasks, strict=True)
            ]

        self.stops = [tokenizer.eos_token_id]
        optimizer = grpo.make_optimizer(self.model, self.settings)
        self.loop = grpo.train(
            self.model, self.sampler, reward, batch, self.settings, optimizer, self.stops
        )
        self.last = None

    def encode(self, tasks: list[dict]) -> list[list[int]]:
        return self.texts.encode([[task["prompt"]] for task in tasks])

    def step(self) -> dict:
        begun = time.perf_counter()
        self.last = next(self.loop)
        took = time.perf_counter() - begun
        metrics = self.last.metrics
        stages = {k.split("/")[1]: v for k, v in metrics.items() if k.startswith("seconds/")}
        return {"seconds": took, "tokens": metrics["length/mean"], "stages": stages,
                "reward": metrics["reward/total"]}  # fmt: skip

    def right(self) -> float:
        tasks = self.work["held_out"]
        found = self.sampler.generate(
            self.encode(tasks), 1, self.work["sizes"][2], 0.0, stop_ids=self.stops
        )
        texts = [self.texts.tokenizer.decode(g[0].ids, skip_special_tokens=True) for g in found]
        return right(texts, tasks)

    def products(self) -> float:
        """Seconds of a step's matrix products alone: their shapes, as a profiler saw them."""
        import torch

        factors = {"aten::mm": (0, 1), "aten::addmm": (1, 2)}  # among the operator's inputs
        with torch.profiler.profile(record_shapes=True) as seen:
            self.step()
        total = 0.0
        for event in seen.key_averages(group_by_input_shape=True):
            if event.key in factors:
                one, other = (torch.randn(event.input_shapes[i]) for i in factors[event.key])
                times = []
                for _ in range(5):
                    begun = time.perf_counter()
                    for _ in range(10):
                        one @ other
                    times.append((time.perf_counter() - begun) / 10)
                total += event.count * min(times)
        return total


def ours(folder: Path, work: dict) -> None:
    side = Ours(folder, work)
    word = obey({"ready": True})
    while True:
        begun = time.perf_counter()
        if word == "step":
            answer = side.step()
        elif word == "right":
            answer = {"right": side.right(), "seconds": time.perf_counter() - begun}
        elif word == "products":
            answer = {"products": side.products()}
        else:
            answer = {"memory": resident("VmHWM") - side.before}
        word = obey(answer)


def theirs(folder: Path, work: dict) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from trl import GRPOConfig, GRPOTrainer

    from judge import TOY, Task

    torch.set_num_threads(work["threads"])
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
    def greedy(texts: list[str], most: int, **more):
        """What `generate` gives, and how many tokens of it are the prompts'."""
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        rules = GenerationConfig(
            max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, **more,
        )  # fmt: skip
        training = model.training
        model.eval()
        out = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask,
                             generation_config=rules)  # fmt: skip
        model.train(training)
        return out, inputs.input_ids.shape[1]

    def judged(texts: list[str], tasks: list[dict]) -> list[float | None]:
        """The expected score, as in ours; None where other tokens are likelier than scores."""
        asked = [
            "".join(TOY.ask_judge(Task(t["text"], t["source"], t["target"]), x, "expected"))
            for x, t in zip(texts, tasks, strict=True)
        ]
        out, _ = greedy(asked, 1, output_scores=True, return_dict_in_generate=True)
        shares = out.scores[0].softmax(-1)[:, tokenizer.convert_tokens_to_ids(list(TOY.scores))]
        total = shares.sum(-1)
        means = (shares @ torch.tensor(list(TOY.scores.values()))) / total
        return [
            m if t >= 0.5 else None for m, t in zip(means.tolist(), total.tolist(), strict=True)
        ]

    kinds = {"letters": letters, "truth": truth, "self": judged}

    def reward(prompts, completions, completion_ids, task, **_):
        return kinds[work["reward"]](completions, task)

    class Turns(transformers.TrainerCallback):
        def __init__(self):
            self.answer = {"ready": True}

        def on_step_begin(self, *_, **__):
            while (word := obey(self.answer)) != "step":
                begun = time.perf_counter()
                if word == "right":
                    found = self.right()
                    self.answer = {"right": found, "seconds": time.perf_counter() - begun}
                else:
                    self.answer = {"memory": resident("VmHWM") - before}
            self.begun = time.perf_counter()

        def on_step_end(self, *_, **__):
            took = time.perf_counter() - self.begun
            self.answer = {"seconds": took}

        def right(self) -> float:
            tasks = work["held_out"]
            out, width = greedy([t["prompt"] for t in tasks], new)
            return right(tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), tasks)

    rows = [{"prompt": task["prompt"], "task": task} for task in work["tasks"]]
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch, use_cpu=True, bf16=False, fp16=False, max_steps=1_000_000,
            per_device_train_batch_size=P * N, num_generations=N, max_completion_length=new,
            temperature=1.0, beta=0.0, loss_type="dapo", learning_rate=LR, warmup_steps=WARMUP,
            lr_scheduler_type="constant_with_warmup", adam_beta2=0.95, max_grad_norm=1.0,
            optim="adamw_torch_fused", logging_steps=1_000_000, report_to=[], save_strategy="no",
            gradient_checkpointing=False, seed=0, shuffle_dataset=False, disable_tqdm=True,
            dataloader_pin_memory=False, use_liger_kernel=work["liger"],
        )  # fmt: skip
        GRPOTrainer(
            model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Turns()],
        ).train()  # fmt: skip


# ------------------------------------------------------------------------------------ both sides


class Side:
    """A process that takes a step when told to."""

    def __init__(self, name: str, python: str, folder: Path):
        work = json.loads((folder / "work.json").read_text())
        environment = os.environ | {"OMP_NUM_THREADS": str(work["threads"])}
        self.name, self.log = name, open(folder / f"{name}.err", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, "-m", "bench.step", "--side", name, "--work", str(folder)], cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=environment,
        )  # fmt: skip
        self.heard()

    def heard(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("BENCH "):
                return json.loads(line[6:])
        self.log.seek(0)
        sys.exit(f"{self.name} has ended:\n{self.log.read()[-3000:]}")

    def ask(self, word: str) -> dict:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.heard()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def prepare(folder: Path, shape, sizes, reward="letters", threads=1, liger=False) -> None:
    """The model's folder and work.json: what both sides read. Without a shape, the toy's."""
    import dataclasses

    import torch
    from transformers import AutoTokenizer

    from judge import TOY, Texts
    from model import Config, Transformer, save
    from tests.tiny import make_tokenizer

    if shape:
        hidden, layers, vocabulary = shape
        torch.manual_seed(0)
        config = Config(
            "qwen2", vocabulary, hidden, 2 * hidden, layers, 4, 2, hidden // 4, 1024, True
        )
        make_tokenizer(folder, size=300)
        save(Transformer(dataclasses.replace(config, hub={"eos_token_id": 0})), folder)
        tasks = [{"prompt": f"translate: the cat sat on the mat {i}"} for i in range(64)]
        held_out: list[dict] = []
    else:
        import shutil

        from toy.languages import Languages
        from toy.pretrain import Recipe, make

        shutil.copytree(make(Recipe()), folder, dirs_exist_ok=True)
        pair = Languages(0)

        def described(task) -> dict:
            return {"prompt": "".join(TOY.ask(task)), **task._asdict()}

        tasks = [described(pair.task("train", i)) for i in range(100 * sizes[0])]
        held_out = [described(pair.task("held-out", i)) for i in range(500)]
    ids = Texts(AutoTokenizer.from_pretrained(folder)).encode([[t["prompt"]] for t in tasks])
    work = {
        "sizes": sizes, "tasks": tasks, "held_out": held_out, "ids": ids, "threads": threads,
        "liger": liger, "reward": reward,
    }  # fmt: skip
    (folder / "work.json").write_text(json.dumps(work))


def compare(row: str, peer: str, pairs: int, threads: int, until: float, liger=False) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, *ROWS[row], threads, liger)
        sides = {"ours": Side("ours", sys.executable, folder)}
        if peer:
            sides["trl"] = Side("trl", peer, folder)
        times: dict[str, list[float]] = {name: [] for name in sides}
        stages: list[dict] = []
        for side in sides.values():
            side.ask("step"), side.ask("step")  # warm up
        for _ in range(
            min(pairs, 3) if row == "vocabulary" else pairs
        ):  # TRL takes most of a minute
            for name, side in sides.items():
                turn: list[dict] = []
                while sum(answer["seconds"] for answer in turn) < TURN:
                    turn.append(side.ask("step"))
                times[name].append(statistics.mean(answer["seconds"] for answer in turn))
                stages += [answer["stages"] for answer in turn if name == "ours"]
        found = {name: statistics.median(t) for name, t in times.items()}
        result = {
            "row": row, "date": str(datetime.date.today()), "threads": threads, "pairs": pairs,
            "seconds": found,
            "range": {name: [min(t), max(t)] for name, t in times.items()},
            "stages": {k: statistics.median([s[k] for s in stages]) for k in stages[0]},
            "memory": {name: side.ask("memory")["memory"] for name, side in sides.items()},
        }  # fmt: skip
        result["products"] = sides["ours"].ask("products")["products"]
        if peer:
            ratios = [t / o for o, t in zip(times["ours"], times["trl"], strict=True)]
            result["ratio"], result["ratios"] = statistics.median(ratios), sorted(ratios)
        if row.startswith("toy"):
            for _ in range(3):
                for name, side in sides.items():
                    took = side.ask("right")["seconds"]
                    result.setdefault("evaluation", {}).setdefault(name, []).append(took)
        for side in sides.values():
            side.close()
        if until and row.startswith("toy"):
            result["until"] = {"right": until, **reach(peer, folder, until)}
    return result


def reach(peer: str, folder: Path, until: float) -> dict:
    """Seconds of training, from the first step, until so many translations are right. Both begin
    anew and take five steps in turn; looking costs nothing."""
    sides = {"ours": Side("ours", sys.executable, folder)}
    if peer:
        sides["trl"] = Side("trl", peer, folder)
    found = {name: {"seconds": 0.0, "steps": 0, "curve": []} for name in sides}
    while sides:
        for name, side in list(sides.items()):
            so_far = found[name]
            so_far["curve"].append(side.ask("right")["right"])
            print(f"  {name}: {so_far['steps']} steps, {so_far['seconds']:.1f} s, "
                  f"{so_far['curve'][-1]:.3f} right", flush=True)  # fmt: skip
            if so_far["curve"][-1] >= until or so_far["steps"] >= 400:
                sides.pop(name).close()
                continue
            so_far["seconds"] += sum(side.ask("step")["seconds"] for _ in range(5))
            so_far["steps"] += 5
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument(
        "--peer", default="", help="the python that has TRL; python -m bench makes it"
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--until", type=float, default=0.0)
    parser.add_argument("--liger", action="store_true", help="with TRL's use_liger_kernel")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work = json.loads((args.work / "work.json").read_text())
        (ours if args.side == "ours" else theirs)(args.work, work)
        return
    rows = []
    for row in args.rows:
        rows.append(compare(row, args.peer, args.pairs, args.threads, args.until, args.liger))
        print(said(rows[-1]), flush=True)
    if args.out:
        kept = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
        rows = [row for row in kept if row["row"] not in args.rows] + rows
        rows.sort(key=lambda row: [*ROWS].index(row["row"]))
        args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def said(r: dict) -> str:
    text = f"{r['row']}: " + ", ".join(
        f"{name} {1e3 * seconds:.0f} ms and {r['memory'][name] / 1e6:.0f} MB"
        for name, seconds in r["seconds"].items()
    )
    if "ratio" in r:
        text += f", ratio {r['ratio']:.2f} ({r['ratios'][0]:.2f} to {r['ratios'][-1]:.2f})"
    text += f"; products alone {1e3 * r['products']:.0f} ms; of ours, ms: "
    text += ", ".join(f"{k} {1e3 * v:.0f}" for k, v in r["stages"].items())
    if "evaluation" in r:
        rates = {k: 500 / statistics.median(v) for k, v in r["evaluation"].items()}
        text += "; evaluation, translations/s: " + ", ".join(
            f"{k} {v:.0f}" for k, v in rates.items()
        )
    if "until" in r:
        text += f"; until {r['until']['right']} are right: " + ", ".join(
            f"{k} {v['seconds']:.1f} s, {v['steps']} steps"
            for k, v in r["until"].items()
            if k != "right"
        )
    return text


if __name__ == "__main__":
    main()
