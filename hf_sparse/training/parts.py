"""State what a Trainer needs of a search for structure, and in which order its bases stand."""

from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer

from hf_sparse.training.run import Run


class Searching(Protocol):
    """What a Trainer asks of a search for structure."""

    @property
    def in_last_form(self) -> bool:
        """Whether the model has the structure that the run ends with."""

    def optimizer_with_gates(self, model: nn.Module | None) -> Optimizer:
        """The optimizer of weights and gates."""

    def plan_(self, steps: int) -> None:
        """Lay out the stages of a training, in place."""

    def stretched(self, scheduler: LRScheduler) -> LambdaLR:
        """The stock scheduler, begun in every stage when its search ends."""

    def before_step(self, inputs: dict[str, Any]) -> None:
        """Find out on the inputs of a step what is not known yet, and start the gates in place if that is due."""

    def logged(self) -> dict[str, float]:
        """Densities and lambda."""

    def go_on_from_(self, checkpoint: Path) -> None:
        """Give the model the form that it had at a checkpoint, in place."""

    def prepared_(self, checkpoint: Path | None) -> None:
        """Train gates, in place, beside an engine that does not."""

    def save_gates(self, checkpoint: Path) -> None:
        """Write what the engine does not write of gates."""

    def state(self) -> Run:
        """The run as a checkpoint has it."""

    def finish_(self) -> None:
        """End the last stage, in place, and warn if its structure was not found."""


def require_order(kind: type, ours: type) -> None:
    """Refuse an order of bases in which another Trainer would hide what ours adds.

    Args:
        kind: a class that is being made.
        ours: its base that has to come before other Trainers.

    Raises:
        TypeError: it does not.
    """
    before = kind.__mro__[: kind.__mro__.index(ours)]
    hiding = [base.__name__ for base in before if issubclass(base, Trainer) and not issubclass(base, ours)]
    if hiding:
        mixin = next(base.__name__ for base in before[::-1] if issubclass(base, ours) and base is not kind)
        raise TypeError(
            f"{kind.__name__} names {hiding[0]} before {mixin}, which would hide what {mixin} adds: write "
            f"class {kind.__name__}({mixin}, {hiding[0]})"
        )
