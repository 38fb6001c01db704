"""Answers are compared by the real library in a real process, whatever they are."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import answers
from answers import Answers, boxed
from tests.test_comet import gone

ROOT = Path(__file__).parent.parent
HOSTILE = "9^{9^9}"  # math-verify's own timeout does not end it: the power holds the lock


@pytest.fixture(scope="module")
def equal():
    with Answers(limit=10.0) as made:
        yield made


def reaped(pid):
    return not Path(f"/proc/{pid}").exists()


# -------------------------------------------------------------------------------- what is equal

EQUAL = [
    (r"\frac12", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    ("$1/2$", "1/2."),
    (r"-\frac{3}{4}", "-0.75"),
    (r"3\frac{1}{2}", "7/2"),
    ("1/3", "0.333333"),
    ("1,000", "1000"),
    (r"1{,}000", "1000"),
    ("2^{10}", "1024"),
    ("5!", "120"),
    (r"50\%", "0.5"),
    ("50%", "50"),
    (r"\{1,2\}", r"\{2, 1\}"),
    ("1,2", r"\{2,1\}"),
    (r"\pm 2", r"\{-2,2\}"),
    ("(1,2)", "1<x<2"),
    (r"(3,\infty)", "x>3"),
    (r"x\in[1,2]", "[1,2]"),
    (r"\left(1,2\right)", "(1, 2)"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"),
    ("x=3", "3"),
    ("x=1 or x=2", "1,2"),
    ("f(x)=x^2", "x^2"),
    ("(x+1)^2", "x^2+2x+1"),
    ("n(n+1)/2", r"\frac{n^2+n}{2}"),
    (r"5\text{ cm}", "5"),
    (r"60\text{ miles per hour}", "60"),
    (r"30^\circ", "30"),
    (r"\$5", "5"),
    ("2π", r"2\pi"),
    ("A", r"\text{A}"),
    ("(A)", "A"),
    ("Yes", r"\text{yes}"),
    ("no solution", r"\text{No solution}"),
    ("三", "三"),
    ("无解", r"\text{无解}"),
]
UNEQUAL = [
    ("1/2", "0.51"),
    ("1/3", "0.33"),
    ("0.333...", "0.333"),
    ("-1", "1"),
    ("100000000", "100000001"),
    ("[1,2]", "[1,2)"),
    ("(1,2)", "(2,1)"),
    (r"\{1,2\}", r"\{1,3\}"),
    (r"\infty", r"-\infty"),
    (r"2\sqrt{3}", r"3\sqrt{2}"),
    ("x=3", "y=3"),
    ("x+1", "x-1"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    ("5 cm", "6 cm"),
    ("A", "B"),
    ("yes", "no"),
    ("Paris", "Pairs"),  # letters are not multiplied
    ("no solution", "one solution"),
    ("三", "四"),
    ("三", "3"),
    ("无解", "3"),
    ("x=1, the other is 3", "3"),  # no number is picked out of a sentence
    ("3", "3}5"),
    ("3", r"5\boxed{3}"),
    ("1/0", "0/0"),
    ("\ud800", "\0"),
]


@pytest.mark.parametrize("first, second", EQUAL)
def test_ways_to_write_an_answer_are_equal(first, second, equal):
    assert equal.same(first, second) is True
    assert equal.same(second, first) is True


@pytest.mark.parametrize("first, second", UNEQUAL)
def test_different_answers_are_not(first, second, equal):
    assert equal.same(first, second) is False
    assert equal.same(second, first) is False


def test_the_tables_have_cost_no_worker(equal):
    assert (equal.expired, equal.died) == (0, 0)
    assert equal.failed == 1  # 1/0


def test_what_is_no_answer_is_equal_to_nothing(equal):
    for empty in (None, "", "  ", "$$", "$ $", "."):
        assert equal.same(empty, "0") is False
        assert equal.same(empty, empty) is False
    assert equal.clusters(["", "3", None, "3.0", " "]) == [None, 0, None, 0, None]
    assert equal.clusters([]) == []


@contextlib.contextmanager
def no_questions(equal):
    """The worker is not asked, so nothing can take long."""

    def ask(pair):
        raise AssertionError(f"the worker was asked about {pair}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equal, "ask", ask)
        yield


def test_what_is_long_is_equal_to_itself_only(equal):
    long = "1+" * answers.LONGEST + "1"
    with no_questions(equal):
        assert equal.same(long, f" ${long}$") is True
        assert equal.same(long, str(answers.LONGEST + 1)) is False


def test_clusters_are_numbered_as_they_begin(equal):
    given = ["3", "1/2", "x=3", "0.5", "无解", r"\frac{1}{2}", "3.0"]
    assert equal.clusters(given) == [0, 1, 0, 1, 2, 1, 0]
    assert equal.clusters(given[::-1]) == [0, 1, 2, 1, 0, 1, 0]


def test_a_hundred_clusters_are_the_same_each_time(equal):
    given = [f"{n}/{n + 1}" for n in range(1, 101)]
    given += [rf"\frac{{{2 * n}}}{{{2 * n + 2}}}" for n in range(1, 101, 9)]
    found = equal.clusters(given)
    assert found == [*range(100), *range(0, 100, 9)]
    with Answers(limit=10.0) as another:
        assert another.clusters(given) == found
        environment = Path(f"/proc/{another.process.pid}/environ").read_bytes()
    assert b"PYTHONHASHSEED=0" in environment.split(b"\0")  # what depends on it is rare


def test_each_is_compared_with_one_of_each_cluster():
    equal, asked = Answers(), []
    equal.compare = lambda *pair: asked.append(pair) or int(pair[0]) % 2 == int(pair[1]) % 2
    assert equal.clusters(["1", "2", "3", "4", "6", "3"]) == [0, 1, 0, 1, 1, 0]
    assert asked == [("1", "2"), ("1", "3"), ("1", "4"), ("2", "4"), ("1", "6"), ("2", "6")]


def test_results_are_remembered_and_not_without_end(monkeypatch):
    monkeypatch.setattr(answers, "KEPT", 3)
    equal, asked = Answers(), []
    equal.compare = lambda *pair: asked.append(pair) or False
    for number in "1213":
        equal.same(number, "0")
    assert len(asked) == 3
    for number in range(10, 20):
        equal.same(str(number), "0")
    assert len(equal.results) == 3


# ------------------------------------------------------------------------------------ the boxes


@pytest.mark.parametrize(
    "text, content",
    [
        (r"so \boxed{3}.", "3"),
        (r"first \boxed{2}, no: \boxed{\frac{1}{2}}, I think", r"\frac{1}{2}"),
        (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"),
        (r"\boxed{\left\{x \mid x^{2^{y}} > 1\right.}", r"\left\{x \mid x^{2^{y}} > 1\right."),
        (r"\boxed{\begin{cases}1\\{2}\end{cases}}", r"\begin{cases}1\\{2}\end{cases}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{}", ""),
        ("\\boxed{1\n}", "1\n"),
        (r"\boxed{3} and then \boxed{\frac{1}{2}", None),
        (r"\boxed{3\}", None),
        (r"boxed{3} \boxed 3", None),
        ("}", None),
        ("", None),
    ],
)
def test_the_last_box_is_read(text, content):
    assert boxed(text) == content


# ----------------------------------------------------------------------------------- the worker


def test_a_hostile_answer_ends_at_the_limit_and_is_asked_about_once():
    with Answers(limit=1.0) as equal:
        assert equal.same("1/2", "0.5") is True
        pid, before = equal.process.pid, time.monotonic()
        assert equal.same(HOSTILE, "5") is None
        assert time.monotonic() - before > 0.9
        assert reaped(pid) and (equal.expired, equal.died) == (1, 0)
        assert equal.same("1/4", "0.25") is True
        with no_questions(equal):
            assert equal.same("5", HOSTILE) is None


def test_a_hostile_answer_among_many_does_not_cost_the_limit_with_each():
    with Answers(limit=1.0) as equal:
        assert equal.clusters([HOSTILE, "5", "6", "7", "5.0", HOSTILE]) == [0, 1, 2, 3, 1, 0]
        assert equal.expired == 2  # with 5, and to see which of the two it was
        assert equal.hopeless == {HOSTILE, ("5", HOSTILE)} and not equal.suspects


def test_a_killed_worker_is_replaced():
    with Answers(limit=10.0) as equal:
        assert equal.same("1/2", "0.5") is True
        pid = equal.process.pid
        os.kill(pid, signal.SIGKILL)
        assert equal.same("1/4", "0.25") is True
        assert reaped(pid) and (equal.died, equal.expired) == (1, 0)


def trouble(folder, monkeypatch, body):
    """`body` runs inside the worker before each comparison, with `first` and `second` parsed."""
    code = "import math_verify, os\nreal = math_verify.verify\ndef verify(first, second, **more):\n"
    code += f" {body}\n return real(first, second, **more)\nmath_verify.verify = verify\n"
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_worker_that_wants_too_much_memory_is_replaced(tmp_path, monkeypatch, capfd):
    trouble(tmp_path, monkeypatch, f"if 13 in first + second: bytearray({answers.MEMORY})")
    with Answers(limit=10.0) as equal:
        assert equal.same("13", "1") is None and equal.died == 2
        assert equal.same("1", "1.0") is True
        most = resource.prlimit(equal.process.pid, resource.RLIMIT_AS)[0]
    assert most == answers.MEMORY
    assert capfd.readouterr().err.count("answers: a worker has used its 4096 MiB") == 2


def test_stray_prints_do_no_harm(tmp_path, monkeypatch, capfd):
    body = "print('stray'); os.write(1, b'no end'); assert not os.read(0, 9)"
    trouble(tmp_path, monkeypatch, body)
    with Answers(limit=10.0) as equal:
        assert equal.same("1/2", "0.5") is True and equal.same("1/2", "0.6") is False
        assert (equal.died, equal.expired, equal.failed) == (0, 0, 0)
    said = capfd.readouterr()
    assert "no end" in said.err and said.out == ""


def test_a_worker_that_cannot_start_is_told(tmp_path, monkeypatch, capfd):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken, it is')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    equal = Answers()
    with pytest.raises(RuntimeError, match=r"cannot be compared \(see above\).* exit code 1"):
        equal.same("1", "2")
    assert equal.process is None and "broken, it is" in capfd.readouterr().err


def test_the_worker_imports_nothing_that_lies_beside_it(tmp_path):
    shutil.copy(ROOT / "answers.py", tmp_path)
    (tmp_path / "sympy.py").write_text("raise ImportError('not this one')")
    code = "from answers import Answers; print(Answers().same('1/2', '0.5'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr


def test_an_interrupted_comparison_does_not_answer_the_next(equal):
    equal.same("1", "2")
    pid = equal.process.pid

    def interrupt(seconds):
        raise KeyboardInterrupt

    equal.hear = interrupt
    with pytest.raises(KeyboardInterrupt):
        equal.same("7", "7.0")
    del equal.hear
    assert reaped(pid)
    assert equal.same("7", "8.0") is False


def test_threads_share_a_worker(equal):
    pairs = [(f"{n}/{n + 1}", f"{2 * n}/{2 * n + 2 + n % 2}") for n in range(200, 240)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: equal.same(*pair), pairs))
    assert found == [n % 2 == 0 for n in range(200, 240)]


def test_close_leaves_no_process():
    equal = Answers()
    equal.close()  # none was started
    equal.same("1/2", "0.5")
    pid = equal.process.pid
    equal.close()
    assert reaped(pid) and equal.process is None
    equal.close()


PARENT = """
import signal, sys
from answers import Answers
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has it ignored
equal = Answers(limit={})
equal.same("1/2", "0.5")
print(equal.process.pid, flush=True)
equal.limit = 60.0
{}
"""


@pytest.mark.parametrize(
    "last, limit, kind",
    [
        (f"equal.same('{HOSTILE}', '5')", 60.0, signal.SIGINT),
        (f"equal.same('{HOSTILE}', '5')", 1.0, signal.SIGTERM),  # by its own alarm
        ("sys.stdin.read()", 60.0, signal.SIGTERM),
    ],
)
def test_a_worker_goes_with_its_parent(last, limit, kind):
    command = [sys.executable, "-c", PARENT.format(limit, last)]
    parent = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert not gone(pid, within=0)
    parent.send_signal(kind)
    assert gone(pid)
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()


# ------------------------------------------------------------------------------ what it is given


def test_a_missing_library_is_told_by_who_wants_it():
    """-S: no site-packages. `boxed` needs none."""
    code = r"import answers; print(answers.boxed(r'\boxed{3}'), flush=True); answers.Answers()"
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout == "3\n"
    assert "ValueError: answers are compared by math-verify: pip install math-verify" in run.stderr


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_a_limit_is_positive(limit):
    with pytest.raises(ValueError, match=r"must be a positive number of seconds"):
        Answers(limit=limit)


def test_the_parent_does_not_import_the_library():
    code = "import sys, answers; answers.Answers(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert {"answers", "json"} <= set(run.stdout.split())
    assert not {"sympy", "math_verify"} & set(run.stdout.split())
