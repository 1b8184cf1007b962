"""What blocks cost by the number of their units that are left: counted parameters or MACs, or measured latency."""

from collections.abc import Mapping
from dataclasses import dataclass

from hf_sparse.config import SparsityConfig
from hf_sparse.structure import Block, ModelStructure


@dataclass(frozen=True)
class CostTable:
    """The cost of every block of a model for every number of units that it may keep.

    Attributes:
        blocks: by block name, the cost of keeping 0, 1, ... units; never falling, 0 at the start.
        rest: the cost of everything else in the model, which nothing prunes; 0 where it does not matter.
    """

    blocks: Mapping[str, tuple[float, ...]]
    rest: float = 0.0

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

    def target_for(self, speedup: float) -> float:
        """The fraction of the prunable cost to remove for the whole model to cost 1 / speedup of what it does."""
        return (1 - 1 / speedup) * (self.prunable + self.rest) / self.prunable


def counted_costs(structure: ModelStructure, config: SparsityConfig) -> CostTable:
    """Costs that are counted and not measured: parameters, or multiply-accumulates per token."""
    tables = {}
    for block in structure.blocks:
        each = block.cost_of_unit(config.cost, config.cost_sequence_length)
        tables[block.name] = tuple(float(each * units) for units in range(block.units + 1))
    return CostTable(tables)
