"""The bare model of a Trainer, which most mixins here work on."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from hf_sparse.sharding import whole


class ModelMixin(Trainer):
    """Adds to a Trainer what others do with its bare model, one of transformers once the constructor has run."""

    @property
    def _model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model)

    def _whole(self) -> AbstractContextManager[None]:
        """Where FSDP shards the model, it is whole on every process inside this context, in place."""
        return whole(self._model, self.optimizer, self.accelerator)

    @contextmanager
    def _with_a_copy(self) -> Iterator[None]:
        """Inside this context a copy is in the model's place, to be changed."""
        model = self._model
        try:
            self.model = copy.deepcopy(model)
            yield
        finally:
            self.model = model

    def _save_into(self, directory: Path) -> None:
        """Save model and tokenizer, without Trainer's pickled arguments."""
        self._save(str(directory))
        (directory / TRAINING_ARGS_NAME).unlink(missing_ok=True)
