"""The bare model of a Trainer, which most mixins here work on."""

from typing import cast

from transformers import PreTrainedModel, Trainer


class ModelMixin(Trainer):
    """Adds to a Trainer the name for its bare model, which is one of transformers once the constructor has run."""

    @property
    def _model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model)
