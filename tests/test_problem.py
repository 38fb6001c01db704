"""What is learned and who judges, on the way that your own model and texts take."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import plan
import problem
import remote
import rzero
import ssr
from eval import __main__ as evaluate
from judge import PAPER, PLAIN, Reward, Score, Task, Texts, translation_in
from model import load_tokenizer
from tests import corpora
from tests.test_data import wmt  # noqa: F401 (a fixture)
from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--preset=ssr-zero-7b", "--steps=1", "--prompts-per-step=4", "--samples-per-prompt=4"),
    *("--max-new-tokens=60", "--judge-max-new-tokens=40", "--max-prompt-tokens=400"),
    *(
        "--eval-prompts=4",
        "--eval-every=1",
        "--slots=16",
        "--threads=1",
        "--no-report",
    ),
]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file in both directions, with references."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = []
    for i in range(12):
        sides = (corpora.english("news", i), "en"), (corpora.chinese("news", i), "zh")
        for (text, source), (reference, target) in (sides, sides[::-1]):
            rows.append({"text": text, "source": source, "target": target, "reference": reference})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def go(pupil, texts, run, *words):
    try:
        ssr.main([*SMALL, f"--model={pupil}", f"--data={texts}", f"--folder={run}", *words])
    except SystemExit as error:
        if error.code != 3:  # nothing was learned: so short a run may do that
            raise
    return rows_of(run / "metrics.jsonl")


def test_the_papers_prompts_earn_a_reward(pupil, texts, tmp_path, capsys):
    rows = go(pupil, texts, tmp_path / "run", "--steps=2")
    assert rows[1]["reward/format"] > 0.3 and 0 < rows[1]["reward/self"] < 1
    assert rows[1]["groups/zero_variance"] < 1 and rows[1]["train/grad_norm"] > 0
    out = capsys.readouterr().out
    assert "texts.jsonl: 24 texts read, 24 kept, 24 with a reference\n24 texts: 0 left" in out
    # Four, and what says the same in the other language.
    assert "--max-prompt-tokens 400; 4 held out, 4 left out that repeat held-out ones; 16 to" in out
    assert "reward self, judge live, score written" in out


def test_references_are_measured_with_chrf_and_best_goes_by_it(pupil, texts, tmp_path, capsys):
    rows = go(pupil, texts, tmp_path / "run")
    assert 0 < rows[0]["eval/sampled_chrf"] < 1 and "eval/alarm" in rows[0]
    assert "chrf, greedy" in capsys.readouterr().out
    row = rows_of(tmp_path / "run" / "evaluations.jsonl")[0]
    from sacrebleu import sentence_chrf

    for kind in (row["greedy"], row["sampled"]):
        for text, reference, chrf in zip(kind["text"], row["reference"], kind["chrf"], strict=True):
            theirs = sentence_chrf(text, [reference]).score / 100
            assert chrf == pytest.approx(theirs, abs=1e-4)
    rows = go(pupil, texts, tmp_path / "none", "--measures=none")
    assert "eval/chrf" not in rows[0] and "eval/alarm" not in rows[0]


def test_the_reward_does_not_see_references(pupil, texts, tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, word in zip(files, ("A", 40 * "B"), strict=True):
        file.write_text(texts.read_text().replace('"reference": "', f'"reference": "{word}'))
    names = ("reward/total", "reward/self", "train/loss", "policy/entropy", "eval/self")
    first, second = (go(pupil, file, tmp_path / file.stem)[1] for file in files)
    assert [first[k] for k in names] == [second[k] for k in names]
    assert first["eval/sampled_chrf"] != second["eval/sampled_chrf"]


def test_held_out_sets_are_watched_and_kept_out_of_training(pupil, texts, tmp_path, capsys):
    lines = texts.read_text().splitlines()
    (tmp_path / "held.jsonl").write_text("\n".join(lines[:6]) + "\n")
    go(pupil, texts, tmp_path / "run", f"--held-out={tmp_path / 'held.jsonl'}")
    out = capsys.readouterr().out
    assert "held.jsonl, 6 left out that repeat held-out ones; 18 to train on" in out
    shown = set(rows_of(tmp_path / "run" / "evaluations.jsonl")[0]["source"])
    assert shown <= {json.loads(line)["text"] for line in lines[:6]}


@pytest.mark.parametrize(
    "words",
    [["--chat"], ["--prompts=plain"], ["--reading=expected"], ["--prompts=plain", "--chat"]],
)
def test_prompts_are_asked_otherwise_when_told(pupil, texts, tmp_path, words):
    rows = go(pupil, texts, tmp_path / "run", *words)
    assert [row["step"] for row in rows] == [0, 1]


def test_a_chat_template_changes_what_is_asked(pupil, texts, tmp_path):
    plain, chat = (go(pupil, texts, tmp_path / f"run{len(w)}", *w) for w in ([], ["--chat"]))
    assert plain[0]["eval/self"] != chat[0]["eval/self"]


def test_other_texts_bring_other_languages_than_the_presets():
    s = ssr.parse(["--preset=ssr-zero-7b"])
    assert (s.data, s.source, s.target, s.held_out) == ("wmt17-20", "en", "zh", "wmt22")
    s = ssr.parse(["--preset=ssr-zero-7b", "--target=de"])
    assert (s.data, s.source, s.target, s.held_out) == ("wmt17-20", "en", "de", "wmt22")
    s = ssr.parse(["--preset=ssr-zero-7b", "--data=mine.jsonl"])
    assert (s.data, s.source, s.target, s.held_out) == ("mine.jsonl", "", "", "")


def test_the_presets_texts_come_from_wmt(pupil, tmp_path, wmt):  # noqa: F811
    """Nothing but sizes and the model is changed: texts and held-out texts are the preset's."""
    words = [w for w in SMALL if "--eval-every" not in w] + [f"--model={pupil}"]
    command = [sys.executable, "ssr.py", *words, f"--folder={tmp_path / 'run'}"]
    env = wmt | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "wmt17-20: 96 texts read, 96 kept" in run.stdout
    assert "4 held out from wmt22, 0 left out that repeat held-out ones; 96 to" in run.stdout
    assert "held-out chrf" in run.stdout


# ------------------------------------------------------------------------------ other judges


def test_another_model_judges(pupil, texts, tmp_path):
    """The policy itself as another model judges as itself at the start; another says otherwise."""
    own = go(pupil, texts, tmp_path / "own")
    same = go(pupil, texts, tmp_path / "same", f"--judge-model={pupil}")
    assert same[1]["reward/self"] == own[1]["reward/self"]
    assert same[0]["eval/self"] == own[0]["eval/self"]
    chat = go(pupil, texts, tmp_path / "chat", f"--judge-model={pupil}", "--judge-chat")
    assert chat[0]["eval/self"] != own[0]["eval/self"]
    # One that spells every letter has room for that.
    spelling, long = tmp_path / "spelling", tmp_path / "long.jsonl"
    make_model(spelling, vocab=400, positions=4096)
    make_tokenizer(spelling, ("",), 259)
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    rows = [row | {"text": f"{row['text']} " * 15} for row in rows if row["source"] == "en"]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    go(pupil, long, tmp_path / "far", f"--judge-model={spelling}")
    for row in rows_of(tmp_path / "far" / "evaluations.jsonl"):
        assert "too long to judge" not in row["greedy"]["judge"] + row["sampled"]["judge"]


def test_a_judge_that_was_replaced_is_noticed(pupil, texts, tmp_path):
    judge = tmp_path / "judge"
    shutil.copytree(pupil, judge)
    words = [f"--judge-model={judge}"]
    go(pupil, texts, tmp_path / "run", *words)
    weights = bytearray((judge / "model.safetensors").read_bytes())
    weights[-20_000:] = bytes(20_000)
    (judge / "model.safetensors").write_bytes(weights)
    with pytest.raises(SystemExit, match="judge's weights"):
        go(pupil, texts, tmp_path / "run", *words, "--resume", "--steps=2")


class Endpoint(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = []  # noqa: RUF012 (all requests have one)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"path": self.path})
        score = 10 + len(body["messages"][0]["content"]) % 80
        choice = {"message": {"content": f"<answer>{score}</answer>"}, "finish_reason": "stop"}
        text = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def test_an_endpoint_judges(pupil, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        rows = go(pupil, texts, tmp_path / "run", f"--judge-url={url}", "--judge-model=big")
        server.shutdown()
    assert {(x["model"], x["path"]) for x in Endpoint.asked} == {("big", "/v1/chat/completions")}
    assert 0.1 <= rows[0]["eval/self"] <= 0.9 and rows[1]["reward/self"] > 0
    assert rows[1]["judge/invalid"] == 0
    with pytest.raises(SystemExit, match=r"no answer from model 'big' in 5 tries"):
        go(pupil, texts, tmp_path / "gone", f"--judge-url={url}", "--judge-model=big")
    assert not (tmp_path / "gone").exists()


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--measures=chrf,blue"], "'blue' is no checkpoint of COMET's: use comet22"),
        (["--reward=comet", "--comet=blue"], "'blue' is no checkpoint of COMET's"),
        (["--held-out=wmt22"], "wmt22: of which languages\\? Write it like wmt22:en-zh"),
        (["--held-out=gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--measures=chrf,x/self"], "a second one is called self"),
        (["--eval-prompts=30"], "24 texts have a prompt within .*30 are to be held out"),
        (["--max-prompt-tokens=20"], "none of 24 texts has a prompt within --max-prompt-tokens 20"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_is_written(
    pupil, texts, tmp_path, words, message, monkeypatch
):
    monkeypatch.setenv("SSR_COMET_PYTHON", sys.executable)  # a Python without COMET
    with pytest.raises(SystemExit, match=f"(?s)^ssr.py: .*{message}"):
        go(pupil, texts, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_data_without_a_text_is_said_and_not_a_length(pupil, texts, tmp_path):
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.write_text("\n")
    broken.write_text("{broken\n")
    for words, said in (
        ([f"--held-out={empty}"], "empty.jsonl: 0 texts read, 0 kept"),
        ([f"--data={empty}"], "empty.jsonl: 0 texts read, 0 kept"),
        ([f"--data={broken}", "--skip-bad-lines"], "broken.jsonl: 1 texts read, 0 kept; left out"),
    ):
        with pytest.raises(SystemExit, match=f"there is no text to translate in .*{said}"):
            go(pupil, texts, tmp_path / "run", *words)


def test_a_folder_that_cannot_be_made_is_refused_before_the_model_is_looked_at(texts):
    for words in ([], ["--judge-only=rows.jsonl"]):
        with pytest.raises(SystemExit, match=r"--folder .*run: .*texts\.jsonl is not a folder"):
            ssr.main([*words, "--model=nowhere/at-all", f"--folder={texts}/run"])
    with pytest.raises(SystemExit, match=r"--folder .*run: .*texts\.jsonl is not a folder"):
        rzero.main([f"--folder={texts}/run"])


def test_a_wrong_shape_in_the_config_is_said_before_the_tokenizer_is_read(
    pupil, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(problem, "load_tokenizer", None)  # transformers would blame it
    broken = tmp_path / "model"
    shutil.copytree(pupil, broken)
    config = json.loads((broken / "config.json").read_text())
    for size, said in (
        (65, "config.json asks for"),
        (64.5, "not of its type"),
        (-64, "at least 1"),
    ):
        (broken / "config.json").write_text(json.dumps(config | {"hidden_size": size}))
        with pytest.raises(SystemExit, match=said):
            go(broken, texts, tmp_path / "run")


# ------------------------------------------------------------------------- models that think


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A model whose tokenizer is like Qwen3's: thoughts stand between tokens of their own."""
    folder = tmp_path_factory.mktemp("thinker")
    make_model(folder, vocab=400, positions=4096)
    make_tokenizer(folder, thinks=True)
    return folder


def test_a_model_that_thinks_is_refused_where_a_thought_has_no_place(thinker, texts, tmp_path):
    with pytest.raises(SystemExit, match=r"this model thinks, .*--prompts plain has no place"):
        go(thinker, texts, tmp_path / "run", "--prompts=plain", "--max-prompt-tokens=2000")
    words = [f"--model=x={thinker}", f"--sets={texts}", f"--out={tmp_path}", "--metrics=chrf"]
    with pytest.raises(SystemExit, match=r"this model thinks, .*--prompts plain has no place"):
        evaluate.main([*words, "--prompts=plain"])
    always = tmp_path / "always"
    shutil.copytree(thinker, always)
    template = (always / "chat_template.jinja").read_text()
    (always / "chat_template.jinja").write_text(f"{template}<think>\n")
    for prompts in (PAPER, PLAIN):
        with pytest.raises(ValueError, match="begins every answer with <think>"):
            problem.load_texts(always, prompts, chat=True)


def test_thinking_is_switched_off_where_the_template_can_and_the_prompts_want_none(
    thinker, texts, tmp_path, capsys
):
    tail = "<|im_start|>assistant\n"
    for prompts, more in ((PLAIN, "<think>\n\n</think>\n\n"), (PAPER, "")):
        codec = problem.load_texts(thinker, prompts, chat=True)
        (ids,) = codec.encode([prompts.ask(Task("a", "English", "German"))])
        assert codec.decode(ids).endswith(tail + more)
        assert ("Thinking is disabled" in capsys.readouterr().out) == bool(more)
    answer = codec.pieces(["gut"])[0]
    sample = SimpleNamespace(ids=[*answer, codec.stop_ids[0]], stopped=True)
    assert translation_in(codec, PLAIN, Task("a", "English", "German"), sample) == "gut"
    words = ["--prompts=plain", "--chat", "--max-prompt-tokens=2000"]
    assert len(go(thinker, texts, tmp_path / "run", *words)) == 2


# --------------------------------------------------------------------- templates and tokenizers


def test_a_template_with_a_clock_makes_the_same_prompts_tomorrow(tmp_path, capsys):
    make_tokenizer(tmp_path)
    file = tmp_path / "chat_template.jinja"
    file.write_text("{{ strftime_now('%d %B %Y') }}, " + file.read_text())
    texts = Texts(load_tokenizer(tmp_path), chat=True)
    assert texts.turn[0].startswith("26 July 2024, <|im_start|>system")
    assert "2024-07-26 is used instead, so that prompts do not change" in texts.notes[0]
    file.write_text("{% set form = '%H' %}{{ strftime_now(form) }}" + file.read_text())
    with pytest.raises(ValueError, match="the chat template reads the clock"):
        Texts(load_tokenizer(tmp_path), chat=True)


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja"])
def test_a_tokenizer_that_was_replaced_is_noticed(pupil, texts, tmp_path, file):
    model, judge = tmp_path / "model", tmp_path / "judge"
    shutil.copytree(pupil, model), shutil.copytree(pupil, judge)
    words = ["--chat", f"--judge-model={judge}"]
    go(model, texts, tmp_path / "run", *words)
    for folder, whose in ((judge, "the judge's tokenizer"), (model, "the tokenizer")):
        (folder / file).write_text((folder / file).read_text() + " ")
        with pytest.raises(SystemExit, match=f"{whose} or chat template it began with"):
            go(model, texts, tmp_path / "run", *words, "--resume", "--steps=2")
        (folder / file).write_text((pupil / file).read_text())
    go(model, texts, tmp_path / "run", *words, "--resume", "--steps=2")


def test_missing_references_and_a_missing_comet_are_said(pupil, texts, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps(r | {"reference": None}) + "\n" for r in rows))
    with pytest.raises(SystemExit, match="--measures chrf needs a reference of every held-out"):
        go(pupil, bare, tmp_path / "run", "--measures=chrf")
    monkeypatch.setenv("SSR_COMET_PYTHON", sys.executable)
    with pytest.raises(
        SystemExit, match=r'--comet-references: not all texts .* have a "reference"'
    ):
        go(pupil, bare, tmp_path / "run", "--reward=comet", "--comet-references")
    with pytest.raises(SystemExit, match=r"has no COMET: .*python -m eval.comet install"):
        go(pupil, texts, tmp_path / "run", "--reward=self+comet")
    monkeypatch.setenv("SSR_COMET_PYTHON", "/no/python")
    with pytest.raises(SystemExit, match="/no/python is no program: name COMET's Python"):
        go(pupil, texts, tmp_path / "run", "--reward=self+comet")
    assert not (tmp_path / "run").exists()


def test_held_out_texts_that_do_not_fit_are_not_replaced_by_others(pupil, texts, tmp_path):
    long = tmp_path / "long.jsonl"
    row = {"text": "long " * 900, "source": "en", "target": "zh", "reference": "x"}
    long.write_text(json.dumps(row) + "\n")
    with pytest.raises(
        SystemExit,
        match=r"long\.jsonl: none of 1 texts has a prompt within --max-prompt-tokens 400: raise",
    ):
        go(pupil, texts, tmp_path / "run", f"--held-out={long}")


def test_a_small_held_out_set_is_taken_whole(pupil, texts, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    row = {"text": "A short text.", "source": "en", "target": "zh", "reference": "x"}
    few.write_text("".join(json.dumps(row | {"text": f"Text {i}."}) + "\n" for i in range(2)))
    go(pupil, texts, tmp_path / "run", f"--held-out={few}")
    assert "; 2 held out from " in capsys.readouterr().out


def test_a_run_that_learns_nothing_says_so(pupil, texts, tmp_path, capsys):
    go(pupil, texts, tmp_path / "run", "--max-new-tokens=2")
    out = capsys.readouterr().out
    assert "No group of samples ever differed in its reward: nothing was learned" in out
    assert "share in the right form, greedy          0.000   0.000" in out


def test_resuming_what_is_not_there_is_said(pupil, texts, tmp_path, capsys):
    go(pupil, texts, tmp_path / "run", "--resume")
    assert "from the beginning: there is no checkpoint to go on from" in capsys.readouterr().out


class Comet:
    """Stands where COMET's client would."""

    about = {"needs_reference": False, "takes_reference": True, "control": ["</s>"]}  # noqa: RUF012

    def __init__(self):
        self.asked = []

    def ready(self):
        return self.about

    def score(self, rows):
        self.asked += rows
        return [0.3] * len(rows)


def test_comets_weight_scale_and_references_reach_the_reward():
    comets = problem.Comets(None, None)
    comets.started["x/y"] = comet = Comet()
    words = ["--preset=ssr-x-zero-7b", "--comet=x/y", "--self-weight=0.5", "--comet-weight=2"]
    s = ssr.parse([*words, "--comet-low=0.1", "--comet-high=0.5", "--comet-references"])
    scorers = problem.scorers_of(s, "the judge", comets)
    assert scorers["self"] == (0.5, "the judge") and scorers["comet"][0] == 2.0
    task = Task("A </s> b", "English", "German", "c")
    ((score,),) = scorers["comet"][1]([task], [["d </s>"]], 1)
    assert score.value == pytest.approx(0.5)
    # What COMET's tokenizer takes for the end of a text cannot come from one.
    assert comet.asked == [{"src": "A < /s> b", "mt": "d < /s>", "ref": "c"}]
    alone = problem.scorers_of(ssr.parse(["--preset=ssr-zero-7b", "--reward=comet", "--comet=x/y"]),
                               "the judge", comets)  # fmt: skip
    assert list(alone) == ["comet"] and alone["comet"][0] == 1.0
    alone["comet"][1]([task], [["d"]], 1)
    assert "ref" not in comet.asked[-1]
    comet.about = comet.about | {"needs_reference": True}
    with pytest.raises(ValueError, match="cannot score without a reference: use one that can"):
        problem.scorers_of(ssr.parse(words), "the judge", comets)


def scores_half(seen):
    def score(tasks, answers, step):
        seen.append([task.reference for task in tasks])
        return [[Score(0.5, "")] * len(row) for row in answers]

    return score


def test_references_are_shown_to_those_alone_that_ask_for_them(thinker):
    texts, task = Texts(load_tokenizer(thinker)), Task("a", "English", "German", "the truth")
    sample = SimpleNamespace(ids=[*texts.pieces(["gut"])[0], texts.stop_ids[0]], stopped=True)
    blind, asking, weighing = [], [], []
    scorers = {"one": (1.0, scores_half(blind)), "other": (1.0, scores_half(asking))}
    scorers["other"][1].references = True
    weigh = scores_half(weighing)
    reward = Reward(
        texts, PLAIN, scorers,
        weigh=lambda tasks, answers, scores, step: weigh(tasks, answers, step) and [1.0],
    )  # fmt: skip
    (judged,) = reward([task], [[sample]], 1)
    assert judged.total == [1.0]
    assert (blind, asking, weighing) == ([[None]], [["the truth"]], [[None]])


OWN = """
from judge import Score

def external(tasks, answers, step):
    return [[Score(0.25, "") for _ in row] for row in answers]

def asking(tasks, answers, step):
    return [[Score(0.25, t.reference) for _ in row] for t, row in zip(tasks, answers)]

asking.references = True
"""


def test_a_reward_of_ones_own_is_known_by_its_whole_name(tmp_path):
    """Whatever words of other rewards its file's name holds."""
    file = tmp_path / "self-comet.py"
    file.write_text(OWN)
    s = ssr.parse(["--preset=ssr-zero-7b", "--data=x.jsonl", f"--reward={file}:external"])
    comets = problem.Comets(s, None)
    assert list(problem.scorers_of(s, "the judge", comets)) == ["external"]
    assert not comets.started
    work = plan.Work(s, None, 1, 1, 0, False)
    assert work.comets == [] and work.questions == 0
    for words, said in (
        (["--judge-model=x/y"], "has nothing to judge with"),
        (["--self-weight=2"], "--self-weight has no effect"),
        (["--toy-noise=2"], "--toy-noise has no effect"),
    ):
        with pytest.raises(ValueError, match=said):
            ssr.parse([f"--reward={file}:external", "--preset=toy", *words])
    both = ssr.parse([f"--reward=self+{file}:external", "--preset=toy", "--self-weight=2"])
    assert problem.scorers_of(both, "the judge", comets)["self"] == (2.0, "the judge")
    assert plan.Work(both, None, 1, 1, 0, False).questions == 1
    with pytest.raises(ValueError, match="two of its parts have the same name"):
        ssr.parse([f"--reward={file}:external+{file}:external"])
    file.with_name("broken.py").write_text("def f(:")
    with pytest.raises(ValueError, match=r"broken\.py does not run \(SyntaxError: "):
        ssr.parse([f"--reward={file.with_name('broken.py')}:f"])


def test_a_reward_of_ones_own_learns_and_is_part_of_the_run(pupil, texts, tmp_path):
    file, run = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(OWN)
    words = [f"--reward=self+{file}:asking"]
    rows = go(pupil, texts, run, *words)
    assert rows[1]["reward/asking"] == pytest.approx(0.25) and rows[1]["reward/self"] > 0
    bare = tmp_path / "bare.jsonl"
    bare.write_text(texts.read_text().replace('"reference"', '"note"'))
    with pytest.raises(
        SystemExit, match=r'mine\.py:asking: not all texts of .* have a "reference"'
    ):
        go(pupil, bare, tmp_path / "other", *words)
    file.write_text(OWN.replace("0.25", "0.5"))
    with pytest.raises(SystemExit, match=r"the file of --reward .*mine\.py:asking it began with"):
        go(pupil, texts, run, *words, "--resume", "--steps=2")


def test_a_comet_measure_sees_references_of_all_texts_or_of_none():
    comets = problem.Comets(None, None)
    comets.started["x/y"] = comet = Comet()
    tasks = [Task("a", "English", "German", "r"), Task("b", "English", "German", None)]
    assert comets.measure("x/y", referenced=False)(tasks[:1], ["c"]) == [0.3]
    assert comets.measure("x/y", referenced=True)(tasks[:1], ["c"]) == [0.3]
    assert comet.asked == [{"src": "a", "mt": "c"}, {"src": "a", "mt": "c", "ref": "r"}]


def test_bad_lines_stop_a_run_or_are_counted(pupil, texts, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(texts.read_text() + "{broken\n")
    with pytest.raises(SystemExit, match=r"bad\.jsonl, line 25: not JSON .*--skip-bad-lines"):
        go(pupil, bad, tmp_path / "run")
    go(pupil, bad, tmp_path / "run", "--skip-bad-lines")
    out = capsys.readouterr().out
    assert "25 texts read, 24 kept, 24 with a reference; left out: 1 that cannot be read" in out
    assert "left out: " in out and "bad.jsonl, line 25: not JSON" in out


# --------------------------------------------------------------------------------- slow proofs


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_papers_preset_steps_with_nothing_replaced_but_model_and_data(
    pupil, texts, tmp_path, ranks
):
    """128 prompts × 8 samples of up to 1,024 tokens, 64 slots, 256 held-out texts; asked to stop
    after its first step, it keeps that."""
    lines = [json.loads(line) for line in texts.read_text().splitlines()]
    many = [r | {"text": r["text"].replace("news", f"news {n}")} for n in range(20) for r in lines]
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in many))
    command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={ranks}"] if ranks > 1 else [])]  # fmt: skip
    command += ["ssr.py", "--preset=ssr-zero-7b", f"--model={pupil}", f"--data={file}"]
    run, env = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, f"--folder={run}"], cwd=ROOT, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    log, deadline = run / "metrics.jsonl", time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and '"step": 1,' in log.read_text():
            break
        time.sleep(0.1)
    process.terminate()
    out, error = process.communicate(timeout=300)
    assert "128 prompts × 8 samples = 1024 translations" in out, error
    assert "stopped after step" in out
    rows = rows_of(log)
    assert rows[1]["reward/self"] > 0 and rows[1]["train/grad_norm"] > 0
    assert (run / "checkpoints" / "newest").exists() and (run / "last" / "config.json").exists()
