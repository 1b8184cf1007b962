"""Time how fast models generate."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse.errors import first_line
from hf_sparse.runtime.contexts import evaluating, silent_transformers, unchanged_random_state
from hf_sparse.runtime.timing import shortest_ms

NEW, REPEATS = 16, 3

logger = logging.get_logger(__name__)


def tokens_per_second(models: Sequence[PreTrainedModel], inputs: Mapping[str, Tensor]) -> list[float | None]:
    """Measure how many tokens each model generates in a second, greedily, after the first row of a batch.

    Args:
        models: of one kind, on one device.
        inputs: a batch of their forward; what a decoder reads beside an encoder is left out.

    Returns:
        For each model, the best of a few runs; None for all if they do not generate from such a batch.
    """
    generators: Sequence[Any] = models  # PreTrainedModel itself has no method to generate
    if not all(model.can_generate() for model in generators):
        return [None] * len(models)
    row = {name: tensor[:1] for name, tensor in inputs.items() if not name.startswith("decoder_")}
    runs = [
        functools.partial(
            model.generate,
            **row,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            num_beams=1,
            do_sample=False,
            synced_gpus=False,  # others do not generate, even where an engine has shards
        )
        for model in generators
    ]
    device = models[0].device
    try:
        # They would be told, in each run, that these lengths come before those that the models have.
        with evaluating(*models), unchanged_random_state(device), silent_transformers():
            return [1000 * NEW / time for time in shortest_ms(runs, device, REPEATS)]
    except Exception as error:  # models generate in many ways, of which some need more than a batch
        logger.warning("Generation is not timed: %s", first_line(error))
        return [None] * len(models)
