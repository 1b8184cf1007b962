"""Fine-tune and prune a tagger of words; with no flags, MiniLM finds names and types of parameters in docstrings.

    python recipes/token_classification.py
    accelerate launch recipes/token_classification.py --model_name_or_path google-bert/bert-base-cased \\
        --dataset_name tner/conll2003 --target 0.5 --output_dir runs/ner

Rows are lists of words and of their tags, so files are .json. Tags like B-PER and I-PER are scored as spans, others as
classes. --do_predict also writes predictions.txt: a line of tags for every row of the test data.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common.files import require_columns, require_target
from common.labels import class_names, label_names, numbered
from common.loading import require_fast
from common.metrics import ACCURACY, MACRO_F1, Metric, class_metrics, local_metric, logits_of
from common.running import run
from common.task import Collator, Data, Encoder, Task
from common.texts import TextArguments
from datasets import Dataset, DatasetDict
from embedded.docstring_tasks import tagged_parameters
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import PredictionOutput

from hf_sparse import SparsityError

COLUMNS = "set --text_column_name and --label_column_name"
SPAN_METRICS = (Metric("f1", "span F1"), Metric("precision", "precision"), Metric("recall", "recall"), ACCURACY)


@dataclass(frozen=True)
class Arguments(TextArguments):
    """Which words and tags."""

    max_seq_length: int = field(default=512, metadata={"help": "Longer rows are cut to this number of tokens."})
    task_name: str = field(default="ner", metadata={"help": "Tags are in the column of this name and _tags."})
    text_column_name: str | None = field(
        default=None, metadata={"help": "Column of the words. Default: tokens, or the first one."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the tags. Default: by --task_name, or the second one."}
    )
    label_all_tokens: bool = field(
        default=False, metadata={"help": "Train on all tokens of a word, and not on the first alone."}
    )
    return_entity_level_metrics: bool = field(
        default=False, metadata={"help": "Write what is found of every type of span, too."}
    )


class TokenClassification(Task):
    """A class for every word.

    Attributes:
        words: the column of words.
        tags: the names of the classes.
        spans: whether these are of spans.
    """

    pipeline_tag = "token-classification"
    auto_class = AutoModelForTokenClassification
    data_arguments = Arguments
    embedded_name = "parameters in docstrings"
    embedded_defaults = {
        "output_dir": "runs/token_classification",
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 8,
    }
    words: str
    tags: tuple[str, ...]
    spans: bool

    def embedded_data(self, seed: int) -> DatasetDict:
        """Which words are names of parameters, and which their types?"""
        return tagged_parameters(seed, per_library=60)

    def load(self, splits: DatasetDict) -> Data:
        """Find words and tags, and whether these are of spans."""
        names = splits["train"].column_names
        usual = f"{self.arguments.task_name}_tags"
        self.words = self.arguments.text_column_name or ("tokens" if "tokens" in names else names[0])
        column = self.arguments.label_column_name or (usual if usual in names else names[min(1, len(names) - 1)])
        require_columns(splits, [self.words], COLUMNS)
        require_target(splits, column, COLUMNS)
        self.tags = class_names(splits["train"], column)
        found = {}
        for split, rows in splits.items():
            found[split] = rows.select_columns([self.words])
            words = rows[self.words][:]
            if not all(isinstance(row, list) and all(isinstance(word, str) for word in row) for row in words):
                raise SparsityError(
                    f"column {self.words!r} of the {split} data does not hold lists of words: {COLUMNS}"
                )
            if column not in rows.column_names:
                continue
            tags = numbered(label_names(rows, column, split), self.tags, split)
            for number, (row, of_row) in enumerate(zip(words, tags), start=1):
                if not isinstance(of_row, list) or len(of_row) != len(row):
                    raise SparsityError(
                        f"row {number} of the {split} data has {len(row)} words, and not as many tags in column "
                        f"{column!r}: mend or drop it, or {COLUMNS}"
                    )
            found[split] = found[split].add_column("tags", tags)
        self.spans = all(re.fullmatch(r"O|[BIES]-.+", tag) for tag in self.tags)
        self.metrics = SPAN_METRICS if self.spans else (ACCURACY, MACRO_F1)
        return Data(DatasetDict(found), self.tags, column, "tags" in found.get("test", found["train"]).column_names)

    def encoder(self, data: Data, processor: PreTrainedTokenizerBase) -> Encoder:
        """Tokenize words, and label the first token of each; `starts` are the places of these."""
        require_fast(processor)
        column, lengths, every = self.words, self.arguments.lengths(processor), self.arguments.label_all_tokens
        known = {name: number for number, name in enumerate(data.labels)}
        inside = [known.get(re.sub("^B-", "I-", name), number) for number, name in enumerate(data.labels)]

        def encode(rows: dict[str, Any]) -> Mapping[str, Any]:
            encoded = processor(rows[column], is_split_into_words=True, truncation=True, **lengths)
            owners = [encoded.word_ids(row) for row in range(len(rows[column]))]
            firsts = [
                [word is not None and word != before for word, before in zip(row, [None, *row])] for row in owners
            ]
            result = {**encoded, "starts": [np.flatnonzero(first).tolist() for first in firsts]}
            if "tags" in rows:
                result["labels"] = [
                    [
                        tags[word] if new else inside[tags[word]] if every and word is not None else -100
                        for word, new in zip(row, first)
                    ]
                    for row, first, tags in zip(owners, firsts, rows["tags"])
                ]
            return result

        return encode

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        """Pad to the longest row."""
        return DataCollatorForTokenClassification(processor)

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compare spans, or classes."""
        predicted, actual = logits_of(prediction).argmax(-1), np.asarray(prediction.label_ids)
        if not self.spans:
            return class_metrics(predicted, actual)
        counted, names = actual != -100, np.array(self.tags)
        found = local_metric("seqeval")(
            predictions=[names[row[mask]].tolist() for row, mask in zip(predicted, counted)],
            references=[names[row[mask]].tolist() for row, mask in zip(actual, counted)],
        )
        scores = {metric.name: found.pop(f"overall_{metric.name}") for metric in SPAN_METRICS}
        if self.arguments.return_entity_level_metrics:
            scores |= {f"{kind}_{name}": value for kind, of in found.items() for name, value in of.items()}
        return scores

    def write_predictions(self, found: PredictionOutput, rows: Dataset, data: Data, directory: Path) -> Path:
        """Write a line of tags for every row, as run_ner does."""
        path = directory / "predictions.txt"
        tags = [np.array(data.labels)[row[starts]] for row, starts in zip(logits_of(found).argmax(-1), rows["starts"])]
        path.write_text("".join(" ".join(row) + "\n" for row in tags))
        return path


if __name__ == "__main__":
    run(TokenClassification, __doc__)
