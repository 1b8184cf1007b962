"""Estimate sensitivities on whole batches: one backward pass tells the slopes of all of its rows apart.

A gate that scales an input column of a linear layer has, for a row of the batch, the slope sum_t x_t dL/dx_t over the
row's tokens. That is the slope of the row's own loss, times the weight of this loss in that of the batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.gates.base import SteeredGates
from hf_sparse.gates.sensitivity import precise, slopes_of
from hf_sparse.runtime.contexts import hooked
from hf_sparse.runtime.processes import once

Batch = Mapping[str, Any]
LossOf = Callable[[Batch], Tensor]

NO_LABEL = -100
"""The label of what has none."""


def batched_sensitivities(
    model: nn.Module, gates: SteeredGates, batches: Iterable[Batch], alone: Sequence[Batch], loss_of: LossOf
) -> dict[str, Tensor] | None:
    """Compute what `sensitivities` computes on the rows of these batches, in one backward pass for each batch.

    Args:
        model: which the gates are attached to.
        gates: of it.
        batches: of some rows each.
        alone: the first and the last row of the first batch, each as a batch of its own, to check with.
        loss_of: computes the model's loss on a batch.

    Returns:
        By the names of the scales, each of the shape of its gates, as there. None where rows cannot be told apart:
        gates scale something else than columns of linear layers, or the batch's loss is no mean of those of its rows.
    """
    layers = {name: model.get_submodule(path.rpartition(".")[0]) for name, path in gates.paths.items()}
    if not (gates.scales_inputs or all(isinstance(layer, nn.Linear | Conv1D) for layer in layers.values())):
        return None
    totals = {name: torch.zeros(()) for name in layers}
    weigh, count = None, 0
    for batch in batches:
        slopes = _row_slopes(layers, gates, batch, loss_of)
        if weigh is None:
            expected = [slopes_of(gates, row, loss_of) for row in alone]
            seen = [slopes is not None and _agree(rule(batch), slopes, expected) for rule in WEIGHTS]
            fitting: list[bool] = once(partial(list, seen))
            weigh = next((rule for rule, fits in zip(WEIGHTS, fitting) if fits), None)
        if weigh is None or slopes is None:
            return None
        weights = weigh(batch)
        for name, slope in slopes.items():
            counted = weights.to(slope).unsqueeze(1)
            squares = torch.where(counted > 0, slope / counted, 0.0).square()
            totals[name] = totals[name].to(slope) + squares.sum(0)
        count += len(weights)
    return {name: total / count for name, total in totals.items()} if count else None


def _row_slopes(
    layers: Mapping[str, nn.Module], gates: SteeredGates, batch: Batch, loss_of: LossOf
) -> dict[str, Tensor] | None:
    """Compute the slopes of a batch's loss by the gates of each row, shape (rows, gates); None if layers see no rows.

    Args:
        layers: whose input columns the gates scale, by names of scales.
        gates: of the model.
        batch: some rows.
        loss_of: computes the model's loss on it.
    """
    inputs: list[tuple[str, Tensor]] = []

    def apart(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            values = args[0].view_as(args[0]) if args[0].requires_grad else args[0].detach().requires_grad_()
            inputs.append((name, values))  # nothing but this layer reads them
            return (values, *args[1:])

        return hook

    with torch.enable_grad():
        with hooked([layer.register_forward_pre_hook(apart(name)) for name, layer in layers.items()]):
            loss = loss_of(batch)
        read = [(name, values) for name, values in inputs if values.requires_grad]  # not in forwards without gradients
        found = torch.autograd.grad(loss, [values for _, values in read], materialize_grads=True)
    with torch.no_grad():
        shapes = {name: scale.shape for name, scale in gates.scales().items()}
    slopes: dict[str, Tensor] = {}
    for (name, values), slope in zip(read, found):
        shape = shapes[name]
        if values.ndim < 2 or len(values) != _rows(batch) or values.shape[-1] != shape.numel():
            return None
        products = values.detach().to(precise(slope)) * slope
        columns = products.reshape(len(values), -1, shape.numel()).sum(1)
        own = torch.stack([gates.pooled(name, of_row.reshape(shape)) for of_row in columns])
        slopes[name] = slopes[name] + own if name in slopes else own
    return slopes if slopes.keys() == layers.keys() else None


def _rows(batch: Batch) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)


def _agree(weights: Tensor, slopes: Mapping[str, Tensor], expected: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether the slopes of the first and the last row are those of their own losses, weighted so."""
    for place, row in zip((0, -1), expected):
        for name, own in row.items():
            weighted = own * weights[place].to(own)
            distance = (slopes[name][place].to(own) - weighted).norm()
            if not distance <= torch.finfo(torch.float32).eps ** 0.5 * 10 * weighted.norm():
                return False
    return True


# ---- How much the loss of each row counts in that of its batch, shape (rows,) ----


def _alike(batch: Batch) -> Tensor:
    return torch.full((_rows(batch),), 1 / _rows(batch))


def _by_labels(batch: Batch, first: int = 0) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim < 2:
        return _alike(batch)
    counts = (labels[:, first:] != NO_LABEL).flatten(1).sum(1).cpu()
    return counts / counts.sum()


def _by_next_labels(batch: Batch) -> Tensor:
    return _by_labels(batch, first=1)


WEIGHTS = (_alike, _by_labels, _by_next_labels)
