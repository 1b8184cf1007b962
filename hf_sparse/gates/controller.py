"""The target schedule and the multiplier lambda that holds the exact density to it."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hf_sparse.config import SearchConfig
from hf_sparse.gates.mathematics import Float32Module

LONG_RAMP = 50
"""Steps of a descent from which on gates have their whole learning rate where kinds share the target."""


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps at which the phases of a stage end; it begins at `start`, its recovery lasts until `end`."""

    start: int
    warmup_end: int
    ramp_end: int
    hold_end: int
    end: int
    pace: float = 1.0
    """The share of their learning rate that gates have: sensitivities know more than a few steps can teach."""

    @classmethod
    def stages(cls, config: SearchConfig, total: int) -> tuple["Schedule", ...]:
        """Divide a run of `total` optimizer steps into stages of equal lengths, one for each target."""
        count = len(config.descent)
        ends = [round(total * (stage + 1) / count) for stage in range(count)]
        return tuple(cls._stage(config, start, end) for start, end in zip([0, *ends], ends))

    @classmethod
    def _stage(cls, config: SearchConfig, start: int, end: int) -> "Schedule":
        steps = end - start
        warmup = start + round(config.sparsity_warmup * steps)
        ramp = warmup + max(1, round(config.sparsity_ramp * steps))
        hold = ramp + round(config.sparsity_hold * steps)
        pace = min(1.0, (ramp - warmup) / LONG_RAMP) if config.shares_target else 1.0
        return cls(start, warmup, ramp, hold, end, pace)

    def progress_at(self, step: int) -> float:
        """Compute the share of the descent that is over at an optimizer step: 0 in the warm-up, then linear to 1."""
        return _passed(step, self.warmup_end, self.ramp_end)

    def recovery_at(self, step: int) -> float:
        """Compute the share of the recovery that is over at an optimizer step: 0 before it, then linear to 1."""
        return _passed(step, self.hold_end, self.end)


Density = TypeVar("Density", float, Tensor)


def descended(start: Density, target: Density, progress: float) -> Density:
    """Compute the scheduled density after this share of a descent from `start` to `target`, from 0 to 1."""
    return start - progress * (start - target)


def _passed(step: int, start: int, end: int) -> float:
    """How much of a phase is over at an optimizer step, from 0 to 1."""
    return min(max((step - start) / max(end - start, 1), 0.0), 1.0)


class Controller(Float32Module):
    """Steers lambda by the error between exact and scheduled density; a module, so that checkpoints carry its state.

    lambda = integral + proportional * error, where the integral accumulates `gain * error` over one ramp. All of it
    stays on the device: steering never waits for a copy to the host.

    Args:
        gain: growth of lambda over a ramp in which the density is too high by 1.
        starts: densities to descend from, each with a lambda of its own, shape (k,).
        targets: densities to descend to, shape (k,).
    """

    PROPORTIONAL = 5.0
    LEAST_ERROR = 0.01
    """The least size of an error once the ramp is over: without it the density would only ever come near its target."""

    starts: Tensor
    targets: Tensor
    integral: Tensor
    multiplier: Tensor

    def __init__(self, gain: float, starts: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.gain = gain
        self.register_buffer("starts", starts.float())
        self.register_buffer("targets", targets.float())
        self.register_buffer("integral", torch.zeros(len(targets)))
        self.register_buffer("multiplier", torch.zeros(len(targets)))

    @torch.no_grad()
    def steer_(self, densities: Tensor, step: int, schedule: Schedule) -> Tensor:
        """Update every lambda in place by its density, once per optimizer step, and return them; shapes (k,)."""
        if step < schedule.warmup_end:
            return self.multiplier
        error = densities - descended(self.starts, self.targets, schedule.progress_at(step))
        if step >= schedule.ramp_end:
            error = error.sign() * error.abs().clamp(min=self.LEAST_ERROR)
        gain = self.gain / (schedule.ramp_end - schedule.warmup_end)
        self.integral.add_(gain * error)
        self.multiplier.copy_(self.integral + self.PROPORTIONAL * error)
        return self.multiplier

    def reset_(self) -> None:
        """Set every lambda back to zero, in place."""
        self.integral.zero_()
        self.multiplier.zero_()
