"""What holds inside a block of code and is undone at its end, whatever happens in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove hooks, given by their handles, when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Random numbers that are drawn inside leave those that are drawn afterwards as they are."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """The forward of the model's class, without what accelerate, or a Trainer, has put in its place.

    A copy of a model would take theirs with it, which goes on running the model that was copied.
    """
    forward = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if forward is not None:
            vars(model)["forward"] = forward


@contextmanager
def full_precision_forward(model: nn.Module) -> Iterator[None]:
    """The forward that a Trainer computes its loss by, without the mixed precision that accelerate puts around it."""
    forward = vars(model).get("forward")
    if forward is not None:
        vars(model)["forward"] = vars(model).get("_original_forward", forward)  # as accelerate calls it
    try:
        yield
    finally:
        if forward is not None:
            vars(model)["forward"] = forward
