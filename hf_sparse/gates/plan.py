"""`PruningPlan`: what every block keeps, by original index; frozen, with a JSON round trip."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hf_sparse.errors import SparsityError
from hf_sparse.modeling_hf_sparse import runs
from hf_sparse.runtime.tables import Printed, table

_LINES, _RANGES = 50, 6
"""What fits a screen: blocks below each other, and ranges of units in a line."""


@dataclass(frozen=True, repr=False)
class PruningPlan(Printed):
    """Kept unit indices by block name; a block that is not named is kept whole, an empty tuple removes the block.

    Raises:
        SparsityError: indices are not distinct, ascending, non-negative integers.
    """

    kept: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        kept = {}
        for name, units in self.kept.items():
            units = tuple(units)
            if any(type(unit) is not int or unit < 0 for unit in units) or list(units) != sorted(set(units)):
                raise SparsityError(
                    f"plan for block {name!r}: give distinct, ascending unit indices, all integers >= 0"
                )
            kept[name] = units
        object.__setattr__(self, "kept", MappingProxyType(kept))

    def __repr__(self) -> str:
        units = sum(map(len, self.kept.values()))
        removed = sum(not units for units in self.kept.values())
        return f"PruningPlan({len(self.kept)} blocks: {units:,} units kept, {removed} blocks removed)"

    def __str__(self) -> str:
        """Print a table that fits a screen: the kept units of each block, or only how many if blocks are many."""
        rows = [(name, f"{len(units):,}", _ranges(units)) for name, units in self.kept.items()]
        if len(rows) > _LINES:
            alike: dict[str, list[int]] = {}
            for name, units in self.kept.items():
                alike.setdefault(re.sub(r"\d+", "*", name), []).append(len(units))
            rows = [
                (pattern, f"{sum(counts):,}", f"{min(counts):,} to {max(counts):,} in {len(counts)} blocks")
                for pattern, counts in alike.items()
            ]
        rows.insert(0, ("block", "kept", "units"))
        return table(rows, left=(0, 2))

    def then(self, later: "PruningPlan") -> "PruningPlan":
        """Join this plan and a later one, whose indices count the units that this plan has kept."""
        kept = dict(self.kept)
        for name, units in later.kept.items():
            kept[name] = tuple(self.kept[name][unit] for unit in units) if name in self.kept else units
        return PruningPlan(kept)

    def to_json(self) -> str:
        """Write the plan as a JSON object `{"kept": {block: [unit, ...]}}`."""
        return json.dumps({"kept": {name: list(units) for name, units in self.kept.items()}})

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Read a plan that `to_json` wrote.

        Raises:
            SparsityError: the text is not a plan.
        """
        try:
            data: Any = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise SparsityError(f"not a pruning plan: invalid JSON ({error})") from None
        kept = data.get("kept") if isinstance(data, dict) else None
        if not isinstance(kept, dict) or not all(isinstance(units, list) for units in kept.values()):
            raise SparsityError('not a pruning plan: expected {"kept": {block name: [unit indices]}}')
        return cls({name: tuple(units) for name, units in kept.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        # The read-only view of the mapping cannot be pickled or copied; its contents can.
        return (type(self), (dict(self.kept),))


def _ranges(units: tuple[int, ...]) -> str:
    """Ascending indices as ranges, such as "0-3, 7"; the first few of many."""
    found = runs(list(units))
    texts = [str(start) if stop - start == 1 else f"{start}-{stop - 1}" for start, stop in found[:_RANGES]]
    return ", ".join(texts) + (", ..." if len(found) > _RANGES else "")
