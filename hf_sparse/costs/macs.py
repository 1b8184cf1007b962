"""Count multiply-accumulates: of a whole forward, and of every block by the number of units that are left."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_sparse.config import SparsityConfig
from hf_sparse.costs.table import CostTable, require_called, usual_multiple
from hf_sparse.runtime.contexts import evaluating, hooked
from hf_sparse.runtime.processes import once
from hf_sparse.structure.blocks import Block, ModelStructure
from hf_sparse.structure.dependencies import fresh
from hf_sparse.structure.example_inputs import undisturbed
from hf_sparse.structure.proof import scope_of, smaller_form


def count_macs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> int:
    """Count the multiply-accumulates of one forward in evaluation: projections, convolutions and attention scores."""
    with torch.no_grad(), evaluating(model), _plain_experts(model):
        return _counted(functools.partial(model, **inputs))


def mac_costs(
    model: PreTrainedModel, structure: ModelStructure, config: SparsityConfig, batch: Mapping[str, Any]
) -> CostTable:
    """Count the multiply-accumulates of every block in one forward, by the number of its units that are left.

    While the model runs once, the module around each block is run on the same arguments in three sizes; between them
    the cost is a straight line. A block that this batch does not use, such as one of a vision tower when there are only
    texts, costs as much as for one token. With several processes the main process counts.

    Args:
        model: without gates; left as it is.
        structure: its blocks.
        config: what numbers of neurons are rounded to; a `round_to` that was asked for is charged.
        batch: to run it on.

    Raises:
        SparsityError: the model cannot be run on such a batch.
    """

    def count() -> CostTable:
        blocks = structure.rounded(config.round_to or 1).blocks
        with torch.no_grad(), undisturbed(model), _plain_experts(model):
            counts = _counts(model, blocks, batch)
        tables = {block.name: _table(block, counts[block.name]) for block in blocks}
        return CostTable(tables, multiple=usual_multiple(structure, config))

    return once(count)


def _counts(model: PreTrainedModel, blocks: tuple[Block, ...], batch: Mapping[str, Any]) -> dict[str, dict[int, int]]:
    """Count for the module around each block with no, the fewest and all of its units, by block name."""
    called = require_called(model, batch)
    counts: dict[str, dict[int, int]] = {}
    handles = []

    def counting(forms: Mapping[int, nn.Module], counted: dict[int, int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for units, form in forms.items():
                counted[units] += _counted(functools.partial(form, *fresh(args), **fresh(kwargs)))

        return hook

    for block in blocks:
        scope = scope_of(block, called)
        module = model.get_submodule(scope)
        forms = {
            units: smaller_form(module, scope, [block], {block.name: torch.arange(units)})
            for units in {0, block.physical(1), block.units}
        }
        counts[block.name] = dict.fromkeys(forms, 0)
        handles.append((module, counting(forms, counts[block.name])))
    # Only now, since copies of a module have its hooks.
    with hooked([module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in handles]):
        model(**batch)
    return counts


def _table(block: Block, counted: Mapping[int, int]) -> tuple[float, ...]:
    """Compute the cost for every number of units from the counted ones."""
    few = block.physical(1)
    if counted[block.units] == counted[0]:
        return tuple(float(block.unit_macs * block.physical(units)) for units in range(block.units + 1))
    each = (counted[block.units] - counted[few]) / max(block.units - few, 1)
    any_unit = counted[few] - counted[0]
    return (0.0, *(any_unit + each * (block.physical(units) - few) for units in range(1, block.units + 1)))


# ---- One call ----


def _counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=_FUSED_ATTENTION) as counter:
        run()
    return counter.get_total_flops() // 2


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    """Count the scores of all queries with all keys, and their products with the values, as if none were masked."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_FUSED_ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): _attention_flops
    for name in (
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
        "attention_math_for_mps",
    )
}
"""Torch does not count all of these kernels, and none with fewer keys than queries."""


@contextmanager
def _plain_experts(model: PreTrainedModel) -> Iterator[None]:
    """Let experts run as plain products until the block ends, since grouped products are counted on no device."""
    experts = model.get_experts_implementation() if model._can_set_experts_implementation() else None
    try:
        if experts is not None:
            model.set_experts_implementation("eager")
        yield
    finally:
        if experts is not None:
            model.set_experts_implementation(experts)
