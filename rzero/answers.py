r"""Are two final answers to a maths question the same? 1/2, \frac12 and 0.5 are.

    answers = Answers(limit=3.0)
    answers.same("x=3", "3")                     # True
    answers.clusters(["1/2", "0.5", None, "3"])  # [0, 0, None, 1]
    boxed(r"so it is \boxed{\frac{1}{2}}.")      # \frac{1}{2}

math-verify, on top of sympy, decides. An answer like 9^{9^{9}} keeps it busy forever while it holds
the interpreter's lock, so it runs in a worker process (this file with --worker), which the kernel
ends at a time or memory limit.

What math-verify calls equal can surprise: units are dropped (5 cm = 5 m), so is the order of a list
without brackets, decimals are rounded to 6 places (1/3 = 0.333333), 2025-01-02 is 2022. It is
neither symmetric nor transitive. Here answers are equal if it says so in either direction, and
transitivity is assumed, though 50% equals both 50 and 0.5.
"""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache

MEMORY = 4 << 30
"""Bytes of address space that a worker may use."""
MAX_LENGTH = 1000
"""Characters of an answer; two must fit in a pipe's 64 KiB, or writing could block."""


class Answers:
    """One worker, started when first needed; it ends with this process. Not thread-safe."""

    def __init__(self, limit: float = 3.0):
        """`limit`: seconds for one comparison."""
        self.limit = limit
        self.worker: subprocess.Popen | None = None
        self.hopeless: set[str] = set()
        self.decide = lru_cache(100_000)(self.decide)

    def same(self, first: str | None, second: str | None) -> bool:
        """False also where the comparison exceeded a limit. A missing answer (None or blank) is
        equal to nothing, not even to another one."""
        first, second = strip_answer(first), strip_answer(second)
        if not first or not second or first == second:
            return bool(first) and first == second
        pair = sorted((first, second))
        if self.hopeless.intersection(pair) or not (is_readable(first) and is_readable(second)):
            return False
        return self.decide(*pair)

    def clusters(self, answers: Sequence[str | None]) -> list[int | None]:
        """Each answer's cluster, numbered in order of appearance; None for a missing answer.

        An answer joins the first cluster whose first member equals it.
        """
        numbers, firsts = [], []
        for answer in answers:
            equal = (n for n, first in enumerate(firsts) if self.same(first, answer))
            number = next(equal, len(firsts) if strip_answer(answer) else None)
            if number == len(firsts):
                firsts.append(answer)
            numbers.append(number)
        return numbers

    def decide(self, first: str, second: str) -> bool:
        equal = self.compare(first, second)
        if equal is None:  # a bad answer must not cost the limit with every other one
            self.hopeless.update(x for x in (first, second) if self.compare(x, "0") is None)
            if not self.hopeless.intersection((first, second)):  # something else killed the worker
                equal = self.compare(first, second)
        return bool(equal)

    def compare(self, first: str, second: str) -> bool | None:
        """None if the worker ended instead of answering."""
        # Put back when it has answered: after Ctrl-C its reply would answer the next question.
        worker, self.worker = self.worker or self.start_worker(), None
        try:
            worker.stdin.write(json.dumps([first, second]).encode() + b"\n")
            if reply := worker.stdout.readline():
                self.worker = worker
                return json.loads(reply)
        except BrokenPipeError:
            pass
        worker.communicate()
        return None

    def start_worker(self) -> subprocess.Popen:
        command = [sys.executable, "-P", os.path.abspath(__file__), "--worker", str(self.limit)]
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy iterates over sets
            start_new_session=True,  # Ctrl-C is for the parent
        )  # fmt: skip
        if not worker.stdout.readline():
            raise RuntimeError(f"answers cannot be compared (see above): exit code {worker.wait()}")
        return worker


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…}; None without one, or if it never closes."""
    _, marker, rest = text.rpartition(r"\boxed{")
    depth = 1
    for mark in re.finditer(r"\\.|[{}]", rest if marker else "", re.DOTALL):  # \{ is no brace
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return rest[: mark.start()]
    return None


def strip_answer(answer: str | None) -> str:
    """Without dollars around it, a full stop after it, and spaces that mean nothing."""
    text = re.sub(r"(?<!\.)[.。]$", "", " ".join((answer or "").split()))
    dollars = re.fullmatch(r"(\$+)([^$]*)\1", text)
    return dollars[2].strip() if dollars else text


def is_readable(text: str) -> bool:
    r"""Short enough, and read whole when it stands in a \boxed{}."""
    return len(text) <= MAX_LENGTH and boxed(rf"\boxed{{{text}}}") == text


# ----------------------------------------------------------------------------------- the worker

PROSE = r"(?=.*([A-Za-z]{4}|[^\x00-\u03ff]))[^\W\d_]+([ '’-][^\W\d_]+)*"
"""Letters alone: four Latin ones in a row, or some that formulas do not use."""


def serve_comparisons(limit: float) -> None:
    """Pairs come as JSON lines on stdin until it is closed; replies go to what was stdout.
    Whatever the library prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = MEMORY if hard_limit == resource.RLIM_INFINITY else min(MEMORY, hard_limit)
    resource.setrlimit(resource.RLIMIT_AS, (memory, hard_limit))
    are_equal = load_comparison()
    print("ready", file=replies)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, limit)  # ends the process whoever holds the lock
        try:
            equal = are_equal(*json.loads(line))
        except MemoryError:  # the next worker begins with an empty memory
            sys.exit(f"answers: a worker has used its {MEMORY >> 20} MiB")
        except Exception:  # whatever the library raises on an answer it cannot read
            equal = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(equal), file=replies)


def load_comparison() -> Callable[[str, str], bool]:
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # it warns that its timeouts are off
    whole = [LatexExtractionConfig(boxed_match_priority=0)]  # never a number out of a sentence

    @lru_cache(1000)
    def read(text: str) -> list:
        if re.fullmatch(PROSE, text):  # otherwise a product of letters, and Paris = Pairs
            text = rf"\text{{{text}}}"
        return parse(rf"\boxed{{{text}}}", whole, parsing_timeout=0, raise_on_error=True)

    def are_equal(first: str, second: str) -> bool:
        ways = [(read(first), read(second)), (read(second), read(first))]
        return any(verify(*way, timeout_seconds=0, raise_on_error=True) for way in ways)

    return are_equal


if __name__ == "__main__":
    serve_comparisons(float(sys.argv[2]))
