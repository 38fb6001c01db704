"""What is learned and who judges, on the way that your own model and texts take."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from sacrebleu import sentence_chrf

import ssr
from data.codec import PromptCodec, load_tokenizer
from eval.__main__ import parse as parse_eval
from eval.judge import parse as parse_judge
from judge import PAPER, PLAIN, Judge, Task, average_judgements, shown_translation, translation_in
from rewards import build
from run import estimate, problem, settings
from tests import corpora, runs
from tests.processes import ROOT
from tests.runs import PAPER as SMALL
from tests.runs import num_lines, rows_of, wait_for, write_rows
from tests.test_data import small_sets, wmt  # noqa: F401 (fixtures)
from tests.test_remote import chat, environment, serve  # noqa: F401 (fixtures)
from tests.tiny import make_model, make_pupil, make_tokenizer


def go(pupil, texts, run, *words):
    return runs.go(run, pupil, f"--data={texts}", *words, small=SMALL)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file in both directions, with references."""
    rows = []
    for i in range(12):
        sides = (corpora.english("news", i), "en"), (corpora.chinese("news", i), "zh")
        for (text, source), (reference, target) in (sides, sides[::-1]):
            rows.append({"text": text, "source": source, "target": target, "reference": reference})
    return write_rows(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)


@pytest.fixture(scope="module")
def run(pupil, texts, tmp_path_factory):
    """Two steps with the paper's prompts; --resume finds nothing to resume."""
    path, out = tmp_path_factory.mktemp("problem") / "run", io.StringIO()
    with contextlib.redirect_stdout(out):
        rows = go(pupil, texts, path, "--steps=2", "--resume")
    return SimpleNamespace(path=path, rows=rows, out=out.getvalue())


def test_the_papers_prompts_earn_a_reward(run):
    rows = run.rows
    assert rows[1]["reward/format"] > 0.3 and 0 < rows[1]["reward/self"] < 1
    assert rows[1]["groups/zero_variance"] < 1 and rows[1]["train/grad_norm"] > 0
    assert "texts.jsonl: 24 texts read, 24 kept\n24 texts: 0 left" in run.out
    # Four, and what says the same in the other language.
    assert "400; 4 held out; 16 to train on" in run.out
    assert "reward self, judge live, score written" in run.out
    assert run.out.count("Answers in a wrong language are recognised by their script") == 1
    assert 0 <= rows[1]["reward/wrong_language"] <= 1
    assert "from the beginning: there is no checkpoint to go on from" in run.out


def test_held_out_translations_are_measured_with_chrf(run):
    assert 0 < run.rows[0]["eval/sampled_chrf"] < 1 and "eval/alarm" in run.rows[0]
    row = rows_of(run.path / "evaluations.jsonl")[0]
    for kind in (row["greedy"], row["sampled"]):
        for text, reference, chrf in zip(kind["text"], row["reference"], kind["chrf"], strict=True):
            theirs = sentence_chrf(text, [reference]).score / 100
            assert chrf == pytest.approx(theirs, abs=1e-4)


def test_held_out_sets_are_kept_out_of_training(pupil, texts, tmp_path, capsys):
    lines = texts.read_text().splitlines()[:6]
    (tmp_path / "held.jsonl").write_text("\n".join(lines) + "\n")
    go(pupil, texts, tmp_path / "run", f"--held-out={tmp_path / 'held.jsonl'}")
    assert "held.jsonl; 18 to train on" in capsys.readouterr().out
    shown = set(rows_of(tmp_path / "run" / "evaluations.jsonl")[0]["source"])
    assert shown <= {json.loads(line)["text"] for line in lines}


def test_a_score_that_is_read_differs_from_one_that_is_written(run, pupil, texts, tmp_path):
    rows = go(pupil, texts, tmp_path / "run", "--score-mode=expected")
    assert len(rows) == 2 and rows[0]["eval/self"] != run.rows[0]["eval/self"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("wmt17-20", "en", "zh", "wmt22")),
        (["--target=de"], ("wmt17-20", "en", "de", "wmt22")),
        (["--data=mine.jsonl"], ("mine.jsonl", "", "", "")),
    ],
)
def test_other_texts_bring_other_languages_than_the_presets(words, expected):
    s = settings.parse(["--preset=ssr-zero-7b", *words])
    assert (s.data, s.source, s.target, s.held_out) == expected


def test_the_presets_texts_come_from_wmt(pupil, tmp_path, small_sets, capsys):  # noqa: F811
    runs.go(tmp_path / "run", pupil, small=SMALL)
    out = capsys.readouterr().out
    assert "wmt17-20: 96 texts read, 96 kept" in out and "4 held out from wmt22; 96 to" in out


# ------------------------------------------------------------------------------ other judges


def test_another_model_judges(run, pupil, texts, tmp_path):
    """The policy itself as another model judges as itself at the start."""
    same = go(pupil, texts, tmp_path / "same", f"--judge={pupil}")
    assert same[1]["reward/self"] == run.rows[1]["reward/self"]
    assert same[0]["eval/self"] == run.rows[0]["eval/self"]


def test_a_judge_whose_tokenizer_needs_more_tokens_has_room_for_them(pupil, texts, tmp_path):
    spelling = tmp_path / "spelling"
    make_model(spelling, vocab=400, positions=4096)
    make_tokenizer(spelling, ("",), 259)  # a token for each byte
    rows = [row | {"text": f"{row['text']} " * 15} for row in rows_of(texts)]
    long = write_rows(tmp_path / "long.jsonl", [row for row in rows if row["source"] == "en"])
    go(pupil, long, tmp_path / "run", f"--judge={spelling}")
    for row in rows_of(tmp_path / "run" / "evaluations.jsonl"):
        assert "too long to judge" not in row["greedy"]["judge"] + row["sampled"]["judge"]


def test_what_was_replaced_is_noticed_at_resume(pupil, texts, tmp_path, monkeypatch):
    model, judge = tmp_path / "model", tmp_path / "judge"
    shutil.copytree(pupil, model), shutil.copytree(pupil, judge)
    options = ["--chat", f"--judge={judge}"]
    go(model, texts, tmp_path / "run", *options)
    for file, message in (
        (judge / "model.safetensors", "the judge's weights, tokenizer or chat template"),
        (model / "chat_template.jinja", "the weights, tokenizer or chat template"),
    ):
        content = file.read_bytes()
        binary = file.suffix == ".safetensors"
        file.write_bytes(content[:-20_000] + bytes(20_000) if binary else content + b" ")
        with pytest.raises(SystemExit, match=f"another run: .*{message} it began with"):
            go(model, texts, tmp_path / "run", *options, "--resume", "--steps=2")
        file.write_bytes(content)
    monkeypatch.setattr(ssr, "identifier_version", lambda: "py3langid 0.4.9")
    with pytest.raises(SystemExit, match="the language identifier it began with"):
        go(model, texts, tmp_path / "run", *options, "--resume", "--steps=2")


def test_an_endpoint_judges(pupil, texts, tmp_path, serve):  # noqa: F811
    def script(request, number):
        return chat(f"<answer>{10 + len(request['messages'][0]['content']) % 80}</answer>")

    server = serve(script=script)
    words = [f"--judge-url={server.address}/v1", "--judge=big"]
    rows = go(pupil, texts, tmp_path / "run", *words)
    assert {request["model"] for request in server.requests} == {"big"}
    assert 0.1 <= rows[0]["eval/self"] <= 0.9 and rows[1]["reward/self"] > 0
    assert rows[1]["judge/invalid"] == 0


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--eval-metrics=chrf,blue", "'blue' is no checkpoint of COMET's: use comet22"),
        ("--reward=self+comet", r"has no COMET: .*python -m eval.comet install"),
        ("--held-out=wmt22", "wmt22: of which languages\\? Write it like wmt22:en-zh"),
        ("--eval-prompts=30", "24 of 24 texts have a prompt .*, and at least 31 are needed"),
        ("--max-prompt-tokens=20", "0 of 24 texts have a prompt within --max-prompt-tokens 20"),
        (
            "--data=bare.jsonl --eval-metrics=chrf",
            "--eval-metrics chrf needs a reference of every held-ou",
        ),
        ("--data=broken.jsonl", "broken.jsonl, line 2: not JSON"),
        ("--held-out=long.jsonl", "long.jsonl: 0 of 1 texts have a prompt within --max-prompt-tok"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_is_written(
    pupil, texts, tmp_path, words, message, monkeypatch
):
    monkeypatch.setenv("SSR_COMET_PYTHON", sys.executable)  # a Python without COMET
    monkeypatch.chdir(tmp_path)
    row = {"text": "long " * 900, "source": "en", "target": "zh", "reference": "x"}
    write_rows(tmp_path / "long.jsonl", [row])
    write_rows(tmp_path / "bare.jsonl", [row | {"reference": None} for row in rows_of(texts)])
    (tmp_path / "broken.jsonl").write_text(json.dumps(row) + "\n{broken\n")
    with pytest.raises(SystemExit, match=f"(?s)^ssr.py: .*{message}"):
        go(pupil, texts, tmp_path / "run", *words.split())
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- templates and thoughts


THOUGHT = "<think>\nAn <answer> of 100?\n</think>\n\n"
FORM = "<think> 90 </think> <answer> gut </answer>"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A model with a tokenizer like Qwen3's that has learned to think, then to translate or judge;
    its thoughts stand between tokens of their own."""
    folder, lessons = tmp_path_factory.mktemp("thinker"), []
    for i in range(4):
        task = Task(corpora.english("news", i), "English", "Chinese", corpora.chinese("news", i))
        score = f"<answer> {50 + 5 * i} </answer>"
        asked = PLAIN.ask_judge(task, task.reference)
        for prompt, answer in ((PLAIN.ask(task), task.reference), (asked, score)):
            turn = f"<|im_start|>user\n{''.join(prompt)}<|im_end|>\n<|im_start|>assistant\n"
            lessons.append((turn, f"<think>\nok 97\n</think>\n\n{answer}"))
    make_pupil(folder, lessons, steps=40, thinks=True)
    return folder


@pytest.fixture(scope="module")
def codecs(thinker, tmp_path_factory):
    """Without a template, with thinking off and on, and a template that always begins to think."""
    always = shutil.copytree(thinker, tmp_path_factory.mktemp("always") / "always")
    file = always / "chat_template.jinja"
    before, switch, _ = file.read_text().partition("{% if enable_thinking")
    assert switch
    file.write_text(f"{before}{{{{ '<think>\\n' }}}}{{% endif %}}")
    chats = {"no": False, "off": True, "on": "thinking"}
    codecs = {name: problem.load_codec(thinker, chat) for name, chat in chats.items()}
    return codecs | {"always": problem.load_codec(always, True)}


def written(codec, text, letters=False, stopped=True):
    """A sample of that text, with the tokens that the tokenizer makes of it, or of each letter."""
    ids = [i for piece in codec.pieces([*text] if letters else [text]) for i in piece]
    return SimpleNamespace(ids=[*ids, codec.stop_ids[0]] if stopped else ids, stopped=stopped)


def test_the_templates_switch_for_thinking_is_set_and_said(codecs):
    said = {
        "no": (":\na", ""),
        "off": (
            "assistant\n<think>\n\n</think>\n\n",
            "Thinking is off (--chat thinking turns it on)",
        ),
        "on": ("assistant\n", "Thinking is on in the chat template"),
        "always": ("assistant\n<think>\n", "The chat template begins every answer with <think>"),
    }
    for name, codec in codecs.items():
        (ids,) = codec.encode([PLAIN.ask(Task("a", "English", "German"))])
        end, note = said[name]
        assert codec.decode(ids).endswith(end) and "".join(codec.notes).startswith(note)
        assert len(codec.notes) == bool(note)


@pytest.mark.parametrize("letters", [False, True], ids=["tokens", "letters"])
@pytest.mark.parametrize(
    ("prompts", "text", "right"),
    [
        (PLAIN, "gut", "no off on"),
        (PLAIN, f"{THOUGHT}gut", "no off on always"),
        (PLAIN, "a <think>?\n</think>\n\ngut", "always"),
        (PLAIN, "gut <think>", ""), (PLAIN, THOUGHT, ""), (PLAIN, "<think>\ngut", ""),
        (PLAIN, f"{THOUGHT}a <think> b </think> gut", ""),
        (PAPER, FORM, "no off on always"),
        (PAPER, THOUGHT + FORM, "no off on always"),
        (PAPER, f"{THOUGHT}<answer>gut</answer>", "no off on always"),
        (PAPER, "<answer>gut</answer>", "off"),
        (PAPER, "a <answer>?\n</think>\n\n<answer>gut</answer>", "always"),
        (PAPER, FORM + FORM, ""), (PAPER, f"{THOUGHT}gut", ""),
        (PAPER, "<think> a <answer>gut</answer>", ""), (PAPER, f"{FORM} <think>", ""),
    ],
)  # fmt: skip
def test_what_follows_the_thinking_is_judged_and_shown(codecs, prompts, text, right, letters):
    task = Task("good", "English", "German")
    for name, codec in codecs.items():
        whole, cut = (written(codec, text, letters, stopped) for stopped in (True, False))
        expected = "gut" if name in right.split() else None
        assert translation_in(codec, prompts, task, whole) == expected, name
        assert translation_in(codec, prompts, task, cut) is None
        if expected:
            assert shown_translation(codec, prompts, task, whole) == ("gut", True)
            assert shown_translation(codec, prompts, task, cut) == ("gut", False)
        elif name == "on" and "<answer>" not in text:  # still thinking
            assert shown_translation(codec, prompts, task, cut) == (text, False)


@pytest.mark.parametrize(
    ("text", "scored"),
    [
        ("85", "no off on"), (f"{THOUGHT}85", "no off on always"),
        (f"{THOUGHT}<think> 90 </think> <answer>85</answer>", "no off on always"),
        ("<think> 90 <answer>85</answer>", ""), ("85 <think>", ""), (THOUGHT, ""),
        ("<think> <answer>85</answer> </think>", ""),
        (f"{THOUGHT}100", ""),  # an echo of the candidate
    ],
)  # fmt: skip
def test_a_score_stands_after_the_thinking(codecs, text, scored):
    question = PLAIN.ask_judge(Task("We have 100 points", "English", "German"), "100")
    for name, codec in codecs.items():
        judge = Judge(None, codec, PLAIN)
        read = average_judgements([judge.read(written(codec, text), question)])
        assert read.value == (0.85 if name in scored.split() else None), name
        cut = judge.read(written(codec, text, stopped=False), question)
        assert average_judgements([cut]).value is None


def test_tags_in_a_text_are_no_tokens_of_the_prompt(codecs):
    """Neither in a source nor in a candidate, with any template."""
    task, words = Task("Say <think> 100 </think>", "English", "German"), "Sag <think>100</think>"
    for codec in codecs.values():
        for ask in (PLAIN.ask, PAPER.ask, lambda task: PLAIN.ask_judge(task, words)):
            ids = codec.encode([ask(task), ask(task._replace(text="a"))])
            harmful, harmless = ([i for i in row if i in codec.control_ids] for row in ids)
            assert harmful == harmless
        # A translation that has to keep them earns nothing, as with any model.
        assert translation_in(codec, PLAIN, task, written(codec, words)) is None


def test_a_model_that_thinks_learns_from_what_follows(thinker, texts, tmp_path):
    """Its translations and its judgements: each has a number in its thoughts."""
    english = [row for row in rows_of(texts) if row["source"] == "en"]
    file = write_rows(tmp_path / "texts.jsonl", english)
    words = ["--prompts=plain", "--chat", "thinking"]
    row = go(thinker, file, tmp_path / "run", *words)[1]
    assert row["reward/format"] > 0.1 < row["reward/self"] and row["train/grad_norm"] > 0
    shown = rows_of(tmp_path / "run" / "evaluations.jsonl")[0]["greedy"]
    names = ("format", "self", "text", "judge")
    judged = [x for x in zip(*(shown[name] for name in names), strict=True) if x[0] and x[1]]
    assert judged
    for _, score, text, words in judged:
        assert "think>" not in text and words.startswith("<think>\nok") and score != 0.97


def test_thinking_that_cannot_work_is_refused_in_one_sentence(tmp_path):
    make_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: --chat thinking needs .* use --chat alone"):
        PromptCodec(load_tokenizer(tmp_path), chat="thinking")


def parse_ssr(words):
    return settings.parse(["--preset=ssr-zero-0.5b", f"--data={ROOT / 'ssr.py'}", *words])


@pytest.mark.parametrize(
    "parse",
    [parse_ssr, lambda words: parse_eval(["--model=x", *words]),
     lambda words: parse_judge(["--model=x", "rows.jsonl", *words])],
    ids=["ssr", "eval", "eval.judge"],
)  # fmt: skip
def test_chat_is_a_switch_that_may_have_a_value(parse, capsys):
    for words, value in ([], False), (["--chat"], True), (["--chat", "thinking"], "thinking"):
        assert parse([*words, "--max-num-seqs=4"]).chat == value
    with pytest.raises((ValueError, SystemExit)) as error:
        parse(["--chat=maybe"])
    assert "argument --chat: invalid choice: 'maybe'" in f"{error.value}{capsys.readouterr().err}"


def test_a_template_with_a_clock_makes_the_same_prompts_tomorrow(tmp_path):
    make_tokenizer(tmp_path)
    file = tmp_path / "chat_template.jinja"
    file.write_text("{{ strftime_now('%d %B %Y') }}, " + file.read_text())
    codec = PromptCodec(load_tokenizer(tmp_path), chat=True)
    assert codec.turn[0].startswith("26 July 2024, <|im_start|>system")
    assert "2024-07-26 is used instead, so that prompts do not change" in codec.notes[0]
    file.write_text("{% set form = '%H' %}{{ strftime_now(form) }}" + file.read_text())
    with pytest.raises(ValueError, match="the chat template reads the clock"):
        PromptCodec(load_tokenizer(tmp_path), chat=True)


# ------------------------------------------------------------------ COMET and rewards of your own


class Comet:
    """Stands where COMET's client would."""

    about = {"needs_reference": False, "takes_reference": True, "control": ["</s>"]}  # noqa: RUF012

    def __init__(self):
        self.scored = []

    def ready(self):
        return self.about

    def score(self, rows):
        self.scored += rows
        return [0.3] * len(rows)


def test_comets_weight_reaches_the_reward_and_references_only_the_measure():
    comets = build.CometWorkers(None, None)
    comets.started["x/y"] = comet = Comet()
    words = ["--preset=ssr-x-zero-7b", "--comet=x/y"]
    s = settings.parse([*words, "--comet-weight=2"])
    scorers = build.build_scorers(s, "the judge", comets)
    assert scorers["self"] == (1.0, "the judge") and scorers["comet"][0] == 2.0
    task = Task("A </s> b", "English", "German", "c")
    ((score,),) = scorers["comet"][1]([task], [["d </s>"]], 1)
    assert score.value == pytest.approx(0.3)
    # What COMET's tokenizer takes for the end of a text cannot come from one.
    assert comet.scored == [{"src": "A < /s> b", "mt": "d < /s>"}]
    for referenced in (False, True):
        assert comets.measure("x/y", referenced)([Task("a", "", "", "r")], ["c"]) == [0.3]
    assert comet.scored[1:] == [{"src": "a", "mt": "c"}, {"src": "a", "mt": "c", "ref": "r"}]
    comet.about = comet.about | {"needs_reference": True}
    with pytest.raises(ValueError, match=r"cannot score without a reference, .* use one that"):
        build.build_scorers(s, "the judge", comets)


OWN = """
from judge import Score

def asking(tasks, answers, step):
    return [[Score(0.25, t.reference) for _ in row] for t, row in zip(tasks, answers)]

asking.references = True
external = asking
"""


def test_a_reward_of_your_own_is_known_by_its_whole_name(tmp_path):
    """Whatever words of other rewards its file's name holds."""
    file = tmp_path / "self-comet.py"
    file.write_text(OWN)
    (tmp_path / "broken.py").write_text("def f(:")
    for reward, names in ((f"{file}:external", ["external"]),
                          (f"self+{file}:external", ["self", "external"])):  # fmt: skip
        s = settings.parse(["--preset=ssr-zero-7b", "--data=x.jsonl", f"--reward={reward}"])
        comets = build.CometWorkers(s, None)
        assert list(build.build_scorers(s, "the judge", comets)) == names and not comets.started
        work = estimate.Workload(s, None, 1, 0, False)
        assert work.comets == [] and work.judgements == len(names) - 1
    for reward, message, *more in (
        (f"{file}:external", "no other model judges", "--judge=x/y"),
        (f"{file}:external+{file}:external", "two of its parts have the same name"),
        (f"{tmp_path / 'broken.py'}:f", r"broken\.py:f: SyntaxError: "),
    ):
        with pytest.raises(ValueError, match=message):
            settings.parse([f"--reward={reward}", "--preset=toy", *more])


def test_a_reward_of_your_own_learns_and_is_part_of_the_run(pupil, texts, tmp_path):
    file, run = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(OWN)
    words = [f"--reward=self+{file}:asking"]
    rows = go(pupil, texts, run, *words)
    assert rows[1]["reward/asking"] == pytest.approx(0.25 * rows[1]["reward/format"])
    assert rows[1]["reward/self"] > 0
    bare = tmp_path / "bare.jsonl"
    bare.write_text(texts.read_text().replace('"reference"', '"note"'))
    with pytest.raises(SystemExit, match=r'mine\.py:asking needs a "reference" of every text'):
        go(pupil, bare, tmp_path / "other", *words)
    file.write_text(OWN.replace("0.25", "0.5"))
    with pytest.raises(SystemExit, match=r"file of --reward .*mine\.py:asking it began with"):
        go(pupil, texts, run, *words, "--resume", "--steps=2")


# --------------------------------------------------------------------------------- slow proofs


@pytest.mark.slow
def test_the_papers_preset_steps_with_nothing_replaced_but_model_and_data(pupil, texts, tmp_path):
    """128 prompts × 8 samples of up to 1,024 tokens, 64 slots, 256 held-out texts, on two ranks;
    asked to stop after its first step, it keeps that."""
    many = [r | {"text": r["text"].replace("news", f"news {n}")}
            for n in range(20) for r in rows_of(texts)]  # fmt: skip
    file, run = write_rows(tmp_path / "many.jsonl", many), tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = ["--preset=ssr-zero-7b", f"--model={pupil}", f"--data={file}", f"--folder={run}"]
    process = subprocess.Popen([sys.executable, *torchrun, "ssr.py", *words], cwd=ROOT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    with contextlib.suppress(AssertionError):  # what it printed says why
        wait_for(lambda: process.poll() is not None or num_lines(run / "metrics.jsonl") > 1, 400)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=300)
    assert "128 prompts × 8 samples = 1024 translations" in out, error
    assert "stopped after step" in out and "go on with --resume" in out
    rows = rows_of(run / "metrics.jsonl")
    assert rows[1]["reward/self"] > 0 and rows[1]["train/grad_norm"] > 0
    assert list((run / "checkpoints").glob("step-*")) and (run / "last" / "config.json").exists()
