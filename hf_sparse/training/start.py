"""Prepare the search: discover what is prunable, count what it costs, and attach gates."""

from contextlib import suppress
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse.config import SparsityConfig
from hf_sparse.costs.table import COUNTED, CostTable
from hf_sparse.errors import UnknownInputsError
from hf_sparse.gates.attach import attach_gates
from hf_sparse.gates.units import GateBank
from hf_sparse.runtime.contexts import plain_forward
from hf_sparse.runtime.processes import once
from hf_sparse.structure.blocks import ModelStructure
from hf_sparse.structure.dependencies import FORWARD_ERRORS
from hf_sparse.structure.discovery import discover
from hf_sparse.structure.example_inputs import undisturbed
from hf_sparse.training.calls import LossCalls

logger = logging.get_logger(__name__)


def attach_found_gates(
    model: PreTrainedModel, config: SparsityConfig, calls: LossCalls, costs: CostTable | None = None
) -> GateBank:
    """Find out what can be pruned in a model, and put gates on it, in place.

    Args:
        model: without gates.
        config: of the stage that begins.
        calls: for batches of the data.
        costs: of the model that the run began with; taken now by default.
    """
    with plain_forward(model):
        structure = discovered(model, calls)
        inputs = _cost_batch(model, config, calls) if costs is None else None
        return attach_gates(model, config, inputs, costs, structure)


def discovered(model: PreTrainedModel, calls: LossCalls) -> ModelStructure:
    """What can be pruned in a model, found by a batch of the data if no other input can be made up."""
    try:
        return once(lambda: discover(model))
    except UnknownInputsError:
        if not calls.has_data:
            raise
        batch = calls.verification_batch()
        return once(lambda: discover(model, batch))


def _cost_batch(model: PreTrainedModel, config: SparsityConfig, calls: LossCalls) -> dict[str, Any] | None:
    """A batch of the data to count or time costs on; None to do so on one that is made up."""
    if config.cost in COUNTED or not calls.has_data:
        return None
    batch = calls.verification_batch(config.cost_batch_size)

    def runs() -> bool:
        with undisturbed(model), suppress(*FORWARD_ERRORS):
            model(**batch)
            return True
        return False

    if once(runs):
        return batch
    logger.warning("The model cannot be run on a batch of the data alone: costs are those of a made-up batch.")
    return None
