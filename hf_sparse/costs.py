"""What blocks cost by the number of their units that are left: counted parameters or MACs, or measured latency."""

from collections.abc import Mapping
from dataclasses import dataclass

from hf_sparse.config import SparsityConfig
from hf_sparse.errors import SparsityError
from hf_sparse.structure import Block, ModelStructure

ALIGNED = (32, 8)
"""What numbers of channels are filled up to by default: the first of these that is little of what a block keeps.

Quantizers take groups or blocks of 32 channels, tensor cores want multiples of 8 in half precision, and CPUs are slow
at narrow products of odd widths. Charged for in the search, as a round_to that was asked for, it was worth less
accuracy (recipes/benchmark).
"""

LITTLE = 1 / 8
"""The share of what a block keeps on average that may be a multiple, of which half is filled up on average."""

WORTH_ALIGNING = 512
"""Multiply-accumulates per neuron and token from which on rounding is worth it: two projections of a width of 256."""


@dataclass(frozen=True)
class CostTable:
    """The cost of every block of a model for every number of units that it may keep.

    Attributes:
        blocks: by block name, the cost of keeping 0, 1, ... units; never falling, 0 at the start.
        rest: the cost of everything else in the model, which nothing prunes; 0 where it does not matter.
        multiple: of the channels of its heads or neurons that every block keeps when the model shrinks.
    """

    blocks: Mapping[str, tuple[float, ...]]
    rest: float = 0.0
    multiple: int = 1

    @property
    def prunable(self) -> float:
        """The cost of all blocks when they are whole."""
        return sum(costs[-1] for costs in self.blocks.values())

    def line(self, block: Block) -> tuple[float, float]:
        """(cost per unit, cost of having any) of a block: its table as a straight line, which gates are charged by."""
        costs = self.blocks[block.name]
        if block.units == 1:
            return costs[1], 0.0
        slope = (costs[block.units] - costs[1]) / (block.units - 1)
        fixed = max(0.0, costs[block.units] - slope * block.units)
        return (costs[block.units] - fixed) / block.units, fixed

    def removed(self, kept: Mapping[str, int]) -> float:
        """The fraction of the prunable cost that is gone when blocks keep so many units; those not named keep all."""
        left = sum(costs[kept.get(name, -1)] for name, costs in self.blocks.items())
        return 1 - left / self.prunable

    def target(self, config: SparsityConfig) -> float:
        """The fraction of the prunable cost to remove: the one asked for, or what makes the model as fast as asked for.

        Raises:
            SparsityError: no model without its blocks would be so fast.
        """
        if config.target_speedup is None:
            return config.target
        target = (1 - 1 / config.target_speedup) * (self.prunable + self.rest) / self.prunable
        if target >= 1:
            most = (self.prunable + self.rest) / self.rest
            raise SparsityError(
                f"target_speedup is {config.target_speedup:g}: without any heads and neurons the model would be "
                f"{most:.2f} times as fast on this device, so give less than that"
            )
        return target


def usual_multiple(structure: ModelStructure, config: SparsityConfig) -> int:
    """What numbers of channels are rounded up to where nothing is measured."""
    if config.round_to is not None:
        return config.round_to or 1
    neurons = [block for block in structure.blocks if block.kind == "ffn"]
    if not neurons or min(block.unit_macs for block in neurons) < WORTH_ALIGNING:
        return 1
    left = (1 - config.target) * min(block.units for block in neurons)
    return next((multiple for multiple in ALIGNED if multiple <= LITTLE * left), ALIGNED[-1])


def counted_costs(structure: ModelStructure, config: SparsityConfig) -> CostTable:
    """Costs that are counted and not measured: parameters, or multiply-accumulates per token.

    A `round_to` that was asked for is charged, so that the target is met with it.
    """
    tables = {}
    for block in structure.rounded(config.round_to or 1).blocks:
        each = block.cost_of_unit(config.cost, config.cost_sequence_length)
        tables[block.name] = tuple(float(each * block.physical(units)) for units in range(block.units + 1))
    return CostTable(tables, multiple=usual_multiple(structure, config))
