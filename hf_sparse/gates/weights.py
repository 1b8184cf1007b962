"""Put gates on the weights of linear layers, fix what they have learnt, and leave exact zeros.

The model keeps its shapes and stays a stock one; `hf_sparse.compaction.sparse_tensors` makes sparse tensors of its
weights.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_sparse.config import WeightSparsityConfig
from hf_sparse.errors import SparsityError
from hf_sparse.gates.base import BANK, SteeredGates, attached_gates, log_importances
from hf_sparse.gates.controller import Controller
from hf_sparse.gates.mathematics import GateGroup
from hf_sparse.gates.patterns import pattern_of
from hf_sparse.gates.scaling import Scaler, attach_scaler_, detach_scaler_
from hf_sparse.structure.prunable import require_prunable
from hf_sparse.structure.selection import frozen_parameters

logger = logging.get_logger(__name__)

MASKS = "sparsity_masks"
"""Name of the submodule that holds the masks, which keep weights at zero that the search has closed."""


def matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Find the linear layers of the base model, by path, without those whose weight is another module's, too.

    Task heads and embeddings are left out: they are small, or read row by row.

    Raises:
        SparsityError: gates or masks are attached, so that weights are not what their layers compute with.
    """
    if attached_gates(model) is not None or MASKS in model._modules:
        raise SparsityError(
            "the weights of this model are read through gates or masks: call trainer.fold() first, which leaves exact "
            "zeros in them (or trainer.compact(), if the gates are those of heads and neurons)"
        )
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    shared: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    return {
        prefix + name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and shared[id(module.weight)] == 1
    }


class WeightGates(SteeredGates):
    """The gates of weights, or of blocks of weights; all of them compete, or with 2:4 those of every four.

    Args:
        layers: linear layers by path.
        config: pattern, gate and controller settings.

    Raises:
        SparsityError: none of them can have the pattern.
    """

    config: WeightSparsityConfig
    start_density = 1.0
    _usual_warm_start = 1.0  # single weights get noisy gradients, so more is left to the start

    def __init__(self, layers: Mapping[str, nn.Module], config: WeightSparsityConfig) -> None:
        super().__init__()
        self.config = config
        self.pattern = pattern_of(config.pattern, config.block_size)
        turned = {name: isinstance(layer, Conv1D) for name, layer in layers.items()}
        shapes = {name: tuple(cast(Tensor, layer.weight).shape) for name, layer in layers.items()}
        shapes = {name: shape[::-1] if turned[name] else shape for name, shape in shapes.items()}
        self.shapes = {name: shape for name, shape in shapes.items() if self.pattern.fits(*shape)}
        """(outputs, inputs) of every matrix."""
        if not self.shapes:
            raise SparsityError(
                f"no linear layer can have pattern={config.pattern!r}: their sizes are {sorted(set(shapes.values()))}"
            )
        self.turned = turned
        pooled = [self.pattern.pool(torch.empty(shape, device="meta")).shape for shape in self.shapes.values()]
        self.sizes = [shape[-1] for shape in pooled]
        total = sum(self.sizes)
        self.group = GateGroup(self.pattern.shares(total), "relative", config.t0)
        self.controller = Controller(config.controller_gain, torch.ones(1), torch.tensor([config.density]))

    # ---- Gates ----

    def group_gates(self) -> dict[str, Tensor]:
        """Compute all gates, shape (n,), or (4, n) with 2:4."""
        return {"weights": self.group()}

    def scales(self) -> dict[str, Tensor]:
        """Compute the gate of every weight, by path of its layer."""
        return self._laid_out(self.group())

    def _laid_out(self, gates: Tensor) -> dict[str, Tensor]:
        parts = zip(self.shapes.items(), gates.split(self.sizes, -1))
        spread = {name: self.pattern.spread(part, *shape) for (name, shape), part in parts}
        return {name: scale.T if self.turned[name] else scale for name, scale in spread.items()}

    def masks(self) -> dict[str, Tensor]:
        """Choose the weights that stay, bool, by path of their layer."""
        return self._laid_out(self.pattern.kept(self.group.alpha.detach(), self.group().detach()))

    def pooled(self, name: str, values: Tensor) -> Tensor:
        """Sum values over the weights of every gate of a layer."""
        return self.pattern.pool(values.T if self.turned[name] else values)

    def start_from_(self, sensitivities: Mapping[str, Tensor], power: float) -> None:
        """Set the importances in place to a power of the sensitivities; every gate stays exactly 1."""
        scores = torch.cat([sensitivities[name] for name in self.shapes], -1)
        if scores.any():
            self.group.open_(log_importances(scores, power).to(self.group.alpha))

    # ---- How dense they are ----

    @property
    def largest_unit(self) -> float:
        """The share of the weights that one gate scales."""
        return 1 / self.group.alpha.numel()

    @torch.no_grad()
    def density(self, gates: dict[str, Tensor]) -> Tensor:
        """Compute the share of weights with open gates, shape (); with 2:4 as if at least two of four were open."""
        return self.pattern.density(gates["weights"])

    def densities(self, gates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return nothing: weights are of one kind, which is the whole."""
        return {}

    def steered_densities(self, gates: dict[str, Tensor]) -> Tensor:
        """Compute the density of the model, shape (1,)."""
        return self.density(gates).unsqueeze(0)

    def penalties(self, gates: dict[str, Tensor]) -> Tensor:
        """Compute the effective density, shape (1,); with 2:4 only of groups of which more than two gates are open."""
        return self.pattern.penalized(gates["weights"], self.group.weights, self.config.p).unsqueeze(0)


class WeightMasks(Scaler):
    """Keeps weights at zero: they are read through masks, which a checkpoint to resume from carries.

    Args:
        masks: by path of their layer, bool, of the shape of its weight.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(masks)
        for index, mask in enumerate(masks.values()):
            self.register_buffer(str(index), mask)

    def scales(self) -> dict[str, Tensor]:
        """Return the masks, by path of their layer."""
        return {name: self.get_buffer(str(index)) for index, name in enumerate(self.names)}


def attach_weight_gates(model: PreTrainedModel, config: WeightSparsityConfig) -> WeightGates:
    """Attach gates to the weights of a model's linear layers, in place; every gate is 1, so outputs do not change.

    Layers whose weights are frozen get none, unless the whole model is frozen.

    Args:
        model: any model of transformers.
        config: pattern, gate and controller settings.

    Returns:
        The gates, also registered as a submodule of the model.

    Raises:
        SparsityError: gates or masks are attached already, or it is not a model of transformers with plain weights, or
            no linear layer can have the pattern.
    """
    require_prunable(model)
    if attached_gates(model) is not None:
        raise SparsityError("this model has gates already: detach them first")
    layers, frozen = matrices(model), frozen_parameters(model)
    trained = {name: layer for name, layer in layers.items() if f"{name}.weight" not in frozen}
    if len(trained) < len(layers):
        logger.warning(
            "%d of %d linear layers are frozen and keep all weights.", len(layers) - len(trained), len(layers)
        )
    bank = WeightGates(trained, config)
    attach_scaler_(model, BANK, bank, {name: f"{name}.weight" for name in bank.shapes})
    return bank


def attach_masks(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
    """Let the weights of linear layers be read through masks, by path of the layer, in place."""
    attach_scaler_(model, MASKS, WeightMasks(masks), {name: f"{name}.weight" for name in masks})


@torch.no_grad()
def fix_weights_(model: PreTrainedModel) -> None:
    """Multiply the gates into the weights of a model, in place, and mask the weights whose gates are closed.

    Raises:
        SparsityError: no gates on weights are attached.
    """
    bank = attached_gates(model)
    if not isinstance(bank, WeightGates):
        raise SparsityError("this model has no gates on its weights: call attach_weight_gates(model, config) first")
    masks, scales = bank.masks(), bank.scales()
    detach_scaler_(model, BANK)
    for name, mask in masks.items():
        weight = model.get_parameter(f"{name}.weight")
        weight.mul_((scales[name] * mask).to(weight.dtype))
    attach_masks(model, masks)


@torch.no_grad()
def fold_weights_(model: PreTrainedModel) -> None:
    """Make a model with gates or masks on its weights a plain one with exact zeros, in place."""
    if attached_gates(model) is not None:
        fix_weights_(model)
    masks = model._modules.get(MASKS)
    if isinstance(masks, WeightMasks):
        scales = masks.scales()
        detach_scaler_(model, MASKS)
        for name, mask in scales.items():
            model.get_parameter(f"{name}.weight").mul_(mask)


def parameter_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, without those of gates."""
    named = model.named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in named if not name.startswith(BANK)}


def weight_densities(model: PreTrainedModel) -> dict[str, float]:
    """Compute the share of weights that are not zero, by path of the linear layer.

    Raises:
        SparsityError: gates or masks are attached.
    """
    weights = {name: model.get_parameter(f"{name}.weight") for name in matrices(model)}
    return {name: weight.count_nonzero().item() / math.prod(weight.shape) for name, weight in weights.items()}
