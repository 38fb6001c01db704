"""Every setting of `python ssr.py`: one dataclass, which is also its command line.

    s = parse(["--preset", "ssr-zero-0.5b", "--data", "texts.jsonl"])   # checked; raises ValueError

The string under a field is its help text. `parse_fields` makes a command line of any such class.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import os
import re
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import grpo
from data import loading
from judge import FORMAT_REWARDS, PAPER, PLAIN, TOY
from kernels.advantage import SCALES
from rewards import build
from run.console import check_dashboards
from run.folder import launcher

TEMPLATES = {"paper": PAPER, "plain": PLAIN, "toy": TOY}
OWN_JUDGES = ("live", "frozen", "ema", "previous")


@dataclass
class RunSettings(grpo.Settings):
    """What every run has, whatever is learned."""

    preset: str = ""
    model: str = ""
    folder: str = ""
    """Folder to write; it must not exist yet. Default: runs/PRESET-DATE-TIME, of R-Zero
    runs/rzero-PRESET-DATE-TIME."""
    resume: bool = False
    """Continue from the newest checkpoint in --folder (default: the preset's newest run), with the
    settings of that run; from the beginning if there is none."""
    save_every: int = 25
    """Steps between two checkpoints."""
    held_out: str = ""
    eval_prompts: int = 512
    """Number of held-out texts."""
    max_num_seqs: int = 256
    """Maximum number of sequences decoded at the same time."""
    offload_optimizer: bool = False
    """Keep AdamW's state, eight bytes a parameter, in host memory instead of the GPU's."""
    hang_timeout: float = 1800.0
    """Seconds to wait for a rank that makes no progress before the run is aborted."""
    dry_run: str = ""
    """Print an estimate of memory and time, and exit: on this machine's GPUs (without any, 8xh100;
    ssr.py's toy: CPU) or on others, such as 8xh100 (a100, h100, h200, b200, l40s, rtx4090)."""


@dataclass
class Settings(RunSettings):
    preset: str = ""
    """Defaults of the other options: "toy", "ssr-zero-7b", "ssr-x-zero-7b" or "ssr-zero-0.5b".
    Without it: "ssr-zero-7b" if there are CUDA GPUs, otherwise "ssr-zero-0.5b" with --data and
    "toy" without."""
    model: str = ""
    """Hugging Face folder or hub id (Qwen2, Qwen2.5, Qwen3, Llama 3). The toy ships with a model
    for seed 0; for other seeds it is pretrained and cached in $SSR_TOY_CACHE. "toy:1.5e6" is the
    toy after 1.5e6 tokens of pretraining instead of 3.5e6: its judge is unreliable."""
    data: str = ""
    """JSON lines with "text", "source" and "target", plain text, Parquet or WMT sets, with commas
    between. Drops the preset's --source, --target and --held-out. The toy generates its own."""
    source: str = ""
    """Languages of texts that do not name theirs: codes or names, separated by commas."""
    target: str = ""
    """Languages to translate into, paired with --source in order; a single one on either side goes
    with all on the other."""
    held_out: str = ""
    """Test sets for evaluation, such as wmt22:en-zh or a file with "reference"s. Without it, some
    of --data are held out."""
    prompts: str = "paper"
    """Prompt templates: "paper" (think, then answer in tags), "plain" (the bare instruction) or
    "toy"."""
    chat: bool | str = False
    """Wrap prompts in the tokenizer's chat template, as a user turn. Thinking is off where that
    has a switch; "--chat thinking" turns it on."""
    score_mode: str = "written"
    """How a score is read: the number that the judge writes ("written", paper), or the mean of the
    possible scores under the judge's probabilities ("expected")."""
    judge_max_new_tokens: int = 1024
    """Maximum length of a judgement; a longer one gives no score."""
    eval_every: int = 25
    """Steps between two evaluations on held-out texts."""
    eval_metrics: str = ""
    """Metrics of held-out translations, separated by commas: "chrf" (default if there are
    references), "none", or COMET checkpoints such as "cometkiwi". The first one selects best/."""
    log_to: str = ""
    """Additional loggers: "tensorboard", "wandb", or both separated by a comma."""
    reward: str = "self"
    """"self" (SSR-Zero), "self+comet" (SSR-X-Zero), "comet"; other self-rewards: "certainty",
    "confidence", "pairs", "group", "cream", "majority"; toy only: "random", "oracle", "external",
    "self+external"; or your own, FILE.py:NAME or self+FILE.py:NAME (docs/your-own-reward.md)."""
    format_reward: str = "product"
    """How format and score combine: "product" (score, or 0), "zero-one" (1 + score, or 0) or
    "plus-minus-one" (1 + score, or -1)."""
    judge: str = "live"
    """Who judges: the policy's "live" weights (paper), its "frozen" starting weights, their "ema",
    or the "previous" weights of up to 10 steps ago; or another model (folder or hub id)."""
    judge_url: str = ""
    """Judge with a model behind this OpenAI-compatible endpoint, such as
    http://localhost:8000/v1; --judge is the model's name there. The API key is read from
    OPENAI_API_KEY."""
    judge_samples: int = 1
    """Judgements averaged for each translation: one is greedy, several are sampled at temperature
    1."""
    comet: str = "cometkiwi"
    """COMET checkpoint of the reward: a short name (see eval/comet.py), hub id or folder."""
    comet_weight: float = 1.0
    """Weight of the COMET score next to the judge's score, which has weight 1."""

    @property
    def toy_tokens(self) -> float | None:
        """Pretraining tokens of the toy; None if --model is a folder."""
        tokens = re.fullmatch(r"toy:(\d+(?:\.\d+)?(?:e\d+)?)", self.model)
        return float(tokens[1]) if tokens else None if self.model else 3.5e6

    @property
    def judge_model(self) -> str:
        """The other model that judges, if any."""
        return "" if self.judge in OWN_JUDGES else self.judge

    @property
    def judge_temperature(self) -> float:
        return 0.0 if self.judge_samples == 1 else 1.0


CHOICES = {
    "advantage_scale": (*SCALES, "each"),
    "loss_norm": ("token", "sequence", "constant", "effective"),
    "overlong": ("penalize", "mask", "soft"),
    "prompts": tuple(TEMPLATES),
    "score_mode": ("written", "expected"),
    "format_reward": FORMAT_REWARDS,
}
# The paper's texts, very likely; WMT22 for evaluation, which the paper uses for neither.
TEXTS = {"data": "wmt17-20", "source": "en", "target": "zh", "held_out": "wmt22"}
# The paper's model and loop; what is not public (batch, rates, lengths) is our choice.
# Slots and micro-batches are chosen to fit on 8 GPUs of 80 GB (see --dry-run).
SSR_ZERO = TEXTS | {
    "model": "Qwen/Qwen2.5-7B", "eval_prompts": 256, "steps": 300, "max_num_seqs": 128,
    "micro_batch_tokens": 8192,
}  # fmt: skip
PRESETS = {
    "ssr-zero-7b": SSR_ZERO,
    # Which COMET the paper adds, and with which weight, is not public either.
    "ssr-x-zero-7b": SSR_ZERO | {"reward": "self+comet"},
    "ssr-zero-0.5b": TEXTS | {
        "model": "Qwen/Qwen2.5-0.5B", "prompts_per_step": 32, "lr": 2e-6, "max_prompt_tokens": 256,
        "max_new_tokens": 512, "judge_max_new_tokens": 512, "eval_prompts": 128,
    },
    "toy": {
        "prompts": "toy", "score_mode": "expected", "steps": 100, "prompts_per_step": 24,
        "lr": 2e-4, "max_prompt_tokens": 32, "max_new_tokens": 20, "judge_max_new_tokens": 2,
        "track_kl": True,
    },
}  # fmt: skip
BOUNDS = [  # (condition, how its violation is worded, settings)
    (lambda v: v >= 1, "must be at least 1",
     "steps prompts_per_step updates_per_batch judge_samples eval_every eval_prompts max_num_seqs "
     "max_new_tokens max_prompt_tokens judge_max_new_tokens save_every micro_batch_tokens"),
    (lambda v: v >= 2, "must be at least 2: a sample is compared with the others of its prompt",
     "samples_per_prompt"),
    (lambda v: v >= 0, "must be at least 0", "warmup_steps"),
    (lambda v: 0 < v < math.inf, "must be above 0", "lr max_grad_norm hang_timeout"),
    (lambda v: 1e-4 < v < math.inf, "must be above 0.0001", "temperature"),
    (lambda v: 0 <= v <= 1, "must lie in 0 … 1", "min_lr_ratio clip"),
    (lambda v: 0 <= v < math.inf, "must not be negative", 
     "kl entropy_bonus importance_cap weight_decay comet_weight"),
]  # fmt: skip
# For argparse: --chat alone, or --chat thinking.
CHAT = {"nargs": "?", "const": True, "choices": ["thinking"], "metavar": "thinking"}
# These may change when a run is resumed: they affect no past step.
RESUME_OVERRIDABLE = (
    "folder resume save_every eval_every max_num_seqs micro_batch_tokens hang_timeout steps "
    "judge_url log_to dry_run offload_optimizer"
)
COMMON = (  # in this order in front of all others in --help
    "preset model data source target held_out steps seed prompts_per_step samples_per_prompt "
    "max_prompt_tokens max_new_tokens judge_max_new_tokens eval_prompts prompts chat score_mode "
    "folder resume dry_run"
)
MOVED = {  # what people look for -> what to use
    "learning_rate": "use --lr",
    "batch_size": "use --prompts-per-step",
    "device": "to hide the GPUs, set CUDA_VISIBLE_DEVICES to nothing",
    "top_p": "training needs log-probs of the whole distribution; use --temperature",
    "top_k": "training needs log-probs of the whole distribution; use --temperature",
}


# -------------------------------------------------------------------------- any dataclass's options


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass and of its bases."""
    docs = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                docs[field.target.id] = " ".join(text.value.value.split())
    return docs


def shown_default(f: dataclasses.Field, presets: dict) -> str:
    values = [] if f.default is False or f.default == "" else [str(f.default)]
    values += [f"{p}: {preset[f.name]}" for p, preset in presets.items() if f.name in preset]
    return f" [{', '.join(values)}]" if values else ""


def parse_fields(argv: list[str], cls: type, presets: dict, program: str, about: str,
                 moved: dict) -> dict:  # fmt: skip
    """The fields given on the command line. Fields in `moved` are no options."""
    parser = argparse.ArgumentParser(
        prog=program, usage=f"python {program} [--option VALUE …]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter, description=about,
    )  # fmt: skip
    parser.error = refuse
    docs, fields = field_docs(cls), [f for f in dataclasses.fields(cls) if f.name not in moved]
    first = COMMON.split()
    fields.sort(key=lambda f: first.index(f.name) if f.name in first else len(first))
    common, others = (parser.add_argument_group(title) for title in ("most used", "all others"))
    for f in fields:
        text = (docs[f.name] + shown_default(f, presets)).replace("%", "%%")
        group = common if f.name in first else others
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif f.name == "dry_run":
            kind = {"nargs": "?", "const": "here", "metavar": "GPUS"}
        elif f.name == "chat":
            kind = CHAT
        else:
            kind = {"type": f.type, "metavar": f.type.__name__.upper()}
        group.add_argument(option(f.name), dest=f.name, help=text, **kind)
    given, unknown = parser.parse_known_args(argv)
    for argument in unknown:
        name = argument.lstrip("-").removeprefix("no-").split("=")[0].replace("-", "_")
        if name in moved:
            raise ValueError(f"{argument}: {moved[name]}")
        near = difflib.get_close_matches(name, [f.name for f in fields], 1)
        hint = f"; did you mean {option(near[0])}?" if near else ""
        refuse(f"unknown option {argument}{hint}")
    return vars(given)


def refuse(message: str):
    raise ValueError(f"{message} (--help lists all options)")


def check_fields(s, bounds: list[tuple], choices: dict) -> None:
    for name, allowed in choices.items():
        if getattr(s, name) not in allowed:
            raise ValueError(f"{option(name)} {getattr(s, name)}: use {', '.join(allowed)}")
    for holds, requirement, names in bounds:
        for name in names.split():
            if hasattr(s, name) and not holds(getattr(s, name)):
                raise ValueError(f"{option(name)} {getattr(s, name)} {requirement}")


def load_saved_settings(folder: Path, given: dict, cls: type, overridable: str) -> dict:
    """The settings of the run to resume, after checking that `given` does not contradict them."""
    path = folder / "settings.json"
    if not path.exists():
        return {}  # no run yet: it starts
    saved = json.loads(path.read_text())
    names = {f.name for f in dataclasses.fields(cls)} - {"folder", "resume", "dry_run"}
    saved = {name: saved[name] for name in names & saved.keys()}
    for name in given.keys() & saved.keys() - {*overridable.split()}:
        if given[name] != saved[name]:
            raise ValueError(
                f"cannot resume {folder}: {option(name)} was {saved[name]!r} in the saved run and "
                f"is {given[name]!r} now. Give the same value, or start another --folder"
            )
    return saved


def run_folder(prefix: str, folder: str, resume: bool) -> Path:
    """The folder of a new run, of the newest one to resume, or of the one whose ranks restart."""
    if folder:
        return Path(folder)
    runs = sorted(Path("runs").glob(f"{prefix}-[0-9]*-[0-9]*/settings.json"), reverse=True)
    if is_restart():
        runs = [f for f in runs if json.loads(f.read_text())["about"].get("launcher") == launcher()]
    if resume and runs:
        return runs[0].parent
    return Path(f"runs/{prefix}-{time.strftime('%Y%m%d-%H%M%S')}")


def is_restart() -> bool:
    """Whether torchrun has started these ranks again."""
    return bool(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


def check_run_folder(folder: str, resume: bool) -> None:
    path = Path(folder)
    if path.exists() and not resume:
        raise ValueError(
            f"--folder {folder} exists already: continue it with --resume, or name another"
        )
    if path.exists() and not (path / "settings.json").is_file():
        raise ValueError(f"--folder {folder} is not the folder of a run: it has no "
                         "settings.json. Name the run's own folder, or a new one")  # fmt: skip


# ---------------------------------------------------------------------------------- of ssr.py


def parse(argv: list[str], about: str = "") -> Settings:
    given = parse_fields(argv, Settings, PRESETS, "ssr.py", about, MOVED)
    given |= {"resume": True} if is_restart() else {}
    preset = "ssr-zero-7b" if torch.cuda.is_available() else "toy"
    if given.get("data") and preset == "toy":
        preset = "ssr-zero-0.5b"  # for your own texts
    preset = given.get("preset", preset)
    saved = {}
    if given.get("resume"):
        folder = run_folder(preset, given.get("folder", ""), True)
        saved = load_saved_settings(folder, given, Settings, RESUME_OVERRIDABLE)
        if saved and "prompts" not in saved:
            raise ValueError(f"{folder} is a run of R-Zero: python -m rzero --resume continues it")
        preset = given.get("preset", saved.get("preset", preset))
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset} is unknown; known: {', '.join(PRESETS)}")
    defaults = PRESETS[preset] | saved
    if given.get("data", defaults.get("data")) != defaults.get("data"):
        # Other texts and languages.
        defaults = {k: v for k, v in defaults.items() if k not in TEXTS}
    s = Settings(**defaults | given | {"preset": preset})
    check_settings(s)
    return s


def check_settings(s: Settings) -> None:
    """Refuse what cannot work before anything is loaded, and say what to change."""
    check_fields(s, BOUNDS, CHOICES)
    build.check_reward(s)
    check_judge(s)
    check_dashboards(s.log_to)
    if s.folder:
        check_run_folder(s.folder, s.resume)
    for name in (*TEXTS, "eval_metrics") if s.preset == "toy" else ():
        if getattr(s, name):
            raise ValueError(f"{option(name)}: the toy makes its own sentences; use another "
                             "--preset")  # fmt: skip
    loading.parse_language_pairs(s.source, s.target)


def check_scoring(s) -> None:
    if s.score_mode == "expected" and s.judge_samples > 1:
        raise ValueError(f"{s.judge_samples} judge samples would all be the same: use "
                         "--judge-samples 1, or --score-mode written")  # fmt: skip
    if s.score_mode == "expected" and s.judge_url:
        raise ValueError("--score-mode expected needs log-probs, which --judge-url does not give: "
                         "use --score-mode written")  # fmt: skip
    if s.score_mode == "expected" and s.chat and s.prompts != "toy":
        raise ValueError("--score-mode expected begins the judge's answer, which a chat template "
                         "does not allow: use --score-mode written")  # fmt: skip


def check_judge(s: Settings) -> None:
    if s.judge_url and not s.judge_model:
        raise ValueError("--judge-url needs --judge, the model's name at that endpoint")
    check_scoring(s)
    if s.judge_model and "self" not in s.reward.split("+"):
        raise ValueError(f"--judge {s.judge}: use {', '.join(OWN_JUDGES)}; no other model judges "
                         f"with --reward {s.reward}")  # fmt: skip


def describe_run(s: Settings) -> str:
    """The batch arithmetic and the reward, for the start of a run."""
    P, N, ranks = s.prompts_per_step, s.samples_per_prompt, int(os.environ.get("WORLD_SIZE", 1))
    where = f" on {ranks} ranks" if ranks > 1 else ""
    model = f", model {s.model}" if s.model else ""
    return (
        f"preset {s.preset}: {s.steps} steps of {P} prompts × {N} samples = {P * N} translations"
        f"{where}, {s.updates_per_batch} update{'s' * (s.updates_per_batch > 1)} each, at most "
        f"{s.micro_batch_tokens:,} tokens at a time\n"
        f"reward {build.describe_reward(s)}, score {s.score_mode}, lr {s.lr:g}, KL {s.kl:g}, "
        f"seed {s.seed}{model}"
    )
