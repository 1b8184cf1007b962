"""What recipes that write down speech share: texts beside sounds, batches of both, and how texts are compared."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import DatasetDict
from torch.nn.utils.rnn import pad_sequence

from common.files import require_columns, require_target, require_texts
from common.metrics import Metric
from common.sounds import SoundArguments
from common.task import Collator, Data

COLUMNS = "set --audio_column_name and --text_column_name"
ERROR_RATES = (
    Metric("wer", "word error rate", higher_is_better=False),
    Metric("cer", "character error rate", higher_is_better=False),
)


@dataclass(frozen=True)
class SpeechArguments(SoundArguments):
    """`SoundArguments` of speech and what is said."""

    text_column_name: str = field(default="text", metadata={"help": "Column of what is said."})
    max_duration_in_seconds: float = field(
        default=20, metadata={"help": "Leave longer sounds out of the training and validation data."}
    )
    min_duration_in_seconds: float = field(default=0, metadata={"help": "Leave shorter ones out, too."})

    @property
    def durations(self) -> tuple[float, float]:
        """The least and the most seconds of a sound to train or to validate on."""
        return self.min_duration_in_seconds, self.max_duration_in_seconds

    def spoken(self, splits: DatasetDict) -> Data:
        """Find sounds and what is said in them, `text`.

        Raises:
            SparsityError: a column is missing, or a row has no text or no sound.
        """
        sound, column = self.audio_column_name, self.text_column_name
        require_columns(splits, [sound], COLUMNS)
        said = require_target(splits, column, COLUMNS)
        require_texts(said, [column])
        rows = {split: rows.select_columns([sound]) for split, rows in splits.items()}
        for split, found in said.items():
            rows[split] = rows[split].add_column("text", found[column][:])
        return Data(self.sounds(DatasetDict(rows)), label_column=column, test_is_labelled="test" in said)


def without(text: str, ignored: Sequence[str]) -> str:
    """Take characters, or what else is ignored, out of a text, and spaces that are too many."""
    return " ".join(re.sub("|".join(map(re.escape, ignored)), "", text).split())


def pads_sounds_and_labels(extractor: Any) -> Collator:
    """Make the collator of encoded sounds and, where there are some, of labels, which are padded by -100.

    Args:
        extractor: of features.
    """
    names = extractor.model_input_names

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        sounds = [{name: row[name] for name in names if name in row} for row in rows]
        batch = {**extractor.pad(sounds, return_tensors="pt")}
        if "labels" in rows[0]:
            labels = [torch.tensor(row["labels"]) for row in rows]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
        return batch

    return collate
