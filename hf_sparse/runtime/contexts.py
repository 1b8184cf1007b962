"""What holds inside a block of code and is undone at its end, whatever happens in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove hooks, given by their handles, when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
