"""The gate mathematics of arXiv:1910.03201: tensors in, tensors out.

n competing components have importances gamma = exp(alpha) and share one learnt threshold
tau = sigmoid(beta) * ||gamma||_1. Gradient descent on alpha and beta moves components below the threshold, where
their gate is exactly zero. Both gates are invariant to adding a constant to alpha. A group divides them by their first
values, so that all are exactly 1 at the start, where sigmoid(beta) = t0 / n.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_MARGIN = 0.5
"""How far above the threshold, in log importance, every component starts."""

SPREAD = 1e-3
"""How far apart, in log importance, components start that are equal: else they could only close all at once."""


def _log_threshold_ratio(alpha: Tensor, beta: Tensor) -> Tensor:
    """log(tau / gamma), the shape of alpha; logarithms keep it finite however far the importances drift apart."""
    return F.logsigmoid(beta) + torch.logsumexp(alpha, 0) - alpha


def relative_gate(alpha: Tensor, beta: Tensor) -> Tensor:
    """g_i = relu(1 - tau / gamma_i): bounded by 1, and 1 - t0 for equal components at the start.

    Args:
        alpha: log importances, shape (n,), or (n, groups) for many groups at once.
        beta: threshold logit, shape (), or (groups,).

    Returns:
        The gates, of the shape of alpha.
    """
    # relu(1 - exp(x)) without the cancellation near x = 0 and without exp overflowing where the gate is closed.
    return -torch.expm1(_log_threshold_ratio(alpha, beta).clamp(max=0.0))


def simplex_gate(alpha: Tensor, beta: Tensor) -> Tensor:
    """g_i = n * a_i with a_i = relu(gamma_i - tau) / sum_j relu(gamma_j - tau), equations 3 to 6 of the paper.

    Args:
        alpha: log importances, shape (n,).
        beta: threshold logit, shape ().

    Returns:
        The gates, shape (n,); their mean is 1 while any is open.
    """
    gamma = (alpha - alpha.max().detach()).exp()
    above = F.relu(gamma - torch.sigmoid(beta) * gamma.sum())
    # The constant cancels in the ratio; it makes equal components exactly 1, so that their mean is exactly 1 too.
    above = above / above.max().detach().clamp(min=torch.finfo(above.dtype).tiny)
    return above / above.mean().clamp(min=torch.finfo(above.dtype).tiny)


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"relative": relative_gate, "simplex": simplex_gate}


class Float32Module(nn.Module):
    """A module whose own tensors keep their dtype when the surrounding model is cast.

    model.to(bfloat16) and model.half() must move the gates but not round them: whether a gate near its threshold is
    open or closed depends on less than half precision can represent.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class GateGroup(Float32Module):
    """Owns alpha and beta of n components that compete; fp32 whatever dtype the surrounding model is cast to.

    Args:
        shares: what every component costs, as a share of all that can be pruned, shape (n,); or (n, groups) for
            many groups of relative gates, each with a threshold of its own.
        gate: "relative" or "simplex".
        t0: initial threshold in units of the mean initial importance.
    """

    weights: Tensor
    opening: Tensor

    def __init__(self, shares: Tensor, gate: str, t0: float) -> None:
        super().__init__()
        n = len(shares)
        self.function = GATES[gate]
        self.share = float(shares.sum())
        """The cost of all components together."""
        self.alpha = nn.Parameter(torch.zeros(shares.shape, dtype=torch.float32))
        share = t0 / n
        self.first_beta = math.log(share) - math.log1p(-share)
        self.beta = nn.Parameter(torch.zeros(shares.shape[1:], dtype=torch.float32))
        total = shares.sum(0)
        self.register_buffer("weights", (shares / torch.where(total > 0, total, 1.0)).float())
        self.register_buffer("opening", torch.ones(shares.shape))
        self.reopen_()

    @torch.no_grad()
    def reopen_(self) -> None:
        """Make all components equally important and every gate exactly 1, in place, as at the start."""
        self.beta.fill_(self.first_beta)
        self.open_(torch.zeros_like(self.alpha))

    @torch.no_grad()
    def open_(self, alpha: Tensor) -> None:
        """Set the log importances in place and every gate to exactly 1.

        Args:
            alpha: of the shape of the gates; those below the threshold, log(t0) under the mean importance, are lifted
                above it, and all are moved by up to `SPREAD`, the same way each time.
        """
        n = len(alpha)
        spread = SPREAD * torch.rand(alpha.shape, generator=torch.Generator().manual_seed(0)).to(alpha)
        alpha = alpha - torch.logsumexp(alpha, 0) + math.log(n)
        threshold = F.logsigmoid(self.beta) + math.log(n)
        self.alpha.copy_(alpha.clamp(min=threshold + LEAST_MARGIN) + spread)
        # Computed by the gate's own arithmetic, so that the division gives exactly 1 and not 1 up to rounding.
        self.opening.copy_(self.function(self.alpha, self.beta))

    def forward(self) -> Tensor:
        """Compute the gates, shape (n,) or (n, groups)."""
        return self.function(self.alpha, self.beta) / self.opening
