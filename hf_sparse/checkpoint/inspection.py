"""Summarise a checkpoint from its config and the headers of its weight files; no weights are read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import get_safetensors_metadata, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_sparse.checkpoint.tasks import auto_class
from hf_sparse.errors import SparsityError, first_line
from hf_sparse.gates.base import BANK
from hf_sparse.gates.weights import MASKS
from hf_sparse.modeling_hf_sparse import MODEL_TYPE_PREFIX, check_recipe, shards
from hf_sparse.report.html import render
from hf_sparse.runtime.tables import Printed
from hf_sparse.structure.blocks import LayerSizes

LARGEST_CONFIG = 64 << 20
"""Bytes of a config.json that is still read."""


@dataclass(frozen=True)
class CheckpointSummary(Printed):
    """A summary of a checkpoint; prints as a table.

    Attributes:
        source: the directory or repository.
        architecture: the class of the model before it was pruned, of transformers or one of its authors' own.
        auto_class: the auto class that loads the checkpoint, if any does; its architecture loads a stock one, too.
        model_type: of the config.
        pruned: whether the model type is a pruned one; a stock checkpoint has no record of what was removed.
        parameters: values in its weight files.
        dense_parameters: parameters of the model before it was pruned; None if unknown.
        dtypes: values by dtype.
        files: weight files.
        layers: the units that every sublayer had and has; empty if unknown.
    """

    source: str
    architecture: str
    auto_class: str
    model_type: str
    pruned: bool
    parameters: int
    dense_parameters: int | None
    dtypes: Mapping[str, int]
    files: int
    layers: tuple[LayerSizes, ...]

    @property
    def of_own_class(self) -> bool:
        """Whether the architecture is not one of transformers."""
        return not hasattr(transformers, self.architecture)

    def _repr_html_(self) -> str:
        return render("fragment.html", {"report": None, "text": self._facts(), "layers": self.layers, "kept": {}})

    def __str__(self) -> str:
        return "\n".join([self._facts(), *(["", *self._table()] if self.layers else ())])

    def _facts(self) -> str:
        dtypes = ", ".join(self.dtypes)
        lines = [
            self.source,
            f"{self.architecture}, model type {self.model_type}, {dtypes}, {self.files} weight file"
            + ("s" if self.files > 1 else ""),
        ]
        if self.dense_parameters:
            share = 1 - self.parameters / self.dense_parameters
            lines.append(f"{self.parameters:,} of {self.dense_parameters:,} parameters, {share:.1%} removed")
        else:
            lines.append(f"{self.parameters:,} parameters")
        if not self.pruned:
            lines += ["", "a stock checkpoint: any version of transformers that knows this model type loads it"]
        return "\n".join(lines)

    def _table(self) -> Iterator[str]:
        width = max(len(layer.block) for layer in self.layers)
        yield f"{'block':<{width}}  {'kind':<9}  {'kept':>7}  {'of':>7}"
        for layer in self.layers:
            bar = "█" * round(20 * layer.kept / max(layer.units, 1))
            yield f"{layer.block:<{width}}  {layer.kind:<9}  {layer.kept:>7,}  {layer.units:>7,}  {bar}"


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json, and check its recipe if it is that of a pruned model.

    Raises:
        SparsityError: it is not one, or its recipe cannot be.
    """
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise SparsityError(f"{path} is larger than any config: it has {path.stat().st_size:,} bytes")
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SparsityError(f"{path} cannot be read as a config ({error})") from None
    if not isinstance(entries, dict) or not isinstance(entries.get("model_type"), str):
        raise SparsityError(f"{path} is not the config of a model: it has no model_type")
    if not isinstance(entries.get("auto_map", {}), dict):
        raise SparsityError(f"{path} has an auto_map that is not a table of names")
    if entries.get("transformers_weights") is not None:  # it could name any file
        raise SparsityError(f"{path} has transformers_weights: weights are read from model.safetensors alone")
    if "hf_sparse" in entries or entries["model_type"].startswith(MODEL_TYPE_PREFIX):
        try:
            check_recipe(entries.get("hf_sparse"), entries)
        except ValueError as error:
            raise SparsityError(f"{path}: {error}") from None
    return entries


def inspect_checkpoint(source: str | Path, revision: str | None = None, token: str | None = None) -> CheckpointSummary:
    """Summarise a checkpoint without loading its weights.

    Args:
        source: a directory, or a repository on the Hub, of which only headers are read.
        revision: branch, tag or commit of the repository.
        token: to read a private repository; that of `hf auth login` by default.

    Raises:
        SparsityError: there is no checkpoint, or it is damaged.
    """
    directory = Path(source)
    if directory.is_dir():
        config, found, files = read_config(directory / CONFIG_NAME), *_local_tensors(directory)
    else:
        config, found, files = _remote(str(source), revision, token)
    if any(name.startswith((f"{BANK}.", f"{MASKS}.")) for name in found):
        raise SparsityError(
            f"{source} has gates in it: it is a checkpoint to resume from, not a model; `save_model` writes one"
        )
    recipe = config.get("hf_sparse")
    dtypes: dict[str, int] = {}
    for dtype, size in found.values():
        dtypes[dtype] = dtypes.get(dtype, 0) + size
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else "?"
    architecture = str(config.get("base_architecture", first) if recipe else first)
    return CheckpointSummary(
        source=str(source),
        architecture=architecture,
        auto_class=auto_class(architecture, config["model_type"]) or "AutoModel",
        model_type=config["model_type"],
        pruned=recipe is not None,
        parameters=sum(dtypes.values()),
        dense_parameters=recipe["parameters"] if recipe else None,
        dtypes=dtypes,
        files=files,
        layers=tuple(LayerSizes(**layer) for layer in recipe["layers"]) if recipe else (),
    )


def tensor_names(directory: Path) -> list[str]:
    """Return the names of the tensors in a directory.

    Raises:
        SparsityError: it has no whole weights.
    """
    return list(_local_tensors(directory)[0])


def _local_tensors(directory: Path) -> tuple[dict[str, tuple[str, int]], int]:
    """Read (dtype, values) of every tensor in a directory, by name, and the number of files."""
    names = [SAFE_WEIGHTS_NAME]
    try:
        if not (directory / SAFE_WEIGHTS_NAME).is_file():
            names = shards(directory / SAFE_WEIGHTS_INDEX_NAME)
        tensors = {}
        for name in names:
            with safe_open(directory / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  not a dict
                    part = file.get_slice(key)
                    size = 1
                    for length in part.get_shape():
                        size *= length
                    tensors[key] = part.get_dtype(), size
    except (OSError, ValueError, SafetensorError) as error:
        raise SparsityError(f"{directory} has no whole weights as safetensors ({error})") from None
    return tensors, len(names)


def _remote(
    repo_id: str, revision: str | None, token: str | None
) -> tuple[dict[str, Any], dict[str, tuple[str, int]], int]:
    try:
        config = read_config(Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision, token=token)))
        metadata = get_safetensors_metadata(repo_id, revision=revision, token=token)
        if not metadata.files_metadata:
            raise ValueError("its index of weights names no files")
    except SparsityError:
        raise
    except (
        HfHubHTTPError,
        HFValidationError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # files that come from anywhere
        reason = first_line(error)
        raise SparsityError(f"{repo_id} is neither a directory nor a readable repository ({reason})") from None
    tensors = {
        name: (str(tensor.dtype), tensor.parameter_count)
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return config, tensors, len(metadata.files_metadata)
