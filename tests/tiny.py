"""Small models with random weights, made and saved by transformers: the other side of our tests."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers import Qwen3Config as Qwen3

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "qwen2": (Qwen2Config, {"rope_theta": 1_000_000.0, "rope_type": "default"}),
    "qwen3": (Qwen3, {"rope_theta": 1_000_000.0, "rope_type": "default"}),
    "llama": (LlamaConfig, {"rope_theta": 10_000.0, "rope_type": "default"}),
    "llama3": (LlamaConfig, LLAMA3_ROPE),
}


def make_model(
    folder, family="qwen2", tied=True, kv_heads=2, head_dim=8, seed=0, vocab=99, positions=512
):
    """Save a transformers model of 2 layers and 4 heads in `folder`, and return it."""
    kind, rope = FAMILIES[family]
    config = kind(
        vocab_size=vocab,
        hidden_size=4 * head_dim if family != "qwen3" else 40,  # Qwen3 sets its head size freely
        head_dim=head_dim,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rope_parameters=dict(rope),
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and norms away from 0 and 1
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.12)
    model.save_pretrained(folder)
    return model


QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_CHAT = (  # as Qwen2.5's: a system's turn, then the others, then the begin of an answer
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


THINKING_CHAT = (  # as Qwen3's: earlier answers lose their thoughts, and a switch, on unless it
    # is false, decides whether an empty thought stands where the answer begins
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}{{ '<think>\\n' + parts[:-1]|join|replace('<think>', '')|trim }}"
    "{{ '\\n</think>\\n\\n' }}{% endif %}{{ parts[-1]|trim }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


def make_tokenizer(
    folder: Path, texts=("a small test of some letters, nothing more",), size=400, thinks=False
):
    """A byte-level BPE tokenizer with Qwen2.5's special tokens and turns; or (`thinks`) Qwen3's
    tokens and switch. It cuts texts as Qwen's does: transformers sets that pattern for every model
    of this type."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=QWEN_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>",
        chat_template=THINKING_CHAT if thinks else QWEN_CHAT,
    )  # fmt: skip
    if thinks:
        fast.add_tokens(["<think>", "</think>"])
    fast.save_pretrained(folder)


def make_pupil(
    folder: Path, lessons: list[tuple[str, str]], steps: int, seed=0, thinks=False
) -> None:
    """A tiny Qwen2 with a tokenizer of its own that has heard answers to some prompts: what it says
    mostly ends, in the right form, and means little."""
    make_tokenizer(folder, [a + b for a, b in lessons], 700, thinks)
    vocab = 700 + 2 * thinks
    model = make_model(folder, vocab=vocab, positions=4096, seed=seed, head_dim=16).train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer.encode(a) for a, _ in lessons]
    ends = [[*tokenizer.encode(b), tokenizer.eos_token_id] for _, b in lessons]
    longest = max(len(a) + len(b) for a, b in zip(rows, ends, strict=True))
    ids = torch.tensor([a + b + [0] * (longest - len(a + b))
                        for a, b in zip(rows, ends, strict=True)])  # fmt: skip
    labels = torch.tensor([[-100] * len(a) + b + [-100] * (longest - len(a + b))
                           for a, b in zip(rows, ends, strict=True)])  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        some = torch.randperm(len(ids), generator=torch.Generator().manual_seed(step))[:16]
        loss = model(input_ids=ids[some], labels=labels[some]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
