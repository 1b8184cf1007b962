"""Measure how long blocks take on this device by the number of units that are left, and remember it on disk."""

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse.config import SparsityConfig
from hf_sparse.costs.table import CostTable, require_called, usual_multiple
from hf_sparse.errors import SparsityError
from hf_sparse.runtime.files import write_whole
from hf_sparse.runtime.processes import once
from hf_sparse.runtime.timing import device_name, shortest_ms
from hf_sparse.structure.blocks import Block, ModelStructure
from hf_sparse.structure.dependencies import fresh, record_calls
from hf_sparse.structure.example_inputs import main_input, shape_text, undisturbed
from hf_sparse.structure.proof import scope_of, smaller_form

logger = logging.get_logger(__name__)

CACHE = Path(HF_HOME) / "hf_sparse" / "latency"
POINTS = 16  # numbers of units that are timed; between them, straight lines
REPEATS = 9
MULTIPLES = (1, 8, 16, 32, 64)  # of neurons, that a device may like
WIDTHS = 6  # that multiples are compared on
SHARES = (0.0, 0.001, 1 / 16, 1 / 8, 0.25, 0.5, 0.75, 1.0)
"""Shares of all units that whole models are timed with, closer together where few stay; the second is a unit per block.

A block that has any unit takes some time, however few there are. By itself that is most of what a small block takes; in
the whole model caches, or what a GPU has not finished yet, hide some of it.
"""

MOST_FOR_A_QUARTER = 0.6  # of the time of all units that a quarter of them may take without a warning
GAIN = 0.01  # a larger multiple has to be faster by this share

Counts = Mapping[int, float]
"""Milliseconds by the number of units that are left."""


def measured_costs(
    model: PreTrainedModel, structure: ModelStructure, config: SparsityConfig, batch: Mapping[str, Any]
) -> CostTable:
    """Measure the cost of every block, and of the rest of the model, in milliseconds on its device and in its dtype.

    With several processes the main process measures, while the others wait for the result.

    Args:
        model: without gates; left as it is.
        structure: its blocks.
        config: what numbers of neurons are rounded to.
        batch: to time.

    Raises:
        SparsityError: the model cannot be run on such a batch, or its blocks take no measurable time on it.
    """

    def measure() -> CostTable:
        with torch.no_grad(), undisturbed(model):
            return _Stopwatch(model, batch).costs(structure, config)

    return once(measure)


class _Stopwatch:
    """Times blocks of a model on a batch."""

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
        self.model = model
        self.batch = batch
        self.called = require_called(model, batch)
        self.about = {
            "device": device_name(model.device),
            "torch": torch.__version__,
            "attention": model.config._attn_implementation,
            "batch": {name: list(value.shape) for name, value in self.batch.items() if isinstance(value, Tensor)},
        }
        self.measured: dict[str, list[float]] = {}

    def costs(self, structure: ModelStructure, config: SparsityConfig) -> CostTable:
        """Measure the cost table of all blocks.

        By itself a block finds its weights in caches that the whole model does not leave them in. So what blocks take
        beside each other is measured one by one, and what they take together in whole models of several sizes.
        """
        measured = config.round_to == 0
        multiple = self._preferred_multiple(structure) if measured else usual_multiple(structure, config)
        blocks = structure.rounded(multiple).blocks
        tables = {block.name: _table(block, self._times(block, _counts(block))) for block in blocks}
        sizes = [{block.name: _typical(block, share) for block in blocks} for share in SHARES]
        about = {"shapes": _shapes(self.model), "sizes": sizes}
        rest, *times = self._shortest(about, self.model, "", blocks, sizes)
        together = list(itertools.accumulate((0.0, *(time - rest for time in times)), max))
        alone = [sum(tables[name][count] for name, count in size.items()) for size in sizes]
        self._check(alone, together)
        total = alone[-1]
        scaled = {
            name: table[-1] * np.interp(np.divide(table, table[-1] or 1.0), np.divide(alone, total), together) / total
            for name, table in tables.items()
        }
        return CostTable({name: tuple(table.tolist()) for name, table in scaled.items()}, rest, multiple)

    def _check(self, alone: Sequence[float], together: Sequence[float]) -> None:
        """Refuse, or warn of, a batch in which fewer units save no time, by the times of `SHARES` of all units."""
        name = main_input(self.model, self.batch)
        batch = f"{shape_text(name, self.batch[name].shape)} on {self.about['device']}"
        whole, quarter = together[-1], together[SHARES.index(0.25)]
        if 0 in (alone[-1], whole):
            raise SparsityError(
                f"heads and neurons take no time that can be measured in a batch of {batch}: give a larger "
                "cost_batch_size or cost_sequence_length, or count macs"
            )
        if quarter > MOST_FOR_A_QUARTER * whole:
            logger.warning(
                "In a batch of %s, a quarter of all heads and neurons takes %.0f%% of the time of all: it is too small "
                "to keep the device busy, and fewer of them save little. Give a larger cost_batch_size, or count macs.",
                batch,
                100 * quarter / whole,
            )

    def _times(self, block: Block, counts: Sequence[int]) -> Counts:
        """Measure how much longer the module around a block takes with these numbers of units than with none."""
        scope = scope_of(block, self.called)
        module = self.model.get_submodule(scope)
        about = {
            "kind": block.kind,
            "units": block.units,
            "columns": block.columns.shape[1],
            "output": block.output.rpartition(".")[2],
            "shapes": _shapes(module),
            "sizes": list(counts),
        }
        times = self._shortest(about, module, scope, [block], [{block.name: count} for count in counts])
        return {count: max(0.0, time - times[0]) for count, time in zip(counts, times)}

    def _shortest(
        self,
        about: Mapping[str, Any],
        module: nn.Module,
        path: str,
        blocks: Sequence[Block],
        sizes: Sequence[Mapping[str, int]],
    ) -> list[float]:
        """Measure the shortest time of a module, by its path, with each of some numbers of units by block name.

        Remembered by all that it depends on: `about` has what is not the same for the whole model and batch.
        """
        key = json.dumps({**self.about, "module": type(module).__qualname__, **about}, sort_keys=True)
        found = self.measured.get(key) or _remembered(key, len(sizes))
        if found is None:
            call = record_calls(self.model, self.batch, {path})[path]
            forms = [
                smaller_form(module, path, blocks, {name: torch.arange(count) for name, count in size.items()})
                for size in sizes
            ]
            runs = [functools.partial(form, *fresh(call.args), **fresh(dict(call.kwargs))) for form in forms]
            found = shortest_ms(runs, self.model.device, REPEATS)
            _remember(key, found)
        self.measured[key] = found
        return found

    def _preferred_multiple(self, structure: ModelStructure) -> int:
        """Find the multiple that makes layers fastest when numbers of neurons are rounded up to it; 1 if none does."""
        block = next((block for block in structure.blocks if block.kind == "ffn"), None)
        if block is None or block.units < 2 * MULTIPLES[-1]:
            return 1
        draw = random.Random(0)
        widths = [draw.randrange(block.units // 8, block.units - MULTIPLES[-1]) for _ in range(WIDTHS)]
        rounded = {multiple: [-(-width // multiple) * multiple for width in widths] for multiple in MULTIPLES}
        times = self._times(block, [0, *sorted({width for several in rounded.values() for width in several})])
        best = MULTIPLES[0]
        for multiple in MULTIPLES[1:]:
            if sum(times[w] for w in rounded[multiple]) < (1 - GAIN) * sum(times[w] for w in rounded[best]):
                best = multiple
        return best


def _typical(block: Block, share: float) -> int:
    """Choose a number of units near a share of them, at least one unless it is 0; an odd one if no multiple is needed.

    Devices are faster with round numbers, but where any number may stay, those hardly ever come up.
    """
    count = max(round(share * block.units), int(share > 0))
    if block.multiple > 1 or block.units <= POINTS or count in (0, block.units):
        return block.physical(count)
    return count | 1


def _counts(block: Block) -> list[int]:
    """Choose the numbers of units to measure: all, if they are few; else some, closer together where few units stay."""
    if block.units <= POINTS:
        return list(range(block.units + 1))
    return sorted({_typical(block, (step / POINTS) ** 1.5) for step in range(POINTS + 1)})


def _shapes(module: nn.Module) -> list[list[Any]]:
    return [[*parameter.shape, str(parameter.dtype)] for parameter in module.parameters()]


def _table(block: Block, measured: Counts) -> tuple[float, ...]:
    """Interpolate the cost for every number of units, rounded up as in training, between the measured ones."""
    points = sorted(measured)
    # Of two sizes, the larger is never faster but by the error of the measurement.
    rising = dict(zip(points, itertools.accumulate((measured[point] for point in points), max)))
    table = [0.0]
    for low, high in itertools.pairwise(points):
        slope = (rising[high] - rising[low]) / (high - low)
        table += [rising[low] + slope * (count - low) for count in range(low + 1, high + 1)]
    return tuple(table[block.physical(count)] for count in range(block.units + 1))


# ---- What was measured before ----


def _path(key: str) -> Path:
    return CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _remembered(key: str, count: int) -> list[float] | None:
    """Read a measurement from the cache; None if there is none, or none that can be right."""
    try:
        entry = json.loads(_path(key).read_text())
        times = [float(time) for time in entry["milliseconds"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if entry.get("key") != key or len(times) != count or not all(0 < time < float("inf") for time in times):
        return None
    return times


def _remember(key: str, times: Sequence[float]) -> None:
    """Write a measurement to the cache; a cache that cannot be written costs time, but is no error."""
    with suppress(OSError, SparsityError):
        CACHE.mkdir(parents=True, exist_ok=True)
        write_whole(_path(key), json.dumps({"key": key, "milliseconds": list(times)}))
