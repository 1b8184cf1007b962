"""Compare models by what they cost and what they are worth: which of them no other one beats."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_sparse.errors import SparsityError
from hf_sparse.report.report import ModelMeasurements, Report

_LOWER_IS_BETTER = ("loss", "perplexity", "wer", "cer")
"""Endings of the metrics that are errors; all others count as the higher, the better."""


@dataclass(frozen=True)
class Member:
    """One of the models that are compared.

    Attributes:
        name: what it is called.
        report: of its run.
        dense: whether it is the model before the run, and not the one after.
    """

    name: str
    report: Report
    dense: bool = False

    @property
    def model(self) -> ModelMeasurements:
        """What was measured of it."""
        return self.report.dense if self.dense else self.report.pruned

    @property
    def removed(self) -> float:
        """The share of the prunable cost that it lacks."""
        return 0.0 if self.dense else self.report.achieved


def members_of(reports: Mapping[str, Report]) -> list[Member]:
    """List the models of several runs, and before them each dense model that they began with, once."""
    found: dict[tuple[object, ...], Member] = {}
    for report in reports.values():
        model = report.dense
        alike = (model.parameters, model.weight_bytes, report.batch, model.macs, report.device, repr(model.metrics))
        found.setdefault(alike, Member("dense", report, dense=True))
    return [*found.values(), *(Member(name, report) for name, report in reports.items())]


def common_metrics(reports: Mapping[str, Report]) -> list[tuple[str, str]]:
    """List (split, name) of the metrics that all pruned models have."""
    first, *others = (_metrics(report) for report in reports.values())
    return [metric for metric in first if all(metric in other for other in others)]


def require_common_metrics(reports: Mapping[str, Report]) -> None:
    """Refuse to compare models that were not evaluated alike.

    Raises:
        SparsityError: some have metrics, but none that all have.
    """
    if not common_metrics(reports) and any(map(_metrics, reports.values())):
        owned = [
            f"{name} has {', '.join(' '.join(metric) for metric in _metrics(report)) or 'none'}"
            for name, report in reports.items()
        ]
        raise SparsityError(f"these runs have no metric in common ({'; '.join(owned)}): compare runs of one task")


def _metrics(report: Report) -> list[tuple[str, str]]:
    return [(split, name) for split, values in report.pruned.metrics.items() for name in values]


def lower_is_better(metric: str) -> bool:
    """Tell whether a metric is an error, by how its name ends."""
    return metric.endswith(_LOWER_IS_BETTER)


def best(points: Sequence[tuple[float, float]], lower: bool) -> list[int]:
    """Find the points that no other one beats: each costs less, or is worth more, than any other.

    Args:
        points: (cost, worth) of each; those that are not finite are left out.
        lower: whether a lower worth is better.

    Returns:
        Their numbers, by ascending cost.
    """
    sign = 1 if lower else -1
    finite = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
    found: list[int] = []
    for i in sorted(finite, key=lambda i: (points[i][0], sign * points[i][1])):
        if not found or sign * points[i][1] < sign * points[found[-1]][1]:
            found.append(i)
    return found
