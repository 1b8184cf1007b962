"""Rebuilds pruned models from their config; this file travels inside checkpoints and needs only torch and transformers.

A pruned model is its stock architecture plus a resize recipe in `config.hf_sparse`, made when it was compacted: see
`Recipe`. Classes are made on demand from the stock ones: `HfSparseBertConfig`, `HfSparseBertForSequenceClassification`
and so on are attributes of this module.

Files may come from anyone. Nothing in them is run, every number is checked before anything is allocated by it, and
weights that do not fit the config raise an error instead of being made up.
"""

from __future__ import annotations  # transformers.PreTrainedModel takes seconds to import, so annotations wait for it

import copy
import functools
import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NotRequired, TypedDict, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

try:  # an older version would only say which name it cannot import
    from transformers.utils.versions import require_version

    require_version("transformers>=5.14")
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
    from transformers.pytorch_utils import Conv1D
    from transformers.utils import cached_file
except ImportError as error:
    raise ImportError(
        f"models that hf_sparse has pruned load with transformers 5.14 or later, pip install -U transformers: {error}"
    ) from None

MODEL_TYPE_PREFIX = "hf_sparse_"
CLASS_PREFIX = "HfSparse"
RECIPE_VERSION = 1
LOADED_BY = {"quant_method": "hf_sparse"}
"""The `quantization_config` of checkpoints whose class is not of transformers.

By it `TheClass.from_pretrained`, which reads config.json by the stock config, finds what replays the recipe, once
hf_sparse is imported.
"""
POSITION_BIAS_METHODS = ("compute_bias",)
"""Methods of stock modules that a recipe may name."""
_MOST_LAYERS, _MOST_PARAMETERS = 10_000, 100_000
"""Of any model there is; a config that asks for more layers, labels without names, or tensors is not believed."""

# ---- The format ----


class LayerRecord(TypedDict):
    """What one sublayer had and kept, for people: heads (query heads under grouped queries) or neurons."""

    block: str
    kind: str
    layer: int
    units: int
    kept: int


class Selection(TypedDict):
    """An argument with an entry for each head of the stock model, of which a module picks the heads that it kept.

    `dim` is the dimension of the heads, `count` how many the stock model has, `index` which ones were kept; `method` is
    the method of the module, if any, that makes the argument where nobody gives it.
    """

    argument: str
    dim: int
    count: int
    index: list[int]
    method: NotRequired[str | None]


class Padding(TypedDict):
    """A projection that reads, or gives, only some of the `size` channels around it, given as [start, stop] pairs."""

    side: str  # "inputs" or "outputs"
    size: int
    runs: list[list[int]]


class Removal(TypedDict):
    """A sublayer that was removed as a whole, and what its stand-in has to do instead.

    `output` is the path of its output projection. It returned `outputs` values, of which some were arguments handed on:
    `passed` has their names by their places; `weights` are the places of attention weights. Its layer of the cache is
    the one with this `index`, of cross attention if `cross`, and `cache` is (kv heads, width) of an entry in it.
    """

    kind: str
    output: str
    outputs: int
    passed: dict[str, str]
    cache: list[int] | None
    index: NotRequired[int | None]
    cross: NotRequired[bool]
    weights: NotRequired[list[int]]


class CachedHeads(TypedDict):
    """The layer of the cache that attention writes to: it has `heads` kv heads in the stock model, and `kept` stay."""

    layer: int
    cross: bool
    heads: int
    kept: list[int]


class Recipe(TypedDict):
    """How to give the stock model the shapes of the pruned one; `config.hf_sparse`.

    Paths are relative to the base model (no "bert." or "model." in front).
    """

    version: int
    checksum: str  # of all the rest, so that a change by accident is noticed
    sizes: dict[str, int]  # entries of the config that the recipe was made for
    parameters: int  # of the model before it was pruned, for people
    layers: list[LayerRecord]  # likewise
    shapes: dict[str, list[int]]  # of the parameters whose shape differs from the stock skeleton's
    attributes: dict[str, dict[str, int]]  # by module: head counts and widths that its forward pass reads
    selections: dict[str, list[Selection]]  # by module
    padded: dict[str, Padding]  # by projection
    removed: dict[str, Removal]  # by module
    caches: NotRequired[dict[str, CachedHeads]]  # by module
    identities: list[str]  # norms that nothing reads any more


# ---- What stands in for removed sublayers ----


class BiasOnly(nn.Module):
    """A projection that lost all of its inputs: what is left is its bias, or zero.

    Args:
        size: outputs.
        bias: whether the projection had a bias.
    """

    def __init__(self, size: int, bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.size = size
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype)) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the bias for every position of the input, shape (..., size)."""
        shape = (*hidden_states.shape[:-1], self.size)
        # A tensor of its own, as from a projection: residuals are added to in place.
        return hidden_states.new_zeros(shape) if self.bias is None else self.bias.expand(shape).clone()

    def extra_repr(self) -> str:
        """What print(model) shows of it."""
        return f"{self.size}, bias={self.bias is not None}"


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _first_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, transformers.Cache)), None)


def _part_of(cache: Any, cross: bool | None) -> Any:
    """The cache of cross attention or of self attention, where a decoder's has both."""
    if not isinstance(cache, transformers.EncoderDecoderCache):
        return cache
    return cache.cross_attention_cache if cross else cache.self_attention_cache


class _Removed(nn.Module):
    """Stands in for a sublayer without units.

    A projection without bias is not kept as a module: tools that choose modules by name would want to adapt it.

    Args:
        zeros: outputs of an output projection without bias that was part of the sublayer; None if there is another.
    """

    def __init__(self, zeros: int | None = None) -> None:
        nn.Module.__init__(self)  # and not that of a stock class
        self.zeros = zeros

    def constant(self, hidden_states: Tensor) -> Tensor:
        """Return zeros, or the bias that is left, or the input if the output projection is elsewhere and ignores it."""
        if self.zeros is not None:
            return hidden_states.new_zeros((*hidden_states.shape[:-1], self.zeros))
        for output in self.children():
            return output(hidden_states)
        return hidden_states


class RemovedFfn(_Removed):
    """Stands in for an FFN without neurons."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what is left of the sublayer's output."""
        return self.constant(_first_tensor(args, kwargs))


class RemovedExperts(nn.Module):
    """Stands in for experts without neurons and without biases."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros of the shape of the input."""
        return torch.zeros_like(_first_tensor(args, kwargs))


class RemovedAttention(_Removed):
    """Stands in for attention without heads.

    The cache still gets an entry of zeros, since lengths and positions are read off it, and whoever asks for attention
    weights still gets an entry for this layer: those of no head, shape (batch, 0, queries, keys).

    Args:
        core: the removed module.
        removal: its record in the recipe.
        zeros: see above.
    """

    def __init__(self, core: nn.Module, removal: Removal, zeros: int | None = None) -> None:
        super().__init__(zeros)
        self.kv_heads, self.head_dim = cast(list[int], removal["cache"])
        # Recipes without an index were made where no cache was seen: there, arguments tell cross attention.
        self.cross: bool | None = removal.get("cross")
        self.layer_idx: int | None = removal["index"] if "index" in removal else vars(core).get("layer_idx")
        self.outputs = removal["outputs"]
        self.passed = {int(place): name for place, name in removal["passed"].items()}
        self.weights = removal.get("weights", [])
        parameters = list(inspect.signature(type(core).forward).parameters)[1:]
        self.asked_at = parameters.index("output_attentions") if "output_attentions" in parameters else None
        self.config = vars(core).get("config")
        for name, value in vars(core).items():  # numbers that other modules read off it, such as those of image tokens
            if type(value) is int and name not in vars(self):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        """Return the output and, if the removed module returned more, None or the arguments that it handed on.

        Takes the arguments of the removed module.
        """
        hidden_states = _first_tensor(args, kwargs)
        encoded = (kwargs.get("key_value_states"), kwargs.get("encoder_hidden_states"))
        source = next((states for states in encoded if states is not None), hidden_states)
        keys = source.shape[1]
        cache = _first_cache(args, kwargs)
        if cache is not None and self.layer_idx is not None and (self.cross is not None or source is hidden_states):
            keys = self._write_zeros(cache, self.layer_idx, source if self.cross else hidden_states)
        output = self.constant(hidden_states)
        if not self.outputs:
            return output
        returned: dict[int, Any] = {place: kwargs.get(name) for place, name in self.passed.items()}
        if places := self._places_of_weights(args, kwargs):
            none = hidden_states.new_zeros(hidden_states.shape[0], 0, hidden_states.shape[1], keys)
            returned |= dict.fromkeys(places, none)
        count = max(self.outputs, *(place + 1 for place in returned), 1)
        return (output, *(returned.get(place) for place in range(1, count)))

    def _write_zeros(self, cache: Any, index: int, states: Tensor) -> int:
        """Add zeros for some states to a layer of the cache, in place; the number of keys in it.

        Those of cross attention are added once.
        """
        if isinstance(cache, transformers.EncoderDecoderCache):
            if self.cross and cache.is_updated.get(index):
                return states.shape[1]
            if self.cross:
                cache.is_updated[index] = True
        cache = _part_of(cache, self.cross)
        shapes = [(self.kv_heads, self.head_dim)] * 2
        layer: Any = cache.layers[index] if index < len(cache.layers) else None
        if layer is not None and layer.is_initialized and layer.keys.ndim == 4:
            # Others have made room, of the shape that they take the removed attention to have.
            shapes = [(room.shape[1], room.shape[3]) for room in (layer.keys, layer.values)]
        batch, length = states.shape[:2]
        zeros = [states.new_zeros(batch, heads, length, width) for heads, width in shapes]
        return int(cache.update(*zeros, index)[0].shape[2])

    def _places_of_weights(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        """Where in the tuple the removed module would have returned attention weights in this call."""
        if self.asked_at is not None:
            if kwargs.get("output_attentions") or (len(args) > self.asked_at and args[self.asked_at]):
                return self.weights
        elif self.config is None:
            return self.weights
        eager = isinstance(self.config, PreTrainedConfig) and self.config._attn_implementation == "eager"
        return [place for place in self.weights if eager and place < self.outputs]

    def extra_repr(self) -> str:
        """What print(model) shows of it."""
        return f"layer_idx={self.layer_idx}"

    def __reduce__(self) -> Any:
        """Copies and pickles, of a class that is made when it is needed."""
        return _blank_attention, (type(self).__bases__[1:],), vars(self)


@functools.cache
def _removed_attention(stock: tuple[type, ...]) -> Any:
    """The class of stand-ins that derive from stock classes, too."""
    return type("RemovedAttention", (RemovedAttention, *stock), {"__module__": __name__}) if stock else RemovedAttention


def _blank_attention(stock: tuple[type, ...]) -> RemovedAttention:
    """A stand-in for a copy to fill."""
    return nn.Module.__new__(_removed_attention(stock))


def _attention_stand_in(core: nn.Module, removal: Removal, zeros: int | None) -> RemovedAttention:
    """What stands in for attention; transformers records its weights by its class and by hooks, so both are those."""
    if not removal.get("weights"):
        return RemovedAttention(core, removal, zeros)
    stand_in: Any = _removed_attention((type(core),))(core, removal, zeros)
    stand_in._is_hf_initialized = True  # there are no weights for the stock class to draw
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        setattr(stand_in, name, getattr(core, name))
    return cast(RemovedAttention, stand_in)


# ---- Recipes, as they are in files ----


def sealed(recipe: Recipe, config: PreTrainedConfig) -> Recipe:
    """Add to a recipe the sizes of the config that it was made for, and its checksum."""
    sizes = {name: size for name, size in _sizes(config.to_dict()) if "num_labels" not in name}
    sized: Recipe = {**recipe, "sizes": sizes}
    return {**sized, "checksum": _checksum(sized)}


def _checksum(recipe: Mapping[str, Any]) -> str:
    entries = {key: value for key, value in recipe.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]


_SIZE = re.compile(r"head|layers|hidden_size|intermediate|dim$|^d_|n_embd|num_labels")


def _sizes(entries: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the entries of a config, and of configs in it, that size modules; users change only others, or labels."""
    for name, value in entries.items():
        if type(value) is int and _SIZE.search(name):
            yield prefix + name, value
        elif isinstance(value, dict) and name.endswith("config"):
            yield from _sizes(value, f"{prefix}{name}.")


def check_recipe(recipe: Any, entries: dict[str, Any]) -> None:
    """Check every entry of a recipe that was read from a file, before anything is made by it.

    Args:
        recipe: what is in config.hf_sparse.
        entries: the config that it is in.

    Raises:
        ValueError: an entry cannot be, or was changed since the checkpoint was saved.
    """
    if not isinstance(recipe, dict) or "version" not in recipe:
        raise ValueError("config.json has no recipe in hf_sparse: hf_sparse did not make it, or it was changed since")
    if recipe["version"] != RECIPE_VERSION:
        found = f"config.hf_sparse has version {recipe['version']!r}"
        raise ValueError(f"{found}, this code reads {RECIPE_VERSION}: update hf_sparse")
    if wrong := sorted(map(str, (recipe.keys() | {"caches"}) ^ empty_recipe().keys())):
        raise ValueError(f"config.hf_sparse has entries too many or too few: {', '.join(wrong)}")
    for key, is_entry in _ENTRIES.items():
        table = recipe.get(key, {})
        if not isinstance(table, dict):
            raise ValueError(f"config.hf_sparse has {key} that are not a table by path")
        for path, entry in table.items():
            if not (path or key == "attributes") or not is_entry(entry):
                raise ValueError(f"config.hf_sparse has {key} of {path!r} that cannot be: {str(entry)[:200]}")
    if not _is_list(recipe["layers"], _is_layer) or type(recipe["parameters"]) is not int:
        raise ValueError("config.hf_sparse has layers or parameters that cannot be")
    if not _is_list(recipe["identities"], lambda path: isinstance(path, str) and path != ""):
        raise ValueError("config.hf_sparse has identities that are not a list of paths")
    if entries.get("transformers_weights") is not None:  # it could name any file
        raise ValueError("config.json has transformers_weights: weights are read from model.safetensors alone")
    for name, value in _sizes(entries):
        if ("layers" in name or "num_labels" in name) and value > _MOST_LAYERS:
            raise ValueError(f"config.json has {name} {value}: no model has as many")
        if recipe["sizes"].get(name, value) != value:
            raise ValueError(f"config.json has {name} {value}, but was {recipe['sizes'][name]} when it was pruned")
    if recipe["checksum"] != _checksum(recipe):
        raise ValueError("config.hf_sparse was changed since the checkpoint was saved: get its config.json again")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(is_item(item) for item in value)


def _is_layer(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"block", "kind", "layer", "units", "kept"}:
        return False
    counts = [value[name] for name in ("layer", "kept", "units")]
    return (
        isinstance(value["block"], str)
        and value["kind"] in ("attention", "ffn", "experts")
        and all(type(count) is int and 0 <= count < 2**31 for count in counts)
        and value["kept"] <= value["units"]
    )


def _is_selection(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() - {"method"} != {"argument", "dim", "count", "index"}:
        return False
    return (
        isinstance(value["argument"], str)
        and value["dim"] in (0, 1)
        and _are_heads(value["index"], value["count"])
        and value.get("method") in (None, *POSITION_BIAS_METHODS)
    )


def _are_heads(index: Any, count: Any) -> bool:
    """Whether a list has some of so many heads, ascending."""
    return (
        _is_count(count)
        and _is_list(index, lambda head: type(head) is int and 0 <= head < count)
        and index == sorted(set(index)) != []
    )


def _is_cached(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"layer", "cross", "heads", "kept"}:
        return False
    layer = value["layer"]
    return (
        type(layer) is int
        and 0 <= layer < _MOST_LAYERS
        and type(value["cross"]) is bool
        and _are_heads(value["kept"], value["heads"])
    )


def _is_padding(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"side", "size", "runs"}:
        return False
    size, kept = value["size"], value["runs"]
    if not _is_count(size) or not _is_list(kept, lambda run: _is_list(run, lambda bound: type(bound) is int)):
        return False
    bounds = [0, *(bound for run in kept for bound in run), size]
    return value["side"] in ("inputs", "outputs") and bounds == sorted(bounds) and all(len(run) == 2 for run in kept)


def _is_removal(value: Any) -> bool:
    entries = {"kind", "output", "outputs", "passed", "cache"}
    if not isinstance(value, dict) or value.keys() - {"index", "cross", "weights"} != entries:
        return False
    passed, cache, index = value["passed"], value["cache"], value.get("index")
    return (
        value["kind"] in ("attention", "ffn", "experts")
        and isinstance(value["output"], str)
        and value["outputs"] in range(100)
        and isinstance(passed, dict)
        and passed.keys() <= {str(place) for place in range(1, value["outputs"])}
        and all(isinstance(name, str) for name in passed.values())
        and (index is None or (type(index) is int and 0 <= index < _MOST_LAYERS))
        and value.get("cross", False) in (False, True)
        and _is_list(value.get("weights", []), lambda place: type(place) is int and 0 < place < 100)
        and (_is_list(cache, _is_count) and len(cache) == 2 if value["kind"] == "attention" else cache is None)
    )


_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "sizes": lambda value: type(value) is int and -1 <= value < 2**31,
    "shapes": lambda value: _is_list(value, _is_count) and 0 < len(value) < 8,
    "attributes": lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
    "selections": lambda value: _is_list(value, _is_selection),
    "padded": _is_padding,
    "removed": _is_removal,
    "caches": _is_cached,
}

# ---- Replaying a recipe ----


def empty_recipe() -> Recipe:
    """Make the recipe that changes nothing."""
    return {
        "version": RECIPE_VERSION,
        "checksum": "",
        "sizes": {},
        "parameters": 0,
        "layers": [],
        "shapes": {},
        "attributes": {},
        "selections": {},
        "padded": {},
        "removed": {},
        "caches": {},
        "identities": [],
    }


def resize_(model: nn.Module, recipe: Recipe) -> None:
    """Give a stock module the shapes of its recipe, in place; the caller fills in the values.

    Raises:
        ValueError: the recipe does not fit the module.
    """
    for path, removal in recipe["removed"].items():
        _remove_(model, path, removal)
    for path in recipe["identities"]:
        _replace_(model, path, nn.Identity())
    for path, padding in recipe["padded"].items():
        _pad_(model, path, padding, recipe["shapes"].get(f"{path}.weight"))
    for path, shape in recipe["shapes"].items():
        _resize_parameter_(model, path, shape)
    for path, attributes in recipe["attributes"].items():
        for name, value in attributes.items():
            _set_attribute_(_at(model, path), path, name, value)
    for path, selections in recipe["selections"].items():
        _select_heads_(_at(model, path), selections)
    for path in recipe.get("caches", {}):
        _at(model, path)
    read_filled_caches_(model, recipe.get("caches", {}).values())


def _at(base: nn.Module, path: str) -> nn.Module:
    try:
        return base.get_submodule(path)
    except AttributeError:
        raise ValueError(f"config.hf_sparse names {path!r}, which {type(base).__name__} does not have") from None


def _replace_(base: nn.Module, path: str, module: nn.Module) -> None:
    _at(base, path)
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, module)


def _remove_(base: nn.Module, path: str, removal: Removal) -> None:
    core = _at(base, path)
    # What is around it has its values; some initialise by the names of what is in them.
    parent: Any
    for end in range(1, path.count(".") + 1):
        parent = base.get_submodule(".".join(path.split(".")[:end]))
        parent._is_hf_initialized = True
    if removal["kind"] == "experts":
        _replace_(base, path, RemovedExperts().train(core.training))
        return
    output = _at(base, removal["output"])
    weight = output.get_parameter("weight")
    size = weight.shape[1] if isinstance(output, Conv1D) else weight.shape[0]
    bias = BiasOnly(size, output.bias is not None, weight.dtype).to(weight.device)
    inside = removal["output"].startswith(f"{path}.")
    zeros = size if inside and bias.bias is None else None
    stand_in: nn.Module = RemovedFfn(zeros)
    if removal["kind"] == "attention":
        kv_heads, head_dim = cast(list[int], removal["cache"])
        if kv_heads * head_dim > weight.numel():
            raise ValueError(f"config.hf_sparse gives {path!r} a cache of {removal['cache']}, larger than it can be")
        stand_in = _attention_stand_in(core, removal, zeros)
    stand_in.train(core.training)
    if inside and zeros is None:
        stand_in.add_module(removal["output"].removeprefix(f"{path}."), bias)
    elif not inside:
        _replace_(base, removal["output"], bias)
    _replace_(base, path, stand_in)


def _resize_parameter_(base: nn.Module, path: str, shape: list[int]) -> None:
    owner_path, _, name = path.rpartition(".")
    owner = _at(base, owner_path)
    old = owner._parameters.get(name)
    if old is None or len(shape) != old.ndim:
        raise ValueError(f"config.hf_sparse gives parameter {path!r} the shape {shape!r}, which it cannot have")
    if any(new > size for new, size in zip(shape, old.shape)):
        raise ValueError(f"config.hf_sparse gives {path!r} the shape {shape}, larger than the stock {list(old.shape)}")
    # A part of what is there, so that a model made from a config alone is initialised like its stock form.
    part = old.detach()[tuple(slice(n) for n in shape)].clone()
    owner.register_parameter(name, nn.Parameter(part, requires_grad=old.requires_grad))
    if isinstance(owner, Conv1D):
        owner.nf = shape[-1]
        owner.nx = owner.weight.shape[0]
    elif name != "weight":
        return
    elif isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = shape
    elif isinstance(owner, nn.Embedding):
        owner.num_embeddings, owner.embedding_dim = shape
    elif isinstance(owner, nn.Conv1d | nn.Conv2d):
        if owner.groups > 1:
            if owner.groups != old.shape[0]:
                raise ValueError(f"config.hf_sparse resizes {path!r}, a convolution in groups of several channels")
            owner.groups = shape[0]
        owner.out_channels, owner.in_channels = shape[0], shape[1] * owner.groups


def _set_attribute_(module: Any, path: str, name: str, value: int) -> None:
    holder = module
    _, dot, entry = name.rpartition(".")
    if dot and name == f"config.{entry}":
        # A copy for this module, since the other layers read the shared one; one copy for all entries.
        if "_config_of_its_own" not in vars(module):
            module.config = _own_config(module.config)
            module._config_of_its_own = True
        holder = module.config
    elif dot:
        raise ValueError(f"config.hf_sparse sets {path}.{name}: the model has no such size")
    if type(getattr(holder, entry, None)) is not int:
        raise ValueError(f"config.hf_sparse sets {path}.{name} to {value!r}: the model has no such size")
    setattr(holder, entry, value)


def _own_config(shared: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config with sizes of its own, which still attends in the way that is chosen for the whole model."""
    own: Any = copy.copy(shared)
    kind: Any = type(shared)
    own.shared_config = shared
    own.__class__ = _own_config_class(kind)
    return cast(PreTrainedConfig, own)


@functools.cache
def _own_config_class(stock: Any) -> Any:
    chosen = property(lambda config: config.shared_config._attn_implementation, lambda config, value: None)
    return type(stock.__name__, (stock,), {"_attn_implementation": chosen, "__module__": stock.__module__})


# ---- Parts of tensors, as runs of positions that are read off without an index on the device ----


def runs(positions: list[int]) -> list[list[int]]:
    """Join ascending positions that follow each other into [start, stop] pairs."""
    found: list[list[int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1][1] += 1
        else:
            found.append([position, position + 1])
    return found


def _take(tensor: Tensor, dim: int, kept: list[list[int]]) -> Tensor:
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in kept], dim)


def _with_forward(stock: Any, forward: Any) -> Any:
    """A subclass of a module's class with another forward."""
    return type(stock.__name__, (stock,), {"forward": forward, "__module__": stock.__module__})


# ---- Heads picked from a cache that others have filled ----


class _KeptHeads:
    """A hook before a model: it reads the heads it kept from a cache that was filled with all heads of the stock model.

    Whoever makes keys and values, as peft does for its prefixes, knows one number of heads for all layers.
    """

    def __init__(self, caches: list[CachedHeads]) -> None:
        self.caches = [(entry["layer"], entry["cross"], entry["heads"], runs(entry["kept"])) for entry in caches]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Drop the removed heads from the cache among some arguments, in place."""
        cache = _first_cache(args, kwargs)
        if cache is None:
            return
        for index, cross, heads, kept in self.caches:
            part = _part_of(cache, cross)
            layer = part.layers[index] if index < len(part.layers) else None
            if layer is not None and layer.is_initialized and layer.keys.ndim == 4 and layer.keys.shape[1] == heads:
                layer.keys, layer.values = _take(layer.keys, 1, kept), _take(layer.values, 1, kept)


def read_filled_caches_(model: nn.Module, caches: Iterable[CachedHeads]) -> None:
    """Let a model read only its kept heads from caches that are filled with all heads, in place, by its recipe."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, _KeptHeads)]:
        del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    if entries := list(caches):
        model.register_forward_pre_hook(_KeptHeads(entries), with_kwargs=True)


# ---- Heads picked from an argument ----


def _select_heads_(module: Any, selections: list[Selection]) -> None:
    """Let a module pick the heads it kept from arguments that have an entry for each head of the stock model."""
    kind: Any = type(module)
    if "head_selections" not in vars(module):  # as it is where a model is pruned once more
        module.__class__ = _selecting_class(kind)
    module.head_selections = [{**selection, "runs": runs(selection["index"])} for selection in selections]


@functools.cache
def _selecting_class(stock: Any) -> Any:
    parameters = list(inspect.signature(stock.forward).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(parameters, args)), **kwargs}
        whole: list[tuple[Tensor, Tensor]] = []
        for selection in self.head_selections:
            tensor = given.get(selection["argument"])
            if tensor is None and "method" in selection:
                tensor = _position_bias(self, selection, given)
            if isinstance(tensor, Tensor):
                part = _select(tensor, selection)
                given[selection["argument"]] = part
                whole.append((part, tensor))
        # By position where it came by position: names may be taken by **kwargs of the stock forward.
        values = [given.pop(name) for name in parameters[: len(args)]]
        outputs = stock.forward(self, *values, **given)
        # What the module hands on is for layers that kept other heads.
        return _restored(outputs, whole)

    return _with_forward(stock, forward)


def _position_bias(module: Any, selection: dict[str, Any], given: dict[str, Any]) -> Tensor:
    """The bias that a module makes for all layers, with all heads of the stock model; shape (1, heads, q, k)."""
    hidden_states, cache = given["hidden_states"], given.get("past_key_values")
    length, past = hidden_states.shape[1], 0
    keys = length
    if isinstance(given.get("key_value_states"), Tensor):
        keys = given["key_value_states"].shape[1]
    elif cache is not None:
        cache = _part_of(cache, cross=False)
        past = cache.get_seq_length(module.layer_idx)
        keys, _ = cache.get_mask_sizes(length, module.layer_idx)
    if selection["method"] is None:
        return hidden_states.new_zeros(1, selection["count"], length, keys)
    return getattr(module, selection["method"])(length, keys, device=hidden_states.device, past_seen_tokens=past)


def _select(tensor: Tensor, selection: dict[str, Any]) -> Tensor:
    """The kept heads of a tensor with heads, or sequences times heads, along a dimension."""
    dim, count = selection["dim"], selection["count"]
    if tensor.ndim <= dim or tensor.shape[dim] % count:
        return tensor  # one entry for all heads
    return _take(tensor.unflatten(dim, (-1, count)), dim + 1, selection["runs"]).flatten(dim, dim + 1)


def _restored(outputs: Any, whole: list[tuple[Tensor, Tensor]]) -> Any:
    if isinstance(outputs, tuple):
        return tuple(_restored(output, whole) for output in outputs)
    return next((tensor for part, tensor in whole if outputs is part), outputs)


# ---- Projections between fewer channels than are around them ----


class _Takes:
    """A hook before a projection: it reads only some channels of its input."""

    def __init__(self, kept: list[list[int]]) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_take(args[0], -1, self.kept), *args[1:])


class _Pads:
    """A hook after a projection: channels that it lost are zeros in its output."""

    def __init__(self, kept: list[list[int]], size: int) -> None:
        self.kept, self.size = kept, size

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        parts, end, taken = [], 0, 0
        for start, stop in [*self.kept, [self.size] * 2]:
            parts.append(output.new_zeros(*output.shape[:-1], start - end))
            parts.append(output[..., taken : taken + stop - start])
            end, taken = stop, taken + stop - start
        return torch.cat(parts, -1)


def _pad_(base: nn.Module, path: str, padding: Padding, shape: list[int] | None) -> None:
    """Let a projection read only some of its input channels, or give zeros for some of its output channels, in place.

    The projection itself becomes a plain one with fewer channels, as whoever wraps or replaces it takes it to be, such
    as LoRA. What is around it is done by hooks, which the module that it is part of moves to whatever takes its place.

    Args:
        base: the model; the projection in it still has its stock shape.
        path: of the projection.
        padding: a record of the recipe.
        shape: that of its weight, once it is resized.
    """
    module: Any = _at(base, path)
    linear = isinstance(module, nn.Linear)
    if not (linear or isinstance(module, Conv1D)) or shape is None or len(shape) != 2:
        raise ValueError(f"config.hf_sparse pads {path!r}, which is not a projection that shrinks")
    dim = int((padding["side"] == "inputs") == linear)
    channels = sum(stop - start for start, stop in padding["runs"])
    if padding["size"] != module.weight.shape[dim] or channels != shape[dim]:
        raise ValueError(f"config.hf_sparse pads {path!r} to other channels than it has")
    parent, _, name = path.rpartition(".")
    holder: Any = _at(base, parent)
    if "padded_channels" not in vars(holder):
        kind: Any = type(holder)
        holder.__class__ = _padding_class(kind)
        holder.padded_channels = {}
    holder.padded_channels[name] = padding
    setattr(holder, name, module)


@functools.cache
def _padding_class(stock: Any) -> Any:
    def __setattr__(self: Any, name: str, value: Any) -> None:
        stock.__setattr__(self, name, value)
        padding = vars(self).get("padded_channels", {}).get(name)
        if padding is not None and isinstance(value, nn.Module):
            _hook_(value, padding)

    return type(stock.__name__, (stock,), {"__setattr__": __setattr__, "__module__": stock.__module__})


def padded_side(module: nn.Module) -> str | None:
    """Return the side of a projection that is padded, "inputs" or "outputs"; None if it has all channels."""
    kinds = [type(hook) for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())]
    return "inputs" if _Takes in kinds else "outputs" if _Pads in kinds else None


def _hook_(module: nn.Module, padding: Padding) -> None:
    """Pad a projection, or what has been put around it, and nothing inside of it."""
    for part in module.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Takes | _Pads)]:
                del hooks[key]
    if padding["side"] == "inputs":
        module.register_forward_pre_hook(_Takes(padding["runs"]))
    else:
        module.register_forward_hook(_Pads(padding["runs"], padding["size"]))


# ---- Classes, made on demand ----


TABLE_SWITCHES = ("allow_global_per_layer_attribute_access", "serialize_explicit_per_layer_config")
"""Entries of a config whose `per_layer_config` describes what pruning left; its other entries are the skeleton's."""


def configs_in(config: Any) -> Iterator[Any]:
    """Yield a config and the configs in it, such as those of a text and a vision model."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs_in(value)


def has_pruned_sizes(config: Any) -> bool:
    """Tell whether the `per_layer_config` of a config describes what pruning left; some stock configs have one."""
    return bool(config.is_heterogeneous) and all(vars(config).get(name) for name in TABLE_SWITCHES)


@contextmanager
def _sizes_of_the_skeleton(config: PreTrainedConfig) -> Iterator[None]:
    """Hide what is left of layers while the stock skeleton is built: it is that which is made smaller."""
    pruned = [one for one in configs_in(config) if has_pruned_sizes(one)]
    tables = [one.to_dict()["per_layer_config"] for one in pruned]
    for one in pruned:
        one.per_layer_config = None
    try:
        yield
    finally:
        for one, table in zip(pruned, tables):
            one.per_layer_config = table


def _check_tables(entries: dict[str, Any]) -> None:
    """Check the sizes that whoever makes a cache reads before the model is there: none is larger than the stock one."""
    for value in entries.values():
        if isinstance(value, dict) and "per_layer_config" in value:
            _check_tables(value)
    if not all(entries.get(name) for name in TABLE_SWITCHES):
        return
    table = entries.get("per_layer_config")
    if not isinstance(table, dict) or not all(isinstance(layer, dict) for layer in table.values()):
        raise ValueError("config.json has a per_layer_config that is not a table by layer")
    for layer in table.values():
        for name, size in layer.items():
            whole = entries.get(name)
            fits = (size is None and whole is None) or (_is_count(size) and (type(whole) is not int or size <= whole))
            if name == "skip":
                fits = _is_list(size, lambda part: part in ("attention", "mlp"))
            if not fits:
                raise ValueError(f"config.json has a per_layer_config with {name} {size!r}, which cannot be")


class _PrunedConfig:
    """Mixed into a stock config: what is left of every layer, beside the stock sizes that the skeleton is built from.

    The sizes are in `per_layer_config`, the schema of transformers and of whoever makes caches for a model, in the
    config that its layers belong to. If that cannot express everything, as when an encoder and a decoder share a
    config, `layer_sizes` has the sizes of every block by its path.
    """

    # Here and in _PrunedModel the types of what `super()` is are ignored: that is the stock class, made known later.

    hf_sparse: Recipe
    layer_sizes: dict[str, dict[str, Any]] = {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config from what `to_dict` returned.

        Raises:
            ValueError: its recipe is not one, see `check_recipe`.
        """
        entries = dict(config_dict)
        # Before the stock class sees it, which makes lists as long as there are layers.
        check_recipe(entries.get("hf_sparse"), entries)
        _check_tables(entries)
        if entries.get("quantization_config") == LOADED_BY:
            del entries["quantization_config"]
        if "layer_sizes" not in entries and not entries.get(TABLE_SWITCHES[0]) and "per_layer_config" in entries:
            # Earlier versions had names and key heads in it that were not those of the model, so only people read it.
            entries["layer_sizes"] = entries.pop("per_layer_config")
        _register_architectures(entries.get("auto_map"), cls)
        return super().from_dict(entries, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """Return all entries, as in config.json."""
        return _as_in_files(self, super().to_dict())  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the entries that differ from the defaults, as in config.json."""
        return _as_in_files(self, super().to_diff_dict())  # type: ignore[misc]


def _as_in_files(config: Any, entries: dict[str, Any]) -> dict[str, Any]:
    if "per_layer_config" in entries:  # whoever reads it without the stock class, as Trainer does, counts layers so
        entries = {"num_hidden_layers": config.num_hidden_layers, **entries}
    if "base_architecture" in entries and not hasattr(transformers, str(entries["base_architecture"])):
        return {"quantization_config": dict(LOADED_BY), **entries}  # the stock config reads it, see above
    return entries


_room: ContextVar[int | None] = ContextVar("room", default=None)
"""Values that a model which is being loaded may have, by what its files hold; None if it is not loaded from files."""


@contextmanager
def _no_endless_model(name: str) -> Iterator[None]:
    """Stop the making of a model with more layers than any has."""
    count = 0

    def check(module: nn.Module, entry: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > _MOST_PARAMETERS:
            raise ValueError(f"config.json asks for a {name} of more than {_MOST_PARAMETERS:,} parameter tensors")

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _read_as_stock(config: PreTrainedConfig, stock: type[transformers.PreTrainedModel]) -> Iterator[None]:
    """Let a config be a stock one inside, for a class that is not of transformers.

    It may ask an auto class for the model inside it, which has no recipe of its own.
    """
    pruned: Any = type(config)
    if not is_of_transformers(stock):
        config.__class__ = pruned.stock_class
    try:
        yield
    finally:
        config.__class__ = pruned


class _PrunedModel:
    """Mixed into a stock model: builds the stock skeleton, then gives it the shapes of its config's recipe."""

    stock_class: type[transformers.PreTrainedModel]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        check_recipe(config.hf_sparse, config.to_dict())
        with _sizes_of_the_skeleton(config):
            with _no_endless_model(type(self).__name__), _read_as_stock(config, self.stock_class):
                super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
            resize_(self.base_model, config.hf_sparse)  # type: ignore[attr-defined]
        size, room = sum(parameter.numel() for parameter in self.parameters()), _room.get()  # type: ignore[attr-defined]
        if room is not None and size > room:
            raise ValueError(f"config.json asks for a model of {size:,} values, more than its weight files can fill")

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as the stock class does, but only from safetensors, and strictly: missing weights are never made up.

        Raises:
            OSError: there are no weights as safetensors.
            ValueError: they are damaged, or do not fit the config.
        """
        kwargs["use_safetensors"] = True
        # Differences are reported below; stock's error refers to a report that may not be shown.
        may_differ, kwargs["ignore_mismatched_sizes"] = kwargs.get("ignore_mismatched_sizes", False), True
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        # New heads are small; packed weights hold several values in one.
        before = _room.set(None if source is None else 8 * _values_in_files(source, kwargs) + 2**24)
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        finally:
            _room.reset(before)
        if info["mismatched_keys"] and not may_differ:
            raise ValueError(
                f"the weights of {source} do not fit its config: {differing(info)}. If a new head is to take the place "
                "of the one in it, give ignore_mismatched_sizes=True"
            )
        if source is not None:
            _require_whole(model, info, str(source))
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as the stock class does, with the present architecture: it may have got another head since pruning."""
        # Tensors keep the names they have here: stock ones of older times are not read by pruned model types.
        self._weight_conversions: list[Any] = []
        config: Any = self.config  # type: ignore[attr-defined]
        config.base_architecture = self.stock_class.__name__
        config.auto_map = auto_map(self.stock_class, config.base_model_type)
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Start continuous batching as the stock class does, if all layers have all of their heads.

        Raises:
            ValueError: heads were removed, and there is one paged cache for all layers, with all heads.
        """
        config: Any = self.config  # type: ignore[attr-defined]
        if any(layer["kind"] == "attention" and layer["kept"] < layer["units"] for layer in config.hf_sparse["layers"]):
            raise ValueError(
                "continuous batching has one cache for all layers, but hf_sparse has left them different numbers of "
                "heads: use generate(), which has one for each"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _get_name(self) -> str:
        """Return the name of the stock class, by which Trainer knows for which models labels are shifted."""
        return self.stock_class.__name__

    # Stock looks into the source of the file that a class is in.

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(cls.stock_class._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls.stock_class._can_set_experts_implementation())

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: the modules are transformers' own, so weights that no file has are made as in their classes."""
        return False


_HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


def _values_in_files(source: str | os.PathLike[str], options: dict[str, Any]) -> int:
    """Count the values of a checkpoint's weights, from the headers of its files."""
    from transformers.modeling_utils import load_state_dict

    hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
    variant = f".{options['variant']}" if options.get("variant") else ""
    try:
        files = [cached_file(source, f"model{variant}.safetensors", **hub)]
    except OSError:
        try:
            index = cached_file(source, f"model.safetensors.index{variant}.json", **hub)
        except OSError as error:
            raise OSError(f"{source} has no weights as safetensors, and other formats are not read: {error}") from None
        files = [cached_file(source, name, **hub) for name in shards(index)]
    total = 0
    for file in filter(None, files):
        try:
            for tensor in load_state_dict(file, map_location="meta").values():
                total += tensor.numel()
        except Exception as error:  # safetensors has a class of its own for them
            raise ValueError(f"{file} is damaged, get it again: {error}") from None
    return total


def shards(index: Any) -> list[str]:
    """Read the names of the files in an index of weights."""
    try:
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of weights: {error!r}") from None
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise ValueError(f"{index} names files that are not safetensors beside it")
    return names


def differing(info: dict[str, Any]) -> str:
    """Describe the tensors that a model has in other sizes than its files, from what `from_pretrained` reports."""
    found = sorted((str(name), list(has), list(wanted)) for name, has, wanted in info["mismatched_keys"])
    some = ", ".join(f"{name} has {has} for {wanted}" for name, has, wanted in found[:3])
    return some + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _require_whole(model: Any, info: dict[str, Any], source: str) -> None:
    """Refuse weights that lack what the architecture they were saved from has, or have more than that."""
    lacking, extra = {str(name) for name in info["missing_keys"]}, {str(name) for name in info["unexpected_keys"]}
    if not lacking and not extra:
        return
    architecture, whole = model.config.base_architecture, model
    if architecture != model.stock_class.__name__:
        saved: Any = getattr(transformers, str(architecture), None)
        if not isinstance(saved, type) or not issubclass(saved, transformers.PreTrainedModel):
            raise ValueError(
                f"{source} holds a {architecture!r}, which is not a class of transformers: give its class to "
                "load_pruned(path, CLASS) of hf_sparse"
            )
        if not isinstance(model, saved):
            with torch.device("meta"):
                whole = model_class(saved, model.config.base_model_type)(copy.deepcopy(model.config))
    prefix = f"{model.base_model_prefix}."
    own = {name.removeprefix(prefix) for name in whole.state_dict()}
    lacking = {name for name in lacking if name.removeprefix(prefix) in own}
    extra = {name for name in extra if name.removeprefix(prefix) not in own}
    tied = set(whole._tied_weights_keys or ())
    if lacking and lacking <= tied and not extra and not model.config.get_text_config().tie_word_embeddings:
        raise ValueError(
            f"the weights of {source} have {', '.join(sorted(lacking))} as the same tensor as the embeddings: load it "
            "with tie_word_embeddings=True, and untie them afterwards"
        )
    for problem, names in (("lack", lacking), ("have, against its config,", extra)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
            raise ValueError(
                f"the weights of {source} {problem} {len(names)} tensors: {some}. Get the checkpoint again"
            )


_configs: dict[tuple[type[PreTrainedConfig], str], type[PreTrainedConfig]] = {}
_models: dict[tuple[type[transformers.PreTrainedModel], str], type[transformers.PreTrainedModel]] = {}


def is_of_transformers(stock: type) -> bool:
    """Tell whether a class is one of transformers' own, so that it can be found by its name."""
    return getattr(transformers, stock.__name__, None) is stock


def _pruned_name(stock: type, own_type: str, model_type: str) -> str:
    """Name of a pruned class; model types that borrow another's class show in it."""
    return CLASS_PREFIX + stock.__name__ + ("" if own_type == model_type else f"__{model_type}")


def config_class(model_type: str, stock: type[PreTrainedConfig] | None = None) -> type[PreTrainedConfig]:
    """Return the config class of pruned models of a model type, made and registered at the first call.

    Args:
        model_type: such as "bert".
        stock: the config class before pruning; by default that of transformers. Other classes are not registered.

    Raises:
        ValueError: transformers has no such model type.
    """
    if stock is None and model_type not in CONFIG_MAPPING_NAMES:
        raise ValueError(f"transformers {transformers.__version__} has no model type {model_type!r}")
    kind: Any = stock or CONFIG_MAPPING[model_type]
    if (kind, model_type) not in _configs:
        name = _pruned_name(kind, kind.model_type, model_type)
        body = {"model_type": MODEL_TYPE_PREFIX + model_type, "stock_class": kind, "_auto_class": None}
        if stock is not None:  # transformers would make another one
            body["__init__"] = stock.__init__
        made: Any = type(name, (_PrunedConfig, kind), {**body, "__module__": __name__, "__qualname__": name})
        _configs[kind, model_type] = made
        if stock is None:
            made.register_for_auto_class("AutoConfig")
            for auto_name, names in auto_classes():
                if model_type in names:
                    model = model_class(getattr(transformers, architectures(names[model_type])[0]), model_type)
                    getattr(transformers, auto_name).register(made, model, exist_ok=True)
    return _configs[kind, model_type]


def _register_architectures(references: Any, config: Any) -> None:
    """Let the auto classes that a checkpoint names load its architecture, where they would not load the stock one."""
    for auto_name, _ in auto_classes():
        reference = references.get(auto_name) if isinstance(references, dict) else None
        name = reference.rpartition(".")[2] if isinstance(reference, str) else ""
        try:
            model = __getattr__(name)
        except (AttributeError, ValueError):
            continue  # not a name of ours
        auto: Any = getattr(transformers, auto_name)
        known = auto._model_mapping.get(config, ())
        known = known if isinstance(known, tuple) else (known,)
        if model.config_class is config and model not in known:
            # Of several, transformers takes the one that is among the config's architectures.
            auto.register(config, (*known, model), exist_ok=True)


def auto_classes() -> list[tuple[str, dict[str, Any]]]:
    """List (name of an auto class, its stock classes by model type) for each auto class that loads models."""
    names = [name for name in modeling_auto.__all__ if name.startswith("AutoModel")]
    # Its classes are those of other auto classes too, under which users look for them first.
    names.sort(key=lambda name: name == "AutoModelForPreTraining")
    autos = [(name, getattr(modeling_auto, name)._model_mapping) for name in names]
    return [(name, mapping._model_mapping) for name, mapping in autos if mapping is not None]


def architectures(found: Any) -> tuple[str, ...]:
    """Return the names in an entry of an auto class, which has one or several."""
    return (found,) if isinstance(found, str) else tuple(found)


def model_class(stock: type[transformers.PreTrainedModel], model_type: str) -> type[transformers.PreTrainedModel]:
    """Return the class of pruned models of an architecture, made at the first call.

    Args:
        stock: a class of transformers, or one that is derived from PreTrainedModel and makes a model from its config.
        model_type: of its config.

    Raises:
        ValueError: transformers has no such model type, and the class has no config of it.
    """
    if (stock, model_type) not in _models:
        known = is_of_transformers(stock)
        config = config_class(model_type, None if known else _config_class_of(stock, model_type))
        own_type = model_type if stock.config_class is None else stock.config_class.model_type
        name = _pruned_name(stock, own_type, model_type)
        body = {"config_class": config, "stock_class": stock, "_auto_class": None}
        made: Any = type(name, (_PrunedModel, stock), {**body, "__module__": __name__, "__qualname__": name})
        if known:
            made.register_for_auto_class(_auto_names(stock.__name__)[0])
        _models.setdefault((stock, model_type), made)
    return _models[stock, model_type]


def _config_class_of(stock: type[transformers.PreTrainedModel], model_type: str) -> type[PreTrainedConfig] | None:
    """The config class of a model class that is not of transformers; None if its config is one of transformers."""
    kind: Any = stock.config_class
    return None if kind is None or is_of_transformers(kind) or kind.model_type != model_type else kind


def _auto_names(architecture: str) -> list[str]:
    """The auto classes that load an architecture; `AutoModel` for one that none of them does."""
    names = [
        auto_name
        for auto_name, types in auto_classes()
        if any(architecture in architectures(found) for found in types.values())
    ]
    return names or ["AutoModel"]


def auto_map(stock: type[transformers.PreTrainedModel], model_type: str) -> dict[str, str]:
    """Make the `auto_map` of a checkpoint: the pruned class of an architecture under every auto class that loads it.

    Classes that are not of transformers are left out: this file could not make them from their names.
    """
    model: Any = model_class(stock, model_type)
    names = {"AutoConfig": model.config_class.__name__} if is_of_transformers(model.config_class.stock_class) else {}
    if is_of_transformers(stock):
        names.update(dict.fromkeys(_auto_names(stock.__name__), model.__name__))
    return {auto_name: f"modeling_hf_sparse.{name}" for auto_name, name in names.items()}


class _ConfigLoader:
    """Registered for each pruned model type; makes the real classes when a config of that type is first read.

    Not a config itself: making one of those for every model type would slow down the import.
    """

    model_type: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config of the pruned model type, of a class that is derived from the stock config class."""
        return config_class(cls.model_type.removeprefix(MODEL_TYPE_PREFIX)).from_dict(config_dict, **kwargs)


def register() -> None:
    """Register the pruned model types with `AutoConfig`, and through it with every `AutoModelForX`."""
    for model_type in CONFIG_MAPPING_NAMES:
        pruned = MODEL_TYPE_PREFIX + model_type
        loader: Any = type(f"{CLASS_PREFIX}ConfigLoader", (_ConfigLoader,), {"model_type": pruned})
        AutoConfig.register(pruned, loader, exist_ok=True)


def __getattr__(name: str) -> Any:
    """Make pruned classes by their names, for `auto_map` in checkpoints, where only this file is at hand."""
    if name.startswith(CLASS_PREFIX):
        stock_name, _, model_type = name.removeprefix(CLASS_PREFIX).partition("__")
        stock: Any = getattr(transformers, stock_name, None)
        if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
            return config_class(model_type or stock.model_type)
        if isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel):
            own: Any = stock.config_class
            return model_class(stock, model_type or own.model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
