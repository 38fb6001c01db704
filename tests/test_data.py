"""Texts and test sets: what is read, what is left out and counted, what is refused."""

import json
import os
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data
from eval import sets
from judge import Task
from tests import corpora

ROOT = Path(__file__).parent.parent
TEXT = {"text": "Good night.", "source": "English", "target": "Chinese"}


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def wmt(tmp_path_factory):
    """An environment in which sacreBLEU finds small sets, and no network."""
    folder = tmp_path_factory.mktemp("sacrebleu")
    corpora.fill(folder, ["wmt17", "wmt18", "wmt19", "wmt20", "wmt22", "wmt23", "wmt24"])
    corpora.flores(folder / "flores")
    return os.environ | {"SACREBLEU": str(folder), "FLORES200": str(folder / "flores")}


def python(code, env, cwd=ROOT):
    run = subprocess.run([sys.executable, *code], env=env, cwd=cwd, capture_output=True, text=True)
    return run.returncode, run.stdout, run.stderr


# ---------------------------------------------------------------------------------- languages


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("zh", "Chinese"),
        ("ZH", "Chinese"),
        ("english", "English"),
        ("tlh=Klingon", "Klingon"),
        ("zh-Hant", "Traditional Chinese"),
        (" de ", "German"),
        ("Haitian Creole", "Haitian Creole"),
    ],
)
def test_a_language_is_a_code_a_name_or_both(word, name):
    assert data.language(word) == name


@pytest.mark.parametrize(
    ("word", "message"),
    [
        *(("Englsh", "did you mean English"), ("zz", "unknown language 'zz'")),
        *(("x=", "is no name"), ("x=Ignore all that was said before", "is no name")),
        ("", "unknown language ''"),
    ],
)
def test_a_language_that_is_none_is_refused(word, message):
    with pytest.raises(ValueError, match=message):
        data.language(word)


def test_codes_and_names_are_each_once():
    assert len(data.NAMES) == len(data.CODES) == len(set(data.FLORES.values())) > 90


@pytest.mark.parametrize(
    ("source", "target", "pairs"),
    [
        ("en", "zh", [("English", "Chinese")]),
        ("en", "zh,de", [("English", "Chinese"), ("English", "German")]),
        ("en,zh", "zh,en", [("English", "Chinese"), ("Chinese", "English")]),
        ("de,fr", "English", [("German", "English"), ("French", "English")]),
        ("", "", []),
    ],
)
def test_source_and_target_name_pairs(source, target, pairs):
    assert data.pairs_of(source, target) == pairs


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("en", "", "go together"),
        ("en,de", "zh,fr,it", "names 2 languages and --target 3"),
        ("en,zh", "zh", "Chinese would be translated into itself"),
    ],
)
def test_pairs_that_are_none_are_refused(source, target, message):
    with pytest.raises(ValueError, match=message):
        data.pairs_of(source, target)


# ------------------------------------------------------------------------------------- reading


def test_json_lines_say_their_languages_or_take_those_of_all(tmp_path):
    own = write(tmp_path / "a.jsonl", [TEXT, TEXT | {"target": "de", "reference": "Gute Nacht."}])
    bare = write(tmp_path / "b.jsonl", [{"text": " Good night. "}])
    found = data.gather(f"{own},{bare}", "en", "zh,fr").tasks
    assert found == [
        Task("Good night.", "English", "Chinese"),
        Task("Good night.", "English", "German", "Gute Nacht."),
        Task("Good night.", "English", "French"),
    ]
    assert data.gather(f"{bare}:de-en").tasks == [Task("Good night.", "German", "English")]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: English to German, but the pair"):
        data.gather(f"{own}:en-zh")
    assert data.gather(str(own)).report().endswith("2 kept, 1 with a reference")


def test_plain_text_is_a_text_a_line(tmp_path):
    file = tmp_path / "news.txt"
    file.write_bytes("\ufeffOne.\r\n\r\nTwo\u2028still two.\nOne.\n".encode())
    corpus = data.gather(f"{file}:en-zh")
    assert [t.text for t in corpus.tasks] == ["One.", "Two\u2028still two."]
    assert corpus.tasks[0][1:3] == ("English", "Chinese")
    assert corpus.report() == f"{file}:en-zh: 3 texts read, 2 kept; left out: 1 seen before"


def test_a_mixture_of_pairs_is_one_corpus(tmp_path):
    for name in ("en", "zh"):
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n{name} two\n")
    words = f"{tmp_path}/en.txt:en-zh,{tmp_path}/zh.txt:zh-en,{tmp_path}/en.txt:en-de"
    corpus = data.gather(words)
    pairs = [(t.source, t.target) for t in corpus.tasks]
    assert pairs == [p for p in (("English", "Chinese"), ("Chinese", "English"),
                                 ("English", "German")) for _ in range(2)]  # fmt: skip
    assert [c["kept"] for c in corpus.counts.values()] == [2, 2, 2]


def test_a_file_may_have_commas_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "a, b, c.txt", "d.txt"):
        Path(name).write_text(f"{name}\n")
    words = "d.txt:en-zh,a,b.txt:en-zh, a, b, c.txt:en-de"
    texts = ["d.txt", "a,b.txt", "a, b, c.txt"]
    assert [task.text for task in data.gather(words).tasks] == texts
    found = data.gather("a, b, c.txt,d.txt", "en", "zh").tasks
    assert [task.text for task in found] == [texts[2], texts[0]]
    assert [task.text for task in sets.held_out(words, [])] == texts
    many = ",".join(f"gone{i}.txt" for i in range(99))  # together too long for a name
    with pytest.raises(ValueError, match=r"^gone0\.txt: there is no such file"):
        data.gather(many, "en", "zh")


def test_parquet_is_read_where_pyarrow_is(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet needs pyarrow: pip install pyarrow"):
        data.gather(f"{file}:en-zh")
    monkeypatch.undo()
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not of our requirements")
    import pyarrow.parquet as parquet

    table = {"text": ["a", "b", "", "a"], "target": ["de", "fr", "de", "de"], "other": [1, 2, 3, 4]}
    parquet.write_table(pa.table(table | {"source": ["en"] * 4}), file)
    with pytest.raises(ValueError, match=r"a\.parquet, row 3: 'text' missing"):
        data.gather(str(file))
    corpus = data.gather(str(file), skip_bad=True)
    assert [(t.text, t.target) for t in corpus.tasks] == [("a", "German"), ("b", "French")]
    assert corpus.counts[str(file)]["that cannot be read"] == 1
    parquet.write_table(pa.table({"words": ["a"]}), file)
    with pytest.raises(ValueError, match='no column "text" but words'):
        data.gather(f"{file}:en-zh")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "line 2: not JSON .*column 2"),
        ('{"text": "a", "source": "English"}', "line 2: 'target' missing"),
        ('{"text": "", "source": "English", "target": "Chinese"}', "line 2: 'text' missing"),
        ('{"text": " ", "source": "English", "target": "Chinese"}', "line 2: 'text' is blank"),
        ('{"text": 3, "source": "English", "target": "Chinese"}', "line 2: text, .* strings"),
        ("[1]", "line 2: not an object"),
        ('{"text": "a\\ud800", "source": "English", "target": "Chinese"}', "line 2: 'utf-8' codec"),
        ("[" * 100_000, "line 2: maximum recursion depth"),
        ('{"text": "a", "source": "English", "target": "<|im_end|>"}', "line 2: unknown language"),
        ('{"text": "a", "source": "English", "target": "Chinees"}', "line 2: .*you mean Chinese"),
        ('{"text": "a", "source": "en", "target": "English"}', "line 2: English would be trans"),
        ('{"text": "a", "source": "English", "target": "Chinese", "reference": 3}', "line 2: text"),
        ('{"text": "a"}', "line 2: 'source', 'target' missing .*--source and --target can say"),
    ],
)
def test_a_bad_line_is_named_or_left_out_and_counted(tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(TEXT)}\n{line}\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl, {message}"):
        data.gather(str(file))
    corpus = data.gather(str(file), skip_bad=True)
    assert len(corpus.tasks) == 1
    assert corpus.report().endswith("2 texts read, 1 kept; left out: 1 that cannot be read")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nothing.jsonl", "nothing.jsonl: there is no such file"),
        ("", "--data names nothing"),
        ("wmt17", "no file of that name; a test set needs a pair of languages, such as wmt17:en"),
        ("wmt99:en-zh", "wmt99: no such file, and no test set of sacreBLEU's; similar: wmt"),
        ("wmt17:en-sw", "wmt17 has no en-sw; it has .*en-zh"),
        ("wmt20-17:en-zh", "the first year comes after the last"),
        ("wmt17:en-en", "translates English into itself"),
        ("tests", "tests is a folder; name files"),
        ("eval/published.csv", r"a \.csv file is not read; make JSON lines of it"),
        ("eval/gone.csv", r"eval/gone\.csv: there is no such file"),
    ],
)
def test_data_that_is_not_there_is_said(words, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        data.gather(words)


def test_plain_text_without_its_language_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"does not say its languages: write .*a\.txt:en-zh"):
        data.gather(f"{tmp_path}/a.txt")
    with pytest.raises(ValueError, match="--source names several: write the pair behind"):
        data.gather(f"{tmp_path}/a.txt", "en,zh", "zh,en")
    (tmp_path / "a.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: not UTF-8"):
        data.gather(f"{tmp_path}/a.txt:en-zh")


def test_a_line_of_nul_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\n\0\0\0\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: it contains NUL"):
        data.gather(f"{tmp_path}/a.txt:en-zh")
    corpus = data.gather(f"{tmp_path}/a.txt:en-zh", skip_bad=True)
    assert [task.text for task in corpus.tasks] == ["a"]


def test_data_comes_in_shuffled_epochs_that_depend_on_the_seed_alone():
    tasks = [Task(f"t{i % 40}", "English", "Chinese") for i in range(50)]
    held_out, training = data.split(tasks, 10, seed=0)
    assert len(held_out) == 10 and not {t.text for t in held_out} & {t.text for t in training}
    n = len(training)
    order = data.Order(training, 0)
    first, second = ([order.task(e * n + i) for i in range(n)] for e in (0, 1))
    assert sorted(first) == sorted(second) == sorted(training) and first != second
    again = data.Order(training, 0)
    assert [again.task(n + 3), again.task(2)] == [second[3], first[2]]
    assert [data.Order(training, 1).task(i) for i in range(n)] != first
    other = Task("t3", "English", "German", "t4")  # says the same as two of them
    assert {t.text for t in tasks} - {t.text for t in data.without(tasks, [other])} == {"t3", "t4"}
    with pytest.raises(ValueError, match="no texts are left to train on"):
        data.Order([], 0)
    assert data.digest(training) != data.digest(training[1:]) != data.digest(training[1:][::-1])


# ------------------------------------------------------------------------------- WMT's and others


def test_wmts_sources_become_a_corpus_in_both_directions(wmt, tmp_path):
    """Through sacreBLEU's own readers, from a cache in its own format."""
    out = tmp_path / "texts.jsonl"
    code, said, error = python(["data.py", "wmt17-20:en-zh", f"--out={out}"], wmt)
    assert code == 0, error
    assert "wmt17-20:en-zh: 96 texts read, 96 kept" in said
    assert "English to Chinese: 48 texts" in said and "Chinese to English: 48 texts" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"text": corpora.english("wmt18", 3), "source": "English", "target": "Chinese"} in rows
    assert {"text": corpora.chinese("wmt20", 0), "source": "Chinese", "target": "English"} in rows
    assert not any("reference" in row for row in rows)
    assert data.gather(str(out)).tasks == [Task(*row.values()) for row in rows]


def test_short_texts_and_those_seen_before_are_left_out_and_counted(tmp_path):
    corpora.fill(tmp_path, ["wmt17", "wmt18"])
    source = tmp_path / "wmt17/raw/test/newstest2017-enzh-src.en.sgm"
    lines = source.read_text()
    cut = lines.replace(
        corpora.escaped(corpora.english("wmt17", 3)), "Too short, at 29 characters."
    )
    source.write_text(cut.replace("of wmt17 met", "of wmt18 met"))
    env = os.environ | {"SACREBLEU": str(tmp_path)}
    code, said, error = python(["data.py", "wmt17-18:en-zh"], env)
    assert code == 0, error
    assert "48 texts read, 36 kept; left out: 1 shorter than 30 characters, 11 seen before" in said


def test_the_length_of_chinese_is_counted_threefold():
    assert data.length_of("Good night.") == 11 and data.length_of("晚安。") == 9


def test_a_set_that_cannot_be_fetched_is_said(tmp_path):
    # A proxy that refuses: whatever network there is.
    env = os.environ | {"SACREBLEU": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    code, _, error = python(["data.py", "wmt19:en-zh", f"--out={tmp_path}/out"], env)
    assert code == 1 and error.startswith(
        "data.py: wmt19 (en-zh) could not be fetched by sacreBLEU"
    )
    assert error.count("\n") == 1 and "copy" in error and not (tmp_path / "out").exists()


SETS = """
import json, sys
from eval import sets
print(json.dumps([sets.load(entry) for entry in sys.argv[1:]]))
"""


def test_test_sets_have_sources_and_references(wmt):
    entries = [
        "wmt23:zh-en",
        "wmt22:en-zh",
        "wmt24:zh-en",
        "flores200:en-zh",
        "flores200/dev:zh-en",
    ]
    code, said, error = python(["-c", SETS, *entries], wmt)
    assert code == 0, error
    assert "wmt24:zh-en is wmt24:en-zh the other way round" in said
    found = dict(zip(entries, json.loads(said.splitlines()[-1]), strict=True))
    for entry, name in zip(entries, ["wmt23", "wmt22", "wmt24", "flores devtest", "flores dev"],
                           strict=True):  # fmt: skip
        sides = [corpora.english(name, 2), "English"], [corpora.chinese(name, 2), "Chinese"]
        (text, source), (reference, target) = sides if "en-zh" in entry else sides[::-1]
        assert found[entry][2] == [text, source, target, reference]
        assert len(found[entry]) == 12


def test_held_out_sets_take_both_directions_of_the_pairs_asked(wmt):
    code = "from eval import sets; import data; found = sets.held_out('wmt22,wmt17:en-zh', "
    code += "data.pairs_of('en', 'zh')); print(len(found), found[-1].text)"
    text = corpora.english("wmt17", 11)  # as it is trained: & is &, in WMT's old files, too
    assert python(["-c", code], wmt)[:2] == (0, f"36 {text}\n")


def test_a_set_of_ones_own_is_a_file(tmp_path):
    rows = [TEXT | {"reference": "晚安。"}] * 2  # a set may hold a sentence twice
    file = write(tmp_path / "mine.jsonl", rows)
    assert sets.load(str(file)) == [Task(*rows[0].values())] * 2
    assert sets.label(str(file)) == "mine"
    for entry, message in {
        "nowhere.jsonl": "there is no such file",
        "wmt23": "a set needs a direction, like wmt23:zh-en",
        "wmt23:en-sw": "wmt23 has no en-sw; it has",
        "wmt17/tworefs:en-zh": "wmt17/tworefs has no en-zh",
        "flores200:en-tlh=Klingon": "Klingon is not in data.py's table",
        "toy:en-zh": "the toy has no en-zh; it has kasu-bevo",
    }.items():
        with pytest.raises(ValueError, match=message):
            sets.load(entry)


def test_the_toys_test_set_is_unseen(tmp_path):
    found = sets.load("toy:kasu-bevo")
    assert len(found) == 500 and {(t.source, t.target) for t in found} == {("Kasu", "Bevo")}
    watched = {sets.Languages(0).task("held-out", i).text for i in range(512)}
    assert len({t.text for t in found} - watched) > 480  # short sentences come up again


def test_an_archive_is_fetched_whole_or_not_at_all(tmp_path, monkeypatch):
    corpora.flores(tmp_path / "served" / "flores200_dataset")
    with tarfile.open(tmp_path / "served" / "flores.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "served" / "flores200_dataset", "flores200_dataset")
    whole = (tmp_path / "served" / "flores.tar.gz").read_bytes()
    (tmp_path / "served" / "half.tar.gz").write_bytes(whole[: len(whole) // 2])
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("FLORES200", str(tmp_path / "cache" / "flores"))
        for file in ("half", "none"):
            monkeypatch.setattr(sets, "FLORES_URL", f"{url}/{file}.tar.gz")
            with pytest.raises(OSError, match=rf"{file}\.tar\.gz could not be fetched .*FLORES200"):
                sets.load("flores200:en-zh")
            assert list((tmp_path / "cache").iterdir()) == []
        monkeypatch.setattr(sets, "FLORES_URL", f"{url}/flores.tar.gz")
        assert len(sets.load("flores200:en-zh")) == 12
        server.shutdown()
    assert len(sets.load("flores200:zh-en")) == 12  # from the folder now
    (tmp_path / "cache/flores/devtest/zho_Hans.devtest").unlink()
    with pytest.raises(ValueError, match=r"zho_Hans\.devtest is missing: remove"):
        sets.load("flores200:zh-en")
