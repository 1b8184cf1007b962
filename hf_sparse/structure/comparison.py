"""Compare what two forms of a model compute: the outputs that it returns by default, and those that it is asked for."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from hf_sparse.modeling_hf_sparse import is_of_transformers
from hf_sparse.runtime.contexts import seeded
from hf_sparse.runtime.streaming import device_of, streamed
from hf_sparse.structure.dependencies import FORWARD_ERRORS, accepted, cached_positions, leaving_no_hooks

Outputs = Mapping[Any, Any]
"""What a model returns, by name, or by place where it has no names."""

RELATIVE_TOLERANCE = 1e-4
"""Largest difference, in units of the largest output, that counts as rounding in float32."""

DOUBTFUL = 100
"""How many times larger a difference may be that is decided in float64: sums that cancel round more than others."""


def tensors(output: Any, place: str = "") -> dict[str, Tensor]:
    """Find the floating-point tensors in what a module returns, by their place in it."""
    if isinstance(output, Tensor):
        return {place: output} if output.is_floating_point() else {}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, dict):
        items = output.items()
    elif isinstance(output, list | tuple):
        items = enumerate(output)
    return {key: tensor for name, value in items for key, tensor in tensors(value, f"{place}.{name}").items()}


def outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run a model and return the floating-point tensors in its outputs, by place; its random draws never change."""
    return _but_for_caches(_forward(model, inputs))


def _forward(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Outputs:
    with seeded(device_of(inputs)), streamed(model, inputs):
        found = model(**inputs, **as_outputs(model))
    if isinstance(found, dict):  # as are transformers' own outputs
        return found
    return dict(enumerate(found if isinstance(found, list | tuple) else [found]))


def as_outputs(model: nn.Module) -> dict[str, bool]:
    """Return the keyword argument that makes a model name its outputs; none if its class does not take it."""
    kind: Any = type(model)
    known = is_of_transformers(getattr(kind, "stock_class", kind))
    return {"return_dict": True} if known or "return_dict" in inspect.signature(kind.forward).parameters else {}


def _but_for_caches(found: Outputs) -> dict[str, Tensor]:
    return tensors({key: value for key, value in found.items() if key != "past_key_values"})


def largest_difference(reference: Iterable[Tensor], found: Iterable[Tensor]) -> tuple[float, float]:
    """Compute (largest absolute difference, largest absolute reference) of pairs; NaN if only one tensor is finite."""
    differences, scales = [torch.zeros(())], [torch.zeros(())]
    for one, other in zip(reference, found, strict=True):
        if one.numel():
            difference = torch.where(one == other, 0.0, (one - other).abs())  # equal infinities are no difference
            differences.append(difference.max().cpu().float())
            scales.append(one[one.isfinite()].abs().max().cpu().float() if one.isfinite().any() else torch.zeros(()))
    return torch.stack(differences).max().item(), torch.stack(scales).max().item()


# ---- What a model returns only when it is asked ----


@dataclass(frozen=True)
class OptionalOutputs:
    """The outputs that a model can be asked for on a batch, beside those that it returns by default.

    Attributes:
        inputs: the batch, small enough for all hidden states to be kept.
        flags: arguments of the model's forward that ask for more outputs.
        goes_on: whether a second forward can continue from the cache that the first one returns.
    """

    inputs: Mapping[str, Any]
    flags: Mapping[str, bool]
    goes_on: bool

    def of(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Compute all outputs of a model by place, the lengths of its cache, and the outputs that follow from it."""
        found = _asked(model, self.inputs, self.flags)
        return _described(found) | (_continued(model, self.inputs, found) if self.goes_on else {})


def optional_outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[OptionalOutputs, dict[str, Tensor]]:
    """Find the outputs that a model can be asked for on a batch, and return them together with their values."""
    flags = accepted(model, "use_cache", "output_hidden_states", "output_router_logits", "output_attentions")
    if model.config._attn_implementation != "eager":
        flags.pop("output_attentions", None)  # some compute otherwise when they are asked
    try:
        found = _asked(model, inputs, flags)
    except FORWARD_ERRORS:
        flags = {flag: True for flag in flags if _stands(model, inputs, flag)}
        found = _asked(model, inputs, flags)
    described = _described(found)  # before its cache gets longer
    try:
        following = _continued(model, inputs, found)
    except FORWARD_ERRORS:  # it has no cache, or reads more than tokens
        return OptionalOutputs(inputs, flags, False), described
    return OptionalOutputs(inputs, flags, True), described | following


def _stands(model: PreTrainedModel, inputs: Mapping[str, Any], flag: str) -> bool:
    try:
        _asked(model, inputs, {flag: True})
    except FORWARD_ERRORS:
        return False
    return True


def _asked(model: PreTrainedModel, inputs: Mapping[str, Any], flags: Mapping[str, bool]) -> Outputs:
    with leaving_no_hooks(model):
        return _forward(model, {**inputs, **flags})


def _described(found: Outputs) -> dict[str, Tensor]:
    lengths = cached_positions(*found.values()) or {}
    places = {f".cache.{'cross ' if cross else ''}{layer}": length for (cross, layer), length in lengths.items()}
    return _but_for_caches(found) | {place: torch.tensor(float(length)) for place, length in places.items()}


def _continued(model: PreTrainedModel, inputs: Mapping[str, Any], found: Outputs) -> dict[str, Tensor]:
    """Compute the outputs for a few more tokens, which continue from the cache that a forward has returned.

    Raises:
        LookupError: it has returned none, or has not read tokens.
    """
    caches = {name: value for name, value in found.items() if isinstance(value, Cache)}
    read = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    if len(caches) != 1 or read not in inputs:
        raise LookupError("there is no cache to continue from")
    tokens, mask = inputs[read][:, :3], inputs.get("attention_mask")
    batch = {name: value for name, value in inputs.items() if name.startswith("encoder_")}
    batch |= {read: tokens, **caches}
    if read == "decoder_input_ids":
        batch["encoder_outputs"] = (found["encoder_last_hidden_state"],)
        batch |= {} if mask is None else {"attention_mask": mask}
    elif mask is not None:
        batch["attention_mask"] = torch.cat([mask, torch.ones_like(tokens)], 1)
    return {f".continued{place}": tensor for place, tensor in outputs(model, batch).items()}


def disagreement(reference: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str | None:
    """Tell where and how the optional outputs of two forms of a model differ by more than rounding; None if nowhere.

    Of attention weights only the places are compared: removed heads have none.
    """
    if odd := sorted(reference.keys() ^ others.keys()):
        return f"only one of them returns {odd[0].lstrip('.')}"
    names = [place for place in reference if "attentions" not in place]
    for key in dict.fromkeys(name.split(".")[1] for name in names):
        alike = [name for name in names if name.split(".")[1] == key]
        if any(reference[name].shape != others[name].shape for name in alike):
            return f"its {key} have another shape"
        difference, scale = largest_difference([reference[n] for n in alike], [others[n] for n in alike])
        if not difference <= RELATIVE_TOLERANCE * max(scale, 1.0):
            return f"its {key} differ by {difference:.3g} (up to {scale:.3g})"
    return None
