"""How much the loss depends on every unit: the estimate that importances start from."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.structure import ModelStructure


def sensitivities(
    model: nn.Module,
    structure: ModelStructure,
    rows: Iterable[Mapping[str, Any]],
    loss_of: Callable[[Mapping[str, Any]], Tensor],
) -> dict[str, Tensor]:
    """Mean square of dL/dg for a gate g = 1 on every unit: the diagonal of the empirical Fisher information.

    Kwon et al., arXiv:2204.09656, equation 7. Squares are taken row by row, so that they do not depend on batches.

    Args:
        model: with or without gates; left as it is.
        structure: its blocks.
        rows: batches of one row each.
        loss_of: the model's loss on one of them.

    Returns:
        By block name, shape (units,), in float32.
    """
    parameters = dict(model.named_parameters())
    weights = [parameters[block.weight.parameter] for block in structure.blocks]
    totals = {block.name: torch.zeros(block.units, device=w.device) for block, w in zip(structure.blocks, weights)}
    count = 0
    for row in rows:
        count += 1
        with torch.enable_grad():
            slopes = torch.autograd.grad(loss_of(row), weights, allow_unused=True)
        for block, weight, slope in zip(structure.blocks, weights, slopes):
            if slope is not None:
                columns = (slope.float() * weight.detach().float()).movedim(block.weight.dim, 0).flatten(1).sum(1)
                totals[block.name] += columns[block.columns.to(columns.device)].sum(1).square()
    return {name: total / max(count, 1) for name, total in totals.items()}
