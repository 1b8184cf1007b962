"""The base class of all gates: their density is steered by a controller, whatever they scale."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_sparse.config import SearchConfig
from hf_sparse.gates.controller import Controller, Schedule, descended
from hf_sparse.gates.mathematics import GateGroup
from hf_sparse.gates.scaling import Scaler

BANK = "sparsity_gates"
"""Name of the submodule that holds the gates of a model; their parameters start with it in checkpoints."""


@dataclass(frozen=True)
class Part:
    """Gates that are held to a schedule of their own, apart from other gates.

    Attributes:
        parameters: of these gates.
        density: computes their density, shape (), in the units of `start` and `target`.
        start: the density that their descent starts from.
        target: the density that it ends at.
        unit: the largest density that is lost with one unit, or with units that can only be removed together.
        thresholds: the parameters that rise where the density is above its schedule; by default none does, and lambda
            alone takes it down, which takes longer and lets gates of units that stay open further.
    """

    parameters: Sequence[nn.Parameter]
    density: Callable[[], Tensor]
    start: float
    target: float
    unit: float
    thresholds: Sequence[nn.Parameter] = ()


class SteeredGates(Scaler):
    """The gates of a model, in groups that compete, with the controller that steers their penalty.

    Attributes:
        config: gate and controller settings.
        controller: steers a lambda for every density that is held to a schedule.
        start_density: the density that the descent starts from.
    """

    config: SearchConfig
    controller: Controller
    start_density: float

    @property
    def target_density(self) -> float:
        """The density that the descent ends at."""
        return self.config.density

    def scheduled_density(self, progress: float) -> float:
        """Compute the density that the schedule asks for after this share of the descent, from 0 to 1."""
        return descended(self.start_density, self.target_density, progress)

    @property
    @abstractmethod
    def largest_unit(self) -> float:
        """The largest density that is lost with one unit, or with the units that can only be removed together."""

    @property
    def warm_start(self) -> float:
        """The power of the sensitivities that importances start at."""
        given = self.config.warm_start
        return self._usual_warm_start if given is None else given

    @property
    @abstractmethod
    def _usual_warm_start(self) -> float:
        """Default warm-start power."""

    def parts(self) -> list[Part]:
        """Divide the gates into those that are held to a schedule of their own: by default, all are held to one."""
        whole = Part(
            list(self.parameters()),
            lambda: self.density(self.group_gates()),
            self.start_density,
            self.target_density,
            self.largest_unit,
        )
        return [whole]

    @abstractmethod
    def group_gates(self) -> dict[str, Tensor]:
        """Compute the gates of every group, by its name."""

    @abstractmethod
    def density(self, gates: dict[str, Tensor]) -> Tensor:
        """Compute the exact density of the model with these gates, shape ()."""

    @abstractmethod
    def densities(self, gates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the exact density of every kind of unit, shape (); 1 while all of its gates are open."""

    @abstractmethod
    def steered_densities(self, gates: dict[str, Tensor]) -> Tensor:
        """Compute the densities that the controller holds to their schedule, shape (k,)."""

    @abstractmethod
    def penalties(self, gates: dict[str, Tensor]) -> Tensor:
        """Compute the parts of the penalty R that have a lambda of their own, shape (k,)."""

    def penalty(self, gates: dict[str, Tensor]) -> Tensor:
        """Compute R: the effective densities of all groups, weighted by their share of the prunable cost, shape ()."""
        return self.penalties(gates).sum()

    def penalize_(self, step: int, schedule: Schedule) -> None:
        """Steer lambda by the densities, in place, and add the gradient of lambda * R to the gradients of the gates.

        Args:
            step: the number of optimizer steps that are over.
            schedule: the schedule of the current stage.
        """
        parameters = list(self.parameters())
        with torch.enable_grad():
            gates = self.group_gates()
            multipliers = self.controller.steer_(self.steered_densities(gates), step, schedule)
            slopes = torch.autograd.grad((multipliers * self.penalties(gates)).sum(), parameters)
        for parameter, slope in zip(parameters, slopes):
            parameter.grad = slope if parameter.grad is None else parameter.grad + slope

    def reopen_(self) -> None:
        """Undo in place what was learnt: every gate is exactly 1, all are equally important, and lambda is zero."""
        for module in self.modules():
            if isinstance(module, GateGroup):
                module.reopen_()
        self.controller.reset_()

    @abstractmethod
    def pooled(self, name: str, values: Tensor) -> Tensor:
        """Sum values, of the shape of the scale with this name, over what each of its gates scales."""

    @abstractmethod
    def start_from_(self, sensitivities: Mapping[str, Tensor], power: float) -> None:
        """Set the importances in place to a power of the sensitivities; every gate stays exactly 1.

        Args:
            sensitivities: how much the loss depends on each gate, by the names of the scales, not negative.
            power: 0 makes all importances equal.
        """


def attached_gates(model: nn.Module) -> SteeredGates | None:
    """Return the gates attached to a model, of whatever kind, or None."""
    gates = model._modules.get(BANK)
    return gates if isinstance(gates, SteeredGates) else None


def log_importances(sensitivities: Tensor, power: float) -> Tensor:
    """Compute logarithms of importances from sensitivities; a sensitivity of 0 counts as the smallest of the others.

    Args:
        sensitivities: not negative, one at least above 0.
        power: what they are raised to.
    """
    least = sensitivities[sensitivities > 0].min()
    return power * sensitivities.clamp(min=least).log()
