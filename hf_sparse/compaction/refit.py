"""Least squares: output projections learn, in closed form, to say what those of the teacher say.

What is left of a sublayer after its units were removed is the best that few gradient steps could make of it. Its output
is linear in its last projection, so the squared error to the teacher's output has a minimum that is found exactly; the
recovery then starts from there (He et al., arXiv:1707.06168, section 3.2, for channels of convolutions).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_sparse.modeling_hf_sparse import BiasOnly
from hf_sparse.runtime.contexts import hooked
from hf_sparse.runtime.streaming import streamed
from hf_sparse.structure.dependencies import widths

RIDGE = 1e-2
"""Pull towards the weights that are there, in units of the mean square of the inputs."""


def refittable(model: nn.Module, teacher: nn.Module, projections: Sequence[str]) -> list[str]:
    """The projections that can be refitted: linear in both models (or only a bias is left), and equally wide.

    Layers that are frozen stay as they are, and experts, who see the tokens that are sent to them, not the teacher's.
    """
    modules, taught = dict(model.named_modules()), dict(teacher.named_modules())
    both = [(name, _width(modules.get(name)), _width(taught.get(name))) for name in projections]
    found = [name for name, own, other in both if own is not None and own == other and ".experts." not in name]
    return [name for name in found if all(parameter.requires_grad for parameter in modules[name].parameters())]


def depths(model: nn.Module) -> dict[str, int]:
    """How many layers a model has, by the path of every list of them."""
    return {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}


def _width(module: nn.Module | None) -> int | None:
    """Outputs of a linear layer; None if it is something else."""
    if isinstance(module, BiasOnly):
        return module.size
    return widths(module)[1] if isinstance(module, nn.Linear | Conv1D) else None


@torch.no_grad()
def refit_(model: PreTrainedModel, teacher: nn.Module, projections: Sequence[str], inputs: Mapping[str, Any]) -> None:
    """Change output projections in place, one after the other, so that they say what the teacher's do.

    All in one forward: each is fitted as soon as its inputs are there, and says what it has learnt, so that those after
    it make up for its errors, too. One that runs several times, for several layers, cannot say what each of them wants,
    and stays as it is.

    Args:
        model: pruned, in evaluation mode.
        teacher: dense, in evaluation mode.
        projections: paths of linear layers of both, as `refittable` finds them.
        inputs: one batch, without labels.
    """
    mask = inputs.get("attention_mask")
    wanted: dict[str, list[Tensor]] = {name: [] for name in projections}

    def listen(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            wanted[name].append(_tokens(output, mask))

        return hook

    def fit(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            targets = wanted.pop(name, [])
            if len(targets) != 1 or not targets[0].numel() or targets[0].shape != _tokens(output, mask).shape:
                return None
            _fit_(module, _tokens(args[0], mask), targets[0] - _tokens(output, mask))
            refitted: Tensor = module.forward(*args)
            return refitted

        return hook

    with hooked([teacher.get_submodule(name).register_forward_hook(listen(name)) for name in projections]):
        teacher(**inputs)
    handles = [model.get_submodule(name).register_forward_hook(fit(name)) for name in projections]
    with hooked(handles), streamed(model, inputs):
        model(**inputs)


def _tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values of shape (..., width) as (tokens, width), without padding where a mask says what that is."""
    if mask is not None and mask.shape == values.shape[:-1]:
        return values[mask.bool()]
    return values.flatten(0, -2)


def _fit_(module: nn.Module, inputs: Tensor, errors: Tensor) -> None:
    """Change a linear layer, or the bias left of one, in place by what its outputs for some inputs lack."""
    bias = module._parameters.get("bias")
    inputs = inputs[:, : 0 if isinstance(module, BiasOnly) else None].double()
    width = inputs.shape[1]
    if bias is not None:
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
    gram = inputs.T @ inputs
    pull = RIDGE * gram.diagonal()[:width].sum() / max(width, 1)
    gram.diagonal()[:width] += torch.where(pull > 0, pull, 1.0)  # inputs that are all zero tell nothing
    change = torch.linalg.solve(gram, inputs.T @ errors.double())
    if bias is not None:
        bias.add_(change[-1].to(bias.dtype))
    if width:
        weight = module.get_parameter("weight")
        weight.add_((change[:width] if isinstance(module, Conv1D) else change[:width].T).to(weight.dtype))
