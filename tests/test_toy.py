"""The two made-up languages, the model pretrained on them, and the rewards that know the truth."""

import dataclasses
import random
import statistics
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.codec import PromptCodec, load_tokenizer
from judge import TOY
from model import load
from rewards import toy as rewards
from toy import pretrain, programs
from toy.languages import BEVO, KASU, Languages, quality
from toy.pretrain import SHIPPED, Muon, PretrainingCorpus, Recipe, build_and_save, language_model

PAIR = Languages(0)
SMALL = Recipe(tokens=1e4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_and_save(pretrain.pretrain_languages, SMALL, folder)
    return folder


def tasks(split, count=2000):
    return [PAIR.task(split, i) for i in range(count)]


# ------------------------------------------------------------------------------------ languages


def test_sentences_are_a_function_of_seed_split_and_number():
    again, other = Languages(0), Languages(1)
    assert [again.task("train", i) for i in (5, 3)] == [PAIR.task("train", i) for i in (5, 3)]
    assert other.task("train", 5) != PAIR.task("train", 5) != PAIR.task("held-out", 5)


def test_held_out_sentences_are_never_trained_and_all_directions_and_lengths_occur():
    train, held_out = (
        {x for t in tasks(split) for x in (t.text, t.reference)} for split in ("train", "held-out")
    )
    assert not train & held_out
    directions = Counter((t.source, t.target) for t in tasks("train"))
    assert set(directions) == {(KASU, BEVO), (BEVO, KASU)} and min(directions.values()) > 900
    kasu = [t.text if t.source == KASU else t.reference for t in tasks("train")]
    assert {len(text.split()) for text in kasu} == set(range(3, 11))


def test_a_sentence_has_one_translation_and_back_again():
    """Distinct meanings never share a sentence, so the truth is the truth."""
    there, back = {}, {}
    for i in range(8000):
        meaning = PAIR.meaning(random.Random(i))
        kasu, bevo = (" ".join(PAIR.say(meaning, x)) for x in (KASU, BEVO))
        assert there.setdefault(kasu, bevo) == bevo and back.setdefault(bevo, kasu) == kasu


def test_the_languages_differ_as_the_grammar_says():
    meaning = PAIR.meaning(random.Random(7))._replace(negated=True, adverb=None)
    kasu, bevo = PAIR.say(meaning, KASU), PAIR.say(meaning, BEVO)
    verb = PAIR.lexicon[BEVO]["verb", meaning.verb]
    assert bevo[-len(verb) - 1 :] == [*verb, PAIR.negation[BEVO]]
    assert PAIR.negation[KASU] in kasu[:-1] and not set(kasu) & set(bevo)


@pytest.mark.parametrize(
    ("candidate", "reference", "value"),
    [("a b", "a b c d", 0.5), ("a x c", "a b c", 2 / 3), ("b a c", "a b c", 1 / 3),
     ("a b c a b c", "a b c", 0.5), ("", "a", 0), ("a b c", "a b c", 1)],
)  # fmt: skip
def test_quality_is_one_minus_word_edit_distance_over_the_longer(candidate, reference, value):
    assert quality(candidate, reference) == pytest.approx(value)


# --------------------------------------------------------------------------------------- corpus


def test_mistakes_of_the_corpus_come_as_often_as_the_recipe_says():
    quiet = Recipe(habitual=0.0, wrong_order=0.0, disagreement=0.0, dropped=0.0)
    for recipe, low, high in ((Recipe(), 0.1, 0.3), (quiet, 0.6, 0.75)):
        corpus, right = PretrainingCorpus(PAIR, recipe), 0
        for _ in range(1000):
            meaning, task = PAIR.sentence(corpus.rng)
            words = corpus.habitual(meaning, task.source, task.target)
            right += " ".join(words) == task.reference
        assert low < right / 1000 < high


@pytest.mark.parametrize(
    ("kind", "counts"), [("score", {1}), ("compare", {2}), ("rate", {2, 3, 4})]
)
def test_examples_of_judging_say_the_truth(kind, counts, monkeypatch):
    corpus, scores, lengths, sentences = PretrainingCorpus(PAIR, Recipe()), Counter(), set(), []
    draw = PAIR.sentence
    monkeypatch.setattr(PAIR, "sentence", lambda rng: sentences.append(draw(rng)) or sentences[-1])
    makers = {"score": corpus.judgement, "compare": corpus.comparison, "rate": corpus.rating}
    for _ in range(500):
        prompt, (*answer, end) = makers[kind]()
        task = sentences[-1][1]
        source, *texts = " ".join(prompt).removesuffix(" =>").split("||")
        assert source.split() == [kind, task.source, task.target, *task.text.split()]
        lengths.add(len(texts))
        values = [quality(text, task.reference) for text in texts]
        if kind == "compare":
            better, worse = values if answer == ["first"] else values[::-1]
            assert better > worse and end == "<eos>"
        else:
            assert [*answer, end] == [*(str(10 * round(10 * v)) for v in values), "<eos>"]
            scores.update(map(int, answer))
    assert lengths == counts
    assert kind == "compare" or (set(scores) == set(range(0, 101, 10)) and scores[100] > 50)


def test_pretraining_and_training_write_the_same_prompts():
    tokenizer = pretrain.make_tokenizer(PAIR)
    codec, vocabulary = PromptCodec(tokenizer), tokenizer.get_vocab()
    for task in tasks("train", 50):
        for parts in (TOY.ask(task), TOY.ask_judge(task, task.reference)):
            words = [vocabulary[w] for w in "".join(parts).split()]
            assert codec.encode([parts]) == [words]


# ---------------------------------------------------------------------------------------- model


def test_the_toy_model_is_an_ordinary_hugging_face_folder(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "translate Kasu Bevo " + PAIR.task("train", 0).text + " =>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), load(folder)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
        torch.testing.assert_close(ours.logits(ours(torch.tensor([ids]))), expected)


def test_a_model_is_built_once_whatever_the_threads_and_anew_when_its_recipe_changes(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SSR_TOY_CACHE", str(tmp_path))
    torch.set_num_threads(2)
    again = language_model(SMALL)
    assert torch.get_num_threads() == 1
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    before = [f.stat().st_mtime_ns for f in again.iterdir()]
    capsys.readouterr()
    assert language_model(SMALL) == again and again.parent == tmp_path
    assert capsys.readouterr().out == f"Toy model: {again}, built earlier\n"
    assert before == [f.stat().st_mtime_ns for f in again.iterdir()]
    other = language_model(Recipe(tokens=2e3, batch=4))
    assert other != again and "pretraining" in capsys.readouterr().out


def test_muon_is_torchs_but_for_bf16():
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
    wide = torch.randn(2, 96, 256, generator=generator)
    singular = torch.linalg.svdvals(pretrain.orthogonalise(wide))
    assert 0.6 < singular.min() and singular.max() < 1.3


def test_shipped_models_are_those_of_their_recipes(folder, tmp_path, monkeypatch, capsys):
    assert language_model(Recipe()) == SHIPPED / "languages-seed0"
    assert programs.program_model(programs.ProgramRecipe()) == SHIPPED / "programs-seed0"
    assert capsys.readouterr().out.count("shipped with the project (by `python -m toy.p") == 2
    for recipe in (Recipe(seed=1), SMALL):
        assert pretrain.find_shipped(f"languages-seed{recipe.seed}", recipe) is None
    monkeypatch.setattr(pretrain, "SHIPPED", tmp_path)
    pretrain.ship("languages", SMALL, lambda _: (load(folder), load_tokenizer(folder)), "a test")
    assert language_model(SMALL) == tmp_path / "languages-seed0"
    assert pretrain.find_shipped("languages-seed0", Recipe()) is None


def loss_of(folder):
    """On texts of today's corpus."""
    kinds = [kind.row for kind in PretrainingCorpus(PAIR, Recipe(), "test").kinds()]
    makers = kinds if "languages" in folder.name else programs.corpus(programs.ProgramRecipe())
    ids = load_tokenizer(folder).get_vocab()
    rows = [[[ids[x] for x in part] for part in make()] for make in makers for _ in range(500)]
    with torch.no_grad():
        return float(pretrain.loss_of(load(folder), rows, None, 0.0)[0])


@pytest.mark.parametrize(("name", "loss"), [("languages", 0.57996), ("programs", 0.53814)])
def test_shipped_models_still_fit_their_corpus(name, loss):
    """With the loss that they had when they were made."""
    assert loss_of(SHIPPED / f"{name}-seed0") == pytest.approx(loss, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "build", "loss"),
    [
        (Recipe(tokens=9e4), pretrain.pretrain_languages, 4.243),
        (programs.ProgramRecipe(tokens=5e4), programs.pretrain_programs, 2.402),
    ],
)
def test_a_fortieth_of_a_shipped_models_pretraining_goes_as_it_went(recipe, build, loss, tmp_path):
    """To the same loss, for the same recipe; processors round differently, so not to the bit."""
    assert dataclasses.replace(recipe, tokens=type(recipe)().tokens) == type(recipe)()
    folder = tmp_path / build.__name__.removeprefix("pretrain_")
    build_and_save(build, recipe, folder)
    assert loss_of(folder) == pytest.approx(loss, rel=0.02)


# -------------------------------------------------------------------------------------- rewards


def test_comparison_rewards_score_as_they_say():
    task = PAIR.task("train", 0)
    answers = [[task.reference, "x", task.reference, None]]

    def values(scorer, step=1):
        return [s.value for s in scorer([task], answers, step)[0]]

    assert values(rewards.external(0, 0.0)) == [1.0, 0.0, 1.0, 0.0]
    noise = rewards.random_scores(0)
    assert values(noise) == values(noise) != values(noise, 2) and len(set(values(noise))) == 4
    many = [values(rewards.external(0, 0.3), step)[0] for step in range(2000)]
    assert max(many) == 1.0 and 0.8 < statistics.mean(many) < 0.95  # noisy and clamped to 1
    both = rewards.toy_scorers("self+external", task, 0, 0.3)  # any judge
    assert both["self"] == (0.5, task) and both["external"][0] == 0.5
