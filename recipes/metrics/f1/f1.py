"""Macro-averaged F1 as a local module of `evaluate`, so that no Hub is needed to compute it."""

from typing import Any

import datasets
import evaluate
import numpy as np


class F1(evaluate.Metric):
    """Mean over the classes of 2 * true positives / (predicted + actual)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Macro-averaged F1 over the classes that occur.",
            citation="",
            inputs_description="predictions, references: class indices, shape (n,).",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, actual = np.asarray(predictions), np.asarray(references)
        scores = [
            2
            * np.sum((predicted == label) & (actual == label))
            / (np.sum(predicted == label) + np.sum(actual == label))
            for label in np.union1d(predicted, actual)
        ]
        return {"f1": float(np.mean(scores))}
