"""Estimate how much the loss depends on every gate; importances start from it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_sparse.gates.base import SteeredGates


def sensitivities(
    gates: SteeredGates, rows: Iterable[Mapping[str, Any]], loss_of: Callable[[Mapping[str, Any]], Tensor]
) -> dict[str, Tensor]:
    """Compute the mean square of dL/dg for every gate g = 1: the diagonal of the empirical Fisher information.

    Kwon et al., arXiv:2204.09656, equation 7. Squares are taken row by row, so that they do not depend on batches. All
    forwards of a loss count, but for those without gradients.

    Args:
        gates: attached to a model.
        rows: batches of one row each.
        loss_of: computes the model's loss on one of these batches.

    Returns:
        By the names of the scales, each of the shape of its gates, in float32, or float64 for a model in float64.
    """
    totals: dict[str, Tensor] = {}
    count = 0
    for row in rows:
        count += 1
        for name, slope in slopes_of(gates, row, loss_of).items():
            totals[name] = totals[name] + slope.square() if name in totals else slope.square()
    return {name: total / count for name, total in totals.items()}


def slopes_of(
    gates: SteeredGates, batch: Mapping[str, Any], loss_of: Callable[[Mapping[str, Any]], Tensor]
) -> dict[str, Tensor]:
    """Compute dL/dg for every gate g = 1, by the names of the scales, each of the shape of its gates."""
    with gates.leaves() as scales, torch.enable_grad():
        slopes = torch.autograd.grad(loss_of(batch), list(scales.values()), materialize_grads=True)
    return {name: gates.pooled(name, slope.to(precise(slope))) for name, slope in zip(scales, slopes)}


def precise(values: Tensor) -> torch.dtype:
    """The dtype to sum values in: float32, or their own if that has more bits."""
    return torch.promote_types(values.dtype, torch.float32)
