"""F1 as a local module of `evaluate`, so that no Hub is needed to compute it."""

from typing import Any

import datasets
import evaluate
import numpy as np


class F1(evaluate.Metric):
    """Mean over the classes, or of one, of 2 * true positives / (predicted + actual)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 of one class, or the macro average over the classes that occur.",
            citation="",
            inputs_description="predictions, references: class indices, shape (n,); positive: the one class, if any.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any, positive: int | None = None) -> dict[str, float]:
        predicted, actual = np.asarray(predictions), np.asarray(references)
        labels = np.union1d(predicted, actual) if positive is None else [positive]
        hits = [np.sum((predicted == label) & (actual == label)) for label in labels]
        counts = [np.sum(predicted == label) + np.sum(actual == label) for label in labels]
        # A class that is neither there nor predicted has none: 0, as scikit-learn counts it.
        return {"f1": float(np.mean([2 * hit / max(count, 1) for hit, count in zip(hits, counts)]))}
