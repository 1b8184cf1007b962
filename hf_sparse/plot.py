"""`structure.png`: the heads and neurons that every layer kept, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from hf_sparse.structure import LayerSizes

KEPT, GONE, INK = "#2563eb", "#e5e9f0", "#1f2937"


def plot_structure(layers: Sequence[LayerSizes], title: str, path: Path) -> None:
    """Draw kept attention heads as squares and kept FFN neurons as bars, a row per sublayer, and write a PNG."""
    panels = [
        (kind, [layer for layer in layers if layer.kind == kind])
        for kind in ("attention", "ffn")
        if any(layer.kind == kind for layer in layers)
    ]
    rows = max(len(sizes) for _, sizes in panels)
    figure = Figure(figsize=(5.2 * len(panels) + 0.6, 0.42 * rows + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (kind, sizes) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), column + 1)
        (_draw_heads if kind == "attention" else _draw_neurons)(axes, sizes)
        axes.set_yticks(range(len(sizes)), _labels(sizes))
        axes.set_ylim(len(sizes) - 0.4, -0.6)
        axes.tick_params(length=0, colors=INK, labelsize=9)
        for spine in axes.spines.values():
            spine.set_visible(False)
        kept, units = sum(layer.kept for layer in sizes), sum(layer.units for layer in sizes)
        name = "Attention heads" if kind == "attention" else "FFN neurons"
        axes.set_title(f"{name}: {kept:,} of {units:,} kept", loc="left", fontsize=10.5, color=INK)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.savefig(path, dpi=150, facecolor="white")


def _labels(sizes: Sequence[LayerSizes]) -> list[str]:
    """What to call each row: its layer, with its stack where the model has two, and whether it looks across."""
    stacks = [next((part for part in layer.block.split(".") if part in ("encoder", "decoder")), "") for layer in sizes]
    labels = []
    for layer, stack in zip(sizes, stacks):
        name = stack if len(set(stacks)) > 1 else "layer"
        cross = " cross" if "cross" in layer.block or "encoder_attn" in layer.block else ""
        labels.append(f"{name} {layer.layer}{cross}")
    return labels


def _draw_heads(axes: Axes, sizes: Sequence[LayerSizes]) -> None:
    for row, layer in enumerate(sizes):
        for head in range(layer.units):
            color = KEPT if head < layer.kept else GONE
            box = FancyBboxPatch((head + 0.12, row - 0.28), 0.76, 0.56, boxstyle="round,pad=0,rounding_size=0.15")
            box.set(facecolor=color, edgecolor="none")
            axes.add_patch(box)
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
