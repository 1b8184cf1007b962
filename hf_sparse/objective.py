"""How dense a set of gates is: exactly, and as the differentiable p-norm that the objective penalises."""

import torch
from torch import Tensor


def exact_density(gates: Tensor, weights: Tensor) -> Tensor:
    """Cost-weighted share of the gates that are not zero.

    Args:
        gates: shape (n,), not negative.
        weights: cost share of every gate, shape (n,), summing to 1.

    Returns:
        The density, shape (), in [0, 1].
    """
    return torch.sum(weights * (gates > 0))


def effective_density(gates: Tensor, weights: Tensor, p: float) -> Tensor:
    """The p-norm of arXiv:1910.03201 as a density: with survivors of equal gates it is their share of the cost.

    The gates are read as a distribution f_i = g_i / sum_j w_j g_j over the cost w, whose norm of order p is
    (sum_i w_i f_i^p)^(1 / (1 - p)); for p = 1/2 and equal weights that is the paper's p-norm divided by n.

    Args:
        gates: shape (n,), not negative.
        weights: cost share of every gate, shape (n,), summing to 1.
        p: exponent, 0 < p < 1.

    Returns:
        The effective density, shape (), in (0, 1]; 0 if every gate is zero. Gradients at closed gates are 0.
    """
    total = torch.sum(weights * gates)
    alive = gates > 0
    # x^p has no gradient at 0: closed gates are replaced before the power and dropped after it.
    share = torch.where(alive, gates, 1.0) / torch.where(total > 0, total, 1.0)
    terms = torch.where(alive, weights * share**p, 0.0)
    moment = terms.sum()
    return torch.where(total > 0, torch.where(total > 0, moment, 1.0) ** (1 / (1 - p)), 0.0)
