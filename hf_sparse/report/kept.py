"""Say which heads or neurons a sublayer kept, as ranges such as "0-3, 7", and read that again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hf_sparse.modeling_hf_sparse import runs


@dataclass(frozen=True)
class Kept:
    """The units that one sublayer kept.

    Attributes:
        units: their indices in the dense model, ascending, as ranges; empty if none is left.
        heads_per_unit: query heads of a unit, more than one where they share keys and values; 0 for neurons.
    """

    units: str
    heads_per_unit: int = 0

    @classmethod
    def of(cls, units: Sequence[int], heads_per_unit: int) -> "Kept":
        """Write ascending indices as ranges."""
        pairs = runs(list(units))
        texts = [str(start) if stop - start == 1 else f"{start}-{stop - 1}" for start, stop in pairs]
        return cls(", ".join(texts), heads_per_unit)

    def spans(self) -> list[tuple[int, int]]:
        """Read the ranges as (start, stop) pairs, counted in query heads or neurons.

        Raises:
            ValueError: they are not ascending ranges.
        """
        each, spans, last = self.heads_per_unit or 1, [], -1
        for text in self.units.split(", ") if self.units else ():
            found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text, re.ASCII)
            if found is None or not last < (start := int(found[1])) <= (last := int(found[2] or found[1])):
                raise ValueError(f"{text!r} is not a range of units")
            spans.append((start * each, (last + 1) * each))
        return spans
