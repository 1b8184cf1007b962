"""The dense teacher: a frozen model whose outputs can be remembered, since a teacher says the same in every epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse.errors import SparsityError
from hf_sparse.sharding import shard_frozen_, spread_
from hf_sparse.zero3 import gather_partitions_, is_partitioned

logger = logging.get_logger(__name__)

MOST_CACHED_BYTES = 8 << 30
"""Once so much is remembered, the teacher is asked again for every other row."""


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says of a batch.

    Attributes:
        logits: shape (rows, ..., labels).
        hidden_states: output of every layer, shape (rows, ..., width) each; empty where they are not asked for.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...]


def layer_states(outputs: Any) -> tuple[Tensor, ...]:
    """The outputs of all layers, of the encoder before the decoder, without the embeddings that come first."""
    stacks = [outputs.get(name) for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")]
    return tuple(state for stack in stacks if stack is not None for state in stack[1:])


def state_masks(outputs: Any, inputs: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
    """Of every layer of `layer_states`, where its tokens are: 1, and 0 for padding; None where that is not known."""
    labels = inputs.get("labels")
    decoder = inputs.get("decoder_attention_mask", None if labels is None else (labels != -100).long())
    masks = {"hidden_states": inputs.get("attention_mask"), "encoder_hidden_states": inputs.get("attention_mask")}
    masks["decoder_hidden_states"] = decoder
    stacks = [(outputs.get(name), mask) for name, mask in masks.items()]
    return tuple(mask for stack, mask in stacks if stack is not None for _ in stack[1:])


def _label_names(model: nn.Module) -> list[str]:
    """The labels of a classifier in their order; none where they were never named."""
    names = getattr(model.config, "id2label", None) or {}
    found = [str(names[index]) for index in sorted(names)]
    return [] if all(name.startswith("LABEL_") for name in found) else found


class Teacher:
    """Freezes a model in place, moves it to the device or shards it, and answers with its outputs.

    Args:
        model: the dense teacher; put in evaluation mode and frozen.
        student: the model that learns from it.
        device: of the student.
        hidden: whether hidden states are wanted.
        cached: whether to remember what it said about each row. Rows are known by their contents, so the data set may
            be shuffled and batched in any way; states are kept in bfloat16 in the host's memory.
        sharded: whether every process holds a share of it, by FSDP; all of them then ask it at the same time.

    Raises:
        SparsityError: it is the student itself, or predicts something else.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        student: nn.Module,
        device: torch.device,
        hidden: bool,
        cached: bool,
        sharded: bool = False,
    ) -> None:
        if model is student:
            raise SparsityError("the teacher is the model that is pruned: give a copy, copy.deepcopy(model)")
        for name in ("num_labels", "vocab_size"):
            ours, theirs = (getattr(one.config, name, None) for one in (student, model))
            if ours != theirs:
                raise SparsityError(
                    f"the teacher has {name} {theirs} and the model {ours}: give a teacher for the same task"
                )
        ours, theirs = (_label_names(one) for one in (student, model))
        if ours and theirs and ours != theirs:
            raise SparsityError(f"the teacher has the labels {theirs} and the model {ours}: give both one id2label")
        if any(parameter.shape == (0,) for parameter in model.parameters() if "ds_id" not in vars(parameter)):
            raise SparsityError(
                "the teacher is a copy of weights that ZeRO stage 3 has sharded, which has none: load it by "
                "from_pretrained, as the model"
            )
        self.model = model.eval().requires_grad_(False)
        in_shards = is_partitioned(model)
        if in_shards:
            gather_partitions_(model)
        if sharded:
            shard_frozen_(model, device)
        elif in_shards:
            spread_(model, device)
        else:
            # nn.Module's own: transformers wraps `to` in a way that hides its type.
            nn.Module.to(model, device)
        self.hidden = hidden
        self.cached = cached
        self.sharded = sharded
        self._rows: dict[bytes, tuple[Tensor, ...]] = {}
        self._bytes = 0

    def __call__(self, inputs: Mapping[str, Any]) -> TeacherOutputs:
        """Its outputs for a batch without labels."""
        if not self.cached:
            return self._ask(inputs)
        # With a decoder, what is as long as the input may be of the output: padding stays where it is.
        mask = None if self.model.config.is_encoder_decoder else inputs.get("attention_mask")
        mask = mask.bool().cpu() if isinstance(mask, Tensor) else None
        keys = _keys(inputs, mask)
        if any(key not in self._rows for key in keys):
            outputs = self._ask(inputs)
            self._remember(keys, outputs, mask)
            return outputs
        rows = [self._rows[key] for key in keys]
        device = next(iter(inputs.values())).device
        width = None if mask is None else mask.shape[1]
        logits, *states = (
            _joined([row[index] for row in rows], mask, width).to(device, non_blocking=True)
            for index in range(len(rows[0]))
        )
        return TeacherOutputs(logits, tuple(states))

    def _ask(self, inputs: Mapping[str, Any]) -> TeacherOutputs:
        # Not in inference mode, which is hardly faster: its tensors could not be used again outside, as FSDP would.
        with torch.no_grad():
            outputs = self.model(**inputs, output_hidden_states=self.hidden, return_dict=True)
        logits = outputs.get("logits")
        if logits is None or logits.ndim > 3:
            raise SparsityError(
                f"{type(self.model).__name__} has no logits of shape (rows, labels) or (rows, tokens, labels) to learn "
                "from: leave the teacher out"
            )
        return TeacherOutputs(logits, layer_states(outputs) if self.hidden else ())

    def _remember(self, keys: list[bytes], outputs: TeacherOutputs, mask: Tensor | None) -> None:
        if self._bytes > MOST_CACHED_BYTES:
            return
        logits = outputs.logits.float().cpu()
        states = [state.to("cpu", torch.bfloat16) for state in outputs.hidden_states]
        for index, key in enumerate(keys):
            own = None if mask is None else mask[index]
            row = tuple(_unpadded(value[index], own) for value in (logits, *states))
            self._rows[key] = row
            self._bytes += sum(value.numel() * value.element_size() for value in row)
        if self._bytes > MOST_CACHED_BYTES:
            logger.warning(
                "The teacher's cache is full at %.0f GB with %s rows: it is asked again for the others.",
                self._bytes / 1e9,
                f"{len(self._rows):,}",
            )


def _keys(inputs: Mapping[str, Any], mask: Tensor | None) -> list[bytes]:
    """The contents of every row of a batch, without its padding."""
    tensors = [value.cpu() for _, value in sorted(inputs.items()) if isinstance(value, Tensor)]
    return [
        b"".join(
            _unpadded(value[row], None if mask is None else mask[row]).reshape(-1).view(torch.uint8).numpy().tobytes()
            for value in tensors
        )
        for row in range(len(tensors[0]))
    ]


def _unpadded(row: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens of a row, where it has one entry per token; the row otherwise. A copy, not a view of a batch."""
    # One number per token is an id; one float per entry is a logit per label.
    per_token = mask is not None and row.ndim > row.is_floating_point() and len(row) == len(mask)
    return row[mask] if per_token else row.clone()


def _joined(rows: list[Tensor], mask: Tensor | None, width: int | None) -> Tensor:
    """Rows as a batch, padded with zeros where the mask has padding."""
    if mask is None or rows[0].ndim < 2 or any(len(row) != n for row, n in zip(rows, mask.sum(1).tolist())):
        return torch.stack(rows)
    if bool(mask[:, 0].all()):  # padding, if any, on the right
        padded = pad_sequence(rows, batch_first=True)
        missing = (width or 0) - padded.shape[1]
        return padded if not missing else torch.nn.functional.pad(padded, (0, 0) * (padded.ndim - 2) + (0, missing))
    joined = rows[0].new_zeros(*mask.shape, *rows[0].shape[1:])
    joined[mask] = torch.cat(rows)
    return joined
