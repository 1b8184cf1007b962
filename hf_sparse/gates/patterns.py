"""How gates lie on a matrix of weights: one for each, one for a block, or four that compete along a row.

Tensors in, tensors out. A matrix has shape (outputs, inputs), as torch.nn.Linear keeps it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.gates.objective import relative_density

GROUP, KEPT = 4, 2
"""Of so many weights beside each other so many stay, where hardware skips the others."""


class Pattern(ABC):
    """How the gates of a matrix and its weights belong together, and who competes: all of them, unless it says so."""

    @abstractmethod
    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether a matrix of this size can have the pattern."""

    @abstractmethod
    def pool(self, values: Tensor) -> Tensor:
        """Sums of values, shape (outputs, inputs), over the weights of every gate: shape (n,), or (4, n)."""

    @abstractmethod
    def spread(self, gates: Tensor, outputs: int, inputs: int) -> Tensor:
        """The gate of every weight, shape (outputs, inputs), from gates as `pool` gives them."""

    def shares(self, count: int) -> Tensor:
        """What every gate costs, as a share of all, for `count` gates, or groups of them."""
        return torch.full((count,), 1 / count)

    def kept(self, alpha: Tensor, gates: Tensor) -> Tensor:
        """Which weights stay, bool, of the shape of the gates."""
        return gates > 0

    def density(self, gates: Tensor) -> Tensor:
        """The share of gates that are open, shape ()."""
        return (gates > 0).float().mean()

    def penalized(self, gates: Tensor, weights: Tensor, p: float) -> Tensor:
        """The effective density that lambda is for, shape ()."""
        return relative_density(gates, weights, p)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """A gate for every weight."""

    def fits(self, outputs: int, inputs: int) -> bool:
        """Every matrix."""
        return True

    def pool(self, values: Tensor) -> Tensor:
        """Nothing is summed."""
        return values.flatten()

    def spread(self, gates: Tensor, outputs: int, inputs: int) -> Tensor:
        """As they are."""
        return gates.view(outputs, inputs)


@dataclass(frozen=True)
class Blocks(Pattern):
    """A gate for every block of `size` x `size` weights."""

    size: int

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whole blocks only, which is what sparse formats have."""
        return outputs % self.size == 0 and inputs % self.size == 0

    def pool(self, values: Tensor) -> Tensor:
        """Over every block."""
        rows, columns = (length // self.size for length in values.shape)
        return values.reshape(rows, self.size, columns, self.size).sum((1, 3)).flatten()

    def spread(self, gates: Tensor, outputs: int, inputs: int) -> Tensor:
        """Over every block."""
        rows, columns = outputs // self.size, inputs // self.size
        blocks = gates.view(rows, 1, columns, 1).expand(rows, self.size, columns, self.size)
        return blocks.reshape(outputs, inputs)


@dataclass(frozen=True)
class TwoOfFour(Pattern):
    """A gate for every weight; those of four weights beside each other in a row compete, and two stay."""

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whole groups only."""
        return inputs % GROUP == 0

    def pool(self, values: Tensor) -> Tensor:
        """Nothing is summed; shape (4, n)."""
        return values.reshape(-1, GROUP).T

    def spread(self, gates: Tensor, outputs: int, inputs: int) -> Tensor:
        """Back into rows."""
        return gates.T.reshape(outputs, inputs)

    def shares(self, count: int) -> Tensor:
        """All alike, shape (4, count)."""
        return torch.full((GROUP, count), 1 / (GROUP * count))

    def kept(self, alpha: Tensor, gates: Tensor) -> Tensor:
        """Exactly two of four: where fewer gates are open, the next one's weight starts again from zero."""
        return largest(alpha, KEPT)

    def density(self, gates: Tensor) -> Tensor:
        """As if two of four were open at least."""
        return (gates > 0).sum(0).clamp(min=KEPT).float().mean() / GROUP

    def penalized(self, gates: Tensor, weights: Tensor, p: float) -> Tensor:
        """The mean of those fours alone of which more than two are open.

        The fewer they are, the more each of them weighs, so that the last ones are found as soon.
        """
        more = (gates > 0).sum(0) > KEPT
        return torch.where(more, relative_density(gates, weights, p), 0.0).sum() / more.sum().clamp(min=1)


def largest(values: Tensor, count: int) -> Tensor:
    """Where values are among the `count` largest of their column; bool, shape (n, groups)."""
    return torch.zeros_like(values, dtype=torch.bool).scatter_(0, values.topk(count, 0).indices, True)


def pattern_of(name: str, block_size: int) -> Pattern:
    """The pattern that `WeightSparsityConfig` calls by this name."""
    return {"unstructured": Unstructured(), "block": Blocks(block_size), "2:4": TwoOfFour()}[name]
