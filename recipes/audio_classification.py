"""Fine-tune and prune a classifier of sounds; with no flags, a small spectrogram transformer on spoken digits.

    python recipes/audio_classification.py
    accelerate launch recipes/audio_classification.py --model_name_or_path facebook/wav2vec2-base \\
        --dataset_name superb --dataset_config_name ks --target 0.5 --output_dir runs/keywords

Rows have a sound and its class. In files (.csv, .json) the sound is the path of a wav, flac, ogg or mp3 file.
--do_predict also writes predict_results.txt: the class of every sound of the test data.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common.files import require_columns
from common.labels import class_names, labels_by_split, numbered
from common.metrics import ACCURACY, MACRO_F1, class_metrics, logits_of
from common.output import write_predicted
from common.running import run
from common.sounds import SoundArguments, decoded, freeze_
from common.task import Collator, Data, Encoder, Task
from datasets import Dataset, DatasetDict
from embedded.listeners import digit_listener
from embedded.speech import spoken_digits
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
)
from transformers.trainer_utils import PredictionOutput

from hf_sparse import SparsityError

COLUMNS = "set --audio_column_name and --label_column_name"


@dataclass(frozen=True)
class Arguments(SoundArguments):
    """Which sounds and labels."""

    label_column_name: str = field(default="label", metadata={"help": "Column of the label: text or integers."})
    max_length_seconds: float = field(
        default=20, metadata={"help": "Longer training sounds are cut to so many seconds, each time somewhere else."}
    )
    attention_mask: bool | None = field(
        default=None,
        metadata={"help": "Tell the model what is padding. Default: as its feature extractor was made for."},
    )

    def check(self) -> None:
        """Refuse numbers and combinations that mean nothing.

        Raises:
            SparsityError: there are some.
        """
        super().check()
        if not self.max_length_seconds > 0:
            raise SparsityError(f"max_length_seconds is {self.max_length_seconds:g}: give a number above 0")


class AudioClassification(Task):
    """A class for every sound."""

    pipeline_tag = "audio-classification"
    auto_class = AutoModelForAudioClassification
    processor_class = AutoFeatureExtractor
    data_arguments = Arguments
    metrics = (ACCURACY, MACRO_F1)
    encoded_when_read = True
    embedded_name = "spoken digits"
    embedded_model_id = None
    embedded_defaults = {"output_dir": "runs/audio_classification", "learning_rate": 1e-3, "dense_epochs": 3.0}

    def embedded_data(self, seed: int) -> DatasetDict:
        """Which digit is said?"""
        return spoken_digits(seed)

    def embedded_model(self) -> str:
        """A spectrogram transformer."""
        return digit_listener()

    def load(self, splits: DatasetDict) -> Data:
        """Find sounds and their classes."""
        sound, column = self.arguments.audio_column_name, self.arguments.label_column_name
        require_columns(splits, [sound], COLUMNS)
        labels = labels_by_split(splits, column, COLUMNS)
        names = class_names(splits["train"], column)
        found = {split: rows.select_columns([sound]) for split, rows in splits.items()}
        for split, of_rows in labels.items():
            found[split] = found[split].add_column("label", numbered(of_rows, names, split))
        return Data(self.arguments.sounds(DatasetDict(found)), names, column, "test" in labels)

    def prepare_(self, model: PreTrainedModel, processor: Any) -> None:
        """Freeze what reads samples, and say whether there are masks."""
        if self.arguments.freeze_feature_encoder:
            freeze_(model)
        if self.arguments.attention_mask is not None:
            processor.return_attention_mask = self.arguments.attention_mask

    def encoder(self, data: Data, processor: Any) -> Encoder:
        """Decode sounds, and compute what the model reads of them; labels stay as they are."""
        return self._encoder(processor, float("inf"))

    def training_encoder(self, data: Data, processor: Any) -> Encoder:
        """Cut sounds that are long, each time somewhere else."""
        return self._encoder(processor, self.arguments.max_length_seconds)

    def _encoder(self, processor: Any, longest: float) -> Encoder:
        rate = processor.sampling_rate

        def encode(rows: dict[str, Any]) -> Mapping[str, Any]:
            heard = [decoded(sound, place, rate, longest) for sound, place in zip(rows["audio"], rows["place"])]
            encoded = processor(heard, sampling_rate=rate)
            return {**encoded, "label": rows["label"]} if "label" in rows else {**encoded}

        return encode

    def collator(self, processor: Any) -> Collator:
        """Pad to the longest sound."""
        return DataCollatorWithPadding(processor)

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compare classes."""
        return class_metrics(logits_of(prediction).argmax(-1), np.asarray(prediction.label_ids))

    def write_predictions(self, found: PredictionOutput, rows: Dataset, data: Data, directory: Path) -> Path:
        """Write a class for every sound."""
        return write_predicted((data.labels[number] for number in logits_of(found).argmax(-1)), directory)


if __name__ == "__main__":
    run(AudioClassification, __doc__)
