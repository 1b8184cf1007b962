"""Weigh the loss of a micro-batch in its optimizer step, as Trainer does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.distillation.answers import input_masks, token_mask


@dataclass(frozen=True)
class Share:
    """The share of a micro-batch in its optimizer step, as a Trainer has it for the loss of the task.

    Attributes:
        num_items: labelled items of the whole accumulated batch; None where they are not counted.
        is_taken: whether the Trainer takes a loss for a share of its step already, and does not divide it.
        micro_batches: of this step.
        processes: whose items `num_items` counts.
        shifts_labels: whether the label of an item is that of the next one.
    """

    num_items: Tensor | int | None
    is_taken: bool
    micro_batches: int
    processes: int
    shifts_labels: bool

    def of(self, mean: Tensor) -> Tensor:
        """The mean over a micro-batch, divided by their number in a step where Trainer will not do so."""
        return mean / self.micro_batches if self.is_taken else mean

    def mean_over_items(self, model: PreTrainedModel, losses: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The mean as Trainer takes it: over the labelled items of the whole accumulated batch where it counts them.

        Where labels are not one of each item, over all but padding.

        Args:
            model: bare.
            losses: one of each item.
            inputs: of the forward, with the labels that its loss is for.
        """
        labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
        if isinstance(shifted, Tensor) and shifted.shape == losses.shape:
            counted = shifted != -100
        elif isinstance(labels, Tensor) and labels.shape == losses.shape:
            if self.shifts_labels:
                losses, labels = losses[..., :-1], labels[..., 1:]
            counted = labels != -100
        else:
            reader = "decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"
            mask = token_mask(model, input_masks(inputs)[reader], losses.shape)
            return self.of(losses.mean() if mask is None else (losses * mask).sum() / mask.sum())
        total = torch.where(counted, losses, 0.0).sum()
        if self.num_items is None or not self.is_taken:
            return self.of(total / counted.sum().clamp(min=1))
        return total / self.num_items * self.processes
