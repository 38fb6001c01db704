"""R-Zero: a Challenger invents questions at the edge of a Solver's ability, and both learn.

    python -m rzero                            # on a laptop: small programs, two minutes
    torchrun --nproc_per_node=8 -m rzero --preset r-zero-4b      # the paper's, on Qwen3-4B-Base
    python -m rzero --preset r-zero-4b --dry-run 8xh100         # does it fit? how long?
    python -m rzero --resume --folder runs/mine                  # continue where it was stopped

Both start as the same model. Each iteration (arXiv 2508.05004):

1. the Challenger learns against a frozen Solver: a question earns most when half of the Solver's
   answers agree, less when the batch repeats it, nothing when it is not a question;
2. the Challenger writes many questions. Those with an agreement near one half are kept, and the
   majority's answer is their label. No truth is involved, so a label may be wrong;
3. the Solver learns to give the labels.

Both learn with grpo.py; rzero/challenger.py has the Challenger's reward, rzero/games.py the games.
docs/rzero.md says what a run writes.

    paper: top-p 0.99 in all sampling / here: not for samples that are trained on / because their
    log-probs are trained as those of the whole distribution.
    script: 512 prompts a step, one update for every 16 (Challenger) or 128 (Solver) / here: each
    such update is a step with new samples / because a step's later updates are off-policy.
"""

import dataclasses
import gc
import math
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import grpo
from data import loading
from report import draw
from report.runs import read_rows
from run import driver, estimate, settings
from run.cache import JsonlCache, map_cached
from run.checkpoint import Checkpoints, fingerprint
from run.distributed import Ranks, Stopping, run_with_error_reporting
from run.folder import RunFolder, save_with_tokenizer
from run.metrics import mean
from run.monitor import stop_on_signal
from run.problem import policy_folder
from run.settings import RunSettings
from rzero.challenger import CHALLENGES, ChallengerReward, Player
from rzero.games import Mathematics, Quiz
from sampler import Sampler
from toy.programs import ProgramRecipe, Programs, program_model


@dataclass
class Settings(RunSettings):
    preset: str = "toy"
    """Defaults of the other options: "toy" (small programs); mathematics with the paper's numbers,
    "r-zero-4b", or with those of the authors' script, "r-zero-4b-script"."""
    model: str = ""
    """Hugging Face folder or hub id. The toy ships with a model for seed 0, and is pretrained once
    for other seeds."""
    iterations: int = 3
    """Turns of the Challenger, each followed by one of the Solver."""
    challenger_steps: int = 5
    """Challenger steps in each iteration."""
    challenger_prompts: int = 0
    """Prompts of a Challenger step; 0: as many as of a Solver step, --prompts-per-step."""
    challenger_samples: int = 4
    """Questions sampled for each prompt: the Challenger's group."""
    challenger_lr: float = 0.0
    """The Challenger's learning rate; 0: --lr."""
    challenge: str = "paper"
    """The Challenger's reward: "paper", "released" or "random" (see rzero/challenger.py)."""
    repetition: float = 1.0
    """Weight of the penalty for questions that the batch repeats."""
    questions: int = 8000
    """Questions that the Challenger writes in each iteration for the Solver to learn from."""
    answers: int = 10
    """Answers of the frozen Solver to each question, to measure its agreement with itself."""
    band: str = "0.25-0.75"
    """Lowest and highest agreement of the questions that the Solver learns from."""
    solver_steps: int = 15
    """Solver steps in each iteration."""
    solver_samples: int = 5
    """Answers sampled for each question: the Solver's group."""
    held_out: str = ""
    """JSON lines with "question" and "answer" to measure accuracy with. The toy makes its own."""


# The paper's numbers, as far as published. An answer's length is the script's, a prompt's is ours.
R_ZERO = {
    "model": "Qwen/Qwen3-4B-Base", "lr": 1e-6, "weight_decay": 1e-2, "kl": 1e-2,
    "warmup_steps": 0, "min_lr_ratio": 1.0, "max_prompt_tokens": 1024, "max_new_tokens": 4096,
    "max_num_seqs": 24, "micro_batch_tokens": 8192, "eval_prompts": 256, "save_every": 5,
}  # fmt: skip
PRESETS = {
    "toy": {
        "prompts_per_step": 32, "challenger_steps": 10, "solver_steps": 25, "solver_samples": 8,
        "questions": 128, "lr": 4e-4, "challenger_lr": 6e-4, "warmup_steps": 2, "max_num_seqs": 512,
        "max_prompt_tokens": 21, "max_new_tokens": 41, "eval_prompts": 256, "save_every": 5,
    },
    "r-zero-4b": R_ZERO,
    "r-zero-4b-script": R_ZERO | {
        "challenge": "released", "band": "0.3-0.8", "challenger_prompts": 16,
        "challenger_steps": 5 * 512 // 16, "solver_steps": 15 * 512 // 128,
    },
}  # fmt: skip
BOUNDS = [
    *settings.BOUNDS,
    (lambda v: v >= 1, "must be at least 1", "iterations challenger_steps solver_steps questions"),
    (lambda v: v >= 2, "must be at least 2: a group, or a majority",
     "challenger_samples solver_samples answers"),
    (lambda v: re.fullmatch(r"(0(\.\d+)?|1)(-|$)" * 2, str(v)) and sorted(x := v.split("-")) == x,
     "must be the lowest and the highest agreement, such as 0.25-0.75", "band"),
    (lambda v: 0 <= v < math.inf, "must not be negative",
     "repetition challenger_lr challenger_prompts"),
]  # fmt: skip
CHOICES = {name: values for name, values in settings.CHOICES.items() if hasattr(Settings, name)}
CHOICES |= {"preset": tuple(PRESETS), "challenge": CHALLENGES}
CHOICES |= {"advantage_scale": settings.SCALES}  # its rewards are no sums of parts
MOVED = settings.MOVED | {
    "steps": "each player has its own: --challenger-steps, --solver-steps",
    "samples_per_prompt": "each player has its own: --challenger-samples, --solver-samples",
}
RESUME_OVERRIDABLE = (
    "folder resume iterations save_every micro_batch_tokens max_num_seqs hang_timeout "
    "offload_optimizer"
)
PLAYERS = ("challenger", "solver")
SHOWN = ("reward/total", "questions/", "eval/")  # beginnings of metrics in the progress line


class SelfPlay:
    """Players learn and questions are written, in turn. Finished work is found on the disk and
    skipped; a turn that was stopped continues from its checkpoint, or from its rows."""

    def __init__(self, s: Settings, game: Quiz, device: torch.device, ranks: Ranks):
        self.s, self.game, self.device, self.ranks = s, game, device, ranks
        self.path, self.iteration = Path(s.folder), 0
        self.folders = {x: RunFolder(self.path / x, ranks.rank == 0) for x in (".", *PLAYERS)}
        [asking] = game.codec.encode([game.challenger_prompt])
        self.asking, self.held_out = grpo.Prompt(asking, None), self.solver_prompts(game.held_out)
        longest = max(len(prompt.ids) for prompt in (self.asking, *self.held_out))
        if longest > s.max_prompt_tokens:
            raise ValueError(f"--max-prompt-tokens {s.max_prompt_tokens}: the Challenger's prompt "
                             f"or a held-out question has {longest}")  # fmt: skip

    def begin(self) -> None:
        for folder in self.folders.values():  # a kill may have come between two of them
            again = (folder.path / "settings.json").is_file()
            folder.begin(self.s, math.inf if again else None)
        notes = [note for note in self.game.codec.notes if "--chat" not in note]  # no option here
        print(f"R-Zero, {self.s.preset}: {self.s.iterations} iterations, writing {self.path}",
              *notes, sep="\n")  # fmt: skip

    def play(self) -> None:
        self.ranks.on_rank0("begin", self.begin)
        for iteration in range(1, self.s.iterations + 1):
            self.iteration = iteration
            try:
                if not self.weights("challenger").is_dir():
                    self.train_challenger()
                if not self.weights("solver").is_dir():
                    self.train_solver(self.write_questions())
            finally:
                if self.ranks.rank == 0:
                    self.draw_report()
        self.ranks.on_rank0("end", self.finish)

    def weights(self, player: str, ago: int = 0) -> Path:
        number = self.iteration - ago
        return self.path / f"iteration-{number}" / player if number else self.game.folder

    def solver_prompts(self, pairs: Sequence[tuple[str, str]]) -> list[grpo.Prompt]:
        """Of pairs of question and answer, the prompts' tasks."""
        ids = self.game.codec.encode([self.game.solver_prompt(question) for question, _ in pairs])
        return [grpo.Prompt(*x) for x in zip(ids, pairs, strict=True)]

    # -------------------------------------------------------------------------- an iteration

    def train_challenger(self) -> None:
        s = self.s
        s = self.turn_settings(
            s.challenger_steps, s.challenger_samples,
            lr=s.challenger_lr, prompts_per_step=s.challenger_prompts,
        )  # fmt: skip
        solver = Player(self.weights("solver", 1), s, self.game, self.device)

        def describe(step: grpo.Step) -> dict[str, float]:
            questions = [text for row in step.judged for text in row.judge_text if text]
            if not questions:
                return {}
            about = self.game.describe_questions(questions)
            about |= {"different": len(set(questions)) / len(questions)}
            return {f"questions/{name}": value for name, value in about.items()}

        reward = ChallengerReward(s, solver)
        prompts = [self.asking] * s.prompts_per_step
        self.train_player("challenger", s, reward, lambda number: prompts, describe)

    def write_questions(self) -> list[dict]:
        """The Challenger's distinct questions, with the Solver's agreement and label."""
        s, players = self.s, []
        folders = [self.weights("challenger"), self.weights("solver", 1)]
        names = ("preset", "questions", "answers", "temperature", "seed")
        key = {name: getattr(s, name) for name in names}
        key["weights"] = [fingerprint(folder) for folder in folders]

        def work(numbers: Sequence[int]) -> list[dict]:
            if not players:  # none is loaded where all rows are there
                players.extend(Player(folder, s, self.game, self.device) for folder in folders)
            challenger, solver = players
            keys = [self.iteration * s.questions + n for n in numbers]
            samples = challenger.sample([self.asking.ids] * len(keys), 1, keys)
            questions = [solver.parse_question(sample) for [sample] in samples]
            agreed = solver.agreement(questions) | {None: (None, None)}
            return [
                {"segment": n, "question": q, "agreement": agreed[q][0], "label": agreed[q][1]}
                for n, q in zip(numbers, questions, strict=True)
            ]

        path = self.path / f"iteration-{self.iteration}" / "questions.jsonl"
        rows = map_cached(
            self.ranks, lambda: JsonlCache(path, key), f"iteration {self.iteration}, questions",
            range(s.questions), work, s.max_num_seqs * self.ranks.size,
        )  # fmt: skip
        first = {row["question"]: row for row in reversed(rows) if row["question"]}
        return sorted(first.values(), key=lambda row: row["segment"])

    def train_solver(self, rows: list[dict]) -> None:
        s = self.turn_settings(self.s.solver_steps, self.s.solver_samples)
        low, high = map(float, s.band.split("-"))
        pairs = [
            (row["question"], row["label"]) for row in rows
            if low <= row["agreement"] <= high and self.game.is_trainable(row["question"])
        ]  # fmt: skip
        if not pairs:
            raise ValueError(
                f"iteration {self.iteration}: no question with an agreement in --band {s.band} is "
                "left to learn from: more --questions, a wider --band, fewer --challenger-steps"
            )
        print(f"iteration {self.iteration}: of {s.questions} questions {len(rows)} different ones, "
              f"{len(pairs)} to learn from", flush=True)  # fmt: skip
        lessons = {"kept": len(pairs)} | self.game.describe_questions(*zip(*pairs, strict=True))
        lessons = {f"lessons/{name}": value for name, value in lessons.items()}
        order, P = loading.EpochShuffler(pairs, s.seed), s.prompts_per_step

        def batch(number: int) -> list[grpo.Prompt]:
            return self.solver_prompts([order.task((number - 1) * P + p) for p in range(P)])

        self.train_player(
            "solver", s, self.game.solver_reward, batch,
            lambda step: lessons if step.number == 1 else {},
        )  # fmt: skip

    def evaluate(self, sampler: Sampler) -> dict[str, float]:
        """Accuracy on the held-out questions: greedy, and the mean of four samples at T 1."""

        def accuracy(temperature: float, n: int) -> float:
            def work(mine: Sequence[int]) -> list[float]:
                prompts = [self.held_out[i] for i in mine]
                groups = sampler.generate(
                    [prompt.ids for prompt in prompts], n, self.s.max_new_tokens, temperature,
                    stop_ids=self.game.codec.stop_ids, seed=self.s.seed + 1, keys=list(mine),
                )  # fmt: skip
                judged = self.game.solver_reward([prompt.task for prompt in prompts], groups, 0)
                return [mean(row.total) for row in judged]

            return mean(self.ranks.map_over_ranks("measure", range(len(self.held_out)), work))

        if not self.held_out:
            return {}
        return {"eval/accuracy": accuracy(0.0, 1), "eval/sampled_accuracy": accuracy(1.0, 4)}

    # ------------------------------------------------------------------------- a player's turn

    def turn_settings(self, steps: int, samples: int, **changes) -> Settings:
        """For the loop, whose steps begin at 1 in each turn; another seed makes other draws."""
        changes["seed"] = self.s.seed + 1_000_000 * self.iteration
        return dataclasses.replace(self.s, steps=steps, samples_per_prompt=samples, **changes)

    def train_player(
        self, player: str, s: Settings, reward: Callable, batch: Callable, describe: Callable
    ) -> None:
        """From the previous iteration's weights to this one's.

        `describe(step)` gives metrics beside the loop's own. The Solver is evaluated before its
        first step and after each turn.
        """
        ranks, log, final = self.ranks, self.folders[player], self.weights(player)
        source, base = self.weights(player, 1), (self.iteration - 1) * s.steps
        ranks.set_stage(f"iteration {self.iteration}: load the {player}")
        gc.collect()  # FSDP's models refer to themselves
        window = s.max_prompt_tokens + s.max_new_tokens
        policy = driver.build_policy(source, s, self.device, ranks, s.max_num_seqs, window)
        folder, identity = final.with_suffix(".checkpoints"), {"weights": fingerprint(source)}
        kept = Checkpoints(folder, 1, ranks, policy.tensors(), identity)
        last: grpo.Step | None = None
        if saved := kept.restore():
            last = grpo.Step(saved["step"], saved["metrics"], [], saved["failure_streaks"])
            policy.sync()

        def record(step: grpo.Step) -> None:
            row = {"step": base + step.number} | step.metrics
            if player == "solver" and step.number == s.steps:
                row |= self.evaluate(policy.sampler)
            log.add("metrics.jsonl", [row])
            line = [f"iteration {self.iteration}, {player:10} {step.number:>3}/{s.steps}"]
            line += [f"{key} {value:.3f}" for key, value in row.items() if key.startswith(SHOWN)]
            print("  ".join(line), flush=True)

        def save() -> None:
            state = {"metrics": last.metrics, "failure_streaks": last.failure_streaks}
            kept.save(last.number, state)

        if ranks.rank == 0:  # the row of the checkpoint's step is written again
            log.cut("metrics.jsonl", base + (last.number if last else base > 0))
        try:
            if last:
                record(last)
            elif player == "solver" and not base:
                log.add("metrics.jsonl", [{"step": 0} | self.evaluate(policy.sampler)])
            for step in driver.train_policy(
                policy, reward, batch, s, self.game.codec.stop_ids, ranks, last
            ):
                step.metrics |= describe(step)
                last = step
                if step.number % s.save_every == 0 or step.number == s.steps:
                    save()
                record(step)
        except Stopping:
            ranks.ending = True
            if last:
                save()
            raise
        finally:
            kept.wait()
        # Whole, on the first rank's host, in fp32: the next iteration begins with it.
        where = torch.device("meta" if ranks.rank else "cpu")
        model = policy.model
        whole = model if ranks.size == 1 else driver.unsharded_copy(model, torch.float32, where)
        ranks.on_rank0("keep", lambda: self.keep(whole, final))

    # --------------------------------------------------------------------------- what it writes

    def keep(self, model, final: Path) -> None:
        partial = final.with_suffix(".partial")
        save_with_tokenizer(model, self.game.folder, partial)
        partial.rename(final)
        shutil.rmtree(final.with_suffix(".checkpoints"), ignore_errors=True)

    def draw_report(self) -> None:
        players = [str(self.path / name) for name in PLAYERS]
        try:
            draw.main([*players, "--out", str(self.path / "report.html")])
        except Exception as error:  # it does not end the run
            print(f"no report: {error!r}", flush=True)

    def finish(self) -> None:
        """result.json, also printed: a value for the start, and one for each iteration."""
        rows = read_rows(self.path / "solver" / "metrics.jsonl")
        table = {}
        for key in dict.fromkeys(key for row in rows for key in row):
            if key.startswith(("eval/", "lessons/")):
                first = [None] * key.startswith("lessons/")
                table[key] = first + [row[key] for row in rows if key in row]
        self.folders["."].write("result.json", table)
        print("\nat the start, and after each iteration:")
        for key, values in table.items():
            print(f"{key:24}" + "".join("        –" if x is None else f"{x:9.3g}" for x in values))
        print(f"\nweights: {self.weights('solver')}")
        for left in self.path.glob("iteration-*/*.checkpoints"):  # by a kill at the wrong moment
            shutil.rmtree(left)


# ----------------------------------------------------------------------------- the command line


def parse(argv: list[str]) -> Settings:
    given = settings.parse_fields(argv, Settings, PRESETS, "-m rzero", __doc__, MOVED)
    given |= {"resume": True} if settings.is_restart() else {}
    preset, saved = given.get("preset", "toy"), {}
    if given.get("resume"):
        folder = settings.run_folder(f"rzero-{preset}", given.get("folder", ""), True)
        saved = settings.load_saved_settings(folder, given, Settings, RESUME_OVERRIDABLE)
        if saved and "challenge" not in saved:
            raise ValueError(f"{folder} is no run of R-Zero: python ssr.py --resume continues it")
        preset = saved.get("preset", preset)
    s = Settings(**PRESETS.get(preset, {}) | saved | given | {"preset": preset})
    s.challenger_lr = s.challenger_lr or s.lr
    s.challenger_prompts = s.challenger_prompts or s.prompts_per_step
    if s.folder:
        settings.check_run_folder(s.folder, s.resume)
    settings.check_fields(s, BOUNDS, CHOICES)
    return s


def build_game(s: Settings, ranks: Ranks) -> Quiz:
    if s.preset != "toy":
        return Mathematics(policy_folder(s, ranks), s.held_out, s.eval_prompts)
    recipe = ProgramRecipe(seed=s.seed)
    folder = s.model or ranks.rank0_then_all("make the toy", lambda: program_model(recipe))
    return Programs(s.seed, s.eval_prompts, Path(folder))


class TurnEstimate(estimate.Workload):
    """A player has all its sequences, needed or not."""

    slots = property(lambda self: self.s.max_num_seqs)


def dry_run(s: Settings) -> None:
    """As ssr.py's, for each player's turn."""
    if s.preset == "toy":
        raise ValueError("--dry-run needs another --preset: the toy fits anywhere")
    machine, count = estimate.machines(s.dry_run, any_gpu=True)
    config = estimate.find_config(s.model)
    same = {f.name: getattr(s, f.name) for f in dataclasses.fields(RunSettings)}
    same |= {"eval_prompts": 0, "reward": "oracle", "score_mode": "expected"}  # no judge's time

    def turn(steps: int, prompts: int, samples: int, asked=None) -> TurnEstimate:
        turn = {"steps": steps, "prompts_per_step": prompts, "samples_per_prompt": samples}
        run = settings.Settings(**same | turn)
        return TurnEstimate(run, config, count, 0, machine.is_gpu, asked=asked)

    P, n, m = s.challenger_prompts, s.challenger_samples, s.answers
    turns = {
        "Challenger": turn(s.challenger_steps, P, n, turn(1, P * n, m)),
        "Solver": turn(s.solver_steps, s.prompts_per_step, s.solver_samples),
    }
    for name, k in turns.items():
        print(f"The {name}'s turn. {estimate.format_estimate(k, machine, s.model)}\n")
    between = turn(1, s.questions, 1), turn(1, s.questions, m)
    hours = sum(k.s.steps * sum(estimate.seconds(k, machine).values()) for k in turns.values())
    hours = (hours + sum(estimate.seconds(k, machine)["sample"] for k in between)) / 3600
    print(f"Between them {s.questions} questions, {m} answers to each. {s.iterations} iterations: "
          f"{s.iterations * hours:.3g} hours if all are as long as they may be, without "
          "evaluations.")  # fmt: skip
    if any(estimate.missing(k, machine) > 0 for k in turns.values()):
        sys.exit(1)


def start(argv: list[str]) -> None:
    s = parse(argv)
    if s.dry_run:
        return dry_run(s)
    device, ranks = driver.init_device_and_ranks(s)
    name = f"rzero-{s.preset}"
    s.folder = str(ranks.on_rank0("name", lambda: settings.run_folder(name, s.folder, s.resume)))
    game = build_game(s, ranks)
    with stop_on_signal(ranks):
        try:
            SelfPlay(s, game, device, ranks).play()
        except Stopping:
            print(f"stopped; continue with --resume --folder {s.folder}", flush=True)


def main(argv: list[str]) -> None:
    run_with_error_reporting("rzero", lambda: start(argv))
