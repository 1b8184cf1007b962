"""Choose how many units blocks keep where not every number is possible, and which closed units are kept for that."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from hf_sparse.structure.blocks import Block


def uniform_counts(blocks: Sequence[Block], unit_costs: Mapping[str, float], density: float) -> dict[str, int]:
    """Choose how many units all blocks of a kind keep, so that all kinds together have a density.

    Kinds with few units are rounded first, and those with many make up for it.

    Args:
        blocks: with the same number of units, and of counts, in all of a kind.
        unit_costs: what a unit costs, by block name.
        density: share of the cost that is to stay, between 0 and 1.

    Returns:
        Units by kind.
    """
    units: dict[str, int] = {block.kind: block.units for block in blocks}
    costs = {kind: sum(unit_costs[block.name] for block in blocks if block.kind == kind) for kind in units}
    total = sum(units[kind] * costs[kind] for kind in units)
    possible: dict[str, tuple[int, ...]] = {block.kind: block.counts for block in blocks}
    left = density * total
    counts = {}
    for kind in sorted(units, key=lambda kind: units[kind]):
        wanted = left / total * units[kind]
        counts[kind] = min(possible[kind], key=lambda count: abs(count - wanted))
        left -= counts[kind] * costs[kind]
        total -= units[kind] * costs[kind]
    return counts


def widest_counts(kept: Mapping[str, Sequence[int]], blocks: Sequence[Block]) -> dict[str, int]:
    """Choose how many units each block keeps, by block name: as many as the widest of its kind."""
    widest: dict[str, int] = {}
    for block in blocks:
        widest[block.kind] = max(widest.get(block.kind, 0), len(kept[block.name]))
    return {block.name: min(count for count in block.counts if count >= widest[block.kind]) for block in blocks}


def filled(
    kept: Mapping[str, Sequence[int]], counts: Mapping[str, int], importances: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Add the most important closed units to the open ones until every block keeps `counts[block]`."""
    plan = {}
    for name, units in kept.items():
        open_units, order = set(units), importances[name].argsort(descending=True, stable=True).tolist()
        closed = [unit for unit in order if unit not in open_units]
        plan[name] = tuple(sorted([*units, *closed[: counts[name] - len(units)]]))
    return plan
