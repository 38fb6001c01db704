"""Prompts as token ids: the tokenizer, its chat template, and control tokens kept out of text.

    codec = PromptCodec(load_tokenizer(folder), chat=True)
    ids = codec.encode([PLAIN.ask(task)])          # what the model continues
    codec.decode(ids[0])                           # control tokens are written out
    codec.read(sample)                             # its text, and what follows its thinking

A prompt is a list of strings. Those of a template are tokenised as they are; an `UntrustedText`,
from data or from a model, is tokenised apart from them, with its control tokens spelled out. A
`SystemText` may come first: it fills the system's turn.
"""

import datetime
import re
from collections.abc import Sequence
from pathlib import Path

from judge import UntrustedText, after_thinking, nfkc


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # its parsers raise many kinds, some with pages of text
        reason = str(error)[:300] or type(error).__name__
        raise ValueError(f"{folder}: no tokenizer could be read there ({reason})") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer names no eos_token to end a translation")
    return tokenizer


THOUGHTS = re.compile(r"(\s*<think>.*?</think>)*", re.DOTALL)
SWITCH = "enable_thinking"  # of a chat template


class SystemText(str):
    """The system's turn of a prompt, whose other strings are the user's."""


class PromptCodec:
    """Converts between text and token ids. Control tokens come from templates alone."""

    def __init__(self, tokenizer, chat: bool | str = False):
        """`chat`: a prompt is a user's turn in the tokenizer's chat template, with thinking off
        where that has a switch, or (chat="thinking") on."""
        self.tokenizer = tokenizer
        # Not control tokens: runs of spaces and line ends, and what unknown text becomes.
        added = {t: i for t, i in tokenizer.get_added_vocab().items() if len(t.strip()) > 1}
        self.control_ids = {*added.values()} - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})
        self.control = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        first = tokenizer("a").input_ids[:1]
        self.begin = first if first == [tokenizer.bos_token_id] else []  # as in Llama 3
        self.stop_ids = [tokenizer.eos_token_id]
        self.turn, self.notes = ("", ""), []  # around a prompt; changes to the chat template
        self.system = ("System: ", "\n\nUser: ", "\n\nAssistant:")  # around a system's and a user's
        self.thought_start = ""  # of an answer, where the template writes it: open, or empty
        self.thinks = "</think>" in added
        if chat:
            self.begin = []  # the template has it
            thinking = chat == "thinking"
            self.turn, self.system, end, self.notes = chat_turns(tokenizer, thinking)
            self.stop_ids += [i for i in self.pieces([end])[0][:1] if i in self.control_ids]
            self.thought_start = "".join(self.turn[1].partition("<think>")[1:])
            self.thinks |= bool(self.thought_start) or SWITCH in tokenizer.get_chat_template()
            if thinking and not self.thinks:
                raise ValueError(f"{tokenizer.name_or_path}: --chat thinking needs a chat template "
                                 f"with {SWITCH} or a token <think>: use --chat alone")  # fmt: skip

    def encode(self, prompts: Sequence[list[str]]) -> list[list[int]]:
        rows = [
            [piece for part in self.in_turns(prompt) for piece in self.spell_out(part) if piece]
            for prompt in prompts
        ]
        distinct = list(dict.fromkeys(piece for row in rows for piece in row))
        ids = dict(zip(distinct, self.pieces(distinct), strict=True))
        for piece in (x for row in rows for x in row if isinstance(x, UntrustedText)):
            if forged := self.control_ids.intersection(ids[piece]):
                tokens = self.tokenizer.convert_ids_to_tokens(sorted(forged))
                raise ValueError(f"{piece[:60]!r} makes control tokens {tokens}: remove that text")
        return [[*self.begin, *(i for piece in row for i in ids[piece])] for row in rows]

    def in_turns(self, prompt: list[str]) -> list[str]:
        before, after = self.turn
        if prompt and isinstance(prompt[0], SystemText):
            start, between, after = self.system
            before, prompt = start + prompt[0] + between, prompt[1:]
        return [before, *prompt, after]

    def spell_out(self, part: str) -> list[str]:
        """Pieces to be tokenised apart: each letter of a control token in untrusted text is one."""
        if not isinstance(part, UntrustedText):
            return [part]
        text = self.control.sub(lambda m: "\0".join(["", *m[0], ""]), self.sanitize(part))
        return [UntrustedText(piece) for piece in text.split("\0")]

    def sanitize(self, text: str) -> str:
        """Without NUL, and normalised where that uncovers a control token."""
        text = text.replace("\0", "")
        return nfkc(text) if self.control.search(nfkc(text)) else text

    def pieces(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """With control tokens written out."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def read(self, sample) -> tuple[str, str | None]:
        """A sample's text, and what a reader gets of it: for a model that thinks, what follows the
        thoughts it begins with, or None if one never ends. The text has an empty thought in their
        place: the model's own may name tags, and a prompt may have asked for one more."""
        text = self.thought_start + self.decode(sample.ids[: len(sample.ids) - sample.stopped])
        end = THOUGHTS.match(text).end() if self.thinks else 0
        answer = text[end:]
        if self.thinks and answer.lstrip().startswith("<think>"):
            return text, None
        return "<think></think>" * (end > 0) + answer, answer

    def one_token(self, text: str) -> int:
        ids = self.pieces([text])[0]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(f"{text!r} is not one token here: use --score-mode written")
        return ids[0]


TODAY = datetime.date(2024, 7, 26)  # what Llama 3's template takes where it has no clock


def chat_turns(tokenizer, thinking: bool) -> tuple[tuple, tuple, str, list[str]]:
    """(What a chat template writes before and after a user's text), (what it writes before, between
    and after a system's and a user's), what ends an answer, and notes on a fixed date in place of
    today's, on thinking, and on a missing system's turn."""
    from jinja2 import TemplateError

    name, mark, notes = tokenizer.name_or_path, "THE-TEXT", []
    if not tokenizer.chat_template:
        raise ValueError(f"{name}: the tokenizer has no chat template: leave the chat option out")
    own = tokenizer.get_chat_template()
    clock = r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"
    template = re.sub(clock, lambda call: repr(TODAY.strftime(call[2])), own)
    options = {"chat_template": template, "tokenize": False}
    if "strftime_now(" in template:
        raise ValueError(f"{name}: the chat template reads the clock: write a fixed date into it")
    if template != own:
        notes.append(f"The chat template writes today's date; {TODAY} is used instead, so that "
                     "prompts do not change from day to day")  # fmt: skip
    if SWITCH in template:
        options[SWITCH] = thinking
        state = "on" if thinking else "off (--chat thinking turns it on)"
        notes.append(f"Thinking is {state} in the chat template")

    def around(*roles: str) -> tuple[str, ...]:
        turns = [{"role": role, "content": mark} for role in roles]
        begins = roles[-1] == "user"  # an answer
        whole = tokenizer.apply_chat_template(turns, add_generation_prompt=begins, **options)
        return tuple(whole.split(mark))

    turn, whole = around("user"), around("user", "assistant")
    if len(turn) != 2 or len(whole) != 3:
        raise ValueError(
            f"{name}: the chat template alters a user's text: leave the chat option out"
        )
    try:
        system = around("system", "user")
    except TemplateError:  # it refuses the role
        system = ()
    if len(system) != 3:
        system = (turn[0], "\n\n", turn[1])
        notes.append("The chat template has no system's turn: its text begins the user's")
    if after_thinking(turn[1]) is None:
        notes.append("The chat template begins every answer with <think>: the model thinks")
    return turn, system, whole[-1].strip(), notes
