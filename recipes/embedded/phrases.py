"""The embedded default translations: English sentences with their German, from a small grammar of our own.

It knows what differs: three genders and two cases of articles and adjectives, plurals, and the place of the verb, which
comes second in German.
"""

import random
from typing import NamedTuple

from datasets import Dataset, DatasetDict, Features, Translation

from embedded.splits import split

COUNT = 4000


class Noun(NamedTuple):
    """A noun in English and in German, each with its plural, and its gender: m, f or n."""

    one: str
    many: str
    eines: str
    viele: str
    gender: str


BEINGS = (
    Noun("man", "men", "Mann", "Männer", "m"),
    Noun("dog", "dogs", "Hund", "Hunde", "m"),
    Noun("bird", "birds", "Vogel", "Vögel", "m"),
    Noun("teacher", "teachers", "Lehrer", "Lehrer", "m"),
    Noun("woman", "women", "Frau", "Frauen", "f"),
    Noun("cat", "cats", "Katze", "Katzen", "f"),
    Noun("aunt", "aunts", "Tante", "Tanten", "f"),
    Noun("mouse", "mice", "Maus", "Mäuse", "f"),
    Noun("child", "children", "Kind", "Kinder", "n"),
    Noun("girl", "girls", "Mädchen", "Mädchen", "n"),
    Noun("horse", "horses", "Pferd", "Pferde", "n"),
    Noun("sheep", "sheep", "Schaf", "Schafe", "n"),
)
"""Who does something."""
THINGS = (
    Noun("apple", "apples", "Apfel", "Äpfel", "m"),
    Noun("tree", "trees", "Baum", "Bäume", "m"),
    Noun("table", "tables", "Tisch", "Tische", "m"),
    Noun("flower", "flowers", "Blume", "Blumen", "f"),
    Noun("lamp", "lamps", "Lampe", "Lampen", "f"),
    Noun("town", "towns", "Stadt", "Städte", "f"),
    Noun("book", "books", "Buch", "Bücher", "n"),
    Noun("house", "houses", "Haus", "Häuser", "n"),
    Noun("picture", "pictures", "Bild", "Bilder", "n"),
)
"""What something is done to, as it may be to a being."""
ADJECTIVES = {
    "small": "klein",
    "big": "groß",
    "old": "alt",
    "new": "neu",
    "beautiful": "schön",
    "red": "rot",
    "white": "weiß",
    "quiet": "ruhig",
}
NUMBERS = {"two": "zwei", "three": "drei", "four": "vier", "five": "fünf"}
VERBS = {
    ("sees", "see"): ("sieht", "sehen"),
    ("finds", "find"): ("findet", "finden"),
    ("seeks", "seek"): ("sucht", "suchen"),
    ("loves", "love"): ("liebt", "lieben"),
    ("knows", "know"): ("kennt", "kennen"),
    ("draws", "draw"): ("zeichnet", "zeichnen"),
    ("forgets", "forget"): ("vergisst", "vergessen"),
}
"""What one does and what several do."""
ADVERBS = {"today": "heute", "often": "oft", "now": "jetzt", "sometimes": "manchmal", "again": "wieder"}
THE = {"subject": {"m": "der", "f": "die", "n": "das"}, "object": {"m": "den", "f": "die", "n": "das"}}
A = {"subject": {"m": "ein", "f": "eine", "n": "ein"}, "object": {"m": "einen", "f": "eine", "n": "ein"}}
AFTER_THE = {"subject": {"m": "e", "f": "e", "n": "e"}, "object": {"m": "en", "f": "e", "n": "e"}}
AFTER_A = {"subject": {"m": "er", "f": "e", "n": "es"}, "object": {"m": "en", "f": "e", "n": "es"}}
"""Endings of adjectives."""


def phrases(seed: int, count: int = COUNT) -> DatasetDict:
    """Make splits with a column `translation` of `en` and `de`; the same seed gives the same rows, none of them twice.

    There are millions of sentences. It takes a second.
    """
    generator = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        english, german = _sentence(generator)
        found[english] = german
    rows = [{"translation": {"en": english, "de": german}} for english, german in found.items()]
    features = Features({"translation": Translation(languages=["en", "de"])})
    return DatasetDict({name: Dataset.from_list(part, features=features) for name, part in split(rows).items()})


def _sentence(generator: random.Random) -> tuple[str, str]:
    (who, wer), several = _noun_phrase(generator, BEINGS, "subject")
    (what, was), _ = _noun_phrase(generator, BEINGS + THINGS, "object")
    verb, tun = generator.choice(list(VERBS.items()))
    does, tut = verb[several], tun[several]
    when, wann = generator.choice(list(ADVERBS.items()))
    english, german = {
        "none": ((who, does, what), (wer, tut, was)),
        "first": ((when, who, does, what), (wann, tut, wer, was)),
        "last": ((who, does, what, when), (wer, tut, wann, was)),
    }[generator.choice(["none", "first", "last"])]
    return _written(english), _written(german)


def _noun_phrase(generator: random.Random, nouns: tuple[Noun, ...], case: str) -> tuple[tuple[str, str], bool]:
    """A noun in English and in German with what stands before it, and whether it is more than one."""
    noun = generator.choice(nouns)
    adjective, adjektiv = generator.choice([("", ""), *ADJECTIVES.items()])
    number, zahl = generator.choice(list(NUMBERS.items()))
    before, davor, ending, several = {
        "the": ("the", THE[case][noun.gender], AFTER_THE[case][noun.gender], False),
        "a": (
            "an" if (adjective or noun.one)[0] in "aeiou" else "a",
            A[case][noun.gender],
            AFTER_A[case][noun.gender],
            False,
        ),
        "all the": ("the", "die", "en", True),
        "some": (number, zahl, "e", True),
    }[generator.choice(["the", "a", "all the", "some"])]
    english = (before, adjective, noun.many if several else noun.one)
    german = (davor, adjektiv + ending if adjektiv else "", noun.viele if several else noun.eines)
    return (_joined(english), _joined(german)), several


def _joined(words: tuple[str, ...]) -> str:
    return " ".join(word for word in words if word)


def _written(words: tuple[str, ...]) -> str:
    sentence = _joined(words)
    return f"{sentence[0].upper()}{sentence[1:]}."
