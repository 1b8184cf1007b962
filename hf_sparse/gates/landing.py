"""Scale optimizer steps of the gates, so that the density follows its schedule however short the ramp is.

The penalty moves all gates at the same speed: none can close for many steps, and then many close in one. A step that
went too far is repeated with a smaller learning rate; after one that did not go far enough, the penalty's step of the
thresholds is made longer. The structure is one that gradient descent has passed through, and no unit is chosen in
another way.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_sparse.gates.base import SteeredGates

TOLERANCE = 0.001
"""A step that ends this close to where it should end is taken as it is."""

SLACK = 0.005
"""How far below its schedule the density may be, if its largest unit is not larger: steering takes a few steps."""

LAG = 0.015
"""How far above its schedule the density may be, so that lambda still feels what gates cost."""

STRAIGHT_TRIES, TRIES = 4, 28
"""How often another length of a step is tried: at first as if the density fell along a line, then by bisection."""

FIRST_RISE, LARGEST_RISE = 0.25, 64.0
"""How much longer the thresholds' step is made at first, and at most, in log importance."""


class Descent:
    """Remembers the gates before an optimizer step, to scale the step afterwards where its length was wrong.

    Args:
        bank: the gates, before the step.
        scheduled: the density that the schedule asks for after the step.
    """

    def __init__(self, bank: SteeredGates, scheduled: float) -> None:
        self.bank = bank
        self.scheduled = scheduled
        self.before = _values(bank.parameters())
        self.density = self._density()

    @torch.no_grad()
    def _density(self) -> Tensor:
        return self.bank.density(self.bank.group_gates())

    @torch.no_grad()
    def settle_(self) -> bool:
        """Scale the step in place where its length was wrong, and tell whether the density has reached its target.

        On the way down the density stays at most the slack below its schedule and the lag above it; the step that
        crosses the target, or ends the descent, ends at the density nearest to it. Reads the device once, and more
        often only for a step that is scaled.
        """
        target, slack = self.bank.target_density, max(SLACK, self.bank.largest_unit)
        before, after = torch.stack([self.density, self._density()]).tolist()
        if before > target:
            lowest = max(target, min(self.scheduled - slack, before))
            too_far = after < lowest
        else:  # gates had closed before their densities were held to a schedule
            lowest, too_far = target, after > target
        if lowest == target and abs(after - target) <= TOLERANCE:
            return True
        highest = self.scheduled + LAG if self.scheduled > target else target
        if too_far:
            self._shorten_(before, after, lowest, nearest=lowest == target)
        elif after > highest:
            return self._lengthen_(after, highest) and highest == target
        return too_far and lowest == target

    def _shorten_(self, before: float, after: float, goal: float, nearest: bool) -> None:
        """Repeat the step in place with the share of its length that ends where the density crosses its goal.

        Args:
            before: density before the step.
            after: density after the step, on the other side of the goal.
            goal: the density to end at.
            nearest: whether to end at the density nearest to the goal, or else at the nearest before it.
        """
        parameters = list(self.bank.parameters())
        self._end_between_(parameters, (self.before, before), (_values(parameters), after), goal, nearest)

    def _lengthen_(self, after: float, goal: float) -> bool:
        """Let the thresholds rise in place until the density is nearest to its goal; False if it cannot fall so far.

        A rising threshold is a step of the penalty: its gradient for a threshold has one sign only.
        """
        thresholds = self.bank.thresholds()
        starts, rise, density = _values(thresholds), FIRST_RISE, after
        while density > goal:
            if rise > LARGEST_RISE:
                return False
            for threshold, start in zip(thresholds, starts):
                threshold.copy_(start + rise)
            density, rise = self._density().item(), 2 * rise
        self._end_between_(thresholds, (starts, after), (_values(thresholds), density), goal, nearest=True)
        return True

    def _end_between_(
        self,
        parameters: Sequence[Tensor],
        first: tuple[list[Tensor], float],
        last: tuple[list[Tensor], float],
        goal: float,
        nearest: bool,
    ) -> None:
        """Set parameters in place to values on the line between two places, where the density crosses a goal.

        Args:
            parameters: of the gates.
            first: values of the parameters, and the density there.
            last: values of the parameters, and the density there, on the other side of the goal.
            goal: the density to end at.
            nearest: whether to end at the density nearest to the goal, or else at the nearest before it.
        """

        def excess(share: float) -> float:
            for parameter, start, end in zip(parameters, first[0], last[0]):
                parameter.copy_(torch.lerp(start, end, share))
            return self._density().item() - goal

        short, long = (0.0, first[1] - goal), (1.0, last[1] - goal)  # (share of the way, excess) on both sides
        for attempt in range(TRIES):
            if abs(short[1]) <= TOLERANCE or (nearest and abs(long[1]) <= TOLERANCE):
                break
            # At first where a line between the two crosses the goal; but densities may fall in one jump.
            crossing = short[1] / (short[1] - long[1]) if attempt < STRAIGHT_TRIES else 0.5
            share = short[0] + (long[0] - short[0]) * crossing
            found = share, excess(share)
            short, long = (found, long) if (found[1] > 0) == (first[1] > goal) else (short, found)
        excess(min(short, long, key=lambda side: abs(side[1]))[0] if nearest else short[0])


def _values(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
