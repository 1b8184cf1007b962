"""Modules with a scaled weight: what a gate does to a model.

`F.linear(x, W * s, b)` equals scaling the input, `F.linear(x * s, W, b)`, but its cost does not grow with the tokens
and nothing of the size of the activations is kept for the backward pass. Scaling the parameter and not a kind of
layer serves linear and transposed linear layers, 1x1 convolutions, modules that read another's weight, and experts.
"""

import functools
from typing import Any, cast

from torch import Tensor, nn


class ParameterScale:
    """The scale that one parameter is read with, of a shape that broadcasts over it; None leaves it as it is.

    It belongs to a forward and its backward, so copies of a model start without it.
    """

    def __init__(self, value: Tensor | None = None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "ParameterScale":
        return ParameterScale()


@functools.cache
def _scaled_class(stock: Any, name: str) -> Any:
    """A class in which reading the parameter `name` gives its scaled value."""

    def scaled(module: Any) -> Tensor:
        parameter, scale = module._parameters[name], module.parameter_scale.value
        return parameter if scale is None else parameter * scale.to(parameter.dtype)

    body = {name: property(scaled), "__module__": stock.__module__, "stock_class": stock}
    return type(f"Scaled{stock.__name__}", (stock,), body)


def scale_parameter_(module: nn.Module, name: str) -> ParameterScale:
    """Change the class of a module in place so that its parameter `name` is read with the scale that is returned."""
    scale = ParameterScale()
    changed, kind = cast(Any, module), cast(Any, type(module))
    changed.__class__ = _scaled_class(kind, name)
    changed.parameter_scale = scale
    return scale


def unscale_parameter_(module: nn.Module) -> None:
    """Undo `scale_parameter_` in place; the parameter is left as it is."""
    kind: Any = type(module)
    module.__class__ = kind.stock_class
    del module.parameter_scale
