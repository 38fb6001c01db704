"""What Challenger and Solver play: what is a question, what an answer, and what is learned from.

A game, as rzero.py plays it; toy/programs.py has another one:

    folder, more_tokens, close()           the model to start with; room beside prompt and answer
    ask(number) -> (pieces, request)       what the Challenger is asked, and what it was asked for
    question(text, request)                what it wrote, or None when that is no question
    words(question)                        its text, to see whether it was asked before
    pose(question) -> pieces               how the Solver is asked
    answer(texts, sample, question)        its answer, or None when there is none
    agreement(questions, answers, player)  how far the Solver agrees with itself on each, and a
                                           label; None for what is no question after all
    fair(question)                         it may be learned from: it is not measured with
    lessons(rows, iteration)               of questions and labels, what the Solver learns from, …
    pose_lesson(lesson) -> pieces          … how it is asked, …
    reward(texts, sampler)                 … and what its answers are worth (see grpo.py)
    held_out, right(answer, truth)         to measure with, and so is:
    measure(questions, labels)             what is known of them; nothing that learns may see it

`Quiz` is what games with one right answer have in common: the majority's answer is the label.
"""

import itertools
import json
import re
import statistics
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

from answers import Answers, boxed, plain
from judge import (
    TOY,
    Given,
    Judge,
    Judged,
    Prompts,
    Reward,
    Task,
    Texts,
    read_answer,
    translation_in,
)
from problem import policy_folder
from toy import pretrain
from toy.languages import Languages


class Quiz:
    """Its children have ask, question, pose, text_answer."""

    held_out: Sequence[tuple[str, str]] = ()
    more_tokens = 0
    folder: Path

    def alike(self, answers: Sequence[str]) -> list[int]:
        """For each a number that those have which are the same."""
        return [answers.index(answer) for answer in answers]

    def words(self, question: str) -> str:
        return question

    def answer(self, texts: Texts, sample, question: str) -> str | None:
        """One that was cut off has none."""
        return self.text_answer(texts.decode(sample.ids[:-1]), question) if sample.stopped else None

    def agreement(self, questions, answers: list[list[str | None]], player) -> list[tuple]:
        """The majority's share, and its answer. An answer that cannot be read agrees with none."""
        found = []
        for row in answers:
            given = [answer for answer in row if answer is not None]
            kinds = self.alike(given)
            kind, votes = max(Counter(kinds).items(), key=lambda x: x[1], default=(None, 0))
            found.append((votes / len(row), given[kinds.index(kind)] if given else ""))
        return found

    def lessons(self, rows: list[dict], iteration: int) -> list[tuple[str, str]]:
        return [(row["question"], row["label"]) for row in rows]

    def fair(self, question: str) -> bool:
        return question.split() not in (held_out.split() for held_out, _ in self.held_out)

    def pose_lesson(self, lesson: tuple[str, str]) -> list[str]:
        return self.pose(lesson[0])

    def right(self, answer: str | None, truth: str) -> bool:
        return answer is not None and len(set(self.alike([truth, answer]))) == 1

    def measure(self, questions: Sequence[str], labels: Sequence[str] = ()) -> dict[str, float]:
        return {"words": statistics.fmean(len(q.split()) for q in questions)} if questions else {}

    def reward(self, texts: Texts, sampler):
        """1 for the label."""

        def judged(lessons: Sequence[tuple[str, str]], groups: list[list], step: int):
            rows = []
            for (question, label), group in zip(lessons, groups, strict=True):
                answers = [self.answer(texts, sample, question) for sample in group]
                total = [float(self.right(answer, label)) for answer in answers]
                form = [float(answer is not None) for answer in answers]
                words = [f"{answer}, label {label}" for answer in answers]
                rows.append(Judged(total, {"format": form, "label": total}, words))
            return rows

        return judged

    def close(self) -> None:
        pass


# --------------------------------------------------------------------------------- mathematics


class Mathematics(Quiz):
    """The paper's. Its prompts are in no paper that we know word for word: these are ours."""

    ASK = (
        "Think of a mathematics problem that nobody has seen before, hard enough that a good "
        "student may fail, with one answer that can be checked. Think first. Then write the "
        "problem between <question> and </question>, nothing of the solution in it, and below it "
        "the final answer in \\boxed{}.\n\nProblem {number}:\n"
    )
    POSE = "Solve this problem step by step, and put the final answer in \\boxed{}.\n\n"

    def __init__(self, folder: Path, held_out: str = "", count: int = 0):
        """`held_out`: a file of JSON lines with "question" and "answer", of which the first `count`
        are measured with."""
        self.folder, self.equal = folder, Answers()
        self.held_out = questions_in(Path(held_out))[:count] if held_out else []

    def ask(self, number: int) -> tuple[list[str], None]:
        return [self.ASK.replace("{number}", "1")], None

    def question(self, text: str, request: None) -> str | None:
        found = re.findall(r"<question>((?:(?!<question>).)*?)</question>", text, re.DOTALL)
        if len(found) != 1 or not found[0].strip() or "\\boxed" in found[0]:
            return None
        return found[0].strip() if boxed(text.partition("</question>")[2]) else None

    def pose(self, question: str) -> list[str]:
        return [self.POSE, Given(question), "\n\nSolution:\n"]

    def text_answer(self, text: str, question: str) -> str | None:
        """An empty box is none: it would agree with other empty ones."""
        found = boxed(text)
        return found if plain(found) else None

    def alike(self, answers: Sequence[str]) -> list[int]:
        return self.equal.clusters(answers)

    def close(self) -> None:
        self.equal.close()


def questions_in(path: Path) -> list[tuple[str, str]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found.append((str(row["question"]), str(row["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: not JSON with "question" and "answer" ({error})'
            ) from None
    return found


# --------------------------------------------------------------------------------- translation


class Translation:
    """The Challenger writes sentences to be translated; the Solver is SSR-Zero's actor and judge.

    What it writes must be like the real texts of its language and not one of them: in its
    characters, in its length, in how likely the Solver finds it. Then a sentence counts on which
    the Solver's translations differ: p is their mean chrF with each other ("chrf") or the Solver's
    own mean score of them ("score"). Half of what is learned from are real texts.
    """

    def __init__(
        self, folder: Path, prompts: Prompts, write: str, real: Sequence[Task],
        held_out: Sequence[Task], seed: int, judge: dict, measure: str = "chrf",
    ):  # fmt: skip
        """`write`: a template with {language}, {length} words. `judge`: options of judge.Judge."""
        self.folder, self.prompts, self.write, self.real = folder, prompts, write, real
        self.seed, self.judge, self.measured_by = seed, judge, measure
        self.held_out = [(task._replace(reference=None), task.reference) for task in held_out]
        self.known = {task.text for task in [*real, *held_out]}
        by_language: dict[str, list[str]] = {}
        for task in real:
            by_language.setdefault(task.source, []).append(task.text)
        self.letters = {x: letters_of(texts) for x, texts in by_language.items()}
        self.usual = {x: usual_share(texts) for x, texts in by_language.items()}
        # A player's -> by language, what most texts are above. It keeps no player of before alive.
        self.likely = weakref.WeakKeyDictionary()
        texts = [len(task.text.split()) for task in real]
        self.more_tokens = 8 + 2 * max(texts)

    def ask(self, number: int) -> tuple[list[str], Task]:
        """For a sentence as long as a real one."""
        task = self.real[Random(f"{self.seed} ask {number}").randrange(len(self.real))]
        return self.asked(task), task._replace(reference=None)

    def asked(self, task: Task) -> list[str]:
        length = str(len(task.text.split()))
        return [self.write.replace("{language}", task.source).replace("{length}", length)]

    def question(self, text: str, request: Task) -> Task | None:
        if self.prompts.tags:
            text = read_answer(text) or ""
        text, length = " ".join(text.split()), len(request.text.split())
        if not text or text in self.known or abs(len(text.split()) - length) > 1 + length // 4:
            return None
        shares = {x: share_of(text, letters) for x, letters in self.letters.items()}
        likeliest = max(shares.values())
        if shares[request.source] < max(self.usual[request.source], likeliest):
            return None
        return Task(text, request.source, request.target)

    def words(self, question: Task) -> str:
        return question.text

    def pose(self, question: Task) -> list[str]:
        return self.prompts.ask(question)

    pose_lesson = pose

    def answer(self, texts: Texts, sample, question: Task) -> str | None:
        return translation_in(texts, self.prompts, question, sample)

    def agreement(self, questions: Sequence[Task], answers: list[list], player) -> list:
        likely = self.likelihoods(player, questions)
        values = self.chrf(answers) if self.measured_by == "chrf" else self.scores(
            questions, answers, player)  # fmt: skip
        return [
            None if x < self.least(player, q.source) or value is None else (value, "")
            for q, x, value in zip(questions, likely, values, strict=True)
        ]

    def likelihoods(self, player, tasks: Sequence[Task]) -> list[float]:
        """Of each text's tokens, in the mean, as an answer to what the Challenger is asked."""
        prompts = player.texts.encode([self.asked(task) for task in tasks])
        ids = player.texts.encode([[Given(task.text)] for task in tasks])
        return [float(x.mean()) for x in player.sampler.score(prompts, ids)] if ids else []

    def least(self, player, language: str) -> float:
        """What 19 of 20 real texts of the language are above."""
        known = self.likely.setdefault(player, {})
        if language not in known:
            some = [task for task in self.real if task.source == language][:200]
            known[language] = fifth_percent(self.likelihoods(player, some))
        return known[language]

    def chrf(self, answers: list[list[str | None]]) -> list[float | None]:
        """The mean over all pairs, of which the one with an unreadable translation is 0."""
        from sacrebleu import sentence_chrf

        found = []
        for row in answers:
            pairs = Counter(itertools.combinations([x or "" for x in row], 2))
            likeness = sum(
                count * sentence_chrf(a, [b]).score / 100
                for (a, b), count in pairs.items()
                if a and b
            )
            found.append(likeness / sum(pairs.values()))
        return found

    def scores(self, questions, answers: list[list[str | None]], player) -> list[float | None]:
        judge = Judge(player.sampler, player.texts, self.prompts, seed=self.seed, **self.judge)
        rows = judge(questions, answers, 0)
        known = [[x.value for x in row if x.value is not None] for row in rows]
        return [statistics.fmean(row) if row else None for row in known]

    def fair(self, question: list[str]) -> bool:
        return True  # a held-out sentence is refused as a question

    def lessons(self, rows: list[dict], iteration: int) -> list[Task]:
        invented = [Task(*row["question"]) for row in rows]
        rng = Random(f"{self.seed} lessons {iteration}")
        return invented + rng.sample(self.real, min(len(self.real), max(len(invented), 1)))

    def reward(self, texts: Texts, sampler) -> Reward:
        judge = Judge(sampler, texts, self.prompts, seed=self.seed, **self.judge)
        return Reward(texts, self.prompts, {"self": (1.0, judge)})

    def right(self, answer: str | None, truth: str) -> bool:
        return answer is not None and answer.split() == truth.split()

    def measure(self, questions: Sequence, labels: Sequence[str] = ()) -> dict[str, float]:
        texts = [q if isinstance(q, str) else q[0] for q in questions]
        return {"words": statistics.fmean(len(t.split()) for t in texts)} if texts else {}

    def close(self) -> None:
        pass


def letters_of(texts: Sequence[str]) -> Counter:
    """How many texts each three characters in a row are in."""
    return Counter(x for text in texts for x in set(threes(text)))


def threes(text: str) -> list[str]:
    text = f" {text} "
    return [text[i : i + 3] for i in range(len(text) - 2)]


def share_of(text: str, letters: Counter, own: int = 0) -> float:
    """Of its threes, those that more than `own` of the language's texts have."""
    found = threes(text)
    return sum(letters[x] > own for x in found) / len(found)


def usual_share(texts: Sequence[str]) -> float:
    """What 19 of 20 texts of the language have of the others' threes."""
    letters = letters_of(texts)
    return fifth_percent([share_of(text, letters, own=1) for text in texts])


def fifth_percent(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 20]


# ----------------------------------------------------------------------------------- who plays


def programs(s, ranks):
    from toy.programs import Programs, Recipe, make

    folder = Path(s.model) if s.model else None
    folder = folder or ranks.one_first("make the toy", lambda: make(Recipe(seed=s.seed)))
    return Programs(s.seed, s.eval_prompts, folder)


def mathematics(s, ranks):
    if not s.model:
        raise ValueError("--game mathematics needs a --model")
    return Mathematics(policy_folder(s, ranks), s.held_out, s.eval_prompts)


def translation(s, ranks):
    """The toy pair."""
    recipe = pretrain.Recipe(seed=s.seed, skills=("write",))
    folder = Path(s.model) if s.model else None
    folder = folder or ranks.one_first("make the toy", lambda: pretrain.make(recipe))
    pair = Languages(s.seed)
    real = [pair.task("train", i)._replace(reference=None) for i in range(s.real)]
    held_out = [pair.task("held-out", i) for i in range(s.eval_prompts)]
    judge = {"reading": "expected"}
    write = "write {language} {length} =>"
    return Translation(folder, TOY, write, real, held_out, s.seed, judge, s.likeness)


GAMES = {"programs": programs, "mathematics": mathematics, "translation": translation}
