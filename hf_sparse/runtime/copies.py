"""Copy models: without weights, with random ones, or just after they were trained; put parameters into them."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.runtime.contexts import plain_forward


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model that will be changed, without its weights, so that the copy takes no memory."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    with plain_forward(model):
        return copied(model, memo)


def copied(model: PreTrainedModel, memo: dict[int, Any] | None = None) -> PreTrainedModel:
    """Copy a model that may have just been trained.

    States that modules keep of their latest forward, as recurrent ones do, are copied without their graph, which torch
    would refuse to copy.

    Args:
        model: with or without gates.
        memo: as for `copy.deepcopy`.
    """
    states = [state for module in model.modules() for state in _states(vars(module))]
    return copy.deepcopy(model, {id(state): state.detach().clone() for state in states} | (memo or {}))


def keep_own_forwards_(module: nn.Module | None) -> None:
    """Drop, in place, forwards that came with a copy and run the model that was copied; nothing where there is none.

    Some Trainers put a forward on a model that holds on to its earlier one; `copy.deepcopy` copies neither of these
    functions, so that the copy would compute what the original does, whatever it has learnt.
    """
    for model in module.modules() if isinstance(module, nn.Module) else ():
        if isinstance(model, PreTrainedModel) and any(one is not model for one in _run_by(vars(model).get("forward"))):
            del model.forward


def _run_by(function: Any) -> Iterator[nn.Module]:
    """The modules whose methods a function holds on to, directly or by functions that it does."""
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        if inspect.ismethod(held) and isinstance(held.__self__, nn.Module):
            yield held.__self__
        if inspect.isroutine(held):
            yield from _run_by(held)


def _states(value: Any) -> Iterator[Tensor]:
    """The tensors with a graph in a value, and in the containers within it."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _states(one)


def set_parameter_(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Put a parameter at a path of a model, in place; the one that was there keeps its values."""
    module, _, name = path.rpartition(".")
    model.get_submodule(module).register_parameter(name, parameter)


def with_random_weights_(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Give a skeleton weights in place, for measuring: small random ones, as speed does not depend on which."""
    generator = torch.Generator(device).manual_seed(0)
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            values = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            values = values.normal_(0, 0.02, generator=generator).to(parameter.dtype)
            made[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
        set_parameter_(model, name, made[id(parameter)])
    nn.Module.to(model, device)  # its buffers; transformers wraps `to` in a way that hides its type
    return model


@contextmanager
def copy_in_place(trainer: Any) -> Iterator[PreTrainedModel]:
    """Put a copy in the place of a Trainer's bare model inside this context, to be changed."""
    model = trainer.model
    try:
        trainer.model = copied(model)
        yield trainer.model
    finally:
        trainer.model = model
