r"""Whether two final answers to a maths question are the same: 1/2, \frac12, 0.5.

    with Answers(limit=3.0) as equal:
        equal.same("x=3", "3")                     # True
        equal.clusters(["1/2", "0.5", None, "3"])  # [0, 0, None, 1]
    boxed(r"so it is \boxed{\frac{1}{2}}.")        # \frac{1}{2}

math-verify knows, on top of sympy. An answer like 9^{9^{9}} keeps it busy for good, with the
interpreter's lock held, and its own timeouts need the main thread. So it runs in a worker (this
file with --worker) that may take so much time and memory and is killed when it takes more.

What it calls equal is not always what one expects: units are dropped (5 cm = 5 m), the order of a
list without brackets too, decimals are rounded to 6 places (1/3 = 0.333333), 2025-01-02 is 2022.
Nor is it symmetric or transitive. Here: equal if it says so in either direction; transitivity is
assumed, though 50% equals both 50 and 0.5.
"""

import importlib.util
import json
import logging
import math
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache

START_LIMIT = 120.0
"""Seconds in which a worker has imported sympy: half a one, or many from a slow disk."""
MEMORY = 4 << 30
"""Bytes of address space that a worker may have."""
LONGEST = 1000
"""Characters of an answer that is read; two must fit in a pipe's 64 KiB, or writing could block."""
KEPT = 100_000
"""Results that are remembered."""


class Died(Exception):
    """The worker ended without a word."""


class Answers:
    """One worker, started when first needed. Any thread may call; others wait.

    `expired` counts workers killed at the limit, `died` those that ended otherwise (out of memory,
    killed by others), `failed` comparisons in which the library raised: not equal.
    """

    def __init__(self, limit: float = 3.0):
        """`limit`: seconds a comparison. What takes about as long may end differently next time."""
        if not 0 < limit < math.inf:
            raise ValueError(f"limit={limit} must be a positive number of seconds")
        if importlib.util.find_spec("math_verify") is None:  # imported by the worker alone
            raise ValueError("answers are compared by math-verify: pip install math-verify==0.9.0")
        self.limit = limit
        self.expired = self.died = self.failed = 0
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()
        self.results: dict[tuple[str, str], bool] = {}
        self.hopeless: set[str | tuple[str, str]] = set()
        self.suspects: set[str] = set()

    def same(self, first: str | None, second: str | None) -> bool | None:
        """None: not known, for it took too long or killed two workers; it is not tried again.

        No answer (None, or nothing but spaces) is equal to nothing, not even to another such.
        """
        first, second = plain(first), plain(second)
        if not first or not second or first == second:
            return bool(first) and first == second
        if not (readable(first) and readable(second)):
            return False
        with self.lock:
            return self.verdict(*sorted((first, second)))

    def clusters(self, answers: Sequence[str | None]) -> list[int | None]:
        """The number of each one's cluster, from 0 in the order in which they begin.

        An answer is compared with the first of each cluster so far until one is equal. A sample
        without an answer takes no part: None.
        """
        numbers: dict[str, int] = {}
        firsts: list[str] = []
        for text in filter(None, map(plain, answers)):
            if text not in numbers:
                like = (number for number, first in enumerate(firsts) if self.same(first, text))
                numbers[text] = next(like, len(firsts))
                if numbers[text] == len(firsts):
                    firsts.append(text)
        return [numbers.get(plain(answer)) for answer in answers]

    def close(self) -> None:
        """End the worker. A later call would start another."""
        with self.lock:
            self.stop()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def verdict(self, *pair: str) -> bool | None:
        if pair in self.results:
            return self.results[pair]
        # A bad answer would cost the limit with each of the others. So one of a pair that came to
        # nothing is tried with a harmless one before it is let near a third.
        names = {*pair, pair}
        for text in sorted(self.suspects.intersection(pair)):
            if not names & self.hopeless:
                self.suspects.remove(text)
                if self.compare(text, "0") is None:
                    self.hopeless.add(text)
        if names & self.hopeless:
            return None
        equal = self.compare(*pair)
        if equal is None:
            self.hopeless.add(pair)
            self.suspects.update(pair)
            return None
        self.results[pair] = equal
        if len(self.results) > KEPT:
            del self.results[next(iter(self.results))]
        return equal

    def compare(self, *pair: str) -> bool | None:
        for _ in range(2):  # a worker may have died for reasons of its own
            try:
                if self.process is None:
                    self.start()
                said = self.ask(pair)
                self.failed += "error" in said
                return said.get("equal", False)
            except TimeoutError:
                self.expired += 1
                self.stop()
                return None
            except Died as death:
                self.died += 1
                self.stop()
                print(f"answers: {death}", file=sys.stderr)
            except BaseException:  # Ctrl-C: what it is about to say would answer the next call
                self.stop()
                raise
        return None

    def ask(self, pair: tuple[str, ...]) -> dict:
        try:
            self.process.stdin.write(json.dumps(pair).encode() + b"\n")
        except BrokenPipeError:
            raise Died(self.death()) from None
        return self.hear(self.limit)

    def hear(self, seconds: float) -> dict:
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(1000 * seconds):
            raise TimeoutError(f"worker {self.process.pid}: nothing in {seconds:g} s")
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise Died(self.death())
        return json.loads(line)

    def death(self) -> str:
        return f"worker {self.process.pid} died: exit code {self.process.wait()}"

    def start(self) -> None:
        """What the worker prints, which should be nothing, goes to our stderr."""
        command = [sys.executable, "-P", os.path.abspath(__file__), "--worker", str(self.limit)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy goes through sets
            start_new_session=True,  # Ctrl-C is for us
        )  # fmt: skip
        try:
            self.hear(START_LIMIT)
        except (Died, TimeoutError) as error:
            raise RuntimeError(f"answers cannot be compared (see above): {error}") from None

    def stop(self) -> None:
        """It keeps nothing, so it is killed."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None


def boxed(text: str) -> str | None:
    r"""What is in the last \boxed{…}; None if there is none or it never closes (was cut off)."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1
    for mark in re.finditer(r"\\.|[{}]", rest if found else "", re.DOTALL):  # \{, \} are no braces
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return rest[: mark.start()]
    return None


def plain(answer: str | None) -> str:
    """Without the dollars around it, a full stop after it and spaces that mean nothing."""
    text = re.sub(r"(?<!\.)[.。]$", "", " ".join((answer or "").split()))
    dollars = re.fullmatch(r"(\$+)([^$]*)\1", text)
    return dollars[2].strip() if dollars else text


def readable(text: str) -> bool:
    r"""Short enough, and all of it is read when it stands in a \boxed{}."""
    return len(text) <= LONGEST and boxed(rf"\boxed{{{text}}}") == text


# ----------------------------------------------------------------------------------- the worker

WORDS = r"(?=.*([A-Za-z]{4}|[^\x00-\u03ff]))[^\W\d_]+([ '’-][^\W\d_]+)*"
"""Letters alone: four Latin ones in a row, or such as formulas do not have."""


def work(limit: float) -> None:
    """Pairs come as JSON lines on stdin, until it is closed; answers go to what was stdout."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    # For when nobody is left to kill it, the kernel does. A thread that looks for the parent would
    # wait for the interpreter's lock, and a power of large numbers does not let go of it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    equal = comparison()
    print("{}", file=answers)  # ready
    for line in requests:
        signal.setitimer(signal.ITIMER_REAL, limit + 1)
        try:
            said = {"equal": equal(*json.loads(line))}
        except MemoryError:  # another begins with an empty memory
            sys.exit(f"answers: a worker has used its {memory >> 20} MiB")
        except Exception as error:
            said = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(said), file=answers)


def comparison() -> Callable[[str, str], bool]:
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # it warns that its timeouts are off
    whole = [LatexExtractionConfig(boxed_match_priority=0)]  # never a number out of a sentence

    @lru_cache(1000)
    def read(text: str) -> list:
        if re.fullmatch(WORDS, text):  # else a product of letters, and Paris = Pairs
            text = rf"\text{{{text}}}"
        return parse(rf"\boxed{{{text}}}", whole, parsing_timeout=0, raise_on_error=True)

    def equal(first: str, second: str) -> bool:
        ways = [(read(first), read(second)), (read(second), read(first))]
        return any(verify(*way, timeout_seconds=0, raise_on_error=True) for way in ways)

    return equal


if __name__ == "__main__":
    if sys.argv[1:2] != ["--worker"]:
        sys.exit("answers.py is to be imported; with --worker SECONDS it is its own worker")
    work(float(sys.argv[2]))
