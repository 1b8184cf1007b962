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
    """How the gates of a matrix lie on its weights, and which gates compete: all of them, unless a subclass differs."""

    @abstractmethod
    def fits(self, outputs: int, inputs: int) -> bool:
        """Tell whether a matrix of this size can have the pattern."""

    @abstractmethod
    def pool(self, values: Tensor) -> Tensor:
        """Sum values, shape (outputs, inputs), over the weights of every gate: shape (n,), or (4, n)."""

    @abstractmethod
    def spread(self, gates: Tensor, outputs: int, inputs: int) -> Tensor:
        """Lay gates, in the order of `pool`, out on the weights: the gate of every weight, shape (outputs, inputs)."""

    def shares(self, count: int) -> Tensor:
        """Compute the share of the cost that every gate has, for `count` gates, or groups of gates."""
        return torch.full((count,), 1 / count)

    def kept(self, alpha: Tensor, gates: Tensor) -> Tensor:
        """Choose the weights that stay, bool, of the shape of the gates."""
        return gates > 0

    def density(self, gates: Tensor) -> Tensor:
        """Compute the share of gates that are open, shape ()."""
        return (gates > 0).float().mean()

    def penalized(self, gates: Tensor, weights: Tensor, p: float) -> Tensor:
        """Compute the effective density that lambda multiplies, shape ()."""
        return relative_density(gates, weights, p)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """A gate for every weight."""

    def fits(self, outputs: int, inputs: int) -> bool:
        """Return True: every matrix can have it."""
        return True

    def pool(self, values: Tensor) -> Tensor:
        """Flatten values to one per gate; nothing is summed, since every gate has one weight."""
        return values.flatten()

    def spread(self, gates: Tensor, outputs: int, inputs: int) -> Tensor:
        """Give every weight its own gate."""
        return gates.view(outputs, inputs)


@dataclass(frozen=True)
class Blocks(Pattern):
    """A gate for every block of `size` x `size` weights."""

    size: int

    def fits(self, outputs: int, inputs: int) -> bool:
        """Tell whether the matrix consists of whole blocks, as sparse formats demand."""
        return outputs % self.size == 0 and inputs % self.size == 0

    def pool(self, values: Tensor) -> Tensor:
        """Sum values over every block."""
        rows, columns = (length // self.size for length in values.shape)
        return values.reshape(rows, self.size, columns, self.size).sum((1, 3)).flatten()

    def spread(self, gates: Tensor, outputs: int, inputs: int) -> Tensor:
        """Give all weights of a block its gate."""
        rows, columns = outputs // self.size, inputs // self.size
        blocks = gates.view(rows, 1, columns, 1).expand(rows, self.size, columns, self.size)
        return blocks.reshape(outputs, inputs)


@dataclass(frozen=True)
class TwoOfFour(Pattern):
    """A gate for every weight; those of four weights beside each other in a row compete, and two stay."""

    def fits(self, outputs: int, inputs: int) -> bool:
        """Tell whether rows consist of whole groups of four."""
        return inputs % GROUP == 0

    def pool(self, values: Tensor) -> Tensor:
        """Reshape values to one per gate, shape (4, n); nothing is summed."""
        return values.reshape(-1, GROUP).T

    def spread(self, gates: Tensor, outputs: int, inputs: int) -> Tensor:
        """Put gates, shape (4, n), back into rows."""
        return gates.T.reshape(outputs, inputs)

    def shares(self, count: int) -> Tensor:
        """Give every gate the same share, shape (4, count)."""
        return torch.full((GROUP, count), 1 / (GROUP * count))

    def kept(self, alpha: Tensor, gates: Tensor) -> Tensor:
        """Keep exactly two of four: where fewer gates are open, the next weight starts again from zero."""
        return largest(alpha, KEPT)

    def density(self, gates: Tensor) -> Tensor:
        """Compute the density as if at least two of every four gates were open."""
        return (gates > 0).sum(0).clamp(min=KEPT).float().mean() / GROUP

    def penalized(self, gates: Tensor, weights: Tensor, p: float) -> Tensor:
        """Compute the mean over only those groups of four of which more than two gates are open.

        The fewer such groups are left, the more each of them weighs, so that the last ones close as fast as the first.
        """
        more = (gates > 0).sum(0) > KEPT
        return torch.where(more, relative_density(gates, weights, p), 0.0).sum() / more.sum().clamp(min=1)


def largest(values: Tensor, count: int) -> Tensor:
    """Find the `count` largest values of every column; bool, shape (n, groups)."""
    return torch.zeros_like(values, dtype=torch.bool).scatter_(0, values.topk(count, 0).indices, True)


def pattern_of(name: str, block_size: int) -> Pattern:
    """Return the pattern that has this name in `WeightSparsityConfig`."""
    return {"unstructured": Unstructured(), "block": Blocks(block_size), "2:4": TwoOfFour()}[name]
