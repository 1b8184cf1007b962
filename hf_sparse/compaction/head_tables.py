"""Renumber heads in tables outside of the config, which name heads as [layer, head], after a plan removed some."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse.structure.attribute_names import HEAD_TABLES, HeadTable
from hf_sparse.structure.blocks import ModelStructure
from hf_sparse.structure.slicing import query_heads

logger = logging.get_logger(__name__)


def renumber_heads_(model: PreTrainedModel, structure: ModelStructure, kept: Mapping[str, Sequence[int]]) -> None:
    """Renumber the heads that a model's generation config names, in place, and warn of those that were removed.

    Args:
        model: its generation config is replaced if it has such a table.
        structure: of the model before it got smaller.
        kept: the units that every block has kept, by block name.
    """
    config: Any = vars(model).get("generation_config")
    for table in HEAD_TABLES:
        entries = [] if config is None else vars(config).get(table.name) or []
        numbers = _new_numbers(table, structure, kept)
        # Attention that cannot be pruned is not in the structure, and has all of its heads.
        moved = [(layer, head, numbers.get(layer, {head: head}).get(head)) for layer, head in entries]
        left = [[layer, now] for layer, _, now in moved if now is not None]
        if left == [list(entry) for entry in entries]:
            continue
        model.generation_config = config = copy.copy(config)
        if left:
            setattr(config, table.name, left)
        else:  # code that needs the table reports that it is missing
            delattr(config, table.name)
        if gone := [[layer, head] for layer, head, now in moved if now is None]:
            logger.warning(
                "%s in the generation config named %d heads, of which [layer, head] %s are removed",
                table.name,
                len(entries),
                gone,
            )


def _new_numbers(
    table: HeadTable, structure: ModelStructure, kept: Mapping[str, Sequence[int]]
) -> dict[int, dict[int, int]]:
    """Map, by layer, the old number of each head to its new one; removed heads have none."""
    numbers: dict[int, dict[int, int]] = {}
    for block in structure.blocks:
        if block.kind == "attention" and table.attention.search(block.name):
            heads = query_heads(block, torch.tensor(kept[block.name], dtype=torch.long))
            # Where projections are padded, attention still computes all heads.
            numbers[block.layer] = {head: head if block.padded else i for i, head in enumerate(heads)}
    return numbers
