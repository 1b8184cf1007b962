"""Names of classes: read from a column, put in order, and turned into numbers."""

from collections.abc import Callable
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, LargeList, List

from common.files import require_target
from hf_sparse import SparsityError


def label_names(rows: Dataset, column: str, split: str) -> list[Any]:
    """Read the labels of a column as text: one for every row, or a list of them for every row.

    Raises:
        SparsityError: a row has no label, or a decimal for one.
    """
    feature = _feature(rows, column)

    def name(value: Any) -> Any:
        if value is None:
            raise SparsityError(f"the {split} data has rows without a label in column {column!r}: fill or drop them")
        if isinstance(value, list):
            return [name(one) for one in value]
        if isinstance(value, dict):
            raise SparsityError(f"column {column!r} holds records: give the name of a class, or a list of names")
        if isinstance(feature, ClassLabel):
            return "-1" if value == -1 else feature.int2str(value)
        if isinstance(value, float) and not value.is_integer():
            raise SparsityError(f"column {column!r} holds decimals: this task needs classes")
        return str(int(value)) if isinstance(value, (float, int)) else str(value)

    return [name(value) for value in rows[column]]


def labels_by_split(
    splits: DatasetDict,
    column: str,
    cure: str,
    read: Callable[[Dataset, str, str], list[Any]] = label_names,
) -> dict[str, list[Any]]:
    """Read the labels of a column from all splits that have them.

    Test data need none, nor do those have any whose labels are all -1, as GLUE and ImageNet publish theirs.

    Args:
        splits: train, validation and perhaps test.
        column: of the labels.
        cure: what to do where a split has no such column.
        read: `label_names` or `numbers`.

    Raises:
        SparsityError: train or validation has no such column, or a row has no label.
    """
    labels = {split: read(rows, column, split) for split, rows in require_target(splits, column, cure).items()}
    if set(map(str, labels.get("test", ["-1"]))) <= {"-1", "-1.0"}:
        labels.pop("test", None)
    return labels


def class_names(train: Dataset, column: str) -> tuple[str, ...]:
    """The names of the classes in the order of their numbers.

    Raises:
        SparsityError: there is only one.
    """
    feature = _feature(train, column)
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    names = set(_flat(label_names(train, column, "train")))
    if len(names) < 2:
        raise SparsityError(
            f"the training data has one label only, {', '.join(names)!r}: there is nothing to tell apart"
        )
    numeric = all(name.lstrip("-").isdigit() for name in names)
    return tuple(sorted(names, key=int) if numeric else sorted(names))


def numbered(labels: list[Any], names: tuple[str, ...], split: str) -> list[Any]:
    """Turn labels, or lists of them, into indices of their names.

    Raises:
        SparsityError: a label is none of the training data.
    """
    known = {name: index for index, name in enumerate(names)}
    unknown = sorted(set(_flat(labels)) - set(known))
    if unknown:
        raise SparsityError(
            f"the {split} data has labels that the training data lacks: {', '.join(unknown[:5])}; training has "
            f"{', '.join(names[:10])}"
        )
    return [[known[one] for one in label] if isinstance(label, list) else known[label] for label in labels]


def _feature(rows: Dataset, column: str) -> Any:
    """What a label is, alone or in a list."""
    feature = rows.features[column]
    return feature.feature if isinstance(feature, List | LargeList) else feature


def _flat(labels: list[Any]) -> list[str]:
    return [one for label in labels for one in (label if isinstance(label, list) else [label])]


def numbers(rows: Dataset, column: str, split: str) -> list[float]:
    """Read the numbers of a column.

    Raises:
        SparsityError: a row has none.
    """
    for row, value in enumerate(rows[column], start=1):
        if not isinstance(value, (int, float)):
            what = "is empty" if value is None else f"is {value!r}, not a number"
            raise SparsityError(f"column {column!r} {what} in row {row} of the {split} data: mend or drop it")
    return [float(value) for value in rows[column]]
