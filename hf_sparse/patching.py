"""Attach gates to a model, detach them, and read off the plan that they have learnt.

All gates are computed once per forward, by a hook of the model, since a group spans its layers; each block's gates
then scale the columns of its output projection.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.config import SparsityConfig
from hf_sparse.controller import Controller
from hf_sparse.discovery import discover
from hf_sparse.errors import SparsityError
from hf_sparse.gates import GateGroup
from hf_sparse.layout import filled, uniform_counts
from hf_sparse.objective import DENSITIES, exact_density
from hf_sparse.plan import PruningPlan
from hf_sparse.scaling import ParameterScale, scale_parameter_, unscale_parameter_
from hf_sparse.stock import expressible
from hf_sparse.structure import Block, ModelStructure

BANK = "sparsity_gates"
"""Name of the submodule that holds the gates of a model; their parameters start with it in checkpoints."""


class GateBank(nn.Module):
    """The gates of a model, in groups that compete, with the controller that steers their penalty.

    Args:
        structure: the blocks to gate.
        config: gate, group, cost and controller settings.
    """

    def __init__(self, structure: ModelStructure, config: SparsityConfig) -> None:
        super().__init__()
        self.config = config
        self.structure = structure
        self.groups: dict[str, GateGroup] = {}
        self.shares: dict[str, float] = {}
        self.members: dict[str, list[Block]] = {}
        for block in structure.blocks:
            together = config.group == "kind" and config.layout == "free"
            name = block.kind if together else block.name.replace(".", "-")
            self.members.setdefault(name, []).append(block)
        costs = {
            name: torch.cat([torch.full((block.units,), float(self._unit_cost(block))) for block in blocks])
            for name, blocks in self.members.items()
        }
        self.total_cost = sum(float(cost.sum()) for cost in costs.values())
        for name, cost in costs.items():
            self.groups[name] = GateGroup(cost / cost.sum(), config.gate, config.t0)
            self.add_module(name, self.groups[name])
            self.shares[name] = float(cost.sum()) / self.total_cost
        self.controller = Controller(config.controller_gain, self._targets())
        self._scales: dict[str, tuple[ParameterScale, int]] = {}

    def _unit_cost(self, block: Block) -> int:
        return block.cost_of_unit(self.config.cost, self.config.cost_sequence_length)

    def _targets(self) -> Tensor:
        """The densities to descend to: that of the model, or in a uniform layout that of every block."""
        density = 1.0 - self.config.target
        if self.config.layout == "free":
            return torch.tensor([density])
        blocks = self.structure.blocks
        counts = uniform_counts(blocks, {block.name: self._unit_cost(block) for block in blocks}, density)
        return torch.tensor([counts[block.kind] / block.units for block in blocks])

    @property
    def target_density(self) -> float:
        """The density to end at: the one asked for, or in a uniform layout the nearest to it that there is."""
        if self.config.layout == "free":
            return 1.0 - self.config.target
        shares = torch.tensor(list(self.shares.values()))
        return float((shares * self.controller.targets.cpu()).sum())

    @property
    def largest_unit(self) -> float:
        """Share of the prunable cost that the most expensive unit has."""
        return max(self._unit_cost(block) for block in self.structure.blocks) / self.total_cost

    def group_gates(self) -> dict[str, Tensor]:
        """The gates of every group, shape (units of the group,), differentiable until the structure is fixed."""
        fixed = self.controller.fixed
        gates = {name: group() for name, group in self.groups.items()}
        # A fixed gate stays in the graph with zero gradient, for DDP expects the same parameters in every step.
        return {name: torch.where(fixed, gate.detach(), gate) for name, gate in gates.items()}

    def block_gates(self) -> dict[str, Tensor]:
        """The gates of every block, shape (units,)."""
        gates = {}
        for name, group_gates in self.group_gates().items():
            parts = group_gates.split([block.units for block in self.members[name]])
            gates.update({block.name: part for block, part in zip(self.members[name], parts)})
        return gates

    def open(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model: compute the gates and hand each projection its scale."""
        gates = self.block_gates()
        for block in self.structure.blocks:
            scale, ndim = self._scales[block.name]
            scale.value = block.column_scale(gates[block.name], ndim)

    def densities(self, gates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Exact cost-weighted density per group, shape ()."""
        return {name: exact_density(gates[name].detach(), group.weights) for name, group in self.groups.items()}

    def density(self, gates: dict[str, Tensor]) -> Tensor:
        """Exact cost-weighted density of the model, shape ().

        In a uniform layout that of what will stay: as many units in every block of a kind as the widest of them has.
        """
        densities = self.densities(gates)
        if self.config.layout == "uniform":
            kinds = {name: self.members[name][0].kind for name in densities}
            widest = {
                kind: torch.stack([value for name, value in densities.items() if kinds[name] == kind]).max()
                for kind in kinds.values()
            }
            densities = {name: widest[kind] for name, kind in kinds.items()}
        return torch.stack([self.shares[name] * value for name, value in densities.items()]).sum()

    def steered_densities(self, gates: dict[str, Tensor]) -> Tensor:
        """What the controller holds to its schedule, shape (k,): the model's density, or every block's."""
        if self.config.layout == "free":
            return self.density(gates).unsqueeze(0)
        return torch.stack(list(self.densities(gates).values()))

    def penalties(self, gates: dict[str, Tensor]) -> Tensor:
        """The parts of R that a lambda each is for, shape (k,): effective densities times their share of the cost."""
        density = DENSITIES[self.config.gate]
        parts = torch.stack(
            [
                self.shares[name] * density(gates[name], group.weights, self.config.p)
                for name, group in self.groups.items()
            ]
        )
        return parts.sum(0, keepdim=True) if self.config.layout == "free" else parts

    def penalty(self, gates: dict[str, Tensor]) -> Tensor:
        """R: the effective densities of the groups, weighted by their share of the cost, shape (), 1 at the start."""
        return self.penalties(gates).sum()


def gate_bank(model: nn.Module) -> GateBank | None:
    """The gates attached to a model, or None."""
    bank = model._modules.get(BANK)
    return bank if isinstance(bank, GateBank) else None


def attach_gates(model: PreTrainedModel, config: SparsityConfig, inputs: Mapping[str, Any] | None = None) -> GateBank:
    """Attach gates to a model in place; every gate is 1, so its outputs do not change.

    Args:
        model: any that `discover` finds something in.
        config: gate, group, cost and controller settings.
        inputs: a small batch that it can be run on, for `discover`; made from its config by default.

    Returns:
        The gates, also registered as a submodule of the model.

    Raises:
        SparsityError: gates are attached already, or there is nothing to prune, or the target would leave nothing.
    """
    if gate_bank(model) is not None:
        raise SparsityError("this model has gates already: call detach_gates(model) first")
    structure = discover(model, inputs)
    if config.layout == "uniform":
        structure = expressible(model, structure)
    if not structure.blocks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in structure.refused)
        raise SparsityError(
            f"{type(model).__name__} has no attention heads or FFN neurons that can be pruned exactly"
            + (f" ({reasons})" if reasons else "")
            + (
                ": give a transformer with plain, unquantized projections"
                if config.layout == "free"
                else ": take layout='free'"
            )
        )
    bank = GateBank(structure, config)
    if (1 - config.target) < bank.largest_unit:
        raise SparsityError(
            f"target {config.target} would remove everything: the most expensive unit alone is "
            f"{bank.largest_unit:.2%} of the prunable cost, so give a target of at most {1 - bank.largest_unit:.4f}"
        )
    for block in structure.blocks:
        name = block.weight.parameter.rpartition(".")[2]
        module = model.get_submodule(block.output)
        bank._scales[block.name] = scale_parameter_(module, name), module.get_parameter(name).ndim
    model.add_module(BANK, bank.to(next(model.parameters()).device))
    model.register_forward_pre_hook(bank.open)
    return bank


def detach_gates(model: PreTrainedModel) -> None:
    """Take the gates off a model in place; its weights stay as they are, without the gates folded in.

    Raises:
        SparsityError: no gates are attached.
    """
    bank = require_bank(model)
    for block in bank.structure.blocks:
        unscale_parameter_(model.get_submodule(block.output))
    # A handle does not survive copying the model, so the hook is found by the bank that it belongs to.
    for key, hook in list(model._forward_pre_hooks.items()):
        if getattr(hook, "__self__", None) is bank:
            del model._forward_pre_hooks[key]
    del model._modules[BANK]


def require_bank(model: nn.Module) -> GateBank:
    """The gates attached to a model.

    Raises:
        SparsityError: there are none.
    """
    bank = gate_bank(model)
    if bank is None:
        raise SparsityError("this model has no gates: call attach_gates(model, config) first")
    return bank


@torch.no_grad()
def current_plan(model: PreTrainedModel) -> PruningPlan:
    """The units whose gates are not zero now, for every gated block.

    In a uniform layout, with as many closed ones that all blocks of a kind keep the same number.

    Raises:
        SparsityError: no gates are attached.
    """
    bank = require_bank(model)
    kept = {name: tuple(gate.nonzero().flatten().tolist()) for name, gate in bank.block_gates().items()}
    return PruningPlan(kept if bank.config.layout == "free" else filled(kept, bank.structure.blocks))
