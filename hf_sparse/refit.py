"""Least squares: output projections learn, in closed form, to say what those of the teacher say.

What is left of a sublayer after its units were removed is the best that few gradient steps could make of it. Its output
is linear in its last projection, so the squared error to the teacher's output has a minimum that is found exactly; the
recovery then starts from there (He et al., arXiv:1707.06168, section 3.2, for channels of convolutions).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.modeling_hf_sparse import BiasOnly
from hf_sparse.probing import hooked, sizes

RIDGE = 1e-2
"""Pull towards the weights that are there, in units of the mean square of the inputs."""


def refittable(model: nn.Module, teacher: nn.Module, projections: Sequence[str]) -> list[str]:
    """Those of some paths where the model has a linear layer, or the bias left of one, and the teacher one as wide.

    Layers that are frozen stay as they are.
    """
    modules, taught = dict(model.named_modules()), dict(teacher.named_modules())
    widths = [(name, _width(modules.get(name)), _width(taught.get(name))) for name in projections]
    found = [name for name, own, other in widths if own is not None and own == other]
    return [name for name in found if all(parameter.requires_grad for parameter in modules[name].parameters())]


def depths(model: nn.Module) -> dict[str, int]:
    """How many layers a model has, by the path of every list of them."""
    return {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}


def _width(module: nn.Module | None) -> int | None:
    """Outputs of a linear layer; None if it is something else."""
    if isinstance(module, BiasOnly):
        return module.size
    return sizes(module)[1] if isinstance(module, nn.Linear | Conv1D) else None


@torch.no_grad()
def refit_(
    model: nn.Module, teacher: nn.Module, projections: Sequence[str], batches: Sequence[Mapping[str, Any]]
) -> None:
    """Change output projections in place, one after the other, so that they say what the teacher's do.

    Each sees inputs from a model in which those before it are refitted already, and so makes up for their errors too.

    Args:
        model: pruned, in evaluation mode.
        teacher: dense, in evaluation mode.
        projections: paths of linear layers of both, as `refittable` finds them, in the order in which they run.
        batches: of inputs, without labels.
    """
    wanted = [{name: output for name, (_, output) in _seen(teacher, projections, batch).items()} for batch in batches]
    for name in projections:
        module = model.get_submodule(name)
        bias = module._parameters.get("bias")
        gram, moment = torch.zeros(()), torch.zeros(())
        for batch, targets in zip(batches, wanted):
            inputs, outputs = _seen(model, [name], batch)[name]
            inputs = inputs[:, : 0 if isinstance(module, BiasOnly) else None].double()
            if bias is not None:
                inputs = torch.cat([inputs, torch.ones_like(outputs[:, :1], dtype=torch.double)], 1)
            gram = gram + inputs.T @ inputs
            moment = moment + inputs.T @ (targets[name] - outputs).double()
        width = len(gram) - (bias is not None)
        gram.diagonal()[:width] += RIDGE * gram.diagonal()[:width].sum() / max(width, 1)
        change = torch.linalg.solve(gram, moment)
        if bias is not None:
            bias.add_(change[-1].to(bias.dtype))
        if width:
            weight = module.get_parameter("weight")
            weight.add_((change[:width] if isinstance(module, Conv1D) else change[:width].T).to(weight.dtype))


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

    with hooked([model.get_submodule(name).register_forward_hook(keep(name)) for name in names]):
        model(**batch)
    return seen
