"""The bare model of a Trainer, which most mixins here work on."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from hf_sparse.engines.sharding import gather_, put_together
from hf_sparse.engines.surgery import copied
from hf_sparse.engines.zero import dismantle_, without_gates
from hf_sparse.engines.zero3 import is_partitioned, partitions_together


class ModelMixin(Trainer):
    """Adds to a Trainer what others do with its bare model, one of transformers once the constructor has run."""

    @property
    def _model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model)

    @property
    def _shards_weights(self) -> bool:
        """Whether the engine leaves every process a share of the weights only."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    @property
    def _is_in_shards(self) -> bool:
        """Whether every process has a share of the weights only, at this moment."""
        return isinstance(self._model, FSDPModule) or is_partitioned(self._model)

    def _whole(self) -> AbstractContextManager[None]:
        """Where weights are in shards, the model is whole on the first process inside this context, in place.

        It must not be changed there.
        """
        return (partitions_together if self.is_deepspeed_enabled else put_together)(self._model)

    def _leave_engine_(self) -> None:
        """End, in place, what sharded the model: it is whole on the first process, and to be filled on the others."""
        if self.is_deepspeed_enabled:
            dismantle_(self._model, self.model_wrapped)
        else:
            gather_(self._model, self.optimizer)

    def _out_of_the_engine(self) -> AbstractContextManager[None]:
        """Inside this context DeepSpeed, which takes all parameters for its own, does not see gates."""
        return without_gates(self._model) if self.is_deepspeed_enabled else nullcontext()

    def _without_labels(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the model can be run on where its loss is not wanted.

        Labels stay where a decoder is fed with nothing else.
        """
        fed = self._model.config.is_encoder_decoder and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs)
        left_out = {"labels", "num_items_in_batch", *self.label_names} - ({"labels"} if fed else set())
        return {name: value for name, value in inputs.items() if name not in left_out}

    @contextmanager
    def _with_a_copy(self) -> Iterator[None]:
        """Inside this context a copy is in the model's place, to be changed."""
        model = self._model
        try:
            self.model = copied(model)
            yield
        finally:
            self.model = model

    def _save_into(self, directory: Path) -> None:
        """Save model and tokenizer, without Trainer's pickled arguments."""
        self._save(str(directory))
        (directory / TRAINING_ARGS_NAME).unlink(missing_ok=True)
