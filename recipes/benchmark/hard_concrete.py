"""A peer: L0 regularization by hard-concrete gates with a Lagrangian on the sparsity, for heads and neurons.

Gates of Louizos et al. (arXiv:1712.01312), the Lagrangian with a warm-up of its target as in CoFi (arXiv:2204.00408,
section 3). The structure is fixed at a share of the steps and cut, and the rest of the steps recovers, as for everyone.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from hf_sparse import PruningPlan
from hf_sparse.costs.table import CostTable
from hf_sparse.gates.scaling import scale_parameter_, unscale_
from hf_sparse.structure.blocks import ModelStructure

LOWER, UPPER, TEMPERATURE = -0.1, 1.1, 2 / 3


class HardConcreteGates(nn.Module):
    """A gate per unit, sampled while training; attached to the model until `detach`."""

    def __init__(self, model: PreTrainedModel, structure: ModelStructure, costs: CostTable) -> None:
        super().__init__()
        self.structure = structure
        # Gates start open with probability 0.95 or so; a little noise breaks the tie.
        self.log_alpha = nn.ParameterList([nn.Parameter(2.5 + 0.01 * torch.randn(b.units)) for b in structure.blocks])
        self.multipliers = nn.Parameter(torch.zeros(2))
        self.shares = [block.unit_cost / costs.prunable for block in structure.blocks]
        self.model = [model]  # in a list, so that it is no submodule
        self.scales = [scale_parameter_(model.get_submodule(b.output), "weight") for b in structure.blocks]
        self.hook = model.register_forward_pre_hook(self._open)

    def _open(self, module: nn.Module, args: Any) -> None:
        for block, alpha, scale in zip(self.structure.blocks, self.log_alpha, self.scales):
            scale.value = block.column_scale(self._sample(alpha, module.training), 2)

    def _sample(self, alpha: Tensor, training: bool) -> Tensor:
        if training:
            noise = torch.empty_like(alpha).uniform_(1e-6, 1 - 1e-6)
            alpha = (noise.logit() + alpha) / TEMPERATURE
        return (torch.sigmoid(alpha) * (UPPER - LOWER) + LOWER).clamp(0, 1)

    def expected_density(self) -> Tensor:
        """The expected share of the prunable cost whose gates are not zero."""
        shift = TEMPERATURE * math.log(-LOWER / UPPER)
        return torch.stack([s * torch.sigmoid(a - shift).sum() for s, a in zip(self.shares, self.log_alpha)]).sum()

    def lagrangian(self, density: float) -> Tensor:
        """l1 (d - t) + l2 (d - t)^2, which the gates descend and the multipliers ascend."""
        excess = self.expected_density() - density
        return self.multipliers[0] * excess + self.multipliers[1] * excess**2

    @torch.no_grad()
    def plan(self, target: float) -> PruningPlan:
        """The units most likely to be open, as many as the target leaves."""
        units = [
            (alpha, block.name, unit, share)
            for block, alphas, share in zip(self.structure.blocks, self.log_alpha, self.shares)
            for unit, alpha in enumerate(alphas.tolist())
        ]
        kept: dict[str, list[int]] = {block.name: [] for block in self.structure.blocks}
        left = 1 - target
        for _, name, unit, share in sorted(units, reverse=True):
            if left < share / 2:
                break
            kept[name].append(unit)
            left -= share
        return PruningPlan({name: tuple(sorted(indices)) for name, indices in kept.items()})

    @torch.no_grad()
    def fold_(self) -> None:
        """Multiply the gates into the weights in place, and take them off."""
        (model,) = self.model
        self.hook.remove()
        for block, alpha in zip(self.structure.blocks, self.log_alpha):
            module = model.get_submodule(block.output)
            unscale_(module)
            model.get_parameter(block.weight.parameter).mul_(block.column_scale(self._sample(alpha, False), 2))


class LagrangianCallback(TrainerCallback):
    """Descends the Lagrangian beside the loss, with an optimizer of its own for gates and multipliers."""

    def __init__(self, gates: HardConcreteGates, target: float, warmup: int, learning_rate: float) -> None:
        self.gates, self.target, self.warmup = gates, target, warmup
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(gates.log_alpha), "lr": learning_rate},
                {"params": [gates.multipliers], "lr": learning_rate, "maximize": True},
            ]
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        density = 1 - self.target * min(1.0, state.global_step / self.warmup)
        self.gates.lagrangian(density).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class StopAt(TrainerCallback):
    """Ends training at a step, with the learning rate schedule of a longer run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def constant_learning_rate(trainer: Trainer) -> None:
    """Keep a trainer's learning rate where it starts, as ours is while it searches."""
    optimizer = trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
