"""A judge behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, OpenAI, …

    judge = RemoteJudge("http://host:8000/v1", "Qwen/Qwen2.5-32B-Instruct", PAPER)
    judge.check()                                  # a wrong address, key or model fails now
    reward = Reward(codec, PAPER, {"external": (1.0, judge)})

It asks, reads and averages as `judge.Judge` with written scores does. Our own sampler guarantees
three things that an endpoint does not: text cannot become a control token, the same seed gives the
same output, and the weights are known.
"""

import http.client
import json
import os
import re
import time
import urllib.request
from multiprocessing.pool import ThreadPool

from judge import (
    TOO_LONG,
    Judge,
    Judgement,
    Prompts,
    Score,
    Task,
    average_judgements,
    is_echo,
    prompt_key,
)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before another attempt; doubled in between
CONTEXT = re.compile(r"context.?(length|size|window)", re.I)  # in all servers' words for "too long"
EXAMPLE = Task("Good morning.", "English", "German"), "Guten Morgen."


class RetryableError(Exception):
    def __init__(self, cause: str, pause: float = 0.0):
        """`pause`: the least number of seconds before another attempt."""
        super().__init__(cause)
        self.pause = pause


class KeepStatus(urllib.request.HTTPErrorProcessor):
    """Returns every response as it is. A redirect that is followed would turn the POST into a GET,
    and take the key elsewhere."""

    def http_response(self, request, response):
        return response

    https_response = http_response


class RemoteJudge:
    """A scorer like `judge.Judge`, with `parallel` requests at a time. The key is read from
    OPENAI_API_KEY; without one none is sent."""

    def __init__(
        self, url: str, model: str, prompts: Prompts, samples: int = 1, temperature: float = 0.0,
        max_new_tokens: int = 1024, seed: int = 0, parallel: int = 16, attempts: int = 5,
        limit: float = 120.0,
    ):  # fmt: skip
        """`limit`: seconds that the server may be silent in each of a request's `attempts`."""
        if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#\s]*)?", url):
            raise ValueError(
                "the judge's address must be like http://host:8000/v1, without ?, # or a password; "
                "a key goes into OPENAI_API_KEY"
            )
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch("[!-~]*", self.key):  # http.client's error would show it
            raise ValueError("OPENAI_API_KEY contains a space, a line break or no ASCII")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.prompts, self.samples, self.seed = model, prompts, samples, seed
        self.options = {"temperature": temperature, "max_tokens": max_new_tokens}
        self.parallel, self.attempts, self.limit = parallel, attempts, limit
        self.opener = urllib.request.build_opener(KeepStatus)

    def check(self) -> Score:
        """Judge one short text with the run's own settings: a server may refuse those, too."""
        [score] = self.judge([EXAMPLE], 0)
        if score == TOO_LONG:
            raise ValueError(
                f"{self.url}: {self.options['max_tokens']} new tokens do not fit the window of "
                f"model {self.model!r}: let the judge write fewer"
            )
        return score

    __call__ = Judge.__call__  # answers (P, N) -> scores (P, N); each distinct pair once

    def judge(self, pairs: list[tuple[Task, str]], step: int) -> list[Score]:
        jobs = [(pair, number, step) for pair in pairs for number in range(self.samples)]
        # Daemons: neither an error nor Ctrl-C waits for requests that are under way.
        with ThreadPool(self.parallel) as pool:
            judgements = dict(pool.imap_unordered(lambda job: (job, self.ask(*job)), jobs))
        groups = [[judgements[pair, i, step] for i in range(self.samples)] for pair in pairs]
        return [TOO_LONG if None in group else average_judgements(group) for group in groups]

    def ask(self, pair: tuple[Task, str], number: int, step: int) -> Judgement | None:
        """One judgement; None where the pair is too long for the model."""
        task, answer = pair
        question = self.prompts.ask_judge(task, answer)
        message = {"role": "user", "content": "".join(question).replace("\0", "")}
        # 31 bits, whatever else is judged.
        seed = prompt_key(step, json.dumps([self.seed, number, *task[:3], answer]).encode()) >> 33
        request = {"model": self.model, "messages": [message], "seed": seed} | self.options
        body, pause = json.dumps(request).encode(), FIRST_PAUSE
        for attempt in range(1, self.attempts + 1):
            try:
                text = self.post(body)
                return None if text is None else self.read(text, question)
            except RetryableError as error:
                cause = error
            if attempt < self.attempts:
                time.sleep(max(cause.pause, pause))
                pause = min(2 * pause, LONGEST_PAUSE)
        raise RuntimeError(
            f"{self.url}: no answer from model {self.model!r} in {self.attempts} attempts; the "
            f"last: {cause}"
        )

    def post(self, body: bytes) -> str | None:
        """The server's answer; None where the request is too long for the model."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, body, headers)
        try:
            with self.opener.open(request, timeout=self.limit) as response:
                text = response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise RetryableError(self.redact(f"{type(error).__name__}: {error}")) from None
        status, answer = response.status, f"HTTP {response.status}: {self.redact(text)}"
        if 200 <= status < 300:
            return text
        if status in (408, 409, 429) or status >= 500:
            pause = response.headers.get("Retry-After", "")
            pause = min(float(pause), self.limit) if pause.isdecimal() else 0.0
            raise RetryableError(answer, pause)
        if status in (400, 413) and CONTEXT.search(text):
            return None
        if status in (401, 403):
            hint = f"the key in OPENAI_API_KEY is {'refused' if self.key else 'missing'}"
        elif 300 <= status < 400:
            location = self.redact(response.headers.get("Location", "nowhere"))
            hint = f"it redirects to {location}: use that address"
        else:
            hint = f"it refuses model {self.model!r} or these settings"
        raise RuntimeError(f"{self.url}: {hint} ({answer})")

    def read(self, text: str, question: list[str]) -> Judgement:
        try:
            choice = json.loads(text)["choices"][0]
            answer, end = choice["message"]["content"], choice.get("finish_reason")
            # null: it thought, and came to no answer. Half of a surrogate pair is no text.
            answer = ("" if answer is None else answer).encode(errors="replace").decode()
        except (ValueError, LookupError, TypeError, AttributeError):
            raise RetryableError(f"no chat completion: {self.redact(text)}") from None
        return Judgement(answer, end == "stop" and not is_echo(answer, question))

    def redact(self, text: str) -> str:
        """The first 200 characters, without the key, which a server may repeat."""
        return (text.replace(self.key, "(the key)") if self.key else text)[:200]
