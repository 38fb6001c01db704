"""The embedded language pair: what is true of it, and that its model is an ordinary one."""

import json
import random
import shutil
import statistics
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ssr
from judge import TOY, Given, Judge, Texts
from model import load, load_tokenizer
from sampler import Sampler
from toy import controls, pretrain, programs
from toy.languages import BEVO, KASU, Languages, quality
from toy.pretrain import SHIPPED, Corpus, Muon, Recipe, make, make_tokenizer, orthogonalise

PAIR = Languages(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(Recipe(tokens=2e4), tmp_path_factory.mktemp("models"))


def tasks(split, count=2000):
    return [PAIR.task(split, i) for i in range(count)]


def test_sentences_are_a_function_of_seed_split_and_number():
    again, other = Languages(0), Languages(1)
    assert [again.task("train", i) for i in (5, 3)] == [PAIR.task("train", i) for i in (5, 3)]
    assert other.task("train", 5) != PAIR.task("train", 5) != PAIR.task("held-out", 5)


def test_held_out_sentences_are_never_trained_in_either_direction():
    def both_sides(split):
        return {x for t in tasks(split) for x in (t.text, t.reference)}

    assert not both_sides("train") & both_sides("held-out")


def test_both_directions_and_all_lengths_occur():
    directions = Counter((t.source, t.target) for t in tasks("train"))
    assert set(directions) == {(KASU, BEVO), (BEVO, KASU)} and min(directions.values()) > 900
    lengths = Counter(
        len((t.text if t.source == KASU else t.reference).split()) for t in tasks("train")
    )
    assert set(lengths) == set(range(3, 11))


def test_a_sentence_has_one_translation_and_back_again():
    """Distinct meanings never share a sentence, so the truth is the truth."""
    there, back = {}, {}
    for i in range(20_000):
        meaning = PAIR.meaning(random.Random(i))
        kasu, bevo = (" ".join(PAIR.say(meaning, x)) for x in (KASU, BEVO))
        assert there.setdefault(kasu, bevo) == bevo and back.setdefault(bevo, kasu) == kasu


def test_the_languages_differ_as_the_grammar_says():
    meaning = PAIR.meaning(random.Random(7))._replace(negated=True, preposition=None, place=None)
    kasu, bevo = PAIR.say(meaning, KASU), PAIR.say(meaning, BEVO)
    verb = PAIR.words[BEVO]["verb", meaning.verb]
    tail = [] if meaning.adverb is None else PAIR.words[BEVO]["adverb", meaning.adverb]
    assert bevo[len(bevo) - len(tail) - 2 :] == [*verb, PAIR.negation[BEVO], *tail]
    assert PAIR.negation[KASU] in kasu and not set(kasu) & set(bevo)


@pytest.mark.parametrize(
    ("candidate", "reference", "value"),
    [
        ("a b c", "a b c", 1),
        ("a b", "a b c d", 0.5),
        ("a x c", "a b c", 2 / 3),
        ("b a c", "a b c", 1 / 3),
        ("a b c a b c", "a b c", 0.5),
        ("", "a", 0),
        ("x y z", "a b c", 0),
    ],
)
def test_quality_is_one_minus_word_edit_distance_over_the_longer(candidate, reference, value):
    assert quality(candidate, reference) == pytest.approx(value)


def test_mistakes_of_the_corpus_come_as_often_as_the_recipe_says():
    quiet = Recipe(habitual=0.0, wrong_order=0.0, disagreement=0.0, dropped=0.0)
    for recipe, low, high in ((Recipe(), 0.1, 0.3), (quiet, 0.6, 0.75)):
        corpus, right = Corpus(PAIR, recipe), 0
        for _ in range(1000):
            meaning, task = corpus.sentence()
            words = corpus.habitual(meaning, task.source, task.target)
            right += " ".join(words) == task.reference
        assert low < right / 1000 < high


def test_judge_examples_say_the_truth_in_tens():
    corpus = Corpus(PAIR, Recipe())
    scores = Counter()
    for _ in range(500):
        prompt, (score, end) = corpus.judgement()
        text = " ".join(prompt)
        source, candidate = text[: text.index(" =>")].split("||")
        _, source_language, target_language, *words = source.split()
        assert end == "<eos>" and (source_language, target_language) in [(KASU, BEVO), (BEVO, KASU)]
        scores[int(score)] += 1
        # The truth, found again from the words alone.
        meaning = next_meaning(words, source_language)
        if meaning is not None:
            true = quality(candidate, " ".join(PAIR.say(meaning, target_language)))
            assert int(score) == round(10 * true) * 10
    assert set(scores) == set(range(0, 101, 10)) and scores[100] > 50


KNOWN = {}


def next_meaning(words, language):
    """The meaning of a short Kasu or Bevo sentence NOUN VERB, else None."""
    if not KNOWN:
        for i in range(24):
            for j in range(14):
                simple = PAIR.meaning(random.Random(0))
                phrase = simple.subject._replace(noun=i, adjective=None, numeral=None)
                meaning = simple._replace(
                    adverb=None, subject=phrase, negated=False, verb=j, object=None,
                    preposition=None, place=None,
                )  # fmt: skip
                for name in (KASU, BEVO):
                    KNOWN[name, tuple(PAIR.say(meaning, name))] = meaning
    return KNOWN.get((language, tuple(words)))


# ---------------------------------------------------------------------------------- the model


def test_the_toy_model_is_an_ordinary_hugging_face_folder(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "translate Kasu Bevo " + PAIR.task("train", 0).text + " =>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours = load(folder)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
        torch.testing.assert_close(ours.logits(ours(torch.tensor([ids]))), expected)


def test_pretraining_and_training_write_the_same_prompts():
    tokenizer = make_tokenizer(PAIR)
    texts, vocabulary = Texts(tokenizer), tokenizer.get_vocab()
    for task in tasks("train", 50):
        for parts in (TOY.ask(task), TOY.ask_judge(task, task.reference)):
            words = [vocabulary[w] for w in "".join(parts).split()]
            assert texts.encode([parts]) == [words]


def test_the_toys_control_words_cannot_be_forged():
    texts = Texts(make_tokenizer(PAIR))
    ids = texts.encode([[Given("tasu || => translate <eos>")]])[0]
    assert not texts.control_ids & set(ids)


def test_a_model_is_built_once_and_anew_when_its_recipe_changes(folder, capsys):
    before = sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir())
    capsys.readouterr()
    assert make(Recipe(tokens=2e4), folder.parent) == folder
    assert capsys.readouterr().out == f"Toy model: {folder}, built earlier\n"
    assert before == sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir())
    other = make(Recipe(tokens=2e4, dropped=0.05), folder.parent)
    assert other != folder and "pretraining" in capsys.readouterr().out


def test_the_same_recipe_makes_the_same_weights_whatever_the_threads(folder, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        again = make(Recipe(tokens=2e4), tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_orthogonalising_optimizer_is_torchs_but_for_bf16():
    """Three steps of each from the same weights and gradients, tall, wide and square."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((160, 96), (96, 256), (96, 96)):
        weights, *gradients = torch.randn(4, *shape, generator=generator)
        ours, theirs = (torch.nn.Parameter(weights.clone()) for _ in range(2))
        options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.01}
        optimizers = Muon([ours], **options), torch.optim.Muon([theirs], **options)
        for gradient in gradients:
            for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
                parameter.grad = gradient.clone()
                optimizer.step()
        moved = (theirs - weights).norm()
        assert moved > 0.1 and (ours - theirs).norm() < 0.02 * moved


def test_orthogonalised_in_float64_and_fp32_are_the_same():
    x = torch.randn(2, 96, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = orthogonalise(x)
    torch.testing.assert_close(orthogonalise(x.float()).double(), wide, atol=1e-4, rtol=0)
    singular = torch.linalg.svdvals(wide)
    assert 0.6 < singular.min() and singular.max() < 1.3


# ----------------------------------------------------------------------------- shipped models


def test_the_shipped_models_are_of_the_recipes_and_are_said(capsys):
    assert make(Recipe()) == SHIPPED / "languages-seed0"
    assert programs.make(programs.Recipe()) == SHIPPED / "programs-seed0"
    out = capsys.readouterr().out
    assert (
        "Toy model: languages-seed0, shipped with the project (by `python -m toy.pretrain` on"
        in out
    )
    assert (
        "Toy model: programs-seed0, shipped with the project (by `python -m toy.programs` on" in out
    )


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("model.safetensors", b"x", "model.safetensors is damaged"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("made.json", b"{", "made.json cannot be read"),
        ("made.json", None, "made.json is missing"),
    ],
)
def test_a_shipped_model_that_is_damaged_or_missing_is_built_anew(
    tmp_path, monkeypatch, capsys, file, content, said
):
    shipped = tmp_path / "shipped"
    shutil.copytree(SHIPPED / "languages-seed0", shipped / "languages-seed0")
    monkeypatch.setattr(pretrain, "SHIPPED", shipped)
    assert pretrain.find_shipped("languages-seed0", Recipe()) == shipped / "languages-seed0"
    (shipped / "languages-seed0" / file).unlink()
    if content is not None:
        (shipped / "languages-seed0" / file).write_bytes(content)
    capsys.readouterr()
    assert pretrain.find_shipped("languages-seed0", Recipe()) is None
    line = f"Toy model: {shipped / 'languages-seed0'}: {said}; the model is built anew\n"
    assert capsys.readouterr().out == line
    assert pretrain.find_shipped("languages-seed1", Recipe(seed=1)) is None
    assert pretrain.find_shipped("languages-seed0", Recipe(tokens=2e4)) is None
    assert capsys.readouterr().out.count("\n") <= 2


def test_a_cache_that_cannot_be_written_is_named_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSR_TOY_CACHE", str(tmp_path / "file" / "models"))
    with pytest.raises(OSError, match=r"cannot keep the toy's model in .*: set SSR_TOY_CACHE"):
        make(Recipe(tokens=2e4))
    monkeypatch.setenv("SSR_TOY_CACHE", str(tmp_path / "models"))
    assert make(Recipe(tokens=2e3, batch=4)).parent == tmp_path / "models"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["languages", "programs"])
def test_the_shipped_model_is_as_good_as_one_made_now(kind, tmp_path):
    """Not the same bits: processors round differently."""
    module, build, measure = {
        "languages": (Recipe, pretrain.build, languages_accuracy),
        "programs": (programs.Recipe, programs.build, programs_accuracy),
    }[kind]
    anew = pretrain.ship(kind, module(), build, "a test", tmp_path)
    now, shipped = measure(anew), measure(SHIPPED / f"{kind}-seed0")
    for name in shipped:  # of 512 texts, several standard errors
        assert now[name] == pytest.approx(shipped[name], abs=0.12), (now, shipped)


def languages_accuracy(folder):
    pair = PAIR
    texts, sampler = Texts(load_tokenizer(folder)), Sampler(load(folder), 256, 96)
    tasks = [pair.task("held-out", i) for i in range(512)]
    prompts = texts.encode([TOY.ask(task) for task in tasks])
    shares, answers = {}, []
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        groups = sampler.generate(prompts, 1, 20, temperature, stop_ids=texts.stop_ids)
        answers = [[texts.decode(g[0].ids[:-1])] for g in groups]
        right = [a == t.reference for [a], t in zip(answers, tasks, strict=True)]
        shares[name] = sum(right) / len(right)
    scores = [row[0].value for row in Judge(sampler, texts, TOY, "expected")(tasks, answers, 0)]
    truth = [quality(a, t.reference) for [a], t in zip(answers, tasks, strict=True)]
    return shares | {"correlation": statistics.correlation(scores, truth)}


def programs_accuracy(folder):
    game = programs.Programs(0, 512)
    texts, sampler = Texts(load_tokenizer(folder)), Sampler(load(folder), 256, 96)
    prompts = texts.encode([game.pose(question) for question, _ in game.held_out])
    shares = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        groups = sampler.generate(prompts, 1, 41, temperature, stop_ids=texts.stop_ids)
        answers = [
            game.text_answer(texts.decode(g[0].ids[:-1]), question)
            for g, (question, _) in zip(groups, game.held_out, strict=True)
        ]
        right = [a == truth for a, (_, truth) in zip(answers, game.held_out, strict=True)]
        shares[name] = sum(right) / len(right)
    return shares


# ------------------------------------------------------------------------------------ controls


def test_other_rewards_are_what_they_say():
    task = PAIR.task("train", 0)
    answers = [[task.reference, "x", task.reference, None]]

    def values(scorer, step=1):
        return [s.value for s in scorer([task], answers, step)[0]]

    assert values(controls.oracle) == [1.0, 0.0, 1.0, 0.0]
    noise = controls.random_scores(0)
    assert values(noise) == values(noise) != values(noise, 2) and len(set(values(noise))) == 4
    many = [controls.external(0, 0.3)([task], answers, step)[0][0].value for step in range(2000)]
    assert max(many) == 1.0 and 0.8 < sum(many) / 2000 < 0.95  # noisy and cut off at 1


def test_self_and_external_weigh_the_same():
    judge = object()
    both = controls.scorers("self+external", judge, 0, 0.3)
    assert {name: weight for name, (weight, _) in both.items()} == {"self": 0.5, "external": 0.5}
    assert both["self"][1] is judge and controls.scorers("self", judge, 0, 0.3) == {
        "self": (1.0, judge)
    }


@pytest.fixture
def two_rows(monkeypatch):
    rows = {"self, live judge": {}, "random": {"reward": "random"}}
    monkeypatch.setattr(controls, "ROWS", rows)
    monkeypatch.setattr(controls, "FAMILY", {})


@pytest.mark.slow
def test_controls_do_not_take_a_run_for_done_that_is_not(folder, two_rows, tmp_path, capsys):
    """Begun and not ended, or with other settings: those are run again, the rest is not."""
    small = ["--prompts-per-step=2", "--samples-per-prompt=2", "--eval-prompts=4"]
    words = ["--controls", "--seeds=0", f"--model={folder}", f"--folder={tmp_path / 'all'}", *small]
    ssr.main([*words, "--steps=2"])
    first = capsys.readouterr().out
    assert "2 runs under" in first and ", 0 of them done" in first and "| random |" in first
    ssr.main([*words, "--steps=2"])
    assert ", 2 of them done" in capsys.readouterr().out
    result = tmp_path / "all" / "random-seed0" / "result.json"
    cut_short = json.loads(result.read_text()) | {"steps": 1}
    result.write_text(json.dumps(cut_short))
    ssr.main([*words, "--steps=2"])
    assert ", 1 of them done" in capsys.readouterr().out
    ssr.main([*words, "--steps=2", "--lr=0.1"])
    assert ", 0 of them done" in capsys.readouterr().out


def test_the_table_is_mean_and_spread_over_seeds(tmp_path):
    """And the seconds are those of steps: of all stages, evaluations aside."""
    for row in controls.ROWS:
        for seed, after in ((0, 0.9), (1, 0.7)):
            path = tmp_path / f"{controls.slug(row)}-seed{seed}"
            path.mkdir()
            before = {"eval/exact_match": 0.2, "eval/sampled_exact_match": 0.1}
            result = {"before": before, "after": dict.fromkeys(before, after)}
            (path / "result.json").write_text(json.dumps(result))
            stages = {"seconds/sample": 0.5, "seconds/train": after, "seconds/evaluate": 9.0}
            steps = [{"step": 0, "seconds/evaluate": 9.0}, {"step": 1} | stages]
            steps.append({"step": 2, "seconds/sample": 1.5, "seconds/train": after})
            text = "".join(json.dumps(step) + "\n" for step in steps)
            (path / "metrics.jsonl").write_text(text)
    lines = controls.table([0, 1], tmp_path, controls.ROWS).splitlines()
    assert len(lines) == 2 + len(controls.ROWS)
    assert lines[2] == (
        "| self, live judge | 0.200 ± 0.000 | 0.800 ± 0.141 | 0.700 | 0.800 ± 0.141 | 1.80 |"
    )
