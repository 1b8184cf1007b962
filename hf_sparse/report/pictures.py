"""Draw pictures: of the heads and neurons that every layer kept, and of the models that one run leaves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import BoxStyle

from hf_sparse.report.charts import names
from hf_sparse.report.report import Report
from hf_sparse.structure.blocks import LayerSizes

MOST_PANELS = 6
KEPT, GONE, INK = "#2563eb", "#e5e9f0", "#1f2937"


def plot_structure(layers: Sequence[LayerSizes], title: str, path: Path) -> None:
    """Draw kept attention heads as squares and kept neurons as bars, a row per sublayer, and write a PNG."""
    heads = [layer for layer in layers if layer.kind == "attention"]
    neurons = [layer for layer in layers if layer.kind != "attention"]  # of an FFN, or of experts
    panels = [panel for panel in (("attention", heads), ("ffn", neurons)) if panel[1]]
    rows = max(len(sizes) for _, sizes in panels)
    figure = Figure(figsize=(5.2 * len(panels) + 0.6, 0.42 * rows + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (kind, sizes) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), column + 1)
        (_draw_heads if kind == "attention" else _draw_neurons)(axes, sizes)
        axes.set_yticks(range(len(sizes)), names(sizes))
        axes.set_ylim(len(sizes) - 0.4, -0.6)
        axes.tick_params(length=0, colors=INK, labelsize=9)
        for spine in axes.spines.values():
            spine.set_visible(False)
        kept, units = sum(layer.kept for layer in sizes), sum(layer.units for layer in sizes)
        name = "Attention heads" if kind == "attention" else "FFN neurons"
        axes.set_title(f"{name}: {kept:,} of {units:,} kept", loc="left", fontsize=10.5, color=INK)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.savefig(path, dpi=150, facecolor="white")


def _draw_heads(axes: Axes, sizes: Sequence[LayerSizes]) -> None:
    style = BoxStyle.Round(pad=0, rounding_size=0.15)
    heads = [(row, head, layer) for row, layer in enumerate(sizes) for head in range(layer.units)]
    boxes = [style(head + 0.12, row - 0.28, 0.76, 0.56, 1) for row, head, _ in heads]
    colors = [KEPT if head < layer.kept else GONE for _, head, layer in heads]
    axes.add_collection(PathCollection(boxes, facecolors=colors, edgecolors="none"))  # at once: one by one is slow
    for row, layer in enumerate(sizes):
        axes.text(layer.units + 0.3, row, f"{layer.kept}", va="center", fontsize=9, color=INK)
    axes.set_xlim(-0.2, max(layer.units for layer in sizes) + 1.4)
    axes.set_xticks([])


def _draw_neurons(axes: Axes, sizes: Sequence[LayerSizes]) -> None:
    widest = max(layer.units for layer in sizes)
    for row, layer in enumerate(sizes):
        axes.barh(row, layer.units, height=0.56, color=GONE)
        axes.barh(row, layer.kept, height=0.56, color=KEPT)
        axes.text(layer.units + widest * 0.02, row, f"{layer.kept:,}", va="center", fontsize=9, color=INK)
    axes.set_xlim(0, widest * 1.14)
    axes.set_xticks([])


def plot_family(members: Mapping[str, Report], path: Path) -> None:
    """Draw each metric of several models against their latency and their parameters, and write a PNG."""
    found = {
        (split, name)
        for report in members.values()
        for split, results in report.pruned.metrics.items()
        for name in results
        if name != "loss"
    }
    metrics = sorted(found)[:MOST_PANELS]
    figure = Figure(figsize=(8.4, 2.9 * max(len(metrics), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (split, name) in enumerate(metrics):
        for column, (label, value) in enumerate(
            [
                ("latency, ms", lambda model: model.latency_ms),
                ("parameters, million", lambda model: model.parameters / 1e6),
            ]
        ):
            axes = figure.add_subplot(len(metrics), 2, 2 * row + column + 1)
            pairs = [
                (value(report.pruned), report.pruned.metrics[split][name], report.achieved)
                for report in members.values()
                if name in report.pruned.metrics.get(split, {})
            ]
            axes.plot([x for x, *_ in pairs], [y for _, y, _ in pairs], "o-", color=KEPT)
            for x, y, removed in pairs:
                axes.annotate(f"{removed:.0%}", (x, y), textcoords="offset points", xytext=(5, -11), fontsize=8)
            axes.set_xlabel(label, fontsize=9, color=INK)
            axes.set_ylabel(f"{split} {name}", fontsize=9, color=INK)
            axes.tick_params(labelsize=8, colors=INK)
            axes.grid(color=GONE)
    figure.savefig(path, dpi=150, facecolor="white")
