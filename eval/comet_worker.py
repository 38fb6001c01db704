"""Scores translations with a COMET model. `comet.py` starts it, with COMET's own Python.

Settings come as the first argument, requests as JSON lines on stdin; answers go as JSON lines to
what was stdout. What libraries print there goes to stderr. A checkpoint is a pickle, and loading
one runs what is in it: use those you trust.
"""

import json
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

WANTED = "2.2.7"
INSTALL = "`python -m eval.comet install` makes an environment with it"


def main() -> None:
    here = str(Path(__file__).resolve().parent)  # where a comet.py would hide the library
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder or ".") != here]
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=outlive_no_parent, args=(os.getppid(),), daemon=True).start()
    settings = json.loads(sys.argv[1])

    def say(**message) -> None:
        answers.write(json.dumps(message, allow_nan=False) + "\n")

    try:
        model, about = load(settings, say)
    except Exception as error:
        return say(**explained(error))
    say(about=about)
    for line in sys.stdin:  # ends when the parent closes it
        request = json.loads(line)
        say(call=request["call"], **answer(model, request, settings["batch_size"], say))


def answer(model, request: dict, batch_size: int, say: Callable) -> dict:
    def done(rows: int) -> None:
        say(call=request["call"], done=rows)

    try:
        return {"scores": score(model, request["rows"], batch_size, done)}
    except Exception as error:
        return explained(error)


def outlive_no_parent(parent: int) -> None:
    """End the process in the middle of whatever it does once the parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def explained(error: Exception) -> dict:
    kind = "ValueError" if isinstance(error, ValueError) else "RuntimeError"
    if type(error).__name__ == "OutOfMemoryError":
        words = f"set a smaller batch_size, or dtype 'bfloat16': {error}"
    elif isinstance(error, ValueError | RuntimeError):
        words = str(error)
    else:
        words = traceback.format_exc()
    return {"error": words, "kind": kind}


# ------------------------------------------------------------------------------------ the model


def load(settings: dict, say: Callable) -> tuple:
    """The model, and what there is to say about it."""
    check_version()
    say(stage=f"fetching {settings['checkpoint']}")
    file = find(settings["checkpoint"])
    import yaml
    from huggingface_hub import constants

    hparams = yaml.load((file.parents[1] / "hparams.yaml").read_text("utf-8"), yaml.FullLoader)
    if (encoder := hparams.get("pretrained_model")) and not os.path.isdir(encoder):
        say(stage=f"fetching {encoder}, the encoder's tokenizer")
        fetch(encoder, ["*.json", "*.model"])
    # All is here. Even with local_files_only, transformers asks the hub about large tokenizers
    # unless this is set when it is imported.
    constants.HF_HUB_OFFLINE = True
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # checkpoints hold more than tensors
    say(stage=f"loading {file}")
    import comet
    import torch

    model = comet.load_from_checkpoint(str(file), local_files_only=True)
    model = halved(model, getattr(torch, settings["dtype"])).to(settings["device"]).eval()
    segments = model.hparams.get("input_segments")
    needs = model.requires_references()
    return model, {
        "checkpoint": settings["checkpoint"],
        "path": str(file),
        "revision": file.parents[1].name if file.parents[2].name == "snapshots" else None,
        "class": type(model).__name__,
        "comet": metadata.version("unbabel-comet"),
        "torch": torch.__version__,
        "dtype": settings["dtype"],
        "device": settings["device"],
        "needs_reference": needs,
        "control": model.encoder.tokenizer.all_special_tokens,
        "takes_reference": needs or "ref" in (segments or ()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def check_version() -> None:
    try:
        found = metadata.version("unbabel-comet")
    except metadata.PackageNotFoundError:
        raise RuntimeError(f"{sys.executable} has no COMET: {INSTALL}") from None
    if found != WANTED:
        raise RuntimeError(f"{sys.executable} has COMET {found}, wanted is {WANTED}: {INSTALL}")


def find(checkpoint: str) -> Path:
    """The file of a checkpoint that is given as a file, a folder or an id of the hub."""
    path = Path(checkpoint)
    if not path.is_file():
        folder = path if path.is_dir() else Path(fetch(checkpoint))
        path = folder / "checkpoints" / "model.ckpt"
    path = path.absolute()  # not resolved: the hub's cache has links to files with other names
    for file in (path, path.parents[1] / "hparams.yaml"):
        if not file.is_file():
            raise ValueError(f"{checkpoint} is incomplete: there is no {file}")
    return path


def fetch(name: str, only: list[str] | None = None) -> str:
    """The folder of a hub id in the cache; what is missing of it is downloaded."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"{name} is no file, no folder and no id of the hub")
    try:
        return snapshot_download(
            name, allow_patterns=only, local_files_only=constants.HF_HUB_OFFLINE
        )
    except GatedRepoError:
        raise RuntimeError(
            f"{name} is gated: open https://huggingface.co/{name}, accept the licence, then run "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(
            f"{name} is no file and no folder here, and the hub knows no such id (or shows it "
            "only to some: `hf auth login` or HF_TOKEN)"
        ) from None
    except OSError as error:
        raise RuntimeError(
            f"{name} is not in the cache and the hub is not reached: fetch it beforehand with "
            f"`hf download {name}`, or name a folder ({type(error).__name__}: {error})"
        ) from None


def halved(model, dtype):
    """The encoder in `dtype`. The heads, a small part, stay in fp32: a score near 1 that is
    rounded to bfloat16 is off by up to 0.002, and not every layer of theirs knows two types."""
    model.encoder.to(dtype)
    for name in ("estimator", "hidden2tag"):
        if head := getattr(model, name, None):
            head.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    return model


def score(
    model, rows: list[dict], batch_size: int, done: Callable[[int], None] = lambda n: None
) -> list[float]:
    """As the library's `predict` gives them, without the Trainer that it makes for each call."""
    import torch

    # Longest first: what does not fit in memory shows at once.
    order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i].values())))
    scores = [0.0] * len(rows)
    for start in range(0, len(rows), batch_size):
        batch = order[start : start + batch_size]
        with torch.inference_mode():
            inputs = model.prepare_for_inference([rows[i] for i in batch])
            inputs = model.transfer_batch_to_device(inputs, model.device, 0)
            found = model.predict_step(inputs).scores.tolist()
        for row, value in zip(batch, found, strict=True):
            if not math.isfinite(value):
                raise RuntimeError(f"row {row} has the score {value}: try dtype 'float32'")
            scores[row] = value
        done(start + len(batch))
    return scores


if __name__ == "__main__":
    main()
