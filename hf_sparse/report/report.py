"""The report of a pruning run: measured sizes, MACs, latencies and metrics, with one schema for all tasks."""

import functools
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import accelerate
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.compaction.compact import CompactionReport
from hf_sparse.config import SparsityConfig
from hf_sparse.costs.macs import count_macs
from hf_sparse.costs.table import CostTable
from hf_sparse.errors import SparsityError
from hf_sparse.report.generation import generations
from hf_sparse.report.history import LARGEST_NUMBER
from hf_sparse.report.html import render
from hf_sparse.report.kept import Kept
from hf_sparse.report.parts import PARTS, bytes_by_part
from hf_sparse.runtime.contexts import evaluating
from hf_sparse.runtime.files import write_whole
from hf_sparse.runtime.tables import Printed, table
from hf_sparse.runtime.timing import device_name, shortest_ms
from hf_sparse.structure.blocks import LayerSizes, ModelStructure, layer_sizes
from hf_sparse.structure.example_inputs import main_input, shape_text
from hf_sparse.version import __version__

Metrics = Mapping[str, Mapping[str, float]]
"""Results by name, by data split."""

SCHEMA = 2
"""Version of report.json. The first one had neither a version nor `parts` and `kept`; it is still read."""


@dataclass(frozen=True)
class ModelMeasurements:
    """The measurements of one model.

    Attributes:
        parameters: number of parameters.
        weight_bytes: size of its weights, tied ones counted once.
        macs: multiply-accumulates of one forward of the measured batch.
        latency_ms: shortest time of one forward of that batch among several, in milliseconds.
        metrics: results by data split, as the recipe evaluated them.
        tokens_per_second: how fast it generates after one row of that batch, once it has read that; None if it does
            not.
        prefill_tokens_per_second: how fast it reads that row; None if it does not generate from text.
        cache_bytes_per_token: bytes that its cache takes for one more token; None if it has none that grows.
    """

    parameters: int
    weight_bytes: int
    macs: int
    latency_ms: float
    metrics: Metrics
    tokens_per_second: float | None = None
    prefill_tokens_per_second: float | None = None
    cache_bytes_per_token: float | None = None

    def generation(self) -> list[tuple[str, str]]:
        """What is known of how it generates, as (name, value) for people."""
        found = [
            ("reading one row", self.prefill_tokens_per_second, "{:,.0f} tokens/s"),
            ("generation after one row", self.tokens_per_second, "{:.1f} tokens/s"),
            ("cache of a token", self.cache_bytes_per_token, "{:,.0f} bytes"),
        ]
        return [(name, text.format(value)) for name, value, text in found if value is not None]


@dataclass(frozen=True)
class Origin:
    """What a pruned model was made from and how, for its card.

    Attributes:
        base_model: the model that was pruned, as an id on the Hub; None if it has none.
        task: its task as the Hub calls it, such as "text-classification"; None if unknown.
        dataset: the name of the training data, for people; None if unknown.
        dataset_id: the id of the training data on the Hub; None if it has none.
        command: the command of the run; None if unknown.
    """

    base_model: str | None = None
    task: str | None = None
    dataset: str | None = None
    dataset_id: str | None = None
    command: str | None = None


@dataclass(frozen=True, repr=False)
class Report(Printed):
    """The results of a pruning run, which `report.json` has under these keys; prints as a table.

    Attributes:
        origin: what the model was made from.
        target: share of the prunable cost that was to be removed.
        achieved: share of the prunable cost that was removed.
        cost: what the cost counts: "params", "macs", "latency" or "memory".
        max_abs_diff: largest difference between gated and compact outputs on a real batch.
        batch: shape of the input that MACs and latencies belong to, such as (rows, tokens).
        dense: the model before pruning.
        pruned: the model after pruning.
        speedup: dense over pruned latency.
        layers: the units that every sublayer had and kept.
        sparsity: all settings of the run.
        versions: of the libraries.
        device: the device of the latencies.
        seed: of the run.
        input: name of the input that `batch` is the shape of.
        parts: bytes of the weights before and after, by part of the model; empty if unknown.
        kept: which heads and neurons every sublayer kept, by its name; empty if unknown.
        schema: version of what report.json holds.
    """

    origin: Origin
    target: float
    achieved: float
    cost: str
    max_abs_diff: float
    batch: tuple[int, ...]
    dense: ModelMeasurements
    pruned: ModelMeasurements
    speedup: float
    layers: tuple[LayerSizes, ...]
    sparsity: SparsityConfig
    versions: Mapping[str, str]
    device: str
    seed: int
    input: str = "input_ids"
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kept: Mapping[str, Kept] = field(default_factory=dict)
    schema: int = SCHEMA

    def __repr__(self) -> str:
        return f"Report({self.achieved:.1%} of the prunable {self.cost_text} removed, {self.speedup:.2f} times as fast)"

    def __str__(self) -> str:
        """Print a table of the model before and after, and one of what is left of each kind of sublayer."""
        models = (self.dense, self.pruned)
        rows = [
            ("", "dense", "pruned"),
            ("parameters", *(f"{model.parameters:,}" for model in models)),
            ("size of the weights", *(f"{model.weight_bytes / 1e6:.1f} MB" for model in models)),
            (f"multiply-accumulates, {self.batch_text}", *(f"{model.macs / 1e9:.2f} G" for model in models)),
            (f"latency, {self.batch_text}", *(f"{model.latency_ms:.1f} ms" for model in models)),
        ]
        rows += self.generation_rows()
        for split, metrics in self.pruned.metrics.items():
            before = self.dense.metrics.get(split, {})
            rows += [
                (f"{split} {name}", f"{before[name]:.4f}" if name in before else "", f"{value:.4f}")
                for name, value in metrics.items()
            ]
        kinds = [("kind", "sublayers", "kept", "of", "removed as a whole")]
        for kind in dict.fromkeys(layer.kind for layer in self.layers):
            own = [layer for layer in self.layers if layer.kind == kind]
            kept, units = sum(layer.kept for layer in own), sum(layer.units for layer in own)
            gone = sum(not layer.kept for layer in own)
            kinds.append((kind, str(len(own)), f"{kept:,}", f"{units:,}", str(gone)))
        return (
            f"{self.achieved:.1%} of the prunable {self.cost_text} removed (target: {self.target:.1%})\n"
            f"{self.speedup:.2f} times as fast on {self.device}\n"
            f"outputs differ from those of the gated model by at most {self.max_abs_diff:.3g}\n\n"
            f"{table(rows, left=(0,))}\n\n{table(kinds, left=(0,))}"
        )

    def generation_rows(self) -> list[tuple[str, str, str]]:
        """How both models generate, as (name, dense, pruned) for people."""
        dense = dict(self.dense.generation())
        return [(name, dense.get(name, ""), value) for name, value in self.pruned.generation()]

    def write(self, path: Path) -> None:
        """Write the report as JSON, whole or not at all."""
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read a report that `write` wrote.

        Raises:
            SparsityError: the file is not a report, or cannot be read.
        """
        try:
            data = json.loads(path.read_text())
            if data.get("schema", 1) not in (1, SCHEMA):
                raise ValueError(f"its schema is {data['schema']}, and this version of hf_sparse knows {SCHEMA}")
            dense, pruned = (ModelMeasurements(**data[name]) for name in ("dense", "pruned"))
            given = {
                "origin": Origin(**data["origin"]),
                "batch": tuple(data["batch"]),
                "layers": tuple(LayerSizes(**layer) for layer in data["layers"]),
                "sparsity": SparsityConfig(**data["sparsity"]),
                "parts": {part: tuple(sizes) for part, sizes in data.get("parts", {}).items()},
                "kept": {block: Kept(**kept) for block, kept in data.get("kept", {}).items()},
                "schema": data.get("schema", 1),
            }
            report = cls(**{**data, **given, "dense": dense, "pruned": pruned})
            report._check()
            return report
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SparsityError(f"{path} is not a report of a pruning run ({error!r})") from None

    def _check(self) -> None:
        """Check the numbers of a report that came from a file.

        Raises:
            ValueError: some are no numbers, or do not fit each other.
        """
        models = (self.dense, self.pruned)
        counts = [count for model in models for count in (model.parameters, model.weight_bytes, model.macs)]
        counts += [*self.batch, *(size for sizes in self.parts.values() for size in sizes)]
        counts += [count for layer in self.layers for count in (layer.layer, layer.units, layer.kept)]
        counts += [kept.heads_per_unit for kept in self.kept.values()]
        if any(type(count) is not int or not 0 <= count <= LARGEST_NUMBER for count in counts):
            raise ValueError("a count is no whole number")
        measured = [self.target, self.achieved, self.max_abs_diff, self.speedup]
        measured += [model.latency_ms for model in models]
        rates = [
            rate
            for model in models
            for rate in (model.tokens_per_second, model.prefill_tokens_per_second, model.cache_bytes_per_token)
        ]
        measured += [rate for rate in rates if rate is not None]
        measured += [value for model in models for split in model.metrics.values() for value in split.values()]
        if not all(isinstance(value, int | float) for value in measured):
            raise ValueError("a measurement is no number")
        if any(LARGEST_NUMBER < abs(value) < math.inf for value in measured):
            raise ValueError("a measurement is too large")
        if not self.parts.keys() <= set(PARTS) or any(len(sizes) != 2 for sizes in self.parts.values()):
            raise ValueError("its parts are not those of a model")
        units = {layer.block: layer.units for layer in self.layers}
        fits = [layer.kept <= layer.units for layer in self.layers]
        fits += [stop <= units[block] for block, kept in self.kept.items() for _, stop in kept.spans()]
        if not all(fits):
            raise ValueError("a sublayer kept more than it had")

    def _repr_html_(self) -> str:
        return render("fragment.html", {"report": self, "layers": self.layers, "kept": self.kept})

    @property
    def main_metrics(self) -> list[tuple[str, str]]:
        """The first metric of every data split, as (split, name); the loss only where there is no other."""
        found = []
        for split, values in self.pruned.metrics.items():
            named = [name for name in values if name != "loss"] or list(values)
            found += [(split, name) for name in named[:1]]
        return found

    @property
    def cost_text(self) -> str:
        """The name of the cost, for people."""
        return {"params": "parameters", "macs": "multiply-accumulates", "latency": "latency", "memory": "memory"}[
            self.cost
        ]

    @property
    def batch_text(self) -> str:
        """The size of the batch, for people: so many rows of so many tokens, or images of a size."""
        return shape_text(self.input, self.batch)


def make_report(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    structure: ModelStructure,
    compaction: CompactionReport,
    costs: CostTable,
    sparsity: SparsityConfig,
    inputs: Mapping[str, Tensor],
    metrics: tuple[Metrics, Metrics],
    origin: Origin,
    seed: int,
) -> Report:
    """Measure a model before and after it was pruned.

    Args:
        dense: the model before.
        pruned: the model after, on the same device.
        structure: what could be pruned in the dense model.
        compaction: the report of its compaction.
        costs: of the dense model.
        sparsity: settings of the run.
        inputs: a batch to measure both on.
        metrics: of the dense and of the pruned model, by data split; empty where they were not evaluated.
        origin: what the model was made from.
        seed: of the run.
    """
    name = main_input(dense, inputs)
    before, after = (bytes_by_part(model, structure) for model in (dense, pruned))
    latencies = latencies_ms([dense, pruned], inputs)
    measured = [
        ModelMeasurements(
            model.num_parameters(), weight_bytes(model), count_macs(model, inputs), latency, results, **vars(generates)
        )
        for model, latency, results, generates in zip(
            (dense, pruned), latencies, metrics, generations([dense, pruned], inputs)
        )
    ]
    return Report(
        origin=origin,
        target=costs.target(sparsity),
        achieved=costs.removed({name: len(units) for name, units in compaction.plan.kept.items()}),
        cost=sparsity.cost,
        max_abs_diff=compaction.max_abs_diff,
        batch=tuple(inputs[name].shape),
        dense=measured[0],
        pruned=measured[1],
        speedup=latencies[0] / latencies[1],
        layers=layer_sizes(structure, compaction.plan.kept),
        sparsity=sparsity,
        versions=versions(),
        device=device_name(dense.device),
        seed=seed,
        input=name,
        parts={part: (before.get(part, 0), after.get(part, 0)) for part in PARTS if part in before | after},
        kept={
            block.name: Kept.of(compaction.plan.kept.get(block.name, range(block.units)), block.heads_per_unit)
            for block in structure.blocks
        },
    )


def hub_id(model: PreTrainedModel) -> str | None:
    """Return the repository that a model was loaded from; None if that was a directory, or nothing."""
    name = str(model.config.name_or_path)
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
    return name if is_id and not Path(name).exists() else None


def command_line() -> str:
    """Return the command that started this process, without the tokens in it."""
    script = Path(sys.argv[0])
    words, hidden = ["accelerate", "launch"] if "WORLD_SIZE" in os.environ else ["python"], False
    for word in [script.name if script.is_absolute() else str(script), *sys.argv[1:]]:
        words.append("..." if hidden else re.sub(r"(?<=token=).+|\bhf_[A-Za-z0-9]{20,}", "...", word))
        hidden = re.fullmatch(r"--[\w-]*token", word) is not None
    return shlex.join(words)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on."""
    return {
        "hf_sparse": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def weight_bytes(model: PreTrainedModel) -> int:
    """Count the bytes of the weights, tied weights once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@torch.no_grad()
def latencies_ms(models: Iterable[PreTrainedModel], inputs: Mapping[str, Tensor], repeats: int = 15) -> list[float]:
    """Measure the shortest forward of each model in milliseconds; they take turns, so that noise meets all alike."""
    models = list(models)
    with evaluating(*models):
        return shortest_ms([functools.partial(model, **inputs) for model in models], models[0].device, repeats)
