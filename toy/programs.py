"""Small programs with a known result: a world in which a model can set itself questions.

    game = Programs(seed=0, count=256)
    depth("f c a gor hex"), game.truth("f c a gor hex")   # 2 rules; what is left of "f c a" then

A program is three letters and rules that rewrite them, one after the other: each rule puts a
letter for each letter, as a table says that comes from the seed. How many rules it has is its
depth. `truth` is the interpreter: nobody who learns may ask it.

Each place has three rules, two of which it shares with the next (`PLACES`). So the last rules of a
deep program stand in no shallow one: who has practised with shallow questions alone does not know
them well, and has to be asked deep ones.

The model made here has read questions ("ask => f c a gor hex"), of which less than half have more
than one rule, less than half of those more than two, and so on; and programs of every depth worked
out rule by rule, told in any order:

    solve f c a 2) hex 1) gor =>  1) gor b h a 2) hex d f c

Some letters of a table were wrong in four texts of ten, each time another way, as in texts that
lie about, and more such letters the deeper the rule. So the right letter is the likeliest, but the
model is not sure of it: it answers shallow questions mostly right and deep ones by chance, and
between them is the edge of its ability, which a Challenger has to find, and then to follow.
"""

import dataclasses
import statistics
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch

from games import Quiz
from judge import Given
from model import Config, Transformer
from toy.pretrain import Kind, load_or_build, pretrain, ship, tokenizer_of

LETTERS = [*"abcdefgh"]
RULES = ["dim", "fal", "gor", "hex", "jun", "kip", "lom", "mev", "nax", "ort"]
PLACES = [RULES[i : i + 3] for i in range(len(RULES) - 2)]
DEEPEST = len(PLACES)
LINES = [f"{i})" for i in range(1, DEEPEST + 1)]
CONTROL = ["<pad>", "<eos>", "<unk>", "ask", "solve", "=>"]
SOURCES = ["model.py", "toy/programs.py", "toy/pretrain.py"]
HELD_OUT = 8  # one program in so many is for measuring


@dataclasses.dataclass(frozen=True)
class Recipe:
    seed: int = 0
    tokens: float = 2e6
    asked: float = 0.45
    """Questions of one rule more that are read, to one that is read."""
    doubted: float = 0.08
    """Share of its letters that texts doubt of the second rule, about twice that of the third, …"""
    doubt: float = 0.45
    """How often they put any letter for those, …"""
    slip: float = 0.01
    """… and for others."""
    batch: int = 16
    width: int = 96
    layers: int = 2
    mlp: int = 256
    muon: float = 0.0025
    adamw: float = 2e-3


def stream(seed: int, purpose: str) -> Random:
    return Random(f"programs {seed} {purpose}")


def program(rng: Random, depth: int) -> str:
    return " ".join([*rng.choices(LETTERS, k=3), *map(rng.choice, PLACES[:depth])])


def depth(text: str) -> int:
    return len(text.split()) - 3


def is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT == 0


class Programs(Quiz):
    """A game that rzero.py plays."""

    def __init__(self, seed: int, count: int = 0, folder: Path | None = None):
        """`count` held-out programs, as many of each depth. `folder`: of the model that plays."""
        self.folder = folder
        rng = stream(seed, "tables")
        self.tables = {
            rule: dict(zip(LETTERS, rng.sample(LETTERS, len(LETTERS)), strict=True))
            for rule in RULES
        }
        rng, self.held_out = stream(seed, "held-out"), []
        while len(self.held_out) < count:
            text = program(rng, 1 + len(self.held_out) * DEEPEST // count)
            if is_held_out(text):
                self.held_out.append((text, self.truth(text)))

    def truth(self, text: str) -> str:
        letters, rules = text.split()[:3], text.split()[3:]
        for rule in rules:
            letters = [self.tables[rule][letter] for letter in letters]
        return " ".join(letters)

    def ask(self, number: int) -> tuple[list[str], None]:
        return ["ask =>"], None

    def question(self, text: str, request: None) -> str | None:
        words = text.split(" ")
        letters, rules = words[:3], words[3:]
        fits = len(letters) == 3 and 0 < len(rules) <= DEEPEST and set(letters) <= set(LETTERS)
        known = all(rule in place for rule, place in zip(rules, PLACES, strict=False))
        return text if fits and known else None

    def pose(self, question: str) -> list[str]:
        words = question.split()
        parts: list[str] = ["solve", Given(" ".join(words[:3]))]
        lines = list(zip(LINES, words[3:], strict=False))
        Random(question).shuffle(lines)  # in no order: who reads must look for the number
        for line, rule in lines:
            parts += [line, Given(rule)]
        return [*parts, "=>"]

    def text_answer(self, text: str, question: str) -> str | None:
        """What the last line of the working says, if there is a line for each rule."""
        words = text.split()
        rules = question.split()[3:]
        if len(words) != 5 * len(rules) or not set(words[-3:]) <= set(LETTERS):
            return None
        told = [words[i : i + 2] for i in range(0, len(words), 5)]
        asked = [[line, rule] for line, rule in zip(LINES, rules, strict=False)]
        return " ".join(words[-3:]) if told == asked else None

    def fair(self, question: str) -> bool:
        """It may be trained on: it is not measured with."""
        return not is_held_out(question)

    def measure(self, questions: Sequence[str], labels: Sequence[str] = ()) -> dict[str, float]:
        """What is known of questions, and of the answers they were given."""
        found = {"depth": statistics.fmean(map(depth, questions))} if questions else {}
        right = [self.truth(q) == label for q, label in zip(questions, labels, strict=False)]
        return found | ({"label_accuracy": statistics.fmean(right)} if right else {})


# ---------------------------------------------------------------------------------- warm start


def corpus(recipe: Recipe) -> tuple[Callable, Callable]:
    """What it reads: each call of the one gives a question, of the other a program worked out; as a
    prompt and what follows it."""
    game, rng = Programs(recipe.seed), stream(recipe.seed, "corpus")
    depths = range(1, DEEPEST + 1)
    asked = [recipe.asked**i for i in depths]
    doubted = {
        (rule, letter)
        for i, rule in enumerate(RULES)
        for letter in rng.sample(LETTERS, round(i * recipe.doubted * len(LETTERS)))
    }

    def drawn(shares: list[float] | None = None) -> str:
        while True:
            text = program(rng, rng.choices(depths, shares)[0])
            if not is_held_out(text):
                return text

    def heard(rule: str, letter: str) -> str:
        often = recipe.doubt if (rule, letter) in doubted else recipe.slip
        return rng.choice(LETTERS) if rng.random() < often else game.tables[rule][letter]

    def question() -> tuple[list[str], list[str]]:
        return ["ask", "=>"], [*drawn(asked).split(), "<eos>"]

    def solution() -> tuple[list[str], list[str]]:
        text = drawn()
        letters, rules, told = text.split()[:3], text.split()[3:], []
        for line, rule in zip(LINES, rules, strict=False):
            letters = [heard(rule, letter) for letter in letters]
            told += [line, rule, *letters]
        return " ".join(game.pose(text)).split(), [*told, "<eos>"]

    return question, solution


def build(recipe: Recipe) -> tuple:
    tokenizer = make_tokenizer()
    torch.manual_seed(recipe.seed)
    model = Transformer(shape_of(recipe, len(tokenizer)))
    kinds = [Kind(*x) for x in zip(("asking", "solving"), corpus(recipe), strict=True)]
    pretrain(model, kinds, tokenizer.get_vocab(), recipe, stream(recipe.seed, "batches"))
    return model, tokenizer


def make(recipe: Recipe, cache: Path | None = None) -> Path:
    """The folder of the recipe's model: shipped, cached or built."""
    return load_or_build("programs", recipe, SOURCES, build, cache)


def make_tokenizer():
    """One token a word."""
    return tokenizer_of(CONTROL, [*LETTERS, *RULES, *LINES])


def shape_of(recipe: Recipe, words: int) -> Config:
    return Config(
        "llama", words, recipe.width, recipe.mlp, recipe.layers,
        heads=3, kv_heads=3, head_dim=recipe.width // 3, max_length=96,
        tied=True, hub={"eos_token_id": CONTROL.index("<eos>"), "pad_token_id": 0},
    )  # fmt: skip


if __name__ == "__main__":
    ship("programs", Recipe(), build, "python -m toy.programs")
