"""Metrics: how their results are called, read and compared, and the local modules that compute them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

METRICS = Path(__file__).parents[1] / "metrics"


@dataclass(frozen=True)
class Metric:
    """One figure that a task is judged by.

    Attributes:
        name: its key in what `compute_metrics` returns and in the result files.
        text: what people call it.
        higher_is_better: whether it is.
        percent: whether it is a share, which people read in percent.
    """

    name: str
    text: str
    higher_is_better: bool = True
    percent: bool = True

    def read(self, value: float) -> str:
        """Print a value as people read it."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.3g}"


ACCURACY, MACRO_F1 = Metric("accuracy", "accuracy"), Metric("f1", "macro F1")


@functools.cache
def local_metric(name: str) -> Callable[..., dict[str, Any]]:
    """Load the `compute` of a metric from metrics/, where `evaluate` needs no network; numbers of it are floats."""
    module = evaluate.load(str(METRICS / name), keep_in_memory=True)

    def compute(**inputs: Any) -> dict[str, Any]:
        return module.compute(**inputs) or {}

    return compute


def first(outputs: Any) -> Any:
    """The logits among what a model returns, of which they are the first."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def logits_of(prediction: EvalPrediction | PredictionOutput) -> np.ndarray:
    """The logits of all rows."""
    logits: np.ndarray = first(prediction.predictions)
    return logits


def class_metrics(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Accuracy and macro F1 of class indices of any shape; what has no label is marked by -100, as in transformers."""
    counted = actual != -100
    classes = {"predictions": predicted[counted], "references": actual[counted]}
    return {**local_metric("accuracy")(**classes), **local_metric("f1")(**classes)}
