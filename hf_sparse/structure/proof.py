"""Prove that a block can be sliced: build its smaller form and compare it with the masked one.

Sizes that the forward pass reads are found here too: the first set of them with which the two agree is taken.
"""

import copy
import inspect
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hf_sparse.modeling_hf_sparse import Removal, Selection, resize_
from hf_sparse.structure.attribute_names import (
    AMBIGUOUS_WIDTHS,
    HEAD_COUNTS,
    HEAD_WIDTHS,
    NEURON_COUNTS,
    POSITION_BIASES,
)
from hf_sparse.structure.blocks import Attribute, Block
from hf_sparse.structure.comparison import DOUBTFUL, RELATIVE_TOLERANCE, largest_difference, tensors
from hf_sparse.structure.dependencies import (
    FORWARD_ERRORS,
    Call,
    cached_layers,
    cached_positions,
    fresh,
    mapped,
    with_same_parameters,
)
from hf_sparse.structure.ownership import CoupledError
from hf_sparse.structure.slicing import common_path, rebased, shrink


def prove(modules: Mapping[str, nn.Module], block: Block, calls: Mapping[str, Call]) -> Block:
    """Complete a block with all that its slicing needs, tried on the recorded calls of the model's modules, by path.

    Raises:
        CoupledError: no smaller form computes what the masked block does.
    """
    trials: dict[str, _Trial] = {}
    reasons = []
    for attempt in _attempts(modules, block, calls):
        scope = scope_of(attempt, calls)
        if scope not in trials:
            trials[scope] = _Trial(modules[scope], scope, calls)
        reason = next(filter(None, (trials[scope].fails(attempt, kept) for kept in _choices(attempt.units))), None)
        if reason is None:
            break
        reasons.append(reason)
    else:
        raise CoupledError(reasons[0])
    call = calls.get(attempt.name)
    if call is not None and attempt.units > 1 and list(call.written.values()) == [attempt.units]:
        attempt = replace(attempt, cached=trials[scope].cached(attempt))
    removed = replace(attempt, stand_in=_stand_in(attempt, call))
    # A module that runs several times may write to another layer of the cache each time, by what it is told.
    always_alike = call is None or len(call.written) < 2
    if always_alike and trials[scope].fails(removed, torch.tensor([], dtype=torch.long)) is None:
        return removed
    if attempt.units == 1:
        raise CoupledError("nothing can take the place of its only unit")
    return attempt


def scope_of(block: Block, calls: Container[str]) -> str:
    """Find the smallest module around all that changes whose own call was recorded: its path is among `calls`."""
    paths = [block.name.rpartition(".")[0], block.output, *(part.parameter for part in block.slices)]
    scope = common_path(paths)
    while scope and scope not in calls:
        scope = scope.rpartition(".")[0]
    return scope


def smaller_form(module: nn.Module, path: str, blocks: Sequence[Block], kept: Mapping[str, Tensor]) -> nn.Module:
    """Copy a module so that blocks keep only some of their units; the copy shares the parameters that stay whole.

    Args:
        module: one that the blocks are in.
        path: of that module in the model, which the blocks' paths are relative to.
        blocks: which are to shrink.
        kept: ascending indices of the units that each of them keeps, by block name.
    """
    prefix = f"{path}." if path else ""
    parameters = {prefix + name: parameter for name, parameter in module.named_parameters()}
    recipe, values = shrink(parameters, blocks, kept, {block.name: torch.ones(block.units) for block in blocks})
    smaller = with_same_parameters(module)
    resize_(smaller, rebased(recipe, path))
    for name, value in values.items():
        owner, _, parameter = name.removeprefix(prefix).rpartition(".")
        smaller.get_submodule(owner)._parameters[parameter] = nn.Parameter(value, requires_grad=False)
    return smaller


def _choices(units: int) -> Iterator[Tensor]:
    """Units to keep: about half of them in no order, and the last one alone."""
    if units > 1:
        some = torch.rand(units, generator=torch.Generator().manual_seed(0)) < 0.5
        some[0], some[-1] = False, True
        yield some.nonzero().flatten()
        yield torch.tensor([units - 1])


class _Trial:
    """Masked and smaller forms of one module, in float32, on the arguments that it was called with."""

    def __init__(self, module: nn.Module, path: str, calls: Mapping[str, Call]) -> None:
        half = any(parameter.dtype != torch.float32 for parameter in module.parameters())
        self.module = copy.deepcopy(module).float() if half else with_same_parameters(module)
        self.path, self.prefix = path, f"{path}." if path else ""
        self.args, self.kwargs = (
            _floating(calls[path].args, torch.float32),
            _floating(dict(calls[path].kwargs), torch.float32),
        )
        self.needed = _handed_on(path, calls)
        self.doubled = False

    @torch.no_grad()
    def fails(self, block: Block, kept: Tensor) -> str | None:
        """Tell why the block cannot keep just these units; None if it can."""
        mask = torch.zeros(block.units).index_fill(0, kept, 1.0)
        name = block.weight.parameter.removeprefix(self.prefix)
        weight = self.module.get_parameter(name)
        masked = weight * block.column_scale(mask.to(weight), weight.ndim)
        try:
            args, kwargs = fresh(self.args), fresh(self.kwargs)
            reference = tensors(functional_call(self.module, {name: masked}, args, kwargs))
            positions = cached_positions(args, kwargs)
            smaller = smaller_form(self.module, self.path, [block], {block.name: kept})
            args, kwargs = fresh(self.args), fresh(self.kwargs)
            outputs = tensors(smaller(*args, **kwargs))
        except FORWARD_ERRORS as error:
            return f"its smaller form fails with {str(error).splitlines()[0] if str(error) else type(error).__name__!r}"
        if cached_positions(args, kwargs) != positions:
            return "its smaller form leaves other positions in the cache"
        for place in self.needed:
            if place not in outputs or outputs[place].shape != reference[place].shape:
                return "its smaller form returns another shape"
        # Others, such as attention weights, may differ in shape for a good reason, or by the heads that are removed.
        alike = {place for place in reference if place in outputs and outputs[place].shape == reference[place].shape}
        places = sorted(self.needed if block.padded else alike)
        difference, scale = largest_difference([reference[p] for p in places], [outputs[p] for p in places])
        relative = difference / max(scale, 1e-3)
        if relative <= RELATIVE_TOLERANCE:
            return None
        if (
            relative <= DOUBTFUL * RELATIVE_TOLERANCE
            and not self.doubled
            and self._in_float64().fails(block, kept) is None
        ):
            return None
        return f"its smaller form differs by {difference:.3g} from the masked one (outputs up to {scale:.3g})"

    @torch.no_grad()
    def cached(self, block: Block) -> tuple[bool, int] | None:
        """Find the layer of the cache that has a kv head for each unit, and in a smaller form only the kept ones."""
        kept = next(_choices(block.units))
        layers = []
        for module in (self.module, smaller_form(self.module, self.path, [block], {block.name: kept})):
            args, kwargs = fresh(self.args), fresh(self.kwargs)
            module(*args, **kwargs)
            layers.append(cached_layers(args, kwargs) or {})
        whole, small = ({place: layer.keys for place, layer in found.items()} for found in layers)
        places = [
            place
            for place, keys in small.items()
            if keys.shape != whole[place].shape and torch.allclose(keys, whole[place][:, kept], 1e-4, 1e-5)
        ]
        return places[0] if len(places) == 1 else None

    def _in_float64(self) -> "_Trial":
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module).double()
        twin.args, twin.kwargs = _floating(self.args, torch.float64), _floating(self.kwargs, torch.float64)
        twin.doubled = True
        return twin


def _handed_on(path: str, calls: Mapping[str, Call]) -> set[str]:
    """Find the outputs of a module that other modules need: the first, and those that become arguments of others.

    Of the whole model, all outputs are needed.
    """
    outputs = tensors(calls[path].output)
    if not path:
        return set(outputs)
    prefix = f"{path}."
    outside = (call for other, call in calls.items() if other != path and not other.startswith(prefix))
    used = {id(tensor) for call in outside for tensor in tensors([call.args, dict(call.kwargs)]).values()}
    return {place for i, (place, tensor) in enumerate(outputs.items()) if i == 0 or id(tensor) in used}


def _floating(value: Any, dtype: torch.dtype) -> Any:
    return mapped(value, lambda one: one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one)


# ---- Sizes that modules keep as integers ----


def _attempts(modules: Mapping[str, nn.Module], block: Block, calls: Mapping[str, Call]) -> Iterator[Block]:
    """Yield the block with each set of sizes that may have to shrink with it, the likeliest first."""
    forms = [block]
    if block.kind == "attention":
        forms += _with_selections(modules, block, calls)
    for form in forms:
        seen = []
        for attributes in _attribute_sets(form, _holders(modules, form)):
            if attributes not in seen:
                seen.append(attributes)
                yield replace(form, attributes=tuple(attributes))
    if block.kind == "attention":
        yield from _padded(modules, block)


def _padded(modules: Mapping[str, nn.Module], block: Block) -> Iterator[Block]:
    """Yield the block with smaller projections around attention that still computes all heads, some from zeros."""
    own = [part for part in block.slices if part.parameter.rpartition(".")[2] in ("weight", "bias")]
    slices = [part for part in own if isinstance(modules[part.parameter.rpartition(".")[0]], nn.Linear | Conv1D)]
    if slices and slices[0] == block.slices[0] and len(slices) > 1:
        yield replace(block, slices=tuple(slices), padded=True)


def _attribute_sets(block: Block, holders: Mapping[str, nn.Module]) -> list[list[Attribute]]:
    if block.kind != "attention":
        return [[], list(_neuron_counts(block, holders))]
    counts = list(_head_counts(block, holders, ""))
    widths = list(_widths(block, holders, HEAD_WIDTHS))
    ambiguous = list(_widths(block, holders, AMBIGUOUS_WIDTHS))
    config = list(_head_counts(block, holders, "config."))
    sets = [counts + widths, counts + widths + ambiguous, counts, counts + widths + config]
    return [*sets, counts + widths + ambiguous + config, config, []]


def _with_selections(modules: Mapping[str, nn.Module], block: Block, calls: Mapping[str, Call]) -> Iterator[Block]:
    """Yield the block with its heads picked from arguments that have an entry for each head."""
    count, module, path = block.units * block.heads_per_unit, modules[block.name], block.name
    # Tables elsewhere are for all layers and stay whole.
    inside = tuple(part for part in block.slices if part.parameter.startswith(f"{path}."))
    if "head_selections" in vars(module):
        earlier: list[Selection] = [
            cast(Selection, {key: entry for key, entry in one.items() if key != "runs"})
            for one in vars(module)["head_selections"]
        ]
        tables = {f"{path}.{bias.table}" for bias in POSITION_BIASES}
        slices = tuple(part for part in inside if part.parameter not in tables)
        yield replace(block, slices=slices, selections=tuple(earlier))
        return
    for bias in POSITION_BIASES:
        selection: Selection = {
            "argument": bias.argument,
            "dim": 1,
            "count": count,
            "index": list(range(count)),
            "method": None,
        }
        table = f"{path}.{bias.table}"
        if any(part.parameter == table for part in inside):
            slices = tuple(part for part in inside if part.parameter != table)
            yield replace(block, slices=slices, selections=({**selection, "method": bias.method},))
        elif bias.argument in inspect.signature(type(module).forward).parameters:
            yield replace(block, slices=inside, selections=(selection,))
    given = tuple(_arguments_by_head(module, calls[path], count)) if path in calls else ()
    if given and len(inside) > 1:
        yield replace(block, slices=inside, selections=given)


def _arguments_by_head(module: nn.Module, call: Call, count: int) -> Iterator[Selection]:
    """Find the arguments that have one entry per head, or per sequence and head."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    given = {**dict(zip(names, call.args)), **call.kwargs}
    for i, (name, value) in enumerate(given.items()):
        if i and isinstance(value, Tensor) and value.ndim > 2:
            dims = [dim for dim in (1, 0) if value.shape[dim] == count or (dim == 0 and value.shape[0] % count == 0)]
            if dims:
                yield {"argument": name, "dim": dims[0], "count": count, "index": list(range(count))}


def _holders(modules: Mapping[str, nn.Module], block: Block) -> dict[str, nn.Module]:
    """The modules around the block's projections, and those beside them without parameters of their own."""
    owners = [part.parameter.rpartition(".")[0] for part in block.slices]
    home = common_path([block.output, *owners])
    holders = {}
    for path, module in modules.items():
        if not f"{path}.".startswith(f"{home}.") or (path in owners and isinstance(module, nn.Linear | Conv1D)):
            continue
        around = any(f"{owner}.".startswith(f"{path}.") for owner in owners)
        if around or (block.kind == "attention" and not any(True for _ in module.parameters())):
            holders[path] = module
    return holders


def _integers(module: nn.Module, prefix: str) -> dict[str, int]:
    if not prefix:
        return {name: value for name, value in vars(module).items() if type(value) is int}
    config = vars(module).get("config")
    if config is None:
        return {}
    values = vars(config)
    values = values | {name: values.get(stored) for name, stored in config.attribute_map.items()}
    return {f"config.{name}": value for name, value in sorted(values.items()) if type(value) is int}


def _head_counts(block: Block, holders: Mapping[str, nn.Module], prefix: str) -> Iterator[Attribute]:
    query_heads = block.units * block.heads_per_unit
    for path, module in holders.items():
        for name, value in _integers(module, prefix).items():
            if not HEAD_COUNTS.match(name.removeprefix(prefix)):
                continue
            if value == query_heads:
                yield Attribute(path, name, block.heads_per_unit)
            elif value == block.units and not re.search("group|rep", name):
                yield Attribute(path, name, 1)


def _widths(block: Block, holders: Mapping[str, nn.Module], names: re.Pattern[str]) -> Iterator[Attribute]:
    """Integers that count channels of all heads: of the output projection's inputs, or of any projection's outputs."""
    amounts = [block.columns.shape[1]]
    amounts += [part.index.shape[1] for part in block.slices[1:]]
    for path, module in holders.items():
        for name, value in _integers(module, "").items():
            for amount in amounts:
                if names.match(name) and value == amount * block.units:
                    yield Attribute(path, name, amount)
                    break


def _neuron_counts(block: Block, holders: Mapping[str, nn.Module]) -> Iterator[Attribute]:
    amounts = {1} | {part.index.shape[1] for part in block.slices}
    for path, module in holders.items():
        for name, value in _integers(module, "").items():
            for amount in sorted(amounts):
                if NEURON_COUNTS.match(name) and value == amount * block.units:
                    yield Attribute(path, name, amount)


# ---- What takes the place of a block that lost everything ----


def _stand_in(block: Block, call: Call | None) -> Removal:
    """Make the record by which the stand-in of a block is made."""
    returned = call.output if call is not None and isinstance(call.output, tuple) else ()
    passed = {}
    if call is not None:
        names = {id(value): name for name, value in call.kwargs.items() if isinstance(value, Tensor)}
        passed = {str(i): names[id(value)] for i, value in enumerate(returned) if i and id(value) in names}
    record: Removal = {
        "kind": block.kind,
        "output": block.output,
        "outputs": len(returned),
        "passed": passed,
        # The cache entry of attention without heads is one head wide; see RemovedAttention.
        "cache": [1, block.head_dim] if block.kind == "attention" else None,
    }
    return with_own_entries(record, call)


def with_own_entries(stand_in: Removal, call: Call | None, asked: Call | None = None) -> Removal:
    """Add to a record of a stand-in what differs between otherwise equal layers, and between kinds of calls.

    Args:
        stand_in: of attention; any other is returned as it is.
        call: of the module that it stands in for, with a cache if the model has one.
        asked: of the same module when it was asked for attention weights.
    """
    record = stand_in.copy()
    if record["kind"] == "attention" and call is not None and call.saw_cache:
        record["cross"], record["index"] = next(iter(call.written), (False, None))
    if record["kind"] == "attention" and asked is not None and isinstance(asked.output, tuple):
        record["weights"] = _places_of_weights(asked)
    return record


def _places_of_weights(asked: Call) -> list[int]:
    """Where a tuple has attention weights, which are not handed on; None is left in their place by fused kernels."""
    given = {id(value) for value in (*asked.args, *asked.kwargs.values())}
    places = [
        i
        for i, value in enumerate(asked.output)
        if i and isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 3 and id(value) not in given
    ]
    return places or [i for i, value in enumerate(asked.output) if i and value is None][:1]
