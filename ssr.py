"""Self-rewarding translation, from the command line.

    python ssr.py                              # on a laptop: the embedded toy, in minutes
    python ssr.py --preset ssr-zero-7b --data texts.jsonl        # the paper's recipe
    torchrun --nproc_per_node=8 ssr.py --preset ssr-zero-7b --data texts.jsonl   # on eight GPUs
    python ssr.py --resume --folder runs/mine  # go on from the newest checkpoint, if there is one
    python ssr.py --dry-run --preset ssr-zero-7b --gpus 8        # does it fit, how long is a step
    python ssr.py --controls                   # the toy with other rewards, and their table
    python ssr.py --help                       # every setting

A run writes a folder: settings.json; metrics.jsonl, a row a step, the first one before any
training; samples.jsonl, the same held-out sentences at each evaluation with their scores and the
judge's words; checkpoints/; best/ and last/, Hugging Face folders; result.json at its end.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import math
import os
import signal
import sys
import textwrap
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

import data
import grpo
import plan
from checkpoint import Checkpoints, fingerprint, tensors_of
from judge import GATES, PAPER, TOY, Judge, Reward, Task, Texts, check_reading
from kernels.advantage import BASELINES, SCALES
from model import Transformer, find_folder, load, read_config
from ranks import Ranks, Stopping, follow, is_lost, join, leave
from sampler import Sampler
from toy import controls
from toy.languages import Languages, quality
from toy.pretrain import Recipe, make, make_tokenizer, shape_of
from watch import Evaluation, Problem, Stopper, Watch, commit, launcher


@dataclass
class Settings(grpo.Settings):
    preset: str = ""
    """Where the other settings start: "toy", "ssr-zero-7b", "ssr-zero-0.5b". Without one: the
    paper's recipe where there are CUDA GPUs, the toy elsewhere."""
    model: str = ""
    """A Hugging Face folder or hub id (Qwen2, Qwen2.5, Qwen3, Llama 3). Toy: made on the spot."""
    data: str = ""
    """JSON lines with "text", "source" and "target", the languages' names. Toy: made up."""
    folder: str = ""
    """The folder to write; it must not exist. Default: runs/PRESET-DATE-TIME."""
    resume: bool = False
    """Go on from the newest whole checkpoint in --folder (default: the preset's newest run), or
    from the beginning when there is none; with that run's settings, where no others are given."""
    save_every: int = 25
    """Steps between two checkpoints."""
    keep: int = 2
    """How many checkpoints to keep."""
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
    shard: str = "all"
    """Weights and optimizer are spread over "all" ranks, or over those of a "node", each node with
    all of them: less to send between nodes, more memory."""
    patience: float = 1800.0
    """Seconds that ranks wait for one that makes no progress before the run is ended."""
    toy_tokens: float = 3.5e6
    """Tokens of the toy's pretraining: fewer make a judge that leads astray."""
    dry_run: bool = False
    """Say what memory and time the run would take, and end."""
    gpus: int = 0
    """Of a --dry-run; with --shard node 8 on each node. 0: those of this machine, or 8."""
    gpu: str = ""
    """Of a --dry-run: "a100", "h100", "h200", "b200", "rtx4090", or four numbers with commas (GB,
    dense bf16 TFLOP/s, TB/s of its memory, GB/s to the others). Default: this machine's, measured,
    else "h100"."""
    controls: bool = False
    """Run the toy with every other reward, and print the table."""
    seeds: str = "0,1,2"
    """Of the controls."""


TEMPLATES = {"paper": PAPER, "toy": TOY}
CHOICES = {
    "advantage_scale": SCALES,
    "advantage_baseline": BASELINES,
    "loss_norm": ("token", "sequence"),
    "prompts": tuple(TEMPLATES),
    "reward": controls.REWARDS,
    "judge": ("live", "frozen", "ema"),
    "reading": ("written", "expected"),
    "gate": GATES,
    "shard": ("all", "node"),
}
PRESETS = {
    # The paper's model and loop; what is not public (batch, rates, lengths) is our choice.
    # Slots and micro-batches: so that it fits on 8 GPUs of 80 GB (see --dry-run).
    "ssr-zero-7b": {
        "model": "Qwen/Qwen2.5-7B", "eval_prompts": 256, "steps": 300, "slots": 64,
        "micro_batch_tokens": 8192,
    },
    "ssr-zero-0.5b": {
        "model": "Qwen/Qwen2.5-0.5B", "prompts_per_step": 32, "lr": 2e-6, "max_prompt_tokens": 256,
        "max_new_tokens": 512, "judge_max_new_tokens": 512, "eval_prompts": 128,
    },
    # One thread is enough for so small a model, and gives the same numbers on any number of cores.
    "toy": {
        "prompts": "toy", "reading": "expected", "steps": 100, "prompts_per_step": 24, "lr": 2e-4,
        "max_prompt_tokens": 32, "max_new_tokens": 20, "judge_max_new_tokens": 2, "threads": 1,
    },
}  # fmt: skip
BOUNDS = [  # what must hold of the settings named, and how a refusal says it
    (lambda v: v >= 1, "must be at least 1",
     "steps prompts_per_step updates_per_batch judge_samples eval_every eval_prompts slots "
     "max_new_tokens max_prompt_tokens judge_max_new_tokens max_bad_steps save_every keep"),
    (lambda v: v >= 0, "must be at least 0", "shown_prompts warmup_steps threads gpus"),
    (lambda v: 0 < v < math.inf, "must be above 0", "lr max_norm patience"),
    (lambda v: 1e-4 < v < math.inf, "must be above 0.0001", "temperature"),
    (lambda v: 1e3 < v < math.inf, "must be above 1000", "toy_tokens"),
    (lambda v: 0 <= v <= 1, "must lie in 0 … 1", "ema_decay final_lr clip_low"),
    (lambda v: 0 <= v < math.inf, "must not be negative",
     "kl weight_decay judge_temperature clip_high"),
    (lambda v: v == 0 or v >= 1e-4, "must be 0 or above 0.0001", "judge_temperature"),
]  # fmt: skip
# A run may go on with other values of these: they change no step, or only those to come.
FREE = (
    "folder resume save_every keep eval_every shown_prompts slots micro_batch_tokens device "
    "threads shard patience max_bad_steps steps gpus gpu"
)
REFUSED = {
    "top_p": "training needs log-probs of the whole distribution; set --temperature instead",
    "top_k": "training needs log-probs of the whole distribution; set --temperature instead",
}


# ---------------------------------------------------------------------------------- settings


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
        kind = {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        text = help_of[f.name] + defaults(f)
        parser.add_argument(option(f.name), help=text.replace("%", "%%"), **kind)
    parser.error = refuse
    given, unknown = parser.parse_known_args(words)
    for word in unknown:
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        if name in REFUSED:
            raise ValueError(f"{word}: {REFUSED[name]}")
        near = difflib.get_close_matches(name, [f.name for f in fields], 1, 0.4)
        hint = f"; did you mean {option(near[0])}?" if near else ""
        raise ValueError(f"unknown option {word}{hint} (--help lists all)")
    given = vars(given)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        given["resume"] = True  # torchrun started the ranks again
    small = given.get("controls") or not torch.cuda.is_available()
    preset = given.get("preset") or ("toy" if small else "ssr-zero-7b")
    had = remembered(given, preset) if given.get("resume") else {}
    preset = given.get("preset") or had.get("preset") or preset
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset} is unknown; known: {', '.join(PRESETS)}")
    return check(Settings(**PRESETS[preset] | had | given | {"preset": preset}))


def remembered(given: dict, preset: str) -> dict:
    """The settings of the run that goes on."""
    folder = given.get("folder") or folder_of(preset, "", True)
    try:
        had = json.loads((Path(folder) / "settings.json").read_text())
    except FileNotFoundError:
        return {}  # no run yet: it begins
    except ValueError as error:
        raise ValueError(f"{folder}/settings.json is not JSON ({error})") from None
    names = {f.name for f in dataclasses.fields(Settings)} - {"folder", "resume", "dry_run"}
    return {name: had[name] for name in names & had.keys()}


def refuse(message: str):
    raise ValueError(f"{message} (--help lists all options)")


def ranks_here() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def check(s: Settings) -> Settings:
    """Refuse what cannot work before anything is loaded, and say what to change."""
    for name, known in CHOICES.items():
        if getattr(s, name) not in known:
            raise ValueError(f"{option(name)} {getattr(s, name)}: use {', '.join(known)}")
    for holds, words, names in BOUNDS:
        for name in names.split():
            if not holds(getattr(s, name)):
                raise ValueError(f"{option(name)} {getattr(s, name)} {words}")
    if s.samples_per_prompt < 2:
        raise ValueError(
            f"--samples-per-prompt {s.samples_per_prompt}: a sample is compared with its siblings; "
            "use at least 2"
        )
    try:
        known_device = not s.device or torch.device(s.device).type in ("cpu", "cuda")
    except RuntimeError:
        known_device = False
    if not known_device or (s.device.startswith("cuda") and not torch.cuda.is_available()):
        raise ValueError(f"--device {s.device} is not there: use cpu, or cuda where there is one")
    check_reading(s.reading, s.judge_samples, s.judge_temperature)
    if s.data and not Path(s.data).is_file():
        raise ValueError(f"--data {s.data}: there is no such file")
    longest = s.max_prompt_tokens + s.max_new_tokens
    if s.micro_batch_tokens < longest:
        raise ValueError(
            f"--micro-batch-tokens {s.micro_batch_tokens} cannot hold one sequence of "
            f"{s.max_prompt_tokens} + {s.max_new_tokens} tokens: use at least {longest}"
        )
    if s.folder and not s.controls and Path(s.folder).exists():
        if not s.resume:
            raise ValueError(
                f"--folder {s.folder} exists already: go on with --resume, name another folder, or "
                "move that one away"
            )
        if not (Path(s.folder) / "settings.json").is_file():
            raise ValueError(
                f"--folder {s.folder} is not the folder of a run: it has no settings.json"
            )
    if s.controls and (s.resume or ranks_here() > 1):
        raise ValueError("--controls starts its own runs, and skips those that are done: leave out "
                         "--resume and torchrun")  # fmt: skip
    if s.controls and s.preset != "toy":
        raise ValueError("--controls needs --preset toy: only there the truth is known")
    if s.preset == "toy":
        if s.data:
            raise ValueError("--data: the toy makes its own sentences; use another --preset")
    elif s.reward != "self":
        raise ValueError(f"--reward {s.reward} needs the truth, which only --preset toy has")
    elif not s.data and not s.dry_run:
        raise ValueError(
            f'--preset {s.preset} needs --data FILE: JSON lines such as {{"text": "Good night", '
            '"source": "English", "target": "Chinese"}; or try --preset toy'
        )
    return s


def agree(ranks: Ranks, values: dict) -> None:
    """One command line on every node, and the same files behind it."""
    first, *others = ranks.gather(values)
    for rank, theirs in enumerate(others, 1):
        for name in values:
            if theirs[name] != first[name]:
                raise ValueError(
                    f"the ranks disagree on {name}: rank 0 has {first[name]!r}, rank {rank} "
                    f"{theirs[name]!r}; start all nodes with the same command, files and code"
                )


def arithmetic(s: Settings) -> str:
    P, N, R = s.prompts_per_step, s.samples_per_prompt, ranks_here()
    share = f", on {R} ranks {P // R}{f' or {P // R + 1}' * (P % R > 0)} prompts each" * (R > 1)
    return (
        f"{s.steps} steps of {P} prompts × {N} samples = {P * N} translations{share}, "
        f"{s.updates_per_batch} update{'s' * (s.updates_per_batch > 1)} each, at most "
        f"{s.micro_batch_tokens:,} tokens at a time\n"
        f"reward {s.reward}, judge {s.judge}, score {s.reading}, lr {s.lr:g}, KL {s.kl:g}, "
        f"seed {s.seed}" + (f", model {s.model}" if s.model else "")
    )


# ------------------------------------------------------------------------------ what is learned


def exact_match(candidate: str, reference: str) -> float:
    return float(candidate.split() == reference.split())


def toy_problem(s: Settings, ranks: Ranks) -> Problem:
    recipe = Recipe(seed=s.seed, tokens=s.toy_tokens)
    folder = Path(s.model) if s.model else ranks.one_first("make the toy", lambda: make(recipe))
    pair = Languages(s.seed)
    known = load_tokenizer(folder).get_vocab().keys()
    if foreign := {word for words in pair.vocabulary.values() for word in words} - known:
        raise ValueError(
            f"--model {folder} was not made for --seed {s.seed}: its tokenizer does not know "
            f"{', '.join(sorted(foreign)[:3])} …"
        )
    held_out = [pair.task("held-out", i) for i in range(s.eval_prompts)]
    measures = {"exact_match": exact_match, "quality": quality}
    needs_truth = s.reward not in ("self", "random", "vote")

    def task(number: int) -> Task:
        task = pair.task("train", number)
        return task if needs_truth else task._replace(reference=None)

    return Problem(folder, TEMPLATES[s.prompts], task, held_out, measures, f"toy {s.seed}")


def data_problem(s: Settings, ranks: Ranks) -> Problem:
    tasks = data.read(Path(s.data))
    folder = ranks.one_first("fetch the model", lambda: find_folder(s.model))
    prompts = TEMPLATES[s.prompts]
    read_config(folder)  # the first to say that a folder is no model's
    lengths = map(len, Texts(load_tokenizer(folder)).encode([prompts.ask(t) for t in tasks]))
    fit = [t for t, length in zip(tasks, lengths, strict=True) if length <= s.max_prompt_tokens]
    if len(fit) <= s.eval_prompts:
        raise ValueError(
            f"{s.data} has {len(tasks)} texts, {len(fit)} of them within --max-prompt-tokens "
            f"{s.max_prompt_tokens}, and {s.eval_prompts} are to be held out: add texts, or lower "
            "--eval-prompts"
        )
    held_out, training = data.split(fit, s.eval_prompts, s.seed)
    print(
        f"{len(tasks)} texts: {len(tasks) - len(fit)} left out, longer than --max-prompt-tokens "
        f"{s.max_prompt_tokens}; {len(held_out)} held out, and "
        f"{len(fit) - len(held_out) - len(training)} that say the same; {len(training)} to train on"
    )
    digest = hashlib.sha256(Path(s.data).read_bytes()).hexdigest()[:16]
    return Problem(folder, prompts, data.Order(training, s.seed).task, held_out, {}, digest)


def load_tokenizer(folder: Path):
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever its parsers raise: the file is to blame
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder}: no tokenizer could be read there ({first})") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer names no eos_token to end a translation")
    return tokenizer


# --------------------------------------------------------------------------------------- the run


def run(s: Settings) -> None:
    device = torch.device(s.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ranks = join(device.type, s.patience, s.shard == "node")
    agree(ranks, {option(name): value for name, value in dataclasses.asdict(s).items()})
    agree(ranks, {"the code": commit(), "PyTorch": torch.__version__})
    if device.type == "cuda" and ranks.size > 1:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(s.threads or torch.get_num_threads())
    problem = toy_problem(s, ranks) if s.preset == "toy" else data_problem(s, ranks)

    ranks.at("load the model")
    per_node, cuda = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), device.type == "cuda"
    shared = per_node if s.shard == "node" else ranks.size
    config = read_config(problem.folder)
    work = plan.Work(s, config, ranks.size, shared, judge_template(s), cuda)
    plan.check_room(work, device, 1 if cuda else per_node)
    model = load(problem.folder, dtype=torch.float32, device=device, shard=ranks.shard)
    texts = Texts(load_tokenizer(problem.folder))
    window = window_of(s, problem, texts, config.max_length)
    learn(s, ranks, problem, texts, model, *samplers(s, model, window, device, work.slots))


def learn(
    s: Settings, ranks: Ranks, problem: Problem, texts: Texts, model: Transformer,
    sampler: Sampler, start: Sampler | None, judging: Sampler, average: list,
) -> None:  # fmt: skip
    stop_ids = [texts.tokenizer.eos_token_id]
    judge = Judge(
        judging, texts, problem.prompts, s.reading, s.judge_samples, s.judge_temperature,
        s.judge_max_new_tokens, stop_ids, s.seed,
    )  # fmt: skip
    reward = Reward(texts, problem.prompts, controls.scorers(s.reward, judge, s.seed), s.gate)
    held_out = asked(s, problem, texts, problem.held_out)
    evaluation = Evaluation(problem, held_out, texts, sampler, judge, stop_ids, s, ranks)
    optimizer = grpo.make_optimizer(model, s)

    def batch(number: int) -> list[grpo.Prompt]:
        P = s.prompts_per_step
        tasks = [problem.task(i) for i in range((number - 1) * P, number * P)]
        return asked(s, problem, texts, tasks)

    path = ranks.on_first("name the run", lambda: folder_of(s.preset, s.folder, s.resume))
    identity = identity_of(problem, model)
    agree(ranks, {f"the {name}": value for name, value in identity.items()})
    identity["settings"] = dataclasses.asdict(s)
    tensors = tensors_of(model, optimizer, average)
    kept = Checkpoints(path / "checkpoints", s.keep, ranks, tensors, identity, FREE)
    watch = Watch(s, path, sampler.model, problem.folder, evaluation, kept, ranks)
    tracked = start if s.track_kl or s.kl else None
    with Stopper(ranks), contextlib.closing(watch.folder):
        try:
            done = watch.restore() if s.resume else None  # the last step of the run that goes on
            grpo.refresh(sampler, model)
            if average:
                follow(judging.model.parameters(), average)
            after = f", after step {done.number}" if done else ""
            print(f"{arithmetic(s)}\nwriting {path}{after}")
            watch.begin(done)
            for step in grpo.train(
                model, sampler, reward, batch, s, optimizer, stop_ids, tracked, ranks, done
            ):
                if average:
                    follow(average, model.parameters(), s.ema_decay)
                    follow(judging.model.parameters(), average)
                watch.after(step)
        except Stopping:
            watch.stop()
        except grpo.Stop:
            watch.give_up()
            raise
        else:
            watch.finish()


def asked(s: Settings, problem: Problem, texts: Texts, tasks: list[Task]) -> list[grpo.Prompt]:
    encoded = texts.encode([problem.prompts.ask(task) for task in tasks])
    if (longest := max(map(len, encoded))) > s.max_prompt_tokens:
        raise ValueError(
            f"a prompt has {longest} tokens: --max-prompt-tokens {s.max_prompt_tokens} must be at "
            "least that"
        )
    return [grpo.Prompt(ids, task) for ids, task in zip(encoded, tasks, strict=True)]


def identity_of(problem: Problem, model: Transformer) -> dict:
    """What must be the same on all ranks, and when a run goes on; except its settings."""
    shape = {k: v for k, v in dataclasses.asdict(model.config).items() if k != "hub"}
    return {"model": shape, "weights": fingerprint(problem.folder), "texts": problem.digest}


def folder_of(preset: str, folder: str, resume: bool) -> Path:
    """Of a new run; of the one that goes on; of the one whose ranks torchrun has started again."""
    if folder:
        return Path(folder)
    runs = sorted(Path("runs").glob(f"{preset}-[0-9]*-[0-9]*/settings.json"), reverse=True)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        by = [json.loads(file.read_text())["about"].get("launcher") for file in runs]
        runs = [file for file, who in zip(runs, by, strict=True) if who == launcher()]
    if resume and runs:
        return runs[0].parent
    return Path(f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}")


def samplers(
    s: Settings, model: Transformer, window: int, device: torch.device, slots: int
) -> tuple:
    """Of the actor, of the starting weights (or None), of the judge; and the EMA's weights."""
    # On a GPU the samplers have bf16 copies of the weights, the master weights stay fp32.
    half = torch.bfloat16 if device.type == "cuda" else None
    model.compute_dtype, model.checkpointing = half, half is not None

    def copied() -> Transformer:
        with torch.device("meta"):
            twin = Transformer(model.config)
        twin = twin.to(half or torch.float32).to_empty(device=device).requires_grad_(False)
        follow(twin.parameters(), model.parameters())
        return twin

    alone = half is None and ranks_here() == 1  # whole weights, in the samplers' type
    actor = Sampler(model if alone else copied(), slots, window)
    start, average = None, []
    if s.track_kl or s.kl or s.judge == "frozen":
        writes = s.judge == "frozen" and s.reading == "written"
        start = Sampler(copied(), slots if writes else 1, window)  # to read takes one slot
    judge = start if s.judge == "frozen" else actor
    if (
        s.judge == "ema"
    ):  # fp32, spread like the weights: in bf16 a step of it would be rounded away
        average = [p.detach().clone() for p in model.parameters()]
        judge = Sampler(copied(), slots, window)
    return actor, start, judge, average


def window_of(s: Settings, problem: Problem, texts: Texts, positions: int) -> int:
    """Room for a prompt and its candidate, and for both in the judge's prompt and its words."""
    task = problem.held_out[0]._replace(text="")
    template = len(texts.encode([problem.prompts.ask_judge(task, "", s.reading)])[0])
    words = s.judge_max_new_tokens if s.reading == "written" else 1
    needed = template + s.max_prompt_tokens + s.max_new_tokens + words
    if needed > positions:
        raise ValueError(
            f"the judge needs room for {needed} tokens ({template} of the template, source, "
            f"candidate, {words} of its own), the model has {positions}: lower "
            "--max-prompt-tokens, --max-new-tokens or --judge-max-new-tokens"
        )
    return min(needed + 64, positions)  # a text may take more tokens than the model wrote it with


def judge_template(s: Settings) -> int:
    """Its tokens, about: four characters each, or (toy) a word."""
    task = Task("", "English", "Chinese")
    text = "".join(TEMPLATES[s.prompts].ask_judge(task, "", s.reading))
    return len(text.split()) if s.prompts == "toy" else len(text) // 4


def dry_run(s: Settings) -> None:
    here = torch.cuda.is_available() and s.device != "cpu"
    cuda = here or bool(s.gpu) or (s.preset != "toy" and s.device != "cpu")
    device = torch.device("cuda" if here else "cpu")
    machine = plan.machine_of(s.gpu or ("h100" if cuda and not here else ""), device)
    if s.preset == "toy" and not s.model:
        recipe = Recipe(seed=s.seed)
        name, config = "the toy", shape_of(recipe, make_tokenizer(Languages(s.seed)))
    else:
        name, config = s.model, plan.shape_of(s.model)
    G = s.gpus or (torch.cuda.device_count() if here else 8 if cuda else 1)
    shared = min(G, 8) if s.shard == "node" else G
    work = plan.Work(s, config, G, shared, judge_template(s), cuda)
    print(plan.report(work, machine, name))
    if plan.missing(work, machine) > 0:
        sys.exit(1)


def compare(s: Settings) -> None:
    """The toy with every reward; options that differ from the preset's go to all runs."""
    usual = dataclasses.asdict(Settings(**PRESETS["toy"] | {"preset": "toy"}))
    changed = {k: v for k, v in dataclasses.asdict(s).items() if v != usual[k]}
    for name in ("seed", "threads", "data", *itertools.chain(*controls.ROWS.values())):
        if name in changed:
            raise ValueError(f"--controls sets --{name} itself: leave it out (see also --seeds)")
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in s.seeds.split(",")))
    except ValueError:
        raise ValueError(f"--seeds {s.seeds}: numbers with commas between them") from None
    own = {k: v for k, v in changed.items() if k not in ("controls", "seeds", "folder")}
    torch.set_num_threads(s.threads)
    if not s.model:
        for seed in seeds:
            make(Recipe(seed=seed, tokens=s.toy_tokens))
    controls.run_all(seeds, Path(s.folder or "runs/controls"), usual, own)


def main(words: list[str]) -> None:
    try:
        s = parse(words)
        chosen = f"--preset {s.preset}" if any("--preset" in w for w in words) else "no --preset"
        why = "CUDA GPUs found" if torch.cuda.is_available() else "no CUDA GPU found"
        if os.environ.get("RANK", "0") == "0":
            print(f"SSR-Zero, preset {s.preset} ({chosen}; {why})")
        if s.dry_run:
            dry_run(s)
        elif s.controls:
            compare(s)
        else:
            run(s)
    except KeyboardInterrupt:
        leave("\nssr.py: stopped")
    except torch.OutOfMemoryError as error:
        leave(f"ssr.py: {error}; lower --slots or --micro-batch-tokens (--dry-run says what for)")
    except FloatingPointError as error:
        leave(f"ssr.py: {error}: the weights have diverged; lower --lr, or go on from best/")
    except (OSError, ValueError, RuntimeError) as error:
        if is_lost(error):
            leave("ssr.py: another rank has gone, killed or crashed. torchrun starts all of them "
                  "again if --max-restarts allows it; else go on with --resume")  # fmt: skip
        leave(f"ssr.py: {error}")
    except Exception:  # a bug: its rank must not wait for its threads while the others wait for it
        if ranks_here() == 1:
            raise
        leave(traceback.format_exc())
    if dist.is_initialized():
        dist.destroy_process_group()


def interrupted(*_):
    """SIGTERM like Ctrl-C; raised here, as a shell's background jobs ignore SIGINT."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupted)
    main(sys.argv[1:])
