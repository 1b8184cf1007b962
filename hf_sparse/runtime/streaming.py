"""Running a model whose weights are in the host's memory on a device that need not have room for all of them."""

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
    """The modules that transformers would not split between devices, those within others before them."""
    names = set(model._no_split_modules or ())
    return [module for module in reversed(list(model.modules())) if type(module).__name__ in names]


def device_of(inputs: Mapping[str, Any]) -> torch.device:
    """Where a batch is; the host if it has no tensors."""
    return next((value.device for value in inputs.values() if isinstance(value, Tensor)), HOST)


@contextmanager
def streamed(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Inside this context a model runs where its inputs are, if all of its parameters are in the host's memory.

    Copies of a layer's weights are there while it runs, of those outside of layers, such as embeddings, during a whole
    forward; what is changed in them is brought back. For a backward, weights are copied again when it needs them. A
    model whose class does not name its layers is there as a whole.
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
    """Puts copies of weights on a device in the place of weights that are elsewhere, and the weights back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.homes: dict[int, Tensor] = {}
        """The weights by the storage of the copies that are there now."""
        self._guests: dict[int, list[_Guest]] = {}

    def begin(self, place: nn.Module, modules: Iterable[nn.Module]) -> Callable[..., None]:
        """A hook that brings the weights of some modules to the device."""

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
        """A hook that puts back the weights that the other one for this place has brought."""

        def hook(*_: Any) -> None:
            self._send_home(self._guests.pop(id(place), []))

        return hook

    def end_all(self) -> None:
        """Put back all weights that are not where they belong."""
        for place in list(self._guests):
            self._send_home(self._guests.pop(place))

    @torch.no_grad()
    def _send_home(self, guests: Iterable["_Guest"]) -> None:
        for guest in guests:
            self.homes.pop(_storage(guest.copy), None)
            if guest.table.get(guest.name) is not guest.copy:  # a buffer that the forward has replaced
                guest.table[guest.name] = guest.table[guest.name].to(guest.home.device)
                continue
            if guest.copy._version != guest.version:
                guest.home.copy_(guest.copy)
            guest.table[guest.name] = guest.home

    def pack(self, tensor: Tensor) -> Any:
        """What autograd is to keep of a tensor: of a copy, only whose it is."""
        home = self.homes.get(_storage(tensor))
        return tensor if home is None else (home, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self, packed: Any) -> Tensor:
        """That tensor."""
        if isinstance(packed, Tensor):
            return packed
        home, *layout = packed
        return home.detach().to(self.device).as_strided(*layout)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
