"""Find the entries of a stock config that count the heads or neurons of a block.

They are not looked up: the stock skeleton is built with one entry after the other changed, on no memory, and an entry
counts the units of the blocks whose shapes, or whose numbers of heads, change with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse.modeling_hf_sparse import configs_in
from hf_sparse.structure.attribute_names import HEAD_COUNTS, NEURON_COUNTS
from hf_sparse.structure.blocks import Block
from hf_sparse.structure.stock import CONFIG_ERRORS, skeleton, stock_copy


@dataclass(frozen=True)
class SizeName:
    """An entry of a config that counts the units of a block.

    Attributes:
        place: number of the config among `configs_in` the model's.
        name: of the entry.
        amount: what every unit adds to it.
    """

    place: int
    name: str
    amount: int


def size_names(model: PreTrainedModel, blocks: Sequence[Block]) -> dict[str, list[SizeName]]:
    """Find the entries of the stock config that count the units of each block, by block name."""
    found: dict[str, list[SizeName]] = {block.name: [] for block in blocks}
    config = stock_copy(model)
    try:
        dense = skeleton(model, config)
    except CONFIG_ERRORS:
        return found
    # Padded attention still computes all heads, and its config still has their number.
    changing = [block for block in blocks if not block.padded]
    counts = {block.name: _counts(dense, block) for block in changing}
    for place, holder in enumerate(configs_in(config)):
        for name, value in list(vars(holder).items()):
            members = [block for block in changing if _may_count(name, value, block, counts[block.name])]
            new, other = _another(model, config, place, name, value, members) if members else (0, None)
            for block in members if other is not None else ():
                heads = counts[block.name]
                if block.kind == "attention" and _heads_change(block, dense, other):
                    found[block.name].append(SizeName(place, name, block.heads_per_unit if value == heads[0] else 1))
                elif block.kind != "attention" and (amount := _per_neuron(block, dense, other, value, new)):
                    found[block.name].append(SizeName(place, name, amount))
    return found


def _counts(dense: nn.Module, block: Block) -> tuple[int, ...]:
    """What may count the units of a block in the stock config: its query heads and its kv heads, or its neurons."""
    columns = dense.get_parameter(block.weight.parameter).shape[block.weight.dim]
    if block.kind != "attention":
        return (columns,)
    heads = columns // block.head_dim
    return (heads, heads // block.heads_per_unit)


def _may_count(name: str, value: Any, block: Block, counts: tuple[int, ...]) -> bool:
    """Whether an entry is called like one that counts units, and is as large; None leaves neurons to the model."""
    if block.kind == "attention":
        return HEAD_COUNTS.match(name) is not None and type(value) is int and value in counts
    fits = value is None or (type(value) is int and value > 0 and value % counts[0] == 0)
    return NEURON_COUNTS.match(name) is not None and fits


def _another(
    model: PreTrainedModel, config: PreTrainedConfig, place: int, name: str, value: int | None, blocks: list[Block]
) -> tuple[int, nn.Module | None]:
    """Another value for an entry that blocks may follow, and the skeleton that it makes; None if it makes none."""
    whole = value or max(block.units for block in blocks)
    entries = vars(list(configs_in(config))[place])
    try:
        # Some want a divisor of the width, some a multiple of another number of heads.
        for new in (2 * whole, whole // 2, 1):
            if new in (0, whole):
                continue
            entries[name] = new
            try:
                return new, skeleton(model, config)
            except CONFIG_ERRORS:
                pass
    finally:
        entries[name] = value
    return 0, None


def _heads_change(block: Block, dense: nn.Module, other: Any) -> bool:
    """Whether two skeletons differ in the shapes of an attention block, or in a number that it keeps."""
    one, two = ([model.get_parameter(part.parameter).shape for part in block.slices] for model in (dense, other))
    kept = [vars(model.get_submodule(block.name)) for model in (dense, other)]
    numbers = [{name: value for name, value in entries.items() if type(value) is int} for entries in kept]
    return one != two or numbers[0] != numbers[1]


def _per_neuron(block: Block, dense: nn.Module, other: Any, value: int | None, new: int) -> int:
    """Compute what every neuron adds to an entry; 0 if the entry does not count the block's neurons."""
    dim = block.weight.dim
    before, after = (list(one.get_parameter(block.weight.parameter).shape) for one in (dense, other))
    neurons, others = before.pop(dim), after.pop(dim)
    amount = 1 if value is None else value // neurons
    # Where the outputs change, too, it is the width of the model.
    return amount if before == after and others * amount == new and neurons != others else 0
