"""The embedded default summaries: reports of games with their results, from sentences of our own.

A report says where a game was and when, who won and by how much, and other things that do not matter. Its summary is
one sentence of what matters.
"""

import random

from datasets import Dataset, DatasetDict

from embedded.splits import split

COUNT = 3000
TEAMS = ["Lions", "Tigers", "Bears", "Wolves", "Eagles", "Hawks", "Sharks", "Bulls", "Foxes", "Owls", "Rams", "Colts"]
CITIES = ["Rome", "Paris", "London", "Berlin", "Madrid", "Vienna", "Oslo", "Athens"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PLAYERS = ["Adams", "Baker", "Clark", "Davis", "Evans", "Green", "Jones", "Lewis", "Moore", "Smith"]
MARGINS = ("one goal", "two goals", "three goals", "four goals", "five goals")
OPENINGS = (
    "On {day} there was a game in {city}.",
    "{city} saw a game on {day}.",
    "It was {day}, and many people in {city} came to the game.",
)
ENDINGS = (
    "The {winners} scored {margin} more than their guests.",
    "At the end the {winners} were {margin} ahead.",
    "With {margin} more, the {winners} were better.",
    "Those who came for the {winners} saw them win by {margin}.",
)
ASIDES = (
    "It rained for most of the game.",
    "{player} was hurt and had to leave.",
    "The crowd was loud from the start.",
    "{player} had many chances.",
    "The coach was not pleased with {player}.",
    "Nobody had forgotten how it went last year.",
)


def reports(seed: int, count: int = COUNT) -> DatasetDict:
    """Make splits with columns `text` and `summary`; the same seed gives the same rows, no text occurs twice.

    It takes a second.
    """
    generator = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        text, summary = _report(generator)
        found[text] = summary
    rows = [{"text": text, "summary": summary} for text, summary in found.items()]
    return DatasetDict({name: Dataset.from_list(part) for name, part in split(rows).items()})


def _report(generator: random.Random) -> tuple[str, str]:
    said = {"winners": TEAMS, "margin": MARGINS, "city": CITIES, "day": DAYS}
    facts = {name: generator.choice(values) for name, values in said.items()}
    asides = [aside.format(player=generator.choice(PLAYERS)) for aside in generator.sample(ASIDES, 2)]
    opening, ending = generator.choice(OPENINGS).format(**facts), generator.choice(ENDINGS).format(**facts)
    text = generator.choice([[opening, *asides, ending], [opening, ending, *asides]])
    return " ".join(text), "The {winners} win by {margin} in {city} on {day}.".format(**facts)
