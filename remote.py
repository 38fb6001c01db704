"""A judge behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, OpenAI, …

    judge = RemoteJudge("http://host:8000/v1", "Qwen/Qwen2.5-32B-Instruct", PAPER)
    judge.check()                                  # a wrong address, key or model is said now
    reward = Reward(texts, PAPER, {"external": (1.0, judge)})

It asks, reads and averages as `judge.Judge` with reading="written" does. Three things that our own
sampler guarantees, an endpoint does not:

    forgery      a prompt is one string, tokenised whole: whether a "<|im_end|>" in a text stays
                 letters is the server's business, and letters may merge across a fence's edge
    repetition   a seed is a wish: most servers' words also depend on what else they are doing
    which model  only its name is known

A request that fails by chance is sent again; what would fail again ends the run at once.
"""

import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.message import Message
from random import Random
from typing import NamedTuple

from judge import Judge, Prompts, Score, Task, check_reading, digest, is_echo, parse_score

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before another try, at most; doubled in between
TOO_LONG = Score(0.0, "too long to judge")  # as Judge says it
CONTEXT = re.compile(r"context.?(length|size|window)", re.I)  # so all of the above call it
EXAMPLE = ("Good morning.", "English", "German", "Guten Morgen.")


class Said(NamedTuple):
    words: str
    whole: bool
    """Not cut off, and not ended by anything but the model; nor an echo of what was asked."""


class Again(Exception):
    """Worth another try, after `pause` seconds at least."""

    def __init__(self, cause: str, pause: float = 0.0):
        super().__init__(cause)
        self.pause = pause


class RemoteJudge:
    """A scorer, as `judge.Judge` is one; `parallel` requests at a time."""

    def __init__(
        self,
        url: str,
        model: str,
        prompts: Prompts,
        samples: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 1024,
        seed: int = 0,
        parallel: int = 16,
        attempts: int = 5,
        limit: float = 120.0,
        key: str | None = None,
    ):
        """`limit`: seconds for each of a request's `attempts`, to the answer's last byte.

        The key is, unless given, what OPENAI_API_KEY holds; without one none is sent.
        """
        check_reading("written", samples, temperature)
        if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#\s]*)?", url):
            raise ValueError(
                "the judge's address must be like http://host:8000/v1, without ?, # or a password; "
                "a key goes into OPENAI_API_KEY"
            )
        if min(parallel, attempts) < 1 or limit <= 0:
            raise ValueError(
                f"parallel={parallel}, attempts={attempts} and limit={limit} must be positive"
            )
        self.key = (os.environ.get("OPENAI_API_KEY", "") if key is None else key).strip()
        if not re.fullmatch("[!-~]*", self.key):
            raise ValueError("the key in OPENAI_API_KEY holds a space, a line's end or no ASCII")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.prompts, self.samples, self.seed = model, prompts, samples, seed
        self.rules = {"temperature": temperature, "max_tokens": max_new_tokens, "n": 1}
        self.parallel, self.attempts, self.limit = parallel, attempts, limit
        self.tls = ssl.create_default_context()

    def check(self) -> Score:
        """Judge one short text, with the run's own settings: a server may refuse those, too."""
        score = self.judge({EXAMPLE}, 0)[EXAMPLE]
        if score == TOO_LONG:
            raise ValueError(
                f"{self.url}: {self.rules['max_tokens']} new tokens do not fit the window of model "
                f"{self.model!r}: let the judge write fewer"
            )
        return score

    __call__ = Judge.__call__  # answers (P, N) -> scores (P, N); each distinct pair once

    def judge(self, distinct: set[tuple], step: int) -> dict[tuple, Score]:
        lines, pool = Lines(), ThreadPoolExecutor(self.parallel)
        try:
            asked = {
                pair: [pool.submit(self.ask, pair, step, i, lines) for i in range(self.samples)]
                for pair in sorted(distinct)
            }
            for future in as_completed([future for row in asked.values() for future in row]):
                future.result()  # the first error is raised while the others are still at work
        finally:
            lines.end()
            pool.shutdown(wait=False, cancel_futures=True)
        return {pair: mean([future.result() for future in row]) for pair, row in asked.items()}

    def ask(self, pair: tuple, step: int, number: int, lines: "Lines") -> Said | None:
        """One judgement; None where the pair is too long for the model."""
        parts = self.prompts.ask_judge(Task(*pair[:3]), pair[3])
        text = "".join(parts).replace("\0", "")
        # 31 bits, the same whatever else is asked.
        seed = digest(step, json.dumps([self.seed, number, *pair]).encode()) >> 33
        asked = {"model": self.model, "messages": [{"role": "user", "content": text}]}
        body = json.dumps(asked | self.rules | {"seed": seed}).encode()
        longest = FIRST_PAUSE
        for tried in range(1, self.attempts + 1):
            try:
                said = self.post(body, lines)
                return said and said._replace(whole=said.whole and not is_echo(said.words, parts))
            except Again as error:
                cause, pause = str(error), error.pause
            pause = max(pause, Random(f"{seed} {tried}").uniform(0, longest))
            longest = min(2 * longest, LONGEST_PAUSE)
            if tried == self.attempts or lines.over.wait(pause):
                break
        raise RuntimeError(
            f"{self.url}: no answer from model {self.model!r} in {tried} tries; the last: {cause}"
        )

    def post(self, body: bytes, lines: "Lines") -> Said | None:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, body, headers)
        line = Line(context=self.tls)
        opener = urllib.request.build_opener(line)
        try:
            with lines.hold(line, self.limit), opener.open(request, timeout=self.limit) as response:
                status, headers, content = response.status, response.headers, response.read()
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            line.late |= isinstance(cause, TimeoutError)
            if not line.late:
                raise Again(self.shown(f"{type(cause).__name__}: {cause}")) from None
        if line.late:
            raise Again(f"no whole answer within {self.limit:g} s")
        text = content.decode(errors="replace")
        return self.read(text) if 200 <= status < 300 else self.refused(status, headers, text)

    def read(self, text: str) -> Said:
        try:
            choice = json.loads(text)["choices"][0]
            words, end = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, RecursionError):
            raise Again(f"no chat completion: {self.shown(text)}") from None
        if not isinstance(words, str | None):  # null: a thinker who came to no answer
            raise Again(f"no chat completion: {self.shown(text)}")
        words = (words or "").encode(errors="replace").decode()  # half a surrogate pair is no text
        return Said(words, end == "stop")

    def refused(self, status: int, headers: Message, text: str) -> None:
        """Raises, except where it is the text's length that is refused."""
        said = f"HTTP {status}: {self.shown(text)}"
        if status in (408, 409, 429) or status >= 500:
            wait = re.fullmatch(r"[0-9]+(\.[0-9]+)?", headers.get("Retry-After", ""))
            raise Again(said, min(float(wait[0]), self.limit) if wait else 0.0)
        if status in (400, 413) and CONTEXT.search(text):
            return None
        if status in (401, 403):
            state = "refused" if self.key else "missing"
            raise RuntimeError(f"{self.url}: the key in OPENAI_API_KEY is {state} ({said})")
        if 300 <= status < 400:
            place = self.shown(headers.get("Location", "nowhere"))
            raise RuntimeError(f"{self.url} redirects to {place} (HTTP {status}): name that itself")
        raise RuntimeError(f"{self.url}: model {self.model!r} cannot be asked ({said})")

    def shown(self, text: str) -> str:
        """The first 200 characters; a server may repeat the key."""
        return (text.replace(self.key, "(the key)") if self.key else text)[:200]


def mean(answers: list[Said | None]) -> Score:
    """Over those that can be read."""
    if None in answers:
        return TOO_LONG
    read = [parse_score(said.words) if said.whole else None for said in answers]
    valid = [score / 100 for score in read if score is not None]
    words = " / ".join(said.words for said in answers)
    return Score(sum(valid) / len(valid) if valid else None, words)


# --------------------------------------------------------------------------- the connections


class Line(
    urllib.request.HTTPHandler, urllib.request.HTTPSHandler, urllib.request.HTTPErrorProcessor
):
    """One connection, which another thread may end. Answers come as they are: no redirect is
    followed (it would make a GET of a POST, and take the key elsewhere)."""

    late = False
    sock = None

    def do_open(self, kind, request, **options):
        line = self

        class Connection(kind):
            def connect(self):
                super().connect()
                line.sock = self.sock
                if line.late:
                    raise TimeoutError

        return super().do_open(Connection, request, **options)

    def http_response(self, request, response):
        return response

    https_response = http_response

    def hang_up(self) -> None:
        """A read that waits in another thread comes back; closing would not wake it."""
        self.late = True
        if self.sock:
            with contextlib.suppress(OSError):  # it has ended by itself
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


class Lines:
    """The connections of one call. Each has its time, for a socket's own limit is one for every
    byte; and all end when nobody waits any more, or the interpreter would wait for their threads
    (for one that is still being made it does, as long as a socket may take).
    """

    def __init__(self):
        self.over, self.held = threading.Event(), set()

    @contextlib.contextmanager
    def hold(self, line: Line, limit: float) -> Iterator[None]:
        timer = threading.Timer(limit, line.hang_up)
        timer.daemon = True
        self.held.add(line)
        try:
            timer.start()
            if self.over.is_set():
                line.hang_up()
            yield
        finally:
            timer.cancel()
            self.held.discard(line)

    def end(self) -> None:
        self.over.set()
        for line in tuple(self.held):
            line.hang_up()
