"""Train a model on one device; subclasses override what differs with several processes.

The same operation has the same name under every engine, so that nothing outside this package asks which one is on.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from hf_sparse.errors import SparsityError
from hf_sparse.gates.base import SteeredGates
from hf_sparse.runtime.contexts import plain_forward, unchanged_random_state

FORWARDS = ("forward", "_original_forward")
"""What accelerate sets on a model that it prepares: a forward with mixed precision, and the one before."""


@dataclass(frozen=True)
class Training:
    """The objects that train a model.

    Attributes:
        wrapped: the model as the engine has wrapped it.
        optimizer: of its parameters.
        scheduler: of the learning rate.
        fresh_optimizer: makes an optimizer of the weights that the model has then, without gates.
    """

    wrapped: nn.Module
    optimizer: Any
    scheduler: Any
    fresh_optimizer: Callable[[], Optimizer]


class Engine:
    """Trains a model on one device, and is the base of the engines for several processes.

    Attributes:
        shards_weights: whether every process has a share of the weights only.
        optimizes_gates: whether its optimizer takes the gates as a parameter group; else they have their own.
        loads_when_prepared: whether it reads the weights of a checkpoint after it has prepared the model.
        evaluates_others: whether Trainer can evaluate another model than the one that the engine was given.
    """

    shards_weights = False
    optimizes_gates = True
    loads_when_prepared = False
    evaluates_others = True

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def check_(self) -> None:
        """Refuse settings with which gates would not be exact; may change accelerate's plugin in place.

        Raises:
            SparsityError: which setting it is, and what to do instead.
        """

    def take_(self, model: PreTrainedModel) -> None:
        """Make a model whole, in place, on the main process if its weights were sharded while they were loaded.

        Raises:
            SparsityError: it was sharded by something else.
        """
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise SparsityError(
                "the model is sharded already (tensor parallelism, or loaded in shards): load it whole, and let "
                "`accelerate launch` shard it by FSDP2"
            )

    def is_in_shards(self, model: nn.Module) -> bool:
        """Whether every process has a share of a model's weights only, at this moment."""
        return False

    def share(self, parameter: Tensor) -> Tensor:
        """The share of a parameter that this process has."""
        return parameter

    def hidden_gates(self, model: nn.Module) -> AbstractContextManager[None]:
        """Hide gates from the engine inside this context, if it would take all parameters for its own."""
        return nullcontext()

    def preparing(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Let Trainer hand a model to the engine inside this context."""
        return nullcontext()

    def gathered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Make a sharded model whole on the main process inside this context, in place, to be read and not changed.

        All processes must come here together.
        """
        return nullcontext()

    def evaluating(self, trainer: Any) -> AbstractContextManager[None]:
        """Let a Trainer evaluate its model inside this context, before it has trained or once it has left the engine.

        The model is whole on every process and stays so.
        """
        return nullcontext()

    @contextmanager
    def editing(self, model: PreTrainedModel, training: Training) -> Iterator[None]:
        """Change parameters of a model inside this context; on leaving it, in place, the engine trains the new ones.

        Parameters are matched by name: one that stays itself keeps the optimizer's state, one that was replaced starts
        a new one, one that is gone is forgotten; those that the model does not own stay. Inside, the model's forward is
        its own, without the mixed precision that accelerate puts around it, random numbers drawn leave those of the
        training as they are, and a sharded model is whole on the main process. All processes leave with the values of
        the main one.
        """
        optimizer = training.optimizer
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = [[(names.get(id(one)), one) for one in group["params"]] for group in optimizer.param_groups]
        with plain_forward(model), unchanged_random_state(self.accelerator.device):
            yield
        parameters = dict(model.named_parameters())
        for group, members in zip(optimizer.param_groups, groups):  # those without a name are of a loss, say
            left = [(name, one) for name, one in members if name is None or name in parameters]
            group["params"] = [one if name is None else parameters[name] for name, one in left]
        alive = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for parameter in [parameter for parameter in optimizer.state if id(parameter) not in alive]:
            del optimizer.state[parameter]

    def leave_(self, model: nn.Module, training: Training) -> None:
        """End the sharding of a model, in place: it is whole on the main process, and has no values on the others."""

    def average_gates_(self, gates: SteeredGates) -> None:
        """Hook the parameters of gates, if the engine does not average their gradients over processes itself."""

    def freeze_(self, teacher: PreTrainedModel, whole: bool) -> bool:
        """Put a frozen teacher, in place, where it is asked.

        Args:
            teacher: in evaluation mode.
            whole: whether every process needs all of it.

        Returns:
            Whether it is in shards, so that all processes have to ask it together.
        """
        nn.Module.to(teacher, self.accelerator.device)  # transformers wraps `to` in a way that hides its type
        return False

    def complete_(self, optimizer: Any) -> None:
        """Give an optimizer, in place, all that it has to have to be loaded from a checkpoint that is written now."""

    def save_gates(self, gates: SteeredGates, optimizer: Optimizer | None, directory: Path) -> None:
        """Write gates, and the state of their optimizer, to a checkpoint that would lack them."""

    def load_gates_(self, gates: SteeredGates, optimizer: Optimizer | None, directory: Path) -> None:
        """Read back, in place, what `save_gates` wrote."""


@contextmanager
def evaluated_as_it_is(trainer: Any) -> Iterator[None]:
    """Let a Trainer evaluate its model inside this context without an engine that would train or shard it."""
    wrapped, uses_deepspeed = trainer.model_wrapped, trainer.is_deepspeed_enabled
    own = vars(trainer.model)
    forwards = {name: own[name] for name in FORWARDS if name in own}
    trainer.is_deepspeed_enabled = False
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
    try:
        yield
    finally:
        trainer.model_wrapped, trainer.is_deepspeed_enabled = wrapped, uses_deepspeed
        for name in FORWARDS:
            own.pop(name, None)
        own.update(forwards)


def average_gradients_(gates: nn.Module, accelerator: Accelerator) -> None:
    """Hook the parameters of gates, so that their gradients, once complete, become the average over all processes.

    It has to be done before gradients are clipped, all together.
    """

    def average(parameter: Tensor) -> None:
        if accelerator.sync_gradients and parameter.grad is not None:
            parameter.grad.copy_(accelerator.reduce(parameter.grad, "mean"))

    for parameter in gates.parameters():
        parameter.register_post_accumulate_grad_hook(average)


def trains(model: nn.Module) -> bool:
    """Whether a model has parameters, be they of gates, that are not frozen."""
    return any(parameter.requires_grad for parameter in model.parameters())
