"""Write modules as ONNX files, and open them in onnxruntime."""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn, onnx

SLOW_ON_CPUS = ("SkipLayerNormFusion",)
"""What onnxruntime is best told not to do: its kernel for a norm of a sum is slower than a sum and a norm."""


def write_onnx(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    input_names: list[str],
    output_names: list[str],
    dynamic_shapes: tuple[Any, ...],
) -> None:
    """Write a module that takes and returns tensors, by torch's exporter.

    Args:
        module: to trace.
        inputs: to trace it on.
        path: of the file.
        input_names: as many as there are inputs.
        output_names: as many as it returns.
        dynamic_shapes: which of their dimensions have any size, as `torch.export` takes it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of onnxscript, about itself
        onnx.export(
            module,
            inputs,
            path,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )


def session(path: Path) -> Any:
    """Open a file in onnxruntime, on the processor, in the way that is fast there."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_ON_CPUS)
