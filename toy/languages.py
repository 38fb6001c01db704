"""Two made-up languages with a known translation: what a laptop can learn, and we can check.

    pair = Languages(seed=0)
    task = pair.task("train", 17)              # the 18th training sentence: text, source, target
    task.reference                             # its one right translation, for measuring alone
    quality("tasu bevo", task.reference)       # 1 - word edit distance / the longer length

Kasu puts the verb in the middle, Bevo at the end; Bevo's adjectives agree with the noun's class:

    Kasu   [ADVERB] NP [NOT] VERB [NP] [PREPOSITION NP]      NP = [NUMERAL] [ADJECTIVE] NOUN
    Bevo   NP [NP POSTPOSITION] [NP] VERB [NOT] [ADVERB]     NP = NOUN [ADJECTIVE] [PLURAL NUMERAL]

Some verbs are two words in Kasu, some nouns two words in Bevo. Words, classes, idioms and who is
confused with whom come from the seed. A sentence has 3 to 10 Kasu words and belongs either to
training or to evaluation, by a checksum, so both are without end and nothing is in both.
"""

import zlib
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from judge import Task

KASU, BEVO = "Kasu", "Bevo"
SIZES = {"noun": 24, "verb": 14, "adjective": 10, "adverb": 6, "numeral": 4, "preposition": 4}
IDIOMS = 4
HELD_OUT = 8  # one sentence in so many is for evaluation

Lexeme = tuple[str, int]  # category and number
Swap = Callable[[Lexeme], Lexeme]


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


def unchanged(lexeme: Lexeme) -> Lexeme:
    return lexeme


class Languages:
    def __init__(self, seed: int):
        self.seed = seed
        rng = self.stream("lexicon", 0)
        used: set[str] = set()

        def coin(consonants: str, vowels: str, endings: list[str]) -> str:
            while True:
                word = "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(2))
                word += rng.choice(endings)
                if word not in used:
                    used.add(word)
                    return word

        def kasu() -> str:
            return coin("ptkmnls", "aiu", [""])

        def bevo() -> str:
            return coin("bdgvzrh", "eoy", ["", "n", "x", "l"])

        lexemes = [(category, i) for category, size in SIZES.items() for i in range(size)]
        # What a lexeme is in each language: one word, or two. An adjective of Bevo: a form a class.
        self.words: dict[str, dict[Lexeme, list[str]]] = {
            KASU: {x: [kasu()] + [kasu()] * (x[0] == "verb" and x[1] < IDIOMS) for x in lexemes},
            BEVO: {x: [bevo()] + [bevo()] * (x[0] == "noun" and x[1] < IDIOMS) for x in lexemes},
        }
        self.agreeing = {x: (bevo(), bevo()) for x in lexemes if x[0] == "adjective"}
        for x in self.agreeing:
            del self.words[BEVO][x]
        self.noun_class = [rng.randrange(2) for _ in range(SIZES["noun"])]
        self.negation = {KASU: kasu(), BEVO: bevo()}
        self.plural = bevo()
        # Each lexeme is confused with one other of its category: a cycle through all of them.
        self.confusable: dict[Lexeme, Lexeme] = {}
        for category, size in SIZES.items():
            cycle = rng.sample(range(size), size)
            for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True):
                self.confusable[category, a] = (category, b)
        self.vocabulary = {
            KASU: sorted(
                {w for ws in self.words[KASU].values() for w in ws} | {self.negation[KASU]}
            ),
            BEVO: sorted(
                {w for ws in self.words[BEVO].values() for w in ws}
                | {w for ws in self.agreeing.values() for w in ws}
                | {self.negation[BEVO], self.plural}
            ),
        }

    def stream(self, purpose: str, number: int) -> Random:
        """A stream of its own for everything that is drawn."""
        return Random(f"{self.seed} {purpose} {number}")

    # ------------------------------------------------------------------------- sentences

    def task(self, split: str, number: int) -> Task:
        """Sentence `number` of "train" or "held-out", in one of the two directions."""
        rng = self.stream(split, number)
        meaning = self.meaning(rng, held_out=split == "held-out")
        source, target = rng.choice([(KASU, BEVO), (BEVO, KASU)])
        return self.task_of(meaning, source, target)

    def task_of(self, meaning: Meaning, source: str, target: str) -> Task:
        text, reference = (" ".join(self.say(meaning, x)) for x in (source, target))
        return Task(text, source, target, reference)

    def meaning(self, rng: Random, held_out: bool = False) -> Meaning:
        def phrase() -> Phrase:
            return Phrase(
                rng.randrange(SIZES["noun"]),
                rng.randrange(SIZES["adjective"]) if rng.random() < 0.4 else None,
                rng.randrange(SIZES["numeral"]) if rng.random() < 0.25 else None,
            )

        while True:
            placed = rng.random() < 0.25
            meaning = Meaning(
                rng.randrange(SIZES["adverb"]) if rng.random() < 0.3 else None,
                phrase(),
                rng.random() < 0.2,
                rng.randrange(SIZES["verb"]),
                phrase() if rng.random() < 0.75 else None,
                rng.randrange(SIZES["preposition"]) if placed else None,
                phrase() if placed else None,
            )
            words = self.say(meaning, KASU)
            if 3 <= len(words) <= 10:
                checksum = zlib.crc32(" ".join(words).encode())
                if (checksum % HELD_OUT == 0) == held_out:
                    return meaning

    def say(
        self,
        meaning: Meaning,
        language: str,
        order: str | None = None,
        swap: Swap = unchanged,
        agrees: Callable[[], bool] = lambda: True,
    ) -> list[str]:
        """The words of a meaning. The mistakes: `order` of the other language, `swap` of lexemes,
        adjectives of which not each `agrees`."""
        order = order or language
        words = self.words[language]

        def phrase(p: Phrase) -> list[str]:
            noun = swap(("noun", p.noun))
            adjective, numeral = [], []
            if p.adjective is not None:
                lexeme = swap(("adjective", p.adjective))
                if language == KASU:
                    adjective = words[lexeme]
                else:
                    noun_class = self.noun_class[noun[1]]
                    right = agrees()
                    adjective = [self.agreeing[lexeme][noun_class if right else 1 - noun_class]]
            if p.numeral is not None:
                plural = [] if language == KASU else [self.plural]
                numeral = plural + words[swap(("numeral", p.numeral))]
            if order == KASU:
                return [*numeral, *adjective, *words[noun]]
            return [*words[noun], *adjective, *numeral]

        verb = words[swap(("verb", meaning.verb))]
        negation = [self.negation[language]] if meaning.negated else []
        adverb = words[swap(("adverb", meaning.adverb))] if meaning.adverb is not None else []
        subject = phrase(meaning.subject)
        thing = phrase(meaning.object) if meaning.object else []
        place = []
        if meaning.place:
            relation, where = (
                words[swap(("preposition", meaning.preposition))],
                phrase(meaning.place),
            )
            place = [*relation, *where] if order == KASU else [*where, *relation]
        if order == KASU:
            return [*adverb, *subject, *negation, *verb, *thing, *place]
        return [*subject, *place, *thing, *verb, *negation, *adverb]


def quality(candidate: str, reference: str) -> float:
    """1 - word edit distance / the longer length: 1 for the reference, 0 for nothing right."""
    a, b = candidate.split(), reference.split()
    if not a:
        return 0.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return 1 - row[-1] / max(len(a), len(b))
