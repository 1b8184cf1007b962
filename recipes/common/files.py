"""Splits of data from files or the Hub, checked before anything is trained."""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from hf_sparse import SparsityError

SPLITS = ("train", "validation", "test")
WORDS = {"keep_default_na": False, "na_values": [""]}
"""For pandas, to which "NA" and "null" would be no words."""
Kinds = Mapping[str, tuple[str, dict[str, Any]]]
"""By the end of a file's name, the builder of datasets that reads it, and its options."""
KINDS: Kinds = {
    ".csv": ("csv", WORDS),
    ".tsv": ("csv", {**WORDS, "delimiter": "\t", "quoting": csv.QUOTE_NONE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}
DATA_FIELD = re.compile(r'\s*\{\s*("version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[\s*\{')
"""How a .json file begins that has its rows under "data", as SQuAD's do."""


@dataclass(frozen=True)
class DataArguments:
    """Where the rows come from; with none of these flags, from what is installed."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, such as nyu-mll/glue."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, such as sst2."})
    train_file: str | None = field(default=None, metadata={"help": "Training data: .csv, .tsv, .json or .jsonl."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation data, of the same kind.", "aliases": ["--eval_file"]}
    )
    test_file: str | None = field(
        default=None,
        metadata={"help": "Test data, of the same kind (optional); with --do_predict without labels, too."},
    )
    train_split_name: str = field(default="train", metadata={"help": "Split of --dataset_name to train on."})
    validation_split_name: str = field(
        default="validation", metadata={"help": "Its split to validate on.", "aliases": ["--eval_split_name"]}
    )
    test_split_name: str = field(default="test", metadata={"help": "Its split to test on, if there is one."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation and test rows."})
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "Use only so many test rows. Default: as --max_eval_samples."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that encode the rows."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Encode rows anew that were encoded before."})

    @property
    def on_hub(self) -> tuple[str | None, str | None]:
        """The data set on the Hub and its configuration."""
        return self.dataset_name, self.dataset_config_name

    @property
    def split_names(self) -> dict[str, str]:
        """What the splits are called on the Hub."""
        return {split: getattr(self, f"{split}_split_name") for split in SPLITS}

    @property
    def files(self) -> dict[str, str]:
        """The files that are given, by split."""
        given = {split: getattr(self, f"{split}_file") for split in SPLITS}
        return {split: path for split, path in given.items() if path is not None}

    @property
    def kinds(self) -> Kinds:
        """The files that can be read."""
        return KINDS

    def read_split(self, split: str, path: Path) -> Dataset:
        """Read the rows of one split from where `files` says they are.

        Raises:
            SparsityError: they cannot be read.
        """
        return _read_file(path, split, self.kinds)

    @property
    def validation_share(self) -> float | None:
        """The share of the training data to validate on where there is no other; None to refuse that."""
        return None

    @property
    def needed(self) -> Sequence[str]:
        """The splits that must be given."""
        return SPLITS[: 2 if self.validation_share is None else 1]

    @property
    def embedded(self) -> bool:
        """Whether the embedded default data is used."""
        return self.on_hub[0] is None and set(self.files) <= {"test"}

    def check(self) -> None:
        """Refuse numbers and combinations that mean nothing.

        Raises:
            SparsityError: there are some.
        """
        for option in ("max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers"):
            if (limit := getattr(self, option)) is not None and limit < 1:
                raise SparsityError(f"{option} is {limit}: give a number above 0, or leave it out")
        if "test" in self.files and self.embedded:
            raise SparsityError("--test_file goes with --train_file and --validation_file: give those, too")
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise SparsityError(
                f"a share of {self.validation_share:g} cannot be validated on: give one between 0 and 1"
            )
        if self.dataset_name is not None and self.files:
            raise SparsityError("both --dataset_name and --train_file are given: leave one of them out")

    def read(self, seed: int, cache_dir: str | None = None, token: str | None = None) -> DatasetDict:
        """Read train, validation and perhaps test rows from the Hub or from files.

        Raises:
            SparsityError: a file or a split is missing, cannot be read or is empty.
        """
        name, config = self.on_hub
        splits = _read_files(self) if name is None else _read_hub(name, config, self, cache_dir, token)
        for split, rows in splits.items():
            if not len(rows):
                raise SparsityError(f"the {split} data is empty: give a file with at least one row")
        if "validation" not in splits:
            parts = splits["train"].train_test_split(self.validation_share, seed=seed)
            splits |= {"train": parts["train"], "validation": parts["test"]}
        return DatasetDict({split: splits[split] for split in SPLITS if split in splits})

    def limited(self, splits: DatasetDict) -> DatasetDict:
        """The first rows of every split, as many as the flags allow."""
        limits = {"train": self.max_train_samples, "test": self.max_predict_samples or self.max_eval_samples}
        found = {}
        for split, rows in splits.items():
            limit = limits.get(split, self.max_eval_samples)
            found[split] = rows if limit is None else rows.select(range(min(limit, len(rows))))
        return DatasetDict(found)


@dataclass(frozen=True)
class DividedArguments(DataArguments):
    """`DataArguments` that put a part of the training data aside where there are no validation data."""

    validation_split_percentage: float = field(
        default=5, metadata={"help": "Percent of the training data to validate on where no validation data are given."}
    )

    @property
    def validation_share(self) -> float:
        """The share of the training data to validate on where there is no other."""
        return self.validation_split_percentage / 100


def _read_hub(
    name: str, config: str | None, arguments: DataArguments, cache_dir: str | None, token: str | None
) -> DatasetDict:
    try:
        found = load_dataset(name, config, cache_dir=cache_dir, token=token)
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError) as error:
        raise SparsityError(f"cannot load the data set {name}: {_first_line(error)}") from None
    called = arguments.split_names
    for split in arguments.needed:
        if called[split] not in found:
            raise SparsityError(
                f"{name} has no {called[split]} split, only {', '.join(found)}: set --{split}_split_name"
            )
    return DatasetDict({split: found[called[split]] for split in SPLITS if called[split] in found})


def _read_files(arguments: DataArguments) -> DatasetDict:
    files = arguments.files
    for split in arguments.needed:
        if split not in files:
            raise SparsityError(f"--{split}_file is missing: give both --train_file and --validation_file")
    return DatasetDict({split: arguments.read_split(split, Path(path)) for split, path in files.items()})


def _read_file(path: Path, split: str, kinds: Kinds) -> Dataset:
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        *others, last = kinds
        raise SparsityError(f"--{split}_file {path}: give a {', '.join(others)} or {last} file")
    if not path.is_file():
        raise SparsityError(f"--{split}_file {path}: there is no such file")
    if not path.stat().st_size:
        raise SparsityError(f"the {split} data is empty: {path} has no bytes")
    builder, options = kind
    if builder == "json":
        with path.open(encoding="utf-8", errors="replace") as file:
            options = {**options, "field": "data"} if DATA_FIELD.match(file.read(4096)) else options
    return load_rows(builder, str(path), split, f"--{split}_file {path}", **options)


def load_rows(builder: str, pattern: str, split: str, given: str, **options: Any) -> Dataset:
    """Load the rows of files with a builder of datasets; `given` is the flag and its value.

    Raises:
        SparsityError: it cannot read them, or finds no rows.
    """
    try:
        return load_dataset(builder, data_files={split: pattern}, split=split, **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):  # how datasets puts a header without rows
            raise SparsityError(f"the {split} data is empty: {given} has no rows") from None
        raise SparsityError(f"{given} cannot be read as {builder}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def require_columns(splits: DatasetDict, columns: Sequence[str], cure: str) -> None:
    """Check that every split has the columns.

    Raises:
        SparsityError: one has not; `cure` says what to do.
    """
    for split, rows in splits.items():
        for column in columns:
            if column not in rows.column_names:
                raise SparsityError(
                    f"the {split} data has no column {column!r}, only {', '.join(rows.column_names)}: {cure}"
                )


def require_target(splits: DatasetDict, column: str, cure: str) -> DatasetDict:
    """Check that every split has the column of what is to be predicted, which test data may lack.

    Returns:
        The splits that have it.

    Raises:
        SparsityError: another than the test data has not; `cure` says what to do.
    """
    having = {split: rows for split, rows in splits.items() if split != "test" or column in rows.column_names}
    require_columns(DatasetDict(having), [column], cure)
    return DatasetDict(having)


def holds_texts(feature: Any) -> bool:
    """Tell whether a column of this feature holds texts."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def require_texts(splits: DatasetDict, columns: Sequence[str]) -> None:
    """Check that every row has a text in these columns.

    Raises:
        SparsityError: one has none.
    """
    for split, rows in splits.items():
        for column in columns:
            for number, text in enumerate(rows[column], start=1):
                if not isinstance(text, str):
                    what = "is empty" if text is None else f"is {text!r}, not a text"
                    raise SparsityError(
                        f"column {column!r} {what} in row {number} of the {split} data: mend or drop it"
                    )
