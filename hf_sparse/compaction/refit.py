"""Fit output projections to those of the teacher by least squares, in closed form.

After its units were removed, a sublayer has had only few gradient steps to make up for them. Its output is linear in
its last projection, so the squared error to the teacher's output has a minimum that is found exactly; the recovery then
starts from there (He et al., arXiv:1707.06168, section 3.2, for channels of convolutions).
"""

import inspect
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
    """Choose the projections that can be refitted: linear in both models (or only a bias is left), and equally wide.

    Frozen layers are left out, and experts, which see the tokens that are routed to them, not those of the teacher's.
    """
    modules, taught = dict(model.named_modules()), dict(teacher.named_modules())
    both = [(name, _width(modules.get(name)), _width(taught.get(name))) for name in projections]
    found = [name for name, own, other in both if own is not None and own == other and ".experts." not in name]
    return [name for name in found if all(parameter.requires_grad for parameter in modules[name].parameters())]


def depths(model: nn.Module) -> dict[str, int]:
    """Count the layers in every list of layers of a model, by path."""
    return {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}


def _width(module: nn.Module | None) -> int | None:
    """Return the number of outputs of a linear layer, or of a bias left of one; None for other modules."""
    if isinstance(module, BiasOnly):
        return module.size
    return widths(module)[1] if isinstance(module, nn.Linear | Conv1D) else None


@torch.no_grad()
def refit_(model: PreTrainedModel, teacher: nn.Module, projections: Sequence[str], inputs: Mapping[str, Any]) -> None:
    """Fit output projections to the teacher's in place, one after the other, in one forward.

    Each projection is fitted as soon as its inputs are computed, and computes its output with the new weights, so that
    later projections make up for its errors, too. A projection that runs several times, for several layers, has no
    single best fit, and stays as it is.

    Args:
        model: pruned, in evaluation mode.
        teacher: dense, in evaluation mode.
        projections: paths of linear layers of both models, as `refittable` finds them.
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
        teacher(**inputs, **_without_logits(teacher))
    handles = [model.get_submodule(name).register_forward_hook(fit(name)) for name in projections]
    with hooked(handles), streamed(model, inputs):
        model(**inputs, **_without_logits(model))


def _without_logits(model: nn.Module) -> dict[str, int]:
    """The argument that lets a language model compute logits of one token only: nobody reads them here."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Reshape values of shape (..., width) to (tokens, width), without padding if there is a mask."""
    if mask is not None and mask.shape == values.shape[:-1]:
        return values[mask.bool()]
    return values.flatten(0, -2)


def _fit_(module: nn.Module, inputs: Tensor, errors: Tensor) -> None:
    """Change a linear layer, or the bias left of one, in place, to add these errors to its outputs for these inputs."""
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
