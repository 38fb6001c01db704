"""Texts and test sets: what is read, what is left out and counted, what is refused."""

import json
import os
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sacrebleu.dataset import DATASETS

from data import loading
from data.__main__ import main
from eval import sets
from judge import Task
from tests import corpora
from tests.processes import ROOT
from tests.runs import rows_of, write_rows

TEXT = {"text": "Good night.", "source": "English", "target": "Chinese"}


@pytest.fixture(scope="module")
def wmt(tmp_path_factory):
    """An environment in which sacreBLEU finds small sets, and no network."""
    folder = tmp_path_factory.mktemp("sacrebleu")
    corpora.fill(folder, ["wmt17", "wmt18", "wmt19", "wmt20", "wmt22", "wmt23", "wmt24"])
    corpora.flores(folder / "flores")
    return os.environ | {"SACREBLEU": str(folder), "FLORES200": str(folder / "flores")}


def use_cache(monkeypatch, folder):
    """As if SACREBLEU had named this folder when sacreBLEU was imported."""
    for name, dataset in DATASETS.items():
        monkeypatch.setattr(dataset, "_outdir", str(folder / name))
        monkeypatch.setattr(dataset, "_rawdir", str(folder / name / "raw"))


@pytest.fixture
def small_sets(wmt, monkeypatch):
    use_cache(monkeypatch, Path(wmt["SACREBLEU"]))
    monkeypatch.setenv("FLORES200", wmt["FLORES200"])


# ------------------------------------------------------------------------------------- files


def test_json_lines_have_their_own_languages_or_those_of_the_file_or_of_all(tmp_path):
    own = write_rows(
        tmp_path / "a.jsonl", [TEXT, TEXT | {"target": "de", "reference": "Gute Nacht."}]
    )
    bare = write_rows(tmp_path / "b.jsonl", [{"text": " Good\0 night. "}])
    assert loading.load_corpus(f"{own}, {bare}", "en", "zh,fr").tasks == [
        Task("Good night.", "English", "Chinese"),
        Task("Good night.", "English", "German", "Gute Nacht."),
        Task("Good night.", "English", "French"),
    ]
    assert loading.load_corpus(f"{bare}:de-en").tasks == [Task("Good night.", "German", "English")]
    with pytest.raises(ValueError, match=r"line 1: 'source', 'target' missing \(--data FILE:"):
        loading.load_corpus(str(bare))


def test_plain_text_is_a_text_a_line(tmp_path):
    file = tmp_path / "news.txt"
    file.write_bytes("\ufeffOne.\r\n\r\n\u3000\nTwo\u2028still two.\nOne.\n".encode())
    corpus = loading.load_corpus(f"{file}:en-zh,{file}:en-de")
    assert [t.text for t in corpus.tasks] == ["One.", "Two\u2028still two."] * 2
    assert corpus.tasks[0][1:3] == ("English", "Chinese")
    report = f"{file}:en-zh: 3 texts read, 2 kept; left out: 1 seen before\n"
    assert corpus.report() == report + report.replace("en-zh", "en-de").strip()
    with pytest.raises(ValueError, match="--source names several: write the pair behind"):
        loading.load_corpus(str(file), "en,zh", "zh,en")


def test_parquet_is_read_where_pyarrow_is(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet needs pyarrow: pip install pyarrow"):
        loading.load_corpus(f"{file}:en-zh")
    monkeypatch.undo()
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not in our requirements")
    import pyarrow.parquet as parquet

    table = {"text": ["a", "b", "", "a"], "target": ["de", "fr", "de", "de"], "other": [1, 2, 3, 4]}
    parquet.write_table(pa.table(table | {"source": ["en"] * 4}), file)
    with pytest.raises(ValueError, match=r"a\.parquet, row 3: 'text' missing"):
        loading.load_corpus(str(file))
    corpus = loading.load_corpus(str(file), skip_bad=True)
    assert [(t.text, t.target) for t in corpus.tasks] == [("a", "German"), ("b", "French")]


def json_line(text="a", source="English", target="Chinese", **more):
    return json.dumps({"text": text, "source": source, "target": target} | more)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", "not JSON .*column 2"), (b"[1]", "not an object"),
        (b'{"text": "a", "source": "English"}', "'target' missing"),
        (json_line(" \0").encode(), "'text' missing"), (b"\xff", "'utf-8' codec can't decode"),
        (json_line(reference=3).encode(), '"reference" must be a string'),
        (json_line("a\ud800").encode(), "'utf-8' codec can't encode"),
        (json_line(target="<|im_end|>").encode(), "unknown language"),
        (json_line(source="en", target="English").encode(), "English would be translated into it"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_or_left_out_and_counted(tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_bytes(json.dumps(TEXT).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 3: {message}"):
        loading.load_corpus(str(file))
    corpus = loading.load_corpus(str(file), skip_bad=True)
    assert len(corpus.tasks) == 1
    assert corpus.report().endswith("2 texts read, 1 kept; left out: 1 that cannot be read")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("wmt17", "wmt17: there is no such file; a test set needs its languages"),
        ("wmt99:en-zh", "wmt99: no such file, and no test set of sacreBLEU's; similar: wmt"),
        ("wmt17:en-sw", "wmt17 has no en-sw; it has .*en-zh"), ("", "there is no text"),
        ("eval/published.csv", r"published\.csv is not read: make JSON lines of it"),
    ],
)  # fmt: skip
def test_unusable_data_is_refused(entries, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        loading.load_corpus(entries)


# ------------------------------------------------------------------------------- the order


def test_data_comes_in_shuffled_epochs_that_depend_on_the_seed_alone():
    tasks = [Task(f"t{i}", "English", "Chinese") for i in range(40)]
    order = loading.EpochShuffler(tasks, 0)
    first, second = ([order.task(e * 40 + i) for i in range(40)] for e in (0, 1))
    assert sorted(first) == sorted(second) == sorted(tasks) and first != second
    again = loading.EpochShuffler(tasks, 0)
    assert [again.task(43), again.task(2)] == [second[3], first[2]]
    assert [loading.EpochShuffler(tasks, 1).task(i) for i in range(40)] != first
    with pytest.raises(ValueError, match="no texts are left to train on"):
        loading.EpochShuffler([], 0)


def test_a_held_out_text_is_not_trained_on_in_any_direction():
    tasks = [Task(f"t{i % 40}", "English", "Chinese") for i in range(50)]
    held_out = loading.sample_held_out(tasks, 10, seed=0)
    training = loading.exclude_overlap(tasks, held_out)
    assert len(held_out) == 10 and not {t.text for t in held_out} & {t.text for t in training}
    other = Task("t3", "English", "German", "t4")
    left = {t.text for t in loading.exclude_overlap(tasks, [other])}
    assert {t.text for t in tasks} - left == {"t3", "t4"}


# ------------------------------------------------------------------------------- WMT's and others


def test_wmts_sources_become_a_corpus_in_both_directions(small_sets, tmp_path, capsys):
    """Through sacreBLEU's own readers, from a cache in its own format."""
    out = tmp_path / "texts.jsonl"
    main(["wmt17-20:en-zh", f"--out={out}"])
    assert capsys.readouterr().out.startswith("wmt17-20:en-zh: 96 texts read, 96 kept\n")
    rows = rows_of(out)
    assert {"text": corpora.english("wmt18", 3), "source": "English", "target": "Chinese"} in rows
    assert {"text": corpora.chinese("wmt20", 0), "source": "Chinese", "target": "English"} in rows
    assert not any("reference" in row for row in rows)
    assert loading.load_corpus(str(out)).tasks == [Task(*row.values()) for row in rows]


def test_short_and_repeated_texts_are_left_out_and_counted(tmp_path, monkeypatch):
    corpora.fill(tmp_path, ["wmt17", "wmt18"])
    source = tmp_path / "wmt17/raw/test/newstest2017-enzh-src.en.sgm"
    long = corpora.escaped(corpora.english("wmt17", 3))
    text = source.read_text().replace(long, "Too short, at 29 characters.")
    source.write_text(text.replace("of wmt17 met", "of wmt18 met"))
    use_cache(monkeypatch, tmp_path)
    report = loading.load_corpus("wmt17-18:en-zh").report()
    assert "48 texts read, 36 kept; left out: 1 shorter than 30 characters, 11 seen" in report
    assert loading.length_of("Good night.") == 11 and loading.length_of("晚安。") == 9


def test_a_set_that_cannot_be_fetched_ends_the_command(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # whatever network there is
    with pytest.raises(SystemExit, match=r"^data: wmt19 \(en-zh\) could not be fetched .* copy"):
        main(["wmt19:en-zh", f"--out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("wmt23:zh-en", "wmt23"), ("wmt22:en-zh", "wmt22"), ("wmt24:zh-en", "wmt24"),
        ("flores200:en-zh", "flores devtest"), ("flores200/dev:zh-en", "flores dev"),
    ],
)  # fmt: skip
def test_test_sets_have_sources_and_references(small_sets, capsys, entry, name):
    tasks = sets.load_set(entry)
    sides = [corpora.english(name, 2), "English"], [corpora.chinese(name, 2), "Chinese"]
    (text, source), (reference, target) = sides if "en-zh" in entry else sides[::-1]
    assert len(tasks) == 12 and tasks[2] == (text, source, target, reference)
    turned = "wmt24:zh-en is wmt24:en-zh the other way round" in capsys.readouterr().out
    assert turned == (name == "wmt24")


def test_held_out_sets_take_both_directions_of_the_pairs_asked(small_sets):
    tasks = sets.held_out("wmt22,wmt17:en-zh", loading.parse_language_pairs("en", "zh"))
    # As it is trained on: & is &, in WMT's old files, too.
    assert len(tasks) == 36 and tasks[-1].text == corpora.english("wmt17", 11)


def test_a_set_of_ones_own_is_a_file_and_may_repeat_a_sentence(tmp_path):
    rows = [TEXT | {"reference": "晚安。"}] * 2
    file = write_rows(tmp_path / "mine.jsonl", rows)
    assert sets.load_set(str(file)) == [Task(*rows[0].values())] * 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("wmt23", "a set needs a direction, like wmt23:zh-en"),
        ("wmt23:en-sw", "wmt23 has no en-sw; it has"),
        ("wmt17/tworefs:en-zh", "wmt17/tworefs has no en-zh"),
        ("flores200:en-tlh=Klingon", r"Klingon is not in data/\w+\.py's table"),
        ("toy:en-zh", "the toy has no en-zh; it has kasu-bevo"),
    ],
)  # fmt: skip
def test_an_unknown_set_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        sets.load_set(entry)


def test_the_toys_test_set_is_unseen():
    tasks = sets.load_set("toy:kasu-bevo")
    assert len(tasks) == 500 and {(t.source, t.target) for t in tasks} == {("Kasu", "Bevo")}
    watched = {sets.Languages(0).task("held-out", i).text for i in range(512)}
    assert len({t.text for t in tasks} - watched) > 480  # short sentences come up again


def test_an_archive_is_fetched_whole_or_not_at_all(tmp_path, monkeypatch):
    served, cache = tmp_path / "served", tmp_path / "cache"
    corpora.flores(served / "flores200_dataset")
    with tarfile.open(served / "flores.tar.gz", "w:gz") as archive:
        archive.add(served / "flores200_dataset", "flores200_dataset")
    whole = (served / "flores.tar.gz").read_bytes()
    (served / "half.tar.gz").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setenv("FLORES200", str(cache / "flores"))
    handler = partial(SimpleHTTPRequestHandler, directory=served)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(sets, "FLORES_URL", f"{url}/half.tar.gz")
        with pytest.raises(OSError, match=r"half\.tar\.gz could not be fetched .*FLORES200"):
            sets.load_set("flores200:en-zh")
        assert list(cache.iterdir()) == []
        monkeypatch.setattr(sets, "FLORES_URL", f"{url}/flores.tar.gz")
        assert len(sets.load_set("flores200:en-zh")) == 12
        server.shutdown()
    assert len(sets.load_set("flores200:zh-en")) == 12  # from the folder now
