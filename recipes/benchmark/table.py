"""The table and the picture of what compare.py and measure.py have found.

    python recipes/benchmark/table.py --task sst2 --picture frontier.png

Prints, in Markdown, a row per method and target: accuracy (or perplexity) as the mean over dev and test and over seeds,
with the standard deviation over seeds, the parameters that were really removed, training time, and speedups.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SPEEDUPS = ("torch_1", "torch_32", "onnx_1", "onnx_32", "macs_32")
COLORS = {"ours": "#2563eb", "torch-pruning": "#dc2626", "hard-concrete": "#d97706", "taylor": "#059669"}
Line = Mapping[str, Any]


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON lines file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def cells(results: Sequence[Line], measurements: Sequence[Line]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Results with their measurements, by method and target; the best method of each target first."""
    measured = {line["model"]: line for line in measurements}
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    usual = statistics.mode([line["epochs"] for line in results] or [0.0])
    for line in results:
        searches = line["method"] in ("ours", "family")  # the others have no groups
        options = {name: value for name, value in json.loads(line["options"]).items() if searches or name != "group"}
        settings = [f"{name} {value}" for name, value in options.items()]
        settings += [f"{line['epochs']:g} epochs"] if line["epochs"] != usual else []
        label = f"{line['method']} ({', '.join(settings)})" if settings else line["method"]
        target = line.get("member", line["target"]) or 0.0
        found.setdefault((label, target), []).append({**measured.get(line["model"], {}), **line})
    sign = 1 if any(line["task"] == "language" for line in results) else -1  # of perplexity, less is better
    return dict(sorted(found.items(), key=lambda item: (item[0][1], sign * _mean(item[1], "mean"))))


def _mean(lines: Sequence[Line], name: str) -> float:
    values = [line[name] for line in lines if name in line]
    return statistics.fmean(values) if values else float("nan")


def table(found: Mapping[tuple[str, float], Sequence[Line]]) -> str:
    """Rows in Markdown."""
    speedups = [name for name in SPEEDUPS if any(name in line for lines in found.values() for line in lines)]
    header = ["target", "method", "removed", "dev", "test", "mean", "runs", "training", *speedups]
    rows = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for (method, target), lines in found.items():
        means = [line["mean"] for line in lines]
        spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
        row = [
            f"{target:.0%}",
            method,
            f"{_mean(lines, 'removed'):.1%}",
            f"{_mean(lines, 'validation'):.1f}",
            f"{_mean(lines, 'test'):.1f}",
            f"{statistics.fmean(means):.1f}{spread}",
            str(len(means)),
            f"{_mean(lines, 'cpu_seconds'):.0f} s",
            *(f"{_mean(lines, name):.2f}x" if any(name in line for line in lines) else "" for name in speedups),
        ]
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def picture(found: Mapping[tuple[str, float], Sequence[Line]], dense: float, path: Path) -> None:
    """Accuracy against measured speedup, a line per method as it comes, a panel per engine and batch."""
    panels = [name for name in SPEEDUPS if not name.startswith("macs")]
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for column, name in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), column + 1)
        for method in dict.fromkeys(method for method, _ in found if "(" not in method):  # other settings: the table
            points = [
                (_mean(lines, name), _mean(lines, "mean")) for (m, t), lines in found.items() if m == method and t
            ]
            points = sorted(point for point in points if point[0] == point[0])
            if points:
                axes.plot(
                    *zip(*points), "o-", label=method, color=COLORS.get(method), lw=2.4 if method == "ours" else 1.3
                )
        axes.axhline(dense, color="#1f2937", lw=0.8, ls="--")
        engine, _, batch = name.partition("_")
        axes.set_title(f"{engine}, batch {batch}", loc="left", fontsize=10)
        axes.set_xlabel("times as fast as dense", fontsize=9)
        axes.grid(color="#e5e9f0")
    figure.axes[0].set_ylabel("accuracy, mean of dev and test", fontsize=9)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="docstrings", help="as given to compare.py")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmark/results.jsonl"))
    parser.add_argument("--measurements", type=Path, default=Path("runs/benchmark/measurements.jsonl"))
    parser.add_argument("--max_steps", type=int, help="show only runs of so many steps")
    parser.add_argument("--dense", type=float, help="accuracy of the dense model, a dashed line in the picture")
    parser.add_argument("--picture", type=Path, help="PNG to draw accuracy against speedup into")
    flags = parser.parse_args()
    results = [line for line in read(flags.results) if line["task"] == flags.task]
    if flags.max_steps is not None:
        results = [line for line in results if line.get("max_steps") == flags.max_steps]
    found = cells(results, [line for line in read(flags.measurements) if line["task"] == flags.task])
    print(table(found))
    if flags.picture is not None:
        picture(found, flags.dense if flags.dense is not None else float("nan"), flags.picture)


if __name__ == "__main__":
    main()
