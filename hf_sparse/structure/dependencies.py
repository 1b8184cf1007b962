"""Find out, by autograd, which outputs of projections feed which columns of other projections.

In one forward, the output of every projection is replaced by noise that gradients are taken for. What reaches the
input of a projection is then a function of the projections just before it, so every graph is local to one block; the
gradient of some of its columns is exactly zero for the channels that do not feed them. Noise of unit size keeps
softmaxes away from saturation and ReLUs alive whatever the weights are.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.pytorch_utils import Conv1D

from hf_sparse.modeling_hf_sparse import padded_side
from hf_sparse.runtime.contexts import hooked

FORWARD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What the forward of a model raises when sizes in it do not fit."""

_LARGEST_TABLE = 1 << 24  # parameters with more entries are vocabularies, not something that belongs to heads


def input_dim(projection: nn.Module) -> int:
    """Return the dimension of the inputs in the weight of a projection; the other dimension is that of the outputs."""
    return 0 if isinstance(projection, Conv1D) else 1


def widths(projection: nn.Module) -> tuple[int, int]:
    """Return the numbers of (inputs, outputs) of a projection."""
    dim, weight = input_dim(projection), projection._parameters["weight"]
    assert weight is not None
    return weight.shape[dim], weight.shape[1 - dim]


def _channel_dim(projection: nn.Module) -> int:
    return 1 if isinstance(projection, nn.Conv1d | nn.Conv2d) else -1


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change every entry of some arguments, in the same tuples, lists and dicts."""
    if type(value) in (tuple, list):
        return type(value)(mapped(one, change) for one in value)
    if type(value) is dict:
        return {key: mapped(one, change) for key, one in value.items()}
    return change(value)


def fresh(value: Any) -> Any:
    """Copy the caches among some arguments, since a forward writes into them."""
    return mapped(value, lambda one: copy.deepcopy(one) if isinstance(one, Cache) else one)


def with_same_parameters(module: nn.Module) -> nn.Module:
    """Copy a module; the copy shares its parameters.

    As `copy.deepcopy` makes it, in a fraction of the time: most of a module are empty tables of hooks.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    plain = [part for part in module.modules() if not hasattr(type(part), "__deepcopy__")]
    memo |= {id(part): type(part).__new__(type(part)) for part in plain}
    for part in plain:
        for name, value in vars(part).items():
            is_empty = type(value) in (dict, OrderedDict, set) and not value
            vars(memo[id(part)])[name] = type(value)() if is_empty else copy.deepcopy(value, memo)
    return copy.deepcopy(module, memo)


def cached_layers(*values: Any) -> dict[tuple[bool, int], Any] | None:
    """Find the layers that hold positions in the cache among some arguments; None if there is no cache.

    By (whether it is of cross attention, index of the layer).
    """
    caches: list[Cache] = []
    mapped(list(values), lambda one: caches.append(one) if isinstance(one, Cache) else None)
    if not caches:
        return None
    parts = [caches[0]]
    if isinstance(caches[0], EncoderDecoderCache):
        parts = [caches[0].self_attention_cache, caches[0].cross_attention_cache]
    return {
        (bool(cross), i): layer
        for cross, cache in enumerate(parts)
        for i, layer in enumerate(cache.layers)
        if isinstance(layer, CacheLayerMixin) and layer.get_seq_length()
    }


def cached_positions(*values: Any) -> dict[tuple[bool, int], int] | None:
    """Count the positions that each layer of the cache among some arguments holds, see `cached_layers`."""
    layers = cached_layers(*values)
    return None if layers is None else {place: int(layer.get_seq_length()) for place, layer in layers.items()}


@dataclass(frozen=True)
class Call:
    """The first call of a module in a forward: its arguments and what it returned.

    Attributes:
        args: by position.
        kwargs: by name.
        output: what it returned.
        saw_cache: whether a cache was among the arguments.
        written: the kv heads of the layers of that cache that it has made longer in all of its calls, by layer; see
            `cached_layers`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    saw_cache: bool = False
    written: Mapping[tuple[bool, int], int] = field(default_factory=dict)


def accepted(model: nn.Module, *flags: str) -> dict[str, bool]:
    """Set those of some flags that the forward of a model takes."""
    parameters = inspect.signature(type(model).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {flag: True for flag in flags if takes_any or flag in parameters}


@contextmanager
def leaving_no_hooks(model: nn.Module) -> Iterator[None]:
    """Remove the hooks that transformers puts on a model when it is first asked for more outputs, and its mark."""
    note = "_output_capturing_hooks_installed"
    before = [(module, set(module._forward_hooks), note in vars(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, hooks, noted in before:
            for key in module._forward_hooks.keys() - hooks:
                del module._forward_hooks[key]
            if not noted:
                vars(module).pop(note, None)


@torch.no_grad()
def record_calls(
    model: PreTrainedModel, inputs: Mapping[str, Any], paths: Container[str] | None = None
) -> dict[str, Call]:
    """Record the first call of every module, or of those at some paths, in a forward of the model, by path."""
    calls: dict[str, Call] = {}
    started: dict[str, tuple[tuple[Any, ...], Mapping[str, Any]]] = {}
    cached: dict[str, dict[tuple[bool, int], int] | None] = {}

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cached[path] = cached_positions(args, kwargs)
            if path not in started:
                started[path] = fresh(args), fresh(dict(kwargs))

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            old, new = cached[path], cached_layers(args, kwargs) or {}
            changed = [place for place, layer in new.items() if (old or {}).get(place) != layer.get_seq_length()]
            written = {place: new[place].keys.shape[1] for place in changed}
            if path not in calls:
                # What a projection returns is a residual that later layers may add to in place.
                output = output.clone() if isinstance(output, Tensor) else output
                calls[path] = Call(*started[path], output, old is not None, written)
            elif written:
                calls[path] = replace(calls[path], written={**calls[path].written, **written})

        return hook

    handles = []
    for path, module in model.named_modules():
        if paths is None or path in paths:
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after(path), with_kwargs=True))
    with hooked(handles):
        model(**inputs)
    return calls


@torch.no_grad()
def called_modules(model: PreTrainedModel, inputs: Mapping[str, Any]) -> set[str]:
    """Run a forward of the model and return the paths of the modules that it called."""
    called: set[str] = set()
    with hooked(
        [
            module.register_forward_pre_hook(lambda module, args, path=path: called.add(path))
            for path, module in model.named_modules()
        ]
    ):
        model(**inputs)
    return called


@torch.no_grad()
def projections(model: PreTrainedModel, inputs: Mapping[str, Any]) -> set[str]:
    """Find the paths of the modules that multiply with their weight and do nothing else.

    Subclasses of linear layers compute more, adapters and quantized ones for instance, unless what they returned
    shows that they don't. Convolutions count if they see one position at a time.
    """
    found = set()
    calls: dict[str, Call] | None = None
    for path, module in model.named_modules():
        forward: Any = type(module).forward
        if padded_side(module):
            linear = False
        elif isinstance(module, nn.Conv1d | nn.Conv2d) and forward in (nn.Conv1d.forward, nn.Conv2d.forward):
            linear = set(module.kernel_size) == {1} and set(module.stride) == {1} and module.groups == 1
        elif forward in (nn.Linear.forward, Conv1D.forward):
            linear = True
        elif isinstance(module, nn.Linear):
            calls = record_calls(model, inputs) if calls is None else calls
            linear = path in calls and _is_linear(module, calls[path])
        else:
            linear = False
        if linear:
            found.add(path)
    return found


def _is_linear(module: nn.Linear, call: Call) -> bool:
    given = (*call.args, *call.kwargs.values())
    if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].dtype != module.weight.dtype:
        return False
    if given[0].shape[-1:] != module.weight.shape[1:] or not isinstance(call.output, Tensor):
        return False
    expected = nn.functional.linear(given[0], module.weight, module.bias)
    return expected.shape == call.output.shape and torch.allclose(expected, call.output, 1e-2, 1e-3)


Reach = dict[str, Tensor]
"""By path of a projection the channels of its output, shape (outputs,), and by name of any other parameter its
entries, in its own shape, that some columns depend on; all boolean."""


@dataclass
class Probe:
    """The graphs from the outputs of projections to the inputs of the next projections.

    Attributes:
        inputs: what every projection was given at its first call.
        channels: by projection, the dimension of its inputs and outputs that the channels run along.
        leaves: the noise that took the place of every projection's outputs, one tensor per call.
        parameters: the parameters of other modules.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, int] = field(default_factory=dict)
    leaves: dict[str, list[Tensor]] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    _sources: dict[str, list[str]] = field(default_factory=dict)

    def sources(self, path: str) -> list[str]:
        """Find the projections and parameters that the input of a projection depends on."""
        if path not in self._sources:
            self._sources[path] = [*self.leaves, *self.parameters]
            if self.inputs[path].grad_fn is None:
                self._sources[path] = []
            else:
                self._sources[path] = [name for name, mask in self.reach(path).items() if mask.any()]
        return self._sources[path]

    def reach(self, path: str, columns: Tensor | None = None) -> Reach:
        """Find what some columns (all by default) of a projection's input depend on."""
        reached: Reach = {}
        for name, tensor, slope in self._slopes(path, columns):
            if slope is None:
                hit = torch.zeros(tensor.shape[-1:] if name in self.leaves else tensor.shape, dtype=torch.bool)
            else:
                hit = (slope != 0).cpu()
                hit = hit.flatten(0, -2).any(0) if name in self.leaves else hit
            reached[name] = reached[name] | hit if name in reached else hit
        return reached

    def slopes(self, path: str, column: int, name: str) -> Tensor:
        """Compute the gradient of one column of a projection's input for another's outputs, shape (..., outputs)."""
        found = ((tensor, slope) for one, tensor, slope in self._slopes(path, torch.tensor([column])) if one == name)
        tensor, slope = next(found)
        return torch.zeros_like(tensor) if slope is None else slope

    def _slopes(self, path: str, columns: Tensor | None) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """The name and values of every source, channels last, and their gradients; None for those out of reach."""
        given, dim = self.inputs[path], self.channels[path]
        columns = torch.arange(given.shape[dim]) if columns is None else columns
        # The same for all columns, so that theirs can be compared.
        weight = torch.randn(given.select(dim, 0).shape, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(given.shape[dim]).index_fill(0, columns, 1.0)
        weight = (weight.unsqueeze(-1) * mask).movedim(-1, dim).to(given)
        names = self._sources[path]
        wanted = [(name, tensor) for name in names for tensor in self.leaves.get(name, [])]
        wanted += [(name, self.parameters[name]) for name in names if name in self.parameters]
        slopes = torch.autograd.grad(given, [tensor for _, tensor in wanted], weight, True, allow_unused=True)
        for (name, tensor), slope in zip(wanted, slopes):
            if name in self.leaves:
                dim = self.channels[name]
                tensor, slope = tensor.movedim(dim, -1), None if slope is None else slope.movedim(dim, -1)
            yield name, tensor, slope

    def attends(self, path: str) -> bool:
        """Tell whether there is a softmax between a projection and the projections before it."""
        pending, seen = [self.inputs[path].grad_fn], set()
        while pending:
            node: Any = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if "Softmax" in node.name() or "ScaledDotProduct" in node.name():
                return True
            pending += [following for following, _ in node.next_functions]
        return False


def probe(model: PreTrainedModel, inputs: Mapping[str, Any], projections: set[str]) -> Probe:
    """Run the model once, with noise for the outputs of its projections unless it cannot run on noise.

    Parameters have to require gradients.
    """
    try:
        return _probe(model, inputs, projections, noise=True)
    except FORWARD_ERRORS:
        # Something in between reads indices or lengths off an output, which noise cannot be.
        return _probe(model, inputs, projections, noise=False)


def _probe(model: PreTrainedModel, inputs: Mapping[str, Any], projections: set[str], noise: bool) -> Probe:
    found = Probe()
    generator = torch.Generator().manual_seed(0)

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            found.inputs.setdefault(path, given)
            found.channels[path] = _channel_dim(module)

        return hook

    def after(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaf = torch.randn(output.shape, generator=generator).to(output) if noise else output.detach().clone()
            leaf.requires_grad_(True)
            found.leaves.setdefault(path, []).append(leaf)
            # Not the leaf itself: what follows may work in place.
            return leaf * 1.0

        return hook

    handles = []
    for path, module in model.named_modules():
        if path in projections:
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after(path)))
    vocabulary = {id(parameter) for parameter in _input_embeddings(model)}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in projections and id(parameter) not in vocabulary and parameter.numel() < _LARGEST_TABLE:
            found.parameters[name] = parameter
    with torch.enable_grad(), hooked(handles):
        model(**inputs)
    return found


def _input_embeddings(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            try:
                embeddings = module.get_input_embeddings()
            except NotImplementedError:
                continue
            if isinstance(embeddings, nn.Module):
                yield from embeddings.parameters()
