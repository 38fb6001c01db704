"""What is learned and who says how well: texts, templates, measures, judges.

    with closing(Comets(settings, device)) as comets:
        problem = data_problem(settings, ranks, comets)        # or toy_problem(settings, ranks)
        scorers = scorers_of(settings, judge, comets)           # name -> (weight, scorer)

Nothing here changes weights. The settings are ssr.py's.
"""

import importlib.util
import os
from functools import cache, partial
from pathlib import Path

import torch

import data
import family
import plan
from checkpoint import fingerprint
from eval import sets
from eval.comet import Comet, rows_of, where
from judge import PAPER, PLAIN, TOY, Judge, Outside, Prompts, Scorer, Task, Texts
from model import Transformer, check_folder, find_folder, load, load_tokenizer
from ranks import Ranks
from remote import RemoteJudge
from sampler import Sampler
from toy import controls
from toy.languages import Languages, quality
from toy.pretrain import Recipe, make, skills_of
from watch import Measure, Problem

TEMPLATES = {"paper": PAPER, "plain": PLAIN, "toy": TOY}
REWARDS = ("self", "comet", "self+comet", *family.REWARDS)


class Comets:
    """COMET's workers of this rank, one for each checkpoint; they load while we go on."""

    def __init__(self, s, device: torch.device):
        self.s, self.device = s, device
        self.started: dict[str, Comet] = {}

    def start(self, checkpoint: str) -> Comet:
        if checkpoint not in self.started:
            patience = 0.9 * self.s.patience  # before a rank that waits for it is given up
            self.started[checkpoint] = Comet(
                checkpoint, str(self.device), self.s.comet_dtype, self.s.comet_batch,
                start_limit=patience, silence_limit=min(600.0, patience),
            )  # fmt: skip
        return self.started[checkpoint]

    def measure(self, checkpoint: str, referenced: bool) -> Measure:
        """`referenced`: all texts that will come have a reference."""
        comet = self.start(checkpoint)

        def measure(tasks: list[Task], texts: list[str]) -> list[float]:
            shown = comet.ready()["takes_reference"] and referenced
            return comet.score(rows_of(tasks, texts, shown))

        return measure

    def close(self) -> None:
        for comet in self.started.values():
            comet.close()


def stamp(checkpoint: str) -> str:
    """Tells a checkpoint of COMET's from another in its place, when it is a path."""
    path = Path(where(checkpoint)).expanduser()
    if checkpoint[0] in "./~" and not path.exists():
        raise ValueError(f"{checkpoint}: there is no such checkpoint")
    file = path / "checkpoints" / "model.ckpt" if path.is_dir() else path
    if not file.is_file():
        return where(checkpoint)  # the hub's, whose revision the worker reports
    return f"{Path(checkpoint).name} {fingerprint(file)}"


# ---------------------------------------------------------------------------------- the texts


def exact_match(candidate: str, reference: str) -> float:
    return float(candidate.split() == reference.split())


def each(measure) -> Measure:
    """Of one translation and its reference -> of many."""
    return lambda tasks, texts: [
        measure(text, task.reference) for text, task in zip(texts, tasks, strict=True)
    ]


def toy_folder(s, ranks: Ranks) -> Path:
    recipe = Recipe(seed=s.seed, tokens=s.toy_tokens, skills=skills_of(s.toy_skills))
    return ranks.one_first("make the toy", lambda: make(recipe))


def policy_folder(s, ranks: Ranks) -> Path:
    return ranks.one_first("fetch the model", lambda: find_folder(s.model))


def load_texts(folder: Path, prompts: Prompts, chat: bool) -> Texts:
    """The text codec of the model that translates. A model is refused if its answers would contain
    a thought that the format has no place for, or that already begins in the prompt."""
    check_folder(folder)  # first: transformers would blame the tokenizer for a bad config.json
    texts = Texts(load_tokenizer(folder), chat, thinking=prompts.tags)
    before, opened, _ = texts.turn[1].rpartition("<think>")
    if opened and "</think>" not in texts.turn[1][len(before) :]:
        raise ValueError(
            f"{folder}: its chat template begins every answer with <think> and has no switch "
            "(enable_thinking) for that, so no translation would have the right form: leave --chat "
            "out, or use a model that can answer without thinking"
        )
    if not (chat or prompts.tags) and "<think>" in texts.tokenizer.get_added_vocab():
        raise ValueError(
            f"{folder}: this model thinks, between <think> and </think>, and --prompts plain has "
            "no place for a thought, so no translation would have the right form: use --chat, "
            "which disables thinking, or --prompts paper"
        )
    for note in texts.notes:
        print(note)
    return texts


def toy_problem(s, ranks: Ranks) -> Problem:
    folder = Path(s.model) if s.model else toy_folder(s, ranks)
    check_folder(folder)
    pair = Languages(s.seed)
    known = load_tokenizer(folder).get_vocab().keys()
    if foreign := {word for words in pair.vocabulary.values() for word in words} - known:
        raise ValueError(
            f"--model {folder} was not made for --seed {s.seed}: its tokenizer does not know "
            f"{', '.join(sorted(foreign)[:3])} …"
        )
    family.check_taught(s, known)
    held_out = [pair.task("held-out", i) for i in range(s.eval_prompts)]
    measures = {"exact_match": each(exact_match), "quality": each(quality)}
    task = partial(pair.task, "train")
    return Problem(folder, TEMPLATES[s.prompts], task, held_out, measures, f"toy {s.seed}")


def data_problem(s, ranks: Ranks, comets: Comets) -> Problem:
    def read() -> tuple:
        corpus = data.gather(s.data, s.source, s.target, s.skip_bad_lines)
        pairs = data.pairs_of(s.source, s.target)
        return corpus, sets.held_out(s.held_out, pairs) if s.held_out else []

    corpus, apart = ranks.on_first("read the texts", read)
    folder = policy_folder(s, ranks)
    prompts = TEMPLATES[s.prompts]
    texts = load_texts(folder, prompts, s.chat)

    def fitting(tasks: list[Task]) -> list[Task]:
        lengths = map(len, texts.encode([prompts.ask(task) for task in tasks]))
        return [t for t, n in zip(tasks, lengths, strict=True) if n <= s.max_prompt_tokens]

    fit = fitting(corpus.tasks)
    some = fitting(apart) if s.held_out else fit
    asked = s.held_out or s.data
    if not some:
        raise ValueError(
            f"{asked}: none of {len(apart if s.held_out else corpus.tasks)} texts has a prompt "
            f"within --max-prompt-tokens {s.max_prompt_tokens}: raise it"
        )
    if not s.held_out and len(some) <= s.eval_prompts:
        raise ValueError(
            f"{asked}: {len(some)} texts have a prompt within --max-prompt-tokens "
            f"{s.max_prompt_tokens}, and {s.eval_prompts} are to be held out: add texts, or lower "
            "--eval-prompts"
        )
    held_out, _ = data.split(some, s.eval_prompts, s.seed)  # a set that is smaller is taken whole
    training = data.without(fit, apart or held_out)
    same = len(fit) - len(training) - (0 if s.held_out else len(held_out))
    print(
        f"{corpus.report()}\n{len(corpus.tasks):,} texts: {len(corpus.tasks) - len(fit):,} left "
        f"out, longer than --max-prompt-tokens {s.max_prompt_tokens}; {len(held_out)} held out"
        f"{f' from {s.held_out}' if s.held_out else ''}, {same} left out that repeat held-out "
        f"ones; {len(training):,} to train on"
    )
    wants = [p for p in custom_parts(s.reward) if getattr(load_scorer(p), "references", False)]
    wants += ["--comet-references"] * s.comet_references
    if wants and any(not task.reference for task in training):
        raise ValueError(f'{wants[0]}: not all texts of {s.data} have a "reference"')
    measures = measures_of(s, held_out, comets)
    digest = data.digest(training + held_out)
    return Problem(folder, prompts, data.Order(training, s.seed).task, held_out, measures, digest)


def measures_of(s, held_out: list[Task], comets: Comets) -> dict[str, Measure]:
    referenced = all(task.reference for task in held_out)
    names = s.measures or ("chrf" if referenced else "none")
    if names == "none":
        print("Nothing independent is measured: no alarm can ring, and best/ goes by the judge. "
              "--held-out with references would do, or --measures cometkiwi")  # fmt: skip
    found: dict[str, Measure] = {}
    for name in [w.strip() for w in names.split(",") if w.strip() != "none"]:
        label = name.rstrip("/").rpartition("/")[2]
        if label in (*found, "self", "format"):
            raise ValueError(f"--measures {names}: a second one is called {label}")
        if name != "chrf":
            found[label] = comets.measure(name, referenced)
        elif referenced:
            found[label] = each(chrf)
        else:
            raise ValueError("--measures chrf needs a reference of every held-out text")
    return found


def chrf(candidate: str, reference: str) -> float:
    from sacrebleu import sentence_chrf

    return sentence_chrf(candidate, [reference]).score / 100


def scorers_of(s, judge, comets: Comets) -> dict:
    """name -> (weight, scorer) for judge.Reward; `judge` is the policy, or another."""
    if s.reward in family.REWARDS:
        return family.scorers(s, judge)
    if s.reward not in REWARDS and s.reward in controls.REWARDS:
        return controls.scorers(s.reward, judge, s.seed, s.toy_noise)
    parts = s.reward.split("+")
    scorers = {"self": (s.self_weight if parts[1:] else 1.0, judge)} if "self" in parts else {}
    if "comet" in parts:
        comet = comets.start(s.comet)
        if comet.ready()["needs_reference"] and not s.comet_references:
            raise ValueError(
                f"--comet {s.comet} cannot score without a reference: use one that can, such as "
                "cometkiwi, or --comet-references"
            )
        control = comet.about["control"]
        outside = Outside(comet.score, s.comet_low, s.comet_high, s.comet_references, control)
        scorers["comet"] = (s.comet_weight if parts[1:] else 1.0, outside)
    own = {part.rpartition(":")[2]: load_scorer(part) for part in custom_parts(s.reward)}
    return scorers | {name: (1.0, scorer) for name, scorer in own.items()}


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
        raise ValueError(
            f"--reward {part}: {file} does not run ({type(error).__name__}: {error})"
        ) from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--reward {part}: {file} has no function {name}")
    if name in ("self", "comet", "format", "total", "weight"):
        raise ValueError(f"--reward {part}: reward/{name} exists already: choose another name")
    return getattr(module, name)


def another_judge(
    s, ranks: Ranks, problem: Problem, device: torch.device, slots: int, policy: Texts
):
    """A model of somebody else's, asked as the policy would ask itself."""
    if s.judge_url:
        return judge_behind(s, ranks, problem.prompts)
    folder = ranks.one_first("fetch the judge", lambda: find_folder(s.judge_model))
    model, texts = loaded(folder, device, s.judge_chat)
    # Its tokenizer may need more tokens for the same texts than the policy's.
    asked = [problem.prompts.ask(task) for task in problem.held_out]
    pairs = zip(texts.encode(asked), policy.encode(asked), strict=True)
    more = 1.25 * max(len(theirs) / len(ours) for theirs, ours in pairs)
    window = window_of(s, problem, texts, model.config.max_length, max(1.0, more))
    return judge_of(s, Sampler(model, slots, window), texts, problem.prompts)


def judge_behind(s, ranks: Ranks, prompts: Prompts) -> RemoteJudge:
    judge = RemoteJudge(
        s.judge_url, s.judge_model, prompts, s.judge_samples, s.judge_temperature,
        s.judge_max_new_tokens, s.seed, s.judge_parallel, limit=s.judge_patience,
    )  # fmt: skip
    ranks.on_first("ask the judge", judge.check)
    return judge


def judge_alone(s, ranks: Ranks, pairs: list[tuple[Task, str]], device: torch.device):
    """The judge of translations that are there (--judge-only), and what it is known by.

    Its cache has room for the longest of them that it can ever hold together, and no more: a call
    gets as many slots as that makes of the length that the call needs.
    """
    prompts = TEMPLATES[s.prompts]
    asked = ("prompts", "reading", "judge_samples", "judge_temperature", "judge_max_new_tokens")
    key = {name: getattr(s, name) for name in (*asked, "chat", "seed")}
    if s.judge_url:
        return judge_behind(s, ranks, prompts), key | {
            "model": f"{s.judge_model} {s.judge_url}", "name": s.judge_model,
        }  # fmt: skip
    toy = s.preset == "toy" and not s.model
    folder = toy_folder(s, ranks) if toy else policy_folder(s, ranks)
    (config, _), texts = check_folder(folder), Texts(load_tokenizer(folder), s.chat)
    if not s.chat and texts.tokenizer.chat_template:
        print("The tokenizer has a chat template: if the model is made to chat, ask it in that, "
              "with --chat" + " --reading written" * (s.reading == "expected"))  # fmt: skip

    def windows_of(pairs: list[tuple[Task, str]]) -> list[int]:
        """Longest first; without what the model has no positions for."""
        asked = texts.encode([prompts.ask_judge(*pair, s.reading) for pair in pairs])
        windows = [len(ids) + family.words_of(s, prompts) for ids in asked]
        return sorted((w for w in windows if w <= config.max_length), reverse=True)

    windows = windows_of(pairs)
    if not windows:
        raise ValueError(
            f"no translation can be judged within the model's {config.max_length} positions: lower "
            f"--judge-max-new-tokens {s.judge_max_new_tokens}"
        )
    most = s.slots if s.reading == "written" else 1  # to read takes one slot
    tokens = max(min(most, n * s.judge_samples) * w for n, w in enumerate(windows, 1))
    work = plan.Work(s, config, ranks.size, ranks.size, 0, device.type == "cuda")
    plan.check_judge_room(
        work, tokens, device, 1 if work.cuda else int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        f"lower --slots {s.slots}, or leave out long translations (the longest takes "
        f"{windows[0]:,} tokens with its judgement)",
    )  # fmt: skip
    model, _ = loaded(folder, device, s.chat)
    judge = judge_of(s, None, texts, prompts)

    def judge_fitting(tasks: list[Task], answers: list[list[str]], step: int):
        needed = max(windows_of([(t, a) for t, [a] in zip(tasks, answers, strict=True)]), default=2)
        now = judge.sampler
        if not now or not needed <= now.max_length <= 2 * needed:
            judge.sampler = now = None  # its cache goes before the next one comes
            slots = min(most, len(windows) * s.judge_samples, tokens // needed)
            judge.sampler = Sampler(model, slots, needed)
        return judge(tasks, answers, step)

    known = {"model": f"{folder} {fingerprint(folder)}", "name": folder.resolve().name}
    return judge_fitting, key | known | {"dtype": str(next(model.parameters()).dtype)}


def loaded(folder: Path, device: torch.device, chat: bool) -> tuple[Transformer, Texts]:
    """A model that only judges."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load(folder, dtype=dtype, device=device), Texts(load_tokenizer(folder), chat)


def judge_of(s, sampler: Sampler, texts: Texts, prompts: Prompts) -> Judge:
    return Judge(
        sampler, texts, prompts, s.reading, s.judge_samples, s.judge_temperature,
        s.judge_max_new_tokens, texts.stop_ids, s.seed,
    )  # fmt: skip


def window_of(s, problem: Problem, texts: Texts, positions: int, more: float = 1.0) -> int:
    """Room for a prompt and its candidate, and for what the judge is asked and its words."""
    task = problem.held_out[0]._replace(text="")
    empty = [problem.prompts.ask_judge(task, "", s.reading), family.asks(s, problem.prompts, task)]
    template = max(map(len, texts.encode(empty)))
    words, judged = family.words_of(s, problem.prompts), family.together(s, problem.prompts)
    needed = template + int(more * (s.max_prompt_tokens + judged * s.max_new_tokens)) + words
    if needed > positions:
        raise ValueError(
            f"the judge needs room for {needed} tokens ({template} of the template, source, "
            f"{judged} candidate{'s' * (judged > 1)}, {words} of its own), the model has "
            f"{positions}: lower "
            f"--max-prompt-tokens {s.max_prompt_tokens}, --max-new-tokens {s.max_new_tokens} or "
            f"--judge-max-new-tokens {s.judge_max_new_tokens}"
        )
    return min(needed + 64, positions)  # a text may take more tokens than the model wrote it with


def judge_template(s) -> int:
    """Its tokens, about: four characters each, or (toy) a word; and all candidates but one."""
    task, prompts = Task("", "English", "Chinese"), TEMPLATES[s.prompts]
    texts = ["".join(x) for x in (prompts.ask_judge(task, "", s.reading),
                                  family.asks(s, prompts, task))]  # fmt: skip
    template = max(len(x.split()) if s.prompts == "toy" else len(x) // 4 for x in texts)
    return template + (family.together(s, prompts) - 1) * s.max_new_tokens
