"""Record the forwards that a loss runs, with their keyword arguments."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_sparse.runtime.contexts import hooked


@dataclass(frozen=True)
class Forward:
    """A forward of a model.

    Attributes:
        inputs: by the names of its parameters, also those that were given by position.
        outputs: what it returned.
    """

    inputs: dict[str, Any]
    outputs: Any


@contextmanager
def forwards(wrapped: nn.Module, model: nn.Module, options: Mapping[str, Any]) -> Iterator[list[Forward]]:
    """Yield a list that takes every forward with gradients which a model runs inside this context, in their order.

    Args:
        wrapped: what is called, by an engine or a compiler around the model.
        model: bare.
        options: keyword arguments that these forwards get, too.
    """
    heard: list[Forward] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **options} if torch.is_grad_enabled() else kwargs

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if torch.is_grad_enabled():
            names = list(inspect.signature(type(model).forward).parameters)[1:] if args else []
            heard.append(Forward({**dict(zip(names, args)), **kwargs}, outputs))

    handles = [
        wrapped.register_forward_pre_hook(before, with_kwargs=True),
        wrapped.register_forward_hook(after, with_kwargs=True),
    ]
    with hooked(handles):
        yield heard


def without_labels(model: PreTrainedModel, inputs: Mapping[str, Any], label_names: Iterable[str]) -> dict[str, Any]:
    """Leave labels out of inputs, for a forward without a loss; they stay where a decoder is fed with nothing else.

    Args:
        model: bare.
        inputs: keyword arguments of its forward.
        label_names: of the Trainer, beside `labels`.
    """
    fed = model.config.is_encoder_decoder and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs)
    left_out = {"labels", "num_items_in_batch", *label_names} - ({"labels"} if fed else set())
    return {name: value for name, value in inputs.items() if name not in left_out}
