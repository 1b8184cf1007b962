"""Run a model whose weights are in the host's memory on a device that need not have room for all of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from hf_sparse.runtime.contexts import hooked

HOST = torch.device("cpu")


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """Find the layers of a model: the modules that transformers never splits between devices, inner ones first."""
    names = set(model._no_split_modules or ())
    return [module for module in reversed(list(model.modules())) if type(module).__name__ in names]


def device_of(inputs: Mapping[str, Any]) -> torch.device:
    """Return the device of a batch; the host if it has no tensors."""
    return next((value.device for value in inputs.values() if isinstance(value, Tensor)), HOST)


@contextmanager
def streamed(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let a model run where its inputs are, if all of its parameters are in the host's memory.

    Each layer's weights are copied to the device while that layer runs; all other weights (such as embeddings) for the
    whole forward. Changes of the copies are brought back. A backward copies weights again when it needs them. A model
    whose class does not name its layers is copied as a whole.
    """
    device, homes = device_of(inputs), {parameter.device for parameter in model.parameters()}
    if isinstance(model, FSDPModule) or device == HOST or homes != {HOST}:
        yield
        return
    visit = _Visit(device)
    inside = layers(model)
    inner = {id(module) for layer in inside for module in layer.modules()}
    outside = [module for module in model.modules() if id(module) not in inner]
    handles: list[Any] = []
    for place, modules in [(model, outside), *((layer, list(layer.modules())) for layer in inside)]:
        handles.append(place.register_forward_pre_hook(visit.begin(place, modules), prepend=True))
        handles.append(place.register_forward_hook(visit.end(place), always_call=True))
    try:
        with hooked(handles), torch.autograd.graph.saved_tensors_hooks(visit.pack, visit.unpack):
            yield
    finally:
        visit.end_all()  # after an interrupt, for which hooks are not called


@dataclass(frozen=True)
class _Guest:
    """A copy on the device, and the tensor in whose place it is in a module's table."""

    table: dict[str, Any]
    name: str
    home: Tensor
    copy: Tensor
    version: int


class _Visit:
    """Puts copies of weights, on a device, in the place of weights that are elsewhere, and later the weights back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.homes: dict[int, Tensor] = {}
        """The weights by the storage of the copies that are there now."""
        self._guests: dict[int, list[_Guest]] = {}

    def begin(self, place: nn.Module, modules: Iterable[nn.Module]) -> Callable[..., None]:
        """Make a hook that copies the weights of some modules to the device."""

        @torch.no_grad()
        def hook(*_: Any) -> None:
            guests = self._guests[id(place)] = []
            copies: dict[int, Tensor] = {}  # weights that are tied stay so
            tables: list[dict[str, Any]] = [
                table for module in modules for table in (module._parameters, module._buffers)
            ]
            for table in tables:
                for name, home in table.items():
                    if home is None or home.device == self.device:
                        continue
                    if id(home) not in copies:
                        copy = home.to(self.device, copy=True)
                        copies[id(home)] = nn.Parameter(copy, False) if isinstance(home, nn.Parameter) else copy
                        self.homes[_storage(copy)] = home
                    table[name] = copies[id(home)]
                    guests.append(_Guest(table, name, home, table[name], table[name]._version))

        return hook

    def end(self, place: nn.Module) -> Callable[..., None]:
        """Make the hook that undoes the one of `begin` for the same place."""

        def hook(*_: Any) -> None:
            self._bring_home(self._guests.pop(id(place), []))

        return hook

    def end_all(self) -> None:
        """Put back all weights that are not where they belong."""
        for place in list(self._guests):
            self._bring_home(self._guests.pop(place))

    @torch.no_grad()
    def _bring_home(self, guests: Iterable["_Guest"]) -> None:
        for guest in guests:
            self.homes.pop(_storage(guest.copy), None)
            if guest.table.get(guest.name) is not guest.copy:  # a buffer that the forward has replaced
                guest.table[guest.name] = guest.table[guest.name].to(guest.home.device)
                continue
            if guest.copy._version != guest.version:
                guest.home.copy_(guest.copy)
            guest.table[guest.name] = guest.home

    def pack(self, tensor: Tensor) -> Any:
        """Choose what autograd keeps of a tensor: the tensor, or for a copy only the weight that it is a copy of."""
        home = self.homes.get(_storage(tensor))
        return tensor if home is None else (home, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self, packed: Any) -> Tensor:
        """Return the tensor that `pack` was given, copied anew if it was a copy."""
        if isinstance(packed, Tensor):
            return packed
        home, *layout = packed
        return home.detach().to(self.device).as_strided(*layout)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
