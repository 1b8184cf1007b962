"""What blocks cost by the number of units that are left: parameters, memory, counted MACs or measured latency."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.config import SparsityConfig
from hf_sparse.errors import SparsityError
from hf_sparse.structure.blocks import Block, ModelStructure
from hf_sparse.structure.dependencies import FORWARD_ERRORS, called_modules
from hf_sparse.structure.example_inputs import example_inputs, longest_text, main_input

ALIGNED = (32, 8)
"""Numbers of channels are rounded up to a multiple of the first of these that is little of what a block keeps.

Quantizers take groups or blocks of 32 channels, tensor cores want multiples of 8 in half precision, and CPUs are slow
at narrow products of odd widths. The cost of rounding up is not charged in the search, unlike that of a `round_to` that
was asked for: charged, it cost accuracy (recipes/benchmark).
"""

LITTLE = 1 / 8
"""The largest multiple, as a share of what a block keeps on average; rounding up adds half of it on average."""

MADE_UP_TOKENS = 128
"""Tokens of the texts that costs are taken on, if there are no data and no length was asked for."""

CACHED_TOKENS = 2048
"""Tokens of a text in a cache whose memory is counted, if no length was asked for."""

WORTH_ALIGNING = 512
"""Multiply-accumulates per neuron and token from which on rounding is worth it: two projections of a width of 256."""


@dataclass(frozen=True)
class CostTable:
    """The cost of every block of a model for every number of units that it may keep.

    Attributes:
        blocks: by block name, the cost of keeping 0, 1, ... units; never falling, 0 at the start.
        rest: the cost of everything else in the model, which is not pruned; 0 if it is not needed.
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
        """Fit a straight line to the costs of a block, which gates pay: (cost per unit, cost of having any unit)."""
        costs = self.blocks[block.name]
        if block.units == 1:
            return costs[1], 0.0
        slope = (costs[block.units] - costs[1]) / (block.units - 1)
        fixed = max(0.0, costs[block.units] - slope * block.units)
        return (costs[block.units] - fixed) / block.units, fixed

    def removed(self, kept: Mapping[str, int]) -> float:
        """Compute the share of the prunable cost that is removed if blocks keep so many units; others keep all."""
        left = sum(costs[kept.get(name, -1)] for name, costs in self.blocks.items())
        return 1 - left / self.prunable

    def target(self, config: SparsityConfig) -> float:
        """Compute the share of the prunable cost to remove: as asked for, or as much as `target_speedup` needs.

        Raises:
            SparsityError: no model without its blocks would be so small, or so fast.
        """
        if config.target_of == "all":
            target = config.target * (self.prunable + self.rest) / self.prunable
            if target >= 1:
                raise SparsityError(
                    f"target is {config.target:g} of the whole model, of which heads and neurons are "
                    f"{self.prunable / (self.prunable + self.rest):.1%}: give less than that"
                )
            return target
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
    """Choose the multiple that numbers of channels are rounded up to, if nothing is measured."""
    if config.round_to is not None:
        return config.round_to or 1
    neurons = [block for block in structure.blocks if block.kind == "ffn"]
    if not neurons or min(block.unit_macs for block in neurons) < WORTH_ALIGNING:
        return 1
    left = config.density * min(block.units for block in neurons)
    return next((multiple for multiple in ALIGNED if multiple <= LITTLE * left), ALIGNED[-1])


def parameter_costs(structure: ModelStructure, config: SparsityConfig) -> CostTable:
    """Count the parameters of every block, rounded up by a `round_to` that was asked for, so that the target holds."""
    return _by_unit(structure, config, lambda block: block.unit_cost)


def memory_costs(structure: ModelStructure, config: SparsityConfig) -> CostTable:
    """Count the numbers that every block keeps in memory: its parameters, and keys and values in a decoder's cache.

    Weights and cache are taken to be of one precision, and the cache to be full: `cost_batch_size` texts of
    `cost_sequence_length` tokens.
    """
    tokens = config.cost_batch_size * (config.cost_sequence_length or CACHED_TOKENS)
    cached = 2 * tokens  # keys and values
    return _by_unit(
        structure, config, lambda block: block.unit_cost + (cached * block.head_dim if block.cached is not None else 0)
    )


def _by_unit(structure: ModelStructure, config: SparsityConfig, cost: Callable[[Block], int]) -> CostTable:
    """Make the table of costs that are the same for every unit of a block."""
    tables = {
        block.name: tuple(float(cost(block) * block.physical(units)) for units in range(block.units + 1))
        for block in structure.rounded(config.round_to or 1).blocks
    }
    return CostTable(tables, multiple=usual_multiple(structure, config))


COUNTED = {"params": parameter_costs, "memory": memory_costs}
"""Costs that need no batch, by their names in a config."""


# ---- The batch that costs are counted or measured on ----


def cost_batch(model: PreTrainedModel, config: SparsityConfig, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Make the batch that costs are counted or measured on.

    Args:
        model: to be run on it.
        config: has the number of rows and of tokens; the rows are for a batch that is made up.
        inputs: a batch of data, whose texts get the length that was asked for, if any; made up by default.
    """
    tokens = config.cost_sequence_length
    if inputs is not None:
        return dict(inputs) if tokens is None else enlarged(inputs, model, None, tokens)
    tokens = tokens or min(MADE_UP_TOKENS, longest_text(model))
    return enlarged(example_inputs(model), model, config.cost_batch_size, tokens)


def enlarged(inputs: Mapping[str, Any], model: PreTrainedModel, rows: int | None, tokens: int) -> dict[str, Any]:
    """Repeat a batch until it has `rows` rows (its own, by default) and its texts `tokens` tokens; without padding."""
    main = inputs[main_input(model, inputs)]
    rows = rows or len(main)
    batch = {}
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape[:1] != main.shape[:1]:
            batch[name] = value
            continue
        repeats = [-(-rows // len(value))] + [1] * (value.ndim - 1)
        is_text = value.ndim == 2 and not value.is_floating_point()
        if is_text:
            repeats[1] = -(-tokens // value.shape[1])
        value = value.repeat(repeats)[:rows]
        value = value[:, :tokens] if is_text else value
        batch[name] = torch.ones_like(value) if name.endswith("attention_mask") else value
    return batch


def require_called(model: PreTrainedModel, batch: Mapping[str, Any]) -> set[str]:
    """Find out which modules, by path, a forward of a batch calls.

    Raises:
        SparsityError: the model cannot be run on that batch.
    """
    try:
        return called_modules(model, batch)
    except FORWARD_ERRORS as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items() if isinstance(value, Tensor))
        raise SparsityError(
            f"{type(model).__name__} cannot be run on the batch that costs are taken on, {shapes} ({error}): set "
            "cost_batch_size and cost_sequence_length"
        ) from error
