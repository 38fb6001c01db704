"""R-Zero: a Challenger invents questions at the edge of a Solver's ability, and both learn.

    python rzero.py                            # on a laptop: small programs, some minutes
    python rzero.py --preset toy-translation   # a Challenger that writes sentences to translate
    torchrun --nproc_per_node=8 rzero.py --preset r-zero-4b      # the paper's, on Qwen3-4B-Base
    python rzero.py --preset r-zero-4b --dry-run --gpus 8        # does it fit? how long?
    python rzero.py --resume --folder runs/mine                  # go on where it was stopped

Both begin as the same model. Each iteration (arXiv 2508.05004):

1. the Challenger learns, the Solver is frozen: a question is worth most when the Solver's answers
   agree half of the time, less the more like it are in the batch, nothing if it is none;
2. the Challenger writes many questions; those whose agreement is near one half are kept, and the
   majority's answer is their label. No truth is asked, so a label may be wrong;
3. the Solver learns to give the label.

Every learning is grpo.py's; what a question is worth is in challenge.py, what can be asked in
games.py. A run writes challenger/ and solver/, each with a metrics.jsonl whose steps count on over
the iterations; iteration-1/ and so on with questions.jsonl and both players' weights; report.html.

    paper: top-p 0.99 in all sampling / here: not for what is learned from / because its log-probs
    are trained as those of the whole distribution.
"""

import contextlib
import dataclasses
import gc
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # as ssr.py does
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import data
import grpo
import plan
import report
import ssr
from challenge import CHALLENGES, Challenge, Player, accuracy, window_of, written
from checkpoint import Checkpoints, fingerprint, fingerprint_tokenizer, tensors_of
from eval.rows import Rows, in_rounds
from games import GAMES
from judge import Texts
from model import load, load_tokenizer
from ranks import Ranks, Stopping
from sampler import Sampler
from ssr import (
    agree,
    bounded,
    copy_of,
    folder_of,
    interrupted,
    option,
    options,
    place,
    remembered,
    told,
)
from watch import RunFolder, Stopper, save_whole


@dataclass
class Settings(grpo.Settings):
    preset: str = "toy"
    """Where the other settings start: "toy" (small programs), "toy-translation", "r-zero-4b"."""
    game: str = "programs"
    """What is played: "programs" (toy/programs.py), "mathematics", "translation" (games.py)."""
    model: str = ""
    """A Hugging Face folder or hub id. Toys: as in ssr.py."""
    folder: str = ""
    """The folder to write. Default: runs/rzero-PRESET-DATE-TIME."""
    resume: bool = False
    """Go on in --folder (default: the preset's newest run), with the settings it began with."""
    iterations: int = 3
    """Of Challenger and Solver, in turn."""
    challenger_steps: int = 5
    """In each iteration."""
    challenger_samples: int = 4
    """Questions for each prompt: a group."""
    challenger_lr: float = 0.0
    """0: --lr."""
    challenge: str = "paper"
    """What a question is worth: "paper", "released", "percentile", "random" (see challenge.py)."""
    repetition: float = 1.0
    """Weight of the penalty: the share of the batch that is like the question."""
    alike: float = 0.5
    """Questions are alike whose mean distance, 1 - BLEU, is below this."""
    questions: int = 8000
    """Written in each iteration for the Solver to learn from."""
    answers: int = 10
    """Of the Solver to each question, to see how far it agrees with itself."""
    band: float = 0.25
    """How far from one half that may be in questions to learn from."""
    top_p: float = 0.99
    """Of those questions and answers."""
    solver_steps: int = 15
    """In each iteration."""
    solver_samples: int = 5
    """Answers to each question: a group."""
    held_out: str = ""
    """Mathematics: JSON lines with "question" and "answer" to measure with. Toys make theirs."""
    eval_prompts: int = 256
    """Held-out questions, …"""
    eval_every: int = 5
    """… and steps of the Solver between two measurements with them."""
    likeness: str = "chrf"
    """Translation: how far the Solver agrees, by the "chrf" of its translations with each other,
    or by its own mean "score" of them."""
    real: int = 2000
    """Translation: real sentences that there are, half of what is learned from."""
    save_every: int = 5
    """Steps between two checkpoints."""
    slots: int = 256
    """Sequences that are decoded together."""
    report: bool = True
    """Draw report.html after each iteration."""
    device: str = ""
    """"cpu", "cuda"; default: a GPU if there is one."""
    threads: int = 0
    """CPU threads; 0: PyTorch's choice."""
    shard: str = "all"
    """Weights and optimizer are spread over "all" ranks, or over those of a "node"."""
    patience: float = 1800.0
    """Seconds that ranks wait for one that makes no progress before the run is ended."""
    dry_run: bool = False
    """Say what memory and time each player's turn would take, and end."""
    gpus: int = 0
    """Of a --dry-run, as in ssr.py, …"""
    gpu: str = ""
    """… where --help says which."""


PRESETS = {
    "toy": {
        "prompts_per_step": 32, "challenger_steps": 10, "solver_steps": 25, "solver_samples": 8,
        "questions": 128, "lr": 4e-4, "challenger_lr": 6e-4, "warmup_steps": 2, "slots": 512,
        "max_prompt_tokens": 21, "max_new_tokens": 41, "threads": 1, "eval_every": 13,
    },
    "toy-translation": {
        "game": "translation", "challenge": "percentile", "band": 0.5, "prompts_per_step": 24,
        "challenger_steps": 8, "solver_steps": 30, "solver_samples": 8, "questions": 512,
        "answers": 6, "lr": 2e-4, "warmup_steps": 2, "slots": 256, "max_prompt_tokens": 32,
        "max_new_tokens": 20, "threads": 1,
    },
    # The paper's numbers, as far as they are known; lengths and the prompts are our choice.
    "r-zero-4b": {
        "game": "mathematics", "model": "Qwen/Qwen3-4B-Base", "lr": 1e-6, "weight_decay": 1e-2,
        "kl": 1e-2, "warmup_steps": 0, "final_lr": 1.0, "max_prompt_tokens": 1024,
        "max_new_tokens": 4096, "slots": 24, "micro_batch_tokens": 8192,
    },
}  # fmt: skip
BOUNDS = [
    *ssr.BOUNDS,
    (lambda v: v >= 1, "must be at least 1",
     "iterations challenger_steps solver_steps questions real"),
    (lambda v: v >= 2, "must be at least 2: a group, or a majority",
     "challenger_samples solver_samples answers"),
    (lambda v: 0 <= v <= 0.5, "must lie in 0 … 0.5", "band"),
    (lambda v: 0 <= v < math.inf, "must not be negative", "repetition challenger_lr"),
    (lambda v: 0 < v <= 1, "must be above 0 and at most 1", "alike top_p"),
]  # fmt: skip
CHOICES = {name: known for name, known in ssr.CHOICES.items() if hasattr(Settings, name)}
CHOICES |= {"challenge": CHALLENGES, "game": tuple(GAMES), "likeness": ("chrf", "score")}
REFUSED = {  # two of grpo's settings, which `turn` sets, and what is none
    "top_k": ssr.REFUSED["top_k"],
    "steps": "each player has its own: --challenger-steps, --solver-steps",
    "samples_per_prompt": "each player has its own: --challenger-samples, --solver-samples",
}
FREE = {"folder", "resume", "iterations", "save_every", "micro_batch_tokens", "slots", "device",
        "threads", "shard", "patience", "report", "gpus", "gpu"}  # fmt: skip  # may be others later
ASKED = ("game", "questions", "answers", "top_p", "temperature", "seed", "likeness", "real")
PLAYERS = ("challenger", "solver")
TOLD = {
    "reward/total": "reward", "reward/agreement": "agreement", "questions/different": "different",
    "questions/depth": "depth", "reward/self": "judge", "eval/accuracy": "held-out: greedy",
    "eval/sampled_accuracy": "sampled",
}  # fmt: skip


class Run:
    """Players learn and questions are written, in turn. What is done is on the disk, so a run that
    goes on skips it; a turn that was stopped goes on from its checkpoint, or its rows."""

    def __init__(self, s: Settings, game, device: torch.device, ranks: Ranks):
        self.s, self.game, self.device, self.ranks = s, game, device, ranks
        self.path, self.iteration = Path(s.folder), 0
        self.folders = {x: RunFolder(self.path / x, ranks.rank == 0) for x in (".", *PLAYERS)}
        self.texts = Texts(load_tokenizer(game.folder))
        pieces = [game.pose(question) for question, _ in game.held_out]
        self.held_out = self.prompts(pieces, game.held_out)
        if (longest := max((len(p.ids) for p in self.held_out), default=0)) > s.max_prompt_tokens:
            raise ValueError(f"--max-prompt-tokens {s.max_prompt_tokens}: a held-out question has "
                             f"{longest}")  # fmt: skip

    def begin(self) -> None:
        for folder in self.folders.values():  # a kill may have come between two of them
            again = (folder.path / "settings.json").is_file()
            folder.begin(self.s, 0, math.inf if again else None)
        print(f"R-Zero, {self.s.game}: {self.s.iterations} iterations, writing {self.path}")

    def play(self) -> None:
        self.ranks.on_first("begin", self.begin)
        try:
            for i in range(1, self.s.iterations + 1):
                self.iteration = i
                if not self.weights("challenger").is_dir():
                    self.challenger_learns()
                if not self.weights("solver").is_dir():
                    self.solver_learns(self.questions())
        except Stopping:
            if self.ranks.rank == 0:
                self.draw(ended=True)
            raise
        self.ranks.on_first("end", self.finish)

    def weights(self, player: str, ago: int = 0) -> Path:
        number = self.iteration - ago
        return self.path / f"iteration-{number}" / player if number else self.game.folder

    def prompts(self, pieces: Sequence[list[str]], tasks: Sequence) -> list[grpo.Prompt]:
        return [grpo.Prompt(*x) for x in zip(self.texts.encode(pieces), tasks, strict=True)]

    # ------------------------------------------------------------------- a player's iteration

    def challenger_learns(self) -> None:
        s = self.turn(self.s.challenger_steps, self.s.challenger_samples, self.s.challenger_lr)
        solver = Player(self.weights("solver", 1), s, self.game, self.device)

        def batch(number: int) -> list[grpo.Prompt]:
            first = ((self.iteration - 1) * s.steps + number - 1) * s.prompts_per_step
            asked = [self.game.ask(first + p) for p in range(s.prompts_per_step)]
            return self.prompts(*zip(*asked, strict=True))

        def measure(step: grpo.Step | None, sampler) -> dict[str, float]:
            written = [w for row in step.judged for w in row.words if w] if step else []
            if not written:
                return {}
            known = {f"questions/{k}": v for k, v in self.game.measure(written).items()}
            return {"questions/different": len(set(written)) / len(written)} | known

        reward = Challenge(s, self.game, solver)
        self.learn("challenger", s, lambda texts, sampler: reward, batch, measure)

    def questions(self) -> list[dict]:
        """What the Challenger writes now, with the Solver's label and how far it agrees; the same
        question once."""
        s, game, players = self.s, self.game, []
        folders = [self.weights("challenger"), self.weights("solver", 1)]
        key = {name: getattr(s, name) for name in ASKED}
        key["weights"] = [fingerprint(folder) for folder in folders]

        def work(numbers: Sequence[int]) -> list[dict]:
            if not players:  # nobody is loaded where all rows are there
                players.extend(Player(folder, s, game, self.device) for folder in folders)
            first = self.iteration * s.questions
            return written(*players, [first + n for n in numbers], numbers)

        path = self.path / f"iteration-{self.iteration}" / "questions.jsonl"
        rows = in_rounds(
            self.ranks, lambda: Rows(path, key, elsewhere="--folder"),
            f"iteration {self.iteration}, questions", range(s.questions), work,
            size=s.slots * self.ranks.size,
        )  # fmt: skip
        first = {tuple(row["question"]): row for row in reversed(rows) if row["question"]}
        return sorted(first.values(), key=lambda row: row["segment"])

    def solver_learns(self, rows: list[dict]) -> None:
        s = self.turn(self.s.solver_steps, self.s.solver_samples)
        kept = [
            row for row in rows
            if abs(row["agreement"] - 0.5) <= s.band + 1e-9 and self.game.fair(row["question"])
        ]  # fmt: skip
        known = self.game.measure([r["question"] for r in kept], [r["label"] for r in kept])
        about = {"lessons/kept": len(kept)} | {f"lessons/{k}": v for k, v in known.items()}
        print(f"iteration {self.iteration}: of {s.questions} questions {len(rows)} different ones, "
              f"{len(kept)} to learn from", *(f", {k} {v:.2f}" for k, v in known.items()), sep="",
              flush=True)  # fmt: skip
        lessons = self.game.lessons(kept, self.iteration)
        if not kept or not lessons:
            raise ValueError(
                f"iteration {self.iteration}: no question within --band {s.band} of one half is "
                "left to learn from: more --questions, a wider --band, fewer --challenger-steps"
            )
        order = data.Order(lessons, s.seed)

        def batch(number: int) -> list[grpo.Prompt]:
            P = s.prompts_per_step
            tasks = [order.task((number - 1) * P + p) for p in range(P)]
            return self.prompts([self.game.pose_lesson(task) for task in tasks], tasks)

        def measure(step: grpo.Step | None, sampler) -> dict[str, float]:
            found = about if step and step.number == 1 else {}
            between = step and step.number % s.eval_every and step.number < s.steps
            if between or not self.held_out:
                return found
            ask = partial(
                accuracy, self.held_out, self.game, self.texts, sampler, self.s, self.ranks
            )
            return found | {"eval/accuracy": ask(0.0, 1), "eval/sampled_accuracy": ask(1.0, 4)}

        self.learn("solver", s, self.game.reward, batch, measure)

    # ------------------------------------------------------------------------- what is common

    def turn(self, steps: int, samples: int, lr: float = 0.0) -> Settings:
        """The loop's settings. Steps begin at 1 again, and another seed makes other draws."""
        return dataclasses.replace(
            self.s, steps=steps, samples_per_prompt=samples, lr=lr or self.s.lr,
            seed=self.s.seed + 1_000_000 * self.iteration,
        )  # fmt: skip

    def learn(self, player: str, s: Settings, reward, batch, measure) -> None:
        """From the weights of the iteration before to those of this one."""
        ranks, log, final = self.ranks, self.folders[player], self.weights(player)
        source, base = self.weights(player, 1), (self.iteration - 1) * s.steps
        ranks.at(f"iteration {self.iteration}: load the {player}")
        gc.collect()  # FSDP's models refer to themselves
        model = load(source, dtype=torch.float32, device=self.device, shard=ranks.shard)
        half = torch.bfloat16 if self.device.type == "cuda" else None
        model.compute_dtype, model.checkpointing = half, half is not None
        actor = model if half is None and ranks.size == 1 else copy_of(model, half)
        sampler = Sampler(actor, s.slots, window_of(s, self.game, model))
        start = copy_of(model, half) if s.track_kl or s.kl else None
        optimizer = grpo.make_optimizer(model, s)
        identity = {"turn": [player, self.iteration], "weights": fingerprint(source)}
        identity["tokenizer"] = fingerprint_tokenizer(source)
        where, done = final.with_name(f"{player}.checkpoints"), None
        kept = Checkpoints(where, 1, ranks, tensors_of(model, optimizer), identity)
        if about := kept.restore():
            done = grpo.Step(about["step"], about["metrics"], [], about["missing"])
            grpo.refresh(sampler, model)
        number, row = (done.number, about["row"]) if done else (0, None)
        begun, last = time.perf_counter(), done

        def logged(step: grpo.Step) -> dict:
            made = {"step": base + step.number} | step.metrics | measure(step, sampler)
            log.add("metrics.jsonl", [made])
            pace = (time.perf_counter() - begun) / max(step.number - number, 1)
            words = [f"iteration {self.iteration}, {player:10} {step.number:>3}/{s.steps}"]
            words += [f"{label} {made[key]:.3f}" for key, label in TOLD.items() if key in made]
            left = f"{pace * (s.steps - step.number):.0f} s left"
            print("  ".join([*words, left]), flush=True)
            return made

        def save() -> None:
            kept.save(last.number, {"metrics": last.metrics, "missing": last.missing, "row": row})

        if ranks.rank == 0:  # rows from the checkpoint's on come again
            log.cut("metrics.jsonl", base + number + (base > 0 and not done))
        try:
            if row:
                log.add("metrics.jsonl", [row])
            elif done:  # it was stopped while it measured
                row = logged(done)
            elif not base:
                log.add("metrics.jsonl", [{"step": 0} | measure(None, sampler)])
            for step in grpo.train(
                model, sampler, reward(self.texts, sampler), batch, s, optimizer,
                self.texts.stop_ids, start, ranks, done,
            ):  # fmt: skip
                last, row = step, None
                row = logged(step)
                if step.number % s.save_every == 0 or step.number == s.steps:
                    save()
        except Stopping:
            ranks.ending = True
            if last:
                save()
            kept.wait()
            if kept.error:
                raise OSError(kept.error) from None
            raise
        kept.wait()
        # Whole, on the first rank's host, in fp32: the next iteration begins with it.
        where = torch.device("meta" if ranks.rank else "cpu")
        whole = model if ranks.size == 1 else copy_of(model, torch.float32, where)
        ranks.on_first("keep", lambda: self.keep(whole, final))

    def keep(self, model, final: Path) -> None:
        partial = final.with_name(f"{final.name}.partial")
        save_whole(model, self.game.folder, partial)
        partial.rename(final)
        shutil.rmtree(final.with_name(f"{final.name}.checkpoints"), ignore_errors=True)
        if final.name == "solver":
            self.draw(self.iteration == self.s.iterations)

    def draw(self, ended: bool) -> None:
        """Until it has ended the page says so, and reads itself again."""
        runs = [report.Run(self.path / name, name, ended) for name in PLAYERS]
        if self.s.report and (runs := [run for run in runs if run.rows]):
            report.write(self.path / "report.html", report.page(runs))

    def finish(self) -> None:
        """result.json, and the table: a column for the start, and one for each iteration."""
        rows = [r for x in PLAYERS for r in report.rows_of(self.path / x / "metrics.jsonl")]
        ends = [r for r in rows if "eval/accuracy" in r and r["step"] % self.s.solver_steps == 0]
        table = {key: [r[key] for r in ends] for key in ("eval/accuracy", "eval/sampled_accuracy")}
        for key in dict.fromkeys(key for r in rows for key in r if key.startswith("lessons/")):
            table[key] = [None, *(r[key] for r in rows if key in r)]
        self.folders["."].write("result.json", table)
        heads = ["start", *(f"{i + 1}." for i in range(self.s.iterations))]
        print(f"\n{'after iteration':24}" + "".join(f"{head:>9}" for head in heads))
        for key, values in table.items():
            shown = ["–" if x is None else f"{x:.3f}".rstrip("0").rstrip(".") for x in values]
            print(f"{key:24}" + "".join(f"{x:>9}" for x in shown))
        print(f"\nweights: {self.weights('solver')}"
              + f"\nreport:  {self.path / 'report.html'}" * self.s.report)  # fmt: skip
        for left in self.path.glob("iteration-*/*.checkpoints"):  # by a kill at the wrong moment
            shutil.rmtree(left)


def parse(words: list[str]) -> Settings:
    given = options(words, Settings, PRESETS, "rzero.py", __doc__, REFUSED)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        given["resume"] = True  # torchrun started the ranks again
    preset, had = given.get("preset", "toy"), {}
    if given.get("resume"):
        folder = folder_of(f"rzero-{preset}", given.get("folder", ""), True)
        had = remembered(folder, given, Settings, FREE)
    elif given.get("folder") and Path(given["folder"]).exists():
        raise ValueError(f"--folder {given['folder']} exists already: --resume, or name another")
    preset = given.get("preset") or had.get("preset") or preset
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset} is unknown; known: {', '.join(PRESETS)}")
    s = Settings(**PRESETS[preset] | had | given | {"preset": preset})
    if s.folder:
        ssr.check_writable(s.folder)
    bounded(s, BOUNDS)
    for name, known in CHOICES.items():
        if getattr(s, name) not in known:
            raise ValueError(f"{option(name)} {getattr(s, name)}: use {', '.join(known)}")
    if s.micro_batch_tokens < (longest := s.max_prompt_tokens + s.max_new_tokens):
        raise ValueError(f"--micro-batch-tokens {s.micro_batch_tokens}: use at least {longest}")
    return s


class Turn(plan.Work):
    """Every slot is there, needed or not."""

    slots = property(lambda self: self.s.slots)


def dry_run(s: Settings) -> None:
    """ssr.py's, for each player's turn."""
    if not s.model or s.game == "translation":
        raise ValueError("--dry-run: of a --model, and not for the toy's games, which fit anywhere")
    machine, cuda, G, shared = ssr.machines(s)
    config, same = plan.shape_of(s.model), {f.name for f in dataclasses.fields(grpo.Settings)}
    same = {name: getattr(s, name) for name in (*same, "slots", "shard")}

    def work(steps: int, prompts: int, samples: int, asked: plan.Work | None = None) -> plan.Work:
        of_it = {"steps": steps, "prompts_per_step": prompts, "samples_per_prompt": samples}
        usual = {"reward": "oracle", "reading": "expected", "eval_prompts": 0}  # not estimated
        settings = ssr.Settings(**same | of_it | usual)
        return Turn(settings, config, G, shared, 0, cuda, asked=asked)

    hours, missing, n, asks = 0.0, 0.0, s.prompts_per_step, s.challenger_samples
    challenger = work(s.challenger_steps, n, asks, work(1, n * asks, s.answers))
    solver = work(s.solver_steps, n, s.solver_samples)
    for name, turn in (("Challenger", challenger), ("Solver", solver)):
        print(f"The {name}'s turn. {plan.report(turn, machine, s.model)}\n")
        hours += turn.s.steps * sum(plan.seconds(turn, machine).values()) / 3600
        missing = max(missing, plan.missing(turn, machine))
    both = work(1, s.questions, 1), work(1, s.questions, s.answers)
    writing = sum(plan.seconds(k, machine)["sample"] for k in both) / 3600
    print(f"Between them {s.questions} questions, {s.answers} answers to each: {writing:.3g} hours."
          f"\n{s.iterations} iterations: {s.iterations * (hours + writing):.3g} hours, if all are "
          "as long as they may be; evaluations are not in it.")  # fmt: skip
    if missing > 0:
        sys.exit(1)


def start(words: list[str]) -> None:
    s = parse(words)
    if s.dry_run:
        return dry_run(s)
    device, ranks = place(s)
    agree(ranks, {option(name): value for name, value in dataclasses.asdict(s).items()})
    named = partial(folder_of, f"rzero-{s.preset}", s.folder, s.resume)
    s.folder = str(ranks.on_first("name the run", named))
    with contextlib.closing(GAMES[s.game](s, ranks)) as game, Stopper(ranks):
        try:
            Run(s, game, device, ranks).play()
        except Stopping:
            print(f"stopped; go on with --resume --folder {s.folder}", flush=True)


def main(words: list[str]) -> None:
    told("rzero.py", lambda: start(words))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupted)
    main(sys.argv[1:])
