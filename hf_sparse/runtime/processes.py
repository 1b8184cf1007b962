"""Do once, on the main process, what all processes need, and broadcast the result."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from hf_sparse.errors import SparsityError

Found = TypeVar("Found")


def is_main() -> bool:
    """Tell whether this is the main process; a process without others is."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def once(work: Callable[[], Found]) -> Found:
    """Call a function on the main process, and return its result on all processes, which wait for it.

    Args:
        work: returns something that can be pickled.

    Raises:
        SparsityError: `work` raised one; the processes that waited raise it whatever `work` raised.
    """
    if not distributed.is_initialized():
        return work()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except BaseException as error:  # of which the others have to know, or they would wait for ever
            outcome[1] = error if isinstance(error, SparsityError) else SparsityError(f"the main process: {error!r}")
            distributed.broadcast_object_list(outcome)
            raise
    distributed.broadcast_object_list(outcome)
    found, failure = outcome
    if failure is not None:
        raise failure
    return found


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Broadcast tensors in place from the main process; all are on devices of the run."""
    for tensor in tensors if distributed.is_initialized() else ():
        whole = tensor.contiguous()
        distributed.broadcast(whole, 0)
        if whole is not tensor:
            tensor.copy_(whole)
