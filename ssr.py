"""Self-rewarding translation, from the command line.

    python ssr.py                              # on a laptop: the embedded toy, in minutes
    torchrun --nproc_per_node=8 ssr.py         # on eight GPUs: the paper's run
    python ssr.py --preset ssr-zero-0.5b --data texts.jsonl      # your own texts
    python ssr.py --resume --folder runs/mine  # go on from the newest checkpoint, if there is one
    python ssr.py --dry-run --preset ssr-zero-7b --gpus 8        # does it fit, how long is a step
    python ssr.py --controls                   # the toy with other rewards, and their table
    python ssr.py --judge-only rows.jsonl --model DIR_OR_ID      # can this model judge?
    python ssr.py --help                       # every setting

A run writes a folder: settings.json; metrics.jsonl, a row a step, the first one before any
training; evaluations.jsonl, the held-out translations with their scores and the judge's words;
groups.jsonl, samples of training; checkpoints/; last/ and, where a step was better than the start,
best/, Hugging Face folders; result.json at its end. Exit code 3: it ended, and nothing was learned.
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
import re
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if (
    __name__ == "__main__"
):  # read when torch loads: threads that spin stall each other on busy cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from torch import Tensor

import data
import family
import grpo
import plan
from checkpoint import Checkpoints, fingerprint, fingerprint_tokenizer, tensors_of
from eval import agreement
from judge import GATES, Reward, Task, Texts, check_reading
from kernels.advantage import BASELINES, SCALES
from model import Transformer, find_folder, load, load_tokenizer, read_config
from problem import (
    REWARDS,
    TEMPLATES,
    Comets,
    another_judge,
    custom_parts,
    data_problem,
    judge_alone,
    judge_of,
    judge_template,
    load_scorer,
    scorers_of,
    stamp,
    toy_problem,
    window_of,
)
from ranks import Ranks, Stopping, follow, is_lost, join, leave
from sampler import Sampler
from show import check_dashboards
from toy import controls
from toy.languages import Languages
from toy.pretrain import Recipe, make, make_tokenizer, shape_of, skills_of
from watch import Evaluation, Problem, Stopper, Watch, commit, launcher


@dataclass
class Settings(grpo.Settings):
    preset: str = ""
    """Where the other settings start: "toy", "ssr-zero-7b", "ssr-x-zero-7b", "ssr-zero-0.5b".
    Without one: "ssr-zero-7b" where there are CUDA GPUs, the toy elsewhere."""
    model: str = ""
    """A Hugging Face folder or hub id (Qwen2, Qwen2.5, Qwen3, Llama 3). Toy: shipped
    for seed 0, else pretrained once and kept in $SSR_TOY_CACHE (default: runs/toy-models)."""
    data: str = ""
    """Texts to translate: JSON lines with "text", "source" and "target", plain text, Parquet, or
    WMT's sources; several with commas between them (see data.py). Toy: made up."""
    source: str = ""
    """Languages of texts that do not say theirs: codes or names, with commas between them."""
    target: str = ""
    """Languages to translate those into: one for each of --source, or one for all."""
    skip_bad_lines: bool = False
    """Leave out lines of --data that cannot be read, and count them."""
    held_out: str = ""
    """Test sets to watch, such as wmt22:en-zh or a file with "reference"s; --data is then trained
    on whole, except what is in them. Without: some of --data. A preset's goes with its --data."""
    measures: str = ""
    """Of held-out translations, beside the judge: "chrf" (default where there are references),
    "none", COMET checkpoints such as "cometkiwi"; the first names the best weights."""
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
    """Templates: "paper", "plain" (the bare question, no thinking) or "toy"."""
    chat: bool = False
    """Set them in the tokenizer's chat template, as a user's turn."""
    reward: str = "self"
    """"self" (SSR-Zero), "self+comet" (SSR-X-Zero), "comet"; family.py's "certainty", "confidence",
    "pairs", "group", "cream" (with --judge previous), "majority" (for answers that can be equal);
    for comparison on the toy "random", "oracle", "external", "self+external"; one of your own,
    FILE.py:NAME or self+FILE.py:NAME (docs/your-own-reward.md)."""
    comet: str = "cometkiwi"
    """COMET's checkpoint in the reward: a short name (see eval/comet.py), a hub id, a folder."""
    self_weight: float = 1.0
    """Of the judge's score, 0 to 1, beside another."""
    comet_weight: float = 1.0
    """Of COMET's score."""
    comet_low: float = 0.0
    """COMET's number that is worth 0 …"""
    comet_high: float = 1.0
    """… and the one that is worth 1."""
    comet_references: bool = False
    """Show COMET the references of --data in training."""
    comet_dtype: str = "float32"
    """Of COMET's weights: "float32", "bfloat16", "float16"."""
    comet_batch: int = 32
    """Translations that COMET scores together."""
    judge_model: str = ""
    """Another model judges: a Hugging Face folder or hub id; with --judge-url its name there."""
    judge_url: str = ""
    """Judge through an OpenAI-compatible endpoint, such as http://localhost:8000/v1; its key, if
    any, in the environment variable OPENAI_API_KEY."""
    judge_chat: bool = False
    """Ask --judge-model in its chat template (an endpoint always does)."""
    judge_parallel: int = 16
    """Questions to the endpoint at once, from each rank."""
    judge_patience: float = 120.0
    """Seconds to wait for an answer of the endpoint, which is asked five times."""
    judge: str = "live"
    """Whose judgement: the "live" weights (paper), the "frozen" ones of the start, their "ema", the
    "previous" ones of some steps ago. Of "cream": whom the live judge is compared with."""
    previous_every: int = 10
    """Steps that the previous weights are kept for."""
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
    shown_groups: int = 1
    """Training prompts of each step that go to groups.jsonl, with samples, rewards, advantages."""
    report: bool = True
    """Draw report.html in the background while the run goes on, and at its end."""
    log_to: str = ""
    """Where else to log: "tensorboard", "wandb" or both, with a comma between them."""
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
    toy_skills: str = ""
    """What else the toy is taught: "compare" (for pairs), "rate" (for group), "write"; commas."""
    toy_noise: float = 0.3
    """Standard deviation of the error of the toy's "external" scorer."""
    judge_only: str = ""
    """Train nothing: score the translations in these files with --model, or --judge-url, and say
    how well that agrees with scores that are given there (see eval/agreement.py)."""
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


CHOICES = {
    "advantage_scale": SCALES,
    "advantage_baseline": BASELINES,
    "loss_norm": ("token", "sequence"),
    "prompts": tuple(TEMPLATES),
    "comet_dtype": ("float32", "bfloat16", "float16"),
    "judge": ("live", "frozen", "ema", "previous"),
    "reading": ("written", "expected"),
    "gate": GATES,
    "shard": ("all", "node"),
}
# The paper's texts, very likely; and WMT22 to watch, which neither it nor its evaluation uses.
TEXTS = {"data": "wmt17-20", "source": "en", "target": "zh", "held_out": "wmt22"}
PRESETS = {
    # The paper's model and loop; what is not public (batch, rates, lengths) is our choice.
    # Slots and micro-batches: so that it fits on 8 GPUs of 80 GB (see --dry-run).
    "ssr-zero-7b": TEXTS | {
        "model": "Qwen/Qwen2.5-7B", "eval_prompts": 256, "steps": 300, "slots": 64,
        "micro_batch_tokens": 8192,
    },
    # Which COMET the paper adds, and how it weighs, is not public either.
    "ssr-x-zero-7b": TEXTS | {
        "model": "Qwen/Qwen2.5-7B", "eval_prompts": 256, "steps": 300, "slots": 64,
        "micro_batch_tokens": 8192, "reward": "self+comet", "comet_dtype": "float16",
    },
    "ssr-zero-0.5b": TEXTS | {
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
     "max_new_tokens max_prompt_tokens judge_max_new_tokens max_bad_steps save_every keep "
     "comet_batch judge_parallel previous_every"),
    (lambda v: v >= 0, "must be at least 0",
     "shown_groups warmup_steps threads gpus"),
    (lambda v: 0 < v < math.inf, "must be above 0", "lr max_norm patience judge_patience"),
    (lambda v: 1e-4 < v < math.inf, "must be above 0.0001", "temperature"),
    (lambda v: 1e3 < v < math.inf, "must be above 1000", "toy_tokens"),
    (lambda v: 0 <= v <= 1, "must lie in 0 … 1", "ema_decay final_lr clip_low"),
    (lambda v: 0 <= v < math.inf, "must not be negative",
     "kl weight_decay judge_temperature clip_high self_weight comet_weight toy_noise"),
    (math.isfinite, "must be a number", "comet_low comet_high"),
    (lambda v: v == 0 or v >= 1e-4, "must be 0 or above 0.0001", "judge_temperature"),
]  # fmt: skip
# A run may go on with other values of these: they change no step, or only those to come.
FREE = (
    "folder resume save_every keep eval_every slots micro_batch_tokens device "
    "threads shard patience max_bad_steps steps gpus gpu comet_batch judge_url judge_parallel "
    "judge_patience judge_only shown_groups report log_to"
)
HEADINGS = {  # of --help, by the first setting below each
    "steps": "learning",
    "preset": "model and texts",
    "folder": "the run's folder",
    "prompts": "prompts and reward",
    "comet": "COMET in the reward",
    "judge_model": "somebody else as the judge",
    "judge": "the model as its own judge",
    "eval_every": "what can be looked at",
    "slots": "the machine",
    "toy_tokens": "the toy",
    "judge_only": "instead of training",
}
ALIASES = {"log_to": ["--log"]}  # shorter, but torchrun takes it for one of its own
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


def defaults(f: dataclasses.Field, presets: dict) -> str:
    own = [f"{p}: {values[f.name]}" for p, values in presets.items() if f.name in values]
    usual = [] if f.default is False or f.default == "" else [str(f.default)]
    return f" [{', '.join(usual + own)}]" if usual or own else ""


def options(
    words: list[str], kind: type, presets: dict, program: str, about: str, refused: dict
) -> dict:
    """What of a dataclass's fields the command line gives; those `refused` are no options, for a
    reason."""
    parser = argparse.ArgumentParser(
        prog=program, usage=f"python {program} [--option VALUE …]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter, description=about,
    )  # fmt: skip
    fields, help_of = dataclasses.fields(kind), docs(kind)
    group = parser
    for f in fields:
        if f.name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[f.name])
        if f.name in refused:
            continue
        kind = {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        text = help_of[f.name] + defaults(f, presets)
        names = [option(f.name), *ALIASES.get(f.name, [])]
        group.add_argument(*names, dest=f.name, help=text.replace("%", "%%"), **kind)
    parser.error = refuse
    given, unknown = parser.parse_known_args(words)
    for word in unknown:
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        if name in refused:
            raise ValueError(f"{word}: {refused[name]}")
        known = [f.name for f in fields if f.name not in refused]
        near = difflib.get_close_matches(name, known, 1, 0.4)
        hint = f"; did you mean {option(near[0])}?" if near else ""
        raise ValueError(f"unknown option {word}{hint} (--help lists all)")
    return vars(given)


def parse(words: list[str]) -> Settings:
    given = options(words, Settings, PRESETS, "ssr.py", __doc__, REFUSED)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and not given.get("judge_only"):
        given["resume"] = True  # torchrun started the ranks again
    small = given.get("controls") or not torch.cuda.is_available()
    preset = given.get("preset") or ("toy" if small else "ssr-zero-7b")
    judges = given.get("judge_only") and given.keys() & {"model", "judge_url"}
    if not given.get("preset") and (judges or (small and given.get("data"))):
        preset = "ssr-zero-0.5b"  # for models and texts of somebody's own
    if given.get("judge_only"):
        for name in given.keys() & {"resume", "controls", "dry_run", "data", "held_out", "reward"}:
            raise ValueError(f"{option(name)} has no effect with --judge-only")
        if not given.keys() & {"model", "judge_url", "preset"}:
            raise ValueError("--judge-only: which model judges? Name it with --model or --judge-url"
                             "; --preset toy is the toy, for its own languages")  # fmt: skip
    had = {}
    if given.get("resume") and not given.get("controls"):  # `check` refuses both together
        folder = given.get("folder") or folder_of(preset, "", True)
        had = remembered(Path(folder), given, Settings, {*FREE.split()})
    preset = given.get("preset") or had.get("preset") or preset
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset} is unknown; known: {', '.join(PRESETS)}")
    usual = PRESETS[preset] | had
    if given.get("data", usual.get("data")) != usual.get("data"):
        usual = {k: v for k, v in usual.items() if k not in TEXTS}  # other texts, other languages
    return check(Settings(**usual | given | {"preset": preset}))


def remembered(folder: Path, given: dict, kind: type, free: set[str]) -> dict:
    """The settings of the run that goes on, which those that are given may not contradict."""
    try:
        had = json.loads((folder / "settings.json").read_text())
    except FileNotFoundError:
        return {}  # no run yet: it begins
    except ValueError as error:
        raise ValueError(f"{folder}/settings.json is not JSON ({error})") from None
    names = {f.name for f in dataclasses.fields(kind)} - {"folder", "resume", "dry_run"}
    had = {name: had[name] for name in names & had.keys()}
    for name in given.keys() & had.keys() - free:
        if given[name] != had[name]:  # said before anything is made or loaded
            raise ValueError(
                f"the run that goes on was made with other settings: {option(name)} was "
                f"{had[name]!r} and is {given[name]!r}. Give the same, or start another --folder"
            )
    return had


def refuse(message: str):
    raise ValueError(f"{message} (--help lists all options)")


def ranks_here() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def bounded(s, bounds: list[tuple]) -> None:
    for holds, words, names in bounds:
        for name in names.split():
            if hasattr(s, name) and not holds(getattr(s, name)):
                raise ValueError(f"{option(name)} {getattr(s, name)} {words}")


def check(s: Settings) -> Settings:
    """Refuse what cannot work before anything is loaded, and say what to change."""
    for name, known in CHOICES.items():
        if getattr(s, name) not in known:
            raise ValueError(f"{option(name)} {getattr(s, name)}: use {', '.join(known)}")
    check_reward(s.reward)
    bounded(s, BOUNDS)
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
    check_judge(s)
    check_dashboards(s.log_to)
    data.pairs_of(s.source, s.target)
    longest = s.max_prompt_tokens + s.max_new_tokens
    if s.micro_batch_tokens < longest:
        raise ValueError(
            f"--micro-batch-tokens {s.micro_batch_tokens} cannot hold one sequence of "
            f"{s.max_prompt_tokens} + {s.max_new_tokens} tokens: use at least {longest}"
        )
    if s.folder and not (s.controls or s.judge_only) and Path(s.folder).exists():
        if not s.resume:
            raise ValueError(
                f"--folder {s.folder} exists already: go on with --resume, name another folder, or "
                "move that one away"
            )
        if not (Path(s.folder) / "settings.json").is_file():
            raise ValueError(
                f"--folder {s.folder} is not the folder of a run: it has no settings.json"
            )
    if s.folder:
        check_writable(s.folder)
    if s.controls and (s.resume or ranks_here() > 1):
        raise ValueError("--controls starts its own runs, and skips those that are done: leave out "
                         "--resume and torchrun")  # fmt: skip
    if s.controls and s.preset != "toy":
        raise ValueError("--controls needs --preset toy: only there the truth is known")
    if s.preset == "toy":
        for name in (*TEXTS, "measures", "skip_bad_lines"):
            if getattr(s, name):
                raise ValueError(
                    f"{option(name)}: the toy makes its own sentences; use another --preset"
                )
    elif s.reward in controls.REWARDS and s.reward not in REWARDS:
        raise ValueError(f"--reward {s.reward} needs the truth, which only --preset toy has")
    return s


def check_writable(folder: str) -> None:
    """Refuse a folder that cannot be created or written to."""
    path = Path(folder).absolute()
    there = next(x for x in (path, *path.parents) if os.path.lexists(x))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        why = "is not writable" if there.is_dir() else "is not a folder"
        raise ValueError(f"--folder {folder}: {there} {why}")


def check_reward(reward: str) -> None:
    known, own = dict.fromkeys((*REWARDS, *controls.REWARDS)), custom_parts(reward)
    others = "+".join(part for part in reward.split("+") if part not in own)
    if reward not in known and (not own or others not in ("", "self", "comet", "self+comet")):
        raise ValueError(f"--reward {reward}: use {', '.join(known)}, or FILE.py:NAME, your own")
    for part in own:
        load_scorer(part)  # which says what is wrong with it
    if len({part.rpartition(":")[2] for part in own}) < len(own):
        raise ValueError(f"--reward {reward}: two of its parts have the same name")


def check_judge(s: Settings) -> None:
    if s.judge_only and s.judge_model and not s.judge_url:
        raise ValueError("--judge-only judges with --model (or --judge-url and --judge-model)")
    if s.judge_url and not s.judge_model:
        raise ValueError("--judge-url needs --judge-model, the model's name at that endpoint")
    family.check(s, skills_of(s.toy_skills))
    parts = s.reward.split("+")
    if s.judge_model and "self" not in parts:
        raise ValueError(f"--judge-model has nothing to judge with --reward {s.reward}")
    if s.judge_model and s.judge != "live":
        raise ValueError(f"--judge {s.judge} is the policy's own; --judge-model names another")
    if s.judge_url and s.reading == "expected":
        raise ValueError("--reading expected needs log-probs, which --judge-url does not give: use "
                         "--reading written")  # fmt: skip
    chat = s.judge_chat if s.judge_model else s.chat
    if chat and s.reading == "expected" and s.prompts != "toy":
        raise ValueError("--reading expected begins the judge's answer, which a chat template does "
                         "not allow: use --reading written")  # fmt: skip
    if s.judge_chat and not s.judge_model:
        raise ValueError("--judge-chat is for --judge-model; --chat sets the policy's own prompts")
    comet, beside = "comet" in parts, parts[1:] and "external" not in parts
    for names, holds, instead in (
        ("comet comet_low comet_high comet_references", comet, "--reward self+comet"),
        ("comet_weight", comet and beside, "--reward self+comet"),
        ("self_weight", "self" in parts and beside, "--reward self+comet"),
        ("judge_parallel judge_patience", s.judge_url, "--judge-url"),
        ("toy_noise", "external" in parts, "--reward external"),
        ("toy_tokens toy_skills", s.preset == "toy", "--preset toy"),
        ("previous_every", s.judge == "previous", "--judge previous"),
    ):
        for name in names.split() if not holds else []:
            if getattr(s, name) != Settings.__dataclass_fields__[name].default:
                raise ValueError(f"{option(name)} has no effect without {instead}")
    if s.reward == "self+comet" and not s.self_weight + s.comet_weight:
        raise ValueError("--self-weight and --comet-weight are both 0: nothing is rewarded")
    if s.controls and s.judge_model:
        raise ValueError("--controls compares the policy's own judges: leave --judge-model out")
    if s.chat and s.prompts == "toy":
        raise ValueError("--chat: the toy's tokenizer has no chat template")
    if not s.comet_high > s.comet_low:
        raise ValueError(f"--comet-high {s.comet_high} must be above --comet-low {s.comet_low}")


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


def said_reward(s: Settings) -> str:
    judge = f"judge {s.judge_model or s.judge}" + (f" at {s.judge_url}" if s.judge_url else "")
    parts = s.reward.split("+")
    if parts[1:] and "external" not in parts:
        weights = {"self": f"{s.self_weight:g} × self", "comet": f"{s.comet_weight:g} × COMET"}
        parts = [weights.get(part, part) for part in parts]
    said = [" + ".join(parts)] + [judge] * (s.reward != "comet")
    if "comet" in s.reward.split("+"):
        said.append(f"COMET {s.comet}, {s.comet_dtype}")
    return ", ".join(said)


def arithmetic(s: Settings) -> str:
    P, N, R = s.prompts_per_step, s.samples_per_prompt, ranks_here()
    share = f", on {R} ranks {P // R}{f' or {P // R + 1}' * (P % R > 0)} prompts each" * (R > 1)
    return (
        f"{s.steps} steps of {P} prompts × {N} samples = {P * N} translations{share}, "
        f"{s.updates_per_batch} update{'s' * (s.updates_per_batch > 1)} each, at most "
        f"{s.micro_batch_tokens:,} tokens at a time\n"
        f"reward {said_reward(s)}, score {s.reading}, lr {s.lr:g}, KL {s.kl:g}, "
        f"seed {s.seed}" + (f", model {s.model}" if s.model else "")
    )


# --------------------------------------------------------------------------------------- the run


def place(s: Settings) -> tuple[torch.device, Ranks]:
    device = torch.device(s.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ranks = join(device.type, s.patience, s.shard == "node")
    if device.type == "cuda" and ranks.size > 1:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(s.threads or torch.get_num_threads())
    return device, ranks


def run(s: Settings) -> None:
    device, ranks = place(s)
    agree(ranks, {option(name): value for name, value in dataclasses.asdict(s).items()})
    agree(ranks, {"the code": commit(), "PyTorch": torch.__version__})
    with contextlib.closing(Comets(s, device)) as comets:
        if "comet" in s.reward.split("+"):
            comets.start(s.comet)  # it loads while we go on
        toy = s.preset == "toy"
        problem = toy_problem(s, ranks) if toy else data_problem(s, ranks, comets)
        prepare(s, ranks, problem, device, comets)


def prepare(s: Settings, ranks: Ranks, problem: Problem, device, comets: Comets) -> None:
    ranks.at("load the model")
    per_node, cuda = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), device.type == "cuda"
    shared = per_node if s.shard == "node" else ranks.size
    config = read_config(problem.folder)
    work = plan.Work(s, config, ranks.size, shared, judge_template(s), cuda, judge_shape(s))
    plan.check_room(work, device, 1 if cuda else per_node)
    model = load(problem.folder, dtype=torch.float32, device=device, shard=ranks.shard)
    texts = Texts(load_tokenizer(problem.folder), s.chat, problem.prompts.tags)
    print_prompt_advice(s, texts.tokenizer)
    window = window_of(s, problem, texts, config.max_length)
    actor, start, judging, average = samplers(s, model, window, work)
    if s.judge_model:
        judge = another_judge(s, ranks, problem, device, work.slots, texts)
    else:
        judge = judge_of(s, actor if s.reward == "cream" else judging, texts, problem.prompts)
    weigh = family.weigher(s, judge_of(s, judging, texts, problem.prompts))
    ranks.at("load COMET")
    scorers = scorers_of(s, judge, comets)
    reward = Reward(texts, problem.prompts, scorers, s.gate, weigh)
    held_out = asked(s, problem, texts, problem.held_out)
    evaluation = Evaluation(problem, held_out, texts, actor, judge, texts.stop_ids, s, ranks)
    learn(
        s, ranks, problem, texts, model, reward, evaluation, actor, start, judging, average, comets
    )


def learn(
    s: Settings, ranks: Ranks, problem: Problem, texts: Texts, model: Transformer, reward: Reward,
    evaluation: Evaluation, sampler: Sampler, start: Transformer | None, judging: Sampler,
    average: list[Tensor], comets: Comets,
) -> None:  # fmt: skip
    optimizer = grpo.make_optimizer(model, s)

    def batch(number: int) -> list[grpo.Prompt]:
        """The next P texts, asked as the actor is asked."""
        P = s.prompts_per_step
        tasks = [problem.task(i) for i in range((number - 1) * P, number * P)]
        return asked(s, problem, texts, tasks)

    path = ranks.on_first("name the run", lambda: folder_of(s.preset, s.folder, s.resume))
    identity = identity_of(s, problem, model, comets)
    agree(ranks, {f"the {name}": value for name, value in identity.items()})
    identity["settings"] = dataclasses.asdict(s)
    tensors = tensors_of(model, optimizer, average)
    kept = Checkpoints(path / "checkpoints", s.keep, ranks, tensors, identity, FREE)
    watch = Watch(s, path, sampler.model, problem.folder, evaluation, kept, ranks)
    tracked = start if s.track_kl or s.kl else None
    with Stopper(ranks), contextlib.closing(watch.folder), contextlib.closing(watch.show):
        try:
            done = watch.restore() if s.resume else None  # the last step of the run that goes on
            grpo.refresh(sampler, model)
            if average:
                follow(judging.model.parameters(), average)
            after = f", after step {done.number}" if done else ""
            if s.resume and not done:
                after = ", from the beginning: there is no checkpoint to go on from"
            print(f"{arithmetic(s)}\nwriting {path}{after}")
            watch.begin(done)
            for step in grpo.train(
                model, sampler, reward, batch, s, optimizer, texts.stop_ids, tracked, ranks, done
            ):
                if average:
                    stays = float(step.number % s.previous_every > 0)
                    stays = s.ema_decay if s.judge == "ema" else stays
                    follow(average, model.parameters(), stays)
                    follow(judging.model.parameters(), average)
                watch.after(step)
        except Stopping:
            watch.stop()
        except grpo.Stop:
            watch.give_up()
            raise
        else:
            watch.finish()
            if not watch.taught:
                sys.exit(3)


def asked(s: Settings, problem: Problem, texts: Texts, tasks: list[Task]) -> list[grpo.Prompt]:
    encoded = texts.encode([problem.prompts.ask(task) for task in tasks])
    if (longest := max(map(len, encoded))) > s.max_prompt_tokens:
        raise ValueError(
            f"a prompt has {longest} tokens: --max-prompt-tokens {s.max_prompt_tokens} must be at "
            "least that"
        )
    return [grpo.Prompt(ids, task) for ids, task in zip(encoded, tasks, strict=True)]


def identity_of(s: Settings, problem: Problem, model: Transformer, comets: Comets) -> dict:
    """What must be the same on all ranks, and when a run goes on; except its settings."""
    shape = {k: v for k, v in dataclasses.asdict(model.config).items() if k != "hub"}
    known = {"model": shape, "weights": fingerprint(problem.folder), "texts": problem.digest}
    known["tokenizer or chat template"] = fingerprint_tokenizer(problem.folder)
    if s.judge_model and not s.judge_url:
        judge = find_folder(s.judge_model)
        known["judge's weights"] = fingerprint(judge)
        known["judge's tokenizer or chat template"] = fingerprint_tokenizer(judge)
    for part in custom_parts(s.reward):
        known[f"file of --reward {part}"] = fingerprint(Path(part.rpartition(":")[0]).expanduser())
    for name, comet in comets.started.items():
        known[f"COMET {Path(name).name}"] = comet.ready()["revision"] or stamp(name)
    return known


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


def copy_of(model: Transformer, dtype: torch.dtype | None, device=None) -> Transformer:
    """Whole, on each rank; not to be trained."""
    with torch.device("meta"):
        twin = Transformer(model.config)
    device = device or model.head_weight.device
    twin = twin.to(dtype or torch.float32).to_empty(device=device).requires_grad_(False)
    follow(twin.parameters(), model.parameters())
    return twin


def samplers(s: Settings, model: Transformer, window: int, work: plan.Work) -> tuple:
    """The actor's, a model with the starting weights (or None), the judge's; the weights that are
    an EMA, or the previous ones."""
    # On a GPU the samplers have bf16 copies of the weights, the master weights stay fp32.
    half = torch.bfloat16 if model.head_weight.is_cuda else None
    model.compute_dtype, model.checkpointing = half, half is not None

    actor = Sampler(model if work.alone else copy_of(model, half), work.slots, window)
    start, judge, average = None, actor, []
    if work.keeps_start:
        start = copy_of(model, half)
    if s.judge == "frozen":
        judge = Sampler(start, work.judge_slots, window)
    # fp32, spread like the weights: in bf16 a step of it would be rounded away
    if s.judge in ("ema", "previous"):
        average = [p.detach().clone() for p in model.parameters()]
        judge = Sampler(copy_of(model, half), work.judge_slots, window)
    return actor, start, judge, average


def print_prompt_advice(s: Settings, tokenizer) -> None:
    """What can be known of the actor's prompt before anything is sampled."""
    if s.prompts != "paper":
        return
    if s.max_new_tokens < 256:
        print(f"--prompts paper asks for a thought before the answer: with --max-new-tokens "
              f"{s.max_new_tokens} many samples will be cut off; --prompts plain asks for the "
              "translation alone")  # fmt: skip
    if tokenizer.chat_template and not s.chat and s.model != PRESETS[s.preset].get("model"):
        print("The model has a chat template: if it is an instruct model, ask it with --chat "
              "--prompts plain")  # fmt: skip


def judge_shape(s: Settings):
    return plan.shape_of(s.judge_model) if s.judge_model and not s.judge_url else None


def machines(s) -> tuple[plan.Machine, bool, int, int]:
    """Of a --dry-run: one of them, whether it is a GPU, how many, how many share the weights."""
    here = torch.cuda.is_available() and s.device != "cpu"
    cuda = here or bool(s.gpu) or (not s.preset.startswith("toy") and s.device != "cpu")
    device = torch.device("cuda" if here else "cpu")
    machine = plan.machine_of(s.gpu or ("h100" if cuda and not here else ""), device)
    G = s.gpus or (torch.cuda.device_count() if here else 8 if cuda else 1)
    return machine, cuda, G, min(G, 8) if s.shard == "node" else G


def dry_run(s: Settings) -> None:
    machine, cuda, G, shared = machines(s)
    if s.preset == "toy" and not s.model:
        recipe = Recipe(seed=s.seed, skills=skills_of(s.toy_skills))
        tokenizer = make_tokenizer(Languages(s.seed), recipe.skills)
        name, config = "the toy", shape_of(recipe, tokenizer)
    else:
        name, config = s.model, plan.shape_of(s.model)
        if (folder := Path(s.model).expanduser()).is_dir():
            print_prompt_advice(s, load_tokenizer(folder))
    work = plan.Work(s, config, G, shared, judge_template(s), cuda, judge_shape(s))
    print(plan.report(work, machine, name))
    if plan.missing(work, machine) > 0:
        sys.exit(1)


def judge_file(s: Settings) -> None:
    """Rows are kept as they are made: the same command goes on where it was stopped."""
    device, ranks = place(s)
    files = [Path(name).expanduser() for name in s.judge_only.split(",")]
    items = ranks.on_first(
        "read the translations", lambda: agreement.read(files, s.source, s.target)
    )
    pairs = [(item.task, item.translation) for item in items]
    judge, key = judge_alone(s, ranks, pairs, device)
    out = Path(s.folder) if s.folder else files[0].parent
    name = re.sub(r"[^\w.-]+", "_", key["name"])
    path = out / f"{files[0].stem}.judged-by-{name}.jsonl"
    key |= {"translations": hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]}
    print(f"judged by {key['model']}, score {s.reading}; writing {path}", flush=True)
    rows = agreement.judged(items, judge, ranks, path, key)
    ranks.on_first("say how it agrees", lambda: agreement.tell(items, rows, path, key["model"]))


def compare(s: Settings) -> None:
    """The toy with every reward; options that differ from the preset's go to all runs."""
    usual = dataclasses.asdict(Settings(**PRESETS["toy"] | {"preset": "toy"}))
    changed = {k: v for k, v in dataclasses.asdict(s).items() if v != usual[k]}
    skills = skills_of(s.toy_skills)
    rows = controls.rows_for(skills)
    for name in ("seed", "threads", "data", *itertools.chain(*rows.values())):
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
            make(Recipe(seed=seed, tokens=s.toy_tokens, skills=skills))
    controls.run_all(seeds, Path(s.folder or "runs/controls"), usual, own, rows)


def start(words: list[str]) -> None:
    s = parse(words)
    why = "CUDA GPUs found" if torch.cuda.is_available() else "no CUDA GPU found"
    if any("--preset" in word for word in words):
        why = "as asked"
    if os.environ.get("RANK", "0") == "0":
        print(f"{'SSR-X-Zero' if s.reward == 'self+comet' else 'SSR-Zero'}, preset {s.preset} "
              f"({why})")  # fmt: skip
    if s.dry_run:
        dry_run(s)
    elif s.judge_only:
        judge_file(s)
    elif s.controls:
        compare(s)
    else:
        run(s)


def main(words: list[str]) -> None:
    told("ssr.py", lambda: start(words))


def told(program: str, work: Callable[[], None]) -> None:
    """Errors are said in one line, by one rank."""
    try:
        work()
    except KeyboardInterrupt:
        leave(f"\n{program}: stopped")
    except torch.OutOfMemoryError as error:
        leave(f"{program}: {error}; lower --slots or --micro-batch-tokens (see --dry-run)")
    except FloatingPointError as error:
        leave(f"{program}: {error}: the weights have diverged; lower --lr, or go on from best/")
    except (OSError, ValueError, RuntimeError) as error:
        if is_lost(error):
            leave(f"{program}: another rank has gone, killed or crashed. torchrun starts all of "
                  "them again if --max-restarts allows it; else go on with --resume")  # fmt: skip
        leave(f"{program}: {error}")
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
