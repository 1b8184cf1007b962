"""Annotations of images: a number for every pixel, and the names of the numbers."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from PIL.Image import Image
from torch import Tensor, nn

from common.metrics import first
from hf_sparse import SparsityError

IGNORED = 255
"""The number of pixels that do not count, in annotations and in the losses of transformers' models."""


def numbers_of(annotation: Image, reduced: bool) -> np.ndarray:
    """Read the classes of all pixels, shape (height, width), as bytes.

    Args:
        annotation: one channel, with a number from 0 to 255 for every pixel.
        reduced: whether 0 does not count, and classes begin with 1.

    Raises:
        SparsityError: there are other numbers.
    """
    numbers = np.array(annotation)
    if numbers.min() < 0 or numbers.max() > IGNORED:
        raise SparsityError(f"an annotation has numbers from {numbers.min()} to {numbers.max()}: give 0 to {IGNORED}")
    numbers = numbers.astype(np.uint8)
    return np.where(numbers == IGNORED, numbers, numbers - 1) if reduced else numbers  # of bytes, 0 - 1 is 255


def largest_class(maps: Iterable[np.ndarray]) -> int:
    """Find the largest number of a pixel that counts."""
    return max(int(numbers[numbers != IGNORED].max(initial=0)) for numbers in maps)


def classes_of_pixels(logits: Tensor | tuple[Tensor, ...], annotations: Tensor) -> Tensor:
    """Choose the likeliest class of every pixel of the annotations, shape (images, height, width), as bytes."""
    sized = nn.functional.interpolate(first(logits), size=annotations.shape[-2:], mode="bilinear", align_corners=False)
    return sized.argmax(1).to(torch.uint8)


def read_names(path: str) -> tuple[str, ...]:
    """Read the names of all numbers from a JSON file such as {"0": "road", "1": "grass"}.

    Raises:
        SparsityError: it cannot be read, or lacks a number.
    """
    try:
        names = {int(number): str(name) for number, name in json.loads(Path(path).read_text()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise SparsityError(f"--id2label {path} cannot be read: {error}") from None
    if sorted(names) != list(range(len(names))):
        raise SparsityError(f"--id2label {path} does not name all numbers from 0 on: add those that are missing")
    return tuple(names[number] for number in range(len(names)))


def names_on_hub(dataset: str | None) -> str | None:
    """Download the file of names of a data set, id2label.json, if it has one.

    Raises:
        SparsityError: that cannot be found out.
    """
    if dataset is None or Path(dataset).exists():
        return None
    try:
        return hf_hub_download(dataset, "id2label.json", repo_type="dataset")
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        reason = str(error).strip().splitlines()[0]
        raise SparsityError(f"cannot load id2label.json of {dataset} ({reason}): give --id2label") from None
