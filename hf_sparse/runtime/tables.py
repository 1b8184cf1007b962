"""Print rows of text as columns, in terminals and in notebooks."""

import html
from collections.abc import Sequence


class Printed:
    """Shows in a notebook what `print` shows in a terminal."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Align rows of cells in columns, two spaces apart.

    Args:
        rows: of as many cells each; the first row is the head.
        left: numbers of the columns that are aligned to the left; the others are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
