"""Attach gates to a model, detach them, and read the plan that they have learnt.

All gates are computed once per forward, by a hook of the model, since a group spans its layers; each block's gates
then scale the columns of its output projection.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse.config import SparsityConfig
from hf_sparse.costs.latency import measured_costs
from hf_sparse.costs.macs import count_macs, mac_costs
from hf_sparse.costs.table import COUNTED, CostTable, cost_batch
from hf_sparse.errors import SparsityError
from hf_sparse.gates.base import BANK, attached_gates
from hf_sparse.gates.layout import filled, widest_counts
from hf_sparse.gates.plan import PruningPlan
from hf_sparse.gates.scaling import attach_scaler_, detach_scaler_
from hf_sparse.gates.units import GateBank
from hf_sparse.runtime.processes import once
from hf_sparse.structure.blocks import ModelStructure
from hf_sparse.structure.discovery import discover
from hf_sparse.structure.example_inputs import placed
from hf_sparse.structure.prunable import require_prunable
from hf_sparse.structure.selection import selected
from hf_sparse.structure.stock import expressible, require_loadable

logger = logging.get_logger(__name__)

FAR_APART = 150
"""Parameters of the largest unit over those of the smallest from which on kinds share the target.

Of attention with as many kv heads as heads, all 64 wide, a head has 128 times as many as a neuron of two matrices.
"""


def gate_bank(model: nn.Module) -> GateBank | None:
    """Return the gates of heads and neurons attached to a model, or None."""
    bank = attached_gates(model)
    return bank if isinstance(bank, GateBank) else None


def attach_gates(
    model: PreTrainedModel,
    config: SparsityConfig,
    inputs: Mapping[str, Any] | None = None,
    costs: CostTable | None = None,
    structure: ModelStructure | None = None,
) -> GateBank:
    """Attach gates to a model in place; every gate is 1, so its outputs do not change.

    Args:
        model: a model in which `discover` finds blocks.
        config: gate, group, cost and controller settings; the gates have those that follow from the model filled in.
        inputs: a batch that the model can be run on, from any device: for `discover`, and to count or measure costs on.
            By default both get a batch made from the model's config, `discover` a small one, and the costs one of the
            size that `config` gives.
        costs: of the blocks, or of the larger ones that they were cut from; blocks without a cost then get no gates. By
            default they are counted or measured as `config` asks.
        structure: what `discover` finds, if that is known, or the part of it to prune.

    Returns:
        The gates, also registered as a submodule of the model.

    Raises:
        SparsityError: gates are attached already, or there is nothing to prune, or the target would leave nothing, or
            the model is not of a class of transformers, or a pattern of the config matches no block.
    """
    require_prunable(model)
    if attached_gates(model) is not None:
        raise SparsityError("this model has gates already: call detach_gates(model) first")
    inputs = None if inputs is None else placed(inputs, model.device)
    whole = discover(model, inputs) if structure is None else structure
    if costs is None:
        require_loadable(model)
        structure = selected(model, whole, config)
    else:
        structure = replace(whole, blocks=tuple(block for block in whole.blocks if block.name in costs.blocks))
    if config.layout == "uniform":
        chosen, structure = structure.blocks, expressible(model, structure)
        if 0 < len(structure.blocks) < len(chosen):
            logger.warning("Some blocks keep all of their units, such as %s: %s.", *structure.refused[-1])
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
    if costs is None:
        costs = _costs(model, structure, config, inputs)
    config = replace(config, group=config.group or _usual_group(structure, config))
    structure = structure.rounded(costs.multiple)
    gated = {block.name: block for block in structure.blocks}
    whole = replace(whole, blocks=tuple(gated.get(block.name, block) for block in whole.blocks))
    bank = GateBank(structure, config, costs, whole)
    if bank.target_density < bank.largest_unit:
        raise SparsityError(
            f"target {bank.target:g} would remove everything: the most expensive unit alone is "
            f"{bank.largest_unit:.2%} of the prunable cost, so give a target of at most "
            f"{1 - bank.largest_unit - bank.filling:.4f}"
        )
    paths = {
        block.name: f"{block.output}.{block.weight.parameter.rpartition('.')[2]}" for block in bank.structure.blocks
    }
    attach_scaler_(model, BANK, bank, paths)
    return bank


def _costs(
    model: PreTrainedModel, structure: ModelStructure, config: SparsityConfig, inputs: Mapping[str, Any] | None
) -> CostTable:
    whole = config.target_of == "all"
    if config.cost in COUNTED:
        table = COUNTED[config.cost](structure, config)
        return replace(table, rest=model.num_parameters() - table.prunable) if whole else table
    batch = cost_batch(model, config, inputs)
    if config.cost == "latency":
        return measured_costs(model, structure, config, batch)
    table = mac_costs(model, structure, config, batch)
    return replace(table, rest=once(lambda: count_macs(model, batch)) - table.prunable) if whole else table


def _usual_group(structure: ModelStructure, config: SparsityConfig) -> Literal["kind", "model"]:
    """Choose which units compete, if nobody says: kinds share the target where their units are of very different size.

    Where the gates of a few large units move as fast as those of thousands of small ones, the large ones close first.
    """
    sizes = [block.unit_cost for block in structure.blocks]
    apart = max(sizes) > FAR_APART * min(sizes)
    return "model" if apart and config.may_share_target else "kind"


def detach_gates(model: PreTrainedModel) -> None:
    """Remove the gates from a model in place; its weights stay as they are, without the gates multiplied in.

    Raises:
        SparsityError: no gates are attached.
    """
    require_bank(model)
    detach_scaler_(model, BANK)


def require_bank(model: nn.Module) -> GateBank:
    """Return the gates of heads and neurons attached to a model.

    Raises:
        SparsityError: there are none.
    """
    bank = gate_bank(model)
    if bank is None:
        raise SparsityError("this model has no gates: call attach_gates(model, config) first")
    return bank


@torch.no_grad()
def current_plan(model: PreTrainedModel) -> PruningPlan:
    """Read the plan that gates have learnt: the units whose gates are not zero now, in every gated block.

    Their number is rounded up with closed units: to a multiple (`SparsityConfig.round_to`), and in a uniform layout to
    the same number in all blocks of a kind.

    Raises:
        SparsityError: no gates are attached.
    """
    bank = require_bank(model)
    kept = {name: tuple(gate.nonzero().flatten().tolist()) for name, gate in bank.block_gates().items()}
    blocks = bank.structure.blocks
    if bank.config.layout == "uniform":
        counts = widest_counts(kept, blocks)
    else:
        counts = {block.name: block.physical(len(kept[block.name])) for block in blocks}
    return PruningPlan(filled(kept, counts, bank.block_importances()))
