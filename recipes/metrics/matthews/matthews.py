"""Matthews correlation as a local module of `evaluate`, so that no Hub is needed to compute it."""

from typing import Any

import datasets
import evaluate
import numpy as np


class Matthews(evaluate.Metric):
    """Correlation of predicted and actual classes, for two classes or more; 0 where either are all the same.

    From -1 to 1. It is Gorodkin's R_K (2004), which is Matthews' coefficient (1975) where there are two classes.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Correlation of predicted and actual classes, from -1 to 1.",
            citation="",
            inputs_description="predictions, references: class indices, shape (n,).",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        _, classes = np.unique([predictions, references], return_inverse=True)
        predicted, actual = np.eye(classes.max() + 1)[classes.reshape(2, -1)]
        predicted, actual = predicted - predicted.mean(0), actual - actual.mean(0)
        spread = float(np.sqrt(np.sum(predicted**2) * np.sum(actual**2)))
        return {"matthews_correlation": float(np.sum(predicted * actual)) / spread if spread else 0.0}
