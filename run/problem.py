"""What is learned: the starting model, its prompts, training texts, and held-out metrics.

problem = data_problem(s, ranks, comets)        # or toy_problem(s, ranks)
problem.task(0)                                 # the first training text
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data import loading
from data.codec import PromptCodec, load_tokenizer
from data.languages import describe_language_check
from eval import sets
from judge import Prompts, Task
from model import check_folder, find_folder
from rewards import family
from rewards.build import CometWorkers, custom_parts, load_scorer, toy_skills
from run.distributed import Ranks
from run.settings import TEMPLATES
from toy.languages import Languages, quality
from toy.pretrain import Recipe, language_model

Metric = Callable[[list[Task], list[str]], list[float]]
"""Of translations of these tasks. It may look at their references."""


@dataclass
class Problem:
    folder: Path
    """The model to start from."""
    prompts: Prompts
    task: Callable[[int], Task]
    """Training text number 0, 1, 2, …"""
    held_out: list[Task]
    eval_metrics: dict[str, Metric]
    """The first one selects the best weights."""
    digest: str
    """Of the texts: a run is resumed with the same ones only."""


def per_segment(measure) -> Metric:
    """A function of one translation and its reference -> of many."""
    return lambda tasks, texts: [
        measure(text, task.reference) for text, task in zip(texts, tasks, strict=True)
    ]


def exact_match(candidate: str, reference: str) -> float:
    return float(candidate.split() == reference.split())


def segment_chrf(candidate: str, reference: str) -> float:
    from sacrebleu import sentence_chrf

    return sentence_chrf(candidate, [reference]).score / 100


def policy_folder(s, ranks: Ranks) -> Path:
    return ranks.rank0_then_all("fetch the model", lambda: find_folder(s.model))


def load_codec(folder: Path, chat: bool | str) -> PromptCodec:
    check_folder(folder)  # first: transformers would blame the tokenizer for a bad config.json
    codec = PromptCodec(load_tokenizer(folder), chat)
    for note in codec.notes:
        print(note)
    return codec


def toy_problem(s, ranks: Ranks) -> Problem:
    languages = Languages(s.seed)
    if s.toy_tokens:
        recipe = Recipe(s.seed, s.toy_tokens, skills=toy_skills(s))
        folder = ranks.rank0_then_all("make the toy", lambda: language_model(recipe))
    else:
        folder = policy_folder(s, ranks)
    check_folder(folder)
    vocabulary = {word for entries in languages.vocabulary.values() for word in entries}
    if foreign := vocabulary - load_tokenizer(folder).get_vocab().keys():
        raise ValueError(f"--model {folder} is no toy of --seed {s.seed}: its tokenizer does not "
                         f"know {', '.join(sorted(foreign)[:3])} …; leave --model out, give its "
                         "seed, or name --data or another --preset")  # fmt: skip
    held_out = [languages.task("held-out", i) for i in range(s.eval_prompts)]
    eval_metrics = {"exact_match": per_segment(exact_match), "quality": per_segment(quality)}
    task = partial(languages.task, "train")
    return Problem(folder, TEMPLATES[s.prompts], task, held_out, eval_metrics, f"toy {s.seed}")


def data_problem(s, ranks: Ranks, comets: CometWorkers) -> Problem:
    def read() -> tuple:
        corpus = loading.load_corpus(s.data, s.source, s.target)
        pairs = loading.parse_language_pairs(s.source, s.target)
        return corpus, sets.held_out(s.held_out, pairs) if s.held_out else []

    corpus, held_out_set = ranks.on_rank0("read the texts", read)
    folder, prompts = policy_folder(s, ranks), TEMPLATES[s.prompts]
    codec = load_codec(folder, s.chat)

    def fitting(name: str, tasks: list[Task], count: int) -> list[Task]:
        lengths = map(len, codec.encode([prompts.ask(task) for task in tasks]))
        fit = [t for t, n in zip(tasks, lengths, strict=True) if n <= s.max_prompt_tokens]
        if len(fit) < count:
            raise ValueError(
                f"{name}: {len(fit)} of {len(tasks)} texts have a prompt within "
                f"--max-prompt-tokens {s.max_prompt_tokens}, and at least {count} are needed: add "
                "texts, raise it for longer ones" + ", or lower --eval-prompts" * (not s.held_out)
            )
        return fit

    fit = fitting(s.data, corpus.tasks, 1 if s.held_out else s.eval_prompts + 1)
    candidates = fitting(s.held_out, held_out_set, 1) if s.held_out else fit
    held_out = loading.sample_held_out(candidates, s.eval_prompts, s.seed)
    training = loading.exclude_overlap(fit, held_out_set or held_out)
    print(
        f"{corpus.report()}\n{len(corpus.tasks):,} texts: {len(corpus.tasks) - len(fit):,} left "
        f"out, longer than --max-prompt-tokens {s.max_prompt_tokens}; {len(held_out)} held out"
        f"{f' from {s.held_out}' if s.held_out else ''}; {len(training):,} to train on"
    )
    print(describe_language_check(task.target for task in training))
    for part in custom_parts(s.reward):
        needs_references = getattr(load_scorer(part), "references", False)
        if needs_references and not all(task.reference for task in training):
            raise ValueError(f'--reward {part} needs a "reference" of every text, and some of '
                             f"{s.data} have none: leave those out")  # fmt: skip
    eval_metrics = build_eval_metrics(s, held_out, comets)
    order = loading.EpochShuffler(training, s.seed)
    digest = loading.hash_json(training + held_out)
    return Problem(folder, prompts, order.task, held_out, eval_metrics, digest)


def build_eval_metrics(s, held_out: list[Task], comets: CometWorkers) -> dict[str, Metric]:
    referenced = all(task.reference for task in held_out)
    names = s.eval_metrics or ("chrf" if referenced else "none")
    if names == "none":
        print("Nothing independent is measured: no alarm can ring, and best/ goes by the judge. "
              "--held-out with references would do, or --eval-metrics cometkiwi")  # fmt: skip
    eval_metrics: dict[str, Metric] = {}
    for name in [x.strip() for x in names.split(",") if x.strip() != "none"]:
        label = name.rstrip("/").rpartition("/")[2]
        if label in (*eval_metrics, "self", "format"):
            raise ValueError(f"--eval-metrics {names}: the name {label} is taken; rename a folder")
        if name == "chrf" and not referenced:
            raise ValueError(
                "--eval-metrics chrf needs a reference of every held-out text: name "
                "such a test set with --held-out, or use --eval-metrics cometkiwi"
            )
        eval_metrics[label] = (
            per_segment(segment_chrf) if name == "chrf" else comets.measure(name, referenced)
        )
    return eval_metrics


# ----------------------------------------------------------------- how long the judge's prompts are


def judge_window(
    s, problem: Problem, codec: PromptCodec, positions: int, longer: float = 1.0
) -> int:
    """Tokens of a cache row: a prompt and its candidate, or the judge's prompt and its judgement.
    `longer`: how many tokens `codec` needs for one of the policy's tokenizer."""
    prompts, task = problem.prompts, problem.held_out[0]._replace(text="")
    question, candidates, new_tokens = family.largest_question(s, prompts, task)
    template = max(map(len, codec.encode([prompts.ask_judge(task, "", s.score_mode), question])))
    text = int(longer * (s.max_prompt_tokens + candidates * s.max_new_tokens))
    needed = template + text + new_tokens
    if needed > positions:
        raise ValueError(
            f"the judge needs room for {needed} tokens ({template} of the template, source, "
            f"{candidates} candidate{'s' * (candidates > 1)}, {new_tokens} of its own), the model "
            f"has {positions}: lower --max-prompt-tokens {s.max_prompt_tokens}, --max-new-tokens "
            f"{s.max_new_tokens} or --judge-max-new-tokens {s.judge_max_new_tokens}"
        )
    return min(needed + 64, positions)  # a text may take more tokens than the model wrote it with


def judge_template(s) -> int:
    """About how many tokens the judge's prompt has beside source and translation, four characters
    each; with all candidates but one."""
    task, prompts = Task("", "English", "Chinese"), TEMPLATES[s.prompts]
    question, candidates, _ = family.largest_question(s, prompts, task)
    texts = ["".join(parts) for parts in (prompts.ask_judge(task, "", s.score_mode), question)]
    return max(map(len, texts)) // 4 + (candidates - 1) * s.max_new_tokens
