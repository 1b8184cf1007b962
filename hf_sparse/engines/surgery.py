"""Changing a model while a Trainer trains it: optimizer and wrappers learn of parameters that come and go."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from hf_sparse.engines.sharding import whole
from hf_sparse.runtime.processes import send_


@contextmanager
def surgery(model: PreTrainedModel, wrapped: nn.Module, optimizer: Any, accelerator: Accelerator) -> Iterator[None]:
    """Change parameters of a model inside this context; on leaving it, in place, the optimizer trains the new ones.

    Parameters are matched by name: one that stays itself keeps its state, one that was replaced starts a new one, one
    that is gone is forgotten; those that the model does not own stay. Inside, the model's forward is its own, without
    the mixed precision that accelerate puts around it, random numbers drawn leave those of the training as they are,
    and a model that FSDP shards is whole on the first process. All processes leave with the values that the first one
    has.

    Args:
        model: the bare model.
        wrapped: what accelerate made of it; DistributedDataParallel registers the new parameters.
        optimizer: of its parameters.
        accelerator: that wrapped it.
    """
    with whole(model, optimizer, accelerator):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = [[(names.get(id(one)), one) for one in group["params"]] for group in optimizer.param_groups]
        with plain_forward(model), unchanged_random_state(accelerator.device):
            yield
        parameters = dict(model.named_parameters())
        state = optimizer.state
        for group, members in zip(optimizer.param_groups, groups):  # those without a name are of a loss, say
            left = [(name, one) for name, one in members if name is None or name in parameters]
            group["params"] = [one if name is None else parameters[name] for name, one in left]
        alive = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for parameter in [parameter for parameter in state if id(parameter) not in alive]:
            del state[parameter]
    if not isinstance(model, FSDPModule):  # its shards have come from the first process
        send_([*model.parameters(), *model.buffers()])
    if isinstance(wrapped, DistributedDataParallel) and trains(model):
        _register_again_(wrapped)


def trains(model: nn.Module) -> bool:
    """Whether a model has parameters, be they of gates, that are not frozen."""
    return any(parameter.requires_grad for parameter in model.parameters())


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Random numbers that are drawn inside leave those that are drawn afterwards as they are."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def unchanged_records(trainer: Any) -> Iterator[None]:
    """Restore the trainer's metric dictionaries on exit; TRL's trainers append to them whenever a loss is computed."""
    records = [(record, copy.deepcopy(record)) for record in vars(trainer).values() if _is_record(record)]
    try:
        yield
    finally:
        for record, before in records:
            record.clear()
            record.update(before)


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_noted, value.values()))


def _is_noted(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_noted, value))
    return _is_record(value) or isinstance(value, int | float | str)


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


def _register_again_(wrapped: DistributedDataParallel) -> None:
    """Let DistributedDataParallel start over in place, for its buckets hold the parameters of its construction."""
    module = wrapped.module
    # The default is not said, as newer versions of torch call it otherwise.
    buffers = {} if wrapped.broadcast_buffers else {"broadcast_buffers": False}
    wrapped.__init__(  # type: ignore[misc]
        module,
        device_ids=wrapped.device_ids,
        output_device=wrapped.output_device,
        find_unused_parameters=wrapped.find_unused_parameters,
        gradient_as_bucket_view=wrapped.gradient_as_bucket_view,
        static_graph=wrapped.static_graph,
        **buffers,
    )


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


def _states(value: Any) -> Iterator[Tensor]:
    """The tensors with a graph in a value, and in the containers within it."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _states(one)


def with_random_weights_(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Give a skeleton weights in place, for measuring: small random ones, as speed does not depend on which."""
    generator = torch.Generator(device).manual_seed(0)
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            values = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            values = values.normal_(0, 0.02, generator=generator).to(parameter.dtype)
            made[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
        module, _, key = name.rpartition(".")
        model.get_submodule(module).register_parameter(key, made[id(parameter)])
    nn.Module.to(model, device)  # its buffers; transformers wraps `to` in a way that hides its type
    return model
