"""Give uniform layouts a stock form: if all layers keep the same numbers, a stock config can describe them.

Which entries of a config those are is not looked up: the stock skeleton is built with one entry after the other
changed, on no memory, until its parameters have the shapes of the pruned model.
"""

import copy
import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_sparse.errors import SparsityError, first_line
from hf_sparse.modeling_hf_sparse import (
    MODEL_TYPE_PREFIX,
    TABLE_SWITCHES,
    configs_in,
    has_pruned_sizes,
    read_filled_caches_,
)
from hf_sparse.runtime.contexts import silent_transformers
from hf_sparse.structure.attribute_names import HEAD_COUNTS, NEURON_COUNTS
from hf_sparse.structure.blocks import Block, ModelStructure
from hf_sparse.structure.comparison import RELATIVE_TOLERANCE, largest_difference, outputs
from hf_sparse.structure.dependencies import FORWARD_ERRORS
from hf_sparse.structure.slicing import physical_units, shrink

CONFIG_ERRORS = (*FORWARD_ERRORS, StrictDataclassError)
"""What configs and models raise when their sizes do not fit each other."""

OWN_ENTRIES = ("hf_sparse", "layer_sizes", "base_model_type", "base_architecture", "auto_map")
"""What the configs of pruned models have beside those of stock models."""


def expressible(model: PreTrainedModel, structure: ModelStructure) -> ModelStructure:
    """Choose the blocks whose kind can be shrunk uniformly within the stock class; all others are refused.

    Their `counts` are the numbers of units that its config accepts.
    """
    blocks: list[Block] = []
    refused = list(structure.refused)
    tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    for kind in dict.fromkeys(block.kind for block in structure.blocks):
        members = [block for block in structure.blocks if block.kind == kind]
        counts = _counts(model, tensors, members) if len({block.units for block in members}) == 1 else ()
        if counts:
            blocks += [replace(block, counts=counts) for block in members]
        else:
            reason = f"{type(model).__name__} cannot have fewer in every layer, as layout='uniform' asks for"
            refused += [(block.name, reason) for block in members]
    return ModelStructure(tuple(blocks), tuple(refused))


def _counts(model: PreTrainedModel, tensors: Mapping[str, Tensor], blocks: list[Block]) -> tuple[int, ...]:
    """Find the numbers of units that all of these blocks can keep in stock form, ascending; may be empty."""
    units, multiple = blocks[0].units, blocks[0].multiple
    possible = list(range(multiple, units, multiple))
    # Powers of two first: some configs want numbers that divide the width.
    for count in sorted(possible, key=lambda count: (count & (count - 1) != 0, -count)):
        kept = {block.name: torch.arange(count) for block in blocks}
        recipe, values = shrink(tensors, blocks, kept, {block.name: torch.ones(units) for block in blocks})
        if recipe["selections"] or recipe["padded"]:
            return ()
        config = stock_config(model, {**tensors, **values}, blocks, kept)
        if config is not None:
            break
        if count & (count - 1):
            return ()  # neither a power of two nor another one
    else:
        return ()
    dense = stock_copy(model)
    changed = [
        (*entry, _value(config, *entry) // count)
        for entry in _entries(dense)
        if _value(config, *entry) != _value(dense, *entry)
    ]
    return (*(count for count in possible if _accepts(config, changed, count)), units)


def _accepts(config: PreTrainedConfig, entries: list[tuple[int, str, int]], count: int) -> bool:
    """Whether a config may have that many units, by (number of the config, name, amount per unit) of its entries."""
    trial = copy.deepcopy(config)
    for place, name, amount in entries:
        vars(list(configs_in(trial))[place])[name] = amount * count
    try:
        type(trial).from_dict(trial.to_dict())
    except CONFIG_ERRORS:
        return False
    return True


def stock_config(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], blocks: list[Block], kept: Mapping[str, Tensor]
) -> PreTrainedConfig | None:
    """Find the config with which the stock class has tensors of these shapes; None if there is none.

    Args:
        model: in any form, for its class and config.
        tensors: a state dict of the shapes to reach.
        blocks: those that have lost units.
        kept: units that each of them keeps.
    """
    counts: dict[str, set[int]] = {"heads": set(), "neurons": set()}
    stacks: dict[str, int] = {}
    for block in blocks:
        units = len(physical_units(block, kept[block.name]))
        counts["heads" if block.kind == "attention" else "neurons"] |= {units, units * block.heads_per_unit} - {0}
        if stacks.setdefault(re.sub(r"\d+", "*", block.name), units) != units:
            return None  # the usual case: layers differ
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = stock_copy(model)
    for holder in configs_in(config):
        if "head_dim" in vars(holder) and counts["heads"]:
            holder.head_dim = next(block.head_dim for block in blocks if block.kind == "attention")
    dense = {size for block in blocks for size in (block.units, block.units * block.heads_per_unit)}
    entries = list(_entries(config))
    # Those that have the sizes of before; all where an earlier round has pruned already.
    entries = [entry for entry in entries if _value(config, *entry) in dense] or entries
    alike, before = _alike(model, config, shapes), -1
    while before < alike:  # query heads may have to change before kv heads, or after
        before = alike
        for place, name in entries:
            values = counts["heads" if HEAD_COUNTS.match(name) else "neurons"]
            for value in values - {_value(config, place, name)}:
                trial = copy.deepcopy(config)
                vars(list(configs_in(trial))[place])[name] = value
                score = _alike(model, trial, shapes)
                if score > alike:
                    config, alike = trial, score
        if alike == len(shapes):
            return config
    return None


def named_class(name: str, where: str) -> type[PreTrainedModel]:
    """Return the class of transformers with a name that was read from a config.

    Raises:
        SparsityError: it has no such model; `where` begins the message, such as "its config names".
    """
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise SparsityError(
            f"{where} {name}, which transformers {transformers.__version__} lacks: update it, or give a class of your "
            f"own, as in load_pruned(path, {name})"
        )
    return found


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class of a model, or the class that it had before it was pruned."""
    kind: Any = type(model)
    return kind.stock_class if model.config.model_type.startswith(MODEL_TYPE_PREFIX) else kind


def require_loadable(model: PreTrainedModel) -> None:
    """Refuse a model whose checkpoint could not be loaded again: its class makes other tensors from its config.

    Args:
        model: without gates.

    Raises:
        SparsityError: which tensor it is, and what to do.
    """
    kind, config = type(model), model.config
    try:
        made = _shapes(_on_no_memory(kind, config))
    except CONFIG_ERRORS as error:
        reason = first_line(error)
        raise SparsityError(
            f"{stock_class(model).__name__} could not be loaded again, since it cannot be made from its config alone "
            f"({reason}): give other arguments of its __init__ defaults, and build the models inside from the config"
        ) from error
    found = _shapes(model)
    for name in (*found, *made):
        if made.get(name) != found.get(name):
            raise SparsityError(
                f"{stock_class(model).__name__} could not be loaded again: {name} has shape {found.get(name)}, and "
                f"{made.get(name)} in what its class makes from its config. Set the config to what it is, or make what "
                "was added in the __init__ of a class of your own, which load_pruned(path, TheClass) then loads"
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a checkpoint of a model has, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def stock_copy(model: PreTrainedModel) -> PreTrainedConfig:
    """Copy a model's config as it was before the model was pruned, with the sizes of the skeleton."""
    config: Any = copy.deepcopy(model.config)
    if config.model_type.startswith(MODEL_TYPE_PREFIX):
        config.__class__ = type(config).stock_class
        _forget_(config)
    return config


def _forget_(config: PreTrainedConfig) -> None:
    """Remove from a config, in place, what the configs of pruned models have beside those of stock models."""
    for one in configs_in(config):
        if has_pruned_sizes(one):
            one.per_layer_config = None
            for name in TABLE_SWITCHES:
                vars(one).pop(name)
        for name in OWN_ENTRIES:
            vars(one).pop(name, None)


def _entries(config: PreTrainedConfig) -> Iterator[tuple[int, str]]:
    """(number of the config among `configs_in`, name) of the entries that may count heads or neurons."""
    for place, holder in enumerate(configs_in(config)):
        for name, value in vars(holder).items():
            if type(value) is int and (HEAD_COUNTS.match(name) or NEURON_COUNTS.match(name)):
                yield place, name


def _value(config: PreTrainedConfig, place: int, name: str) -> int:
    return vars(list(configs_in(config))[place])[name]


def _alike(model: PreTrainedModel, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many tensors the stock class has in these shapes; -1 if they are not the same ones."""
    try:
        # Through a dict, since only then is a config checked as a whole.
        built = skeleton(model, type(config).from_dict(config.to_dict()))
    except CONFIG_ERRORS:
        return -1
    found = _shapes(built)
    return sum(found[name] == shapes[name] for name in found) if found.keys() == shapes.keys() else -1


@dataclass(frozen=True)
class _Described:
    """A stock model by its class and by what its config says."""

    kind: type[PreTrainedModel]
    entries: str
    config: PreTrainedConfig = field(compare=False)


def skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> nn.Module:
    """Return the stock model that a config describes, without memory for its parameters; others share it."""
    return _skeleton(_Described(stock_class(model), config.to_json_string(use_diff=False), config))


@functools.lru_cache(maxsize=32)
def _skeleton(described: _Described) -> nn.Module:
    """Make it; the same few are asked for whenever a model shrinks once more."""
    return _on_no_memory(described.kind, described.config)


def _on_no_memory(kind: type[PreTrainedModel], config: PreTrainedConfig) -> nn.Module:
    """Make a model of a class, with parameters on torch's meta device."""
    # Warnings about sizes that are only tried are not for users.
    with silent_transformers(), warnings.catch_warnings(), no_init_weights(), init_empty_weights(include_buffers=False):
        warnings.simplefilter("ignore")
        return kind(copy.deepcopy(config))


@torch.no_grad()
def computes_the_same(model: PreTrainedModel, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> bool:
    """Tell whether a pruned model would compute the same in its stock form.

    Args:
        model: in evaluation mode.
        config: from `stock_config`.
        inputs: a batch to compare outputs on.
    """
    try:
        twin: Any = _on_no_memory(stock_class(model), config).eval()
        twin.load_state_dict(model.state_dict(), assign=True)
        found = outputs(nn.Module.to(twin, model.device), inputs)
    except FORWARD_ERRORS:
        return False
    own = outputs(model, inputs)
    if own.keys() != found.keys():
        return False
    difference, scale = largest_difference(own.values(), found.values())
    return difference <= RELATIVE_TOLERANCE * max(scale, 1.0)


def to_stock_(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give a pruned model the class and config of its stock form, in place; `config` is from `stock_config`."""
    kind: Any = stock_class(model)
    model.__class__ = kind
    read_filled_caches_(model.base_model, [])  # others fill them with the heads it has
    _forget_(model.config)
    for own_config, new in zip(configs_in(model.config), configs_in(config)):
        own_config.__class__ = type(new)
        for name, value in vars(new).items():
            if type(value) is int:
                vars(own_config)[name] = value
