"""Compare the models of several runs: a table, and frontiers of what they are worth against what they cost."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from hf_sparse.report.charts import Point, frontier
from hf_sparse.report.frontier import Member, best, common_metrics, lower_is_better, members_of
from hf_sparse.report.html import number
from hf_sparse.report.report import Report

MOST_METRICS = 4
"""Metrics that have frontiers; the table has all."""


@dataclass(frozen=True)
class Comparison:
    """What a page shows of several models.

    Attributes:
        header: of the table.
        rows: cells of each model, as texts and as the values that they are sorted by.
        notes: what cannot be compared, in sentences.
        charts: frontiers as SVG, with their titles.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[tuple[str, float | str]]]
    notes: Sequence[str]
    charts: Sequence[tuple[str, Markup]]


def compare(reports: Mapping[str, Report]) -> Comparison:
    """Compare the models of several runs, and the dense ones that they began with.

    Args:
        reports: at least one, by the name of the run.
    """
    common, members = common_metrics(reports), members_of(reports)
    drawn = [pair for pair in common if pair[1] != "loss"] or common
    batches = {(report.input, report.batch) for report in reports.values()}
    timed = {(*batch, report.device) for batch in batches for report in reports.values()}
    costs: dict[str, Callable[[Member], float]] = {"weights, MB": lambda member: member.model.weight_bytes / 1e6}
    notes = []
    if len(batches) == 1:
        costs["MACs, G"] = lambda member: member.model.macs / 1e9
    else:
        notes.append("MACs are not compared: they are of batches of other sizes.")
    if len(timed) == 1:
        costs["latency, ms"] = lambda member: member.model.latency_ms
    else:
        notes.append("Latencies are not compared: they are of other devices, or of batches of other sizes.")
    return Comparison(
        ["#", "model", "removed", *costs, *(f"{split} {name}" for split, name in common)],
        [_row(i, member, costs, common) for i, member in enumerate(members)],
        notes,
        [
            (f"{split} {name}{', the lower the better' if lower_is_better(name) else ''}, against {cost}", chart)
            for split, name in drawn[:MOST_METRICS]
            for cost, read in costs.items()
            if (chart := _frontier(members, (split, name), cost, read)) is not None
        ],
    )


def _row(
    i: int, member: Member, costs: Mapping[str, Callable[[Member], float]], common: Sequence[tuple[str, str]]
) -> list[tuple[str, float | str]]:
    values = [read(member) for read in costs.values()]
    worth = [_worth(member, pair) for pair in common]
    numbers = [(number(value), value) for value in (*values, *worth)]
    return [(str(i), i), (member.name, member.name), (number(member.removed, ".1%"), member.removed), *numbers]


def _worth(member: Member, metric: tuple[str, str]) -> float:
    """One metric of a model; NaN if it is unknown."""
    split, name = metric
    return member.model.metrics.get(split, {}).get(name, math.nan)


def _frontier(
    members: Sequence[Member], metric: tuple[str, str], cost: str, read: Callable[[Member], float]
) -> Markup | None:
    """Draw the models of which cost and metric are known; None if there are none."""
    points = [
        Point(read(member), _worth(member, metric), str(i), member.name, member.dense)
        for i, member in enumerate(members)
    ]
    points = [point for point in points if math.isfinite(point.cost) and math.isfinite(point.worth)]
    if not points:
        return None
    name = " ".join(metric)
    label = f"{name} of {len(points)} models against {cost}"
    return frontier(points, best([(p.cost, p.worth) for p in points], lower_is_better(metric[1])), label, cost)
