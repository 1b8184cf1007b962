"""The embedded default texts of other tasks: questions, tags, summaries, choices, pairs and documents from docstrings.

Made at run time from the source files of installed libraries, which are parsed and never imported. Every function takes
at most `per_library` docstrings of each library, and the same seed gives the same rows; no text occurs in two splits.
With the defaults each takes ten seconds to half a minute.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from embedded.docstrings import LIBRARIES, docstrings_of
from embedded.splits import split
from hf_sparse import SparsityError

PER_LIBRARY = 320
LONGEST = 600  # characters of a text
READ_FIRST, READ_FOR_EACH = 40, 4  # so many, and for each that is used; parsing all would take minutes
QUESTIONS = 3  # of a docstring, at most
SECTION = re.compile(r"^(?:Parameters\n-+\n|Args:\n)(.*?)(?=\n\S[^\n]*\n-{3}|\n\n\S|\Z)", re.MULTILINE | re.DOTALL)
ENTRIES = (
    re.compile(r"^(?P<name>\w+) ?: +(?P<type>[^\n]+?)(?:,? \(?(?:optional|default)\b[^\n]*)?$", re.MULTILINE),
    re.compile(r"^ {4}(?P<name>\w+) \((?P<type>[^\n]+?)(?:,? \*?(?:optional|default)[^\n]*?)?\):", re.MULTILINE),
)
"""How the first line on a parameter reads in the style of numpy, and in that of Google."""
TAGS = ("O", "B-NAME", "I-NAME", "B-TYPE", "I-TYPE")
ENDINGS = [f"ending{number}" for number in range(4)]


class Section(NamedTuple):
    """What a docstring says of parameters, and where their names and types are."""

    text: str
    entries: list[re.Match[str]]


class Pair(NamedTuple):
    """The first paragraph of a docstring, and all that follows."""

    first: str
    body: str


def questions(seed: int, per_library: int = PER_LIBRARY) -> DatasetDict:
    """Ask for types of parameters; columns are those of SQuAD: `id`, `question`, `context`, `answers`.

    Raises:
        SparsityError: too few docstrings are installed.
    """

    def rows(sections: list[Section], generator: random.Random) -> Iterator[dict[str, Any]]:
        for number, (text, entries) in enumerate(sections):
            for entry in generator.sample(entries, min(QUESTIONS, len(entries))):
                yield {
                    "id": f"{number}-{entry['name']}",
                    "question": f"What is the type of {entry['name']}?",
                    "context": text,
                    "answers": {"text": [entry["type"]], "answer_start": [entry.start("type")]},
                }

    answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    features = {name: Value("string") for name in ("id", "question", "context")}
    return _made(_section, rows, Features({**features, "answers": answers}), seed, per_library)


def tagged_parameters(seed: int, per_library: int = PER_LIBRARY) -> DatasetDict:
    """Tag which words of a docstring are names of parameters and which their types; columns `tokens`, `ner_tags`.

    Raises:
        SparsityError: too few docstrings are installed.
    """

    def rows(sections: list[Section], _: random.Random) -> Iterator[dict[str, Any]]:
        for text, entries in sections:
            spans = [(*entry.span(kind), kind.upper()) for entry in entries for kind in ("name", "type")]
            words = list(re.finditer(r"\w+|[^\w\s]", text))
            tags = ["O"] * len(words)
            for start, end, kind in spans:
                inside = [place for place, word in enumerate(words) if start <= word.start() < end]
                for place in inside:
                    tags[place] = f"{'B' if place == inside[0] else 'I'}-{kind}"
            yield {"tokens": [word.group() for word in words], "ner_tags": tags}

    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=list(TAGS)))})
    return _made(_section, rows, features, seed, per_library)


def summaries(seed: int, per_library: int = PER_LIBRARY) -> DatasetDict:
    """Tell the first paragraph of a docstring from all that follows; columns `text`, `summary`.

    Raises:
        SparsityError: too few docstrings are installed.
    """

    def rows(pairs: list[Pair], _: random.Random) -> Iterator[dict[str, Any]]:
        return ({"text": pair.body, "summary": pair.first} for pair in pairs)

    return _made(_pair, rows, _texts("text", "summary"), seed, per_library)


def sentence_pairs(seed: int, per_library: int = PER_LIBRARY) -> DatasetDict:
    """Find the text of a docstring by its first paragraph; columns `anchor`, `positive`.

    Raises:
        SparsityError: too few docstrings are installed.
    """
    renamed = {"summary": "anchor", "text": "positive"}
    return summaries(seed, per_library).rename_columns(renamed).select_columns(["anchor", "positive"])


def choices(seed: int, per_library: int = PER_LIBRARY) -> DatasetDict:
    """Choose which of four first paragraphs a docstring has; columns as in SWAG: `sent1`, `ending0`, `label` and so on.

    Raises:
        SparsityError: too few docstrings are installed.
    """

    def rows(pairs: list[Pair], generator: random.Random) -> Iterator[dict[str, Any]]:
        for pair in pairs:
            others = [other.first for other in generator.sample(pairs, 4) if other is not pair][:3]
            label = generator.randrange(4)
            endings = [*others[:label], pair.first, *others[label:]]
            yield {"sent1": pair.body, "sent2": "", **dict(zip(ENDINGS, endings)), "label": label}

    features = Features({**_texts("sent1", "sent2", *ENDINGS), "label": ClassLabel(num_classes=4)})
    return _made(_pair, rows, features, seed, per_library)


def documents(seed: int, per_library: int = PER_LIBRARY) -> DatasetDict:
    """Gather whole docstrings for language models; one column, `text`.

    Raises:
        SparsityError: too few docstrings are installed.
    """

    def rows(found: list[tuple[str]], _: random.Random) -> Iterator[dict[str, Any]]:
        return ({"text": text} for (text,) in found)

    return _made(lambda text: (text,) if len(text.split()) >= 20 else None, rows, _texts("text"), seed, per_library)


def _section(docstring: str) -> Section | None:
    found = SECTION.search(docstring)
    text = _shortened(found[1], "\n") if found else ""
    entries = {entry["name"]: entry for style in ENTRIES for entry in style.finditer(text)}
    return Section(text, list(entries.values())) if len(entries) >= 2 else None


def _pair(docstring: str) -> Pair | None:
    first, _, rest = docstring.partition("\n\n")
    pair = Pair(" ".join(first.split()), _shortened(" ".join(rest.split()), " "))
    return pair if 4 <= len(pair.first.split()) <= 40 and len(pair.body.split()) >= 20 else None


def _shortened(text: str, separator: str) -> str:
    return text.rstrip() if len(text) <= LONGEST else text[:LONGEST].rpartition(separator)[0]


def _texts(*names: str) -> Features:
    return Features({name: Value("string") for name in names})


def _made(
    find: Callable[[str], Any],
    rows: Callable[[list[Any], random.Random], Iterator[dict[str, Any]]],
    features: Features,
    seed: int,
    per_library: int,
) -> DatasetDict:
    """Rows of what is found in docstrings, a tuple or None for each, of which no text has come before."""
    generator = random.Random(seed)
    seen: set[str] = set()
    found: list[Any] = []
    for library in LIBRARIES:
        enough = len(found) + per_library
        for docstring in itertools.islice(docstrings_of(library, generator), READ_FIRST + READ_FOR_EACH * per_library):
            one = find(docstring)
            keys = {re.sub(r"[\W\d_]+", " ", text).lower() for text in one or () if isinstance(text, str)}
            if one is not None and not keys & seen:
                seen |= keys
                found.append(one)
            if len(found) == enough:
                break
    if len(found) < 50:
        raise SparsityError(f"found {len(found)} docstrings that fit: are libraries installed? run `make install`")
    generator.shuffle(found)
    parts = split(found).items()
    return DatasetDict(
        {name: Dataset.from_list(list(rows(part, generator)), features=features) for name, part in parts}
    )
