"""Labelled text from csv, tsv, json or the Hub, checked before anything is trained."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from docstrings import docstrings

from hf_sparse import SparsityError


@dataclass(frozen=True)
class DataArguments:
    """Where the texts and labels come from; with none of these flags, from docstrings of installed libraries."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, such as nyu-mll/glue."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, such as sst2."})
    train_file: str | None = field(default=None, metadata={"help": "Training data: .csv, .tsv, .json or .jsonl."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, of the same kind."})
    test_file: str | None = field(
        default=None,
        metadata={"help": "Test data, of the same kind (optional); with --do_predict without labels, too."},
    )
    text_column_name: str | None = field(
        default=None,
        metadata={"help": "Column of the text; two, with a comma between, for pairs. Default: the only one."},
    )
    label_column_name: str = field(default="label", metadata={"help": "Column of the label, of text or integers."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to this number of tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation and test rows."})

    @property
    def embedded(self) -> bool:
        """Whether the embedded default data is used."""
        return self.dataset_name is None and self.train_file is None and self.validation_file is None


@dataclass(frozen=True)
class TextData:
    """Checked data: splits with the text columns and an integer column `label`.

    Attributes:
        splits: train, validation and perhaps test, which lacks the column `label` if its labels are not known.
        text_columns: one, or two for pairs.
        labels: the names of the classes; indices of the column `label` point into it.
        name: what to call the data in tables.
    """

    splits: DatasetDict
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    name: str


def load_text_data(arguments: DataArguments, seed: int) -> TextData:
    """Read and check the data.

    Raises:
        SparsityError: a file, column or label is missing, a split is empty, or labels do not fit.
    """
    if arguments.max_seq_length < 1:
        raise SparsityError(f"max_seq_length is {arguments.max_seq_length}: give a number of tokens above 0")
    for option in ("max_train_samples", "max_eval_samples"):
        if (limit := getattr(arguments, option)) is not None and limit < 1:
            raise SparsityError(f"{option} is {limit}: give a number of rows above 0, or leave it out for all")
    if arguments.test_file is not None and arguments.train_file is None:
        raise SparsityError("--test_file goes with --train_file and --validation_file: give those, too")
    if arguments.dataset_name is not None and arguments.train_file is not None:
        raise SparsityError("both --dataset_name and --train_file are given: leave one of them out")
    splits, name = _read(arguments, seed)
    for split, rows in splits.items():
        if not len(rows):
            raise SparsityError(f"the {split} data is empty: give a file with at least one row")
    label = arguments.label_column_name
    _require_columns({split: rows for split, rows in splits.items() if split != "test"}, [label])
    texts = _text_columns(arguments, splits["train"])
    _require_columns(splits, texts)
    _require_texts(splits, texts)
    labels = _labels(splits["train"], label)
    known = {name: index for index, name in enumerate(labels)}
    encoded = {}
    for split, rows in splits.items():
        names = _label_names(rows, label, split) if label in rows.column_names else []
        rows = rows.select_columns(list(texts))
        if split == "test" and set(names) <= {"-1"}:  # as GLUE publishes its test sets
            encoded[split] = rows
            continue
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise SparsityError(
                f"the {split} data has labels that the training data lacks: {', '.join(unknown[:5])}; training has "
                f"{', '.join(labels[:10])}"
            )
        encoded[split] = rows.add_column("label", [known[name] for name in names])
    limits = {"train": arguments.max_train_samples}
    for split, rows in encoded.items():
        limit = limits.get(split, arguments.max_eval_samples)
        encoded[split] = rows if limit is None else rows.select(range(min(limit, len(rows))))
    return TextData(DatasetDict(encoded), texts, labels, name)


def _require_texts(splits: DatasetDict, columns: tuple[str, ...]) -> None:
    for split, rows in splits.items():
        for column in columns:
            for number, text in enumerate(rows[column], start=1):
                if not isinstance(text, str):
                    what = "is empty" if text is None else f"is {text!r}, not a text"
                    raise SparsityError(
                        f"column {column!r} {what} in row {number} of the {split} data: mend or drop it"
                    )


def _read(arguments: DataArguments, seed: int) -> tuple[DatasetDict, str]:
    if arguments.embedded:
        return docstrings(seed), "docstrings"
    if arguments.dataset_name is not None:
        try:
            found = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
        except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError) as error:
            raise SparsityError(f"cannot load the data set {arguments.dataset_name}: {_first_line(error)}") from None
        missing = {"train", "validation"} - set(found)
        if missing:
            raise SparsityError(f"{arguments.dataset_name} has no {missing.pop()} split, only {', '.join(found)}")
        wanted = ("train", "validation", "test")
        return DatasetDict({split: found[split] for split in wanted if split in found}), arguments.dataset_name
    files = {
        split: path
        for split, path in (
            ("train", arguments.train_file),
            ("validation", arguments.validation_file),
            ("test", arguments.test_file),
        )
        if path is not None
    }
    for split in ("train", "validation"):
        if split not in files:
            raise SparsityError(f"--{split}_file is missing: give both --train_file and --validation_file")
    return DatasetDict({split: _read_file(path, split) for split, path in files.items()}), Path(files["train"]).stem


WORDS = {"keep_default_na": False, "na_values": [""]}
"""For pandas, to which "NA" and "null" would be no words."""


def _read_file(path: str, split: str) -> Dataset:
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        ".csv": ("csv", WORDS),
        ".tsv": ("csv", {**WORDS, "delimiter": "\t", "quoting": csv.QUOTE_NONE}),
        ".json": ("json", {}),
        ".jsonl": ("json", {}),
    }
    kind = kinds.get(Path(path).suffix.lower())
    if kind is None:
        raise SparsityError(f"--{split}_file {path}: give a .csv, .tsv, .json or .jsonl file")
    if not Path(path).is_file():
        raise SparsityError(f"--{split}_file {path}: there is no such file")
    if not Path(path).stat().st_size:
        raise SparsityError(f"the {split} data is empty: {path} has no bytes")
    try:
        return load_dataset(kind[0], data_files={split: path}, split=split, **kind[1])
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):  # how datasets puts a header without rows
            raise SparsityError(f"the {split} data is empty: {path} has no rows") from None
        raise SparsityError(f"--{split}_file {path} cannot be read as {kind[0]}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _require_columns(splits: dict[str, Dataset], columns: Sequence[str]) -> None:
    for split, rows in splits.items():
        for column in columns:
            if column not in rows.column_names:
                raise SparsityError(
                    f"the {split} data has no column {column!r}, only {', '.join(rows.column_names)}: set "
                    "--text_column_name and --label_column_name"
                )


def _text_columns(arguments: DataArguments, train: Dataset) -> tuple[str, ...]:
    if arguments.text_column_name is not None:
        columns = tuple(column.strip() for column in arguments.text_column_name.split(","))
        if len(columns) > 2:
            raise SparsityError(f"--text_column_name {arguments.text_column_name}: give one column, or two for pairs")
        return columns
    texts = [
        name
        for name, feature in train.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string") and name != arguments.label_column_name
    ]
    if len(texts) != 1:
        raise SparsityError(
            f"which column is the text? Set --text_column_name to one of {', '.join(texts or train.column_names)}, or "
            "to two of them, such as a,b, for pairs"
        )
    return (texts[0],)


def _label_names(rows: Dataset, label: str, split: str) -> list[str]:
    feature, values = rows.features[label], rows[label]
    if isinstance(feature, ClassLabel):
        return ["-1" if value == -1 else feature.int2str(value) for value in values]
    if any(value is None for value in values):
        raise SparsityError(f"the {split} data has rows without a label in column {label!r}: fill or drop them")
    if any(isinstance(value, list | dict) for value in values):
        raise SparsityError(f"column {label!r} holds several labels in a row: this recipe gives every text one class")
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        raise SparsityError(f"column {label!r} holds decimals: this recipe classifies, so give classes")
    return [str(int(value)) if isinstance(value, (float, int)) else str(value) for value in values]


def _labels(train: Dataset, label: str) -> tuple[str, ...]:
    feature = train.features[label]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    names = set(_label_names(train, label, "train"))
    if len(names) < 2:
        raise SparsityError(f"the training data has one label only, {names.pop()!r}: there is nothing to tell apart")
    numeric = all(name.lstrip("-").isdigit() for name in names)
    return tuple(sorted(names, key=int) if numeric else sorted(names))
