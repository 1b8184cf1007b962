"""What recipes for images share: their files, decoding, and random changes of training images."""

import glob
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Image
from PIL.Image import DecompressionBombError, Transpose
from PIL.Image import Image as Picture
from transformers import AutoImageProcessor, default_data_collator

from common.files import SPLITS, DataArguments, holds_texts, load_rows
from common.task import Collator, Data, Encoder, Task
from hf_sparse import SparsityError

CHECKED = 32
"""Images of every split that are decoded before anything begins; decoding all would take long."""
AREAS, SHAPES = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of random crops: the share of an image, and width by height."""


@dataclass(frozen=True)
class ImageArguments(DataArguments):
    """`DataArguments` of images, which are in folders or, in files of rows, named by their paths."""

    train_dir: str | None = field(
        default=None,
        metadata={"help": "Training data: a folder of images, in folders named by classes or with a metadata file."},
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Validation data, of the same kind."})
    test_dir: str | None = field(default=None, metadata={"help": "Test data, of the same kind (optional)."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training data to validate on where there is no other."}
    )
    image_column_name: str = field(
        default="image",
        metadata={"help": "Column of the images, or of the paths to them from where the file with the column is."},
    )
    augment: bool = field(
        default=True, metadata={"help": "Train on random crops of the images, of which half are mirrored."}
    )

    @property
    def files(self) -> dict[str, str]:
        """The files and folders that are given, by split."""
        return super().files | {split: path for split in SPLITS if (path := self._folder(split)) is not None}

    @property
    def validation_share(self) -> float | None:
        """The share of the training data to validate on where there is no other."""
        return self.train_val_split

    def check(self) -> None:
        """Refuse numbers and combinations that mean nothing.

        Raises:
            SparsityError: there are some.
        """
        super().check()
        for split in super().files:
            if self._folder(split) is not None:
                raise SparsityError(f"both --{split}_dir and --{split}_file are given: leave one of them out")

    def image_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Choose the columns of images among those that are there."""
        return (self.image_column_name,)

    def read_split(self, split: str, path: Path) -> Dataset:
        """Read the rows of one split from its folder or file.

        Raises:
            SparsityError: they cannot be read.
        """
        if self._folder(split) is None:
            rows = super().read_split(split, path)
            for column in set(self.image_columns(rows.column_names)) & set(rows.column_names):
                paths = [one if one is None else str(path.parent / str(one)) for one in rows[column]]
                rows = rows.remove_columns(column).add_column(column, paths)
            return rows
        if not path.is_dir():
            raise SparsityError(f"--{split}_dir {path}: there is no such folder")
        return load_rows("imagefolder", f"{glob.escape(str(path))}/**", split, f"--{split}_dir {path}")

    def limited(self, splits: DatasetDict) -> DatasetDict:
        """As many rows of every split as the flags allow: random ones, but for tests, as classes may come in order."""
        return super().limited(
            DatasetDict({split: rows if split == "test" else rows.shuffle(seed=0) for split, rows in splits.items()})
        )

    def _folder(self, split: str) -> str | None:
        found: str | None = getattr(self, f"{split}_dir")
        return found


class ImageTask(Task):
    """A task whose rows have images, which are decoded and processed each time that they are read.

    Attributes:
        modes: columns of images, and how their pixels are decoded, as PIL calls it; None leaves them as they are.
    """

    processor_class = AutoImageProcessor
    encoded_when_read = True
    modes: Mapping[str, str | None]

    def undecoded(self, splits: DatasetDict) -> DatasetDict:
        """Leave the decoding of images to `decoded`, once it has been tried with the first ones.

        Raises:
            SparsityError: one of these cannot be decoded, or a column holds something else.
        """
        found = {}
        for split, rows in splits.items():
            columns = [column for column in self.modes if column in rows.column_names]
            for column in columns:
                feature = rows.features[column]
                if not isinstance(feature, Image) and not holds_texts(feature):
                    raise SparsityError(f"column {column!r} of the {split} data holds neither images nor their paths")
                rows = rows.cast_column(column, Image(decode=False))
            for number, row in enumerate(rows.select(range(min(CHECKED, len(rows)))), start=1):
                self.decoded({column: [row[column]] for column in columns}, f"row {number} of the {split} data")
            found[split] = rows
        return DatasetDict(found)

    def decoded(self, rows: dict[str, list[Any]], where: str = "the data") -> dict[str, list[Any]]:
        """Decode the images of rows that are not decoded yet.

        Raises:
            SparsityError: one cannot be.
        """
        return rows | {
            column: [_decoded(one, mode, f"column {column!r} of {where}") for one in rows[column]]
            for column, mode in self.modes.items()
            if column in rows
        }

    def training_encoder(self, data: Data, processor: Any) -> Encoder:
        """Encode random crops, of which half are mirrored, unless the flags say otherwise."""
        encode = self.encoder(data, processor)
        if not self.arguments.augment:
            return encode

        def encode_changed(rows: dict[str, list[Any]]) -> Mapping[str, Any]:
            pictures = self.decoded(rows)
            changed = map(changed_at_random, zip(*(pictures[column] for column in self.modes)))
            return encode(pictures | {column: list(one) for column, one in zip(self.modes, zip(*changed))})

        return encode_changed

    def collator(self, processor: Any) -> Collator:
        """Stack images, which all have the size that the processor gives them."""
        return default_data_collator


def _decoded(value: Any, mode: str | None, where: str) -> Picture:
    if value is None:
        raise SparsityError(f"{where} has no image: add or drop it")
    try:
        picture: Picture = Image(mode=mode).decode_example(value)
    except (OSError, ValueError, SyntaxError, DecompressionBombError) as error:
        reason = str(error).splitlines()[0]
        raise SparsityError(f"{value['path'] or where} is no image that can be decoded ({reason}): drop it") from None
    return picture


def changed_at_random(pictures: Sequence[Picture]) -> list[Picture]:
    """Crop pictures of one size, all alike, to a random box, and mirror them or not."""
    width, height = pictures[0].size
    area, shape = random.uniform(*AREAS) * width * height, math.exp(random.uniform(*map(math.log, SHAPES)))
    across = max(1, min(width, round(math.sqrt(area * shape))))
    down = max(1, min(height, round(math.sqrt(area / shape))))
    left, top = random.randint(0, width - across), random.randint(0, height - down)
    mirrored = random.random() < 0.5
    crops = [picture.crop((left, top, left + across, top + down)) for picture in pictures]
    return [crop.transpose(Transpose.FLIP_LEFT_RIGHT) for crop in crops] if mirrored else crops
