"""Do once, on the main process, what all processes need, and broadcast the result."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from hf_sparse.errors import SparsityError

Found = TypeVar("Found")


def is_first() -> bool:
    """Whether this is the first process of all machines; the only one is."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def once(work: Callable[[], Found]) -> Found:
    """What the first process finds, on all of them, which wait for it.

    Args:
        work: returns something that can be pickled.

    Raises:
        SparsityError: it raised one, or, on the processes that waited, anything else.
    """
    if not distributed.is_initialized():
        return work()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = work()
        except BaseException as error:  # of which the others have to know, or they would wait for ever
            outcome[1] = error if isinstance(error, SparsityError) else SparsityError(f"the first process: {error!r}")
            distributed.broadcast_object_list(outcome)
            raise
    distributed.broadcast_object_list(outcome)
    found, failure = outcome
    if failure is not None:
        raise failure
    return found


@torch.no_grad()
def send_(tensors: Iterable[Tensor]) -> None:
    """Give tensors, in place, the values that they have on the first process; all are on devices of the run."""
    for tensor in tensors if distributed.is_initialized() else ():
        sent = tensor.contiguous()
        distributed.broadcast(sent, 0)
        if sent is not tensor:
            tensor.copy_(sent)
