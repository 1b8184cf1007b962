"""Print rows of text as columns."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Align rows of cells in columns, two spaces apart.

    Args:
        rows: of as many cells each; the first row is the head.
        left: numbers of the columns that begin at their left; the others end at their right.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
