"""DistributedDataParallel: every process has all weights, and learns of parameters that come and go."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from hf_sparse.engines.base import Engine, Training, trains
from hf_sparse.runtime.processes import broadcast_


class DDP(Engine):
    """Trains a whole model on every process."""

    @contextmanager
    def editing(self, model: PreTrainedModel, training: Training) -> Iterator[None]:
        """As `Engine.editing`; the main process broadcasts its values."""
        with super().editing(model, training):
            yield
        broadcast_([*model.parameters(), *model.buffers()])
        if trains(model):
            _register_again_(training.wrapped)


def _register_again_(wrapped: nn.Module) -> None:
    """Let DistributedDataParallel start over in place, for its buckets hold the parameters of its construction."""
    if not isinstance(wrapped, DistributedDataParallel):  # nothing has prepared the model yet
        return
    module = wrapped.module
    # The default is not said, as newer versions of torch call it otherwise.
    buffers = {} if wrapped.broadcast_buffers else {"broadcast_buffers": False}
    wrapped.__init__(  # type: ignore[misc]
        module,
        device_ids=wrapped.device_ids,
        output_device=wrapped.output_device,
        find_unused_parameters=wrapped.find_unused_parameters,
        gradient_as_bucket_view=wrapped.gradient_as_bucket_view,
        static_graph=wrapped.static_graph,
        **buffers,
    )
