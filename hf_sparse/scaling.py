"""Projections with scaled columns: what a gate does to a model.

`F.linear(x, W * s, b)` equals scaling the input, `F.linear(x * s, W, b)`, but its cost does not grow with the tokens
and nothing of the size of the activations is kept for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


class ColumnScale:
    """The scale that one projection applies to its columns during a forward, shape (columns,); None leaves it as is.

    It belongs to a forward and its backward, so copies of a model start without it.
    """

    def __init__(self, value: Tensor | None = None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "ColumnScale":
        return ColumnScale()

    def __reduce__(self) -> tuple[Any, ...]:
        return (ColumnScale, ())


class ScaledLinear(nn.Linear):
    """A linear layer with scaled columns. Instances are made by `scale_columns_`, from layers that exist."""

    column_scale: ColumnScale

    def forward(self, input: Tensor) -> Tensor:
        """The projection, shape (..., outputs)."""
        scale = self.column_scale.value
        weight = self.weight if scale is None else self.weight * scale.to(self.weight.dtype)
        return F.linear(input, weight, self.bias)


class ScaledConv1D(Conv1D):
    """GPT-2's transposed linear layer with scaled columns (rows of its weight)."""

    column_scale: ColumnScale

    def forward(self, x: Tensor) -> Tensor:
        """The projection, shape (..., outputs)."""
        scale = self.column_scale.value
        weight = self.weight if scale is None else self.weight * scale.to(self.weight.dtype).unsqueeze(1)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], self.nf)


_SCALED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: ScaledLinear, Conv1D: ScaledConv1D}
PROJECTIONS = frozenset([*_SCALED, *_SCALED.values()])
"""The exact types that can be scaled and sliced: their subclasses (adapters, quantized layers) compute other things."""

_PLAIN = {scaled: plain for plain, scaled in _SCALED.items()}


def scale_columns_(projection: nn.Module) -> ColumnScale:
    """Change the class of a projection in place so that it applies the scale that is returned."""
    scale = ColumnScale()
    projection.__class__ = _SCALED[type(projection)]
    projection.column_scale = scale  # type: ignore[assignment]
    return scale


def unscale_columns_(projection: nn.Module) -> None:
    """Undo `scale_columns_` in place; the weight is left as it is."""
    projection.__class__ = _PLAIN[type(projection)]
    del projection.column_scale
