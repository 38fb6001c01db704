"""Answers are compared by the real library in a real process."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rzero import answers
from rzero.answers import Answers, boxed

FOLDER = Path(answers.__file__).parent
HOSTILE = "9^{9^9}"  # math-verify's own timeout does not end it: the power holds the lock


@pytest.fixture(scope="module")
def comparer():
    return Answers(limit=10.0)


def has_ended(pid, within=0.0):
    deadline = time.monotonic() + within
    while (file := Path(f"/proc/{pid}/stat")).exists():
        if file.read_text().rpartition(")")[2].split()[0] == "Z":  # nobody reaps it
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# -------------------------------------------------------------------------------- what is equal

EQUAL = [
    (r"\frac12", "0.5"), (r"\frac{1}{2}", "1/2"), ("$1/2$", "1/2."), (r"-\frac{3}{4}", "-0.75"),
    (r"3\frac{1}{2}", "7/2"), ("1/3", "0.333333"), ("1,000", "1000"), (r"1{,}000", "1000"),
    ("2^{10}", "1024"), ("5!", "120"), (r"50\%", "0.5"), ("50%", "50"), (r"\{1,2\}", r"\{2, 1\}"),
    ("1,2", r"\{2,1\}"), (r"\pm 2", r"\{-2,2\}"), ("(1,2)", "1<x<2"), (r"(3,\infty)", "x>3"),
    (r"x\in[1,2]", "[1,2]"), (r"\left(1,2\right)", "(1, 2)"), (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"), ("x=3", "3"), ("x=1 or x=2", "1,2"),
    ("f(x)=x^2", "x^2"), ("(x+1)^2", "x^2+2x+1"), ("n(n+1)/2", r"\frac{n^2+n}{2}"),
    (r"5\text{ cm}", "5"), (r"60\text{ miles per hour}", "60"), (r"30^\circ", "30"), (r"\$5", "5"),
    ("2π", r"2\pi"), ("A", r"\text{A}"), ("(A)", "A"), ("Yes", r"\text{yes}"),
    ("no solution", r"\text{No solution}"), ("三", "三"), ("无解", r"\text{无解}"),
]  # fmt: skip
UNEQUAL = [
    ("1/2", "0.51"), ("1/3", "0.33"), ("0.333...", "0.333"), ("-1", "1"),
    ("100000000", "100000001"), ("[1,2]", "[1,2)"), ("(1,2)", "(2,1)"), (r"\{1,2\}", r"\{1,3\}"),
    (r"\infty", r"-\infty"), (r"2\sqrt{3}", r"3\sqrt{2}"), ("x=3", "y=3"), ("x+1", "x-1"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    ("5 cm", "6 cm"), ("A", "B"), ("yes", "no"),
    ("Paris", "Pairs"),  # letters are not multiplied
    ("no solution", "one solution"), ("三", "四"), ("三", "3"), ("无解", "3"),
    ("x=1, the other is 3", "3"),  # no number is picked out of a sentence
    ("3", "3}5"), ("3", r"5\boxed{3}"), ("1/0", "0/0"), ("\ud800", "\0"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), EQUAL)
def test_equal_answers_are_equal_either_way(first, second, comparer):
    assert comparer.same(first, second) is comparer.same(second, first) is True


@pytest.mark.parametrize(("first", "second"), UNEQUAL)
def test_different_answers_are_not_equal(first, second, comparer):
    assert comparer.same(first, second) is comparer.same(second, first) is False
    assert not comparer.hopeless


def test_missing_answer_is_equal_to_nothing(comparer):
    for empty in (None, "", "  ", "$$", "$ $", "."):
        assert comparer.same(empty, "0") is comparer.same(empty, empty) is False
    assert comparer.clusters(["", "3", None, "3.0", " "]) == [None, 0, None, 0, None]
    assert comparer.clusters([]) == []


def forbid_comparisons(comparer, patch):
    patch.setattr(comparer, "compare", lambda *pair: pytest.fail(f"compared {pair}"))


def test_long_answer_is_equal_to_itself_only(comparer, monkeypatch):
    long = "1+" * answers.MAX_LENGTH + "1"
    forbid_comparisons(comparer, monkeypatch)
    assert comparer.same(long, f" ${long}$") is True
    assert comparer.same(long, str(answers.MAX_LENGTH + 1)) is False


def test_clusters_are_numbered_in_order_of_appearance_and_the_same_each_time(comparer):
    given = ["3", "1/2", "x=3", "0.5", "无解", r"\frac{1}{2}", "3.0"]
    assert comparer.clusters(given) == [0, 1, 0, 1, 2, 1, 0]
    assert comparer.clusters(given[::-1]) == [0, 1, 2, 1, 0, 1, 0]
    environment = Path(f"/proc/{comparer.worker.pid}/environ").read_bytes()
    assert b"PYTHONHASHSEED=0" in environment.split(b"\0")


def test_each_answer_is_compared_once_with_one_of_each_cluster():
    comparer, compared = Answers(), []
    comparer.compare = lambda *pair: compared.append(pair) or int(pair[0]) % 2 == int(pair[1]) % 2
    for _ in range(2):
        assert comparer.clusters(["1", "2", "3", "4", "6", "3"]) == [0, 1, 0, 1, 1, 0]
    assert compared == [("1", "2"), ("1", "3"), ("1", "4"), ("2", "4"), ("1", "6"), ("2", "6")]


# ------------------------------------------------------------------------------------ the boxes


@pytest.mark.parametrize(
    "text, content",
    [
        (r"so \boxed{3}.", "3"), (r"\boxed{\boxed{7}}", "7"), (r"\boxed{}", ""),
        (r"first \boxed{2}, no: \boxed{\frac{1}{2}}, I think", r"\frac{1}{2}"),
        (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"), ("\\boxed{1\n}", "1\n"),
        (r"\boxed{\left\{x \mid x^{2^{y}} > 1\right.}", r"\left\{x \mid x^{2^{y}} > 1\right."),
        (r"\boxed{\begin{cases}1\\{2}\end{cases}}", r"\begin{cases}1\\{2}\end{cases}"),
        (r"\boxed{3} and then \boxed{\frac{1}{2}", None), (r"\boxed{3\}", None),
        (r"boxed{3} \boxed 3", None), ("}", None), ("", None),
    ],
)  # fmt: skip
def test_last_box_is_read(text, content):
    assert boxed(text) == content


# ----------------------------------------------------------------------------------- the worker


def test_hostile_answer_costs_the_limit_twice_and_not_with_every_other_one(monkeypatch):
    comparer = Answers(limit=1.0)
    assert comparer.same("1/2", "0.5") is True
    pid, begun = comparer.worker.pid, time.monotonic()
    # With 5, and to see which of the two it was.
    assert comparer.clusters([HOSTILE, "5", "6", "7", "5.0", HOSTILE]) == [0, 1, 2, 3, 1, 0]
    assert has_ended(pid) and time.monotonic() - begun > 2.0
    assert comparer.hopeless == {HOSTILE}
    forbid_comparisons(comparer, monkeypatch)
    assert comparer.same("5", HOSTILE) is False


def test_killed_worker_is_replaced(comparer):
    assert comparer.same("1/2", "0.5") is True
    pid = comparer.worker.pid
    os.kill(pid, signal.SIGKILL)
    assert comparer.same("1/4", "0.25") is True
    assert has_ended(pid) and not comparer.hopeless


def sabotage_worker(folder, monkeypatch, body):
    """`body` runs inside the worker before each comparison, with `first` and `second` parsed."""
    code = "import math_verify, os\nreal = math_verify.verify\ndef verify(first, second, **more):\n"
    code += f" {body}\n return real(first, second, **more)\nmath_verify.verify = verify\n"
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_worker_that_wants_too_much_memory_is_replaced(tmp_path, monkeypatch, capfd):
    sabotage_worker(tmp_path, monkeypatch, f"if 13 in first: bytearray({answers.MEMORY})")
    comparer = Answers(limit=10.0)
    assert comparer.same("13", "1") is False and comparer.hopeless == {"13"}
    assert comparer.same("1", "1.0") is True
    assert resource.prlimit(comparer.worker.pid, resource.RLIMIT_AS)[0] == answers.MEMORY
    assert capfd.readouterr().err.count("answers: a worker has used its 4096 MiB") == 2


def test_stray_prints_do_no_harm(tmp_path, monkeypatch, capfd):
    sabotage_worker(tmp_path, monkeypatch, "print('stray'); os.write(1, b'no end')")
    comparer = Answers(limit=10.0)
    assert comparer.same("1/2", "0.5") is True and comparer.same("1/2", "0.6") is False
    output = capfd.readouterr()
    assert "no end" in output.err and output.out == ""


def test_worker_that_cannot_start_is_an_error(tmp_path, monkeypatch, capfd):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken, it is')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"cannot be compared \(see above\): exit code 1"):
        Answers().same("1", "2")
    assert "broken, it is" in capfd.readouterr().err


def test_interrupted_comparison_does_not_answer_the_next(comparer, monkeypatch):
    comparer.same("1", "2")

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(comparer.worker.stdout, "readline", interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt):
        comparer.same("7", "7.0")
    assert comparer.same("7", "8.0") is False


PARENT = """
import sys
from answers import Answers
comparer = Answers(limit={})
comparer.same("1/2", "0.5")
print(comparer.worker.pid, flush=True)
{}
"""


@pytest.mark.parametrize(
    ("last", "limit"),
    [
        (f"comparer.same('{HOSTILE}', '5')", 1.0),  # by its own alarm
        ("sys.stdin.read()", 60.0),
    ],
)
def test_worker_ends_with_its_parent(last, limit):
    command = [sys.executable, "-c", PARENT.format(limit, last)]
    parent = subprocess.Popen(
        command, cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert not has_ended(pid)
    parent.terminate()
    assert has_ended(pid, within=5.0)
    parent.communicate()
