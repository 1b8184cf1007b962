"""Find out which entries of parameters belong to which head or neuron, from what their columns reach.

A column is an entry of a projection's input. The columns of an FFN's down projection each depend on channels of the
up projection that no other column depends on; the columns of one attention head all depend on the same queries.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_sparse.structure.dependencies import Probe, Reach


class CoupledError(Exception):
    """Units depend on each other, so that none can be removed exactly; the message tells why."""


@dataclass(frozen=True)
class Ownership:
    """What the units of one block own.

    Attributes:
        columns: input columns of the output projection, shape (units, columns per unit).
        channels: by path of a projection its output channels, shape (units, channels per unit).
        entries: by name of another parameter the dimension and the positions along it, shape (units, positions).
        heads_per_unit: query heads per unit; 0 for neurons.
        head_dim: columns per query head; 0 for neurons.
    """

    columns: Tensor
    channels: dict[str, Tensor]
    entries: dict[str, tuple[int, Tensor]]
    heads_per_unit: int = 0
    head_dim: int = 0


# ---- Neurons: every column has channels of its own ----


@dataclass
class OwnerTable:
    """The single column that each position of a vector belongs to, told bit by bit of the column's index.

    Attributes:
        owner: index of the column, as far as it is known, shape (positions,).
        several: positions that more than one column reaches.
        everywhere: positions that columns of either value reach, for every bit: all columns share them.
        reached: positions that any column reaches.
    """

    owner: Tensor
    several: Tensor
    everywhere: Tensor
    reached: Tensor

    @classmethod
    def empty(cls, positions: int) -> "OwnerTable":
        """Make a table that knows nothing yet."""
        no = torch.zeros(positions, dtype=torch.bool)
        return cls(torch.zeros(positions, dtype=torch.long), no, ~no, no)

    def add(self, bit: int, zeros: Tensor, ones: Tensor) -> None:
        """Record which positions are reached by the columns with a 0, and by those with a 1, at this bit."""
        self.owner = self.owner | (ones.long() << bit)
        self.several = self.several | (zeros & ones)
        self.everywhere = self.everywhere & zeros & ones
        self.reached = self.reached | zeros | ones

    def index(self, columns: int) -> Tensor | None:
        """Return the positions of each column, shape (columns, positions per column); None without one owner each."""
        if self.several.any() or not self.reached.all() or len(self.owner) % columns:
            return None
        if (torch.bincount(self.owner, minlength=columns) != len(self.owner) // columns).any():
            return None
        return self.owner.argsort(stable=True).view(columns, -1)


@dataclass
class OwnerTables:
    """An owner table for every dimension of every tensor that columns may reach."""

    tables: dict[tuple[str, int], OwnerTable] = field(default_factory=dict)

    def add(self, bit: int, zeros: Reach, ones: Reach) -> None:
        """Record what is reached by the columns with a 0, and by those with a 1, at this bit."""
        for name in zeros:
            for dim in range(zeros[name].ndim):
                table = self.tables.setdefault((name, dim), OwnerTable.empty(zeros[name].shape[dim]))
                table.add(bit, _along(zeros[name], dim), _along(ones[name], dim))

    def owned(self, name: str, columns: int) -> tuple[int, Tensor] | None:
        """Find the dimension of a tensor whose positions have one owner each, and these; None if columns share it.

        Raises:
            CoupledError: it is neither.
        """
        tables = [(dim, table) for (found, dim), table in self.tables.items() if found == name]
        for dim, table in tables:
            index = table.index(columns)
            if index is not None:
                return dim, index
        if all(table.everywhere.all() for _, table in tables):
            return None
        raise CoupledError(f"several of its inputs depend on the same entries of {name}")


def _along(mask: Tensor, dim: int) -> Tensor:
    """Positions along a dimension at which anything is set."""
    return mask.movedim(dim, 0).flatten(1).any(1) if mask.ndim > 1 else mask


def owners_by_bits(columns: int, reach: Callable[[Tensor], Reach]) -> OwnerTables:
    """Find the owner of every position with 2 log2(columns) probes, each of half of the columns."""
    tables, every = OwnerTables(), torch.arange(columns)
    for bit in range(max(1, (columns - 1).bit_length())):
        ones = (every >> bit) & 1 == 1
        tables.add(bit, reach(every[~ones]), reach(every[ones]))
    return tables


def neurons(probe: Probe, path: str) -> Ownership:
    """Find what the neurons of the FFN with this down projection own.

    Raises:
        CoupledError: they share channels.
    """
    columns = probe.inputs[path].shape[probe.channels[path]]
    tables = owners_by_bits(columns, lambda some: probe.reach(path, some))
    channels, entries = {}, {}
    for name in probe.sources(path):
        owned = tables.owned(name, columns)
        if owned is None and name in probe.leaves:
            raise CoupledError(f"all of its inputs depend on all outputs of {name}")
        if owned is not None and name in probe.leaves:
            channels[name] = owned[1]
        elif owned is not None:
            entries[name] = owned
    return Ownership(torch.arange(columns).view(-1, 1), channels, entries)


# ---- Heads: blocks of columns with queries in common ----


def _common(one: Reach, other: Reach) -> Reach:
    return {name: one[name] & other[name] for name in one}


def _same(one: Reach, other: Reach) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def head_width(probe: Probe, path: str) -> int:
    """Find the columns per query head: the first column index that no longer shares all queries with column 0.

    Raises:
        CoupledError: heads of one width cannot be told apart.
    """
    columns = probe.inputs[path].shape[probe.channels[path]]
    channels = [name for name in probe.sources(path) if name in probe.leaves]

    def look(column: int) -> Reach:
        reached = probe.reach(path, torch.tensor([column]))
        return {name: reached[name] for name in channels}

    first = look(0)
    common = _common(first, look(min(1, columns - 1)))
    inside, outside = min(1, columns - 1), columns
    while outside - inside > 1:
        middle = (inside + outside) // 2
        if _same(_common(common, look(middle)), common):
            inside = middle
        else:
            outside = middle
    if outside == columns and not _attend_alike(probe, path, columns, look(columns - 1), common):
        raise CoupledError("its heads cannot be told apart: each depends on the queries of all")
    if columns % outside:
        raise CoupledError(f"its {columns} columns do not divide into heads of {outside}")
    return outside


def _attend_alike(probe: Probe, path: str, columns: int, last: Reach, common: Reach) -> bool:
    """Tell whether the first and the last column weigh their values alike, as columns of one head do."""
    own = {name: last[name] & ~common[name] for name in common}
    values = [name for name in own if own[name].any()]
    slopes = [[probe.slopes(path, column, name).flatten(0, -2) for name in values] for column in (0, columns - 1)]
    return all(
        torch.allclose(one[:, ~common[name]].sum(1), other[:, ~common[name]].sum(1), rtol=1e-3, atol=1e-5)
        for name, one, other in zip(values, *slopes)
    )


def heads(probe: Probe, path: str) -> Ownership:
    """Find what the attention heads with this output projection own; heads that share keys and values are one unit.

    Raises:
        CoupledError: heads cannot be told apart or share what would have to be cut.
    """
    head_dim = head_width(probe, path)
    columns = probe.inputs[path].shape[probe.channels[path]]
    reached = [probe.reach(path, torch.arange(start, start + head_dim)) for start in range(0, columns, head_dim)]
    masks = {name: torch.stack([one[name] for one in reached]) for name in probe.sources(path)}
    groups = _groups({name: mask for name, mask in masks.items() if name in probe.leaves})
    if len({len(group) for group in groups}) > 1:
        raise CoupledError("its heads share keys and values in groups of different sizes")
    by_unit = {name: torch.stack([mask[group].any(0) for group in groups]) for name, mask in masks.items()}
    channels, entries = {}, {}
    for name, mask in by_unit.items():
        owned = _owned(name, mask)
        if owned is not None and name in probe.leaves:
            channels[name] = owned[1]
        elif owned is not None:
            entries[name] = owned
    if not channels:
        raise CoupledError("its heads own no channels of any projection")
    index = torch.arange(columns).view(-1, head_dim)
    by_group = torch.stack([index[group].flatten() for group in groups])
    return Ownership(by_group, channels, entries, len(groups[0]), head_dim)


def _groups(masks: dict[str, Tensor]) -> list[list[int]]:
    """Group the heads that share channels which not all heads share, from masks of shape (heads, channels)."""
    count = len(next(iter(masks.values())))
    linked = torch.eye(count, dtype=torch.bool)
    for mask in masks.values():
        own = (mask & ~mask.all(0)).float()
        linked |= own @ own.T > 0
    groups: list[list[int]] = []
    seen: set[int] = set()
    for head in range(count):
        if head in seen:
            continue
        group, pending = {head}, [head]
        while pending:
            for other in linked[pending.pop()].nonzero().flatten().tolist():
                if other not in group:
                    group.add(other)
                    pending.append(other)
        seen |= group
        groups.append(sorted(group))
    return groups


def _owned(name: str, mask: Tensor) -> tuple[int, Tensor] | None:
    """Find the dimension of a tensor that units divide among them, with each unit's positions; None if all share it.

    Positions that all units reach stay with all of them: keys and values of multi-query attention, for one.

    Raises:
        CoupledError: it is neither.
    """
    if len(mask) == 1:
        return 0, _along(mask[0], 0).nonzero().view(1, -1)
    if (mask == mask[0]).all():
        return None
    for dim in range(mask.ndim - 1):
        along = torch.stack([_along(one, dim) for one in mask])
        own = along & ~along.all(0)
        counts = own.sum(1)
        if (own.sum(0) <= 1).all() and counts.min() == counts.max() > 0:
            return dim, own.nonzero()[:, 1].view(len(mask), -1)
    raise CoupledError(f"several of its heads share entries of {name}")
