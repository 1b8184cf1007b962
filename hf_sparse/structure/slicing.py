"""Make the smaller form of blocks: the recipe that a checkpoint carries, and the weights for it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.modeling_hf_sparse import CachedHeads, Padding, Recipe, Removal, empty_recipe, runs
from hf_sparse.structure.blocks import Block

BY_PATH = ("shapes", "attributes", "selections", "padded", "caches")
"""Recipe entries that map paths to records without further paths."""


def shrink(
    parameters: Mapping[str, Tensor], blocks: Sequence[Block], kept: Mapping[str, Tensor], gates: Mapping[str, Tensor]
) -> tuple[Recipe, dict[str, Tensor]]:
    """Slice the parameters of blocks that keep only some of their units, and multiply their gates in.

    Args:
        parameters: the model's, by name.
        blocks: those that may lose units.
        kept: ascending indices of the units that each block keeps, by block name.
        gates: one factor per unit, by block name, shape (units,), that is multiplied into the output projection.

    Returns:
        The recipe that resizes the model, paths being those of the model, and the parameters that change, by name.
    """
    recipe = empty_recipe()
    factors: dict[str, list[Tensor]] = {}
    dropped: dict[tuple[str, int], list[Tensor]] = {}
    values: dict[str, Tensor] = {}
    for block in blocks:
        units, gate = kept[block.name], gates[block.name]
        if not len(units) and block.stand_in is not None:
            recipe["removed"][block.name] = block.stand_in
            bias = f"{block.stand_in['output']}.bias"
            if bias in parameters:
                values[bias] = parameters[bias]
            continue
        closed = torch.ones(block.units, dtype=torch.bool).index_fill(0, units, False)
        gate = gate.masked_fill(closed.to(gate.device), 0.0)
        units = physical_units(block, units)
        gone = torch.ones(block.units, dtype=torch.bool).index_fill(0, units, False)
        weight = parameters[block.weight.parameter]
        factors.setdefault(block.weight.parameter, []).append(
            block.column_scale(gate.to(weight.device), weight.ndim).to(weight.dtype)
        )
        if len(units) == block.units:
            continue
        for part in block.slices:
            dropped.setdefault((part.parameter, part.dim), []).append(part.index[gone].flatten())
        for attribute in block.attributes:
            recipe["attributes"].setdefault(attribute.module, {})[attribute.name] = attribute.amount * len(units)
        if block.cached is not None:
            cross, layer = block.cached
            entry: CachedHeads = {"layer": layer, "cross": cross, "heads": block.units, "kept": units.tolist()}
            recipe["caches"][block.name] = entry
        if block.selections:
            heads = query_heads(block, units)
            recipe["selections"][block.name] = [
                {**selection, "index": [selection["index"][head] for head in heads]} for selection in block.selections
            ]
    for name, scales in factors.items():
        values[name] = parameters[name]
        for scale in scales:
            values[name] = values[name] * scale
    sides = {
        (part.parameter, part.dim): "inputs" if part is block.weight else "outputs"
        for block in blocks
        if block.padded
        for part in block.slices
        if parameters[part.parameter].ndim > 1
    }
    for (name, dim), positions in dropped.items():
        value = values.get(name, parameters[name])
        keep = torch.ones(parameters[name].shape[dim], dtype=torch.bool).index_fill(0, torch.cat(positions), False)
        # What stays keeps its order, so that fused projections do: all queries, then all keys, then all values.
        values[name] = value.index_select(dim, keep.nonzero().flatten().to(value.device))
        recipe["shapes"][name] = list(values[name].shape)
        if (name, dim) in sides:
            kept_runs = runs(keep.nonzero().flatten().tolist())
            padding: Padding = {"side": sides[name, dim], "size": len(keep), "runs": kept_runs}
            recipe["padded"][name.rpartition(".")[0]] = padding
    return recipe, values


def physical_units(block: Block, units: Tensor) -> Tensor:
    """Return the units that stay: those kept, and units of weight zero that round up the number."""
    if not len(units) and block.stand_in is not None:
        return units
    closed = torch.ones(block.units, dtype=torch.bool).index_fill(0, units, False).nonzero().flatten()
    wanted = block.physical(max(1, len(units)))
    return torch.cat([units, closed[: wanted - len(units)]]).sort().values


def query_heads(block: Block, units: Tensor) -> list[int]:
    """Return the query heads of some units, ascending."""
    return sorted((block.columns[units].flatten() // block.head_dim).unique().tolist())


def common_path(paths: Iterable[str]) -> str:
    """Return the path of the smallest module around several, given by their paths."""
    common = []
    for parts in zip(*(path.split(".") for path in paths)):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def base_path(model: PreTrainedModel) -> str:
    """Return the path of the base model, which the paths in recipes are relative to."""
    return "" if model.base_model is model else model.base_model_prefix


def rebased(recipe: Recipe, base: str) -> Recipe:
    """Make the paths of a recipe relative to a module that all of them are in.

    Raises:
        ValueError: one of them is outside of it.
    """
    prefix = f"{base}." if base else ""

    def inside(path: str) -> str:
        if path == base:
            return ""
        if not path.startswith(prefix):
            raise ValueError(f"{path} is not part of {base!r}")
        return path.removeprefix(prefix)

    removed: dict[str, Removal] = {
        inside(path): {**removal, "output": inside(removal["output"])} for path, removal in recipe["removed"].items()
    }
    entries = cast(dict[str, Any], recipe)
    tables = {key: {inside(path): entry for path, entry in entries[key].items()} for key in BY_PATH}
    return cast(Recipe, {**entries, **tables, "removed": removed})
