"""Change something for the time of a block of code; the change is undone at its end, also after an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove hooks, given by their handles, when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode; when the block ends, each of their modules is in the mode that it had before.

    A module that is new by then gets the mode that its model had.
    """
    before = [{module: module.training for module in model.modules()} for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, modes in zip(models, before):
            for module in model.modules():
                module.training = modes.get(module, modes[model])


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random states of the host and of a device when the block ends."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Start the random numbers of the host and of a device from one seed; restore their states when the block ends."""
    with unchanged_random_state(device):
        if device.type == "cpu":  # torch.manual_seed notes the stack of its caller for every device that it has not met
            torch.default_generator.manual_seed(0)
        else:
            torch.manual_seed(0)
        yield


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """Let a model have the forward of its class, without the one that accelerate or a Trainer has put in its place.

    A copy of the model would take that forward with it, and it would still run the model that was copied.
    """
    forward = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if forward is not None:
            vars(model)["forward"] = forward


@contextmanager
def full_precision_forward(model: nn.Module) -> Iterator[None]:
    """Let a model compute in its own precision, without the mixed precision that accelerate puts around its forward."""
    forward = vars(model).get("forward")
    if forward is not None:
        vars(model)["forward"] = vars(model).get("_original_forward", forward)  # as accelerate calls it
    try:
        yield
    finally:
        if forward is not None:
            vars(model)["forward"] = forward


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Keep transformers from logging inside this context, where models are tried and nobody is to be told."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
