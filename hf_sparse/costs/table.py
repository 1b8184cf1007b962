"""What blocks cost by the number of their units that are left: counted parameters or MACs, or measured latency."""

from collections.abc import Mapping
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
"""What numbers of channels are filled up to by default: the first of these that is little of what a block keeps.

Quantizers take groups or blocks of 32 channels, tensor cores want multiples of 8 in half precision, and CPUs are slow
at narrow products of odd widths. Charged for in the search, as a round_to that was asked for, it was worth less
accuracy (recipes/benchmark).
"""

LITTLE = 1 / 8
"""The share of what a block keeps on average that may be a multiple, of which half is filled up on average."""

MADE_UP_TOKENS = 128
"""How long texts are that costs are counted or timed on, where there are no data and no length was asked for."""

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
    left = config.density * min(block.units for block in neurons)
    return next((multiple for multiple in ALIGNED if multiple <= LITTLE * left), ALIGNED[-1])


def parameter_costs(structure: ModelStructure, config: SparsityConfig) -> CostTable:
    """The parameters of every block; a `round_to` that was asked for is charged, so that the target is met with it."""
    tables = {
        block.name: tuple(float(block.unit_cost * block.physical(units)) for units in range(block.units + 1))
        for block in structure.rounded(config.round_to or 1).blocks
    }
    return CostTable(tables, multiple=usual_multiple(structure, config))


# ---- The batch that costs are counted or timed on ----


def cost_batch(model: PreTrainedModel, config: SparsityConfig, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Make the batch that costs are counted or timed on.

    Args:
        model: to be run on it.
        config: how many rows a batch has that is made up, and how long texts are.
        inputs: a batch of data, which stays as it is but for a length that was asked for; made up by default.
    """
    tokens = config.cost_sequence_length
    if inputs is not None:
        return dict(inputs) if tokens is None else enlarged(inputs, model, None, tokens)
    tokens = tokens or min(MADE_UP_TOKENS, longest_text(model))
    return enlarged(example_inputs(model), model, config.cost_batch_size, tokens)


def enlarged(inputs: Mapping[str, Any], model: PreTrainedModel, rows: int | None, tokens: int) -> dict[str, Any]:
    """A batch of as many rows, all by default, and of texts as long, as given, by repeating another; not padded."""
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
