"""Fine-tune and prune a model that tells how close texts are; with no flags, MiniLM on docstrings.

    python recipes/sentence_embedding.py
    accelerate launch recipes/sentence_embedding.py --model_name_or_path sentence-transformers/all-mpnet-base-v2 \\
        --dataset_name sentence-transformers/natural-questions --target 0.5 --output_dir runs/embedder

The first text column is the anchor, the second what is close to it, others what is not; --text_column_names names them.
Each anchor has to find its own among the texts of its batch, so large batches teach more. Where there is a score, in a
column of that name or of --score_column_name, the cosine of two texts is to come close to it. An embedding is the mean
over the tokens, or that of the first with --pooling cls. --do_predict writes the cosines of the test pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common.arguments import RecipeArguments
from common.embeddings import DenseEmbeddingTrainer, SparseEmbeddingTrainer, cosines
from common.files import holds_texts, require_columns, require_texts
from common.labels import numbers
from common.metrics import Metric, local_metric, logits_of
from common.output import write_predicted
from common.running import run
from common.task import Collator, Data, Encoder, Task
from common.texts import TextArguments
from datasets import Dataset, DatasetDict
from embedded.docstring_tasks import sentence_pairs
from transformers import AutoModel, EvalPrediction, PreTrainedTokenizerBase
from transformers.trainer_utils import PredictionOutput

from hf_sparse import SparsityError


@dataclass(frozen=True)
class Arguments(TextArguments):
    """Which texts, and what an embedding is."""

    text_column_names: str | None = field(
        default=None, metadata={"help": "Columns of the texts: anchor,positive[,negative...]. Default: all texts."}
    )
    score_column_name: str | None = field(
        default=None, metadata={"help": "Column of scores from -1 to 1. Default: score, if there is one."}
    )
    pooling: Literal["mean", "cls"] = field(default="mean", metadata={"help": "What the embedding of a text is."})


class SentenceEmbedding(Task):
    """How close texts are.

    Attributes:
        texts: the columns: anchor, positive, and perhaps negatives.
        is_scored: whether pairs have scores.
    """

    pipeline_tag = "sentence-similarity"
    auto_class = AutoModel
    sparse_trainer, dense_trainer = SparseEmbeddingTrainer, DenseEmbeddingTrainer
    data_arguments = Arguments
    embedded_name = "docstrings and their first lines"
    embedded_defaults = {
        "output_dir": "runs/sentence_embedding",
        "learning_rate": 2e-4,
        "max_seq_length": 40,
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 16,
    }
    texts: list[str]
    is_scored: bool

    def arrange_(self, arguments: RecipeArguments) -> None:
        """Name the labels, which the model itself knows nothing of."""
        arguments.label_names = ["labels"]

    def embedded_data(self, seed: int) -> DatasetDict:
        """Which docstring goes on after this first line?"""
        return sentence_pairs(seed)

    def load(self, splits: DatasetDict) -> Data:
        """Find texts and scores."""
        given, score = self.arguments.text_column_names, self.arguments.score_column_name or "score"
        features = splits["train"].features
        self.is_scored = score in features or self.arguments.score_column_name is not None
        strings = [name for name, of in features.items() if holds_texts(of)]
        self.texts = [name.strip() for name in given.split(",")] if given is not None else strings
        if len(self.texts) < 2 or (self.is_scored and len(self.texts) > 2):
            raise SparsityError(
                f"the texts are {', '.join(self.texts) or 'missing'}: name two columns by --text_column_names, and "
                "without scores as many more as there are negatives"
            )
        require_columns(splits, self.texts, "set --text_column_names")
        require_texts(splits, self.texts)
        if self.is_scored:
            require_columns(splits, [score], "set --score_column_name")
            self.metrics = (Metric("spearmanr", "Spearman correlation"), Metric("pearson", "Pearson correlation"))
        else:
            self.metrics = (Metric("accuracy", "own text found"), Metric("mrr", "mean reciprocal rank"))
        found = {}
        for split, rows in splits.items():
            scores = numbers(rows, score, split) if self.is_scored else [1.0] * len(rows)
            found[split] = rows.select_columns(self.texts).add_column("labels", scores)
        return Data(DatasetDict(found), label_column=score)

    def encoder(self, data: Data, processor: PreTrainedTokenizerBase) -> Encoder:
        """Tokenize each text; an example has lists of them."""
        texts, lengths = self.texts, self.arguments.lengths(processor)

        def encode(rows: dict[str, Any]) -> Mapping[str, Any]:
            columns = [processor(rows[column], truncation=True, **lengths) for column in texts]
            found = {name: list(zip(*(column[name] for column in columns))) for name in columns[0]}
            return {**found, "labels": rows["labels"]}

        return encode

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        """Pad the texts of all examples together."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            names = [name for name in rows[0] if name != "labels"]
            texts = [dict(zip(names, text)) for row in rows for text in zip(*(row[name] for name in names))]
            batch = dict(processor.pad(texts, return_tensors="pt"))
            return {**batch, "labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else batch

        return collate

    def trainer_options(self, processor: Any) -> dict[str, Any]:
        """What an embedding is, and what it is compared with."""
        return {"pooling": self.arguments.pooling, "scored": self.is_scored}

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compare cosines with scores, or look where an anchor's own text is among all texts."""
        found = logits_of(prediction)
        if self.is_scored:
            return local_metric("correlation")(predictions=cosines(found), references=rows["labels"][:])
        others = np.concatenate([found[:, place] for place in range(1, found.shape[1])])
        ranks = []
        for start in range(0, len(found), 1000):  # all cosines at once may be too many to keep
            near = found[start : start + 1000, 0] @ others.T
            own = np.take_along_axis(near, np.arange(start, start + len(near))[:, None], 1)
            ranks.append((near > own).sum(1) + 1)
        rank = np.concatenate(ranks)
        return {"accuracy": float((rank == 1).mean()), "mrr": float((1 / rank).mean())}

    def write_predictions(self, found: PredictionOutput, rows: Dataset, data: Data, directory: Path) -> Path:
        """Write the cosine of every pair."""
        return write_predicted((f"{cosine:.4f}" for cosine in cosines(logits_of(found))), directory)


if __name__ == "__main__":
    run(SentenceEmbedding, __doc__)
