"""Gates whose density a controller steers, whatever it is that they scale."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_sparse.config import SearchConfig
from hf_sparse.gates.controller import Controller, Schedule, descended
from hf_sparse.gates.mathematics import GateGroup
from hf_sparse.gates.scaling import Scaler

BANK = "sparsity_gates"
"""Name of the submodule that holds the gates of a model; their parameters start with it in checkpoints."""


class SteeredGates(Scaler):
    """The gates of a model, in groups that compete, with the controller that steers their penalty.

    Attributes:
        config: gate and controller settings.
        controller: of lambda, one for every density that is steered.
        start_density: that it descends from.
    """

    config: SearchConfig
    controller: Controller
    start_density: float

    @property
    def target_density(self) -> float:
        """The density to end at."""
        return self.config.density

    def scheduled_density(self, progress: float) -> float:
        """The density that the schedule asks for, where its descent has come so far: from 0 to 1."""
        return descended(self.start_density, self.target_density, progress)

    @property
    @abstractmethod
    def largest_unit(self) -> float:
        """The largest share of the density that goes with one unit, or with as many as go together."""

    @property
    def warm_start(self) -> float:
        """The power of the sensitivities that importances start from."""
        given = self.config.warm_start
        return self._usual_warm_start if given is None else given

    @property
    @abstractmethod
    def _usual_warm_start(self) -> float:
        """Default warm-start power."""

    @abstractmethod
    def group_gates(self) -> dict[str, Tensor]:
        """The gates of every group."""

    @abstractmethod
    def density(self, gates: dict[str, Tensor]) -> Tensor:
        """Exact density of the model with these gates, shape ()."""

    @abstractmethod
    def densities(self, gates: dict[str, Tensor]) -> dict[str, Tensor]:
        """That of every group, 1 while all of its gates are open, shape ()."""

    @abstractmethod
    def steered_densities(self, gates: dict[str, Tensor]) -> Tensor:
        """What the controller holds to its schedule, shape (k,)."""

    @abstractmethod
    def penalties(self, gates: dict[str, Tensor]) -> Tensor:
        """The parts of R that a lambda each is for, shape (k,)."""

    def penalty(self, gates: dict[str, Tensor]) -> Tensor:
        """R: the effective densities of all groups, weighted by their share of what can be pruned, shape ()."""
        return self.penalties(gates).sum()

    def penalize_(self, step: int, schedule: Schedule) -> None:
        """Steer lambda by the densities, in place, and add the gradient of lambda * R to the gradients of the gates.

        Args:
            step: optimizer steps that are over.
            schedule: of the stage that they are in.
        """
        parameters = list(self.parameters())
        with torch.enable_grad():
            gates = self.group_gates()
            multipliers = self.controller.steer_(self.steered_densities(gates), step, schedule)
            slopes = torch.autograd.grad((multipliers * self.penalties(gates)).sum(), parameters)
        for parameter, slope in zip(parameters, slopes):
            parameter.grad = slope if parameter.grad is None else parameter.grad + slope

    def reopen_(self) -> None:
        """Undo in place what was learnt: every gate is exactly 1, none more important than another, and lambda zero."""
        for module in self.modules():
            if isinstance(module, GateGroup):
                module.reopen_()
        self.controller.reset_()

    @abstractmethod
    def pooled(self, name: str, values: Tensor) -> Tensor:
        """Sums of values of the shape of a scale, by its name, over what each of its gates scales."""

    @abstractmethod
    def start_from_(self, sensitivities: Mapping[str, Tensor], power: float) -> None:
        """Set the importances in place to a power of what the loss loses without each; every gate stays exactly 1.

        Args:
            sensitivities: by the names of the scales, not negative.
            power: 0 for all alike.
        """


def attached_gates(model: nn.Module) -> SteeredGates | None:
    """The gates attached to a model, of whatever kind, or None."""
    gates = model._modules.get(BANK)
    return gates if isinstance(gates, SteeredGates) else None


def log_importances(sensitivities: Tensor, power: float) -> Tensor:
    """Importances from sensitivities; what no row depends on starts as the least of the others.

    Args:
        sensitivities: not negative, one at least above 0.
        power: that they are raised to.
    """
    least = sensitivities[sensitivities > 0].min()
    return power * sensitivities.clamp(min=least).log()
