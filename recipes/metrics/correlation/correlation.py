"""Pearson's and Spearman's correlation as a local module of `evaluate`, so that no Hub is needed to compute them."""

from typing import Any

import datasets
import evaluate
import numpy as np


class Correlation(evaluate.Metric):
    """Correlation of predicted and actual numbers (`pearson`) and of their ranks (`spearmanr`), as GLUE names them.

    From -1 to 1. Both are 0 where either numbers are all the same: such a model tells nothing, and NaN would not say
    which of two models is better. Equal numbers share the mean of their ranks.
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Correlation of numbers and of their ranks, from -1 to 1.",
            citation="",
            inputs_description="predictions, references: numbers, shape (n,).",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, actual = np.asarray(predictions), np.asarray(references)
        return {"pearson": _pearson(predicted, actual), "spearmanr": _pearson(_ranks(predicted), _ranks(actual))}


def _pearson(one: Any, other: Any) -> float:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(numbers: Any) -> Any:
    _, places, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
