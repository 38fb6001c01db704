"""From --reward, --judge and --comet to what judge.Reward takes: name -> (weight, scorer).

check_reward(s)                                      # refuses what cannot work, loads nothing
with closing(CometWorkers(s, device)) as comets:
    scorers = build_scorers(s, judge, comets)       # `judge`: the policy, or another model
"""

import importlib.util
import re
from functools import cache
from pathlib import Path

import torch

from data.codec import PromptCodec
from eval.comet import Comet, comet_rows, where
from judge import Judge, Prompts, Score, Scorer, Task, score_distinct
from rewards import family, toy
from rewards.remote import RemoteJudge
from run.checkpoint import fingerprint
from run.distributed import Ranks
from sampler import Sampler

REWARDS = ("self", "comet", "self+comet", *family.REWARDS)
TOY_NOISE = 0.3  # standard deviation of the toy's "external" scorer


def toy_skills(s) -> tuple[str, ...]:
    """What the toy is taught besides translating and scoring, for this reward."""
    return (family.SKILLS[s.reward],) if s.reward in family.SKILLS else ()


def check_reward(s) -> None:
    own = custom_parts(s.reward)
    others = "+".join(part for part in s.reward.split("+") if part not in own)
    combines = own and others in ("", "self", "comet", "self+comet")
    if not combines and s.reward not in (*REWARDS, *toy.REWARDS):
        names = ", ".join((*REWARDS, *toy.REWARDS))
        raise ValueError(f"--reward {s.reward}: use {names}, or your own, FILE.py:NAME")
    names = [part.rpartition(":")[2] for part in own if load_scorer(part)]
    if len({*names}) < len(names):
        raise ValueError(f"--reward {s.reward}: two of its parts have the same name")
    if s.preset != "toy" and s.reward in toy.REWARDS:
        raise ValueError(f"--reward {s.reward} needs the truth, which only --preset toy has")
    if s.reward in ("certainty", "confidence") and s.judge != "live":
        raise ValueError(f"--reward {s.reward} is read from the policy's own probabilities: leave "
                         f"--judge {s.judge} out")  # fmt: skip
    if s.reward == "cream" and s.judge == "live":
        raise ValueError("--reward cream compares the live judge with another of the policy's own: "
                         "use --judge previous (paper), frozen or ema")  # fmt: skip


def describe_reward(s) -> str:
    text = f"{s.reward}, judge {s.judge}" + f" at {s.judge_url}" * bool(s.judge_url)
    comet = f", COMET {s.comet} with weight {s.comet_weight:g}"
    return text + comet * ("comet" in s.reward.split("+"))


def build_scorers(s, judge, comets: "CometWorkers") -> dict:
    if s.reward in family.REWARDS:
        return family.self_scorers(s, judge)
    if s.reward in toy.REWARDS:
        return toy.toy_scorers(s.reward, judge, s.seed, TOY_NOISE)
    parts = s.reward.split("+")
    scorers = {"self": (1.0, judge)} if "self" in parts else {}
    if "comet" in parts:
        comet = comets.start(s.comet)
        if comet.ready()["needs_reference"]:
            raise ValueError(
                f"--comet {s.comet} cannot score without a reference, and training has none: use "
                "one that can, such as cometkiwi"
            )
        scorers["comet"] = (s.comet_weight if parts[1:] else 1.0, comet_scorer(comet))
    own = {part.rpartition(":")[2]: load_scorer(part) for part in custom_parts(s.reward)}
    return scorers | {name: (1.0, scorer) for name, scorer in own.items()}


# ----------------------------------------------------------------------------- your own scorer


def custom_parts(reward: str) -> list[str]:
    """The parts of a reward, separated by +, that have the form FILE.py:NAME."""
    return [part for part in reward.split("+") if ".py:" in part]


@cache
def load_scorer(part: str) -> Scorer:
    """Import the scorer that FILE.py:NAME refers to (see docs/your-own-reward.md)."""
    file, _, name = part.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"--reward {part}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever that file raises: it is a program
        raise ValueError(f"--reward {part}: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--reward {part}: {file} has no function {name}")
    if name in ("self", "comet", "format", "total", "weight"):
        raise ValueError(f"--reward {part}: reward/{name} exists already: choose another name")
    return getattr(module, name)


# ------------------------------------------------------------------------------------- judges


def build_judge(s, sampler: Sampler, codec: PromptCodec, prompts: Prompts) -> Judge:
    return Judge(
        sampler, codec, prompts, s.score_mode, s.judge_samples, s.judge_temperature,
        s.judge_max_new_tokens, codec.stop_ids, s.seed,
    )  # fmt: skip


def build_remote_judge(s, ranks: Ranks, prompts: Prompts) -> RemoteJudge:
    judge = RemoteJudge(
        s.judge_url, s.judge_model, prompts, s.judge_samples, s.judge_temperature,
        s.judge_max_new_tokens, s.seed,
    )  # fmt: skip
    ranks.on_rank0("ask the judge", judge.check)
    return judge


# -------------------------------------------------------------------------------------- COMET


class CometWorkers:
    """The COMET processes of this rank, one for each checkpoint. They load in the background."""

    def __init__(self, s, device: torch.device):
        self.s, self.device = s, device
        self.started: dict[str, Comet] = {}

    def start(self, checkpoint: str) -> Comet:
        if checkpoint not in self.started:
            limit = 0.9 * self.s.hang_timeout  # less than the other ranks wait for this one
            dtype = "float16" if self.device.type == "cuda" else "float32"
            self.started[checkpoint] = Comet(
                checkpoint, str(self.device), dtype, 32,
                start_limit=limit, silence_limit=min(600.0, limit),
            )  # fmt: skip
            self.started[checkpoint].start()
        return self.started[checkpoint]

    def measure(self, checkpoint: str, referenced: bool):
        """A metric of held-out translations; `referenced`: all of them have a reference."""
        comet = self.start(checkpoint)

        return lambda tasks, texts: comet.score(
            comet_rows(tasks, texts, comet.ready()["takes_reference"] and referenced)
        )

    def close(self) -> None:
        for comet in self.started.values():
            comet.close()


def comet_scorer(comet: Comet) -> Scorer:
    """COMET, which sees no references, as a reward."""
    control = re.compile("|".join(map(re.escape, comet.about["control"])) or r"(?!)")

    def break_up(text: str) -> str:
        """Its control tokens, which a text must not become, with a space inside."""
        return control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)

    def score(pairs: list[tuple[Task, str]]) -> list[Score]:
        rows = [{"src": break_up(task.text), "mt": break_up(answer)} for task, answer in pairs]
        return [Score(value, f"{value:.4f}") for value in comet.score(rows)]

    return lambda tasks, answers, step: score_distinct(tasks, answers, score)


def checkpoint_id(checkpoint: str) -> str:
    """Tells one COMET checkpoint from another at the same path."""
    folder = Path(where(checkpoint))
    if not folder.is_dir():
        return str(folder)  # a hub id, whose revision the worker reports
    return f"{folder.name} {fingerprint(folder / 'checkpoints' / 'model.ckpt')}"
