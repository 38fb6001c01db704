"""Make a tiny Qwen2 on the spot, so that the sampler can be tried without a download.

    python -m toy.tryout tiny

In about ten seconds on a laptop it learns two dozen phrases by heart, packed into one row. It can
translate nothing else: this is for seeing the parts work together.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from model import Config, Transformer, save

PHRASES = {
    "good morning": ("guten Morgen", "bonjour"),
    "good evening": ("guten Abend", "bonsoir"),
    "good night": ("gute Nacht", "bonne nuit"),
    "thank you": ("danke", "merci"),
    "see you tomorrow": ("bis morgen", "à demain"),
    "how are you": ("wie geht es dir", "comment vas-tu"),
    "I am hungry": ("ich habe Hunger", "j'ai faim"),
    "the sun is shining": ("die Sonne scheint", "le soleil brille"),
    "it is raining": ("es regnet", "il pleut"),
    "the cat is asleep": ("die Katze schläft", "le chat dort"),
    "I read a book": ("ich lese ein Buch", "je lis un livre"),
    "where is the station": ("wo ist der Bahnhof", "où est la gare"),
}
STEPS = 150


def lines() -> list[str]:
    return [
        f"English: {english}. {language}: {text}."
        for english, translations in PHRASES.items()
        for language, text in zip(("German", "French"), translations, strict=True)
    ]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def main(folder: Path) -> None:
    start = time.perf_counter()
    tokenizer = make_tokenizer(lines())
    sequences = [tokenizer(line + "<|endoftext|>").input_ids for line in lines()]
    torch.manual_seed(0)
    config = Config("qwen2", len(tokenizer), 96, 256, 2, 4, 2, 24, 256, tied=True)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    row = torch.tensor([[token for ids in sequences for token in ids]])
    lengths = [len(ids) for ids in sequences]
    ends = torch.tensor(lengths).cumsum(0) - 1
    keep = torch.ones(row.shape[1], dtype=torch.bool)
    keep[ends] = False  # after a sequence's last token comes a stranger's first
    for step in range(1, STEPS + 1):
        hidden = model(row, segments=lengths)[0, keep]
        loss = F.cross_entropy(model.logits(hidden), row[0, 1:][keep[:-1]])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            rate = step * row.shape[1] / (time.perf_counter() - start)
            print(f"step {step}/{STEPS}  loss {loss.item():.3f}  {rate:.0f} tokens/s", flush=True)
    save(model, folder)
    tokenizer.save_pretrained(folder)
    print(f"saved {folder}: {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m toy.tryout FOLDER")
    main(Path(sys.argv[1]))
