"""How much the loss depends on what every gate scales: the estimate that importances start from."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Pools = Mapping[str, tuple[str, Callable[[Tensor], Tensor]]]
"""By name of some gates: the path of the weight that they scale, and what sums values of its shape to one per gate."""


def sensitivities(
    model: nn.Module,
    pools: Pools,
    rows: Iterable[Mapping[str, Any]],
    loss_of: Callable[[Mapping[str, Any]], Tensor],
) -> dict[str, Tensor]:
    """Mean square of dL/dg for every gate g = 1: the diagonal of the empirical Fisher information.

    Kwon et al., arXiv:2204.09656, equation 7. Squares are taken row by row, so that they do not depend on batches.

    Args:
        model: with or without gates; left as it is.
        pools: what the gates scale.
        rows: batches of one row each.
        loss_of: the model's loss on one of them.

    Returns:
        By name, of the shape of the gates, in float32.
    """
    parameters = dict(model.named_parameters())
    weights = {name: parameters[path] for name, (path, _) in pools.items()}
    totals = {name: torch.zeros_like(pool(weights[name].detach().float())) for name, (_, pool) in pools.items()}
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    count = 0
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        for row in rows:
            count += 1
            with torch.enable_grad():
                slopes = torch.autograd.grad(loss_of(row), list(weights.values()), allow_unused=True)
            for (name, weight), slope in zip(weights.items(), slopes):
                if slope is not None:
                    totals[name] += pools[name][1](slope.float() * weight.detach().float()).square()
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    return {name: total / max(count, 1) for name, total in totals.items()}
