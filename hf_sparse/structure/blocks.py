"""The attention, FFN and expert blocks that discovery finds in a model, what their units own and what they cost."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from hf_sparse.modeling_hf_sparse import Removal, Selection
from hf_sparse.runtime.tables import Printed, table


@dataclass(frozen=True)
class Slice:
    """Entries of one parameter that belong to the units of a block.

    Attributes:
        parameter: path of the parameter in the model.
        dim: the dimension that is sliced.
        index: positions along `dim`, shape (units, positions per unit).
    """

    parameter: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class Attribute:
    """An integer of a module that counts units, or entries that they own.

    Attributes:
        module: path of the module.
        name: the attribute; "config.NAME" for an entry of the config that the module reads while it runs.
        amount: what every unit adds to it.
    """

    module: str
    name: str
    amount: int


@dataclass(frozen=True)
class Block:
    """A sublayer whose units can be removed.

    Attributes:
        name: path of the module that is removed when no unit is left.
        kind: "attention", "ffn" or "experts".
        layer: index of the layer in its stack.
        units: number of heads (kv heads with their query heads under grouped queries) or neurons; a neuron of
            experts is the one of that index in each of them.
        unit_cost: parameters that removing one unit saves.
        unit_macs: multiply-accumulates per token in the projections that removing one unit saves.
        output: path of the projection whose input columns the units own.
        columns: those columns, shape (units, columns per unit).
        slices: every parameter that shrinks with the units; the first is the weight of the output projection.
        attributes: every integer that shrinks with them.
        selections: arguments with one entry per head that the module `name` picks its heads from; their `index` has the
            heads that an earlier round has kept, or all.
        stand_in: what takes the block's place when no unit is left; None if nothing can: one unit then stays, with a
            weight of zeros.
        cached: (whether it is of cross attention, index) of the layer of a cache that has a kv head for each unit; None
            if there is none.
        padded: whether the projections pad what they lost with zeros, since the code between them counts on all heads.
        heads_per_unit: query heads per unit; 0 for neurons.
        head_dim: width of one query head; 0 for neurons.
        multiple: the number of units that stay is rounded up to a multiple of this, with units that weigh zero.
        counts: how many units may stay in a uniform layout, ascending; not filled in by `discover`.
    """

    name: str
    kind: Literal["attention", "ffn", "experts"]
    layer: int
    units: int
    unit_cost: int
    unit_macs: int
    output: str
    columns: Tensor = field(repr=False)
    slices: tuple[Slice, ...] = field(repr=False)
    attributes: tuple[Attribute, ...] = field(default=(), repr=False)
    selections: tuple[Selection, ...] = field(default=(), repr=False)
    stand_in: Removal | None = field(default=None, repr=False)
    cached: tuple[bool, int] | None = None
    padded: bool = False
    heads_per_unit: int = 0
    head_dim: int = 0
    multiple: int = 1
    counts: tuple[int, ...] = field(default=(), repr=False)

    @property
    def weight(self) -> Slice:
        """The columns of the output projection's weight, which gates scale."""
        return self.slices[0]

    def physical(self, count: int) -> int:
        """Round up a number of units to keep to the number that physically stays; the additional units weigh zero."""
        return min(self.units, -(-count // self.multiple) * self.multiple)

    def rounded(self, multiple: int) -> "Block":
        """Let the block keep only all units, or numbers of units that leave a multiple of its output's columns."""
        width = self.columns.shape[1]
        multiple = math.lcm(self.multiple, math.lcm(multiple, width) // width)
        counts = tuple(count for count in self.counts if count % multiple == 0 or count == self.units)
        return replace(self, multiple=multiple, counts=counts)

    @functools.cached_property
    def _order(self) -> Tensor | None:
        """Where each column is among the units' columns; None if they are in order."""
        flat = self.columns.flatten()
        return None if torch.equal(flat, torch.arange(len(flat))) else flat.argsort()

    def column_sums(self, values: Tensor) -> Tensor:
        """Sum values, of the shape of the weight, over what each gate scales, shape (units,)."""
        columns = values.movedim(self.weight.dim, 0).flatten(1).sum(1)
        return columns[self.columns.to(columns.device)].sum(1)

    def column_scale(self, gates: Tensor, ndim: int) -> Tensor:
        """Expand one gate per unit to one scale per column, shaped to broadcast over a weight of `ndim` dimensions."""
        scale = gates.unsqueeze(1).expand(self.columns.shape).reshape(-1)
        if self._order is not None:
            scale = scale[self._order.to(scale.device)]
        return scale.view([-1 if dim == self.weight.dim else 1 for dim in range(ndim)])


@dataclass(frozen=True, repr=False)
class ModelStructure(Printed):
    """The prunable blocks of a model, and those that cannot be pruned exactly with the reason; prints as a table."""

    blocks: tuple[Block, ...]
    refused: tuple[tuple[str, str], ...] = ()

    def rounded(self, multiple: int) -> "ModelStructure":
        """Let every block keep only numbers of units at which its output projection reads a multiple of channels."""
        return replace(self, blocks=tuple(block.rounded(multiple) for block in self.blocks))

    def __repr__(self) -> str:
        kinds = {block.kind: 0 for block in self.blocks}
        for block in self.blocks:
            kinds[block.kind] += block.units
        units = "".join(f", {count:,} units of {kind}" for kind, count in kinds.items())
        return f"ModelStructure({len(self.blocks)} blocks{units}, {len(self.refused)} refused)"

    def __str__(self) -> str:
        rows = [("block", "kind", "units", "parameters per unit", "parameters")]
        rows += [
            (block.name, block.kind, f"{block.units:,}", f"{block.unit_cost:,}", f"{block.units * block.unit_cost:,}")
            for block in self.blocks
        ]
        lines = [table(rows, left=(0, 1))]
        lines += [f"{name}: not pruned, {reason}" for name, reason in self.refused]
        return "\n".join(lines)


@dataclass(frozen=True)
class LayerSizes:
    """How many heads (query heads under grouped queries) or neurons one sublayer had and kept."""

    block: str
    kind: str
    layer: int
    units: int
    kept: int


def layer_sizes(structure: ModelStructure, kept: Mapping[str, Sequence[int]]) -> tuple[LayerSizes, ...]:
    """Count the heads and neurons of every sublayer, before and after; sublayers that are not named keep all."""
    sizes = []
    for block in structure.blocks:
        each, units = block.heads_per_unit or 1, len(kept.get(block.name, range(block.units)))
        sizes.append(LayerSizes(block.name, block.kind, block.layer, block.units * each, units * each))
    return tuple(sizes)
