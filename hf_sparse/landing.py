"""The last step of the search: the one that takes the density across its target, shortened so that it lands there."""

import torch
from torch import Tensor

from hf_sparse.steering import SteeredGates

TOLERANCE = 0.001
"""A step that ends this close to the target is taken as it is."""

HALVINGS = 24


class Landing:
    """Remembers the gates before an optimizer step, to tell afterwards whether it reached the target.

    Many gates can close in one step. Where it went too far, it is repeated with a smaller learning rate, which is found
    by bisection: the structure is one that gradient descent has passed through, and no unit is chosen in another way.

    Args:
        bank: the gates, before the step.
    """

    def __init__(self, bank: SteeredGates) -> None:
        self.bank = bank
        self.before = [parameter.detach().clone() for parameter in bank.parameters()]
        self.excess = self._excess()

    @torch.no_grad()
    def _excess(self) -> float:
        return self.bank.density(self.bank.group_gates()).item() - self.bank.target_density

    @torch.no_grad()
    def reached_(self) -> bool:
        """Whether the step reached the target; if it went beyond, gates are moved back to it in place."""
        excess = self._excess()
        if abs(excess) > TOLERANCE and (excess > 0) == (self.excess > 0):
            return False
        after = [parameter.detach().clone() for parameter in self.bank.parameters()]
        low, high, share = 0.0, 1.0, 1.0
        closest = (abs(excess), share)
        for _ in range(HALVINGS):
            if closest[0] <= TOLERANCE:
                break
            share = (low + high) / 2
            self._move(after, share)
            excess = self._excess()
            closest = min(closest, (abs(excess), share))
            low, high = (share, high) if (excess > 0) == (self.excess > 0) else (low, share)
        self._move(after, closest[1])
        return True

    def _move(self, after: list[Tensor], share: float) -> None:
        """Put the gates in place at a share of the step."""
        for parameter, start, end in zip(self.bank.parameters(), self.before, after):
            parameter.copy_(torch.lerp(start, end, share))
