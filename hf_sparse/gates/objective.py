"""Compute how dense gates leave a model, as the differentiable p-norm that the objective penalises."""

from collections.abc import Callable

import torch
from torch import Tensor


def _moment(gates: Tensor, weights: Tensor, p: float) -> Tensor:
    """sum_i w_i g_i^p over the first dimension; a closed gate adds 0 and has gradient 0, where x^p itself has none."""
    alive = gates > 0
    return torch.where(alive, weights * torch.where(alive, gates, 1.0) ** p, 0.0).sum(0)


def relative_density(gates: Tensor, weights: Tensor, p: float) -> Tensor:
    """||g||_p^p over the cost: the share of the cost that survives, if survivors are fully open.

    For gates that are bounded by themselves. It also counts how far they are open, so it lies below the exact density
    while they close.

    Args:
        gates: shape (n,), not negative; or (n, groups) for many groups at once.
        weights: cost share of every gate in its group, of the same shape, summing to 1.
        p: exponent, 0 < p < 1.

    Returns:
        The effective density, shape (), or (groups,).
    """
    return _moment(gates, weights, p)


def simplex_density(gates: Tensor, weights: Tensor, p: float) -> Tensor:
    """The p-norm of arXiv:1910.03201, as a density: the share of the cost that survives, if survivors are equal.

    Gates on a simplex are a distribution f_i = g_i / sum_j w_j g_j over the cost, whose L1 norm is constant. Its norm
    of order p is (sum_i w_i f_i^p)^(1 / (1 - p)); for p = 1/2 and equal weights, the paper's p-norm divided by n.

    Args:
        gates: shape (n,), not negative.
        weights: cost share of every gate, shape (n,), summing to 1.
        p: exponent, 0 < p < 1.

    Returns:
        The effective density, shape (), in [0, 1].
    """
    total = torch.sum(weights * gates)
    some = total > 0
    moment = _moment(gates / torch.where(some, total, 1.0), weights, p)
    return torch.where(some, torch.where(some, moment, 1.0) ** (1 / (1 - p)), 0.0)


DENSITIES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "relative": relative_density,
    "simplex": simplex_density,
}
