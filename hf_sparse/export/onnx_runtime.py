"""Write a pruned model as ONNX, for any number of rows and of tokens, and prove it in onnxruntime."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from hf_sparse.checkpoint.card import CARD, PICTURE, REPORT
from hf_sparse.checkpoint.save_load import load_pruned
from hf_sparse.errors import SparsityError, first_line
from hf_sparse.export.onnx_decoder import CachedDecoder, has_cache
from hf_sparse.export.onnx_session import session, write_onnx
from hf_sparse.report.page import PAGE
from hf_sparse.runtime.files import belongs_to_checkpoint, replaced_directory
from hf_sparse.structure.comparison import as_outputs, largest_difference, tensors
from hf_sparse.structure.example_inputs import example_inputs

FILE = "model.onnx"
ABOUT_THE_RUN = (CARD, REPORT, PICTURE, PAGE)
"""Files beside a checkpoint that tell of its model in transformers, and not of the copy."""
TOLERANCE = 1e-4
"""Largest difference from torch, in units of the largest output, or of 1 if that is smaller."""


class _Tensors(nn.Module):
    """Returns the floating-point tensors of a model's outputs as a tuple; no caches."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Run the model; takes its inputs in the order of their names."""
        return tuple(named(self.model, dict(zip(self.names, values))).values())


def named(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a model, and name the floating-point tensors of its outputs; those in tuples by their place, too."""
    without_cache = {"use_cache": False} if "use_cache" in model.config.to_dict() else {}
    found = model(**inputs, **without_cache, **as_outputs(model))
    return {name.strip(".").replace(".", "_"): tensor for name, tensor in tensors(dict(found)).items()}


def export_onnx(directory: str | Path, output: str | Path, cache: bool = True) -> float:
    """Write a checkpoint, pruned or stock, as `model.onnx`, with its tokenizer or processor beside it.

    A decoder of texts reads and returns its cache, see `CachedDecoder`.

    Args:
        directory: of the checkpoint.
        output: another directory, for the copy.
        cache: False for decoders that read the whole text at each call.

    Returns:
        The largest difference between the outputs of onnxruntime and of torch, relative to the largest output.

    Raises:
        SparsityError: torch cannot export the model, or onnxruntime computes something else.
    """
    source = Path(directory)
    model = load_pruned(source).float().eval()
    if Path(output).resolve() == source.resolve():
        raise SparsityError(f"{output} is the checkpoint itself: give another directory")
    with replaced_directory(Path(output)) as target, torch.no_grad():
        try:
            form = CachedDecoder(model) if cache and has_cache(model) else WholeModel(model)
            form.write(target / FILE)
            found = list(form.differences(target / FILE))
        except ImportError as error:
            raise SparsityError(f"ONNX needs other packages ({error}): pip install 'hf_sparse[onnx]'") from None
        except SparsityError:
            raise
        except Exception as error:  # torch's exporter and onnxruntime have errors of every kind
            reason = first_line(error)
            raise SparsityError(f"{source} cannot be written as ONNX: {reason}") from error
        if not all(difference <= TOLERANCE for difference in found):
            raise SparsityError(f"{source} cannot be written as ONNX: onnxruntime computes something else there")
        for file in source.iterdir():
            if file.is_file() and not belongs_to_checkpoint(file.name) and file.name not in ABOUT_THE_RUN:
                shutil.copy2(file, target / file.name)
    return max(found)


def _rows(inputs: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Repeat the rows of a batch until there are `count`."""
    return {name: torch.cat([value] * count)[:count] for name, value in inputs.items()}


def _of_tokens(inputs: Mapping[str, Tensor]) -> set[str]:
    """The inputs that have an entry for each token, in their second dimension."""
    shape = inputs["input_ids"].shape if "input_ids" in inputs else None
    return {name for name, value in inputs.items() if value.shape == shape}


def _other(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch with more rows, and shorter texts, than the one that was traced."""
    tokens = _of_tokens(inputs)
    return {name: value[:, :5] if name in tokens else value for name, value in _rows(inputs, 3).items()}


class WholeModel:
    """A model that reads all of its inputs at each call.

    Args:
        model: in float32 and in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.inputs = _rows(example_inputs(model), 2)  # of one, torch would take the number for a constant

    def write(self, path: Path) -> None:
        """Write the file."""
        rows, length, tokens = Dim("rows"), Dim("tokens"), _of_tokens(self.inputs)
        write_onnx(
            _Tensors(self.model, tuple(self.inputs)),
            tuple(self.inputs.values()),
            path,
            list(self.inputs),
            list(named(self.model, self.inputs)),
            (tuple({0: rows, 1: length} if name in tokens else {0: rows} for name in self.inputs),),
        )

    def differences(self, path: Path) -> Iterator[float]:
        """How far onnxruntime is from torch, relative to the largest output, on batches of two sizes."""
        run = session(path)
        read = {one.name for one in run.get_inputs()}
        for batch in (self.inputs, _other(self.inputs)):
            found = run.run(None, {name: value.numpy() for name, value in batch.items() if name in read})
            difference, scale = largest_difference(named(self.model, batch).values(), map(torch.from_numpy, found))
            yield difference / max(scale, 1.0)
