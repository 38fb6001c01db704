"""What Challenger and Solver play: how a question is asked for, posed, answered and compared.

A game extends `Quiz` (`Mathematics` here, `Programs` in toy/programs.py) with

    folder                        the model that both players start from
    challenger_prompt             asks for a question
    parse_question(text)          the question in what the Challenger wrote, or None
    pose(question) -> pieces      the Solver's prompt
    text_answer(text, question)   the answer in what the Solver wrote, or None
    held_out                      pairs of question and true answer, to measure with
"""

import json
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.codec import PromptCodec
from judge import RewardOutput, UntrustedText
from rzero.answers import Answers, boxed, strip_answer


class Quiz:
    """Questions with one right answer; the Solver's majority answer serves as the label."""

    folder: Path
    challenger_prompt: str
    held_out: Sequence[tuple[str, str]] = ()

    def cluster_answers(self, answers: Sequence[str]) -> list[int]:
        """A number for each answer; equal answers have the same."""
        return [answers.index(answer) for answer in answers]

    def is_right(self, answer: str | None, truth: str) -> bool:
        return answer is not None and len(set(self.cluster_answers([truth, answer]))) == 1

    def answer(self, texts: PromptCodec, sample, question: str) -> str | None:
        """None for a sample that was cut off, or thinks to its end."""
        text = texts.read(sample)[1] if sample.stopped else None
        return None if text is None else self.text_answer(text, question)

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
        return {"words": statistics.fmean(len(q.split()) for q in questions)} if questions else {}

    def solver_reward(self, texts: PromptCodec):
        """For grpo.train, whose tasks are pairs of question and label: 1 for the label, else 0."""

        def reward(
            tasks: Sequence[tuple[str, str]], groups: list[list], step: int
        ) -> list[RewardOutput]:
            rows = []
            for (question, label), group in zip(tasks, groups, strict=True):
                answers = [self.answer(texts, sample, question) for sample in group]
                total = [float(self.is_right(answer, label)) for answer in answers]
                parts = {"format": [float(x is not None) for x in answers], "label": total}
                rows.append(RewardOutput(total, parts, [f"{x}, label {label}" for x in answers]))
            return rows

        return reward

    def close(self) -> None:
        pass


class Mathematics(Quiz):
    """The paper's game. We know no paper that prints its prompts: these are ours."""

    challenger_prompt = (
        "Think of a mathematics problem that nobody has seen before, hard enough that a good "
        "student may fail, with one answer that can be checked. Think first. Then write the "
        "problem between <question> and </question>, nothing of the solution in it, and below it "
        "the final answer in \\boxed{}.\n\nProblem 1:\n"
    )

    def __init__(self, folder: Path, held_out: str = "", count: int = 0):
        """`held_out`: JSON lines with "question" and "answer"; the first `count` are used."""
        self.folder, self.comparer = folder, Answers()
        self.held_out = load_held_out(Path(held_out))[:count] if held_out else []

    def parse_question(self, text: str) -> str | None:
        questions = re.findall(r"<question>((?:(?!<question>).)*?)</question>", text, re.DOTALL)
        if len(questions) != 1 or not questions[0].strip() or "\\boxed" in questions[0]:
            return None
        return questions[0].strip() if boxed(text.partition("</question>")[2]) else None

    def solver_prompt(self, question: str) -> list[str]:
        ask = "Solve this problem step by step, and put the final answer in \\boxed{}.\n\n"
        return [ask, UntrustedText(question), "\n\nSolution:\n"]

    def text_answer(self, text: str, question: str) -> str | None:
        """An empty box is no answer: it would agree with other empty boxes."""
        answer = boxed(text)
        return answer if strip_answer(answer) else None

    def cluster_answers(self, answers: Sequence[str]) -> list[int]:
        return self.comparer.clusters(answers)

    def close(self) -> None:
        self.comparer.close()


def load_held_out(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            pairs.append((str(row["question"]), str(row["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: not JSON with "question" and "answer" ({error})'
            ) from None
    return pairs
