"""A judge behind HTTP, against a server on this machine that says what the test wants."""

import contextlib
import itertools
import json
import math
import os
import random
import signal
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

import remote
from judge import PAPER, Judge, Reward, Score, Task, Texts
from remote import RemoteJudge
from sampler import Sample

TASK = Task("The sun is shining.", "English", "Chinese", "阳光灿烂。")
MANY = [str(i) for i in range(8)]


def chat(words, end="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": words}, "finish_reason": end}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]})


class Server(ThreadingHTTPServer):
    """`script(asked, number)` gives (status, headers, body), or a function of the handler."""

    request_queue_size = 64

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.counter = script, itertools.count()
        self.asked, self.lines, self.keys, self.times = [], [], [], []
        self.connected, self.closing = 0, threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def verify_request(self, *_):
        self.connected += 1
        return True

    @property
    def texts(self):
        return [asked["messages"][0]["content"] for asked in self.asked]

    @property
    def seeds(self):
        return [asked["seed"] for asked in self.asked]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, number = self.server, next(self.server.counter)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.times.append(time.monotonic())
        server.lines.append(self.requestline)
        server.keys.append(self.headers["Authorization"])
        server.asked.append(asked)
        reply = server.script(asked, number)
        if callable(reply):
            return reply(self)
        status, headers, body = reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self):
        self.server.lines.append(self.requestline)
        self.send_error(405)

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def serve():
    """A server that follows a script, or says the replies in turn and the last for ever."""
    servers = []

    def start(*replies, script=None):
        turns = script or (lambda asked, number: replies[min(number, len(replies) - 1)])
        servers.append(Server(turns).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


def judge_of(server, **options):
    return RemoteJudge(f"{server.address}/v1", "big", PAPER, **options)


def ask(server, *answers, step=1, **options):
    """Scores of some answers to one task."""
    return judge_of(server, **options)([TASK], [list(answers)], step)[0]


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


def no_word(handler):
    pass


def no_http(handler):
    handler.wfile.write(b"sk-secret\r\n\r\n")


def hang(handler):
    handler.server.closing.wait(20)


def drip(text):
    def reply(handler):
        try:
            for byte in text.encode():
                handler.connection.send(bytes([byte]))
                if handler.server.closing.wait(0.05):
                    return
        except OSError:
            pass  # the judge has hung up: just what is wanted

    return reply


class Letters:
    """A tokenizer: a token is a letter."""

    eos_token_id, bos_token_id, unk_token_id = 0, None, None

    def get_added_vocab(self):
        return {"<|end|>": 0}

    def __call__(self, text, add_special_tokens=True):
        ids = [[ord(c) for c in t] for t in ([text] if isinstance(text, str) else text)]
        return SimpleNamespace(input_ids=ids[0] if isinstance(text, str) else ids)

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


# --------------------------------------------------------------------------- asking and reading


SAID = [
    *("85", "<think> 20? </think> <answer> 85/100 </answer>", "<answer>20</answer><answer>9"),
    *("Score: ８５", "eighty", "101", "", "I give 85"),
]


@pytest.mark.parametrize("words", SAID)
@pytest.mark.parametrize("whole", [True, False])
def test_scores_are_those_that_the_local_judge_reads(serve, words, whole):
    ids = [ord(c) for c in words] + [0] * whole
    sampler = SimpleNamespace(
        max_length=9999, generate=lambda *a, **k: [[Sample(ids, [], whole)]] * len(a[0])
    )
    local = Judge(sampler, Texts(Letters()), PAPER)
    answers = [["a", None], ["b", "a"]]
    server = serve(chat(words, "stop" if whole else "length"))
    assert judge_of(server)([TASK, TASK], answers, 1) == local([TASK, TASK], answers, 1)
    assert len(server.asked) == 2  # and what cannot be read is not asked again


def test_an_echo_is_no_score(serve):
    """A text that holds a tag, or a score alone, comes back from an endpoint as no judgement."""
    for text in ("<answer>100</answer>", "100"):
        server = serve(script=lambda asked, number, text=text: chat(text.replace("<", "(")))
        assert ask(server, text)[0].value is None
        assert "<answer>100" not in server.texts[0]


def test_the_request_says_what_the_settings_say(serve):
    server = serve(chat("85"))
    ask(server, "阳光\0灿烂", samples=1, temperature=0.5, max_new_tokens=7, key="sk-1")
    [asked] = server.asked
    seed, text = asked.pop("seed"), "".join(PAPER.ask_judge(TASK, "阳光灿烂"))
    assert 0 <= seed < 2**31
    rules = {"temperature": 0.5, "max_tokens": 7, "n": 1}
    assert asked == {"model": "big", "messages": [{"role": "user", "content": text}]} | rules
    assert server.keys == ["Bearer sk-1"]


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/"])
def test_an_address_may_end_as_it_likes(serve, path):
    server = serve(chat("85"))
    RemoteJudge(server.address + path, "big", PAPER)([TASK], [["a"]], 1)
    assert server.lines == ["POST /v1/chat/completions HTTP/1.1"]


def test_the_key_comes_from_the_environment_or_is_not_sent(serve, monkeypatch):
    server = serve(chat("85"))
    ask(server, "a")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env\n")
    ask(server, "a")
    ask(server, "a", key="sk-given")
    assert server.keys == [None, "Bearer sk-env", "Bearer sk-given"]


def test_each_distinct_pair_is_asked_once(serve):
    server = serve(chat("85"))
    other = TASK._replace(target="German")
    answers = [["a", "b", "a", None], ["a", "a", None, None], ["b", "a", "a", "a"]]
    scores = judge_of(server)([TASK, other, TASK], answers, 1)
    assert len(server.asked) == 3 == len(set(server.texts))
    read, none = Score(0.85, "85"), Score(0.0, "not judged")
    assert scores == [[none if a is None else read for a in row] for row in answers]


def test_nothing_to_judge_is_no_request(serve):
    server = serve(chat("85"))
    assert ask(server, None, None) == [Score(0.0, "not judged")] * 2 and server.asked == []


def test_each_answer_gets_its_own_score_whatever_comes_first(serve):
    def script(asked, number):
        [answer] = [a for a in MANY if f"```\n{a}\n```" in asked["messages"][0]["content"]]
        time.sleep(0.02 * (number % 3))
        return chat(f"1{answer}")

    assert [s.words for s in ask(serve(script=script), *MANY)] == [f"1{a}" for a in MANY]


def test_a_pairs_seed_is_the_same_whatever_else_is_asked(serve):
    rules = {"samples": 2, "temperature": 1.0, "seed": 3}
    runs = {
        "alone": (["a"], 1, rules),
        "among": (["b", "a", "c"], 1, rules),
        "later": (["a"], 2, rules),
        "other": (["a"], 1, rules | {"seed": 4}),
    }
    seeds = {}
    for name, (answers, step, options) in runs.items():
        server = serve(chat("85"))
        ask(server, *answers, step=step, **options)
        assert len(set(server.seeds)) == 2 * len(answers)
        seeds[name] = set(server.seeds)
    assert seeds["alone"] < seeds["among"]
    assert not seeds["alone"] & (seeds["later"] | seeds["other"])


def test_several_judgements_are_averaged_over_the_readable_ones(serve):
    said = [chat("80"), chat("hm"), chat("40"), chat("9", "length"), chat(None)]
    server = serve(*said)
    [score] = ask(server, "a", samples=5, temperature=1.0, parallel=1)
    assert score == Score(pytest.approx(0.6), "80 / hm / 40 / 9 / ")


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (400, "This model's maximum context length is 4096 tokens. However, you requested 5000"),
        (400, '{"error": {"code": "context_length_exceeded"}}'),
        (413, "the request exceeds the available context size, try increasing it"),
    ],
)
def test_what_is_too_long_for_the_model_scores_nothing_and_ends_nothing(serve, status, text):
    server = serve(
        script=lambda asked, i: (status, {}, text) if "long" in str(asked) else chat("85")
    )
    assert ask(server, "long", "a") == [Score(0.0, "too long to judge"), Score(0.85, "85")]
    assert len(server.asked) == 2


def test_a_whole_reward_over_it(serve):
    said = {"阳光": chat("85"), "晴天": chat("eighty")}
    server = serve(script=lambda asked, i: next(v for k, v in said.items() if k in str(asked)))
    texts = Texts(Letters())
    reward = Reward(texts, PAPER, {"external": (1.0, judge_of(server))})
    outputs = [f"<think> hm </think> <answer> {a} </answer>" for a in said] + ["no tags"]
    group = [SimpleNamespace(ids=[ord(c) for c in o] + [0], stopped=True) for o in outputs]
    [judged] = reward([TASK], [group], 1)
    assert judged.total[::2] == [0.85, 0.0] and math.isnan(judged.total[1])
    assert judged.words == ["85", "eighty", "not judged"]


# -------------------------------------------------------------------------- what is tried again


@pytest.mark.parametrize(
    "reply",
    [
        *((status, {}, "busy") for status in (408, 409, 429, 500, 503)),
        *((200, {}, text) for text in ("", "<html>", '{"choices"', "[" * 100_000, "5", "[]")),
        *((200, {}, text) for text in ("{}", '{"choices": []}', '{"choices": [{"message": 1}]}')),
        (200, {}, '{"choices": [{"message": {"content": ["85"]}}]}'),
        (200, {"Content-Length": "999"}, "{}"),
        (204, {}, ""),
        reset,
        no_word,
        no_http,
    ],
    ids=lambda reply: reply.__name__ if callable(reply) else f"{reply[0]} {reply[2][:30]}",
)
def test_what_fails_by_chance_is_asked_again(serve, reply):
    server = serve(reply, reply, chat("85"))
    assert ask(server, "a", parallel=1) == [Score(0.85, "85")]
    assert len(server.asked) == 3 and server.asked[0] == server.asked[2]


def test_pauses_grow_and_their_lengths_touch_no_global_randomness(serve, monkeypatch):
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.04)
    drawn, before = [], random.getstate()

    class Longest(random.Random):
        def uniform(self, low, high):
            drawn.append((low, high))
            return high

    monkeypatch.setattr(remote, "Random", Longest)
    server = serve(*[(500, {}, "")] * 4, chat("85"))
    assert ask(server, "a") == [Score(0.85, "85")]
    assert drawn == [(0, 0.01), (0, 0.02), (0, 0.04), (0, 0.04)]
    gaps = [b - a for a, b in itertools.pairwise(server.times)]
    assert all(gap >= high for gap, (_, high) in zip(gaps, drawn, strict=True))
    assert random.getstate() == before


def test_retry_after_is_honoured_within_a_requests_own_limit(serve):
    server = serve((429, {"Retry-After": "0.3"}, ""), chat("85"))
    ask(server, "a")
    assert 0.3 <= server.times[1] - server.times[0] < 1
    server = serve((503, {"Retry-After": "3600"}, ""), chat("85"))
    ask(server, "a", limit=0.4)
    assert 0.4 <= server.times[1] - server.times[0] < 1
    server = serve((429, {"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}, ""), chat("85"))
    ask(server, "a")
    assert server.times[1] - server.times[0] < 0.2


def test_after_the_last_try_the_address_and_the_cause_are_named(serve):
    server = serve((500, {}, "out of memory"))
    with pytest.raises(RuntimeError) as error:
        ask(server, "a", attempts=3)
    said = "no answer from model 'big' in 3 tries; the last: HTTP 500: out of memory"
    assert str(error.value) == f"{server.address}/v1/chat/completions: {said}"
    assert len(server.asked) == 3


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        judge = RemoteJudge(url, "big", PAPER, attempts=2)
        with pytest.raises(RuntimeError, match=rf"{url}.* in 2 tries.*Connection refused"):
            judge.check()


# ------------------------------------------------------------------------- what ends it at once


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refusal_is_said_at_once_with_the_servers_words(serve, status):
    server = serve((status, {}, "no model 'big'" + "x" * 500))
    with pytest.raises(RuntimeError) as error:
        ask(server, "a")
    assert f"HTTP {status}: no model 'big'xxx" in str(error.value)
    assert str(error.value).count("x") == 200 - len("no model 'big'")
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_missing_or_refused_key_names_the_variable_and_is_never_shown(serve, status, monkeypatch):
    server = serve((status, {}, "Incorrect API key: sk-secret"))
    with pytest.raises(RuntimeError, match="the key in OPENAI_API_KEY is missing"):
        ask(server, "a")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    judge = judge_of(server)
    with pytest.raises(RuntimeError, match="the key in OPENAI_API_KEY is refused") as error:
        judge.check()
    assert "secret" not in f"{error.value!r} {judge!r}" and len(server.asked) == 2


@pytest.mark.parametrize(
    "reply",
    [
        (500, {}, "x" * 195 + "sk-secret"),
        (400, {}, "sk-secret"),
        (200, {}, "you sent sk-secret"),
        (307, {"Location": "http://elsewhere/?key=sk-secret"}, ""),
        no_http,
    ],
)
def test_a_key_that_the_server_repeats_is_not_shown(serve, reply):
    with pytest.raises(RuntimeError) as error:
        ask(serve(reply), "a", attempts=1, key="sk-secret")
    assert "sk-s" not in repr(error.value) and error.value.__cause__ is None


@pytest.mark.parametrize("key", ["sk-se cret", "sk-se\ncret", "sk-secret…"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(key):
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds") as error:
        RemoteJudge("http://host/v1", "big", PAPER, key=key)
    assert "sk-" not in str(error.value) and "cret" not in str(error.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_refused_and_not_followed(serve, status):
    server = serve((status, {"Location": "/v2/chat/completions"}, ""))
    with pytest.raises(RuntimeError, match=rf"redirects to /v2/chat/.* \(HTTP {status}\)"):
        ask(server, "a")
    assert server.lines == ["POST /v1/chat/completions HTTP/1.1"]


def test_an_error_cancels_what_has_not_begun(serve):
    def script(asked, number):
        return (400, {}, "no") if number == 0 else hang

    server = serve(script=script)
    with pytest.raises(RuntimeError, match="HTTP 400: no"):  # not that one waited for the others
        ask(server, *MANY, *(a * 2 for a in MANY), parallel=2, limit=600.0)
    assert pool_is_gone() and len(server.asked) <= server.connected <= 4


def test_settings_that_cannot_work_are_refused():
    for url in ("host:8000/v1", "ftp://host", "http://me:secret@host/v1", "http://host/v1?key=a"):
        with pytest.raises(ValueError, match="must be like http://host:8000/v1") as error:
            RemoteJudge(url, "big", PAPER)
        assert "secret" not in str(error.value)
    for options in ({"parallel": 0}, {"attempts": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            RemoteJudge("http://host", "big", PAPER, **options)
    with pytest.raises(ValueError, match="3 judge samples would all be the same"):
        RemoteJudge("http://host", "big", PAPER, samples=3)


def test_a_check_is_one_judgement_with_the_runs_own_settings(serve):
    server = serve(chat("85"))
    assert judge_of(server, max_new_tokens=7).check() == Score(0.85, "85")
    assert [asked["max_tokens"] for asked in server.asked] == [7]
    server = serve((400, {}, "maximum context length is 512 tokens"))
    with pytest.raises(ValueError, match="1024 new tokens do not fit the window of model 'big'"):
        judge_of(server).check()


# ------------------------------------------------------------------------------ time and threads


def pool_is_gone():
    for _ in range(3000):
        if not any(t.name.startswith("ThreadPoolExecutor") for t in threading.enumerate()):
            return True
        time.sleep(0.02)
    return False


HEAD = "HTTP/1.1 200 OK\r\n"
SLOW = {
    "hangs": hang,
    "drips a body with its length": drip(f"{HEAD}Content-Length: 999\r\n\r\n" + " " * 200),
    "drips a body without": drip(f"{HEAD}\r\n" + " " * 200),
    "drips headers": drip(HEAD + "X-Wait: yes\r\n" * 50),
}


@pytest.mark.parametrize("reply", SLOW.values(), ids=SLOW)
def test_a_slow_server_hits_the_limit(serve, reply):
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"in 2 tries; the last: no whole answer within 0.2 s"):
        ask(serve(reply), "a", attempts=2, limit=0.2)
    assert time.monotonic() - begun >= 0.4 and pool_is_gone()


def test_requests_overlap_but_no_more_than_asked_for(serve):
    """Four can only pass the gate together; a fifth would be seen."""
    gate, inside, most = threading.Barrier(4), [], []

    def script(asked, number):
        inside.append(number)
        most.append(len(inside))
        gate.wait(120)
        time.sleep(0.02)
        inside.remove(number)
        return chat("85")

    assert ask(serve(script=script), *MANY, parallel=4, attempts=1) == [Score(0.85, "85")] * 8
    assert max(most) == 4


@pytest.fixture
def full():
    """The address of a server that takes no more connections, and does not say so."""
    with contextlib.ExitStack() as stack:
        listening, *others = [stack.enter_context(socket.socket()) for _ in range(4)]
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for other in others:
            other.setblocking(False)
            other.connect_ex(listening.getsockname())
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextlib.contextmanager
def interrupted(seconds):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_connecting_has_a_limit_too(full):
    with pytest.raises(RuntimeError, match=r"no whole answer within 0.2 s"):
        RemoteJudge(full, "big", PAPER, attempts=1, limit=0.2).check()


@pytest.mark.parametrize("reply", [hang, (503, {"Retry-After": "60"}, "")], ids=["hang", "pause"])
def test_an_interrupt_waits_for_nobody(serve, reply):
    server = serve(reply)
    with interrupted(0.3):
        ask(server, *MANY, parallel=2)
    assert len(server.asked) == 2 and pool_is_gone()


def test_an_interrupt_does_not_wait_for_a_connection(full):
    with interrupted(0.2):
        RemoteJudge(full, "big", PAPER, limit=0.9).check()
    assert pool_is_gone()  # and what is left of it has its limit
