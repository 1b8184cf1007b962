"""The embedded default data: which library does this docstring document?

Made at run time from the source files of installed libraries, which are parsed and never imported. Nothing of them is
stored with this project.

    python recipes/embedded/docstrings.py --output_dir docstrings --per_library 800

writes train.csv, dev.csv and test.csv, for more of them than the default.
"""

import argparse
import ast
import functools
import importlib.util
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_sparse import SparsityError

# All are dependencies of this project, direct or not. The aliases would give the answer away.
LIBRARIES = {
    "matplotlib": r"matplotlib|pyplot|mpl|plt|pylab",
    "networkx": r"networkx|nx",
    "numpy": r"numpy|np|ndarray|numarray",
    "pandas": r"pandas|pd|dataframes?",
    "sympy": r"sympy|sy",
    "torch": r"pytorch|torch\w*|aten|autograd|cuda",
    "transformers": r"transformers?|hugging ?face|hf",
}
MASK = "library"
PER_LIBRARY = 320
READ_FIRST, READ_FOR_EACH = 40, 3  # so many, and for each that is used; parsing all would take minutes
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
LONGEST = 240  # characters


def docstrings(seed: int, per_library: int = PER_LIBRARY) -> DatasetDict:
    """Train, validation and test splits with columns `text` and `label`; the same seed gives the same rows.

    Every text occurs once, whatever its case, digits and punctuation, so no test text was seen in training.

    Raises:
        SparsityError: a library is not installed or has too few docstrings.
    """
    names = re.compile(rf"\b({'|'.join(LIBRARIES.values())})\b", re.IGNORECASE)
    owners: dict[str, set[str]] = {}
    texts: dict[str, str] = {}
    generator = random.Random(seed)
    for library in LIBRARIES:
        for docstring in itertools.islice(docstrings_of(library, generator), READ_FIRST + READ_FOR_EACH * per_library):
            text = " ".join(names.sub(MASK, docstring.split("\n\n")[0]).split())[:LONGEST]
            key = re.sub(r"[\W\d_]+", " ", text).lower().strip()
            if len(key.split()) >= 8:
                owners.setdefault(key, set()).add(library)
                texts.setdefault(key, text)
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SHARES}
    for library in LIBRARIES:
        mine = sorted(key for key, libraries in owners.items() if libraries == {library})
        if len(mine) < 100:
            raise SparsityError(f"found {len(mine)} docstrings of {library}: is it installed? run `make install`")
        chosen = generator.sample(mine, min(per_library, len(mine)))
        start = 0.0
        for split, share in SHARES.items():
            part = chosen[round(start * len(chosen)) : round((start + share) * len(chosen))]
            rows[split] += [{"text": texts[key], "label": library} for key in part]
            start += share
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LIBRARIES))})
    for split in rows:
        generator.shuffle(rows[split])
    return DatasetDict({split: Dataset.from_list(part, features=features) for split, part in rows.items()})


def docstrings_of(library: str, generator: random.Random) -> Iterator[str]:
    """Docstrings of public functions and classes, file by file in random order."""
    paths = list(_files(library))
    generator.shuffle(paths)
    for path in paths:
        yield from _docstrings_in(path)


@functools.cache
def _files(library: str) -> tuple[Path, ...]:
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        return ()
    return tuple(sorted(path for path in Path(spec.origin).parent.rglob("*.py") if "tests" not in path.parts))


@functools.cache
def _docstrings_in(path: Path) -> tuple[str, ...]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return ()
    public = (
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    )
    return tuple(docstring for node in public if (docstring := ast.get_docstring(node)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the files go")
    parser.add_argument("--per_library", type=int, default=PER_LIBRARY, help="most texts of a library")
    parser.add_argument("--seed", type=int, default=42, help="another one takes other texts")
    flags = parser.parse_args()
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    names = {"train": "train", "validation": "dev", "test": "test"}
    for split, rows in docstrings(flags.seed, flags.per_library).items():
        named = {"text": rows["text"], "label": rows.features["label"].int2str(rows["label"])}
        Dataset.from_dict(named).rename_column("text", "sentence").to_csv(
            flags.output_dir / f"{names[split]}.csv", index=False
        )
        print(f"{len(rows)} texts in {flags.output_dir / names[split]}.csv")


if __name__ == "__main__":
    main()
