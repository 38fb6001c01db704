"""A tiny model that has read the two made-up languages: what stands in for a pretrained LLM.

    folder = make(Recipe())                    # shipped with the project: toy/shipped
    folder = make(Recipe(seed=1))              # some minutes, once; then it is found again
    python -m toy.pretrain                     # builds the shipped one anew

It learns from two kinds of text, half of each batch:

- parallel text as it lies about on the web, with bad habits: per direction about a third of the
  lexemes are mostly translated as something similar, some sentences keep the other language's word
  order, some adjectives disagree, words are dropped. So the likeliest translation is wrong in two
  sentences of three, although the right one is in the distribution;
- judge examples: a source, a candidate of any badness, its score in words, 0 to 100 in tens.

Nothing tells a right translation in the parallel text (one in five) from a wrong one; among the
judge examples it scores 100. That is the gap self-rewarding lives from: telling a good translation
is easier than writing one.

More can be taught beside them (`Recipe.skills`): to say which of two translations is better, to
score several at once, to write a sentence of so many words.
The result is an ordinary Hugging Face folder: config.json, safetensors, tokenizer.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from judge import TOY, Task
from model import Config, Transformer, save
from toy.languages import BEVO, KASU, SIZES, Languages, Lexeme, Meaning, quality

CONTROL = ["<pad>", "<eos>", "<unk>", "translate", "score", "=>", "||"]
SKILLS = ("compare", "rate", "write")  # each is a control word, too
LONGEST = 16  # words of a sentence in either language: what "write" may be asked for
SOURCES = ["judge.py", "model.py", "toy/languages.py", "toy/pretrain.py"]
SHIPPED = Path(__file__).with_name("shipped")
POOL = 40  # batches made, sorted by length and shuffled together


@dataclasses.dataclass(frozen=True)
class Recipe:
    seed: int = 0
    tokens: float = 3.5e6
    """Read in all, padding included. Fewer make a judge that leads astray: see the README."""
    habitual: float = 0.35
    """Share of lexemes that are mostly mistranslated, …"""
    habit: tuple[float, float] = (0.5, 0.65)
    """… this often; the others up to 0.15."""
    wrong_order: float = 0.12
    disagreement: float = 0.12
    dropped: float = 0.04
    batch: int = 64
    """Rows of each kind."""
    width: int = 96
    layers: int = 2
    mlp: int = 256
    candidate_loss: float = 0.3
    """Weight of predicting the judged candidate's words."""
    muon: float = 0.007
    adamw: float = 2e-3
    """Learning rates: Muon for the matrices inside the blocks, AdamW for the rest."""
    skills: tuple[str, ...] = ()
    """Of SKILLS, in that order; what is read for them is not counted in `tokens`."""


def skills_of(names: str) -> tuple[str, ...]:
    """Of a command line's names with commas between them."""
    asked = {name.strip() for name in names.split(",") if name.strip()}
    if unknown := asked - set(SKILLS):
        raise ValueError(f"--toy-skills {', '.join(sorted(unknown))}: use {', '.join(SKILLS)}")
    return tuple(skill for skill in SKILLS if skill in asked)


def make_tokenizer(pair: Languages, skills: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token a word, and one for each score."""
    words = [*TOY.scores, KASU, BEVO, *pair.vocabulary[KASU], *pair.vocabulary[BEVO]]
    words += ["first", "second"] if "compare" in skills else []
    numbers = [str(n) for n in range(1, LONGEST + 1)] if "write" in skills else []
    words += [n for n in numbers if n not in TOY.scores]
    return tokenizer_of([*CONTROL, *skills], words)


def tokenizer_of(control: list[str], words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*control, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(control)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that transformers 4 knows too
    file.write_text(json.dumps(settings, indent=2) + "\n")


# ------------------------------------------------------------------------------------ the texts


class Corpus:
    def __init__(self, pair: Languages, recipe: Recipe, stream: str = "corpus"):
        """`stream`: of what is drawn; the habits are the same in all."""
        self.pair, self.recipe = pair, recipe
        rng = pair.stream("habits", 0)
        self.habits: dict[tuple[str, Lexeme], float] = {}
        for language in (KASU, BEVO):
            for lexeme in pair.confusable:
                often = rng.random() < recipe.habitual
                rate = rng.uniform(*recipe.habit) if often else rng.uniform(0, 0.15)
                self.habits[language, lexeme] = rate
        self.rng = pair.stream(stream, 0)

    def habitual(self, meaning: Meaning, source: str, target: str) -> list[str]:
        """The translation that "the web" has."""
        r, rng = self.recipe, self.rng

        def swap(lexeme: Lexeme) -> Lexeme:
            slips = rng.random() < self.habits[target, lexeme]
            return self.pair.confusable[lexeme] if slips else lexeme

        order = source if rng.random() < r.wrong_order else target
        agrees = rng.random() >= r.disagreement
        words = self.pair.say(meaning, target, order, swap, lambda: agrees)
        return [w for w in words if rng.random() >= r.dropped] or words

    def candidate(self, meaning: Meaning, source: str, target: str) -> list[str]:
        """A translation of any badness, for the judge to learn from."""
        pair, rng = self.pair, self.rng
        kind = rng.random()
        if kind < 0.15:
            return pair.say(meaning, target)
        if kind < 0.20:
            return pair.say(pair.meaning(rng), target)
        if kind < 0.35:  # right but for agreement, which is the hardest to see
            return pair.say(meaning, target, agrees=lambda: rng.random() < 0.5)
        rate = rng.choice((0.0, 0.1, 0.2, 0.35, 0.6))

        def swap(lexeme: Lexeme) -> Lexeme:
            if rng.random() >= rate:
                return lexeme
            category = lexeme[0]
            by_chance = (category, rng.randrange(SIZES[category]))
            return pair.confusable[lexeme] if rng.random() < 0.6 else by_chance

        order = source if rng.random() < 0.15 else target
        disagreement = rng.choice((0, 0, 0.5))
        words = pair.say(meaning, target, order, swap, lambda: rng.random() >= disagreement)
        damage = rng.choice((0, 0, 0, 0.08, 0.2))
        vocabulary, damaged = pair.vocabulary[target], []
        for word in words:
            what = rng.random()
            if what < 0.4 * damage:
                continue
            damaged.append(rng.choice(vocabulary) if what < 0.7 * damage else word)
            if 0.7 * damage < what < damage:
                damaged.append(word if rng.random() < 0.5 else rng.choice(vocabulary))
        if rng.random() < 0.2 and len(damaged) > 1:  # a word or two in another place
            at = rng.randrange(len(damaged))
            moved = damaged[at : at + rng.choice((1, 2))]
            del damaged[at : at + len(moved)]
            at = rng.randrange(len(damaged) + 1)
            damaged[at:at] = moved
        if rng.random() < 0.03:
            damaged = damaged[: rng.randrange(len(damaged) + 1)]
        return damaged[:16]

    def sentence(self) -> tuple[Meaning, Task]:
        meaning = self.pair.meaning(self.rng)
        source, target = self.rng.choice([(KASU, BEVO), (BEVO, KASU)])
        return meaning, self.pair.task_of(meaning, source, target)

    def translation(self) -> tuple[list[str], list[str]]:
        """Prompt and answer, in words."""
        meaning, task = self.sentence()
        prompt = "".join(TOY.ask(task)).split()
        return prompt, [*self.habitual(meaning, task.source, task.target), "<eos>"]

    def judgement(self) -> tuple[list[str], list[str]]:
        meaning, task = self.sentence()
        candidate = " ".join(self.candidate(meaning, task.source, task.target))
        tens = round(10 * quality(candidate, task.reference)) * 10
        return "".join(TOY.ask_judge(task, candidate)).split(), [str(tens), "<eos>"]

    def comparison(self) -> tuple[list[str], list[str]]:
        """Two candidates of which one is better."""
        meaning, task = self.sentence()
        while True:
            texts = [" ".join(self.candidate(meaning, task.source, task.target)) for _ in range(2)]
            first, second = (quality(text, task.reference) for text in texts)
            if first != second:
                better = "first" if first > second else "second"
                return "".join(TOY.ask_pair(task, *texts)).split(), [better, "<eos>"]

    def rating(self) -> tuple[list[str], list[str]]:
        """Several candidates, and the score of each."""
        meaning, task = self.sentence()
        texts = [
            " ".join(self.candidate(meaning, task.source, task.target))
            for _ in range(self.rng.randint(2, TOY.most))
        ]
        tens = [str(round(10 * quality(text, task.reference)) * 10) for text in texts]
        return "".join(TOY.ask_group(task, texts)).split(), [*tens, "<eos>"]

    def writing(self) -> tuple[list[str], list[str]]:
        """A sentence of so many words."""
        language = self.rng.choice((KASU, BEVO))
        words = self.pair.say(self.pair.meaning(self.rng), language)
        return ["write", language, str(len(words)), "=>"], [*words, "<eos>"]

    def kinds(self) -> list["Kind"]:
        candidate_loss = self.recipe.candidate_loss
        kinds = [
            Kind("translating", self.translation),
            Kind("judging", self.judgement, "||", candidate_loss),
        ]
        # Each skill draws from a stream of its own: the others see the texts they saw without it.
        compare, rate, write = (Corpus(self.pair, self.recipe, skill) for skill in SKILLS)
        more = {
            "compare": Kind("comparing", compare.comparison, "||", candidate_loss, False),
            "rate": Kind("rating", rate.rating, "||", candidate_loss, False),
            "write": Kind("writing", write.writing, counted=False),
        }
        return kinds + [more[skill] for skill in self.recipe.skills]


# --------------------------------------------------------------------------------- the learning


class Kind(NamedTuple):
    """Of text: an equal share of each batch."""

    name: str
    row: Callable[[], tuple[list[str], list[str]]]
    """A prompt and its answer, in words."""
    read_from: str = ""
    """The prompt's words after this one are predicted as well, …"""
    reading_loss: float = 0.0
    """… with this weight."""
    counted: bool = True
    """Whether what is read of it is part of the recipe's `tokens`."""


def batches(make_row, recipe: Recipe, ids: dict[str, int], rng: Random):
    """Rows of like length together, without end: (prompt ids, answer ids) each."""
    while True:
        rows = [make_row() for _ in range(recipe.batch * POOL)]
        rows = [([ids[w] for w in prompt], [ids[w] for w in answer]) for prompt, answer in rows]
        rows.sort(key=lambda row: len(row[0]) + rng.random())
        pool = [rows[i : i + recipe.batch] for i in range(0, len(rows), recipe.batch)]
        rng.shuffle(pool)
        yield from pool


def loss_of(model: Transformer, rows, read_from: int | None, reading_loss: float):
    """Mean loss of the answers' tokens, and of what is read if asked; tokens seen."""
    length = max(len(p) + len(a) for p, a in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    kind = torch.zeros(len(rows), length, dtype=torch.int64)  # 1: answer, 2: read
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        if read_from is not None:
            kind[i, prompt.index(read_from) + 1 : len(prompt)] = 2
        kind[i, len(prompt) : len(prompt) + len(answer)] = 1
    kind, targets = kind[:, 1:], ids[:, 1:]
    hidden = model(ids[:, :-1])
    wanted = kind > 0
    losses = F.cross_entropy(model.logits(hidden[wanted]), targets[wanted], reduction="none")
    kind = kind[wanted]
    loss = losses[kind == 1].mean()
    if read_from is not None:
        loss = loss + reading_loss * losses[kind == 2].mean()
    return loss, ids.numel()


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalised (Newton-Schulz, quintic), for matrices.

    It is torch.optim.Muon, computed in the gradients' type instead of bf16, which a CPU without
    bf16 instructions emulates: there that one takes 60% of the training time. Matrices of one shape
    are orthogonalised together.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum=0.95, weight_decay=0.01):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in by_shape.items():
                updates = []
                for p in matrices:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - momentum)
                    updates.append(p.grad.lerp(average, momentum))  # Nesterov's
                rate = lr * max(1, rows / columns) ** 0.5
                for p, update in zip(matrices, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - lr * group["decay"]).sub_(update, alpha=rate)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """(B, M, N) -> the same singular vectors with singular values of about 1 (0.7 to 1.2)."""
    a, b, c = 3.4445, -4.775, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def pretrain(
    model: Transformer, kinds: list[Kind], ids: dict[str, int], recipe, rng: Random
) -> None:
    """`recipe`: has tokens, batch, muon, adamw."""
    with torch.no_grad():
        for name, p in model.blocks.named_parameters():
            if p.dim() == 2:
                narrow = 0.5 if ".out." in name or ".down." in name else 1.0
                p.normal_(std=narrow * p.shape[1] ** -0.5)
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    inside = set(matrices)
    rest = [p for p in model.parameters() if p not in inside]
    muon = Muon(matrices, lr=recipe.muon)
    adamw = torch.optim.AdamW(
        rest, lr=recipe.adamw, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    parameters = list(model.parameters())
    rows_of = [batches(kind.row, recipe, ids, rng) for kind in kinds]

    def gradients(kind: Kind, rows: list) -> tuple[float, int, tuple[Tensor, ...]]:
        read_from = ids[kind.read_from] if kind.read_from else None
        loss, tokens = loss_of(model, rows, read_from, kind.reading_loss)
        return loss.item(), tokens, torch.autograd.grad(loss, parameters)

    # A thread for each kind: on two cores most of half the time, and everywhere the same sums.
    pool = ThreadPoolExecutor(len(kinds))
    rows = [next(drawn) for drawn in rows_of]
    read, step, start, shown = 0, 0, time.perf_counter(), 0.0
    while read < recipe.tokens:
        left = 1 - read / recipe.tokens
        rate = min(1.0, (step + 1) / 50, max(0.02, left / 0.5))
        for optimizer, top in ((muon, recipe.muon), (adamw, recipe.adamw)):
            for group in optimizer.param_groups:
                group["lr"] = top * rate
        results = pool.map(gradients, kinds, rows)
        rows = [next(drawn) for drawn in rows_of]  # of the next step, meanwhile
        losses, tokens, all_gradients = zip(*results, strict=True)
        for p, *parts in zip(parameters, *all_gradients, strict=True):
            p.grad = sum(parts)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        muon.step()
        adamw.step()
        counted = [n for kind, n in zip(kinds, tokens, strict=True) if kind.counted]
        read, step = read + sum(counted), step + 1
        seconds = time.perf_counter() - start
        if seconds - shown > 5 or read >= recipe.tokens:
            shown, speed = seconds, read / seconds
            to_go = max(0.0, recipe.tokens - read) / speed
            shares = ", ".join(
                f"{kind.name} {x:.2f}" for kind, x in zip(kinds, losses, strict=True)
            )
            print(
                f"  pretraining {min(1, read / recipe.tokens):4.0%}  loss: {shares}  "
                f"{speed:,.0f} tokens/s, {to_go:.0f} s left",
                flush=True,
            )


def shape_of(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Config:
    # Not "qwen2": transformers gives every model of that name Qwen's own splitting of words.
    return Config(
        "llama", len(tokenizer), recipe.width, recipe.mlp, recipe.layers,
        heads=3, kv_heads=1, head_dim=recipe.width // 3,
        max_length=192 if recipe.skills else 96,
        tied=True, hub={"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0},
    )  # fmt: skip


def build(recipe: Recipe) -> tuple[Transformer, PreTrainedTokenizerFast]:
    pair = Languages(recipe.seed)
    tokenizer = make_tokenizer(pair, recipe.skills)
    torch.manual_seed(recipe.seed)
    model = Transformer(shape_of(recipe, tokenizer))
    rng = pair.stream("batches", 0)
    pretrain(model, Corpus(pair, recipe).kinds(), tokenizer.get_vocab(), recipe, rng)
    return model, tokenizer


def make(recipe: Recipe, cache: Path | None = None) -> Path:
    """The folder of the recipe's model: shipped, cached, or built whole before it gets its name."""
    return load_or_build("languages", recipe, SOURCES, build, cache)


# ------------------------------------------------------------------------------ kept models


def load_or_build(
    kind: str, recipe, sources: list[str], build: Callable, cache: Path | None
) -> Path:
    """`cache`: default $SSR_TOY_CACHE, or runs/toy-models."""
    name = f"{kind}-seed{recipe.seed}"
    if folder := find_shipped(name, recipe):
        return folder
    root = Path(__file__).parent.parent
    content = [repr(recipe).encode(), torch.__version__.encode()]
    content += [(root / file).read_bytes() for file in sources]
    name = f"{name}-{hashlib.sha256(b'|'.join(content)).hexdigest()[:12]}"
    cache = cache or Path(os.environ.get("SSR_TOY_CACHE", "runs/toy-models"))
    folder, partial = cache / name, cache / f"{name}.{os.getpid()}.partial"
    if folder.is_dir():
        print(f"Toy model: {folder}, built earlier", flush=True)
        return folder
    try:
        partial.mkdir(parents=True)
    except OSError as error:  # before minutes of work are lost
        raise OSError(
            f"cannot keep the toy's model in {cache} ({error.strerror}): set SSR_TOY_CACHE to a "
            "folder that can be written"
        ) from None
    print(f"Toy model: pretraining {folder}, once", flush=True)
    save_model(*build_on_one_thread(build, recipe), partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster: the same content
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)
    return folder


def build_on_one_thread(build: Callable, recipe) -> tuple:
    """Whatever the caller has: another number rounds otherwise, and makes another model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return build(recipe)
    finally:
        torch.set_num_threads(threads)


def save_model(model: Transformer, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    save(model, folder)
    save_tokenizer(tokenizer, folder)


def find_shipped(name: str, recipe) -> Path | None:
    """The model that comes with the project, if it is of this recipe and as it was written."""
    folder = SHIPPED / name
    try:
        about = json.loads((folder / "made.json").read_text())
        if about["recipe"] != json.loads(json.dumps(dataclasses.asdict(recipe))):
            return None
        hashes = {file: hash_file(folder / file) for file in about["sha256"]}
    except FileNotFoundError as error:
        if recipe != type(recipe)():
            return None  # nothing is shipped for this recipe
        problem = f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError):
        problem = "made.json cannot be read"
    else:
        wrong = [file for file, value in hashes.items() if value != about["sha256"][file]]
        if not wrong:
            print(f"Toy model: {name}, shipped with the project ({about['made']})", flush=True)
            return folder
        problem = f"{wrong[0]} is damaged"
    print(f"Toy model: {folder}: {problem}; the model is built anew", flush=True)
    return None


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ship(kind: str, recipe, build: Callable, command: str, shipped: Path = SHIPPED) -> Path:
    """Build a model and write it where `find_shipped` looks."""
    folder = shipped / f"{kind}-seed{recipe.seed}"
    save_model(*build_on_one_thread(build, recipe), folder)
    made = f"by `{command}` on {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, "
    made += f"{torch.backends.cpu.get_cpu_capability()} processor"
    files = sorted(f for f in folder.iterdir() if f.name != "made.json")
    about = {"recipe": dataclasses.asdict(recipe), "made": made}
    about["sha256"] = {file.name: hash_file(file) for file in files}
    (folder / "made.json").write_text(json.dumps(about, indent=1) + "\n")
    return folder


if __name__ == "__main__":
    ship("languages", Recipe(), build, "python -m toy.pretrain")
