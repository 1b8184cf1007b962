"""Write what came of a run as one page of HTML, which loads nothing and opens from a mail."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from hf_sparse.report.charts import thinned
from hf_sparse.report.comparison import Comparison, compare
from hf_sparse.report.frontier import require_common_metrics
from hf_sparse.report.history import NOT_LOGGED, History
from hf_sparse.report.html import number, ratio, render
from hf_sparse.report.report import Report

PAGE = "report.html"
NO_MEMBERS: Mapping[str, Report] = MappingProxyType({})

Rows = Mapping[str, Mapping[str, float]]
"""Values by part, of the dense and of the pruned model."""


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        name: of its directory.
        report: of its model.
        history: what its training has logged.
        members: reports of the models that it leaves, the densest first, where it has several targets.
        loading: ways to load its model: words, and code.
    """

    name: str
    report: Report
    history: History = NOT_LOGGED
    members: Mapping[str, Report] = field(default_factory=dict)
    loading: Sequence[tuple[str, str]] = ()

    def page(self) -> str:
        """Write the page of the run."""
        return render("run.html", {"run": self, "report": self.report})

    @property
    def bars(self) -> list[tuple[str, str, str, Rows]]:
        """The charts of what the models cost: title, label, unit and values."""
        report = self.report
        models = {"dense": report.dense, "pruned": report.pruned}
        weights = {
            name: {part: sizes[i] / 1e6 for part, sizes in report.parts.items()} or {"whole": model.weight_bytes / 1e6}
            for i, (name, model) in enumerate(models.items())
        }
        whole = (
            ("latency", "ms", {name: {"whole": model.latency_ms} for name, model in models.items()}),
            ("multiply-accumulates", "G", {name: {"whole": model.macs / 1e9} for name, model in models.items()}),
        )
        return [
            ("Weights, in MB", "weights of the dense and the pruned model in MB", "MB", weights),
            *(
                (f"{name}, {report.batch_text}".capitalize(), f"{name} of both models in {unit}", unit, rows)
                for name, unit, rows in whole
                if all(number(row["whole"]) != "unknown" for row in rows.values())
            ),
        ]

    def bar_table(self, rows: Rows) -> list[tuple[str, str, str, str]]:
        """The rows of the table of a chart of bars."""
        dense, pruned = rows["dense"], rows["pruned"]
        parts = [(part, dense[part], pruned[part]) for part in dense]
        if len(parts) > 1:
            parts.append(("all", sum(dense.values()), sum(pruned.values())))
        return [(name, number(before), number(after), ratio(after, before)) for name, before, after in parts]

    def history_table(self, series: Mapping[str, Sequence[tuple[int, float]]]) -> list[list[str]]:
        """The rows of the table of a chart of lines: a step, and what was logged there."""
        found: dict[int, dict[str, float]] = {}
        for name, points in series.items():
            for step, value in thinned(points):
                found.setdefault(step, {})[name] = value
        return [
            [str(step), *(number(values[name]) if name in values else "" for name in series)]
            for step, values in sorted(found.items())
        ]

    @property
    def family(self) -> Comparison | None:
        """The models that the run leaves, compared; None where it leaves one."""
        return compare(self.members) if len(self.members) > 1 else None

    @property
    def settings(self) -> dict[str, str]:
        """All settings of the run, by name."""
        sparsity = self.report.sparsity
        return {one.name: repr(getattr(sparsity, one.name)) for one in fields(sparsity)}


def comparison_page(reports: Mapping[str, Report]) -> str:
    """Write a page that compares several runs, by name.

    Raises:
        SparsityError: they have no metric in common.
    """
    require_common_metrics(reports)
    return render("runs.html", {"names": list(reports), "comparison": compare(reports)})
