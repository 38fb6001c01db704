"""Small programs whose result is defined: a world in which a model can set itself questions.

    game = Programs(seed=0, count=256)
    depth("f c a gor hex"), game.truth("f c a gor hex")   # 2 rules; what is left of "f c a" then

A program is three letters and the rules that rewrite them, in order: each rule replaces every
letter by the one that its table has for it. Its depth is the number of rules. `truth` is the
interpreter, which nobody who learns may ask. Each place has three rules and shares two of them with
the next (`PLACES`), so a deep program's last rules occur in no shallow one: they are only learned
from deep questions.

The model made here has read questions ("ask => f c a gor hex"), of which less than half have more
than one rule, less than half of those more than two, and so on; and programs of every depth worked
out rule by rule, in shuffled order:

    solve f c a 2) hex 1) gor =>  1) gor b h a 2) hex d f c

In four texts of ten some letters were wrong, each time differently, and more of them the deeper the
rule. So the right letter is the likeliest, but the model is not sure of it: it answers shallow
questions mostly right and deep ones by chance. Between them is the edge of its ability, which a
Challenger has to find and follow.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from judge import UntrustedText
from model import Config
from rzero.games import Quiz
from toy.languages import is_held_out
from toy.pretrain import Kind, load_or_build, pretrain, ship, tokenizer_of

LETTERS = [*"abcdefgh"]
RULES = ["dim", "fal", "gor", "hex", "jun", "kip", "lom", "mev", "nax", "ort"]
PLACES = [RULES[i : i + 3] for i in range(len(RULES) - 2)]
DEEPEST = len(PLACES)
LINES = [f"{i})" for i in range(1, DEEPEST + 1)]
CONTROL = ["<pad>", "<eos>", "<unk>", "ask", "solve", "=>"]


@dataclasses.dataclass(frozen=True)
class ProgramRecipe:
    seed: int = 0
    tokens: float = 2e6
    asked: float = 0.45
    """Ratio of questions of n + 1 rules to those of n."""
    doubted: float = 0.08
    """Share of the letters that texts often get wrong: at the second rule, twice at the third …"""
    doubt: float = 0.45
    """How often any letter stands in place of those …"""
    slip: float = 0.01
    """… and of the others."""
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


class Programs(Quiz):
    """A game that rzero/ plays."""

    def __init__(self, seed: int, count: int = 0, folder: Path | None = None):
        """`count` held-out programs, equally many of each depth; `folder` of the model."""
        self.folder = folder
        rng = stream(seed, "tables")
        pairs = (zip(LETTERS, rng.sample(LETTERS, len(LETTERS)), strict=True) for _ in RULES)
        self.tables = dict(zip(RULES, map(dict, pairs), strict=True))
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

    challenger_prompt = ("ask =>",)

    def parse_question(self, text: str) -> str | None:
        tokens = text.split(" ")
        letters, rules = tokens[:3], tokens[3:]
        fits = len(letters) == 3 and 0 < len(rules) <= DEEPEST and set(letters) <= set(LETTERS)
        fits = fits and all(rule in place for rule, place in zip(rules, PLACES, strict=False))
        return text if fits else None

    def solver_prompt(self, question: str) -> list[str]:
        letters, rules = question.split()[:3], question.split()[3:]
        lines = list(zip(LINES, rules, strict=False))
        Random(question).shuffle(lines)  # the model must look for the number
        pieces = [piece for line, rule in lines for piece in (line, UntrustedText(rule))]
        return ["solve", UntrustedText(" ".join(letters)), *pieces, "=>"]

    def text_answer(self, text: str, question: str) -> str | None:
        """The letters of the last line, if there is a line for each rule."""
        tokens, rules = text.split(), question.split()[3:]
        if len(tokens) != 5 * len(rules) or not set(tokens[-3:]) <= set(LETTERS):
            return None
        lines = [tuple(tokens[i : i + 2]) for i in range(0, len(tokens), 5)]
        expected = list(zip(LINES, rules, strict=False))
        return " ".join(tokens[-3:]) if lines == expected else None

    def is_trainable(self, question: str) -> bool:
        return not is_held_out(question)

    def describe_questions(
        self, questions: Sequence[str], labels: Sequence[str] = ()
    ) -> dict[str, float]:
        metrics = {"depth": statistics.fmean(map(depth, questions))}
        right = [self.truth(q) == label for q, label in zip(questions, labels, strict=False)]
        return metrics | ({"label_accuracy": statistics.fmean(right)} if right else {})


# ---------------------------------------------------------------------------------- warm start


def corpus(recipe: ProgramRecipe) -> tuple[Callable, Callable]:
    """Two functions that make a row (prompt, answer): of a question, and of a program solved."""
    game, rng = Programs(recipe.seed), stream(recipe.seed, "corpus")
    depths = range(1, DEEPEST + 1)
    doubted = {
        (rule, letter)
        for i, rule in enumerate(RULES)
        for letter in rng.sample(LETTERS, round(i * recipe.doubted * len(LETTERS)))
    }

    def sample_program(shares: list[float] | None = None) -> str:
        while True:
            text = program(rng, rng.choices(depths, shares)[0])
            if not is_held_out(text):
                return text

    def apply(rule: str, letter: str) -> str:
        """As a text has it, right or wrong."""
        rate = recipe.doubt if (rule, letter) in doubted else recipe.slip
        return rng.choice(LETTERS) if rng.random() < rate else game.tables[rule][letter]

    def question() -> tuple[list[str], list[str]]:
        text = sample_program([recipe.asked**i for i in depths])
        return ["ask", "=>"], [*text.split(), "<eos>"]

    def solution() -> tuple[list[str], list[str]]:
        text = sample_program()
        letters, rules, answer = text.split()[:3], text.split()[3:], []
        for line, rule in zip(LINES, rules, strict=False):
            letters = [apply(rule, letter) for letter in letters]
            answer += [line, rule, *letters]
        return " ".join(game.solver_prompt(text)).split(), [*answer, "<eos>"]

    return question, solution


def pretrain_programs(recipe: ProgramRecipe) -> tuple:
    tokenizer = tokenizer_of(CONTROL, [*LETTERS, *RULES, *LINES])
    config = Config(
        "llama", len(tokenizer), recipe.width, recipe.mlp, recipe.layers,
        heads=3, kv_heads=3, head_dim=recipe.width // 3, max_length=96,
        tied=True, hub={"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0},
    )  # fmt: skip
    kinds, rng = [Kind(row) for row in corpus(recipe)], stream(recipe.seed, "batches")
    return pretrain(config, kinds, tokenizer.get_vocab(), recipe, rng), tokenizer


def program_model(recipe: ProgramRecipe) -> Path:
    """The folder of the recipe's model: shipped, cached, or built."""
    return load_or_build("programs", recipe, pretrain_programs)


if __name__ == "__main__":
    ship("programs", ProgramRecipe(), pretrain_programs, "python -m toy.programs")
