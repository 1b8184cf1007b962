"""Mean intersection over union as a local module of `evaluate`, so that no Hub is needed to compute it."""

from typing import Any

import datasets
import evaluate
import numpy as np


class MeanIoU(evaluate.Metric):
    """Pixels that are predicted and actually of a class, divided by those that are either, as a mean over classes.

    From 0 to 1 (Everingham et al., 2010), with the mean share of each class that is found (`mean_accuracy`) and the
    share of all pixels that are right (`overall_accuracy`). All images count together. Classes that neither occur nor
    are predicted do not count, nor do pixels whose reference is `ignore_index`. `counts` says of how many pixels each
    pair of classes is; without it, of one.
    """

    def _info(self) -> evaluate.MetricInfo:
        pixel = datasets.Value("int32")
        return evaluate.MetricInfo(
            description="Intersection over union as a mean over classes, and accuracies; from 0 to 1.",
            citation="",
            inputs_description="predictions, references: classes of all pixels, or pairs that have counts, shape (n,).",
            features=datasets.Features({"predictions": pixel, "references": pixel}),
        )

    def _compute(
        self, predictions: Any, references: Any, ignore_index: int = 255, counts: np.ndarray | None = None
    ) -> dict[str, float]:
        counted = np.asarray(references) != ignore_index
        names, classes = np.unique([predictions, references], return_inverse=True)
        predicted, actual = classes.reshape(2, -1)[:, counted]
        cells, weights = actual * len(names) + predicted, None if counts is None else counts[counted]
        pairs = np.bincount(cells, weights, minlength=len(names) ** 2).reshape(len(names), -1)
        hits, claimed, wanted = np.diag(pairs), pairs.sum(0), pairs.sum(1)
        either = claimed + wanted - hits
        return {
            "mean_iou": float(np.mean(hits[either > 0] / either[either > 0])),
            "mean_accuracy": float(np.mean(hits[wanted > 0] / wanted[wanted > 0])),
            "overall_accuracy": float(hits.sum() / pairs.sum()),
        }
