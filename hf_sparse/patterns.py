"""How gates lie on a matrix of weights: one for each, one for a block, or four that compete along a row.

Tensors in, tensors out. A matrix has shape (outputs, inputs), as torch.nn.Linear keeps it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP, KEPT = 4, 2
"""Of so many weights beside each other so many stay, where hardware skips the others."""


class Pattern(ABC):
    """How the gates of a matrix and its weights belong together."""

    @abstractmethod
    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether a matrix of this size can have the pattern."""

    @abstractmethod
    def pool(self, values: Tensor) -> Tensor:
        """Sums of values, shape (outputs, inputs), over the weights of every gate: shape (n,), or (4, n)."""

    @abstractmethod
    def spread(self, gates: Tensor, outputs: int, inputs: int) -> Tensor:
        """The gate of every weight, shape (outputs, inputs), from gates as `pool` gives them."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """A gate for every weight."""

    def fits(self, outputs: int, inputs: int) -> bool:  # noqa: D102
        return True

    def pool(self, values: Tensor) -> Tensor:  # noqa: D102
        return values.flatten()

    def spread(self, gates: Tensor, outputs: int, inputs: int) -> Tensor:  # noqa: D102
        return gates.view(outputs, inputs)


@dataclass(frozen=True)
class Blocks(Pattern):
    """A gate for every block of `size` x `size` weights."""

    size: int

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whole blocks only, which is what sparse formats have."""
        return outputs % self.size == 0 and inputs % self.size == 0

    def pool(self, values: Tensor) -> Tensor:  # noqa: D102
        rows, columns = (length // self.size for length in values.shape)
        return values.reshape(rows, self.size, columns, self.size).sum((1, 3)).flatten()

    def spread(self, gates: Tensor, outputs: int, inputs: int) -> Tensor:  # noqa: D102
        rows, columns = outputs // self.size, inputs // self.size
        blocks = gates.view(rows, 1, columns, 1).expand(rows, self.size, columns, self.size)
        return blocks.reshape(outputs, inputs)


@dataclass(frozen=True)
class TwoOfFour(Pattern):
    """A gate for every weight; those of four weights beside each other in a row compete, and two stay."""

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whole groups only."""
        return inputs % GROUP == 0

    def pool(self, values: Tensor) -> Tensor:  # noqa: D102
        return values.reshape(-1, GROUP).T

    def spread(self, gates: Tensor, outputs: int, inputs: int) -> Tensor:  # noqa: D102
        return gates.T.reshape(outputs, inputs)


def largest(values: Tensor, count: int) -> Tensor:
    """Where values are among the `count` largest of their column; bool, shape (n, groups)."""
    return torch.zeros_like(values, dtype=torch.bool).scatter_(0, values.topk(count, 0).indices, True)


def pattern_of(name: str, block_size: int) -> Pattern:
    """The pattern that `WeightSparsityConfig` calls by this name."""
    return {"unstructured": Unstructured(), "block": Blocks(block_size), "2:4": TwoOfFour()}[name]
