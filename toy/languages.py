"""Two made-up languages with a known translation: what a laptop can learn, and we can check.

    pair = Languages(seed=0)
    task = pair.task("train", 17)              # the 18th training sentence: text, source, target
    task.reference                             # its one right translation, for evaluation only
    quality("tasu bevo", task.reference)       # 1 - word edit distance / the longer length

Kasu puts the verb in the middle, Bevo at the end; Bevo's adjectives agree with the noun's class:

    Kasu   [ADVERB] NP [NOT] VERB [NP] [PREPOSITION NP]      NP = [NUMERAL] [ADJECTIVE] NOUN
    Bevo   NP [NP POSTPOSITION] [NP] VERB [NOT] [ADVERB]     NP = NOUN [ADJECTIVE] [PLURAL NUMERAL]

Some verbs are two words in Kasu, some nouns two words in Bevo. Words, noun classes and which words
are confused come from the seed. A sentence has 3 to 10 Kasu words. A checksum decides whether it is
for training or for evaluation, so both are endless and disjoint.
"""

import zlib
from collections.abc import Callable
from functools import partial
from random import Random
from typing import NamedTuple

from judge import Task

KASU, BEVO = "Kasu", "Bevo"
SIZES = {"noun": 24, "verb": 14, "adjective": 10, "adverb": 6, "numeral": 4, "preposition": 4}
IDIOMS = 4
HELD_OUT = 8  # one sentence (or program) in 8 is for evaluation

Lexeme = tuple[str, int]  # category and number


def is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT == 0


class Phrase(NamedTuple):
    noun: int
    adjective: int | None
    numeral: int | None


class Meaning(NamedTuple):
    adverb: int | None
    subject: Phrase
    negated: bool
    verb: int
    object: Phrase | None
    preposition: int | None
    place: Phrase | None


class Languages:
    def __init__(self, seed: int):
        self.seed = seed
        rng = self.stream("lexicon", 0)
        used: set[str] = set()

        def coin(consonants: str, vowels: str, endings: list[str]) -> str:
            word = ""
            while not word or word in used:
                word = "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(2))
                word += rng.choice(endings)
            used.add(word)
            return word

        kasu = partial(coin, "ptkmnls", "aiu", [""])
        bevo = partial(coin, "bdgvzrh", "eoy", ["", "n", "x", "l"])

        lexemes = [(category, i) for category, size in SIZES.items() for i in range(size)]
        # A lexeme is one or two words; an adjective of Bevo has a form for each noun class.
        self.lexicon: dict[str, dict[Lexeme, list[str]]] = {
            KASU: {x: [kasu()] + [kasu()] * (x[0] == "verb" and x[1] < IDIOMS) for x in lexemes},
            BEVO: {x: [bevo()] + [bevo()] * (x[0] == "noun" and x[1] < IDIOMS) for x in lexemes},
        }
        self.agreeing = {x: (bevo(), bevo()) for x in lexemes if x[0] == "adjective"}
        for x in self.agreeing:
            del self.lexicon[BEVO][x]
        self.noun_class = [rng.randrange(2) for _ in range(SIZES["noun"])]
        self.negation = {KASU: kasu(), BEVO: bevo()}
        self.plural = bevo()
        # Each lexeme is confused with one other of its category, in a cycle through all of them.
        self.confusable: dict[Lexeme, Lexeme] = {}
        for category, size in SIZES.items():
            cycle = rng.sample(range(size), size)
            for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True):
                self.confusable[category, a] = (category, b)
        groups = {x: [*self.lexicon[x].values(), [self.negation[x]]] for x in (KASU, BEVO)}
        groups[BEVO] += [*self.agreeing.values(), [self.plural]]
        self.vocabulary = {
            language: sorted(word for group in groups[language] for word in group)
            for language in groups
        }

    def stream(self, purpose: str, number: int) -> Random:
        """A random stream for each thing that is drawn."""
        return Random(f"{self.seed} {purpose} {number}")

    # ------------------------------------------------------------------------- sentences

    def task(self, split: str, number: int) -> Task:
        """Sentence `number` of "train" or "held-out", in one of the two directions."""
        return self.sentence(self.stream(split, number), held_out=split == "held-out")[1]

    def sentence(self, rng: Random, held_out: bool = False) -> tuple[Meaning, Task]:
        meaning = self.meaning(rng, held_out)
        source, target = rng.choice([(KASU, BEVO), (BEVO, KASU)])
        text, reference = (" ".join(self.say(meaning, x)) for x in (source, target))
        return meaning, Task(text, source, target, reference)

    def meaning(self, rng: Random, held_out: bool = False) -> Meaning:
        def maybe(category: str, chance: float) -> int | None:
            return rng.randrange(SIZES[category]) if rng.random() < chance else None

        def phrase() -> Phrase:
            noun = rng.randrange(SIZES["noun"])
            return Phrase(noun, maybe("adjective", 0.4), maybe("numeral", 0.25))

        while True:
            placed = rng.random() < 0.25
            meaning = Meaning(
                maybe("adverb", 0.3),
                phrase(),
                rng.random() < 0.2,
                rng.randrange(SIZES["verb"]),
                phrase() if rng.random() < 0.75 else None,
                rng.randrange(SIZES["preposition"]) if placed else None,
                phrase() if placed else None,
            )
            sentence = self.say(meaning, KASU)
            if 3 <= len(sentence) <= 10 and is_held_out(" ".join(sentence)) == held_out:
                return meaning

    def say(
        self,
        meaning: Meaning,
        language: str,
        order: str | None = None,
        swap: Callable[[Lexeme], Lexeme] = lambda lexeme: lexeme,
        agrees: Callable[[], bool] = lambda: True,
    ) -> list[str]:
        """The words of a meaning. Mistakes: the other language's word `order`, lexemes that
        `swap` replaces, adjectives for which `agrees()` is false."""
        order = order or language
        lexicon = self.lexicon[language]

        def phrase(p: Phrase) -> list[str]:
            noun = swap(("noun", p.noun))
            adjective, numeral = [], []
            if p.adjective is not None:
                lexeme = swap(("adjective", p.adjective))
                if language == KASU:
                    adjective = lexicon[lexeme]
                else:
                    noun_class = self.noun_class[noun[1]]
                    form = noun_class if agrees() else 1 - noun_class
                    adjective = [self.agreeing[lexeme][form]]
            if p.numeral is not None:
                plural = [] if language == KASU else [self.plural]
                numeral = plural + lexicon[swap(("numeral", p.numeral))]
            if order == KASU:
                return [*numeral, *adjective, *lexicon[noun]]
            return [*lexicon[noun], *adjective, *numeral]

        verb = lexicon[swap(("verb", meaning.verb))]
        negation = [self.negation[language]] if meaning.negated else []
        adverb = lexicon[swap(("adverb", meaning.adverb))] if meaning.adverb is not None else []
        subject = phrase(meaning.subject)
        thing = phrase(meaning.object) if meaning.object else []
        place = []
        if meaning.place:
            relation = lexicon[swap(("preposition", meaning.preposition))]
            where = phrase(meaning.place)
            place = [*relation, *where] if order == KASU else [*where, *relation]
        if order == KASU:
            return [*adverb, *subject, *negation, *verb, *thing, *place]
        return [*subject, *place, *thing, *verb, *negation, *adverb]


def quality(candidate: str, reference: str) -> float:
    """1 - word edit distance / the longer length, 0 to 1."""
    a, b = candidate.split(), reference.split()
    if not a:
        return 0.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return 1 - row[-1] / max(len(a), len(b))
