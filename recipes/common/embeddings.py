"""Trainers of models that embed texts: what is close is to have a large cosine."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from hf_sparse import DenseTrainerMixin, SparseTrainerMixin

SCALE = 20.0
"""Of cosines, as logits of which text is the anchor's own."""


class EmbeddingTrainer(Trainer):
    """Trainer of texts that are embedded together: the rows of a batch are texts, in turns of one example.

    Args:
        pooling: "mean" over the tokens, or "cls", the first one.
        scored: whether cosines are compared with scores, and not anchors with texts.
    """

    # The other arguments are those of Trainer.
    def __init__(self, *args: Any, pooling: str, scored: bool, **kwargs: Any) -> None:
        self.pooling, self.scored = pooling, scored
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over what is in a batch

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compare anchors with all texts of their batch, or cosines with scores.

        Returned outputs are embeddings of length 1, shape (examples, texts of each, channels).
        """
        given = {name: value for name, value in inputs.items() if name != "labels"}
        scores: Tensor = inputs["labels"]
        states = model(**given)[0]
        kept = given["attention_mask"].clone()
        if self.pooling == "cls":
            kept = F.one_hot(kept.argmax(-1), kept.shape[-1])
        pooled = (states * kept[..., None]).sum(1) / kept.sum(-1, keepdim=True)
        found = F.normalize(pooled, dim=-1).unflatten(0, (len(scores), -1))
        if self.scored:
            loss = F.mse_loss((found[:, 0] * found[:, 1]).sum(-1), scores)
        else:
            others = found[:, 1:].transpose(0, 1).flatten(0, 1)  # all positives come first
            loss = F.cross_entropy(SCALE * found[:, 0] @ others.T, torch.arange(len(found), device=found.device))
        return (loss, {"embeddings": found}) if return_outputs else loss


class SparseEmbeddingTrainer(SparseTrainerMixin, EmbeddingTrainer):
    """Prunes."""


class DenseEmbeddingTrainer(DenseTrainerMixin, EmbeddingTrainer):
    """Fine-tunes first, where that is asked for, and evaluates."""


def cosines(embeddings: np.ndarray) -> np.ndarray:
    """Compute the cosine of the first two embeddings of each example, shape (examples, texts, channels)."""
    found: np.ndarray = (embeddings[:, 0] * embeddings[:, 1]).sum(-1)
    return found
