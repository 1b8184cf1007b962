"""Refuse models that cannot be pruned: others than those of transformers, and those without plain weights."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from hf_sparse.errors import SparsityError


def require_prunable(model: nn.Module) -> None:
    """Refuse a model that could not be pruned, whatever is found in it.

    Raises:
        SparsityError: it is not one of transformers, or is quantized, or has adapters inside; and what to give instead.
    """
    require_plain(model)
    require_no_adapters(model)


def require_plain(model: nn.Module) -> None:
    """Refuse a model whose heads and neurons cannot be found.

    Raises:
        SparsityError: it is not one of transformers, or is quantized; and what to give instead.
    """
    require_model(model)
    if is_quantized(model):
        raise SparsityError(
            f"{type(model).__name__} is quantized, and gates are for plain weights: load it without quantization, and "
            "quantize what is left of it after it was pruned"
        )


def is_quantized(model: nn.Module) -> bool:
    """Tell whether weights are not plain; some quantizers keep them in buffers, and some are not transformers' own."""
    return getattr(model, "hf_quantizer", None) is not None or any(map(_is_packed, model.parameters()))


def require_model(model: nn.Module) -> None:
    """Refuse what is not a model of transformers.

    Raises:
        SparsityError: what it is, and what to give instead.
    """
    if not isinstance(model, PreTrainedModel):
        raise SparsityError(
            f"{type(model).__name__} is not a model of transformers (a PreTrainedModel): {_instead(model)}"
        )


def require_no_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters inside, which is saved without its own weights.

    Raises:
        SparsityError: it has some; and what to give instead.
    """
    if found := adapters(model):
        raise SparsityError(
            f"{type(model).__name__} has adapters inside (such as {found[0]}), and their ranks are no heads: give "
            "what PeftModel.from_pretrained(base_model, adapter).merge_and_unload() returns, or leave the adapters out"
        )


def adapters(model: nn.Module) -> list[str]:
    """Find the paths of the modules that peft has put into a model."""
    return [path for path, module in model.named_modules() if _is_adapter(module)]


def _instead(model: nn.Module) -> str:
    if not isinstance(model, nn.Module):
        return "give a model that from_pretrained has loaded"
    if _is_adapter(model):
        return "give what its merge_and_unload() returns"
    inside = next((path for path, module in model.named_modules() if isinstance(module, PreTrainedModel)), None)
    if inside is None:
        return "give one of transformers' own, or of a class of yours that is derived from it"
    return (
        f"give the one inside it, at {inside!r}, which gets smaller where it is, or derive the class from "
        "PreTrainedModel, with a config_class, and load what was saved by load_pruned(path, TheClass)"
    )


def _is_adapter(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == "peft"


def _is_packed(parameter: nn.Parameter) -> bool:
    """Tell whether a parameter holds a packed form of its weight instead of the numbers."""
    wrapped = is_traceable_wrapper_subclass(parameter) and not isinstance(parameter, DTensor)
    return wrapped or (parameter.element_size() == 1 and parameter.dtype != torch.bool)
