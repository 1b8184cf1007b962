"""Fine-tune and prune a model that finds the class of every pixel; with no flags, a tiny Segformer on written digits.

    python recipes/semantic_segmentation.py
    accelerate launch recipes/semantic_segmentation.py --model_name_or_path nvidia/mit-b0 --train_dir streets/train \\
        --validation_dir streets/dev --id2label streets/id2label.json --target 0.5 --output_dir runs/streets

An image and its annotation are of one size; the annotation has a number for every pixel: its class, or 255 where that
does not count. Folders have a metadata.csv with columns file_name and annotation_file_name; --train_file is for rows
with paths of both. --do_predict also writes predict_masks: an annotation for every image of the test data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common.annotations import IGNORED, classes_of_pixels, largest_class, names_on_hub, numbers_of, read_names
from common.files import require_columns, require_target
from common.images import ImageArguments, ImageTask
from common.metrics import Metric, local_metric, logits_of
from common.running import run
from common.task import Data, Encoder
from datasets import Dataset, DatasetDict
from embedded.digits import CANVAS_LABELS, digit_canvases
from embedded.untrained_vision import digit_segmenter
from PIL.Image import Image, Resampling, fromarray
from transformers import AutoModelForSemanticSegmentation, BaseImageProcessor, EvalPrediction
from transformers.trainer_utils import PredictionOutput

from hf_sparse import SparsityError

COLUMNS = "set --image_column_name and --annotation_column_name, or give folders with a metadata.csv"


@dataclass(frozen=True)
class Arguments(ImageArguments):
    """Which images and annotations."""

    annotation_column_name: str | None = field(
        default=None,
        metadata={"help": "Column of the annotations, or of their paths. Default: annotation, or else label."},
    )
    do_reduce_labels: bool = field(
        default=False,
        metadata={"help": "0 in annotations does not count, and classes begin with 1.", "aliases": ["--reduce_labels"]},
    )
    id2label: str | None = field(
        default=None,
        metadata={"help": "JSON file of names by numbers. Default: id2label.json of --dataset_name, or numbers."},
    )

    def image_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """The column of images, and that of annotations."""
        usual = "label" if "label" in names and "annotation" not in names else "annotation"
        return (*super().image_columns(names), self.annotation_column_name or usual)


class SemanticSegmentation(ImageTask):
    """A class for every pixel."""

    pipeline_tag = "image-segmentation"
    auto_class = AutoModelForSemanticSegmentation
    data_arguments = Arguments
    metrics = (
        Metric("mean_iou", "mean IoU"),
        Metric("mean_accuracy", "mean accuracy of classes"),
        Metric("overall_accuracy", "pixel accuracy"),
    )
    embedded_name = "handwritten digits on canvases"
    embedded_model_id = None
    embedded_defaults = {
        "output_dir": "runs/semantic_segmentation",
        "learning_rate": 2e-3,
        "dense_epochs": 14.0,
        "num_train_epochs": 10.0,
        "per_device_train_batch_size": 16,
        "augment": False,  # digits are not the same mirrored
    }

    def embedded_data(self, seed: int) -> DatasetDict:
        """Which digit is a pixel of?"""
        return digit_canvases(seed)

    def embedded_model(self) -> str:
        """A tiny Segformer."""
        return digit_segmenter()

    def load(self, splits: DatasetDict) -> Data:
        """Find images, annotations and names of classes."""
        image, mask = self.arguments.image_columns(splits["train"].column_names)
        require_columns(splits, [image], COLUMNS)
        require_target(splits, mask, COLUMNS)
        self.modes = {image: "RGB", mask: None}
        parts = {
            split: rows.select_columns([name for name in self.modes if name in rows.column_names])
            for split, rows in splits.items()
        }
        data = self.undecoded(DatasetDict(parts))
        names = self._names(data["train"], mask)
        if not 2 <= len(names) <= IGNORED:
            raise SparsityError(f"there are {len(names)} classes: annotations tell apart 2 to {IGNORED}")
        return Data(data, names, mask, mask in data.get("test", data["train"]).column_names)

    def decoded(self, rows: dict[str, list[Any]], where: str = "the data") -> dict[str, list[Any]]:
        """Decode images and annotations, which have to fit each other."""
        found = super().decoded(rows, where)
        for image, mask in zip(*(found.get(column, ()) for column in self.modes)):
            if image.size != mask.size or len(mask.getbands()) != 1:
                raise SparsityError(
                    f"{where} has an image of {image.size} pixels with an annotation of {mask.size} and "
                    f"{len(mask.getbands())} channels: give one of the same size and with one number for every pixel"
                )
        return found

    def _names(self, train: Dataset, mask: str) -> tuple[str, ...]:
        flags = self.arguments
        if flags.embedded:
            return CANVAS_LABELS
        path = flags.id2label or names_on_hub(flags.dataset_name)
        if path is not None:
            return read_names(path)
        pictures = (self.decoded({mask: [row[mask]]})[mask][0] for row in train.select_columns([mask]))
        return tuple(map(str, range(largest_class(map(self._numbers, pictures)) + 1)))

    def _numbers(self, annotation: Image) -> np.ndarray:
        return numbers_of(annotation, self.arguments.do_reduce_labels)

    def encoder(self, data: Data, processor: Any) -> Encoder:
        """Decode and process images and annotations; where there are none, nothing counts."""
        image, mask = self.modes

        def encode(rows: dict[str, Any]) -> Mapping[str, Any]:
            pictures = self.decoded(rows)
            if mask in rows:
                maps = [self._numbers(one) for one in pictures[mask]]
            else:
                maps = [np.full(one.size[::-1], IGNORED, np.uint8) for one in pictures[image]]
            if (largest := largest_class(maps)) >= len(data.labels):
                raise SparsityError(
                    f"an annotation has a pixel of class {largest}, and there are {len(data.labels)} classes: name all "
                    f"of them by --id2label, and give {IGNORED} for what does not count"
                )
            try:
                return {**processor(pictures[image], maps, do_reduce_labels=False, return_tensors="pt")}
            except TypeError:
                raise SparsityError(
                    f"{type(processor).__name__} does not process annotations: take a model for segmentation"
                ) from None

        return encode

    def trainer_options(self, processor: BaseImageProcessor) -> dict[str, Any]:
        """Of what a model returns, evaluation keeps classes only."""
        return {"preprocess_logits_for_metrics": classes_of_pixels}

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Count the pixels of every pair of classes."""
        count = IGNORED + 1
        cells = np.zeros(count**2, np.int64)
        for predicted, actual in zip(logits_of(prediction), np.asarray(prediction.label_ids)):
            cells += np.bincount((count * actual + predicted).ravel(), minlength=count**2)
        pairs = np.flatnonzero(cells)
        return local_metric("mean_iou")(predictions=pairs % count, references=pairs // count, counts=cells[pairs])

    def write_predictions(self, found: PredictionOutput, rows: Dataset, data: Data, directory: Path) -> Path:
        """Write the classes of the pixels of every image, as large as that."""
        image, folder = next(iter(self.modes)), directory / "predict_masks"
        folder.mkdir(exist_ok=True)
        for index, (classes, row) in enumerate(zip(logits_of(found), rows.with_format(None))):
            [picture] = self.decoded({image: [row[image]]})[image]
            fromarray(classes).resize(picture.size, Resampling.NEAREST).save(folder / f"{index}.png")
        return folder


if __name__ == "__main__":
    run(SemanticSegmentation, __doc__)
