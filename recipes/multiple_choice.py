"""Fine-tune and prune a model that chooses how a text goes on; with no flags, MiniLM on docstrings.

    python recipes/multiple_choice.py
    accelerate launch recipes/multiple_choice.py --model_name_or_path google-bert/bert-base-uncased \\
        --dataset_name allenai/swag --dataset_config_name regular --target 0.5 --output_dir runs/swag

Columns are those of SWAG: sent1 is a text, sent2 how all endings begin (if it is there), ending0, ending1 and so on are
two or more endings, and label is the number of the right one. --do_predict also writes predict_results.txt: the number
of an ending for every row of the test data.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common.files import require_columns, require_texts
from common.labels import labels_by_split, numbered
from common.metrics import ACCURACY, local_metric, logits_of
from common.output import write_predicted
from common.running import run
from common.task import Collator, Data, Encoder, Task
from common.texts import TextArguments
from datasets import Dataset, DatasetDict
from embedded.docstring_tasks import choices
from torch import Tensor
from transformers import (
    AutoModelForMultipleChoice,
    DataCollatorForMultipleChoice,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import PredictionOutput

from hf_sparse import SparsityError

COLUMNS = "name the columns as SWAG does"
FIRST, SECOND, LABEL = "sent1", "sent2", "label"
UNKNOWN = -100
"""The label of rows that have none, which the collator asks for and losses do not count."""


class MultipleChoice(Task):
    """One of several endings of every text.

    Attributes:
        endings: their columns.
    """

    pipeline_tag = "multiple-choice"
    auto_class = AutoModelForMultipleChoice
    data_arguments = TextArguments
    metrics = (ACCURACY,)
    embedded_name = "docstrings and their first paragraphs"
    embedded_defaults = {
        "output_dir": "runs/multiple_choice",
        "learning_rate": 2e-4,
        "dense_epochs": 1.0,
        "num_train_epochs": 3.0,
        "max_train_samples": 480,  # of four texts each
        "max_seq_length": 48,
        "per_device_train_batch_size": 8,
        "sparsity_ramp": 0.24,
    }
    endings: list[str]

    def embedded_data(self, seed: int) -> DatasetDict:
        """Which first paragraph does a docstring have?"""
        return choices(seed)

    def load(self, splits: DatasetDict) -> Data:
        """Find the endings, and number the right ones."""
        found = [name for name in splits["train"].column_names if re.fullmatch(r"ending\d+", name)]
        self.endings = sorted(found, key=lambda name: int(name.removeprefix("ending")))
        if self.endings != [f"ending{number}" for number in range(max(2, len(found)))]:
            raise SparsityError(
                f"the endings of the train data are {', '.join(self.endings) or 'missing'}, and not two or more from "
                f"ending0 on: {COLUMNS}"
            )
        texts = [FIRST, *self.endings]
        require_columns(splits, texts, COLUMNS)
        require_texts(splits, texts)
        labels = labels_by_split(splits, LABEL, COLUMNS)
        names = tuple(map(str, range(len(self.endings))))
        kept = {}
        for split, rows in splits.items():
            begins = [begin or "" for begin in rows[SECOND]] if SECOND in rows.column_names else [""] * len(rows)
            kept[split] = rows.select_columns(texts).add_column(SECOND, begins)
            right = numbered(labels[split], names, split) if split in labels else [UNKNOWN] * len(rows)
            kept[split] = kept[split].add_column(LABEL, right)
        return Data(DatasetDict(kept), label_column=LABEL, test_is_labelled="test" in labels)

    def encoder(self, data: Data, processor: PreTrainedTokenizerBase) -> Encoder:
        """Tokenize every text with each of its endings."""
        lengths, count = self.arguments.lengths(processor), len(self.endings)

        def encode(rows: dict[str, Any]) -> Mapping[str, Any]:
            texts = [text for text in rows[FIRST] for _ in range(count)]
            endings = [
                f"{begin} {ending}".strip()
                for begin, *others in zip(rows[SECOND], *(rows[name] for name in self.endings))
                for ending in others
            ]
            encoded = processor(texts, endings, truncation=True, **lengths)
            grouped = {
                name: [values[start : start + count] for start in range(0, len(values), count)]
                for name, values in encoded.items()
            }
            return {**grouped, LABEL: rows[LABEL]}

        return encode

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        """Pad to the longest text with an ending."""
        return DataCollatorForMultipleChoice(processor)

    def measured(self, rows: list[dict[str, Any]], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """Join rows to a batch, from which labels, without which the collator joins none, are taken again."""
        batch = self.collator(processor)(rows)
        return {name: batch[name] for name in processor.model_input_names if name in batch}

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compare choices."""
        chosen = {"predictions": logits_of(prediction).argmax(-1), "references": np.asarray(prediction.label_ids)}
        return local_metric("accuracy")(**chosen)

    def write_predictions(self, found: PredictionOutput, rows: Dataset, data: Data, directory: Path) -> Path:
        """Write the number of the ending of every text."""
        return write_predicted(map(str, logits_of(found).argmax(-1)), directory)


if __name__ == "__main__":
    run(MultipleChoice, __doc__)
