"""What the label of a text may be: a class, several, or a number; by what each is scored, and how it is written."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from common.metrics import ACCURACY, MACRO_F1, Metric, class_metrics, local_metric


@dataclass(frozen=True)
class Problem:
    """A kind of labels.

    Attributes:
        name: as configs of models say it.
        metrics: what it is judged by.
        compute: all metrics, from logits and labels.
        written: predictions as people read them, from logits and the names of the classes.
    """

    name: str
    metrics: tuple[Metric, ...]
    compute: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    written: Callable[[np.ndarray, Sequence[str]], Iterable[str]]


def _classes(logits: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    return class_metrics(logits.argmax(-1), actual)


def _second_class(logits: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    classes = {"predictions": logits.argmax(-1), "references": actual}
    return {**local_metric("accuracy")(**classes), **local_metric("f1")(**classes, positive=1)}


def _acceptability(logits: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    classes = {"predictions": logits.argmax(-1), "references": actual}
    return {**local_metric("accuracy")(**classes), **local_metric("matthews")(**classes)}


def _sets(logits: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    chosen, wanted = logits > 0, actual > 0.5
    cells = {"predictions": chosen.reshape(-1), "references": wanted.reshape(-1), "positive": 1}
    return {**local_metric("f1")(**cells), "accuracy": float((chosen == wanted).all(-1).mean())}


def _numbers(logits: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    return local_metric("correlation")(predictions=logits.reshape(-1), references=actual)


def _class_names(logits: np.ndarray, names: Sequence[str]) -> Iterable[str]:
    return (names[number] for number in logits.argmax(-1))


def _set_names(logits: np.ndarray, names: Sequence[str]) -> Iterable[str]:
    return (", ".join(name for name, logit in zip(names, row) if logit > 0) for row in logits)


def _decimals(logits: np.ndarray, names: Sequence[str]) -> Iterable[str]:
    return (f"{value:.3f}" for value in logits.reshape(-1))


ONE, SEVERAL = "single_label_classification", "multi_label_classification"
CLASSES = Problem(ONE, (ACCURACY, MACRO_F1), _classes, _class_names)
EQUIVALENCE = Problem(ONE, (ACCURACY, Metric("f1", "F1")), _second_class, _class_names)
ACCEPTABILITY = Problem(
    ONE, (ACCURACY, Metric("matthews_correlation", "Matthews correlation")), _acceptability, _class_names
)
SETS = Problem(SEVERAL, (Metric("f1", "micro F1"), Metric("accuracy", "all labels right")), _sets, _set_names)
NUMBERS = Problem(
    "regression",
    (Metric("pearson", "Pearson correlation"), Metric("spearmanr", "Spearman correlation")),
    _numbers,
    _decimals,
)
