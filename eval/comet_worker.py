"""Scores translations with a COMET model. `comet.py` starts it, with COMET's own Python.

Settings are the first argument. Stdin is a socket: each line from it is a JSON list of rows, each
line to it an answer. A checkpoint is a pickle, and loading it runs what is in it: use those you
trust.
"""

import json
import os
import sys
import traceback
from importlib import metadata
from pathlib import Path

WANTED = "2.2.7"
INSTALL = "`python -m eval.comet install` makes an environment with it"


def main() -> None:
    here = str(Path(__file__).resolve().parent)  # its comet.py would hide the library
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder or ".") != here]
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(0), "w", buffering=1, encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        model, about = load_comet(json.loads(sys.argv[1]))
    except Exception as error:
        return print(json.dumps(explain(error)), file=replies)
    print(json.dumps({"about": about}), file=replies)
    for line in requests:  # ends with the parent
        try:
            answer = {"scores": score(model, json.loads(line))}
        except Exception as error:
            answer = explain(error)
        print(json.dumps(answer), file=replies)


def explain(error: Exception) -> dict:
    kind = "ValueError" if isinstance(error, ValueError) else "RuntimeError"
    message = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        message = f"set a smaller batch_size, or dtype 'bfloat16': {error}"
    elif not isinstance(error, ValueError | RuntimeError):
        message = traceback.format_exc()
    return {"error": message, "kind": kind}


# ------------------------------------------------------------------------------------ the model


def load_comet(settings: dict) -> tuple:
    """The model and its description."""
    check_version()
    folder = locate(settings["checkpoint"])
    import yaml
    from huggingface_hub import constants

    hparams = yaml.load((folder / "hparams.yaml").read_text("utf-8"), yaml.FullLoader)
    if (encoder := hparams.get("pretrained_model")) and not os.path.isdir(encoder):
        fetch(encoder, ["*.json", "*.model"])  # its tokenizer
    # Even with local_files_only, transformers asks the hub about large tokenizers unless this is
    # set when it is imported.
    constants.HF_HUB_OFFLINE = True
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # checkpoints hold more than tensors
    import comet
    import torch

    file = str(folder / "checkpoints" / "model.ckpt")
    model = comet.load_from_checkpoint(file, local_files_only=True)
    model = halved(model, getattr(torch, settings["dtype"])).to(settings["device"]).eval()
    needs = model.requires_references()
    return model, {
        "revision": folder.name if folder.parent.name == "snapshots" else None,
        "class": type(model).__name__,
        "comet": WANTED,
        "dtype": settings["dtype"],
        "control": model.encoder.tokenizer.all_special_tokens,
        "needs_reference": needs,
        "takes_reference": needs or "ref" in (model.hparams.get("input_segments") or ()),
    }


def check_version() -> None:
    try:
        version = metadata.version("unbabel-comet")
    except metadata.PackageNotFoundError:
        raise RuntimeError(f"{sys.executable} has no COMET: {INSTALL}") from None
    if version != WANTED:
        raise RuntimeError(f"{sys.executable} has COMET {version}, wanted is {WANTED}: {INSTALL}")


def locate(checkpoint: str) -> Path:
    """The folder of a checkpoint, which may be a hub id."""
    folder = Path(checkpoint if os.path.isdir(checkpoint) else fetch(checkpoint)).absolute()
    for file in (folder / "hparams.yaml", folder / "checkpoints" / "model.ckpt"):
        if not file.is_file():
            raise ValueError(f"{checkpoint} is incomplete: there is no {file}")
    return folder


def fetch(name: str, patterns: list[str] | None = None) -> str:
    """The cached folder of a hub id; missing files are downloaded."""
    from huggingface_hub import constants, snapshot_download

    offline = constants.HF_HUB_OFFLINE
    try:
        return snapshot_download(name, allow_patterns=patterns, local_files_only=offline)
    except (OSError, ValueError) as error:  # the hub's errors are of these types
        raise RuntimeError(
            f"{name} is no file or folder here, and the hub did not give it. If it is gated, "
            f"accept the licence at https://huggingface.co/{name} and run `hf auth login`; without "
            f"a network, run `hf download {name}` beforehand. ({type(error).__name__}: {error})"
        ) from None


def halved(model, dtype):
    """The encoder in `dtype`. The heads, a small part, stay in fp32: a score near 1 that is
    rounded to bfloat16 is off by up to 0.002, and not every layer of theirs knows two types."""
    model.encoder.to(dtype)
    for name in ("estimator", "hidden2tag"):
        if head := getattr(model, name, None):
            head.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    return model


def score(model, rows: list[dict]) -> list[float]:
    """Of one batch, as the library's `predict` gives them, without the Trainer that it makes for
    each call."""
    import torch

    with torch.inference_mode():
        inputs = model.prepare_for_inference(rows)
        inputs = model.transfer_batch_to_device(inputs, model.device, 0)
        return model.predict_step(inputs).scores.tolist()


if __name__ == "__main__":
    main()
