"""What a model can be asked for beside its outputs by default: all hidden states and attention weights, and so on."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from hf_sparse.runtime.contexts import seeded
from hf_sparse.structure.comparison import tensors
from hf_sparse.structure.dependencies import FORWARD_ERRORS

Answers = dict[str, torch.Tensor]

PADDING = 2  # tokens before the second of two texts


@torch.no_grad()
def _forward(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    with seeded(model.device):
        return dict(model(**inputs))


def _answers(found: dict[str, Any]) -> Answers:
    return tensors({name: value for name, value in found.items() if not isinstance(value, Cache)})


def all_outputs(model: PreTrainedModel, inputs: dict[str, Any]) -> Answers:
    """All outputs that the model gives when it is asked by the flags that it stands."""
    flags = {}
    for flag in ("output_hidden_states", "output_attentions", "output_router_logits"):
        with suppress(*FORWARD_ERRORS):
            _forward(model, {**inputs, flag: True})
            flags[flag] = True
    return _answers(_forward(model, {**inputs, **flags}))


def _read(inputs: dict[str, Any]) -> tuple[torch.Tensor, str, list[dict[str, Any]]]:
    """The tokens that a decoder reads, the prefix of its arguments, and what else it may need, in the order to try."""
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    tokens = inputs[f"{prefix}input_ids"]
    own = ("attention_mask", "input_ids", "token_type_ids", "mm_token_type_ids")
    rest = {name: value for name, value in inputs.items() if name.removeprefix(prefix) not in own}
    return tokens, prefix, [rest, {}] if not prefix else [{**inputs, **rest}]


def _attempt(asked: Callable[..., Answers]) -> Callable[[PreTrainedModel, dict[str, Any]], Answers | None]:
    """The answers with the first rest of inputs that a model stands; None if it reads no tokens, or stands none."""

    def attempt(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Answers | None:
        with suppress(KeyError):
            tokens, prefix, rests = _read(inputs)
            for rest in rests:
                with suppress(*FORWARD_ERRORS):
                    return asked(model, tokens, prefix, rest, **options)
        return None

    return attempt


@_attempt
def continued(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    prefix: str,
    rest: dict[str, Any],
    filler: PreTrainedModel | None = None,
) -> Answers:
    """A text that is padded on its left, in two parts, of which the second goes on from the cache of the first.

    The first part may be read by another model, such as the one before it was pruned.
    """
    mask, half = torch.ones_like(tokens), tokens.shape[1] // 2
    mask[-1, :PADDING] = 0
    parts = [{f"{prefix}input_ids": tokens[:, :half], f"{prefix}attention_mask": mask[:, :half]}]
    parts.append({f"{prefix}input_ids": tokens[:, half:], f"{prefix}attention_mask": mask})
    first = _forward(filler or model, {**rest, **parts[0], "use_cache": True})
    caches = {name: value for name, value in first.items() if isinstance(value, Cache)}
    if not caches:
        raise ValueError("no cache")
    second = _forward(model, {**rest, **parts[1], **caches})
    return {f".first{name}": value for name, value in _answers(first).items()} | _answers(second)


@_attempt
def packed(model: PreTrainedModel, tokens: torch.Tensor, prefix: str, rest: dict[str, Any]) -> Answers:
    """Two texts in every row: positions start anew, nobody looks across."""
    half = tokens.shape[1] // 2
    positions = torch.cat([torch.arange(half), torch.arange(tokens.shape[1] - half)]).expand(tokens.shape)
    given = {f"{prefix}input_ids": tokens, f"{prefix}position_ids": positions, "use_cache": False}
    return _answers(_forward(model, {**rest, **given}))


ASKED = {"all outputs": all_outputs, "continued": continued, "packed": packed}


def assert_same_answers(one: Answers, other: Answers | None, what: str, tolerance: float, alike_heads: bool) -> None:
    """Answers of a masked model and of the smaller one; of attention weights, those of the heads that are left."""
    assert other is not None and one.keys() == other.keys(), (what, one.keys() ^ (other or {}).keys())
    for name, reference in one.items():
        found = other[name]
        if "attentions" not in name:
            assert reference.shape == found.shape, (what, name)
            scale = reference[reference.isfinite()].abs().max() if reference.numel() else 0.0
            assert (reference == found).logical_or((reference - found).abs() <= tolerance * scale).all(), (what, name)
        elif alike_heads and found.numel():
            [dim] = [i for i, sizes in enumerate(zip(reference.shape, found.shape)) if len({*sizes}) > 1] or [1]
            heads, left = (weights.movedim(dim, 0).flatten(1) for weights in (reference, found))
            assert (torch.cdist(left, heads, p=torch.inf).min(1).values <= tolerance).all(), (what, name)
