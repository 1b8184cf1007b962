"""Fine-tune and prune a text classifier; with no flags, MiniLM on docstrings of installed libraries.

    python recipes/text_classification.py
    accelerate launch recipes/text_classification.py --model_name_or_path google-bert/bert-base-uncased \\
        --train_file train.csv --validation_file dev.csv --target 0.5 --output_dir runs/mine
    python recipes/text_classification.py --task_name mrpc --output_dir runs/mrpc

A text, or a pair of texts, gets one class; several, where the labels are lists; or a number, with --do_regression.

A model without a trained head is fine-tuned first, dense. The dense model is the teacher of the pruned one. The output
directory then has the smaller model and its tokenizer, its card, report.json, report.html and structure.png;
--push_to_hub uploads them (--hub_model_id me/my-model, --hub_private_repo, --hub_token). --do_predict also writes
predict_results.txt, the classes of the test data, which then may lack labels; training and evaluation need no flag.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import glue
from common.files import holds_texts, require_columns, require_texts
from common.glue import GlueArguments
from common.labels import class_names, label_names, labels_by_split, numbered, numbers
from common.metrics import logits_of
from common.output import write_predicted
from common.problems import CLASSES, NUMBERS, SETS, Problem
from common.running import run
from common.task import Collator, Data, Encoder, Task
from datasets import Dataset, DatasetDict
from embedded.docstrings import docstrings
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import PredictionOutput

from hf_sparse import SparsityError

COLUMNS = "set --text_column_name and --label_column_name"


@dataclass(frozen=True)
class Arguments(GlueArguments):
    """Which texts and labels."""

    text_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column of the text, or a,b for pairs. Default: the only one, or those of GLUE.",
            "aliases": ["--text_column_names"],
        },
    )
    label_column_name: str = field(
        default="label", metadata={"help": "Column of the label: text or integers, or lists of them."}
    )
    do_regression: bool = field(default=False, metadata={"help": "Labels are numbers to come close to, not classes."})


class TextClassification(Task):
    """A class for every text or pair of texts; or several; or a number.

    Attributes:
        texts: one column, or two for pairs.
        labelled: what the labels are.
    """

    pipeline_tag = "text-classification"
    auto_class = AutoModelForSequenceClassification
    data_arguments = Arguments
    embedded_name = "docstrings"
    embedded_defaults = {"output_dir": "runs/quickstart", "learning_rate": 2e-4, "sparsity_ramp": 0.24}
    """There is little of this data, and gates need steps to close."""
    texts: tuple[str, ...]
    labelled: Problem

    def embedded_data(self, seed: int) -> DatasetDict:
        """Which library does a docstring document?"""
        return docstrings(seed)

    def load(self, splits: DatasetDict) -> Data:
        """Find texts and labels, and whether these are classes, lists of them, or numbers."""
        column = self.arguments.label_column_name
        self.labelled = (
            NUMBERS if self.arguments.do_regression else glue.PROBLEMS.get(self.arguments.task_name, CLASSES)
        )
        regression = self.labelled is NUMBERS
        labels = labels_by_split(splits, column, COLUMNS, numbers if regression else label_names)
        self.texts = self._text_columns(splits["train"])
        require_columns(splits, self.texts, COLUMNS)
        require_texts(splits, self.texts)
        several = isinstance(labels["train"][0], list)
        if any(isinstance(label, list) != several for found in labels.values() for label in found):
            raise SparsityError(
                f"column {column!r} holds several labels in a row, but not always: give lists in all rows"
            )
        if several:
            self.labelled = SETS
        self.problem, self.metrics = self.labelled.name, self.labelled.metrics
        names = () if regression else class_names(splits["train"], column)
        rows = {split: rows.select_columns(list(self.texts)) for split, rows in splits.items()}
        for split, found in labels.items():
            values: list[Any] = found if regression else numbered(found, names, split)
            if several:
                values = [[float(number in row) for number in range(len(names))] for row in values]
            rows[split] = rows[split].add_column("label", values)
        return Data(DatasetDict(rows), names, column, "test" in labels)

    def _text_columns(self, train: Dataset) -> tuple[str, ...]:
        given, task = self.arguments.text_column_name, self.arguments.task_name
        if given is not None:
            columns = tuple(column.strip() for column in given.split(","))
            if len(columns) > 2:
                raise SparsityError(f"--text_column_name {given}: give one column, or two for pairs")
            return columns
        if task is not None:
            return glue.COLUMNS[task]
        texts = [
            name
            for name, feature in train.features.items()
            if holds_texts(feature) and name != self.arguments.label_column_name
        ]
        if set(glue.PAIR) <= set(texts):
            return glue.PAIR
        if len(texts) != 1:
            raise SparsityError(
                f"which column is the text? Set --text_column_name to one of {', '.join(texts or train.column_names)}, "
                "or to two of them, such as a,b, for pairs"
            )
        return (texts[0],)

    def configure_(self, config: Any, data: Data) -> bool:
        """Fit the config to names of classes, or to a single number."""
        if self.labelled is not NUMBERS:
            return super().configure_(config, data)
        same = config.num_labels == 1 and config.problem_type in (None, self.problem)
        config.num_labels, config.problem_type = 1, self.problem
        return same

    def encoder(self, data: Data, processor: PreTrainedTokenizerBase) -> Encoder:
        """Tokenize texts; labels stay as they are."""
        columns, lengths = self.texts, self.arguments.lengths(processor)

        def encode(rows: dict[str, Any]) -> Mapping[str, Any]:
            encoded = processor(*(rows[column] for column in columns), truncation=True, **lengths)
            return {**encoded, "label": rows["label"]} if "label" in rows else encoded

        return encode

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        """Pad to the longest text."""
        return DataCollatorWithPadding(processor)

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compare classes, sets of them, or numbers."""
        return self.labelled.compute(logits_of(prediction), np.asarray(prediction.label_ids))

    def write_predictions(self, found: PredictionOutput, rows: Dataset, data: Data, directory: Path) -> Path:
        """Write a line for every text, as run_glue does."""
        return write_predicted(self.labelled.written(logits_of(found), data.labels), directory)


if __name__ == "__main__":
    run(TextClassification, __doc__)
