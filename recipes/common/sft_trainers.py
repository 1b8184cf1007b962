"""TRL's SFTTrainer with and without gates, and its arguments."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from trl import SFTConfig, SFTTrainer

from common.arguments import RecipeArguments
from hf_sparse import DenseTrainerMixin, SparseTrainerMixin


@dataclass
class SFTRecipeArguments(RecipeArguments, SFTConfig):
    """SFTConfig with defaults that suit pruning while fine-tuning."""

    eval_packing: bool = field(default=False, init=False)  # evaluations count rows
    trust_remote_code: bool = field(default=False, init=False)  # a flag of the model already

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is None:
            raise ValueError("--max_length None would keep rows of any length: give a number of tokens")


class Trainer(SFTTrainer):
    """SFTTrainer whose evaluations return logits."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's, which is fused with the model's head and knows no logits; in evaluations the model's own."""
        if not return_outputs:
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        outputs = model(**inputs, use_cache=False)
        return outputs.loss, outputs


class SparseSFTTrainer(SparseTrainerMixin, Trainer):  # type: ignore[misc]  # whose cards differ
    """Prunes."""


class DenseSFTTrainer(DenseTrainerMixin, Trainer):
    """Fine-tunes first, where that is asked for, and evaluates."""
