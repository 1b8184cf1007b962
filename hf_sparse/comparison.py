"""Whether two forms of a module compute the same."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.modeling_hf_sparse import is_of_transformers
from hf_sparse.streaming import device_of, streamed

RELATIVE_TOLERANCE = 1e-4
"""Largest difference, in units of the largest output, that counts as rounding in float32."""

DOUBTFUL = 100
"""How many times larger a difference may be that is decided in float64: sums that cancel round more than others."""


def tensors(output: Any, place: str = "") -> dict[str, Tensor]:
    """The floating-point tensors in what a module returns, by their place in it."""
    if isinstance(output, Tensor):
        return {place: output} if output.is_floating_point() else {}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, dict):
        items = output.items()
    elif isinstance(output, list | tuple):
        items = enumerate(output)
    return {key: tensor for name, value in items for key, tensor in tensors(value, f"{place}.{name}").items()}


def outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The floating-point tensors in the model's outputs, by their place; models that sample draw the same each time."""
    device = device_of(inputs)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), streamed(model, inputs):
        torch.manual_seed(0)
        found = model(**inputs, **as_outputs(model))
    if isinstance(found, dict):  # as are transformers' own outputs
        found = {key: value for key, value in found.items() if key != "past_key_values"}
    return tensors(found)


def as_outputs(model: nn.Module) -> dict[str, bool]:
    """The keyword argument with which a model names its outputs; a class of one's own may not know it."""
    kind: Any = type(model)
    known = is_of_transformers(getattr(kind, "stock_class", kind))
    return {"return_dict": True} if known or "return_dict" in inspect.signature(kind.forward).parameters else {}


def largest_difference(reference: Iterable[Tensor], outputs: Iterable[Tensor]) -> tuple[float, float]:
    """(largest absolute difference, largest absolute reference) of tensors in pairs; NaN where only one is finite."""
    differences, scales = [torch.zeros(())], [torch.zeros(())]
    for one, other in zip(reference, outputs, strict=True):
        if one.numel():
            difference = torch.where(one == other, 0.0, (one - other).abs())  # equal infinities are no difference
            differences.append(difference.max().cpu().float())
            scales.append(one[one.isfinite()].abs().max().cpu().float() if one.isfinite().any() else torch.zeros(()))
    return torch.stack(differences).max().item(), torch.stack(scales).max().item()
