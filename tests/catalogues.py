"""How often py3langid is wrong on real sentences: message catalogues, which are translations.

    apt-get download wesnoth-1.16-data git gnupg-l10n      # prose, and two programs
    for file in *.deb; do dpkg-deb -x $file x; done
    python -m tests.catalogues x

A right answer is a message's translation into the target, or the English message itself; a wrong
one is a translation into another language of the same script that is not close to the target.
"""

import gettext
import itertools
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

from data import languages as l
from judge import alnum_only

LENGTHS = (20, 30, 40, 60, 100, 10**9)  # letters


def read_catalogues(folder: str) -> dict[str, dict[str, str]]:
    """By language: English message -> its translation, without markup."""
    texts = defaultdict(dict)
    for path in sorted(Path(folder).rglob("LC_MESSAGES/*.mo")):
        code = {"zh_CN": "zh", "zh_TW": "zh_hant", "pt_BR": "pt", "nb_NO": "nb"}.get(
            path.parent.parent.name, path.parent.parent.name
        )
        if code not in l.NAMES:
            continue
        with open(path, "rb") as file:
            messages = gettext.GNUTranslations(file)._catalog
        for pair in messages.items():
            if all(isinstance(text, str) for text in pair):  # no plural
                english, text = (re.sub(r"<[^>]*>|^[^^]*\^|\s+", " ", x).strip() for x in pair)
                if english and text and text != english:
                    texts[l.NAMES[code]].setdefault(english, text)
    return texts


def main(folder: str) -> None:
    texts, draw = read_catalogues(folder), random.Random(0)
    counts = {wrong: {n: [0, 0] for n in LENGTHS} for wrong in (False, True)}
    targets = defaultdict(lambda: [0, 0])

    def check(answer: str, target: str, wrong: bool) -> None:
        if (size := len(alnum_only(answer))) < l.MIN_LETTERS or not l.is_identifiable(target):
            return
        rejected = l.is_identified_as_other(answer, target)
        for count in (counts[wrong][next(n for n in LENGTHS if size < n or n == LENGTHS[-1])],
                      *[targets[target]] * (not wrong)):  # fmt: skip
            count[0] += rejected
            count[1] += 1
        if rejected and not wrong:
            print(f"{target}: {answer[:100]}")

    for target in texts:
        others = [
            name for name in texts
            if not l.are_close(name, target) and l.SCRIPTS.get(name) == l.SCRIPTS.get(target)
        ]  # fmt: skip
        for english, text in texts[target].items():
            check(text, target, wrong=False)
            name = draw.choice([*others, "English"])
            answer = english if name == "English" else texts[name].get(english)
            if answer and answer != text and l.SCRIPTS.get(name) == l.SCRIPTS.get(target):
                check(answer, target, wrong=True)
    for english in {english for language in texts.values() for english in language}:
        check(english, "English", wrong=False)
    print(f"\n{len(targets)} languages, {l.identifier_version()}")
    print("  letters  rejected of right ones  rejected of wrong ones")
    for low, high in itertools.pairwise(LENGTHS):
        right, wrong = (f"{count[high][0]:,} of {count[high][1]:,}" for count in counts.values())
        print(f"{low:7} …  {right:>22}  {wrong:>22}")


if __name__ == "__main__":
    main(sys.argv[1])
