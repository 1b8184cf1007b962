"""The target schedule and the multiplier lambda that holds the exact density to it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.config import SparsityConfig
from hf_sparse.gates import Float32Module


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps at which each phase ends; recovery lasts from `hold_end` to `total`."""

    warmup_end: int
    ramp_end: int
    hold_end: int
    total: int
    target_density: float

    @classmethod
    def from_config(cls, config: SparsityConfig, total: int) -> "Schedule":
        """The phases of a run of `total` optimizer steps."""
        warmup = round(config.sparsity_warmup * total)
        ramp = warmup + max(1, round(config.sparsity_ramp * total))
        hold = ramp + round(config.sparsity_hold * total)
        return cls(warmup, ramp, hold, total, 1.0 - config.target)

    def progress_at(self, step: int) -> float:
        """How far the descent is at an optimizer step: 0 in the warm-up, then linear to 1."""
        return min(max((step - self.warmup_end) / (self.ramp_end - self.warmup_end), 0.0), 1.0)

    def density_at(self, step: int) -> float:
        """The density that the schedule asks for at an optimizer step."""
        return 1.0 - self.progress_at(step) * (1.0 - self.target_density)


class Controller(Float32Module):
    """Steers lambda by the error between exact and scheduled density; a module, so that checkpoints carry its state.

    lambda = integral + proportional * max(error, 0), where the integral accumulates `gain * error` over one ramp. All
    of it stays on the device: steering never waits for a copy to the host.

    Args:
        gain: growth of lambda over a ramp in which the density is too high by 1.
        targets: densities to descend to, each with a lambda of its own, shape (k,).
    """

    PROPORTIONAL = 5.0

    targets: Tensor
    integral: Tensor
    multiplier: Tensor
    fixed: Tensor

    def __init__(self, gain: float, targets: Tensor) -> None:
        super().__init__()
        self.gain = gain
        self.register_buffer("targets", targets.float())
        self.register_buffer("integral", torch.zeros(len(targets)))
        self.register_buffer("multiplier", torch.zeros(len(targets)))
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def steer_(self, densities: Tensor, step: int, schedule: Schedule) -> Tensor:
        """Update every lambda in place by its density, once per optimizer step, and return them; shapes (k,)."""
        if step < schedule.warmup_end:
            return self.multiplier
        error = densities - (1.0 - schedule.progress_at(step) * (1.0 - self.targets))
        gain = self.gain / (schedule.ramp_end - schedule.warmup_end)
        self.integral.add_(gain * error)
        self.multiplier.copy_(self.integral + self.PROPORTIONAL * error)
        return self.multiplier
