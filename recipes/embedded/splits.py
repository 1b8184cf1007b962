"""Divides what was shuffled into splits."""

from typing import Any


def split(items: Any) -> dict[str, Any]:
    """Cut a sequence, or an array along its first axis, into 80, 10 and 10 percent: train, validation and test."""
    ends = [round(share * len(items)) for share in (0, 0.8, 0.9, 1)]
    return {name: items[start:end] for name, start, end in zip(("train", "validation", "test"), ends, ends[1:])}
