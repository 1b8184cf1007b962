"""A second device where there is none: its tensors refuse to be computed with beside those of the host, as a GPU's do.

They wrap tensors of the host. Numbers without dimensions may come from there, and so may indices, as on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fake"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor}
COPYING = {aten.copy_.default, aten._to_copy.default}


class There(Tensor):
    """A tensor on the device."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "layout": here.layout}
        make: Any = Tensor
        made: There = make._make_wrapper_subclass(cls, here.size(), dtype=here.dtype, device=DEVICE, **layout)
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    others = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.ndim > 0]
    if function in INDEXING and isinstance(args[0], There):
        others = []
    if there and others and function not in COPYING:
        raise RuntimeError(f"{function} has tensors on two devices, of shapes {[tuple(one.shape) for one in tensors]}")
    if function is aten._fused_sdp_choice.default:
        return 0  # the kernel of the host for all
    place = kwargs.get("device")
    plain_args, plain = tree_map(lambda leaf: leaf.here if isinstance(leaf, There) else leaf, (args, kwargs))
    if place is not None:
        plain = {**plain, "device": torch.device("cpu")}
    found = function(*plain_args, **plain)
    if function is aten._to_copy.default and any(found is leaf for leaf in plain_args):
        found = found.clone()
    goes = torch.device(place).type == NAME if place is not None else bool(there)
    if function is aten.copy_.default:
        goes = isinstance(args[0], There)
    if function is aten._local_scalar_dense.default or not goes:
        return found
    found = tree_map(lambda leaf: There(leaf) if isinstance(leaf, Tensor) else leaf, found)
    return return_and_correct_aliasing(function, args, kwargs, found) if there and place is None else found


class _Making(TorchDispatchMode):
    """Tensors that are made on the device, from nothing or from the host's."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """torch.tensor() makes its tensors without a dispatch that could be seen."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = (kwargs or {}).get("device")
        if function is torch.tensor and place is not None and torch.device(place).type == NAME:
            return function(*args, **{**kwargs, "device": None}).to(DEVICE)
        return function(*args, **(kwargs or {}))


@contextmanager
def fake_device() -> Iterator[Callable[[Any], Any]]:
    """Inside this context there is the device; gives what moves all tensors of something there."""
    with _Making(), _FromNumbers():
        yield lambda value: tree_map(lambda leaf: leaf.to(DEVICE) if isinstance(leaf, Tensor) else leaf, value)


def at_home(value: Any) -> Any:
    """All tensors of something on the host."""
    return tree_map(lambda leaf: leaf.here if isinstance(leaf, There) else leaf, value)
