"""Time how fast models read a prompt and generate, and count what they keep of it."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse.errors import first_line
from hf_sparse.runtime.contexts import evaluating, silent_transformers, unchanged_random_state
from hf_sparse.runtime.timing import shortest_ms
from hf_sparse.structure.dependencies import cached_layers

NEW, REPEATS = 16, 3

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Generation:
    """How a model generates after one row.

    Attributes:
        prefill_tokens_per_second: tokens of a prompt that it reads in a second; None if its input is no text.
        tokens_per_second: tokens that it generates in a second, one after the other, once it has read its input.
        cache_bytes_per_token: bytes that its cache takes for one more token of the prompt; None if it has an encoder,
            whose states are no such cache, or none that grows.
    """

    prefill_tokens_per_second: float | None = None
    tokens_per_second: float | None = None
    cache_bytes_per_token: float | None = None


def generations(models: Sequence[PreTrainedModel], inputs: Mapping[str, Tensor]) -> list[Generation]:
    """Measure how each model generates, greedily, after the first row of a batch.

    Args:
        models: of one kind, on one device.
        inputs: a batch of their forward; what a decoder reads beside an encoder is left out.

    Returns:
        For each model, the best of a few runs; nothing of any if they do not generate from such a batch.
    """
    nothing = [Generation()] * len(models)
    generators: Sequence[Any] = models  # PreTrainedModel itself has no method to generate
    if not all(model.can_generate() for model in generators):
        return nothing
    row = {name: tensor[:1] for name, tensor in inputs.items() if not name.startswith("decoder_")}
    runs = [
        functools.partial(
            model.generate,
            **row,
            max_new_tokens=new,
            min_new_tokens=new,
            num_beams=1,
            do_sample=False,
            synced_gpus=False,  # others do not generate, even where an engine has shards
        )
        for new in (1, 1 + NEW)
        for model in generators
    ]
    device = models[0].device
    try:
        # They would be told, in each run, that these lengths come before those that the models have.
        with evaluating(*models), unchanged_random_state(device), silent_transformers():
            times = shortest_ms(runs, device, REPEATS)
            cached = [_cache_bytes_per_token(model, row) for model in models]
    except Exception as error:  # models generate in many ways, of which some need more than a batch
        logger.warning("Generation is not timed: %s", first_line(error))
        return nothing
    found, read = [], _tokens(row)
    for first, whole, size in zip(times, times[len(models) :], cached):
        found.append(
            Generation(
                None if read is None else 1000 * read / first, 1000 * NEW / max(whole - first, first / 1000), size
            )
        )
    return found


def _tokens(row: Mapping[str, Tensor]) -> int | None:
    """The number of tokens of a row; None if it is no text."""
    return row["input_ids"].shape[1] if "input_ids" in row and len(row["input_ids"].shape) == 2 else None


@torch.no_grad()
def _cache_bytes_per_token(model: PreTrainedModel, row: Mapping[str, Tensor]) -> float | None:
    """Count how many bytes a cache grows by with the last token of a row; None if there is no such cache."""
    length = _tokens(row)
    if model.config.is_encoder_decoder or length is None or length < 2:
        return None
    sizes = []
    for end in (length - 1, length):
        cut = {name: value[:, :end] if value.shape[1:2] == (length,) else value for name, value in row.items()}
        layers = cached_layers(*model(**cut, use_cache=True, return_dict=True).values())
        if layers is None:
            return None
        tensors = [value for layer in layers.values() for value in vars(layer).values() if isinstance(value, Tensor)]
        sizes.append(sum(value.numel() * value.element_size() for value in tensors))
    grown = sizes[1] - sizes[0]
    return float(grown) if grown > 0 else None
