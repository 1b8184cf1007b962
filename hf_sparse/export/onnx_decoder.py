"""Write a decoder as ONNX with its cache, by the names that optimum and onnxruntime's users know, and compare it."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_sparse.errors import SparsityError
from hf_sparse.export.onnx_session import session, write_onnx
from hf_sparse.structure.comparison import largest_difference
from hf_sparse.structure.dependencies import cached_layers
from hf_sparse.structure.example_inputs import example_inputs

PIECES = (6, 1, 2)
"""Tokens that are read one piece after the other when the file is compared with the model."""


class CachedDecoder:
    """A decoder that reads a text piece by piece, with the keys and values of what it has read.

    Inputs are `input_ids` and `position_ids`, shape (rows, new tokens), `attention_mask`, shape (rows, all tokens), and
    for every layer `past_key_values.N.key` and `.value`, shape (rows, kv heads of that layer, tokens before, head
    width). Outputs are `logits`, and the keys and values of all tokens as `present.N.key` and `.value`.

    Args:
        model: in float32 and in evaluation mode.

    Raises:
        SparsityError: its cache holds something else than all keys and values.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tokens = example_inputs(model)["input_ids"][:1, :1].repeat(2, sum(PIECES))
        self.tokens += torch.arange(sum(PIECES)) % 3  # not all alike
        layers = _cache_of(model(self.tokens, use_cache=True))
        for index, layer in enumerate(layers):
            if type(layer) is not DynamicLayer:
                raise SparsityError(
                    f"layer {index} of its cache is a {type(layer).__name__}, which does not hold all keys and values: "
                    "give --no_cache, and the whole text at each call"
                )
        kinds = [f"{index}.{kind}" for index in range(len(layers)) for kind in ("key", "value")]
        accepted = inspect.signature(type(model).forward).parameters
        self.names = [name for name in ("input_ids", "attention_mask", "position_ids") if name in accepted]
        self.past = [f"past_key_values.{kind}" for kind in kinds]
        self.present = [f"present.{kind}" for kind in kinds]

    def write(self, path: Path) -> None:
        """Write the file."""
        read = 7
        given = self._piece(self.tokens, torch.ones_like(self.tokens), read, read + 2)
        past = _tensors(_cache_of(self.model(self.tokens[:, :read], use_cache=True)))
        sizes = [{0: Dim.DYNAMIC, 1: Dim.DYNAMIC}] * len(self.names) + [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC}] * len(past)
        write_onnx(
            _Pieces(self.model, self.names),
            (*given.values(), *past),
            path,
            [*self.names, *self.past],
            ["logits", *self.present],
            (tuple(sizes),),
        )

    def differences(self, path: Path) -> Iterator[float]:
        """How far onnxruntime is from torch after every piece, relative to the largest logit.

        On a batch with padding on the left, from an empty cache on, against what the model computes without a cache.
        """
        run = session(path)
        tokens = torch.cat([self.tokens, self.tokens[:1].flip(1)])
        mask = torch.ones_like(tokens)
        mask[1, :2] = 0
        widths = {one.name: one.shape for one in run.get_inputs()}
        past = {name: torch.zeros(len(tokens), widths[name][1], 0, widths[name][3]) for name in self.past}
        end = 0
        for piece in PIECES:
            start, end = end, end + piece
            given = self._piece(tokens, mask, start, end)
            feeds = {name: value for name, value in given.items() if name in widths} | past
            logits, *cache = map(torch.from_numpy, run.run(None, {name: one.numpy() for name, one in feeds.items()}))
            past = dict(zip(self.past, cache))
            expected = self.model(**self._piece(tokens, mask, 0, end), use_cache=False).logits[:, start:]
            real = mask[:, start:end].bool()
            difference, scale = largest_difference([expected[real]], [logits[real]])
            yield difference / max(scale, 1.0)

    def _piece(self, tokens: Tensor, mask: Tensor, start: int, end: int) -> dict[str, Tensor]:
        """The inputs that the model takes for the tokens of some places, beside its cache, by their names in order."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts them: padding on the left does not count
        given = {
            "input_ids": tokens[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        return {name: given[name] for name in self.names}


class _Pieces(nn.Module):
    """Takes tokens and flat caches, and returns logits and flat caches."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Run the model on the inputs of its names, and on keys and values of every layer in turn."""
        cache, past = DynamicCache(), values[len(self.names) :]
        for index, (key, value) in enumerate(zip(past[::2], past[1::2])):
            cache.update(key, value, index)
        given = dict(zip(self.names, values))
        found = self.model(**given, past_key_values=cache, use_cache=True, return_dict=True)
        return (found.logits, *_tensors(cache.layers))


def has_cache(model: PreTrainedModel) -> bool:
    """Whether a model reads texts alone, and keeps a cache of them."""
    inputs = example_inputs(model)
    reads_text = not model.config.is_encoder_decoder and inputs.keys() <= {"input_ids", "attention_mask"}
    if not reads_text or not model.can_generate():
        return False
    return cached_layers(*model(**inputs, use_cache=True).values()) is not None


def _cache_of(outputs: Any) -> list[Any]:
    return list(outputs.past_key_values.layers)


def _tensors(layers: list[Any]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]
