"""A tiny model pretrained on the two made-up languages: it stands in for a pretrained LLM.

    folder = language_model(Recipe())          # shipped with the project: toy/shipped
    folder = language_model(Recipe(seed=1))    # some minutes, once; then it comes from the cache
    python -m toy.pretrain                     # rebuilds the shipped one

Half of each batch is parallel text as the web has it: per direction about a third of the lexemes
are mostly mistranslated, and word order, agreement and omissions go wrong at times. So the
likeliest translation is wrong in two sentences of three, although the right one is in the
distribution. The other half is judge examples: a source, a candidate, its score, 0 to 100 in tens.

Nothing marks a right translation in the parallel text (one in five); among the judge examples it
scores 100. Self-rewarding lives from that gap: recognising a good translation is easier than
writing one. `Recipe.skills` teaches more kinds of question.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
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
from rewards.family import COMPARISONS, ask_group, ask_pair
from toy.languages import BEVO, KASU, SIZES, Languages, Lexeme, Meaning, quality

WordRow = tuple[list[str], list[str]]  # a prompt and its answer
CONTROL = ["<pad>", "<eos>", "<unk>", "translate", "score", "=>", "||"]
SKILLS = ("compare", "rate")  # each is a control word, too
SOURCES = [  # all that a model depends on
    *("judge.py", "data/codec.py", "rewards/family.py", "model.py"),
    *("toy/languages.py", "toy/programs.py", "toy/pretrain.py"),
]
SHIPPED = Path(__file__).with_name("shipped")
POOL = 40  # batches that are made together, of rows of similar length


@dataclasses.dataclass(frozen=True)
class Recipe:
    seed: int = 0
    tokens: float = 3.5e6
    """Tokens of the whole training, padding included. With fewer the judge is too weak."""
    habitual: float = 0.35
    """Share of the lexemes that are mostly mistranslated."""
    habit: tuple[float, float] = (0.5, 0.65)
    """How often those are; the others are up to 0.15."""
    wrong_order: float = 0.12
    disagreement: float = 0.12
    dropped: float = 0.04
    batch: int = 64
    """Rows of each kind."""
    width: int = 96
    layers: int = 2
    mlp: int = 256
    candidate_loss: float = 0.3
    """Weight of the loss on the judged candidate's words."""
    muon: float = 0.007
    adamw: float = 2e-3
    """Learning rates: Muon for the matrices inside the blocks, AdamW for the rest."""
    skills: tuple[str, ...] = ()
    """Of SKILLS, in that order; their texts are not counted in `tokens`."""


def make_tokenizer(pair: Languages, skills: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token a word, one token a score."""
    vocabulary = [*TOY.scores, KASU, BEVO, *pair.vocabulary[KASU], *pair.vocabulary[BEVO]]
    vocabulary += ["first", "second"] if "compare" in skills else []
    return tokenizer_of([*CONTROL, *skills], vocabulary)


def tokenizer_of(control: list[str], vocabulary: list[str]) -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate([*control, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(control)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


# ---------------------------------------------------------------------------------------- texts


class PretrainingCorpus:
    def __init__(self, pair: Languages, recipe: Recipe, stream: str = "corpus"):
        """`stream` names the random stream; the habits are the same in all of them."""
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
        """A translation as the web has it."""
        r, rng = self.recipe, self.rng

        def swap(lexeme: Lexeme) -> Lexeme:
            slips = rng.random() < self.habits[target, lexeme]
            return self.pair.confusable[lexeme] if slips else lexeme

        order = source if rng.random() < r.wrong_order else target
        agrees = rng.random() >= r.disagreement
        sentence = self.pair.say(meaning, target, order, swap, lambda: agrees)
        return [w for w in sentence if rng.random() >= r.dropped] or sentence

    def candidate(self, meaning: Meaning, source: str, target: str) -> list[str]:
        """A translation of any quality, for the judge to learn from."""
        pair, rng = self.pair, self.rng
        kind = rng.random()
        if kind < 0.15:
            return pair.say(meaning, target)
        if kind < 0.20:
            return pair.say(pair.meaning(rng), target)
        if kind < 0.35:  # only agreement may be wrong, which is the hardest to see
            return pair.say(meaning, target, agrees=lambda: rng.random() < 0.5)
        rate = rng.choice((0.0, 0.1, 0.2, 0.35, 0.6))

        def swap(lexeme: Lexeme) -> Lexeme:
            if rng.random() >= rate:
                return lexeme
            by_chance = lexeme[0], rng.randrange(SIZES[lexeme[0]])
            return pair.confusable[lexeme] if rng.random() < 0.6 else by_chance

        order = source if rng.random() < 0.15 else target
        disagreement = rng.choice((0, 0, 0.5))
        sentence = pair.say(meaning, target, order, swap, lambda: rng.random() >= disagreement)
        damage = rng.choice((0, 0, 0, 0.08, 0.2))
        vocabulary, damaged = pair.vocabulary[target], []
        for word in sentence:
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

    def candidates(self, meaning: Meaning, task: Task, count: int) -> tuple[list, list]:
        """Some translations, and the quality of each."""
        candidates = (self.candidate(meaning, task.source, task.target) for _ in range(count))
        texts = list(map(" ".join, candidates))
        return texts, [quality(text, task.reference) for text in texts]

    # Each of these returns a prompt and its answer, split at spaces.

    def translation(self) -> WordRow:
        meaning, task = self.pair.sentence(self.rng)
        prompt = "".join(TOY.ask(task)).split()
        return prompt, [*self.habitual(meaning, task.source, task.target), "<eos>"]

    def judgement(self) -> WordRow:
        meaning, task = self.pair.sentence(self.rng)
        [text], values = self.candidates(meaning, task, 1)
        return "".join(TOY.ask_judge(task, text)).split(), [*tens(values), "<eos>"]

    def comparison(self) -> WordRow:
        meaning, task = self.pair.sentence(self.rng)
        while True:
            texts, (first, second) = self.candidates(meaning, task, 2)
            if first != second:
                better = "first" if first > second else "second"
                return "".join(ask_pair(TOY, task, *texts)).split(), [better, "<eos>"]

    def rating(self) -> WordRow:
        meaning, task = self.pair.sentence(self.rng)
        texts, values = self.candidates(meaning, task, self.rng.randint(2, COMPARISONS["toy"].most))
        return "".join(ask_group(TOY, task, texts)).split(), [*tens(values), "<eos>"]

    def kinds(self) -> list["Kind"]:
        weight = self.recipe.candidate_loss
        kinds = [Kind(self.translation), Kind(self.judgement, weight)]
        for skill in self.recipe.skills:  # a stream each: the other texts stay the same
            corpus = PretrainingCorpus(self.pair, self.recipe, skill)
            row = {"compare": corpus.comparison, "rate": corpus.rating}[skill]
            kinds.append(Kind(row, weight, counted=False))
        return kinds


def tens(values: list[float]) -> list[str]:
    """The scores of a judge."""
    return [str(round(10 * value) * 10) for value in values]


# ------------------------------------------------------------------------------------- training


class Kind(NamedTuple):
    """A kind of text: each has an equal share of every batch."""

    row: Callable[[], WordRow]
    reading_loss: float = 0.0  # weight of the loss on the prompt's words after "||"
    counted: bool = True  # as part of the recipe's `tokens`


def batches(make_row, recipe: Recipe, ids: dict[str, int], rng: Random):
    """Endless batches of rows of similar length: (prompt ids, answer ids) each."""
    while True:
        rows = [make_row() for _ in range(recipe.batch * POOL)]
        rows = [([ids[w] for w in prompt], [ids[w] for w in answer]) for prompt, answer in rows]
        rows.sort(key=lambda row: len(row[0]) + rng.random())
        pool = [rows[i : i + recipe.batch] for i in range(0, len(rows), recipe.batch)]
        rng.shuffle(pool)
        yield from pool


def loss_of(model: Transformer, rows, read_from: int | None, reading_loss: float):
    """Mean loss of the answers' tokens, plus that of the prompt after `read_from`; tokens seen."""
    ids, kind = [], []  # kind 1: answer, 2: after read_from
    for prompt, answer in rows:
        start = len(prompt) if read_from is None else prompt.index(read_from) + 1
        ids.append(torch.tensor(prompt + answer))
        kind.append(torch.tensor([0] * start + [2] * (len(prompt) - start) + [1] * len(answer)))
    ids, kind = (nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (ids, kind))
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

    It is torch.optim.Muon computed in the gradients' type instead of bf16, which takes 60% of the
    training time on a CPU without bf16 instructions. Matrices of one shape are handled together.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum=0.95, weight_decay=0.01):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        [group] = self.param_groups
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
    """(B, M, N) -> the same singular vectors, with singular values of about 1 (0.7 to 1.2)."""
    a, b, c = 3.4445, -4.775, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def pretrain(
    config: Config, kinds: list[Kind], ids: dict[str, int], recipe, rng: Random
) -> Transformer:
    """`ids`: the vocabulary's. `recipe` has seed, tokens, batch, muon, adamw."""
    torch.manual_seed(recipe.seed)
    model, matrices = Transformer(config), []
    for name, p in model.blocks.named_parameters():
        if p.dim() == 2:
            narrow = 0.5 if ".out." in name or ".down." in name else 1.0
            nn.init.normal_(p, std=narrow * p.shape[1] ** -0.5)
            matrices.append(p)
    inside, parameters = set(matrices), list(model.parameters())
    rest = [p for p in parameters if p not in inside]
    muon = Muon(matrices, lr=recipe.muon)
    adamw = torch.optim.AdamW(rest, recipe.adamw, (0.9, 0.95), weight_decay=0.0, fused=True)
    streams = [batches(kind.row, recipe, ids, rng) for kind in kinds]

    def gradients(kind: Kind, rows: list) -> tuple[float, int, tuple[Tensor, ...]]:
        read_from = ids["||"] if kind.reading_loss else None
        loss, tokens = loss_of(model, rows, read_from, kind.reading_loss)
        return loss.item(), tokens, torch.autograd.grad(loss, parameters)

    rows = [next(stream) for stream in streams]
    read, step, start, shown = 0, 0, time.perf_counter(), 0.0
    # A thread for each kind saves most of half the time on two cores; the sums stay the same.
    pool = ThreadPoolExecutor(len(kinds))
    while read < recipe.tokens:
        left = 1 - read / recipe.tokens
        rate = min(1.0, (step + 1) / 50, max(0.02, left / 0.5))
        for optimizer, top in ((muon, recipe.muon), (adamw, recipe.adamw)):
            optimizer.param_groups[0]["lr"] = top * rate
        results = pool.map(gradients, kinds, rows)
        rows = [next(stream) for stream in streams]  # the next step's, meanwhile
        losses, tokens, parts = zip(*results, strict=True)
        for p, *some in zip(parameters, *parts, strict=True):
            p.grad = sum(some)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        muon.step()
        adamw.step()
        read += sum(n for kind, n in zip(kinds, tokens, strict=True) if kind.counted)
        step, seconds = step + 1, time.perf_counter() - start
        if seconds - shown > 5 or read >= recipe.tokens:
            shown, done = seconds, min(1.0, read / recipe.tokens)
            print(f"  pretraining {done:4.0%}  loss {sum(losses):.2f}  "
                  f"{seconds / done - seconds:.0f} s left", flush=True)  # fmt: skip
    return model


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Config:
    # Not "qwen2": transformers gives every model of that name Qwen's own splitting of words.
    return Config(
        "llama", len(tokenizer), recipe.width, recipe.mlp, recipe.layers,
        heads=3, kv_heads=1, head_dim=recipe.width // 3,
        max_length=192 if recipe.skills else 96,
        tied=True, hub={"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0},
    )  # fmt: skip


def pretrain_languages(recipe: Recipe) -> tuple[Transformer, PreTrainedTokenizerFast]:
    pair = Languages(recipe.seed)
    tokenizer = make_tokenizer(pair, recipe.skills)
    config, kinds = model_config(recipe, tokenizer), PretrainingCorpus(pair, recipe).kinds()
    model = pretrain(config, kinds, tokenizer.get_vocab(), recipe, pair.stream("batches", 0))
    return model, tokenizer


def language_model(recipe: Recipe) -> Path:
    """The folder of the recipe's model: shipped, cached, or built."""
    return load_or_build("languages", recipe, pretrain_languages)


# -------------------------------------------------------------------------------- shipped, cached


def load_or_build(kind: str, recipe, build: Callable) -> Path:
    """The cache is $SSR_TOY_CACHE or runs/toy-models, keyed by recipe, sources and PyTorch."""
    name = f"{kind}-seed{recipe.seed}"
    if folder := find_shipped(name, recipe):
        return folder
    root = Path(__file__).parent.parent
    content = [repr(recipe).encode(), torch.__version__.encode()]
    content += [(root / file).read_bytes() for file in SOURCES]
    name = f"{name}-{hashlib.sha256(b'|'.join(content)).hexdigest()[:12]}"
    cache = Path(os.environ.get("SSR_TOY_CACHE", "runs/toy-models"))
    folder, partial = cache / name, cache / f"{name}.{os.getpid()}.partial"
    if folder.is_dir():
        print(f"Toy model: {folder}, built earlier", flush=True)
        return folder
    partial.mkdir(parents=True, exist_ok=True)  # fails before the work if it cannot be written
    print(f"Toy model: pretraining {folder}, once", flush=True)
    build_and_save(build, recipe, partial)
    with contextlib.suppress(OSError):  # another process was faster: the same content
        partial.rename(folder)
    return folder


def build_and_save(build: Callable, recipe, folder: Path) -> None:
    torch.set_num_threads(1)  # another number rounds differently and makes another model
    model, tokenizer = build(recipe)
    save(model, folder)
    tokenizer.save_pretrained(folder)


def find_shipped(name: str, recipe) -> Path | None:
    """The model that comes with the project, if it is of this recipe."""
    about = SHIPPED / name / "made.json"
    shipped = json.loads(about.read_text()) if about.is_file() else {"recipe": None}
    if shipped["recipe"] != json.loads(json.dumps(dataclasses.asdict(recipe))):
        return None
    print(f"Toy model: {about.parent}, shipped with the project ({shipped['made']})", flush=True)
    return about.parent


def ship(kind: str, recipe, build: Callable, command: str) -> None:
    """Build a model and write it where `find_shipped` looks."""
    folder = SHIPPED / f"{kind}-seed{recipe.seed}"
    build_and_save(build, recipe, folder)
    made = f"by `{command}` on {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, "
    made += f"{torch.backends.cpu.get_cpu_capability()} processor"
    about = {"recipe": dataclasses.asdict(recipe), "made": made}
    (folder / "made.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    ship("languages", Recipe(), pretrain_languages, "python -m toy.pretrain")
