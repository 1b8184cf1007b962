"""Exchange and broadcast the tensors of a model, and remove the hooks of an engine."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sparse.gates.base import attached_gates
from hf_sparse.runtime.processes import broadcast_, is_main
from hf_sparse.runtime.streaming import HOST

META = torch.device("meta")
"""Where parameters are that have no values, on all processes but the main one."""


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A parameter or buffer on a device, with any values if it has none."""
    there = torch.empty_like(tensor, device=device) if tensor.device == META else tensor.detach().to(device)
    return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there


def exchange_(model: nn.Module, others: Mapping[int, Tensor]) -> None:
    """Put other parameters and buffers in the place of those that a model has, by their ids; tied ones stay tied."""
    for module in model.modules():
        for kind in ("_parameters", "_buffers"):
            # In new tables: the old ones may be of an engine's own kind, or wanted again.
            table: dict[str, Any] = vars(module)[kind]
            vars(module)[kind] = {name: others.get(id(tensor), tensor) for name, tensor in table.items()}


@torch.no_grad()
def spread_(model: nn.Module, device: torch.device) -> None:
    """Put a model that `gather_` has made whole, in place, on a device of every process."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    there = {id(tensor): on_device(tensor, device) for tensor in tensors}
    exchange_(model, there)
    broadcast_(there.values())


def unsharded(model: nn.Module) -> dict[int, Tensor]:
    """On the main process, in its host's memory, by their ids: buffers, and ignored parameters, all but the gates."""
    bank = attached_gates(model)
    gates = {id(tensor) for tensor in (() if bank is None else (*bank.parameters(), *bank.buffers()))}
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in gates]
    return {id(tensor): on_device(tensor, HOST) for tensor in tensors if is_main() and not isinstance(tensor, DTensor)}


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """On leaving this context the modules of a model have, in place, the classes, attributes and hooks of before."""
    states = [(module, type(module), vars(module).copy()) for module in model.modules()]
    hooks = [
        {name: dict(value) for name, value in state.items() if "_hooks" in name and isinstance(value, dict)}
        for *_, state in states
    ]
    try:
        yield
    finally:
        for (module, kind, state), tables in zip(states, hooks):
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
            for name, table in tables.items():
                state[name].clear()
                state[name].update(table)


def remove_hooks_(model: nn.Module, package: str) -> None:
    """Take all hooks off a model and its modules, in place, whose functions are of a package."""
    from torch.nn.modules.module import _WrappedHook

    def is_of_package(hook: Any) -> bool:
        function = hook.hook if isinstance(hook, _WrappedHook) else hook
        return callable(function) and str(function.__module__).startswith(package)

    for module in model.modules():
        tables = [table for name, table in vars(module).items() if "_hooks" in name and isinstance(table, dict)]
        theirs = {key for table in tables for key, hook in table.items() if is_of_package(hook)}
        for table in tables:
            for key in theirs & set(table):
                del table[key]
