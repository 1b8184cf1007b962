"""Try a compaction: mask the model, compute in float32 or float64 on a small batch, and undo changes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.errors import UnknownInputsError
from hf_sparse.modeling_hf_sparse import configs_in
from hf_sparse.runtime.streaming import device_of
from hf_sparse.structure.blocks import ModelStructure
from hf_sparse.structure.example_inputs import example_inputs, placed

_SMALL = 1 << 13  # values in the tensors of a batch


def small_batch(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Choose a batch so small that all hidden states can be kept: the inputs, or one made from the config."""
    if sum(value.numel() for value in inputs.values() if isinstance(value, Tensor)) <= _SMALL:
        return inputs
    try:
        return placed(example_inputs(model), device_of(inputs))
    except UnknownInputsError:
        return inputs


@contextmanager
def masked(
    model: PreTrainedModel, structure: ModelStructure, gates: dict[str, Tensor], kept: dict[str, Tensor]
) -> Iterator[None]:
    """Mask a model: multiply its gates into the weights, with zero for the dropped units, until the block ends."""
    weights = {}
    for block in [block for block in structure.blocks if block.name in gates]:
        weight = model.get_parameter(block.weight.parameter)
        mask = torch.zeros(block.units).index_fill(0, kept[block.name], 1.0)
        gate = gates[block.name].to(weight.device) * mask.to(weight.device)
        weights[block.weight.parameter] = weight * block.column_scale(gate, weight.ndim)
    for name, value in weights.items():
        model.get_parameter(name).data, weights[name] = value, model.get_parameter(name).data
    try:
        yield
    finally:
        for name, value in weights.items():
            model.get_parameter(name).data = value


def in_dtype(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Convert the inputs that are in float32 to another dtype."""
    wide = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dtype == torch.float32}
    return {**inputs, **{name: value.to(dtype) for name, value in wide.items()}}


@contextmanager
def computing_in(dtype: torch.dtype, model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32 or float64, so that a difference is a mistake and not rounding."""
    narrow = {torch.float16, torch.bfloat16, torch.float32} - {dtype}
    before = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype in narrow:
            before[name] = tensor.dtype
            tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in before:
                tensor.data = tensor.data.to(before[name])


def snapshot(model: nn.Module) -> Any:
    """Return a function that undoes all later changes of modules, attributes, classes and parameters of a model."""
    modules = list(model.modules())
    states = [(module, type(module), vars(module).copy()) for module in modules]
    tables = [{key: value.copy() for key, value in state.items() if isinstance(value, dict)} for *_, state in states]
    configs = [(config, type(config), vars(config).copy()) for config in configs_in(model.config)]

    def restore() -> None:
        for config, kind, entries in configs:
            config.__class__ = kind
            vars(config).clear()
            vars(config).update(entries)
        for (module, kind, state), table in zip(states, tables):
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
            for key, value in table.items():
                vars(module)[key].clear()
                vars(module)[key].update(value)

    return restore
