"""Let modules read their weight multiplied by a scale: this is what a gate does to a model.

`F.linear(x, W * s, b)` equals scaling the input, `F.linear(x * s, W, b)`, but its cost does not grow with the tokens
and nothing of the size of the activations is kept for the backward pass. Scaling the parameter and not a kind of
layer serves linear and transposed linear layers, 1x1 convolutions, modules that read another's weight, and experts.

Where adapters train beside frozen weights it is the input that is scaled: that reaches weight and adapter alike, and
the backward pass computes no gradient of the size of the weight, which would otherwise be for the scale alone.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.structure.prunable import adapters


class ParameterScale:
    """The factor of one parameter when it is read, of a shape that broadcasts over it; None for no factor.

    A scale belongs to a forward and its backward, so copies of a model start without one.

    Args:
        ndim: dimensions of the parameter.
    """

    def __init__(self, ndim: int) -> None:
        self.ndim = ndim
        self.value: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "ParameterScale":
        return ParameterScale(self.ndim)


@functools.cache
def _scaled_class(stock: Any, name: str) -> Any:
    """A class in which reading the parameter `name` gives its scaled value."""

    def scaled(module: Any) -> Tensor:
        parameter, scale = module._parameters[name], module.parameter_scale.value
        return parameter if scale is None else parameter * scale.to(parameter.dtype)

    body = {name: property(scaled), "__module__": stock.__module__, "unscaled_class": stock}
    return type(f"Scaled{stock.__name__}", (stock,), body)


@functools.cache
def _input_scaled_class(stock: Any) -> Any:
    """A class of linear layers that compute with their input times the scale of their weight."""

    def forward(module: Any, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        scale = module.parameter_scale.value
        scaled = values if scale is None else values * scale.flatten().to(values.dtype)
        return stock.forward(module, scaled, *args, **kwargs)

    body = {"forward": forward, "__module__": stock.__module__, "unscaled_class": stock}
    return type(f"InputScaled{stock.__name__}", (stock,), body)


def scale_parameter_(module: nn.Module, name: str) -> ParameterScale:
    """Change the class of a module in place so that its parameter `name` is read times the scale that is returned."""
    return _scale_(module, _scaled_class(cast(Any, type(module)), name), name)


def scale_input_(module: nn.Module, name: str) -> ParameterScale:
    """Change the class of a linear layer in place so that its input is read times the scale that is returned.

    Args:
        module: is changed; an adapter around a layer, too.
        name: of its weight, which the scale has the dimensions of.
    """
    return _scale_(module, _input_scaled_class(cast(Any, type(module))), name)


def _scale_(module: nn.Module, kind: Any, name: str) -> ParameterScale:
    changed = cast(Any, module)
    scale = ParameterScale(getattr(changed, name).ndim)
    changed.__class__ = kind
    changed.parameter_scale = scale
    return scale


def unscale_(module: nn.Module) -> None:
    """Undo `scale_parameter_` or `scale_input_` in place; parameters are left as they are."""
    kind: Any = type(module)
    module.__class__ = kind.unscaled_class
    del module.parameter_scale


class Scaler(nn.Module, ABC):
    """Scales parameters of the model that it is attached to, anew in every forward; subclasses compute the scales."""

    def __init__(self) -> None:
        super().__init__()
        self._scales: dict[str, ParameterScale] = {}
        self.paths: dict[str, str] = {}
        """The paths of the scaled parameters, by the names of their scales."""
        self.scales_inputs = False
        """Whether it is the inputs of linear layers, with these parameters for weights, that are scaled."""
        self._running = False
        self._leaves: dict[str, Tensor] | None = None

    @abstractmethod
    def scales(self) -> dict[str, Tensor]:
        """Compute the scales, by name, each of a shape that broadcasts over its parameter."""

    def open(self, module: nn.Module, args: Any) -> None:
        """Compute the scales and give each parameter its own: the forward pre-hook of the model."""
        self._running = True
        self._hand_out()

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note that the model has run, so that an encoder that runs next runs alone: a forward hook of the model."""
        self._running = False

    def open_encoder(self, module: nn.Module, args: Any) -> None:
        """Compute the scales if the encoder runs alone, as in generate(): the forward pre-hook of the encoder."""
        if not self._running:
            self._hand_out()

    # Also of a forward without gradients the scales have a graph: it may come between another forward and its backward,
    # in which checkpointing runs layers once more, with the scales that are there then.
    @torch.enable_grad()
    def _hand_out(self) -> None:
        for name, value in (self.scales() if self._leaves is None else self._leaves).items():
            self._scales[name].value = value

    @contextmanager
    def leaves(self) -> Iterator[dict[str, Tensor]]:
        """Let all forwards in this context read the same scales, which are leaves of autograd, by name.

        The gradient of a loss for a leaf then counts every forward that the loss is made of.
        """
        self._leaves = {name: value.detach().requires_grad_() for name, value in self.scales().items()}
        try:
            yield self._leaves
        finally:
            self._leaves = None
            self.forget_scales_()

    def forget_scales_(self) -> None:
        """Let parameters be read unscaled until the next forward, in place."""
        for scale in self._scales.values():
            scale.value = None


def attach_scaler_(model: PreTrainedModel, place: str, scaler: Scaler, paths: Mapping[str, str]) -> None:
    """Make a scaler a submodule of a model, in place, so that parameters are read times its scales from now on.

    Args:
        model: is changed.
        place: name of the submodule.
        scaler: on the device of the model afterwards, if that has weights.
        paths: the paths of the parameters, by the names of their scales; where the model has adapters, of the weights
            of linear layers.
    """
    scaler.scales_inputs = bool(adapters(model))
    scale_ = scale_input_ if scaler.scales_inputs else scale_parameter_
    for name, path in paths.items():
        module, _, parameter = path.rpartition(".")
        scaler._scales[name] = scale_(model.get_submodule(module), parameter)
    scaler.paths = dict(paths)
    device = next(model.parameters()).device
    model.add_module(place, scaler if device.type == "meta" else scaler.to(device))
    model.register_forward_pre_hook(scaler.open)
    if model.config.is_encoder_decoder:
        model.register_forward_hook(scaler.close, always_call=True)
        model.get_encoder().register_forward_pre_hook(scaler.open_encoder)


def detach_scaler_(model: nn.Module, place: str) -> None:
    """Undo `attach_scaler_` in place; parameters are left as they are, unscaled."""
    scaler = cast(Scaler, model._modules[place])
    for path in scaler.paths.values():
        unscale_(model.get_submodule(path.rpartition(".")[0]))
    # A handle does not survive copying the model, so the hook is found by the scaler that it belongs to.
    for module in model.modules():
        tables: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
        for table in tables:
            for key in [key for key, hook in table.items() if getattr(hook, "__self__", None) is scaler]:
                del table[key]
                module._forward_hooks_always_called.pop(key, None)
    del model._modules[place]
