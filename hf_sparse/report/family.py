"""Compare the models that one run leaves, in a table and a picture of what each size costs and is worth."""

import json
from collections.abc import Mapping
from pathlib import Path

from hf_sparse.report.report import Report
from hf_sparse.runtime.files import write_whole

FAMILY = "family"
"""Name of its files, with the suffixes .json, .md and .png."""


def write_family(directory: Path, members: Mapping[str, Report]) -> None:
    """Write family.json and family.md, a table with a row per model, and family.png, its picture.

    Args:
        directory: where the members are.
        members: reports by the name of a member's directory, the densest first.
    """
    from hf_sparse.report.pictures import plot_family  # matplotlib takes longer to import than all of hf_sparse

    rows = [
        {
            "model": name,
            "removed": report.achieved,
            "parameters": report.pruned.parameters,
            "weight_bytes": report.pruned.weight_bytes,
            "latency_ms": report.pruned.latency_ms,
            "speedup": report.speedup,
            "metrics": report.pruned.metrics,
        }
        for name, report in members.items()
    ]
    write_whole(directory / f"{FAMILY}.json", json.dumps(rows, indent=2) + "\n")
    write_whole(directory / f"{FAMILY}.md", family_table(members))
    plot_family(members, directory / f"{FAMILY}.png")


def family_table(members: Mapping[str, Report]) -> str:
    """Write the members as a table in Markdown."""
    names = sorted(
        {
            (split, name)
            for report in members.values()
            for split in report.pruned.metrics
            for name in report.pruned.metrics[split]
        }
    )
    header = ["model", "removed", "parameters", "MB", "ms", "speedup", *(f"{split} {name}" for split, name in names)]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for name, report in members.items():
        cells = [
            name,
            f"{report.achieved:.1%}",
            f"{report.pruned.parameters:,}",
            f"{report.pruned.weight_bytes / 1e6:.1f}",
            f"{report.pruned.latency_ms:.1f}",
            f"{report.speedup:.2f}x",
            *(f"{report.pruned.metrics.get(split, {}).get(metric, float('nan')):.4g}" for split, metric in names),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
