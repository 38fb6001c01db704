"""What the command lines of `python -m eval` and `python -m eval.judge` have in common."""

import argparse
import re
from pathlib import Path

from model import find_folder
from run.checkpoint import fingerprint
from toy.pretrain import Recipe, language_model

HANG_TIMEOUT = 7200.0  # seconds that one rank waits for another
HINT = "the same command goes on"  # after an interruption


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name)


def locate_model(model: str) -> Path:
    """The folder of a model: "toy", "toy1", … are pretrained here if they are missing."""
    toy = re.fullmatch(r"toy(\d*)", model)
    if toy and not (Path(model) / "config.json").exists():  # a checkout has a folder toy/, too
        return language_model(Recipe(seed=int(toy[1] or 0)))
    return find_folder(model)


def identify_weights(folder: Path) -> str:
    """The same for the same weights, wherever they lie."""
    return f"{fingerprint(folder)} {fingerprint(folder / 'config.json')}"
