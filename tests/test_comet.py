"""The process that scores with COMET: scores are the library's, and failures are reported."""

import json
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eval import comet
from eval.comet import Comet, find_python
from tests.processes import ROOT
from tests.runs import write_rows

slow = pytest.mark.slow


def make_rows(count, seed=0, keys=("src", "mt", "ref")):
    draw = random.Random(seed)
    words = ["ab", "cdefg", "日本", "ö", "xyzzy", "中文", "q"]
    return [
        {key: " ".join(draw.choices(words, k=draw.randint(1, 25))) for key in keys}
        for _ in range(count)
    ]


def is_gone(pid, within=30.0):
    """Whether a process ends in time."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def loading_error(kind, checkpoint, python):
    with Comet(str(checkpoint), python=python) as scorer, pytest.raises(kind) as error:
        scorer.ready()
    return str(error.value)


# --------------------------------------------------------------- without COMET's environment

LOADED = """
requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(0), "w", buffering=1)
def reply(**message):
    print(json.dumps(message), file=replies)
reply(about={"needs_reference": False, "takes_reference": True})
"""


@pytest.fixture
def stub(tmp_path):
    """A Comet whose worker runs the given code."""

    def make(body, **more):
        file = tmp_path / "stub"
        file.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{body}")
        file.chmod(0o755)
        made.append(Comet("comet22", "cuda:1", python=str(file), **more))
        made[-1].start()
        return made[-1]

    made = []
    yield make
    for scorer in made:
        scorer.close()


def test_a_missing_environment_is_reported(tmp_path, monkeypatch):
    monkeypatch.delenv("SSR_COMET_PYTHON", raising=False)
    monkeypatch.setattr(comet, "HOME", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is not there: run `python -m eval.comet inst"):
        Comet("comet22")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert find_python() == str(tmp_path / "bin" / "python")
    monkeypatch.setenv("SSR_COMET_PYTHON", "env")
    assert find_python() == "env" and find_python(sys.executable) == sys.executable
    monkeypatch.setenv("SSR_COMET_PYTHON", "no-such-python")
    with pytest.raises(FileNotFoundError, match=r"no-such-python is no program.*comet install"):
        Comet("comet22")


@pytest.mark.parametrize("version", [None, "1.0"])
def test_a_python_with_no_or_another_comet_is_reported(version, tmp_path, monkeypatch):
    message = "has no COMET: `python -m eval.comet install`"
    if version:
        message = "has COMET 1.0, wanted is 2.2.7: `python -m eval.comet install`"
        about = tmp_path / "unbabel_comet-1.0.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text("Metadata-Version: 2.1\nName: unbabel-comet\nVersion: 1.0\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert message in loading_error(RuntimeError, "comet22", sys.executable)
    with Comet("comet22", python=sys.executable) as comet:
        comet.start()
        comet.process.wait()  # its reply is read though it has ended
        with pytest.raises(RuntimeError, match=re.escape(message)):
            comet.ready()


def test_a_worker_that_hangs_is_named_and_killed(stub):
    """While it loads; and while it scores, though it does not even read the request."""
    for body, limits, message in (
        ("time.sleep(60)", {"start_limit": 1.0}, "no model after 1 s"),
        (LOADED + "time.sleep(60)", {"silence_limit": 1.0}, "no scores after 1 s"),
    ):
        scorer = stub(body, batch_size=50_000, **limits)
        pid = scorer.process.pid
        with pytest.raises(TimeoutError, match=rf"comet22 on cuda:1 \(worker {pid}\): {message}"):
            scorer.score(make_rows(50) * 1000)  # more than a socket holds
        assert is_gone(pid)


def test_a_death_is_reported_with_the_last_output(stub):
    scorer = stub("for i in range(40): print('line', i, file=sys.stderr)\nsys.exit(3)")
    with pytest.raises(RuntimeError) as error:
        scorer.ready()
    message = str(error.value)
    assert "comet22 on cuda:1 (worker" in message and "died: exit code 3" in message
    assert re.findall(r"line (\d+)", message) == [str(i) for i in range(25, 40)]


def test_output_does_no_harm_and_scores_come_in_order(stub):
    """Batches are of similar length; the stub's score of a row is its length."""
    body = "print('hello')\nsys.stderr.write('x' * 100 + '\\n' * 100_000)\n" + LOADED
    body += "for line in requests:\n rows = json.loads(line)\n print('stray', flush=True)\n"
    body += " assert len(rows) <= 4\n"
    body += " reply(scores=[len(row['mt']) + 0.5 * ('ref' in row) for row in rows])"
    scorer, rows = stub(body, batch_size=4), make_rows(30)
    assert scorer.score(rows) == [len(row["mt"]) + 0.5 for row in rows]
    without = [{key: row[key] for key in ("src", "mt")} for row in rows]
    assert scorer.score(without) == [len(row["mt"]) for row in rows] and scorer.score([]) == []


def test_an_interrupted_call_is_not_answered_in_the_next(stub, monkeypatch):
    body = LOADED + "for line in requests:\n reply(scores=[float(len(json.loads(line)))])"
    scorer = stub(body)
    pid = scorer.ready() and scorer.process.pid

    def interrupt(size=-1):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scorer, "replies", SimpleNamespace(readline=interrupt, close=lambda: None))
        with pytest.raises(KeyboardInterrupt):
            scorer.score(make_rows(1))
        assert is_gone(pid)
    assert scorer.score(make_rows(1)) == [1.0]


def test_references_that_are_needed_are_asked_for_before_anything_is_sent(stub):
    scorer = stub(LOADED.replace("False", "True"))
    with pytest.raises(ValueError, match="comet22 needs references: rows must have 'ref'"):
        scorer.score(make_rows(2, keys=("src", "mt")))


def test_a_failed_install_is_reported(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["comet", "install", "--folder", str(tmp_path)])
    monkeypatch.setattr(sys, "executable", shutil.which("ls"))
    with pytest.raises(SystemExit, match=rf"ls -m venv {tmp_path} failed \(exit code \d\); see"):
        comet.main()
    assert "ready" not in capfd.readouterr().out


# ------------------------------------------------------------------ with COMET's environment

REVISION = "5" * 40
KINDS = ("regression", "kiwi", "unified", "xcomet", "referenceless")


@pytest.fixture(scope="module")
def texts():
    """Of mixed lengths; some empty, one longer than the encoder takes."""
    rows = make_rows(40)
    rows[5]["mt"] = " ".join(["xyzzy"] * 600)
    rows[9]["mt"] = rows[10]["ref"] = ""
    return rows


@pytest.fixture(scope="module")
def models(comet_python, texts, tmp_path_factory):
    """The `folder` of one model of each kind; what the worker says `about` each, and the `scores`
    that the library's `predict` and the worker's code give."""
    folder = tmp_path_factory.mktemp("tiny-comet")
    file = write_rows(folder / "rows.jsonl", texts)
    script = str(ROOT / "tests" / "tiny_comet.py")
    command = [comet_python, "-W", "ignore", script, str(folder), str(file)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return SimpleNamespace(folder=folder, **json.loads(printed))


@slow
@pytest.mark.parametrize(
    "case", [*KINDS, "unified without references", "xcomet without references"]
)
def test_scores_are_those_of_predict_and_close_in_half_precision(case, models):
    """At the median: XCOMET counts marked words, and one on the threshold may change sides."""
    kind, _, without = case.partition(" ")
    scores = models.scores[case]
    assert len(set(scores["predict"])) > 30
    assert scores["float32"] == pytest.approx(scores["predict"], abs=1e-5)
    if without:
        assert scores["float32"] != pytest.approx(models.scores[kind]["predict"], abs=1e-3)
    pairs = zip(scores["predict"], scores["float16"], strict=True)
    assert statistics.median(abs(a - b) for a, b in pairs) < 3e-4
    assert scores["float16"] != pytest.approx(scores["predict"], abs=1e-5)


@slow
def test_a_worker_says_which_models_need_or_take_references(models):
    about = models.about
    assert [k for k, a in about.items() if a["needs_reference"]] == ["regression"]
    takes = [k for k, a in about.items() if a["takes_reference"]]
    assert takes == ["regression", "unified", "xcomet"]
    kiwi = about["kiwi"]
    assert (kiwi["class"], kiwi["comet"], kiwi["revision"]) == ("UnifiedMetric", "2.2.7", None)


# Something happens inside the library when it sees certain texts.
TROUBLE = """
import os, time, comet, torch
from comet.models import ReferencelessRegression as Model
print("stray, before the worker's first line")
real = Model.prepare_for_inference
def prepare(self, rows):
    print("stray, in Python"); os.write(1, b"stray, no end of line")
    if any("vast" in row["mt"] for row in rows):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    if any("slow" in row["mt"] for row in rows):
        time.sleep(2)
    self.odd = [row["mt"] == "odd" for row in rows]
    return real(self, rows)
predict = Model.predict_step
def predict_step(self, batch):
    found = predict(self, batch)
    found.scores[torch.tensor(self.odd)] = float("nan")
    return found
Model.prepare_for_inference, Model.predict_step = prepare, predict_step
"""


@pytest.fixture(scope="module")
def worker(comet_python, models, tmp_path_factory):
    """A worker in whose library there is trouble, with a model from the hub's cache, as is the
    tokenizer of its encoder."""
    home = tmp_path_factory.mktemp("hub")
    for name, source in (("encoder", "XLM-RoBERTa"), ("model", "referenceless")):
        folder = home / "hub" / f"models--some--{name}"
        shutil.copytree(models.folder / source, folder / "snapshots" / REVISION)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION)
    hparams, file = (folder / "snapshots" / REVISION / name
                     for name in ("hparams.yaml", "checkpoints/model.ckpt"))  # fmt: skip
    encoder = str(models.folder / "XLM-RoBERTa")
    hparams.write_text(hparams.read_text().replace(encoder, "some/encoder"))
    saved = torch.load(file, weights_only=False)
    saved["hyper_parameters"]["pretrained_model"] = "some/encoder"
    torch.save(saved, file)
    (home / "sitecustomize.py").write_text(TROUBLE)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PYTHONPATH", home), ("HF_HOME", home), ("HF_HUB_OFFLINE", 1)):
            patch.setenv(name, str(value))
        with Comet("some/model", python=comet_python, batch_size=8) as scorer:
            scorer.ready()
            yield scorer


@slow
def test_errors_inside_the_library_are_raised_and_the_worker_lives_on(worker, models, texts):
    scores = models.scores["referenceless"]["predict"]
    assert worker.score(texts) == pytest.approx(scores, abs=1e-5)
    assert worker.about["revision"] == REVISION
    pid = worker.process.pid
    with pytest.raises(RuntimeError, match="row 33 has the score nan: try dtype 'float32'"):
        worker.score([*make_rows(33), {"src": "a", "mt": "odd", "ref": "b"}])
    with pytest.raises(RuntimeError, match="set a smaller batch_size, or dtype 'bfloat16': CU"):
        worker.score([{"src": "a", "mt": "vast", "ref": "b"}])
    assert len(worker.score(make_rows(3))) == 3 and worker.process.pid == pid


@slow
def test_a_worker_ends_with_its_parent(worker):
    """Whose end of the socket is closed then, while the worker computes."""
    worker.socket.sendall(b'[{"src": "a", "mt": "slow"}]\n')
    worker.socket.shutdown(socket.SHUT_RDWR)
    assert is_gone(worker.process.pid)


@slow
def test_a_checkpoint_that_cannot_be_had_is_reported(comet_python, tmp_path, monkeypatch):
    (tmp_path / "kiwi").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for checkpoint, kind, message in (
        (tmp_path / "kiwi", ValueError, r"is incomplete: there is no .*hparams.yaml"),
        ("comet22", RuntimeError, "wmt22-comet-da is no file .*`hf download Unbabel/wmt22"),
    ):
        assert re.search(message, loading_error(kind, checkpoint, comet_python))
