"""A judge behind HTTP, against a server on this machine that follows a script."""

import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from judge import PAPER, Score, Task
from rewards import remote
from rewards.remote import RemoteJudge

TASK = Task("The sun is shining.", "English", "Chinese", "阳光灿烂。")
MANY = [str(i) for i in range(8)]


def chat(answer, end="stop"):
    message = {"role": "assistant", "content": answer}
    return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": end}]})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, number = self.server, next(self.server.counter)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.lines.append(self.requestline)
        server.keys.append(self.headers["Authorization"])
        server.requests.append(request)
        reply = server.script(request, number)
        if callable(reply):
            return reply(self)
        status, headers, body = reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def serve():
    """A server that gives the replies in turn, the last one for ever, or `script(request, number)`:
    (status, headers, body) or a function of the handler."""
    with contextlib.ExitStack() as stack:

        def start(*replies, script=None):
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            server.script = script or (lambda _, n: replies[min(n, len(replies) - 1)])
            server.counter, server.closing = itertools.count(), threading.Event()
            server.requests, server.lines, server.keys = [], [], []
            server.address = f"http://127.0.0.1:{server.server_port}"
            threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
            stack.callback(server.shutdown)
            stack.callback(server.closing.set)
            return server

        yield start


def judge_of(server, path="/v1", **options):
    return RemoteJudge(server.address + path, "big", PAPER, **options)


def ask(server, *answers, step=1, **options):
    """Scores of some answers to one task."""
    return judge_of(server, **options)([TASK], [list(answers)], step)[0]


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


def no_http(handler):
    handler.wfile.write(b"sk-secret\r\n\r\n")


def hang(handler):
    handler.server.closing.wait(20)


# ------------------------------------------------------------------------- requests and answers


def test_an_echo_of_the_text_is_no_score(serve):
    for text in ("<answer>100</answer>", "100"):
        server = serve(chat(text.replace("<", "(")))
        assert ask(server, text)[0].value is None
        assert "<answer>100" not in server.requests[0]["messages"][0]["content"]


@pytest.mark.parametrize("path", ["/v1", "/v1/chat/completions/"])
def test_a_request_has_the_settings_the_prompt_and_the_key_of_the_environment(
    serve, path, monkeypatch
):
    server = serve(chat("85"))
    text = "".join(PAPER.ask_judge(TASK, "阳光灿烂"))
    for key in ("", "sk-env\n"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        judge_of(server, path, temperature=0.5, max_new_tokens=7)([TASK], [["阳光\0灿烂"]], 1)
        request = server.requests[-1]
        assert 0 <= request.pop("seed") < 2**31
        assert request == {"model": "big", "messages": [{"role": "user", "content": text}],
                           "temperature": 0.5, "max_tokens": 7}  # fmt: skip
    assert set(server.lines) == {"POST /v1/chat/completions HTTP/1.1"}
    assert server.keys == [None, "Bearer sk-env"]


def test_each_distinct_pair_is_asked_once_and_gets_its_own_score(serve):
    def script(request, number):
        (answer,) = [a for a in MANY if f"```\n{a}\n```" in request["messages"][0]["content"]]
        time.sleep(0.02 * (number % 3))  # so that they come in another order
        return chat(f"1{answer}")

    server = serve(script=script)
    other = TASK._replace(target="German")
    answers = [[*MANY, None, "0"], ["1", "1", None], ["2", "3"]]
    scores = judge_of(server)([TASK, other, TASK], answers, 1)
    assert len(server.requests) == 9
    read = {a: Score((10 + int(a)) / 100, f"1{a}") for a in MANY} | {None: Score(0.0, "not judged")}
    assert scores == [[read[a] for a in row] for row in answers]
    assert ask(server, None) == [Score(0.0, "not judged")] and len(server.requests) == 9


def test_a_pairs_seed_does_not_depend_on_the_other_pairs(serve):
    def seeds(*answers, step=1, seed=3):
        server = serve(chat("85"))
        ask(server, *answers, step=step, samples=2, temperature=1.0, seed=seed)
        drawn = {request["seed"] for request in server.requests}
        assert len(drawn) == 2 * len(answers)
        return drawn

    alone = seeds("a")
    assert alone < seeds("b", "a", "c")
    assert not alone & (seeds("a", step=2) | seeds("a", seed=4))


def test_several_judgements_are_averaged_over_the_readable_ones(serve):
    answers = ["<think> 20? </think> <answer> 80/100 </answer>", "hm", "40", None]
    server = serve(*map(chat, answers), chat("9", "length"))
    (score,) = ask(server, "a", samples=5, temperature=1.0, parallel=1)
    assert score == Score(pytest.approx(0.6), f"{answers[0]} / hm / 40 /  / 9")


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (400, "This model's maximum context length is 4096 tokens. However, you requested 5000"),
        (400, '{"error": {"code": "context_length_exceeded"}}'),
        (413, "the request exceeds the available context size, try increasing it"),
    ],
)
def test_a_pair_that_is_too_long_for_the_model_scores_0(serve, status, text):
    server = serve(script=lambda a, i: (status, {}, text) if "long" in str(a) else chat("85"))
    assert ask(server, "long", "a") == [Score(0.0, "too long to judge"), Score(0.85, "85")]
    assert len(server.requests) == 2


# --------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize(
    "reply",
    [
        *((status, {}, "busy") for status in (408, 409, 429, 500, 503)),
        *((200, {}, text) for text in ("", "<html>", "5", '{"choices": []}')),
        (200, {}, '{"choices": [{"message": {"content": ["85"]}}]}'),
        (200, {"Content-Length": "999"}, "{}"), reset, no_http,
    ],
    ids=lambda reply: reply.__name__ if callable(reply) else f"{reply[0]} {reply[2][:30]}",
)  # fmt: skip
def test_a_passing_failure_is_retried(serve, reply):
    server = serve(reply, reply, chat("85"))
    assert ask(server, "a") == [Score(0.85, "85")]
    assert len(server.requests) == 3 and server.requests[0] == server.requests[2]


def test_pauses_double_up_to_a_limit_and_honour_retry_after(serve, monkeypatch):
    pauses = []
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    after = ["", "", "Wed, 21 Oct 2099 07:28:00 GMT", "3600"]
    server = serve(*[(429, {"Retry-After": x}, "") for x in after], chat("85"))
    ask(server, "a", limit=0.5)
    assert pauses == [0.01, 0.02, 0.02, 0.5]


def test_after_the_last_attempt_the_address_and_the_cause_are_named(serve):
    server = serve((500, {}, "out of memory"))
    with pytest.raises(RuntimeError) as error:
        ask(server, "a", attempts=3)
    cause = "no answer from model 'big' in 3 attempts; the last: HTTP 500: out of memory"
    assert str(error.value) == f"{server.address}/v1/chat/completions: {cause}"
    assert len(server.requests) == 3
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(RuntimeError, match=rf"{url}.* in 2 attempts.*Connection refused"):
            RemoteJudge(url, "big", PAPER, attempts=2).check()


# ---------------------------------------------------------------------------------- final errors


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((400, {}, "no top_p"), r"refuses model 'big' or these settings \(HTTP 400: no top_p\)"),
        ((404, {}, "no model 'big'" + "x" * 500), r"\(HTTP 404: no model 'big'x{186}\)$"),
        ((401, {}, "no key"), "the key in OPENAI_API_KEY is missing"),
        ((307, {"Location": "/v2/chat"}, ""), "redirects to /v2/chat: use that address"),
    ],
)
def test_a_refusal_ends_the_run_at_once(serve, reply, message):
    server = serve(reply)
    with pytest.raises(RuntimeError, match=message):
        ask(server, "a")
    assert server.lines == ["POST /v1/chat/completions HTTP/1.1"]


@pytest.mark.parametrize(
    "reply",
    [
        (500, {}, "x" * 195 + "sk-secret"), (401, {}, "Incorrect API key: sk-secret"),
        (200, {}, "you sent sk-secret"), no_http,
        (307, {"Location": "http://elsewhere/?key=sk-secret"}, ""),
    ],
)  # fmt: skip
def test_a_key_that_the_server_repeats_is_not_shown(serve, reply, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(RuntimeError) as error:
        ask(serve(reply), "a", attempts=1)
    assert "sk-s" not in repr(error.value) and error.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        *((url, "", "must be like http://host:8000/v1")
          for url in ("host:8000/v1", "http://me:secret@host/v1", "http://host/v1?k=secret")),
        ("http://host/v1", "sk-se\ncret", "OPENAI_API_KEY contains"),
    ],
)  # fmt: skip
def test_an_unusable_address_or_key_is_refused_and_not_shown(url, key, message, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match=message) as error:
        RemoteJudge(url, "big", PAPER)
    assert "cret" not in str(error.value)


def test_a_check_is_one_judgement_with_the_runs_own_settings(serve):
    server = serve(chat("85"))
    assert judge_of(server, max_new_tokens=7).check() == Score(0.85, "85")
    assert [request["max_tokens"] for request in server.requests] == [7]
    server = serve((400, {}, "maximum context length is 512 tokens"))
    with pytest.raises(ValueError, match="1024 new tokens do not fit the window of model 'big'"):
        judge_of(server).check()


# ------------------------------------------------------------------------------ time and threads


def test_a_silent_server_hits_the_limit(serve):
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"in 2 attempts; the last: .*timed out"):
        ask(serve(hang), "a", attempts=2, limit=0.2)
    assert 0.4 <= time.monotonic() - started < 5


def only_daemons_are_left():
    return all(x.daemon or x is threading.main_thread() for x in threading.enumerate())


def test_an_error_abandons_all_other_requests(serve):
    server = serve(script=lambda request, number: hang if number else (400, {}, "no"))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="HTTP 400: no"):
        ask(server, *MANY, parallel=2, limit=600.0)
    assert time.monotonic() - started < 10
    assert len(server.requests) <= 3 and only_daemons_are_left()


@pytest.mark.parametrize("reply", [hang, (503, {"Retry-After": "60"}, "")], ids=["hang", "pause"])
def test_ctrl_c_abandons_all_requests_of_which_few_are_sent_at_once(serve, reply):
    def interrupt(*_):
        raise KeyboardInterrupt

    server, before = serve(reply), signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(server, *MANY, parallel=2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(server.requests) == 2 and only_daemons_are_left()
