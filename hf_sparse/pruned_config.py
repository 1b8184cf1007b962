"""The config of a pruned model: its type, its recipe, and its sizes layer by layer."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import _CAN_RECORD_REGISTRY

from hf_sparse.errors import SparsityError
from hf_sparse.modeling_hf_sparse import MODEL_TYPE_PREFIX, auto_map, model_class, sealed
from hf_sparse.slicing import BY_PATH, physical_units
from hf_sparse.structure import ModelStructure


def describe_(
    model: PreTrainedModel, structure: ModelStructure, kept: dict[str, Tensor], recipe: dict[str, Any]
) -> None:
    """Turn the model and its config in place into those of the pruned model type, with sizes per layer."""
    config: Any = model.config
    if not config.model_type.startswith(MODEL_TYPE_PREFIX):
        stock = type(model)
        try:
            pruned: Any = model_class(stock, config.model_type)
        except ValueError as error:
            raise SparsityError(str(error)) from None
        config.base_model_type, config.base_architecture = config.model_type, stock.__name__
        become_(model, pruned)
        config.auto_map = auto_map(stock, config.base_model_type)
        config.layer_sizes = {}
    else:
        recipe = _merged(config.hf_sparse, recipe)
    config.hf_sparse = recipe
    config.layer_sizes = _layer_sizes(structure, kept, config)


def become_(model: PreTrainedModel, pruned: Any) -> None:
    """Give a model and its config, in place, the classes of pruned ones."""
    config: Any = model.config
    model.__class__ = pruned
    # Which states a forward records transformers looks up by the class; it notes that where a model is made.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)
    # Configs made by `Config(**entries)` have it as an attribute, which would hide that of the class.
    vars(config).pop("model_type", None)
    config.__class__ = pruned.config_class


def seal_(model: PreTrainedModel) -> None:
    """Close the recipe of a pruned model, in place: from here on a change of it is a mistake."""
    config: Any = model.config
    if config.model_type.startswith(MODEL_TYPE_PREFIX):
        config.hf_sparse = sealed(config.hf_sparse, config)


def _merged(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The recipe that leads from the stock model to the result of pruning twice."""
    merged = {**later, "identities": earlier["identities"], "parameters": earlier["parameters"]}
    now = {layer["block"]: layer["kept"] for layer in later["layers"]}
    merged["layers"] = [{**layer, "kept": now.get(layer["block"], layer["kept"])} for layer in earlier["layers"]]
    gone = tuple(f"{path}." for name, removal in later["removed"].items() for path in (name, removal["output"]))
    for key in (*BY_PATH, "removed"):
        kept = {path: value for path, value in earlier[key].items() if not f"{path}.".startswith(gone)}
        merged[key] = {**kept, **later[key]}
        if key == "attributes":  # a later round need not change all that an earlier one has changed
            merged[key] |= {path: {**kept.get(path, {}), **values} for path, values in later[key].items()}
    return merged


def _layer_sizes(structure: ModelStructure, kept: dict[str, Tensor], config: Any) -> dict[str, dict[str, Any]]:
    """Sizes by layer, in the schema of transformers' `per_layer_config`.

    Empty where a layer index has two blocks of a kind, as in two towers, which that schema cannot express.
    """
    places = [(block.layer, block.kind) for block in structure.blocks]
    if len(set(places)) < len(places):
        return {}
    layers: dict[str, dict[str, Any]] = {index: dict(sizes) for index, sizes in config.layer_sizes.items()}
    for block in structure.blocks:
        count = len(physical_units(block, kept[block.name]))
        sizes = layers.setdefault(str(block.layer), {})
        if not count:
            sizes["skip"] = sorted({*sizes.get("skip", ()), "attention" if block.kind == "attention" else "mlp"})
        if block.kind == "attention":
            sizes["head_dim"] = block.head_dim
            sizes["num_attention_heads"] = max(count * block.heads_per_unit, 1)
            if block.heads_per_unit > 1 or "num_key_value_heads" in vars(config):
                sizes["num_key_value_heads"] = max(count, 1)
        else:
            name = "intermediate_size" if block.kind == "ffn" else "moe_intermediate_size"
            sizes[name] = max(count, 1)
    return layers
