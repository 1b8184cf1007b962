"""Draw charts as SVG for a page: bars of parts, what every layer kept, lines over steps, and frontiers.

They are written by hand and not by matplotlib, since only then can one style sheet give them the colours of light and
dark pages and of paper, the words in them stay words that can be found, read out and hovered over, and 80 layers take
some kilobytes. All are 340 units wide, which is what a phone has. Words in them are escaped by `Markup.format`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from hf_sparse.report.kept import Kept
from hf_sparse.structure.blocks import LayerSizes

WIDTH, LABELS, ROW = 340, 84, 16
MOST_POINTS = 300
"""Points of a line that are drawn; of more, evenly spaced ones."""
MOST_SQUARES = 160
"""Heads of a layer that are drawn as squares; more are a bar."""
_HOVERED = 300
"""Characters that fit what a pointer shows."""


@dataclass(frozen=True)
class _Scale:
    """Maps values from `low` to `high` to positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> str:
        span = self.high - self.low or 1.0
        return f"{self.start + (value - self.low) / span * (self.end - self.start):.1f}"

    @property
    def ticks(self) -> list[float]:
        """Round values, two to five of them."""
        rough = (self.high - self.low or 1.0) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _fitted(values: Sequence[float], start: float, end: float) -> _Scale:
    """Choose a scale on which values do not lie on the border."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return _Scale(low - margin, high + margin, start, end)


def _svg(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    text = '<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>'
    return Markup(text).format(WIDTH, height, label, Markup("").join(parts))


def _text(x: float | str, y: float | str, text: object, anchor: str = "start") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


# ---- Bars ----


def bars(rows: Mapping[str, Mapping[str, float]], label: str, unit: str) -> Markup:
    """Draw a bar for each row, stacked of its parts, all on one scale; the classes `part-NAME` have the colours.

    Args:
        rows: values by part, by the name of the row.
        label: what the chart shows, for those who do not see it.
        unit: of the values.
    """
    longest = max(sum(parts.values()) for parts in rows.values()) or 1.0
    drawn = []
    for i, (name, parts) in enumerate(rows.items()):
        at, total = float(LABELS), sum(parts.values())
        drawn.append(_text(0, 26 * i + 17, name))
        for part, value in parts.items():
            width = value / longest * (WIDTH - LABELS - 96)
            piece = '<rect class="part part-{}" x="{:.1f}" y="{}" width="{:.1f}" height="20"><title>{}</title></rect>'
            drawn.append(Markup(piece).format(part, at, 26 * i + 2, width, f"{name}, {part}: {value:,.4g} {unit}"))
            at += width
        drawn.append(_text(f"{at + 5:.1f}", 26 * i + 17, f"{total:,.4g} {unit}"))
    return _svg(26 * len(rows), label, drawn)


# ---- Structure ----


def structure(layers: Sequence[LayerSizes], kept: Mapping[str, Kept], label: str) -> Markup:
    """Draw a row for each sublayer: heads as squares, filled where they are kept; neurons as a bar.

    Args:
        layers: of one kind.
        kept: which ones, by block; of blocks that are not in it only the number is known, and the first are filled.
        label: what the chart shows, for those who do not see it.
    """
    widest = max(max(layer.units for layer in layers), 1)
    squares = layers[0].kind == "attention" and widest <= MOST_SQUARES
    each = min((WIDTH - LABELS - 50) / widest, ROW if squares else math.inf)
    drawn = []
    for i, layer in enumerate(layers):
        spans = [(0, layer.kept)] if not squares or layer.block not in kept else kept[layer.block].spans()
        group = max(kept[layer.block].heads_per_unit, 1) if layer.block in kept else 1
        y = ROW * i
        if squares:
            heads = {head for start, stop in spans for head in range(start, min(stop, layer.units))}
            paths = ["", ""]
            for head in range(layer.units):
                side = each * (0.82 if (head + 1) % group == 0 else 0.96)  # heads of a unit stand together
                paths[head in heads] += f"M{LABELS + head * each:.1f} {y + 3}h{side:.1f}v10h-{side:.1f}z"
            shapes = Markup('<path class="gone" d="{}"/><path class="kept" d="{}"/>').format(*paths)
        else:
            bar = '<rect class="{}" x="{}" y="{}" width="{:.1f}" height="10"/>'
            whole, left = layer.units * each, layer.kept * each
            shapes = Markup(bar).format("gone", LABELS, y + 3, whole) + Markup(bar).format("kept", LABELS, y + 3, left)
        which = _shortened(kept[layer.block].units) if layer.block in kept and layer.kept else ""
        text = f"{layer.block}: {layer.kept:,} of {layer.units:,}{': ' if which else ''}{which}"
        row = "<g><title>{}</title>{}{}{}</g>"
        count = _text(f"{LABELS + layer.units * each + 6:.1f}", y + 12, f"{layer.kept:,}")
        drawn.append(Markup(row).format(text, _text(0, y + 12, names(layers)[i]), shapes, count))
    return _svg(ROW * len(layers) + 4, label, drawn)


def _shortened(text: str) -> str:
    return text if len(text) <= _HOVERED else f"{text[:_HOVERED].rpartition(', ')[0]}, ..."


def names(layers: Sequence[LayerSizes]) -> list[str]:
    """Name each row: its layer, with its stack if the model has two, and whether it is cross attention."""
    stacks = [next((part for part in layer.block.split(".") if part in ("encoder", "decoder")), "") for layer in layers]
    cross = [" cross" if "cross" in layer.block or "encoder_attn" in layer.block else "" for layer in layers]
    several = len(set(stacks)) > 1
    return [f"{stack if several else 'layer'} {layer.layer}{also}" for layer, stack, also in zip(layers, stacks, cross)]


# ---- Lines ----


def thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """Take evenly spaced points of a long line, with its last."""
    stride = -(-len(points) // MOST_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def lines(series: Mapping[str, Sequence[tuple[int, float]]], marks: Sequence[int], label: str) -> Markup:
    """Draw values over steps, a line for each series; the classes `line-0`, `line-1`, ... have the colours.

    Args:
        series: (step, value) pairs by name, at least one in each.
        marks: steps that get a vertical line.
        label: what the chart shows, for those who do not see it.
    """
    shown = {name: thinned(points) for name, points in series.items()}
    steps = [step for points in shown.values() for step, _ in points] + list(marks)
    across = _Scale(min(0, *steps), max(1, *steps), 48, WIDTH - 8)
    up = _fitted([value for points in shown.values() for _, value in points], 150, 8)
    drawn = _axes(across, up, "step")
    for step in marks:
        mark = '<line class="mark" x1="{0}" x2="{0}" y1="8" y2="150"><title>{1}</title></line>'
        drawn.append(Markup(mark).format(across(step), f"step {step}: the model became smaller"))
    for i, (name, points) in enumerate(shown.items()):
        path = " ".join(f"{across(step)},{up(value)}" for step, value in points)
        line = '<polyline class="line line-{}" points="{}"><title>{}</title></polyline>'
        drawn.append(Markup(line).format(i % 7, path, name))
        if len(points) == 1:
            drawn.append(_dot(across(points[0][0]), up(points[0][1]), f"line-{i % 7}", name))
    return _svg(182, label, drawn)


def _axes(across: _Scale, up: _Scale, label: str) -> list[Markup]:
    drawn = []
    for tick in up.ticks:
        grid = '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
        drawn.append(Markup(grid).format(across.start, across.end, up(tick), up(tick)))
        drawn.append(_text(across.start - 4, f"{float(up(tick)) + 4:.1f}", f"{tick:.4g}", "end"))
    drawn += [_text(across(tick), up.start + 14, f"{tick:.5g}", "middle") for tick in across.ticks]
    drawn.append(_text((across.start + across.end) / 2, up.start + 29, label, "middle"))
    return drawn


def _dot(x: str, y: str, kind: str, title: str) -> Markup:
    return Markup('<circle class="dot {}" cx="{}" cy="{}" r="4.5"><title>{}</title></circle>').format(kind, x, y, title)


# ---- Frontiers ----


@dataclass(frozen=True)
class Point:
    """A model in a frontier: what it costs, what it is worth, and what stands beside it."""

    cost: float
    worth: float
    mark: str
    name: str
    dense: bool


def frontier(points: Sequence[Point], best: Sequence[int], label: str, cost: str) -> Markup:
    """Draw what models are worth against what they cost, with a line through those that no other one beats.

    Args:
        points: finite ones.
        best: their numbers, by ascending cost.
        label: what the chart shows, for those who do not see it.
        cost: what the cost is, with its unit.
    """
    across = _fitted([point.cost for point in points], 48, WIDTH - 24)
    up = _fitted([point.worth for point in points], 150, 14)
    places = [(across(point.cost), up(point.worth)) for point in points]
    path = " ".join(",".join(places[i]) for i in best)
    drawn = [*_axes(across, up, cost), Markup('<polyline class="line best" points="{}"/>').format(path)]
    for point, (x, y) in zip(points, places):
        title = f"{point.name}: {point.worth:.4g} at {point.cost:.4g} ({cost})"
        drawn.append(_dot(x, y, "dense" if point.dense else "kept", title))
        drawn.append(_text(x, f"{float(y) - 7:.1f}", point.mark, "middle"))
    return _svg(182, label, drawn)
