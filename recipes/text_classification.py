"""Fine-tune and prune a text classifier; with no flags, MiniLM on docstrings of installed libraries.

    python recipes/text_classification.py
    accelerate launch recipes/text_classification.py --model_name_or_path google-bert/bert-base-uncased \\
        --train_file train.csv --validation_file dev.csv --target 0.5 --output_dir runs/mine
    python recipes/text_classification.py --task_name mrpc --output_dir runs/mrpc

A text, or a pair of texts, gets one class; several, where the labels are lists; or a number, with --do_regression.

A model without a trained head is fine-tuned first, dense. The dense model is the teacher of the pruned one. The output
directory then has the smaller model and its tokenizer, its card, report.json and structure.png; --push_to_hub uploads
them (--hub_model_id me/my-model, --hub_private_repo, --hub_token). --do_predict also writes predict_results.txt, the
classes of the test data, which then may lack labels; training and evaluation need no flag.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common.files import require_columns, require_texts
from common.labels import class_names, label_names, labels_by_split, numbered, numbers
from common.metrics import ACCURACY, MACRO_F1, Metric, class_metrics, local_metric, logits_of
from common.output import write_predicted
from common.running import run
from common.task import Collator, Data, Encoder, Task
from common.texts import TextArguments
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
PAIR = ("sentence1", "sentence2")
GLUE = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": PAIR,
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": PAIR,
    "sst2": ("sentence",),
    "stsb": PAIR,
    "wnli": PAIR,
}
"""The tasks of GLUE and their columns."""
EQUIVALENCE = ("mrpc", "qqp")
"""Those whose F1 is that of one class, the second."""


@dataclass(frozen=True)
class Arguments(TextArguments):
    """Which texts and labels."""

    task_name: str | None = field(
        default=None,
        metadata={
            "help": "Task of GLUE: its data unless files are given, its columns and metrics.",
            "choices": [*GLUE],
        },
    )
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

    @property
    def on_hub(self) -> tuple[str | None, str | None]:
        """The data set on the Hub and its configuration."""
        named = self.task_name is not None and self.dataset_name is None and not self.files
        return ("nyu-mll/glue", self.task_name) if named else (self.dataset_name, self.dataset_config_name)

    @property
    def split_names(self) -> dict[str, str]:
        """What the splits are called on the Hub; MNLI has two of each but the first."""
        names = super().split_names
        if self.on_hub[1] == "mnli":
            names |= {name: f"{name}_matched" for name in ("validation", "test") if names[name] == name}
        return names


class TextClassification(Task):
    """A class for every text or pair of texts; or several; or a number.

    Attributes:
        texts: one column, or two for pairs.
    """

    pipeline_tag = "text-classification"
    auto_class = AutoModelForSequenceClassification
    data_arguments = Arguments
    embedded_name = "docstrings"
    embedded_defaults = {"output_dir": "runs/quickstart", "learning_rate": 2e-4, "sparsity_ramp": 0.24}
    """There is little of this data, and gates need steps to close."""
    texts: tuple[str, ...]

    def embedded_data(self, seed: int) -> DatasetDict:
        """Which library does a docstring document?"""
        return docstrings(seed)

    def load(self, splits: DatasetDict) -> Data:
        """Find texts and labels, and whether these are classes, lists of them, or numbers."""
        column = self.arguments.label_column_name
        regression = self.arguments.do_regression or self.arguments.task_name == "stsb"
        labels = labels_by_split(splits, column, COLUMNS, numbers if regression else label_names)
        self.texts = self._text_columns(splits["train"])
        require_columns(splits, self.texts, COLUMNS)
        require_texts(splits, self.texts)
        several = isinstance(labels["train"][0], list)
        if any(isinstance(label, list) != several for found in labels.values() for label in found):
            raise SparsityError(
                f"column {column!r} holds several labels in a row, but not always: give lists in all rows"
            )
        self.problem = "regression" if regression else f"{'multi' if several else 'single'}_label_classification"
        self.metrics = self._metrics()
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
            return GLUE[task]
        texts = [
            name
            for name, feature in train.features.items()
            if getattr(feature, "dtype", None) in ("string", "large_string")
            and name != self.arguments.label_column_name
        ]
        if set(PAIR) <= set(texts):
            return PAIR
        if len(texts) != 1:
            raise SparsityError(
                f"which column is the text? Set --text_column_name to one of {', '.join(texts or train.column_names)}, "
                "or to two of them, such as a,b, for pairs"
            )
        return (texts[0],)

    def configure_(self, config: Any, data: Data) -> bool:
        """Fit the config to names of classes, or to a single number."""
        if self.problem != "regression":
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

    def _metrics(self) -> tuple[Metric, ...]:
        if self.problem == "regression":
            return (Metric("pearson", "Pearson correlation"), Metric("spearmanr", "Spearman correlation"))
        if self.problem == "multi_label_classification":
            return (Metric("f1", "micro F1"), Metric("accuracy", "all labels right"))
        if self.arguments.task_name == "cola":
            return (ACCURACY, Metric("matthews_correlation", "Matthews correlation"))
        return (ACCURACY, Metric("f1", "F1") if self.arguments.task_name in EQUIVALENCE else MACRO_F1)

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compare classes, sets of them, or numbers."""
        logits, actual = logits_of(prediction), np.asarray(prediction.label_ids)
        if self.problem == "regression":
            values = {"predictions": logits.reshape(-1), "references": actual}
            return local_metric("correlation")(**values)
        if self.problem == "multi_label_classification":
            chosen, wanted = logits > 0, actual > 0.5
            cells = {"predictions": chosen.reshape(-1), "references": wanted.reshape(-1), "positive": 1}
            return {**local_metric("f1")(**cells), "accuracy": float((chosen == wanted).all(-1).mean())}
        classes = {"predictions": logits.argmax(-1), "references": actual}
        if self.arguments.task_name == "cola":
            return {**local_metric("accuracy")(**classes), **local_metric("matthews")(**classes)}
        if self.arguments.task_name in EQUIVALENCE:
            return {**local_metric("accuracy")(**classes), **local_metric("f1")(**classes, positive=1)}
        return class_metrics(classes["predictions"], actual)

    def write_predictions(self, found: PredictionOutput, rows: Dataset, data: Data, directory: Path) -> Path:
        """Write a line for every text, as run_glue does."""
        logits = logits_of(found)
        if self.problem == "regression":
            predicted = [f"{value:.3f}" for value in logits.reshape(-1)]
        elif self.problem == "multi_label_classification":
            predicted = [", ".join(name for name, logit in zip(data.labels, row) if logit > 0) for row in logits]
        else:
            predicted = [data.labels[number] for number in logits.argmax(-1)]
        return write_predicted(predicted, directory)


if __name__ == "__main__":
    run(TextClassification, __doc__)
