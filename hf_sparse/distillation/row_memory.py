"""Remember a teacher's answers row by row, since they are the same in every epoch."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from hf_sparse.distillation.answers import Answers, alike
from hf_sparse.errors import SparsityError

logger = logging.get_logger(__name__)

MOST_BYTES = 8 << 30
"""Once so much is remembered, the teacher is asked again for every other row."""


class RowMemory:
    """Remembers a teacher's answers to each row of the data, by the contents of the row.

    The data set may be shuffled and batched in any way; states are kept in bfloat16 in the host's memory.

    Args:
        ask: the teacher, asked anew.
        counts: how many labels and tokens it tells apart.
        padded: whether padding belongs to a row, as where a decoder has other tokens than those that a mask is of.
        rows: how many rows the data have; None where that is not known.
    """

    def __init__(
        self,
        ask: Callable[[Mapping[str, Any]], Answers],
        counts: Collection[int],
        padded: bool,
        rows: int | None = None,
    ) -> None:
        self._ask, self._counts, self._padded, self._most_rows = ask, counts, padded, rows
        self._rows: dict[bytes, tuple[Tensor, ...]] = {}
        self._heads: tuple[str, ...] = ()
        self._several: tuple[bool, ...] = ()  # of every value, whether a row has several entries of it
        self._proven = self._useless = False
        self._bytes = 0

    def __call__(self, inputs: Mapping[str, Any]) -> Answers:
        """The teacher's answers, which is asked where one of the rows is new.

        Raises:
            SparsityError: what it says of a row does not depend on that row alone.
        """
        if self._useless:
            return self._ask(inputs)
        _require_rows(inputs)
        if not self._proven:
            self._prove(inputs)
        mask = None if self._padded else _mask(inputs)
        keys = _keys(inputs, mask)
        if any(key not in self._rows for key in keys):
            answers = self._ask(inputs)
            self._remember(keys, answers, mask)
            return answers
        rows = [self._rows[key] for key in keys]
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        values = [_joined([row[index] for row in rows], mask) for index in range(len(rows[0]))]
        values = [value.flatten(0, 1) if several else value for value, several in zip(values, self._several)]
        values = [value.to(device, non_blocking=True) for value in values]
        heads = dict(zip(self._heads, values))
        return Answers(heads, tuple(values[len(heads) :]))

    def _prove(self, inputs: Mapping[str, Any]) -> None:
        """Ask for the last row of the first batch alone, the answers to which have to be the same."""
        rows = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
        answers = self._ask(inputs)
        alone = self._ask({name: value[-1:] if isinstance(value, Tensor) else value for name, value in inputs.items()})
        for one, other in zip(_values(answers), _values(alone), strict=True):
            if len(one) % rows or not alike(_by_row(one, rows)[-1:], _by_row(other, 1)):
                raise SparsityError(
                    "what the teacher says of a row depends on the rows beside it or on chance, so it cannot be "
                    "remembered: set cache_teacher=False"
                )
        mask = _mask(inputs)
        if mask is not None:  # of a text, where the answer to a question starts: its tokens are the classes
            shapes = [head.shape for head in answers.heads.values()]
            self._padded |= any(shape == mask.shape and shape[1] not in self._counts for shape in shapes)
        self._proven = True

    def _remember(self, keys: list[bytes], answers: Answers, mask: Tensor | None) -> None:
        if self._bytes > MOST_BYTES:
            return
        self._heads = tuple(answers.heads)
        values = [head.float().cpu() for head in answers.heads.values()]
        values += [state.to("cpu", torch.bfloat16) for state in answers.states]
        by_row = [_by_row(value, len(keys)) for value in values]
        self._several = tuple(value.ndim > whole.ndim for value, whole in zip(by_row, values))
        for index, key in enumerate(keys):
            own = None if mask is None else mask[index]
            row = tuple(_unpadded(value[index], own) for value in by_row)
            self._bytes += sum(value.numel() * value.element_size() for value in row if key not in self._rows)
            self._rows[key] = row
        if self._most_rows is not None and len(self._rows) > self._most_rows:
            logger.warning(
                "The teacher was asked about more rows than the %s of the data, which so change from epoch to epoch, "
                "by random masks or by padding to other lengths: cache_teacher is of no use, and off from here on.",
                f"{self._most_rows:,}",
            )
            self._useless = True
            self._rows.clear()
        elif self._bytes > MOST_BYTES:
            logger.warning(
                "The teacher's cache is full at %.0f GB with %s rows: it is asked again for the others.",
                self._bytes / 1e9,
                f"{len(self._rows):,}",
            )


def _values(answers: Answers) -> tuple[Tensor, ...]:
    return (*answers.heads.values(), *answers.states)


def _by_row(value: Tensor, rows: int) -> Tensor:
    """A tensor with an axis of rows in front, also where a row has several entries, as a question has choices."""
    return value if len(value) == rows else value.unflatten(0, (rows, -1))


def _require_rows(inputs: Mapping[str, Any]) -> None:
    """Refuse a batch whose rows are not those of the data.

    Raises:
        SparsityError: several examples are packed into one row, or something in it has no entry per row.
    """
    lengths = {name: sum(value.shape[:1]) for name, value in inputs.items() if isinstance(value, Tensor)}
    positions = inputs.get("position_ids")
    if inputs.get("attention_mask") is None and isinstance(positions, Tensor):  # as transformers tells packed rows
        packed = positions.ndim == 2 and bool((positions[:, 1:] < positions[:, :-1]).any())
    else:
        packed = False
    if packed:
        raise SparsityError(
            "cache_teacher does not go with packed rows, which are packed anew in every epoch: set cache_teacher=False"
        )
    if len(set(lengths.values())) > 1 or any(isinstance(value, list | tuple | dict) for value in inputs.values()):
        raise SparsityError(
            "cache_teacher remembers rows of the data, and not everything in a batch has one entry per row (of "
            f"{', '.join(f'{name} {length}' for name, length in lengths.items())}): set cache_teacher=False"
        )


def _mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Where the tokens of every row are, on the host; None where padding is not said row by row."""
    mask = inputs.get("attention_mask")
    return mask.bool().cpu() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _keys(inputs: Mapping[str, Any], mask: Tensor | None) -> list[bytes]:
    """The contents of every row of a batch, without its padding."""
    tensors = [value.cpu() for _, value in sorted(inputs.items()) if isinstance(value, Tensor)]
    return [
        b"".join(
            _unpadded(value[row], None if mask is None else mask[row]).reshape(-1).view(torch.uint8).numpy().tobytes()
            for value in tensors
        )
        for row in range(len(tensors[0]))
    ]


def _unpadded(row: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens of a row, where it has one entry per token; the row otherwise. A copy, not a view of a batch."""
    # One number per token is an id; one float per entry is a logit per label.
    per_token = mask is not None and row.ndim > row.is_floating_point() and len(row) == len(mask)
    return row[mask] if per_token else row.clone()


def _joined(rows: list[Tensor], mask: Tensor | None) -> Tensor:
    """Rows as a batch, padded with zeros where the mask has padding."""
    if mask is None or rows[0].ndim < 2 or any(len(row) != n for row, n in zip(rows, mask.sum(1).tolist())):
        return torch.stack(rows)
    if bool(mask[:, 0].all()):  # padding, if any, on the right
        padded = pad_sequence(rows, batch_first=True)
        missing = mask.shape[1] - padded.shape[1]
        return padded if not missing else torch.nn.functional.pad(padded, (0, 0) * (padded.ndim - 2) + (0, missing))
    joined = rows[0].new_zeros(*mask.shape, *rows[0].shape[1:])
    joined[mask] = torch.cat(rows)
    return joined
