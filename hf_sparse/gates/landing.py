"""Scale optimizer steps of the gates, so that the density follows its schedule, and lands on its target.

The penalty moves all gates at the same speed: none can close for many steps, and then many close in one. A step that
went too far is repeated with a smaller learning rate; where gates have thresholds that may rise, the penalty's step of
these is made longer after a step that did not go far enough. The structure is one that gradient descent has passed
through, and no unit is chosen in another way.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_sparse.gates.base import Part, SteeredGates
from hf_sparse.gates.controller import descended

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
        progress: the share of the descent that is over after the step, from 0 to 1.
    """

    def __init__(self, bank: SteeredGates, progress: float) -> None:
        self.steps = [PartOfStep(part, progress) for part in bank.parts()]

    @torch.no_grad()
    def settle_(self) -> bool:
        """Scale the step in place where its length was wrong, and tell whether the density has reached its target.

        On the way down the density stays at most the slack below its schedule, and at most the lag above it where
        thresholds may rise; the step that crosses the target, or ends the descent, ends at the density nearest to it.
        Reads the device once, and more often only for a step that is scaled.
        """
        ends = torch.stack([torch.stack([step.density, step.part.density()]) for step in self.steps]).tolist()
        return all([step.settle_(before, after) for step, (before, after) in zip(self.steps, ends)])


class PartOfStep:
    """The step of those gates that are held to a schedule of their own.

    Args:
        part: of the gates, before the step.
        progress: the share of the descent that is over after the step.
    """

    def __init__(self, part: Part, progress: float) -> None:
        self.part = part
        self.scheduled = descended(part.start, part.target, progress)
        self.before = _values(part.parameters)
        with torch.no_grad():
            self.density = part.density()

    def settle_(self, before: float, after: float) -> bool:
        """Scale the step in place where its length was wrong, and tell whether the density is at its target.

        Args:
            before: density before the step.
            after: density after the step.
        """
        part, target = self.part, self.part.target
        slack, lag = max(SLACK * part.start, part.unit), LAG * part.start
        if before <= target:  # it has landed before other parts, or gates had closed before they were held to this
            if after > target:
                self._shorten_(before, after, target, nearest=True)
                return True
            if after < before:
                self._shorten_(before, after, before, nearest=False)
            return abs(before - target) <= part.unit
        lowest = max(target, min(self.scheduled - slack, before))
        if lowest == target and abs(after - target) <= TOLERANCE:
            return True
        highest = self.scheduled + lag if self.scheduled > target else target
        if after < lowest:
            self._shorten_(before, after, lowest, nearest=lowest == target)
            return lowest == target
        rises = bool(part.thresholds) and after > highest
        return rises and self._lengthen_(after, highest) and highest == target

    def _shorten_(self, before: float, after: float, goal: float, nearest: bool) -> None:
        """Repeat the step in place with the share of its length that ends where the density crosses its goal.

        Args:
            before: density before the step.
            after: density after the step, on the other side of the goal.
            goal: the density to end at.
            nearest: whether to end at the density nearest to the goal, or else at the nearest before it.
        """
        parameters = self.part.parameters
        self._end_between_(parameters, (self.before, before), (_values(parameters), after), goal, nearest)

    def _lengthen_(self, after: float, goal: float) -> bool:
        """Let the thresholds rise in place until the density is nearest to its goal; False if it cannot fall so far.

        A rising threshold is a step of the penalty: its gradient for a threshold has one sign only.
        """
        thresholds = self.part.thresholds
        starts, rise, density = _values(thresholds), FIRST_RISE, after
        while density > goal:
            if rise > LARGEST_RISE:
                return False
            for threshold, start in zip(thresholds, starts):
                threshold.copy_(start + rise)
            density, rise = self.part.density().item(), 2 * rise
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
            return self.part.density().item() - goal

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
