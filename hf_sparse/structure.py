"""`discover(model)`: the attention and FFN blocks of a model, what their units own and what they cost."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_sparse.families import (
    ATTENTION_LAYOUTS,
    FFN_LAYOUTS,
    HEAD_COUNT_ATTRIBUTES,
    HEAD_WIDTH_ATTRIBUTES,
    AttentionLayout,
    FfnLayout,
)
from hf_sparse.scaling import PROJECTIONS


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
class Block:
    """A sublayer whose units can be removed.

    Attributes:
        name: path of the module that goes when no unit is left.
        kind: "attention" or "ffn".
        layer: index of the layer in its stack.
        units: number of heads (kv heads with their query heads under grouped queries) or neurons.
        unit_cost: parameters that removing one unit saves.
        unit_macs: multiply-accumulates per token in the projections that removing one unit saves.
        output: path of the projection whose input columns the units own.
        columns: those columns, shape (units, columns per unit).
        slices: every parameter that shrinks with the units, the output projection's weight included.
        attributes: (attribute of the module `name`, amount per unit) for each one that counts units.
        heads_per_unit: query heads per unit; 0 for neurons.
        head_dim: width of one query head; 0 for neurons.
    """

    name: str
    kind: Literal["attention", "ffn"]
    layer: int
    units: int
    unit_cost: int
    unit_macs: int
    output: str
    columns: Tensor = field(repr=False)
    slices: tuple[Slice, ...] = field(repr=False)
    attributes: tuple[tuple[str, int], ...] = ()
    heads_per_unit: int = 0
    head_dim: int = 0

    def cost_of_unit(self, cost: str, sequence_length: int) -> int:
        """What removing one unit saves: its parameters, or its multiply-accumulates per token of a sequence."""
        if cost == "params":
            return self.unit_cost
        # Every query head multiplies its queries with all keys and its scores with all values.
        return self.unit_macs + 2 * sequence_length * self.head_dim * self.heads_per_unit


@dataclass(frozen=True)
class ModelStructure:
    """The prunable blocks of a model, and those that cannot be pruned exactly with the reason; prints as a table."""

    blocks: tuple[Block, ...]
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        rows = [("block", "kind", "units", "parameters per unit", "parameters")]
        rows += [
            (block.name, block.kind, f"{block.units:,}", f"{block.unit_cost:,}", f"{block.units * block.unit_cost:,}")
            for block in self.blocks
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
            )
            for row in rows
        ]
        lines += [f"{name}: not pruned, {reason}" for name, reason in self.refused]
        return "\n".join(lines)


class _Refusal(Exception):
    """A block that matches a layout but cannot be sliced exactly."""


def discover(model: PreTrainedModel) -> ModelStructure:
    """Find the prunable blocks of a model by the layouts in `families.py`; the model is not changed."""
    modules = dict(model.named_modules())
    shared = _shared_parameters(model)
    blocks: list[Block] = []
    refused: list[tuple[str, str]] = []
    for root in modules:
        for layout in (*ATTENTION_LAYOUTS, *FFN_LAYOUTS):
            if not _matches(modules, root, layout):
                continue
            try:
                if isinstance(layout, AttentionLayout):
                    block = _attention_block(modules, root, layout)
                else:
                    block = _ffn_block(modules, root, layout)
                if tied := [part.parameter for part in block.slices if part.parameter in shared]:
                    raise _Refusal(f"its parameter {tied[0]} is shared with another module")
                blocks.append(block)
            except _Refusal as reason:
                refused.append((_join(root, layout.core), str(reason)))
            break
    return ModelStructure(tuple(blocks), tuple(refused))


def _shared_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that several modules own, such as embeddings tied to an output layer."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for owners in names.values() if len(owners) > 1 for name in owners}


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _matches(modules: dict[str, nn.Module], root: str, layout: AttentionLayout | FfnLayout) -> bool:
    if isinstance(layout, AttentionLayout):
        paths = [path for path in (layout.query, layout.key, layout.value, layout.output) if path]
    else:
        paths = [*layout.producers, layout.output]
    found = (modules.get(_join(root, path)) for path in paths)
    return all(type(module) in PROJECTIONS for module in found)


def _attention_block(modules: dict[str, nn.Module], root: str, layout: AttentionLayout) -> Block:
    name, output = _join(root, layout.core), _join(root, layout.output)
    core, query = modules[name], modules[_join(root, layout.query)]
    head_dim = vars(core).get(layout.head_dim)
    if not isinstance(head_dim, int) or head_dim < 1:
        raise _Refusal(f"its attribute {layout.head_dim} does not give the width of a head")
    width = _sizes(modules[output])[0]
    heads = kv_heads = width // head_dim
    claimed = [output, *(_join(root, path) for path in (layout.query, layout.key, layout.value) if path)]
    producers: list[tuple[str, Tensor]] = []
    if layout.key and layout.value:
        key, value = modules[_join(root, layout.key)], modules[_join(root, layout.value)]
        kv_heads = _sizes(key)[1] // head_dim
        if not (
            _sizes(query)[1] == width == heads * head_dim
            and _sizes(key)[1] == _sizes(value)[1] == kv_heads * head_dim
            and heads % kv_heads == 0
        ):
            raise _Refusal(f"its projections do not divide into heads of width {head_dim}")
        rows = torch.arange(kv_heads * head_dim).view(kv_heads, head_dim)
        producers = [
            (_join(root, layout.query), torch.arange(width).view(kv_heads, -1)),
            (_join(root, layout.key), rows),
            (_join(root, layout.value), rows),
        ]
    else:
        if not (_sizes(query)[1] == 3 * width and width == heads * head_dim):
            raise _Refusal(f"its fused projection does not divide into queries, keys and values of {width} columns")
        rows = torch.arange(3 * width).view(3, heads, head_dim).transpose(0, 1).reshape(heads, -1)
        producers = [(_join(root, layout.query), rows)]
    _refuse_unclaimed(name, core, claimed, head_dim)
    group = heads // kv_heads
    amounts = {heads: group, kv_heads: 1}
    attributes = [
        (attr, amounts[vars(core)[attr]]) for attr in HEAD_COUNT_ATTRIBUTES if vars(core).get(attr) in amounts
    ]
    attributes += [(attr, group * head_dim) for attr in HEAD_WIDTH_ATTRIBUTES if vars(core).get(attr) == width]
    return _block(
        modules,
        name,
        "attention",
        kv_heads,
        producers,
        output,
        attributes=tuple(attributes),
        heads_per_unit=group,
        head_dim=head_dim,
    )


def _refuse_unclaimed(name: str, core: nn.Module, claimed: Iterable[str], head_dim: int) -> None:
    """Refuse attention with parameters the layout does not know, unless all heads share them, one entry per column."""
    for parameter_name, parameter in core.named_parameters():
        path = _join(name, parameter_name)
        if path.rpartition(".")[0] not in claimed and parameter.numel() not in (1, head_dim):
            raise _Refusal(f"its parameter {path} of shape {tuple(parameter.shape)} couples heads in an unknown way")


def _ffn_block(modules: dict[str, nn.Module], root: str, layout: FfnLayout) -> Block:
    output = _join(root, layout.output)
    neurons = _sizes(modules[output])[0]
    rows = torch.arange(neurons).view(neurons, 1)
    producers = [(_join(root, path), rows) for path in layout.producers]
    if any(_sizes(modules[path])[1] != neurons for path, _ in producers):
        raise _Refusal("its up and down projections have different widths")
    return _block(modules, _join(root, layout.core), "ffn", neurons, producers, output)


def _block(
    modules: dict[str, nn.Module],
    name: str,
    kind: Literal["attention", "ffn"],
    units: int,
    producers: list[tuple[str, Tensor]],
    output: str,
    attributes: tuple[tuple[str, int], ...] = (),
    heads_per_unit: int = 0,
    head_dim: int = 0,
) -> Block:
    columns = torch.arange(_sizes(modules[output])[0]).view(units, -1)
    slices = [Slice(f"{output}.weight", _input_dim(modules[output]), columns)]
    macs = columns.shape[1] * _sizes(modules[output])[1]
    biases = 0
    for path, rows in producers:
        slices.append(Slice(f"{path}.weight", 1 - _input_dim(modules[path]), rows))
        macs += rows.shape[1] * _sizes(modules[path])[0]
        if modules[path].bias is not None:
            slices.append(Slice(f"{path}.bias", 0, rows))
            biases += rows.shape[1]
    layers = re.findall(r"\.(\d+)\.", name)
    return Block(
        name=name,
        kind=kind,
        layer=int(layers[-1]) if layers else 0,
        units=units,
        unit_cost=macs + biases,
        unit_macs=macs,
        output=output,
        columns=columns,
        slices=tuple(slices),
        attributes=attributes,
        heads_per_unit=heads_per_unit,
        head_dim=head_dim,
    )


def _input_dim(projection: nn.Module) -> int:
    """The dimension of the weight that the inputs run along."""
    return 0 if isinstance(projection, Conv1D) else 1


def _sizes(projection: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a projection."""
    inputs = _input_dim(projection)
    weight = projection.get_parameter("weight")
    return weight.shape[inputs], weight.shape[1 - inputs]
