"""Take from a model's outputs what is compared with its teacher: logits and hidden states."""

import dataclasses
import functools
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Answers:
    """The outputs of a model for a batch: its logits and the hidden states of its layers.

    Attributes:
        heads: every output that is named `*logits`, by its name.
        states: the output of every layer, shape (rows, ..., width) each; empty where they were not asked for.
    """

    heads: Mapping[str, Tensor]
    states: tuple[Tensor, ...]

    @property
    def logits(self) -> Tensor:
        """The logits of a model with one head."""
        return self.heads["logits"]

    def __bool__(self) -> bool:
        return bool(self.heads or self.states)


def answers(outputs: Any, declared: frozenset[str] | None) -> Answers:
    """Take the answers out of what a forward returns; a forward that returns no mapping gives none.

    Args:
        outputs: of a model or of what a Trainer has put in the place of its forward.
        declared: what the model itself says that it returns, by `declared_outputs`.
    """
    if not isinstance(outputs, Mapping):
        return Answers({}, ())
    heads = {
        name: value
        for name, value in outputs.items()
        # Routers name tuples of tensors like that, one of a layer each.
        if name.endswith("logits") and isinstance(value, Tensor) and (declared is None or name in declared)
    }
    return Answers(heads, tuple(state for stack in STACKS for state in _layers(outputs, stack)))


TOLERANCE = 0.05
"""Relative difference below which answers are the same, in half precision and in batches of other sizes, too."""

STACKS = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
"""Outputs that are the states of a stack of layers, in the order in which layers are counted."""


def _layers(outputs: Mapping[str, Any], stack: str) -> tuple[Tensor, ...]:
    """The states of a stack, without the embeddings that come first, and without what is more than one tensor."""
    return tuple(state for state in (outputs.get(stack) or ())[1:] if isinstance(state, Tensor))


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two answers are the same but for rounding."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.float(), theirs.float()
    return not bool((ours - theirs).norm() > TOLERANCE * ours.norm())


def declared_outputs(model: nn.Module) -> frozenset[str] | None:
    """The names of all that a model's forward may return by its annotation; None where that says nothing."""
    kind: Any = type(model)
    return _declared(kind)


@functools.cache
def _declared(kind: Any) -> frozenset[str] | None:
    try:
        hint = typing.get_type_hints(kind.forward).get("return")
    except (NameError, AttributeError, ImportError, TypeError):  # names that are there for type checkers alone
        return None
    kinds = [
        kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    ]
    return frozenset(field.name for kind in kinds for field in dataclasses.fields(kind)) if kinds else None


def class_counts(model: Any) -> dict[str, int | None]:
    """How many labels and tokens a transformers model tells apart, by what says so: its config and its head."""
    text, head = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    return {
        "num_labels": getattr(model.config, "num_labels", None),
        "vocab_size": getattr(text, "vocab_size", None),
        "outputs of its head": getattr(head, "out_features", None),
    }


def class_axis(shape: Sequence[int], counts: Collection[int], labels: Any) -> int | None:
    """The axis of logits along which classes exclude each other; None if they are no logits of a model's classes.

    Pixels, boxes, and a class for no object beside the others are not: a loss of its own compares them.

    Args:
        shape: of the logits, (rows, classes), (rows, tokens, classes) or (rows, classes, height, width).
        counts: as `class_counts` says.
        labels: of the batch, if there are any; one class for each of their entries also shows where classes are.
    """
    if len(shape) < 3:  # classes may also be the choices of a question, or its tokens
        return -1
    found = [axis for axis in ((1, -1) if len(shape) > 3 else (-1,)) if shape[axis] in counts]
    if not found and isinstance(labels, Tensor) and tuple(labels.shape) == tuple(shape[:-1]):
        return -1
    return found[0] if found else None


def token_mask(model: nn.Module, mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Where the tokens of a batch are among entries of some shape: 1, and 0 for padding; None where that is not known.

    Args:
        model: bare.
        mask: of its inputs, shape (rows, tokens), or (rows, choices, tokens) of questions.
        shape: (rows, tokens, ...), where rows may be those of all choices, and tokens may be fewer than samples of
            sound.

    Returns:
        Of the shape of the entries.
    """
    if mask is None or len(shape) < 2:
        return None
    rows, tokens, *rest = shape
    if mask.ndim == 3 and (mask.shape[0] * mask.shape[1], mask.shape[2]) == (rows, tokens):
        mask = mask.flatten(0, 1)
    if mask.ndim != 2 or len(mask) != rows:
        return None
    # A part of the interface of speech models, which make fewer frames of more samples; others merge or add tokens.
    shortened = getattr(model, "_get_feature_vector_attention_mask", None)
    if mask.shape[1] != tokens and shortened is not None:
        mask = shortened(tokens, mask)
    return mask.reshape(rows, tokens, *(1 for _ in rest)).expand(*shape) if mask.shape == (rows, tokens) else None


def input_masks(inputs: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """Where tokens are in the inputs of a batch, by the stack that reads them; None where that is not said."""
    labels = inputs.get("labels")
    decoder = inputs.get("decoder_attention_mask", (labels != -100).long() if isinstance(labels, Tensor) else None)
    masks = dict.fromkeys(STACKS, inputs.get("attention_mask"))
    return masks | {"decoder_hidden_states": decoder}


def state_masks(model: nn.Module, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
    """Where tokens are in every state of `answers`, as `token_mask` says."""
    masks = input_masks(inputs)
    return tuple(
        token_mask(model, masks[stack], state.shape[:-1]) for stack in STACKS for state in _layers(outputs, stack)
    )
