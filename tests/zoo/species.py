"""What a species of the zoo is, and how its weights are drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

VOCABULARY = 99


@dataclass(frozen=True)
class Species:
    """A tiny random model of one model type.

    Attributes:
        family: what it reads and writes: "encoder", "decoder", "sequence to sequence", "vision", "audio" or
            "multimodal".
        make: builds the model, in evaluation mode, the same weights every time.
        inputs: keyword arguments of one forward of that model.
    """

    family: str
    make: Callable[[], PreTrainedModel]
    inputs: Callable[[], dict[str, Any]]


def initialized(model: PreTrainedModel) -> PreTrainedModel:
    """Weights and biases large enough that dropping anything shows in the outputs; in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Tables of sines stay as they are, since checkpoints don't have them.
            if name not in (model._keys_to_ignore_on_save or ()):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0  # as every checkpoint has it
            if isinstance(module, nn.LayerNorm | nn.GroupNorm) or "Norm" in type(module).__name__:
                for name, parameter in module.named_parameters(recurse=False):
                    if name == "weight":
                        parameter.add_(1.0)
    return model.eval()


def tokens(batch: int = 2, length: int = 10) -> torch.Tensor:
    """Random token ids that are no special tokens of any species, shape (batch, length)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, VOCABULARY - 5, (batch, length), generator=generator)


def noise(*shape: int) -> torch.Tensor:
    """Standard normal values, as pixels or audio features."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
