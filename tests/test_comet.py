"""The process that scores with COMET: right scores, and a clear word whenever something fails."""

import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from eval import comet
from eval.comet import Comet, check, install, python_of

ROOT = Path(__file__).parent.parent
slow = pytest.mark.slow


def rows(count, seed=0, longest=25, ref=True):
    draw = random.Random(seed)
    words = ["ab", "cdefg", "日本", "ö", "xyzzy", "中文", "q"]
    keys = ("src", "mt", "ref") if ref else ("src", "mt")
    return [
        {key: " ".join(draw.choices(words, k=draw.randint(1, longest))) for key in keys}
        for _ in range(count)
    ]


def gone(pid, within=5.0):
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


# --------------------------------------------------------------- without COMET's environment

GREET = """
def say(**message):
    print(json.dumps(message), flush=True)
say(about={"needs_reference": False, "takes_reference": True})
"""


def stand_in(folder, body):
    """A "Python" that runs `body` instead of the worker."""
    file = folder / "stand-in"
    file.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{body}")
    file.chmod(0o755)
    return str(file)


def test_no_environment_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("SSR_COMET_PYTHON", raising=False)
    monkeypatch.setattr(comet, "HOME", tmp_path / ".comet")
    with pytest.raises(FileNotFoundError, match=r"is not there: run `python -m eval.comet inst"):
        Comet("comet22")
    monkeypatch.setenv("SSR_COMET_PYTHON", "no-such-python")
    with pytest.raises(FileNotFoundError, match=r"no-such-python is no program.*comet install"):
        Comet("comet22")


def test_an_unfinished_environment_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("SSR_COMET_PYTHON", raising=False)
    monkeypatch.setattr(comet, "HOME", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is not finished: run `python -m eval.comet in"):
        python_of()
    (tmp_path / "ready").touch()
    assert python_of() == str(tmp_path / "bin" / "python")


def test_an_argument_goes_before_the_variable(monkeypatch):
    monkeypatch.setenv("SSR_COMET_PYTHON", "env")
    assert python_of(sys.executable) == sys.executable
    assert python_of() == "env"


def test_a_python_without_comet_or_with_another_is_said(tmp_path, monkeypatch):
    with (
        Comet("comet22", python=sys.executable) as scorer,
        pytest.raises(RuntimeError, match=r"has no COMET: `python -m eval.comet install`"),
    ):
        scorer.ready()
    about = tmp_path / "unbabel_comet-1.0.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: unbabel-comet\nVersion: 1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        Comet("comet22", python=sys.executable) as scorer,
        pytest.raises(RuntimeError, match=r"has COMET 1.0, wanted is 2.2.7: `python -m eval.comet"),
    ):
        scorer.score(rows(1))


def test_bad_rows_are_named():
    good = {"src": "a", "mt": "", "ref": "c"}
    assert check([good]) == ("src", "mt", "ref") and check([]) == ("src", "mt")
    with pytest.raises(ValueError, match="row 1: 'mt' is None"):
        check([good, good | {"mt": None}])
    with pytest.raises(ValueError, match=r"row 1: 'ref' is 0\.5"):
        check([good, good | {"ref": 0.5}])
    with pytest.raises(ValueError, match="row 0 has no 'ref': give references to all rows or to n"):
        check([{"src": "a", "mt": "b"}, good])
    with pytest.raises(ValueError, match="row 0 has no 'src'"):
        check([{"mt": "b"}])


def test_a_hung_start_is_named_and_killed(tmp_path):
    body = "print(json.dumps({'stage': 'loading x'}), flush=True)\ntime.sleep(60)"
    scorer = Comet("comet22", "cuda:1", python=stand_in(tmp_path, body), start_limit=1.0)
    pid = scorer.process.pid
    said = rf"comet22 on cuda:1 \(worker {pid}, loading x\): no model after 1 s"
    with pytest.raises(TimeoutError, match=said):
        scorer.ready()
    assert gone(pid)


def test_a_worker_that_reads_nothing_does_not_block(tmp_path):
    body = GREET + "time.sleep(60)"
    with (
        Comet("comet22", python=stand_in(tmp_path, body), silence_limit=0.5) as scorer,
        pytest.raises(TimeoutError, match=r"scoring row 0 of 5000\): no sign of life for 0.5 s"),
    ):
        scorer.score(rows(5000))  # more than a pipe holds


def test_two_deaths_in_a_row_are_told_with_the_last_words(tmp_path, capfd):
    body = "for i in range(40): print('line', i, file=sys.stderr)\nsys.exit(3)"
    with (
        Comet("comet22", python=stand_in(tmp_path, body)) as scorer,
        pytest.raises(RuntimeError) as error,
    ):
        scorer.ready()
    said = str(error.value)
    assert "two workers in a row: comet22 on cpu (worker" in said and "exit code 3" in said
    assert re.findall(r"line (\d+)", said) == [str(i) for i in range(25, 40)]
    assert capfd.readouterr().err.count("starting it again") == 1


def test_much_on_stderr_and_stray_lines_do_no_harm(tmp_path):
    body = "print('hello')\nprint(5)\nsys.stderr.write('x' * 100 + '\\n' * 100_000)\n" + GREET
    body += "for line in sys.stdin:\n r = json.loads(line)\n"
    body += " print('stray', flush=True)\n say(call=r['call'], scores=[1.0] * len(r['rows']))"
    with Comet("comet22", python=stand_in(tmp_path, body)) as scorer:
        assert scorer.score(rows(3)) == [1.0] * 3
        assert scorer.score([]) == []


def test_answers_to_an_interrupted_call_are_not_taken_for_the_next(tmp_path):
    body = GREET + "for line in sys.stdin:\n r = json.loads(line)\n"
    body += " say(call=r['call'], done=1)\n say(call=r['call'], scores=[float(r['call'])])"

    def interrupt(done, of):
        raise KeyboardInterrupt

    with Comet("comet22", python=stand_in(tmp_path, body)) as scorer:
        with pytest.raises(KeyboardInterrupt):
            scorer.score(rows(1), interrupt)
        assert scorer.score(rows(1)) == [2.0]


def test_install_keeps_what_is_ready_and_touches_nothing_else(tmp_path, capsys):
    requirements = comet.REQUIREMENTS.read_text("utf-8")
    (tmp_path / "ready").write_text(json.dumps({"requirements": requirements}))
    install(tmp_path)
    assert "is ready" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["ready"]
    (tmp_path / "ready").rename(tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match="holds something else"):
        install(tmp_path)


@slow
def test_a_failed_install_is_said_and_can_be_repeated(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(comet, "REQUIREMENTS", tmp_path / "wanted.txt")
    (tmp_path / "wanted.txt").write_text("./no-such-package.whl\n")
    monkeypatch.setattr(sys, "argv", ["comet", "install", "--folder", str(tmp_path / "new")])
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"installing wanted.txt.* failed \(exit code 1\)"):
            comet.main()
        assert not (tmp_path / "new" / "ready").exists()
    assert "no-such-package" in capfd.readouterr().err


# ------------------------------------------------------------------ with COMET's environment


@pytest.fixture(scope="module")
def scorers(comet_python, comet_checkpoints):
    """One worker for each kind, all at once."""
    kinds = ("regression", "kiwi", "unified", "xcomet", "referenceless")
    made = {
        kind: Comet(str(comet_checkpoints / kind), python=comet_python, batch_size=8)
        for kind in kinds
    }
    yield made
    for scorer in made.values():
        scorer.close()


@pytest.fixture(scope="module")
def texts():
    """Of mixed lengths; some empty, some longer than the encoder takes."""
    made = rows(40)
    made[5]["mt"] = " ".join(["xyzzy"] * 600)
    made[9]["mt"] = made[10]["ref"] = ""
    return made


@pytest.fixture(scope="module")
def expected(comet_python, comet_checkpoints, texts, tmp_path_factory):
    """What the library's `predict` gives, and the worker's code in half precision."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, texts)))
    script = str(ROOT / "tests" / "tiny_comet.py")
    command = [comet_python, "-W", "ignore", script, "scores", str(comet_checkpoints), str(file)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def without_references(given):
    return [{"src": row["src"], "mt": row["mt"]} for row in given]


@slow
@pytest.mark.parametrize("kind", ["regression", "kiwi", "unified", "xcomet", "referenceless"])
def test_scores_are_those_of_predict(kind, scorers, expected, texts):
    assert len(set(expected[kind]["predict"])) > 30
    assert scorers[kind].score(texts) == pytest.approx(expected[kind]["predict"], abs=1e-5)


@slow
@pytest.mark.parametrize("kind", ["unified", "xcomet"])
def test_scores_without_references_are_those_of_predict(kind, scorers, expected, texts):
    found = scorers[kind].score(without_references(texts))
    assert found == pytest.approx(expected[f"{kind} without references"]["predict"], abs=1e-5)
    assert found != pytest.approx(expected[kind]["predict"], abs=1e-3)


@slow
@pytest.mark.parametrize("dtype, error", [("bfloat16", 3e-3), ("float16", 3e-4)])
def test_half_precision_is_close(dtype, error, expected):
    """In the middle: XCOMET counts marked words, and a word on the threshold may change sides."""
    for case, scores in expected.items():
        pairs = zip(scores["predict"], scores[dtype], strict=True)
        assert statistics.median(abs(a - b) for a, b in pairs) < error, case
        assert scores["predict"] != scores[dtype], case


@slow
def test_a_worker_in_half_precision_scores_as_its_code_does(
    comet_python, comet_checkpoints, expected, texts
):
    folder = str(comet_checkpoints / "xcomet")
    with Comet(folder, dtype="bfloat16", batch_size=8, python=comet_python) as scorer:
        assert scorer.score(texts) == pytest.approx(expected["xcomet"]["bfloat16"], abs=1e-5)
        assert scorer.about["dtype"] == "bfloat16"


@slow
def test_the_order_of_rows_changes_no_score(scorers):
    given = rows(100, seed=1)
    scores = scorers["regression"].score(given)
    order = random.Random(2).sample(range(100), 100)
    shuffled = scorers["regression"].score([given[i] for i in order])
    assert shuffled == pytest.approx([scores[i] for i in order], abs=1e-5)
    assert scorers["regression"].score([given[7]]) == pytest.approx([scores[7]], abs=1e-5)


@slow
def test_about_tells_what_scores(scorers, comet_checkpoints):
    about = {kind: scorer.ready() for kind, scorer in scorers.items()}
    assert {kind: a["needs_reference"] for kind, a in about.items()} == {
        "regression": True, "kiwi": False, "unified": False, "xcomet": False,
        "referenceless": False,
    }  # fmt: skip
    assert [k for k, a in about.items() if a["takes_reference"]] == [
        "regression", "unified", "xcomet"
    ]  # fmt: skip
    kiwi = about["kiwi"]
    assert kiwi["path"] == str(comet_checkpoints / "kiwi" / "checkpoints" / "model.ckpt")
    assert (kiwi["class"], kiwi["comet"], kiwi["revision"]) == ("UnifiedMetric", "2.2.7", None)
    assert kiwi["parameters"] > 10_000


@slow
def test_missing_references_are_named_before_anything_is_sent(scorers):
    calls = scorers["regression"].calls
    with pytest.raises(ValueError, match=r"/regression needs references: rows must have 'ref'"):
        scorers["regression"].score(rows(2, ref=False))
    assert scorers["regression"].calls == calls


@slow
def test_the_workers_own_error_is_raised_and_it_lives_on(scorers):
    pid = scorers["kiwi"].process.pid
    with pytest.raises((ValueError, RuntimeError), match="kiwi on cpu: "):
        scorers["kiwi"].score([{"src": "a", "mt": "\ud800"}])
    assert len(scorers["kiwi"].score(rows(2))) == 2
    assert scorers["kiwi"].process.pid == pid


@slow
def test_ten_thousand_segments_do_not_leak(scorers):
    scorer, memory = scorers["kiwi"], {}

    def measure(done, of):
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        memory[done] = int(found[1]) / 1024

    scorer.ready()
    pid = scorer.process.pid
    scores = scorer.score(rows(10_000, seed=3, longest=12), measure)
    assert len(scores) == 10_000 and scorer.process.pid == pid
    print(f"RSS {memory[2000]:.0f} MB after 2,000 rows, {memory[10_000]:.0f} MB after 10,000")
    assert memory[10_000] - memory[2000] < 30


@slow
def test_two_workers_score_at_once(scorers, expected, texts):
    kinds = ("unified", "xcomet", "unified")  # two callers share one of them
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda kind: scorers[kind].score(texts), kinds))
    for kind, scores in zip(kinds, found, strict=True):
        assert scores == pytest.approx(expected[kind]["predict"], abs=1e-5)


# Something happens inside the library when it sees certain texts.
TROUBLE = """
import os, comet, torch
from comet.models import ReferencelessRegression as Model
print("stray, before the worker's first line")
real = Model.prepare_for_inference
def prepare(self, rows):
    print("stray, in Python"); os.write(1, b"stray, no end of line")
    if any("vast" in row["mt"] for row in rows):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    self.odd = [row["mt"] == "odd" for row in rows]
    return real(self, rows)
predict = Model.predict_step
def predict_step(self, batch):
    found = predict(self, batch)
    found.scores[torch.tensor(self.odd)] = float("nan")
    return found
Model.prepare_for_inference, Model.predict_step = prepare, predict_step
"""


@slow
def test_trouble_inside_the_library_is_told(
    comet_python, comet_checkpoints, expected, texts, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(TROUBLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = str(comet_checkpoints / "referenceless")
    with Comet(folder, python=comet_python, batch_size=8) as scorer:
        scores = scorer.score(texts)
        assert scores == pytest.approx(expected["referenceless"]["predict"], abs=1e-5)
        assert "stray, no end of line" in "".join(scorer.said)
        pid = scorer.process.pid
        with pytest.raises(RuntimeError, match="row 33 has the score nan: try dtype 'float32'"):
            scorer.score([*rows(33), {"src": "a", "mt": "odd", "ref": "b"}])
        with pytest.raises(RuntimeError, match="set a smaller batch_size, or dtype 'bfloat16': CU"):
            scorer.score([{"src": "a", "mt": "vast", "ref": "b"}])
        assert len(scorer.score(rows(3))) == 3 and scorer.process.pid == pid


@slow
def test_a_worker_killed_in_a_call_is_replaced_and_the_scores_are_right(scorers, expected, texts):
    scorer, killed = scorers["referenceless"], []
    scorer.ready()

    def kill(done, of):
        if not killed:
            killed.append((scorer.process.pid, done))
            os.kill(scorer.process.pid, signal.SIGKILL)

    assert scorer.score(texts, kill) == pytest.approx(
        expected["referenceless"]["predict"], abs=1e-5
    )
    assert killed[0][1] < len(texts) and killed[0][0] != scorer.process.pid


@slow
def test_a_worker_killed_twice_in_a_call_is_told(scorers):
    scorer, killed = scorers["referenceless"], set()

    def kill(done, of):
        killed.add(scorer.process.pid)
        os.kill(scorer.process.pid, signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"two workers in a row: .*row \d+ of 200\) died"):
        scorer.score(rows(200), kill)
    assert len(killed) == 2


@slow
def test_a_hung_worker_is_named_and_killed_within_the_limit(scorers):
    scorer = scorers["referenceless"]
    scorer.ready()
    pid, scorer.silence_limit = scorer.process.pid, 1.5

    def freeze(done, of):
        os.kill(pid, signal.SIGSTOP)

    begun = time.monotonic()
    with pytest.raises(TimeoutError) as error:
        scorer.score(rows(400, longest=100), freeze)
    assert time.monotonic() - begun < 10 and gone(pid)
    assert re.search(
        rf"on cpu \(worker {pid}, scoring row \d+ of 400\): no sign of life for 1.5 s",
        str(error.value),
    )
    scorer.silence_limit = 600


PARENT = """
import sys
from eval.comet import Comet
scorer = Comet(sys.argv[1], python=sys.argv[2], batch_size=1)
scorer.ready()
print(scorer.process.pid, flush=True)
scorer.score([{"src": "a", "mt": "b"}] * 2, lambda done, of: print(done, flush=True))
"""
SLEEPY = """
import time
from comet.models import UnifiedMetric as Model
predict, calls = Model.predict_step, []
def predict_step(self, batch):
    calls.append(0)
    time.sleep(60 * (len(calls) > 1))
    return predict(self, batch)
Model.predict_step = predict_step
"""


@slow
def test_a_worker_goes_with_its_parent_in_the_middle_of_a_batch(
    comet_python, comet_checkpoints, tmp_path
):
    (tmp_path / "sitecustomize.py").write_text(SLEEPY)
    command = [sys.executable, "-c", PARENT, str(comet_checkpoints / "kiwi"), comet_python]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    pid = int(parent.stdout.readline())
    assert int(parent.stdout.readline()) == 1
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid)


@slow
def test_an_idle_worker_goes_with_its_parent(comet_python, comet_checkpoints):
    """And while it still loads: nobody waits for it here."""
    idle = PARENT.partition("scorer.ready()")[0] + "print(scorer.process.pid)"
    command = [sys.executable, "-c", idle, str(comet_checkpoints / "kiwi"), comet_python]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert gone(int(said.stdout))


@slow
def test_the_command_line_scores_a_file(comet_python, comet_checkpoints, expected, texts, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, texts)))
    command = [sys.executable, "-m", "eval.comet", "score", "--file", str(tmp_path / "rows.jsonl")]
    command += ["--checkpoint", str(comet_checkpoints / "regression")]
    environment = os.environ | {"SSR_COMET_PYTHON": comet_python}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    scores = [float(line) for line in run.stdout.split()]
    assert scores == pytest.approx(expected["regression"]["predict"], abs=1e-5), run.stderr


# ----------------------------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, for the folders and the gated ids that its server knows."""

    def do_GET(self):
        found = re.fullmatch(r"/api/models/(.+?/.+?)(?:/revision/main)?", self.path)
        found = found or re.fullmatch(r"/(.+?/.+?)/resolve/[^/]+/(.+)", self.path)
        folder = self.server.folders.get(found[1])
        self.server.asked.append(self.path)
        if folder is None:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if self.path.startswith("/api/"):
            files = [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]
            about = {"id": found[1], "sha": "5" * 40, "siblings": [{"rfilename": f} for f in files]}
            return self.answer(200, {}, json.dumps(about).encode())
        if found[1] in self.server.gated:
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        self.answer(200, {"X-Repo-Commit": "5" * 40}, (folder / found[2]).read_bytes())

    do_HEAD = do_GET

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        headers |= {"Content-Length": str(len(body)), "ETag": f'"{hash(body) & 0xFFFF_FFFF:08x}"'}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(comet_checkpoints, tmp_path, monkeypatch):
    """A hub with the tiny kiwi, whose encoder comes from the hub, too."""
    shutil.copytree(comet_checkpoints / "kiwi", tmp_path / "kiwi")
    hparams = tmp_path / "kiwi" / "hparams.yaml"
    here = str(comet_checkpoints / "XLM-RoBERTa")
    hparams.write_text(hparams.read_text().replace(here, "some/encoder"))
    file = tmp_path / "kiwi" / "checkpoints" / "model.ckpt"
    saved = torch.load(file, weights_only=False)
    saved["hyper_parameters"]["pretrained_model"] = "some/encoder"
    torch.save(saved, file)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folders = {
        "some/kiwi": tmp_path / "kiwi",
        "some/gated": tmp_path / "kiwi",
        "some/encoder": comet_checkpoints / "XLM-RoBERTa",
    }
    server.gated, server.asked = {"some/gated"}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


@slow
def test_a_checkpoint_comes_from_the_hub_and_then_from_the_cache(
    hub, comet_python, scorers, monkeypatch
):
    given = rows(5)
    right = pytest.approx(scorers["kiwi"].score(given), abs=1e-5)
    with Comet("some/kiwi", python=comet_python) as scorer:
        assert scorer.score(given) == right
        assert scorer.about["revision"] == "5" * 40
    assert any("some/encoder" in path for path in hub.asked)
    asked = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with Comet("some/kiwi", python=comet_python) as scorer:
        assert scorer.score(given) == right
    assert len(hub.asked) == asked


@slow
def test_what_the_hub_refuses_is_told(hub, comet_python, monkeypatch):
    with (
        Comet("some/gated", python=comet_python) as scorer,
        pytest.raises(RuntimeError, match=r"open https://huggingface.co/some/gated, accept the li"),
    ):
        scorer.ready()
    with (
        Comet("some/nothing", python=comet_python) as scorer,
        pytest.raises(ValueError, match="no file and no folder here, and the hub knows no such id"),
    ):
        scorer.ready()
    hub.gated.add("some/encoder")
    with (
        Comet("some/kiwi", python=comet_python) as scorer,
        pytest.raises(RuntimeError, match=r"open https://huggingface.co/some/encoder, accept the"),
    ):
        scorer.ready()


@slow
@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "HF_ENDPOINT"])
def test_no_network_is_told(how, hub, comet_python, monkeypatch):
    monkeypatch.setenv(how, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}[how])
    said = "wmt22-comet-da is not in the cache and the hub is not reached: .*`hf download Unbabel/"
    with Comet("comet22", python=comet_python) as scorer, pytest.raises(RuntimeError, match=said):
        scorer.ready()


@slow
def test_an_incomplete_folder_is_told(comet_python, comet_checkpoints, tmp_path):
    shutil.copytree(comet_checkpoints / "kiwi", tmp_path / "kiwi")
    (tmp_path / "kiwi" / "hparams.yaml").unlink()
    for given in (tmp_path / "kiwi", tmp_path / "kiwi" / "checkpoints" / "model.ckpt"):
        with (
            Comet(str(given), python=comet_python) as scorer,
            pytest.raises(ValueError, match=r"is incomplete: there is no .*hparams.yaml"),
        ):
            scorer.ready()
    with (
        Comet(str(tmp_path / "none"), python=comet_python) as scorer,
        pytest.raises(ValueError, match="is no file, no folder and no id of the hub"),
    ):
        scorer.ready()
