"""Replace weights with many zeros by sparse tensors, which run faster where torch has kernels for them."""

import warnings
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured
from transformers import PreTrainedModel

from hf_sparse.errors import SparsityError
from hf_sparse.gates.patterns import GROUP, KEPT
from hf_sparse.gates.weights import matrices
from hf_sparse.runtime.copies import set_parameter_

Layout = Literal["csr", "bsr", "2:4"]

DENSEST = 0.1
"""Layers that keep a larger share of their weights stay dense: sparse products are no faster for them."""


@torch.no_grad()
def to_sparse_(model: PreTrainedModel, layout: Layout, block_size: int = 32, densest: float = DENSEST) -> list[str]:
    """Replace weights of linear layers by sparse tensors, in place, for inference; outputs stay the same.

    Such a model can neither be trained nor saved: save it before. Run it under `torch.no_grad()`, not in inference
    mode, whose tensors torch's sparse products do not accept.

    Args:
        model: without gates or masks, as `trainer.fold()` leaves it.
        layout: "csr" for single weights and "bsr" for blocks, which torch multiplies on CPUs and GPUs; "2:4" for
            NVIDIA GPUs that skip two of four weights, in half precision.
        block_size: rows and columns of a block of "bsr".
        densest: layers that keep a larger share of their weights, or blocks, stay dense; not used for "2:4".

    Returns:
        The layers that were changed, by path.

    Raises:
        SparsityError: gates or masks are attached, this device has no kernels for the layout, or no layer is sparse
            enough; nothing is changed.
    """
    if layout not in get_args(Layout):
        raise SparsityError(f"layout is {layout!r}: choose one of {', '.join(get_args(Layout))}")
    if layout == "2:4" and model.device.type != "cuda":
        raise SparsityError(f"torch skips two of four weights on NVIDIA GPUs only, and this is {model.device}")
    layers = matrices(model)
    weights = {
        name: model.get_parameter(f"{name}.weight").detach()
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear)
    }
    if layers and not weights:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers.values()}))
        raise SparsityError(f"sparse tensors take the place of the weights of nn.Linear, and this model has {kinds}")
    sparse: dict[str, Tensor] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        for name, weight in weights.items():
            if layout == "2:4":
                if _two_of_four(weight):
                    sparse[name] = to_sparse_semi_structured(weight)
            elif layout == "csr":
                sparse[name] = weight.to_sparse_csr()
            elif all(length % block_size == 0 for length in weight.shape):
                sparse[name] = weight.to_sparse_bsr(block_size)
    if layout != "2:4":
        sparse = {
            name: made for name, made in sparse.items() if made.values().numel() <= densest * weights[name].numel()
        }
    if not sparse:
        raise SparsityError(f"no linear layer has zeros enough for layout={layout!r}")
    for name, made in sparse.items():
        set_parameter_(model, f"{name}.weight", nn.Parameter(made, requires_grad=False))
    return list(sparse)


def _two_of_four(weight: Tensor) -> bool:
    return weight.shape[1] % GROUP == 0 and int(weight.unflatten(1, (-1, GROUP)).count_nonzero(-1).max()) <= KEPT
