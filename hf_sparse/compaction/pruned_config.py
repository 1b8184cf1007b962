"""Write the config of a pruned model: its type, its recipe, and its sizes layer by layer."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import _CAN_RECORD_REGISTRY

from hf_sparse.errors import SparsityError
from hf_sparse.modeling_hf_sparse import (
    MODEL_TYPE_PREFIX,
    TABLE_SWITCHES,
    CachedHeads,
    LayerRecord,
    Recipe,
    auto_map,
    configs_in,
    has_pruned_sizes,
    model_class,
    sealed,
)
from hf_sparse.structure.blocks import Block, ModelStructure
from hf_sparse.structure.size_names import size_names
from hf_sparse.structure.slicing import BY_PATH, physical_units
from hf_sparse.structure.stock import CONFIG_ERRORS


def describe_(model: PreTrainedModel, structure: ModelStructure, kept: dict[str, Tensor], recipe: Recipe) -> None:
    """Turn a model and its config, in place, into those of the pruned model type, with its recipe and sizes."""
    config: Any = model.config
    again = config.model_type.startswith(MODEL_TYPE_PREFIX)
    if not again:
        stock = type(model)
        try:
            pruned: Any = model_class(stock, config.model_type)
        except ValueError as error:
            raise SparsityError(str(error)) from None
        config.base_model_type, config.base_architecture = config.model_type, stock.__name__
        become_(model, pruned)
        config.auto_map = auto_map(stock, config.base_model_type)
    else:
        recipe = _merged(config.hf_sparse, recipe)
    config.hf_sparse = recipe
    _describe_sizes_(model, structure, kept, again)


def become_(model: PreTrainedModel, pruned: Any) -> None:
    """Give a model and its config, in place, the classes of pruned models and configs."""
    config: Any = model.config
    model.__class__ = pruned
    # Transformers looks up by the class which states a forward records; it fills that table where a model is made.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)
    # Configs made by `Config(**entries)` have it as an attribute, which would hide that of the class.
    vars(config).pop("model_type", None)
    config.__class__ = pruned.config_class


def seal_(model: PreTrainedModel) -> None:
    """Write the checksum of a pruned model's recipe, in place: any later change is noticed when it is loaded."""
    config: Any = model.config
    if config.model_type.startswith(MODEL_TYPE_PREFIX):
        config.hf_sparse = sealed(config.hf_sparse, config)


def _merged(earlier: Recipe, later: Recipe) -> Recipe:
    """Merge two recipes into the one that leads from the stock model to the result of pruning twice."""
    now = {layer["block"]: layer["kept"] for layer in later["layers"]}
    layers: list[LayerRecord] = [{**one, "kept": now.get(one["block"], one["kept"])} for one in earlier["layers"]]
    gone = tuple(f"{path}." for name, removal in later["removed"].items() for path in (name, removal["output"]))
    before, after = (cast(dict[str, Any], recipe) for recipe in (earlier, later))
    tables = {**after, "caches": _traced(earlier, later["caches"])}
    for key in (*BY_PATH, "removed"):
        kept = {path: value for path, value in before.get(key, {}).items() if not f"{path}.".startswith(gone)}
        if key == "attributes":  # a later round need not change all that an earlier one has changed
            tables[key] = {path: {**kept.get(path, {}), **values} for path, values in after[key].items()}
        tables[key] = {**kept, **tables[key]}
    own = {"identities": earlier["identities"], "parameters": earlier["parameters"], "layers": layers}
    return cast(Recipe, {**tables, **own})


def _traced(earlier: Recipe, caches: dict[str, CachedHeads]) -> dict[str, CachedHeads]:
    """Count the heads that a later round kept as those of the stock model; left out if an earlier record lacks them."""
    known = earlier.get("caches", {})
    shrunk = [f".{layer['block']}" for layer in earlier["layers"] if layer["kept"] < layer["units"]]
    traced: dict[str, CachedHeads] = {}
    for path, entry in caches.items():
        if path in known:
            kept = [known[path]["kept"][head] for head in entry["kept"]]
            traced[path] = {**entry, "heads": known[path]["heads"], "kept": kept}
        elif not any(block.endswith(f".{path}") for block in shrunk):
            traced[path] = entry
    return traced


# ---- What is left of every layer ----


@dataclass(frozen=True)
class _Left:
    """What is left of one block, in the entries of one config.

    Attributes:
        block: the block.
        count: units that stay.
        sizes: entries of the config, by their names.
    """

    block: Block
    count: int
    sizes: dict[str, int]

    @property
    def stack(self) -> str:
        """Path of the list of layers that the block is in; "" outside of all lists."""
        found = re.match(r"(.*?)(?:^|\.)\d+(?:\.|$)", self.block.name)
        return found[1] if found else ""


def _describe_sizes_(model: PreTrainedModel, structure: ModelStructure, kept: dict[str, Tensor], again: bool) -> None:
    """Write what is left of every layer into the config and the configs in it, in place, by names of the stock config.

    `per_layer_config` gets all that it can express. If that is not everything, `layer_sizes` has every block by path.
    """
    config: Any = model.config
    names = size_names(model, structure.blocks)
    counts = {block.name: len(physical_units(block, kept[block.name])) for block in structure.blocks}
    told: set[str] = set()
    for place, holder in enumerate(configs_in(config)):
        left = [
            _Left(block, counts[block.name], {one.name: one.amount * counts[block.name] for one in own})
            for block in structure.blocks
            for own in [[one for one in names[block.name] if one.place == place]]
        ]
        told |= _tell_(holder, left, model, structure, again)
    records = {record["block"]: record for record in config.hf_sparse["layers"]}
    earlier = vars(config).pop("layer_sizes", {})
    if told < {block.name for block in structure.blocks} or earlier.keys() & records.keys():
        for block in structure.blocks:
            sizes = {one.name: one.amount * counts[block.name] for one in names[block.name]}
            width = {"head_dim": block.head_dim} if block.kind == "attention" else {}
            earlier[block.name] = (sizes or _unnamed(records[block.name])) | width
        config.layer_sizes = {path: earlier.get(path) or _unnamed(record) for path, record in records.items()}


def _unnamed(record: LayerRecord) -> dict[str, int]:
    """Describe what is left of a block whose units no entry of the stock config counts."""
    return {"heads" if record["kind"] == "attention" else "neurons": record["kept"]}


def _tell_(holder: Any, left: list[_Left], model: PreTrainedModel, structure: ModelStructure, again: bool) -> set[str]:
    """Give a config, in place, the `per_layer_config` of its layers; return the names of the blocks fully described."""
    pruned = has_pruned_sizes(holder)
    named = [one for one in left if one.sizes]
    stacks = {one.stack for one in named}
    if len(stacks) != 1 or (holder.is_heterogeneous and not pruned):
        return set()  # two towers have one config, or its own modules read such a table
    stack, count = stacks.pop(), getattr(holder, "num_hidden_layers", None)
    if "num_hidden_layers" not in {*vars(holder), *holder.attribute_map}:
        return set()  # it counts layers in a way of its own, and who reads the table without its class could not
    if len(list(model.get_submodule(stack).children())) != count or (again and not pruned):
        return set()  # layers that are shared, or an earlier version has left no table to go on with
    layers: dict[int, dict[str, Any]] = {index: {} for index in range(count)}
    if pruned:
        layers |= {int(index): sizes for index, sizes in holder.to_dict()["per_layer_config"].items()}
    holder.per_layer_config = None
    uses = Counter((one.block.layer, name) for one in named for name in one.sizes)
    ambiguous = {name for (_, name), used in uses.items() if used > 1}
    for one in named:
        # Nobody takes none of them for a size.
        layers[one.block.layer] |= {name: max(size, 1) for name, size in one.sizes.items() if name not in ambiguous}
    widths = {one.block.layer: one.block.head_dim for one in named if one.block.kind == "attention"}
    for index, sizes in layers.items():
        own = [one for one in left if (one.stack, one.block.layer) == (stack, index)]
        if widths:  # a cache is made by two more entries; without them its width is computed from the heads there are
            heads, width = (getattr(holder, name, None) for name in ("num_key_value_heads", "head_dim"))
            sizes.setdefault("head_dim", width or widths.get(index, max(widths.values())))
            sizes |= {"num_key_value_heads": sizes.get("num_key_value_heads", heads)} if heads else {}
        refused = any(name.startswith(f"{stack}.{index}.") for name, _ in structure.refused)
        if gone := set() if refused else _gone(own):
            sizes["skip"] = sorted({*sizes.get("skip", ()), *gone})
    return {one.block.name for one in named if not one.sizes.keys() & ambiguous} if _set_(holder, layers) else set()


def _set_(holder: Any, layers: dict[int, dict[str, Any]]) -> bool:
    """Set the `per_layer_config` of a config in place, if the config accepts it and then reads back the same."""
    for switch in TABLE_SWITCHES:
        setattr(holder, switch, True)
    try:
        holder.per_layer_config = layers
        holder.validate()
        found = [{name: getattr(layer, name) for name in layers[i]} for i, layer in enumerate(holder.per_layer_config)]
        told = all(sizes == layers[i] for i, sizes in enumerate(found))
    except CONFIG_ERRORS:
        told = False
    if not told:  # it computes a width from the number of heads, and lets nobody set it
        holder.per_layer_config = None
        for switch in TABLE_SWITCHES:
            vars(holder).pop(switch)
    return told


def _gone(left: list[_Left]) -> set[str]:
    """Name the sublayers of a layer of which nothing is left."""
    part = {"attention": "attention", "ffn": "mlp", "experts": "mlp"}
    return {part[one.block.kind] for one in left} - {part[one.block.kind] for one in left if one.count}
