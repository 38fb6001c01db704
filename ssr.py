"""Self-rewarding translation, from the command line.

    python ssr.py                              # on a laptop: the embedded toy, in minutes
    python ssr.py --preset ssr-zero-7b --data texts.jsonl        # the paper's recipe, on a GPU
    python ssr.py --controls                   # the toy with other rewards, and their table
    python ssr.py --help                       # every setting

A run writes a folder: settings.json; metrics.jsonl, a row a step, the first one before any
training; samples.jsonl, the same held-out sentences at each evaluation with their scores and the
judge's words; best/ and last/, Hugging Face folders; result.json at its end.
"""

import argparse
import ast
import copy
import dataclasses
import difflib
import inspect
import itertools
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

import data
import grpo
from judge import GATES, PAPER, TOY, Judge, Reward, Task, Texts, check_reading
from kernels.advantage import BASELINES, SCALES
from model import Transformer, find_folder, load
from sampler import Sampler
from toy import controls
from toy.languages import Languages, quality
from toy.pretrain import Recipe, make
from watch import Evaluation, Problem, RunFolder, Stopper, Watch


@dataclass
class Settings(grpo.Settings):
    preset: str = ""
    """Where the other settings start: "toy", "ssr-zero-7b", "ssr-zero-0.5b". Without one: the
    paper's recipe where there are CUDA GPUs, the toy elsewhere."""
    model: str = ""
    """A Hugging Face folder or hub id (Qwen2, Qwen2.5, Qwen3, Llama 3). Toy: made on the spot."""
    data: str = ""
    """JSON lines with "text", "source" and "target", the languages' names. Toy: made up."""
    run: str = ""
    """The folder to write; it must not exist. Default: runs/PRESET-DATE-TIME."""
    prompts: str = "paper"
    """Templates: "paper" or "toy"."""
    reward: str = "self"
    """"self", or for comparison on the toy: "random", "vote", "oracle", "external",
    "self+external"."""
    judge: str = "live"
    """Whose judgement: the "live" weights (paper), the "frozen" ones of the start, their "ema"."""
    ema_decay: float = 0.98
    """Share of the EMA judge that stays at each step."""
    reading: str = "written"
    """The judge's score: as "written" (paper), or "expected" over the score tokens."""
    judge_samples: int = 1
    """Judgements of each translation, averaged."""
    judge_temperature: float = 0.0
    """At which the judge writes; 0: greedy."""
    judge_max_new_tokens: int = 1024
    """Longest judgement; one that is longer is no score."""
    gate: str = "product"
    """Format reward: "product", "zero-one" or "plus-minus-one" (see judge.py)."""
    eval_every: int = 25
    """Steps between two evaluations on held-out texts."""
    eval_prompts: int = 512
    """Held-out texts."""
    shown_prompts: int = 8
    """How many of them go to samples.jsonl, with samples_per_prompt candidates each."""
    slots: int = 256
    """Sequences that are decoded together."""
    device: str = ""
    """"cpu", "cuda"; default: a GPU if there is one."""
    threads: int = 0
    """CPU threads; 0: PyTorch's choice."""
    toy_tokens: float = 3.5e6
    """Tokens of the toy's pretraining: fewer make a judge that leads astray."""
    controls: bool = False
    """Run the toy with every other reward, and print the table."""
    seeds: str = "0,1,2"
    """Of the controls."""


CHOICES = {
    "advantage_scale": SCALES,
    "advantage_baseline": BASELINES,
    "loss_norm": ("token", "sequence"),
    "prompts": ("paper", "toy"),
    "reward": controls.REWARDS,
    "judge": ("live", "frozen", "ema"),
    "reading": ("written", "expected"),
    "gate": GATES,
}
PRESETS = {
    # The paper's model and loop; what is not public (batch, rates, lengths) is our choice.
    "ssr-zero-7b": {"model": "Qwen/Qwen2.5-7B", "eval_prompts": 256, "steps": 300},
    "ssr-zero-0.5b": {
        "model": "Qwen/Qwen2.5-0.5B", "prompts_per_step": 32, "lr": 2e-6, "max_prompt_tokens": 256,
        "max_new_tokens": 512, "judge_max_new_tokens": 512, "eval_prompts": 128,
    },
    "toy": {
        "prompts": "toy", "reading": "expected", "steps": 100, "prompts_per_step": 24, "lr": 2e-4,
        "max_prompt_tokens": 32, "max_new_tokens": 20, "judge_max_new_tokens": 2,
    },
}  # fmt: skip
REFUSED = {
    "top_p": "training needs log-probs of the whole distribution; set --temperature instead",
    "top_k": "training needs log-probs of the whole distribution; set --temperature instead",
}


# ---------------------------------------------------------------------------------- settings


def docs(kind: type) -> dict[str, str]:
    """The string under each field, of a dataclass and of the one it extends."""
    found = {}
    for cls in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(text.value.value.split())
    return found


def defaults(f: dataclasses.Field) -> str:
    own = [f"{p}: {values[f.name]}" for p, values in PRESETS.items() if f.name in values]
    usual = [] if f.default is False or f.default == "" else [str(f.default)]
    return f" [{', '.join(usual + own)}]" if usual or own else ""


def parse(words: list[str]) -> Settings:
    parser = argparse.ArgumentParser(
        prog="ssr.py", usage="python ssr.py [--option VALUE …]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
    )  # fmt: skip
    fields, help_of = dataclasses.fields(Settings), docs(Settings)
    for f in fields:
        option = {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.type is bool:
            option = {"action": argparse.BooleanOptionalAction}
        text = help_of[f.name] + defaults(f)
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=text.replace("%", "%%"), **option)
    parser.error = complain
    given, unknown = parser.parse_known_args(words)
    for word in unknown:
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        if name in REFUSED:
            raise ValueError(f"{word}: {REFUSED[name]}")
        near = difflib.get_close_matches(name, [f.name for f in fields], 1, 0.4)
        hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else ""
        raise ValueError(f"unknown option {word}{hint} (--help lists all)")
    given = vars(given)
    preset = given.get("preset") or ("ssr-zero-7b" if torch.cuda.is_available() else "toy")
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset} is unknown; known: {', '.join(PRESETS)}")
    return check(Settings(**PRESETS[preset] | given | {"preset": preset}))


def complain(message: str):
    raise ValueError(f"{message} (--help lists all options)")


def check(s: Settings) -> Settings:
    """Refuse what cannot work before anything is loaded, and say what to change."""
    for name, known in CHOICES.items():
        if getattr(s, name) not in known:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(s, name)}: use {', '.join(known)}"
            )
    least = {
        "steps": 1, "prompts_per_step": 1, "updates_per_batch": 1, "judge_samples": 1,
        "eval_every": 1, "eval_prompts": 1, "shown_prompts": 0, "slots": 1, "max_new_tokens": 1,
        "max_prompt_tokens": 1, "judge_max_new_tokens": 1, "max_bad_steps": 1, "warmup_steps": 0,
        "threads": 0,
    }  # fmt: skip
    for name, value in least.items():
        if getattr(s, name) < value:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(s, name)} must be at least {value}")
    if s.samples_per_prompt < 2:
        raise ValueError(
            f"--samples-per-prompt {s.samples_per_prompt}: a sample is compared with its siblings; "
            "use at least 2"
        )
    for name in ("lr", "max_norm", "temperature"):
        if not 0 < getattr(s, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(s, name)} must be above 0")
    for name in ("ema_decay", "final_lr", "clip_low"):
        if not 0 <= getattr(s, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(s, name)} must lie in 0 … 1")
    for name in ("kl", "weight_decay", "judge_temperature", "clip_high"):
        if not 0 <= getattr(s, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(s, name)} must not be negative")
    check_reading(s.reading, s.judge_samples, s.judge_temperature)
    longest = s.max_prompt_tokens + s.max_new_tokens
    if s.micro_batch_tokens < longest:
        raise ValueError(
            f"--micro-batch-tokens {s.micro_batch_tokens} cannot hold one sequence of "
            f"{s.max_prompt_tokens} + {s.max_new_tokens} tokens: use at least {longest}"
        )
    if s.run and not s.controls and Path(s.run).exists():
        raise ValueError(
            f"--run {s.run} exists already: name another folder, or move that one away"
        )
    if s.preset == "toy":
        if s.data:
            raise ValueError("--data: the toy makes its own sentences; use another --preset")
    elif s.reward != "self":
        raise ValueError(f"--reward {s.reward} needs the truth, which only --preset toy has")
    elif not s.data and not s.controls:
        raise ValueError(
            f'--preset {s.preset} needs --data FILE: JSON lines such as {{"text": "Good night", '
            '"source": "English", "target": "Chinese"}; or try --preset toy'
        )
    return s


def arithmetic(s: Settings) -> str:
    P, N = s.prompts_per_step, s.samples_per_prompt
    return (
        f"{s.steps} steps of {P} prompts × {N} samples = {P * N} translations, "
        f"{s.updates_per_batch} update{'s' * (s.updates_per_batch > 1)} each, at most "
        f"{s.micro_batch_tokens:,} tokens at a time\n"
        f"reward {s.reward}, judge {s.judge}, score {s.reading}, lr {s.lr:g}, KL {s.kl:g}, "
        f"seed {s.seed}"
    )


# ------------------------------------------------------------------------------ what is learned


def exact_match(candidate: str, reference: str) -> float:
    return float(candidate.split() == reference.split())


def toy_problem(s: Settings) -> Problem:
    folder = Path(s.model) if s.model else make(Recipe(seed=s.seed, tokens=s.toy_tokens))
    pair = Languages(s.seed)
    held_out = [pair.task("held-out", i) for i in range(s.eval_prompts)]
    measures = {"exact_match": exact_match, "quality": quality}
    needs_truth = s.reward not in ("self", "random", "vote")

    def task(number: int) -> Task:
        task = pair.task("train", number)
        return task if needs_truth else task._replace(reference=None)

    return Problem(folder, TOY if s.prompts == "toy" else PAPER, task, held_out, measures)


def data_problem(s: Settings) -> Problem:
    prompts, folder = TOY if s.prompts == "toy" else PAPER, find_folder(s.model)
    tasks = data.read(Path(s.data))
    texts = Texts(AutoTokenizer.from_pretrained(folder))
    lengths = [len(ids) for ids in texts.encode([prompts.ask(task) for task in tasks])]
    fit = [t for t, length in zip(tasks, lengths, strict=True) if length <= s.max_prompt_tokens]
    if len(fit) < len(tasks):
        print(
            f"{len(tasks) - len(fit)} of {len(tasks)} texts are left out: their prompts are longer "
            f"than --max-prompt-tokens {s.max_prompt_tokens}"
        )
    tasks = fit
    if len(tasks) <= s.eval_prompts:
        raise ValueError(
            f"{s.data} has {len(tasks)} usable texts, of which {s.eval_prompts} are to be held "
            "out: add texts or lower --eval-prompts"
        )
    held_out, training = data.split(tasks, s.eval_prompts, s.seed)
    return Problem(folder, prompts, data.Order(training, s.seed).task, held_out, {})


# --------------------------------------------------------------------------------------- the run


def run(s: Settings) -> None:
    torch.set_num_threads(s.threads or torch.get_num_threads())
    problem = toy_problem(s) if s.preset == "toy" else data_problem(s)
    device = torch.device(s.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load(problem.folder, dtype=torch.float32, device=device)
    tokenizer = AutoTokenizer.from_pretrained(problem.folder)
    texts, stop_ids = Texts(tokenizer), [tokenizer.eos_token_id]
    if stop_ids == [None]:
        raise ValueError(f"{problem.folder}: the tokenizer names no eos_token to end a translation")

    # On a GPU the sampler has a bf16 copy of the weights, the master weights stay fp32.
    half = device.type == "cuda"
    model.compute_dtype = torch.bfloat16 if half else None
    model.checkpointing = half

    def make_copy() -> Transformer:
        twin = copy.deepcopy(model).to(torch.bfloat16 if half else torch.float32)
        twin.compute_dtype = None
        return twin.requires_grad_(False)

    def make_sampler(weights: Transformer) -> Sampler:
        actor = s.max_prompt_tokens + s.max_new_tokens
        judge = actor + s.judge_max_new_tokens + len(problem.prompts.judge)  # a letter a token
        return Sampler(weights, s.slots, min(max(actor, judge), model.config.max_length))

    sampler = make_sampler(make_copy() if half else model)
    start = make_sampler(make_copy()) if s.track_kl or s.kl or s.judge == "frozen" else None
    judges = {"live": sampler, "frozen": start}
    if s.judge == "ema":
        judges["ema"] = make_sampler(make_copy())
    judge = Judge(
        judges[s.judge], texts, problem.prompts, s.reading, s.judge_samples, s.judge_temperature,
        s.judge_max_new_tokens, stop_ids, s.seed,
    )  # fmt: skip
    reward = Reward(texts, problem.prompts, controls.scorers(s.reward, judge, s.seed), s.gate)
    evaluation = Evaluation(problem, texts, sampler, judge, stop_ids, s)

    def batch(number: int) -> list[grpo.Prompt]:
        P = s.prompts_per_step
        tasks = [problem.task(i) for i in range((number - 1) * P, number * P)]
        encoded = texts.encode([problem.prompts.ask(task) for task in tasks])
        return [grpo.Prompt(ids, task) for ids, task in zip(encoded, tasks, strict=True)]

    folder = RunFolder(s)
    folder.check_space(model)
    print(f"{arithmetic(s)}\nwriting {folder.path}")
    optimizer = grpo.make_optimizer(model, s)
    tracked = start if s.track_kl or s.kl else None
    steps = grpo.train(model, sampler, reward, batch, s, optimizer, stop_ids, tracked)
    watch = Watch(s, folder, model, problem.folder, evaluation)
    watch.evaluate(0, {})
    with Stopper() as stopper:
        try:
            for step in steps:
                if s.judge == "ema":
                    grpo.follow(judge.sampler.model, model, s.ema_decay)
                watch.after(step, last=step.number == s.steps or stopper.asked)
                if stopper.asked:
                    print(f"stopped after step {step.number}, as asked")
                    break
        except grpo.Stop:
            watch.keep("last")
            raise
        watch.keep("last")
    watch.finish()


def compare(s: Settings) -> None:
    """The toy with every reward; options that differ from the preset's go to all runs."""
    if s.preset != "toy":
        raise ValueError("--controls needs --preset toy: only there the truth is known")
    try:
        seeds = [int(seed) for seed in s.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {s.seeds}: numbers with commas between them") from None
    usual = dataclasses.asdict(Settings(**PRESETS["toy"] | {"preset": "toy"}))
    own = {"controls", "seeds", "run", "seed", "threads", *itertools.chain(*controls.ROWS.values())}
    options = []
    for name, value in dataclasses.asdict(s).items():
        if name in own or value == usual[name]:
            continue
        option = name.replace("_", "-")
        options.append(f"--no-{option}" if value is False else f"--{option}={value}")
    if not s.model:
        for seed in seeds:
            make(Recipe(seed=seed, tokens=s.toy_tokens))
    controls.run_all(seeds, Path(s.run or "runs/controls"), options)


def main(words: list[str]) -> None:
    try:
        s = parse(words)
        chosen = f"--preset {s.preset}" if any("--preset" in w for w in words) else "no --preset"
        why = "CUDA GPUs found" if torch.cuda.is_available() else "no CUDA GPU found"
        print(f"SSR-Zero, preset {s.preset} ({chosen}; {why})")
        if s.controls:
            compare(s)
        else:
            run(s)
    except KeyboardInterrupt:
        sys.exit("\nssr.py: stopped")
    except (OSError, ValueError, FloatingPointError, RuntimeError) as error:
        sys.exit(f"ssr.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
