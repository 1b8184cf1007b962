"""Find, by gradients, the neurons of experts whose weights are stacked in tensors of three dimensions."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_sparse.structure.comparison import tensors
from hf_sparse.structure.dependencies import Call, Reach, with_same_parameters
from hf_sparse.structure.ownership import CoupledError, Ownership, OwnerTables, owners_by_bits


def stacked_weights(module: nn.Module) -> list[str]:
    """Name a module's own parameters of three dimensions, experts first; none unless there are several."""
    names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
    counts = {module.get_parameter(name).shape[0] for name in names}
    return names if len(names) > 1 and len(counts) == 1 and counts != {1} else []


def expert_neurons(module: nn.Module, call: Call) -> tuple[str, int, Ownership] | None:
    """Find what the neurons of experts own; the neurons with one index in all experts are one unit.

    With some inputs of the down projections masked, the gradient of the output is exactly zero for what only feeds
    those.

    Returns:
        The name of the down projections' weight, the dimension of its inputs, and what each neuron owns in the
        other parameters, as entries by name. None if no weight has inputs with one owner each: these are no experts,
        or their neurons cannot be told apart.
    """
    # Some modules keep a state of their latest call.
    module = with_same_parameters(module)
    names = stacked_weights(module)
    # The narrowest comes first, since a gated FFN's up projection has two outputs per neuron, which would seem units
    # of their own; the last declared among equals, for down comes after up.
    sides = [(module.get_parameter(name).shape[dim], -i, name, dim) for i, name in enumerate(names) for dim in (1, 2)]
    for columns, _, name, dim in sorted(sides):
        entries = _owned_by_inputs(module, call, name, dim, columns)
        if entries is not None:
            return name, dim, Ownership(torch.arange(columns).view(-1, 1), {}, entries)
    return None


def _owned_by_inputs(
    module: nn.Module, call: Call, name: str, dim: int, columns: int
) -> dict[str, tuple[int, Tensor]] | None:
    others = [other for other, _ in module.named_parameters(recurse=False) if other != name]

    def reach(some: Tensor) -> Reach:
        weight = module.get_parameter(name).detach()
        # Neurons that an earlier round kept only to round up a number weigh zero, but are neurons like any other.
        weight = torch.where(weight == 0, weight.abs().mean(), weight)
        mask = torch.zeros(columns, dtype=weight.dtype, device=weight.device)
        mask[some.to(mask.device)] = 1.0
        mask = mask.view([-1 if d == dim else 1 for d in range(3)])
        parameters = {other: module.get_parameter(other).detach().requires_grad_() for other in others}
        with torch.enable_grad():
            output: Any = functional_call(module, {**parameters, name: weight * mask}, call.args, dict(call.kwargs))
            total = torch.stack([(tensor * _noise(tensor)).sum() for tensor in tensors(output).values()]).sum()
            slopes = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        return {
            other: torch.zeros(parameters[other].shape, dtype=torch.bool) if slope is None else (slope != 0).cpu()
            for other, slope in zip(others, slopes)
        }

    # Half of the columns show at once whether this can be the side of the neurons at all.
    tables: OwnerTables = owners_by_bits(2, lambda some: reach(torch.arange(columns)[some[0] :: 2]))
    if not any(_halved(tables, other, columns) for other in stacked_weights(module) if other != name):
        return None
    tables = owners_by_bits(columns, reach)
    entries = {}
    for other in others:
        try:
            owned = tables.owned(other, columns)
        except CoupledError:
            if other in stacked_weights(module):
                return None
            owned = None  # a bias of the outputs
        if owned is not None:
            entries[other] = owned
    return entries if any(other in entries for other in stacked_weights(module)) else None


def _halved(tables: OwnerTables, name: str, columns: int) -> bool:
    return any(
        math.gcd(len(table.owner), columns) == columns and not table.several.any() and table.reached.all()
        for (found, _), table in tables.tables.items()
        if found == name
    )


def _noise(tensor: Tensor) -> Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
