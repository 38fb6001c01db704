"""Tiny random COMET models, made with the real library under COMET's own Python, offline.

    python tests/tiny_comet.py FOLDER [ROWS.jsonl]

With rows it prints what the worker says about each model, and the scores that the library's
`predict` and the worker's code give: {"about": {model: {…}}, "scores": {model: {"predict": […],
"float32": […], "float16": […]}}}.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"

import comet
import pytorch_lightning
import sentencepiece
import torch
import yaml
from comet.models import ReferencelessRegression, RegressionMetric, UnifiedMetric, XCOMETMetric
from transformers import XLMRobertaConfig, XLMRobertaTokenizerFast, XLMRobertaXLConfig

HEAD = {"hidden_sizes": [48, 16], "dropout": 0.0}
UNIFIED = {"sent_layer": "mix", "word_layer": 3, **HEAD}
KIWI = {"input_segments": ["mt", "src"], "layer_transformation": "sparsemax"}
XCOMET = {"error_labels": ["minor", "major", "critical"], "word_level_training": True}
MODELS = {  # name -> (what hparams.yaml calls it, class, encoder, arguments)
    "regression": (
        "regression_metric", RegressionMetric, "XLM-RoBERTa",
        {"layer": "mix", "layer_transformation": "sparsemax_patch", **HEAD},
    ),
    "kiwi": ("unified_metric", UnifiedMetric, "XLM-RoBERTa", {**UNIFIED, **KIWI}),
    "unified": (
        "unified_metric", UnifiedMetric, "XLM-RoBERTa",
        {**UNIFIED, "input_segments": ["mt", "src", "ref"]},
    ),
    "xcomet": ("xcomet_metric", XCOMETMetric, "XLM-RoBERTa-XL", {**UNIFIED, **XCOMET}),
    "referenceless": (
        "referenceless_regression_metric", ReferencelessRegression, "XLM-RoBERTa",
        {"layer": "mix", **HEAD},
    ),
}  # fmt: skip


def make(folder: Path) -> None:
    random.seed(0)
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyzäöüßéè中文日本語"
    words = ["".join(random.choices(letters, k=random.randint(1, 8))) for _ in range(800)]
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(random.choices(words, k=12)) for _ in range(2000)),
        model_writer=pieces, vocab_size=500, model_type="unigram",
        bos_id=1, eos_id=2, unk_id=0, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    for name, config in (("XLM-RoBERTa", XLMRobertaConfig), ("XLM-RoBERTa-XL", XLMRobertaXLConfig)):
        encoder = folder / name
        encoder.mkdir(parents=True)
        (encoder / "sentencepiece.bpe.model").write_bytes(pieces.getvalue())
        tokenizer = XLMRobertaTokenizerFast(vocab_file=str(encoder / "sentencepiece.bpe.model"))
        tokenizer.save_pretrained(encoder)
        config(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=514, type_vocab_size=1,
            initializer_range=0.2,  # scores that differ from row to row
        ).save_pretrained(encoder)  # fmt: skip
    for name, (identifier, kind, encoder, arguments) in MODELS.items():
        model = kind(
            encoder_model=encoder, pretrained_model=str(folder / encoder),
            load_pretrained_weights=False, local_files_only=True, **arguments,
        )  # fmt: skip
        hparams = {key: value for key, value in model.hparams.items() if key != "local_files_only"}
        hparams["class_identifier"] = identifier
        file = folder / name / "checkpoints" / "model.ckpt"
        file.parent.mkdir(parents=True)
        (folder / name / "hparams.yaml").write_text(yaml.safe_dump(hparams))
        state = {"state_dict": model.state_dict(), "hyper_parameters": hparams}
        state["arguments"] = argparse.Namespace()  # a real one holds more than tensors, too
        torch.save(state | {"pytorch-lightning_version": pytorch_lightning.__version__}, file)


def scores(folder: Path, rows: list[dict]) -> dict[str, dict]:
    file = Path(__file__).parent.parent / "eval" / "comet_worker.py"
    spec = importlib.util.spec_from_file_location("comet_worker", file)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    plain = [{key: row[key] for key in ("src", "mt")} for row in rows]
    results: dict[str, dict] = {"about": {}, "scores": {}}
    for name in MODELS:
        cases = {name: rows}
        if name in ("unified", "xcomet"):
            cases[f"{name} without references"] = plain
        checkpoint = folder / name / "checkpoints" / "model.ckpt"
        library = comet.load_from_checkpoint(str(checkpoint), local_files_only=True)
        settings = {"checkpoint": str(folder / name), "device": "cpu", "dtype": "float16"}
        half, results["about"][name] = worker.load_comet(settings)
        for case, given in cases.items():
            predicted = library.predict(given, 8, gpus=0, progress_bar=False, num_workers=0)
            batches = [given[i : i + 8] for i in range(0, len(given), 8)]
            results["scores"][case] = {"predict": predicted.scores} | {
                dtype: [score for batch in batches for score in worker.score(model, batch)]
                for dtype, model in (("float32", library), ("float16", half))
            }
    return results


if __name__ == "__main__":
    make(Path(sys.argv[1]))
    if sys.argv[2:]:
        lines = Path(sys.argv[2]).read_text("utf-8").splitlines()
        with contextlib.redirect_stdout(sys.stderr):
            result = scores(Path(sys.argv[1]), [json.loads(line) for line in lines])
        print(json.dumps(result))
