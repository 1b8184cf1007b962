"""Choose the blocks of a model that get gates: all that are not excluded by name and not frozen."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse.config import SparsityConfig
from hf_sparse.errors import SparsityError
from hf_sparse.structure.blocks import Block, ModelStructure
from hf_sparse.structure.slicing import base_path

logger = logging.get_logger(__name__)

SHOWN = 4
"""Blocks that a message names."""


def selected(model: PreTrainedModel, structure: ModelStructure, config: SparsityConfig) -> ModelStructure:
    """Choose the blocks to prune: those that `include` names, without those that `exclude` names or that are frozen.

    Args:
        model: before anything but its owner has changed which of its parameters train.
        structure: what `discover` has found in it.
        config: `include` and `exclude`.

    Returns:
        The structure with the chosen blocks alone.

    Raises:
        SparsityError: a pattern matches no block, or no block is left.
    """
    base, blocks = base_path(model), structure.blocks
    if not blocks:
        return structure
    included = _matching(["*"] if config.include is None else config.include, blocks, base, "include")
    excluded = _matching(config.exclude or [], blocks, base, "exclude")
    named = [block for block in blocks if block.name in included - excluded]
    untrained = frozen_parameters(model)
    frozen = [block for block in named if all(part.parameter in untrained for part in block.slices)]
    if len(frozen) == len(named):
        raise SparsityError(
            f"nothing is left to prune: of {len(blocks)} blocks, {len(named)} are left by include and exclude, and "
            f"{len(frozen)} of these are frozen: let their parameters train, or freeze the whole model, which then "
            "learns gates alone"
        )
    if frozen:
        logger.warning(
            "%d of %d blocks are frozen and keep all of their units (%s).", len(frozen), len(blocks), _some(frozen)
        )
    gated = {block.name for block in named} - {block.name for block in frozen}
    return replace(structure, blocks=tuple(block for block in blocks if block.name in gated))


def frozen_parameters(model: nn.Module) -> set[str]:
    """Name the parameters that do not train; none if the whole model is frozen, since then only gates learn."""
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {name for name, does in trains.items() if not does} if any(trains.values()) else set()


def _matching(patterns: Sequence[str], blocks: Sequence[Block], base: str, option: str) -> set[str]:
    """Names of the blocks that match one of some patterns.

    Raises:
        SparsityError: a pattern that none of them matches.
    """
    found: set[str] = set()
    for pattern in patterns:
        names = {block.name for block in blocks if any(fnmatchcase(path, pattern) for path in _paths(block.name, base))}
        if not names:
            raise SparsityError(
                f"{option} has {pattern!r}, which matches no block: they are called {_some(blocks)} "
                "(print(discover(model)) shows all)"
            )
        found |= names
    return found


def _paths(name: str, base: str) -> set[str]:
    """A block and the modules that it is in, by their paths from the model and from its base model."""
    parts = name.split(".")
    paths = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return paths | {path.removeprefix(f"{base}.") for path in paths}


def _some(blocks: Sequence[Block]) -> str:
    """The names of the first ones, for messages."""
    names = [block.name for block in blocks]
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
