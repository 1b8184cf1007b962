"""Proof that a block can be sliced: its smaller form is built and compared with the masked one.

Sizes that the forward pass reads are found here too: the first set of them with which the two agree is taken.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_sparse.comparison import RELATIVE_TOLERANCE, largest_difference, tensors
from hf_sparse.families import AMBIGUOUS_WIDTHS, HEAD_COUNTS, HEAD_WIDTHS, NEURON_COUNTS
from hf_sparse.modeling_hf_sparse import resize_
from hf_sparse.ownership import CoupledError
from hf_sparse.probing import FORWARD_ERRORS, Call, fresh, is_projection
from hf_sparse.slicing import common_path, rebased, shrink
from hf_sparse.structure import Attribute, Block


def prove(model: PreTrainedModel, block: Block, calls: Mapping[str, Call]) -> Block:
    """The block with all that its slicing needs, tried on what the model's modules were called with.

    Raises:
        CoupledError: no smaller form computes what the masked block does.
    """
    modules = dict(model.named_modules())
    scope = _scope(modules, block, calls)
    trial = _Trial(modules[scope], scope, calls[scope])
    reasons = []
    for attempt in _attempts(modules, block, calls):
        reason = next(filter(None, (trial.fails(attempt, kept) for kept in _choices(attempt.units))), None)
        if reason is None:
            block = attempt
            break
        reasons.append(reason)
    else:
        raise CoupledError(reasons[0])
    stand_in = _stand_in(block, calls)
    removed = replace(block, stand_in=stand_in)
    if trial.fails(removed, torch.tensor([], dtype=torch.long)) is None:
        return removed
    if block.units == 1:
        raise CoupledError("nothing can take the place of its only unit")
    return block


def _scope(modules: Mapping[str, nn.Module], block: Block, calls: Mapping[str, Call]) -> str:
    """The smallest module around all that changes, as far as it was called by itself."""
    paths = [block.name.rpartition(".")[0], block.output, *(part.parameter for part in block.slices)]
    scope = common_path(paths)
    while scope and scope not in calls:
        scope = scope.rpartition(".")[0]
    return scope


def _choices(units: int) -> Iterator[Tensor]:
    """Units to keep: about half of them in no order, and the last one alone."""
    if units > 1:
        some = torch.rand(units, generator=torch.Generator().manual_seed(0)) < 0.5
        some[0], some[-1] = False, True
        yield some.nonzero().flatten()
        yield torch.tensor([units - 1])


class _Trial:
    """Masked and smaller forms of one module, in float32, on the arguments that it was called with."""

    def __init__(self, module: nn.Module, path: str, call: Call) -> None:
        # The copy shares the parameters, since only a few are replaced.
        memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
        self.module = copy.deepcopy(module, memo)
        if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
            self.module = copy.deepcopy(module).float()
        self.path = path
        self.prefix = f"{path}." if path else ""
        self.args, self.kwargs = _in_float32(call.args), _in_float32(dict(call.kwargs))

    @torch.no_grad()
    def fails(self, block: Block, kept: Tensor) -> str | None:
        """Why the block cannot keep just these units; None if it can."""
        parameters = {self.prefix + name: parameter for name, parameter in self.module.named_parameters()}
        mask = torch.zeros(block.units).index_fill(0, kept, 1.0)
        weight = parameters[block.weight.parameter]
        masked = weight * block.column_scale(mask.to(weight), weight.ndim)
        name = block.weight.parameter.removeprefix(self.prefix)
        reference = tensors(functional_call(self.module, {name: masked}, fresh(self.args), fresh(self.kwargs)))
        memo: dict[int, Any] = {id(parameter): parameter for parameter in self.module.parameters()}
        smaller = copy.deepcopy(self.module, memo)
        try:
            gates = {block.name: torch.ones(block.units)}
            recipe, values = shrink(parameters, [block], {block.name: kept}, gates)
            resize_(smaller, rebased(recipe, self.path))
            for name, value in values.items():
                owner, _, parameter = name.removeprefix(self.prefix).rpartition(".")
                smaller.get_submodule(owner)._parameters[parameter] = nn.Parameter(value, requires_grad=False)
            outputs = tensors(smaller(*fresh(self.args), **fresh(self.kwargs)))
        except FORWARD_ERRORS as error:
            return f"its smaller form fails with {str(error).splitlines()[0] if str(error) else type(error).__name__!r}"
        # Attention weights differ in shape for a good reason; what goes on to the next layer does not.
        pairs = [(one, other) for one, other in zip(reference, outputs) if one.shape == other.shape]
        if not pairs or reference[0].shape != outputs[0].shape:
            return "its smaller form returns another shape"
        difference, scale = largest_difference(*zip(*pairs))
        if not difference <= RELATIVE_TOLERANCE * max(scale, 1e-3):
            return f"its smaller form differs by {difference:.3g} from the masked one (outputs up to {scale:.3g})"
        return None


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_in_float32(one) for one in value) if type(value) in (tuple, list) else value
    if type(value) is dict:
        return {key: _in_float32(one) for key, one in value.items()}
    return value


# ---- Sizes that modules keep as integers ----


def _attempts(modules: Mapping[str, nn.Module], block: Block, calls: Mapping[str, Call]) -> Iterator[Block]:
    """The block with each set of sizes that may have to follow it, the likeliest first."""
    seen = []
    holders = _holders(modules, block)
    if block.kind == "attention":
        counts = list(_head_counts(block, holders, ""))
        widths = list(_widths(block, holders, HEAD_WIDTHS))
        ambiguous = list(_widths(block, holders, AMBIGUOUS_WIDTHS))
        config = list(_head_counts(block, holders, "config."))
        plans = [counts + widths, counts + widths + ambiguous, counts, counts + widths + config]
        plans += [counts + widths + ambiguous + config, config, []]
    else:
        plans = [[], list(_neuron_counts(block, holders))]
    for attributes in plans:
        if attributes not in seen:
            seen.append(attributes)
            yield replace(block, attributes=tuple(attributes))


def _holders(modules: Mapping[str, nn.Module], block: Block) -> dict[str, nn.Module]:
    """The modules around the block's projections, and those beside them without parameters of their own."""
    owners = [part.parameter.rpartition(".")[0] for part in block.slices]
    home = common_path([block.output, *owners])
    holders = {}
    for path, module in modules.items():
        if not f"{path}.".startswith(f"{home}.") or (is_projection(module) and path in owners):
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


def _stand_in(block: Block, calls: Mapping[str, Call]) -> dict[str, Any]:
    """A record of `modeling_hf_sparse`."""
    returned = calls[block.name].output if block.name in calls else None
    return {
        "kind": block.kind,
        "output": block.output,
        "outputs": len(returned) if isinstance(returned, tuple) else 0,
        # The cache entry of attention without heads is one head wide; see RemovedAttention.
        "cache": [1, block.head_dim] if block.kind == "attention" else None,
    }
