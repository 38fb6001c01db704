"""What Challenger and Solver play: how a question is asked for, posed, answered and compared.

A game extends `Quiz` (`Mathematics` here, `Programs` in toy/programs.py) with

    folder                        the model that both players start from
    challenger_prompt             asks for a question (data/codec.py says what a prompt is)
    parse_question(text)          the question in what the Challenger wrote, or None
    solver_prompt(question)       asks for its answer
    text_answer(text, question)   the answer in what the Solver wrote, or None
    held_out                      pairs of question and true answer, to measure with
"""

import json
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from data.codec import PromptCodec, SystemText, load_tokenizer
from judge import RewardOutput, UntrustedText
from rzero.answers import Answers, boxed, strip_answer


class Quiz:
    """Questions with one right answer; the Solver's majority answer serves as the label."""

    folder: Path
    challenger_prompt: Sequence[str]
    held_out: Sequence[tuple[str, str]] = ()

    @cached_property
    def codec(self) -> PromptCodec:
        """Both players', in the chat template where their tokenizer has one, thinking off."""
        tokenizer = load_tokenizer(self.folder)
        return PromptCodec(tokenizer, chat=bool(tokenizer.chat_template))

    def cluster_answers(self, answers: Sequence[str]) -> list[int]:
        """A number for each answer; equal answers have the same."""
        return [answers.index(answer) for answer in answers]

    def is_right(self, answer: str | None, truth: str) -> bool:
        return answer is not None and len(set(self.cluster_answers([truth, answer]))) == 1

    def read(self, sample) -> str:
        """What follows the thinking; nothing in a sample that was cut off."""
        text = self.codec.read(sample)[1] if sample.stopped else None
        return text or ""

    def answer(self, sample, question: str) -> str | None:
        return self.text_answer(self.read(sample), question)

    def majority(self, answers: list[str | None]) -> tuple[float, str]:
        """The majority's share of all answers, readable or not, and the majority's answer."""
        readable = [answer for answer in answers if answer is not None]
        if not readable:
            return 0.0, ""
        clusters = self.cluster_answers(readable)
        [(cluster, votes)] = Counter(clusters).most_common(1)  # on a tie, the first one seen
        return votes / len(answers), readable[clusters.index(cluster)]

    def is_trainable(self, question: str) -> bool:
        """Held-out questions are never trained on, however they are spaced."""
        return question.split() not in (held_out.split() for held_out, _ in self.held_out)

    def describe_questions(
        self, questions: Sequence[str], labels: Sequence[str] = ()
    ) -> dict[str, float]:
        """Metrics for the log. They may use the truth, so training never sees them."""
        return {"words": statistics.fmean(len(q.split()) for q in questions)}

    def solver_reward(
        self, tasks: Sequence[tuple[str, str]], groups: list[list], step: int
    ) -> list[RewardOutput]:
        """As grpo.train calls it, with pairs of question and label: 1 for the label, else 0."""
        rows = []
        for (question, label), group in zip(tasks, groups, strict=True):
            answers = [self.answer(sample, question) for sample in group]
            total = [float(self.is_right(answer, label)) for answer in answers]
            parts = {"format": [float(x is not None) for x in answers], "label": total}
            rows.append(RewardOutput(total, parts, [f"{x}, label {label}" for x in answers]))
        return rows


class Mathematics(Quiz):
    """The paper's game. Turns, tags and box are those of the authors' code, the words are ours."""

    challenger_prompt = (
        SystemText(
            "You invent problems for a mathematics contest. Choose any branch of mathematics and "
            "find, in silence and step by step, a problem that is in no book, that most good "
            "students would get wrong, and that has one answer which can be checked. Then write "
            "two things and nothing else: the whole problem between <question> and </question>, "
            "without any of its solution, and below it the final answer in \\boxed{}."
        ),
        "Write one such problem in that form.",
    )

    def __init__(self, folder: Path, held_out: str = "", count: int = 0):
        """`held_out`: JSON lines with "question" and "answer"; the first `count` are used."""
        self.folder, self.cluster_answers = folder, Answers().clusters
        self.held_out = load_held_out(Path(held_out))[:count] if held_out else []

    def parse_question(self, text: str) -> str | None:
        questions = re.findall(r"<question>((?:(?!<question>).)*?)</question>", text, re.DOTALL)
        if len(questions) != 1 or not questions[0].strip() or "\\boxed" in questions[0]:
            return None
        return questions[0].strip() if boxed(text.partition("</question>")[2]) else None

    def solver_prompt(self, question: str) -> list[str]:
        ask = "Solve the problem step by step, and put the final answer in \\boxed{}."
        return [SystemText(ask), UntrustedText(question)]

    def text_answer(self, text: str, question: str) -> str | None:
        """An empty box is no answer: it would agree with other empty boxes."""
        answer = boxed(text)
        return answer if strip_answer(answer) else None


def load_held_out(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            pairs.append((str(row["question"]), str(row["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: not JSON with "question" and "answer" ({error})'
            ) from None
    return pairs
