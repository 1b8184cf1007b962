"""Fine-tune and prune a classifier of images; with no flags, a tiny ViT, trained from scratch, on handwritten digits.

    python recipes/image_classification.py
    accelerate launch recipes/image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --train_dir flowers/train --validation_dir flowers/dev --target 0.5 --output_dir runs/flowers

Folders have a folder of images for every class, or a metadata.csv with columns file_name and label; --train_file is for
rows with paths of images. Images that are the same mirrored, and when cropped, are told apart better if they are
changed so in training: leave this out with --augment False. --do_predict also writes predict_results.txt, the classes
of the test data.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common.files import require_columns
from common.images import ImageArguments, ImageTask
from common.labels import class_names, labels_by_split, numbered
from common.metrics import ACCURACY, MACRO_F1, class_metrics, logits_of
from common.output import write_predicted
from common.running import run
from common.task import Data, Encoder
from datasets import ClassLabel, Dataset, DatasetDict
from embedded.digits import digits
from embedded.untrained_vision import digit_classifier
from transformers import AutoModelForImageClassification, BaseImageProcessor, EvalPrediction
from transformers.trainer_utils import PredictionOutput

from hf_sparse import SparsityError

COLUMNS = "set --image_column_name and --label_column_name, or give folders with a folder for every class"


@dataclass(frozen=True)
class Arguments(ImageArguments):
    """Which images and labels."""

    label_column_name: str = field(default="label", metadata={"help": "Column of the label: text or integers."})


class ImageClassification(ImageTask):
    """A class for every image."""

    pipeline_tag = "image-classification"
    auto_class = AutoModelForImageClassification
    data_arguments = Arguments
    metrics = (ACCURACY, MACRO_F1)
    embedded_name = "handwritten digits"
    embedded_model_id = None
    embedded_defaults = {
        "output_dir": "runs/image_classification",
        "learning_rate": 1e-3,
        "dense_epochs": 7.0,
        "num_train_epochs": 7.0,
        "augment": False,  # digits are not the same mirrored
    }

    def embedded_data(self, seed: int) -> DatasetDict:
        """Which digit is it?"""
        return digits(seed)

    def embedded_model(self) -> str:
        """A tiny ViT."""
        return digit_classifier()

    def load(self, splits: DatasetDict) -> Data:
        """Find images and labels."""
        image, column = self.arguments.image_column_name, self.arguments.label_column_name
        self.modes = {image: "RGB"}
        require_columns(splits, [image], COLUMNS)
        labels = labels_by_split(splits, column, COLUMNS)
        names = class_names(splits["train"], column)
        if isinstance(labels["train"][0], list):
            raise SparsityError(f"column {column!r} holds lists of labels: give one for every image")
        found = {split: rows.select_columns([image]) for split, rows in splits.items()}
        for split, of_rows in labels.items():
            numbers = numbered(of_rows, names, split)
            if splits[split].features[column] == ClassLabel(names=list(names)):  # images need not be copied
                found[split] = splits[split].select_columns([image, column])
            else:
                found[split] = found[split].add_column(column, numbers)
        return Data(self.undecoded(DatasetDict(found)), names, column, "test" in labels)

    def encoder(self, data: Data, processor: BaseImageProcessor) -> Encoder:
        """Decode and process images; labels stay as they are."""
        image, label = self.arguments.image_column_name, data.label_column

        def encode(rows: dict[str, Any]) -> Mapping[str, Any]:
            encoded = processor(self.decoded(rows)[image], return_tensors="pt")
            return {**encoded, "label": rows[label]} if label in rows else {**encoded}

        return encode

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compare classes."""
        return class_metrics(logits_of(prediction).argmax(-1), np.asarray(prediction.label_ids))

    def write_predictions(self, found: PredictionOutput, rows: Dataset, data: Data, directory: Path) -> Path:
        """Write the class of every image."""
        return write_predicted((data.labels[number] for number in logits_of(found).argmax(-1)), directory)


if __name__ == "__main__":
    run(ImageClassification, __doc__)
