"""Least squares: output projections learn, in closed form, to say what those of the teacher say.

What is left of a sublayer after its units were removed is the best that few gradient steps could make of it. Its output
is linear in its last projection, so the squared error to the teacher's output has a minimum that is found exactly; the
recovery then starts from there (He et al., arXiv:1707.06168, section 3.2, for channels of convolutions).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

RIDGE = 1e-2
"""Pull towards the weights that are there, in units of the mean square of the inputs."""


@torch.no_grad()
def refit_(
    model: PreTrainedModel, teacher: PreTrainedModel, projections: Sequence[str], batches: Sequence[Mapping[str, Any]]
) -> None:
    """Change output projections in place, one after the other, so that they say what the teacher's do.

    Each sees inputs from a model in which those before it are refitted already, and so makes up for their errors too.

    Args:
        model: pruned, in evaluation mode.
        teacher: with modules of the same names and widths, in evaluation mode.
        projections: paths of linear layers, in the order in which they run.
        batches: of inputs, without labels.
    """
    wanted = [_seen(teacher, projections, batch) for batch in batches]
    for name in projections:
        module = model.get_submodule(name)
        gram: Any = 0.0
        moment: Any = 0.0
        for batch, targets in zip(batches, wanted):
            inputs, outputs = _seen(model, [name], batch)[name]
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1).double()
            gram = gram + inputs.T @ inputs
            moment = moment + inputs.T @ (targets[name][1] - outputs).double()
        gram.diagonal().add_(RIDGE * gram.diagonal()[:-1].mean() if len(gram) > 1 else 0.0)
        change = torch.linalg.solve(gram, moment)
        weight = module.get_parameter("weight")
        weight.add_((change[:-1] if isinstance(module, Conv1D) else change[:-1].T).to(weight.dtype))
        if module._parameters.get("bias") is not None:
            module.get_parameter("bias").add_(change[-1].to(weight.dtype))


def _seen(model: nn.Module, names: Sequence[str], batch: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """(inputs, outputs) of linear layers by path, shape (tokens, width), without padding."""
    seen = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            mask = batch.get("attention_mask")
            if mask is not None and mask.shape == output.shape[:-1]:
                seen[name] = args[0][mask.bool()], output[mask.bool()]
            else:
                seen[name] = args[0].flatten(0, -2), output.flatten(0, -2)

        return hook

    with _hooks([model.get_submodule(name).register_forward_hook(keep(name)) for name in names]):
        model(**batch)
    return seen


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
