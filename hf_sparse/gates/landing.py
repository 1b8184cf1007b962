"""Shorten optimizer steps of the gates, so that the density never falls through its schedule or its target.

Many gates can close in one step, since the penalty moves all of them at the same speed. A step that went too far is
repeated with a smaller learning rate: the structure is one that gradient descent has passed through, and no unit is
chosen in another way.
"""

import torch
from torch import Tensor

from hf_sparse.gates.base import SteeredGates

TOLERANCE = 0.001
"""A step that ends this close to where it should end is taken as it is."""

SLACK = 0.005
"""How far below its schedule the density may be, if its largest unit is not larger: steering takes a few steps."""

TRIES = 24
"""How often a shorter step is tried."""


class Descent:
    """Remembers the gates before an optimizer step, to shorten the step afterwards where it went too far.

    Args:
        bank: the gates, before the step.
        scheduled: the density that the schedule asks for after the step.
    """

    def __init__(self, bank: SteeredGates, scheduled: float) -> None:
        self.bank = bank
        self.scheduled = scheduled
        self.before = [parameter.detach().clone() for parameter in bank.parameters()]
        self.density = self._density()

    @torch.no_grad()
    def _density(self) -> Tensor:
        return self.bank.density(self.bank.group_gates())

    @torch.no_grad()
    def settle_(self) -> bool:
        """Shorten the step in place where it went too far, and tell whether the density has reached its target.

        On the way down the density stays at most the slack below its schedule; the step that crosses the target ends at
        the density nearest to it. Reads the device once, and more often only for a step that is shortened.
        """
        target, slack = self.bank.target_density, max(SLACK, self.bank.largest_unit)
        before, after = torch.stack([self.density, self._density()]).tolist()
        if before > target:
            goal = max(target, min(self.scheduled - slack, before))
            too_far = after < goal
        else:  # gates had closed before their densities were held to a schedule
            goal, too_far = target, after > target
        if goal == target and abs(after - target) <= TOLERANCE:
            return True
        if too_far:
            self._shorten_(before - goal, after - goal, goal, nearest=goal == target)
        return too_far and goal == target

    def _shorten_(self, before: float, after: float, goal: float, nearest: bool) -> None:
        """Repeat the step in place with the share of its length that ends where the density crosses its goal.

        Args:
            before: density before the step, less the goal.
            after: density after the step, less the goal; of the other sign.
            goal: the density to end at.
            nearest: whether to end at the density nearest to the goal, or else at the nearest before it.
        """
        ends = [parameter.detach().clone() for parameter in self.bank.parameters()]

        def excess(share: float) -> float:
            for parameter, start, end in zip(self.bank.parameters(), self.before, ends):
                parameter.copy_(torch.lerp(start, end, share))
            return self._density().item() - goal

        short, long = (0.0, before), (1.0, after)  # (share of the step, excess) on both sides of the goal
        for _ in range(TRIES):
            if abs(short[1]) <= TOLERANCE or (nearest and abs(long[1]) <= TOLERANCE):
                break
            # Where a line between the two crosses the goal, but well inside, since densities fall in jumps.
            crossing = min(max(short[1] / (short[1] - long[1]), 0.1), 0.9)
            share = short[0] + (long[0] - short[0]) * crossing
            found = share, excess(share)
            short, long = (found, long) if (found[1] > 0) == (before > 0) else (short, found)
        excess(min(short, long, key=lambda side: abs(side[1]))[0] if nearest else short[0])
