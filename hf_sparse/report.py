"""The report of a pruning run: measured sizes, MACs, latencies and metrics, one schema for all tasks."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_sparse.compaction import CompactionReport
from hf_sparse.config import SparsityConfig
from hf_sparse.discovery import discover
from hf_sparse.structure import ModelStructure
from hf_sparse.version import __version__


@dataclass(frozen=True)
class LayerSizes:
    """What one sublayer had and kept: heads (query heads under grouped queries) or neurons."""

    block: str
    kind: str
    layer: int
    units: int
    kept: int


@dataclass(frozen=True)
class ModelMeasurements:
    """One model, measured.

    Attributes:
        parameters: number of parameters.
        file_bytes: size of its weights as safetensors.
        macs: multiply-accumulates of one forward of the measured batch.
        latency_ms: median time of one forward of that batch, in milliseconds.
        metrics: results by data split, as the recipe evaluated them.
    """

    parameters: int
    file_bytes: int
    macs: int
    latency_ms: float
    metrics: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Report:
    """Everything that a pruning run leaves to be read; `report.json` has these keys.

    Attributes:
        target: fraction of the prunable cost asked to be removed.
        achieved: fraction of the prunable cost removed.
        cost: what the cost counts.
        max_abs_diff: largest difference between gated and compact outputs on a real batch.
        batch: shape of the batch that MACs and latencies belong to, (sequences, tokens).
        dense: the model before pruning.
        pruned: the model after pruning.
        speedup: dense over pruned latency.
        layers: what every sublayer kept.
        sparsity: all settings of the run.
        versions: of the libraries.
        device: what latencies were measured on.
        seed: of the run.
    """

    target: float
    achieved: float
    cost: str
    max_abs_diff: float
    batch: tuple[int, int]
    dense: ModelMeasurements
    pruned: ModelMeasurements
    speedup: float
    layers: tuple[LayerSizes, ...]
    sparsity: SparsityConfig
    versions: Mapping[str, str]
    device: str
    seed: int

    def write(self, path: Path) -> None:
        """Write the report as JSON, whole or not at all."""
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(asdict(self), indent=2) + "\n")
        Path(file.name).chmod(0o644)
        os.replace(file.name, path)


def achieved_removal(structure: ModelStructure, compaction: CompactionReport, config: SparsityConfig) -> float:
    """Fraction of the prunable cost that a plan removes from the original structure."""
    total = removed = 0
    for block in structure.blocks:
        cost = block.cost_of_unit(config.cost, config.cost_sequence_length)
        total += cost * block.units
        removed += cost * (block.units - len(compaction.plan.kept[block.name]))
    return removed / total


def layer_sizes(structure: ModelStructure, compaction: CompactionReport) -> tuple[LayerSizes, ...]:
    """Heads and neurons of every sublayer, before and after."""
    sizes = []
    for block in structure.blocks:
        each = block.heads_per_unit or 1
        kept = len(compaction.plan.kept[block.name])
        sizes.append(LayerSizes(block.name, block.kind, block.layer, block.units * each, kept * each))
    return tuple(sizes)


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    return {
        "hf_sparse": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def file_bytes(model: PreTrainedModel) -> int:
    """Size of the weights as safetensors, in bytes, tied weights counted once."""
    tensors = {name: tensor.contiguous() for name, tensor in model.named_parameters()}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        save_file(tensors, path)
        return path.stat().st_size


@torch.no_grad()
def count_macs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> int:
    """Multiply-accumulates of one forward: projections and attention scores; the model is not changed."""
    total = 0

    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.get_parameter("weight")
        outputs = weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]
        total += output.numel() // outputs * weight.numel()

    handles = [
        module.register_forward_hook(count) for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return total + _attention_macs(model, inputs)


def _attention_macs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> int:
    sequences, length = inputs["input_ids"].shape
    blocks = discover(model).blocks
    heads = sum(block.units * block.heads_per_unit * block.head_dim for block in blocks)
    return 2 * sequences * length * length * heads


@torch.no_grad()
def median_latencies_ms(
    models: Iterable[PreTrainedModel], inputs: Mapping[str, Tensor], repeats: int = 15
) -> list[float]:
    """Median forward time of each model in milliseconds; they take turns, so that noise meets all of them alike."""
    models = [model.eval() for model in models]
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(repeats + 2):
        for model, measured in zip(models, times):
            _synchronize(model.device)
            start = time.perf_counter()
            model(**inputs)
            _synchronize(model.device)
            if repeat >= 2:  # the first rounds warm caches and allocators up
                measured.append(1000 * (time.perf_counter() - start))
    return [statistics.median(measured) for measured in times]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str:
    """The device as people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
