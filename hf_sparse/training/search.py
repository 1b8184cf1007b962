"""The search for a structure, as a Trainer runs it: the gates' optimizer group, penalty, schedule and landing."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_sparse.config import SearchConfig
from hf_sparse.engines.base import trains
from hf_sparse.errors import SparsityError
from hf_sparse.gates.base import SteeredGates, attached_gates
from hf_sparse.gates.controller import Schedule
from hf_sparse.gates.landing import Descent
from hf_sparse.gates.row_slopes import batched_sensitivities
from hf_sparse.gates.sensitivity import sensitivities
from hf_sparse.runtime.contexts import unchanged_random_state
from hf_sparse.training.base import BaseTrainer
from hf_sparse.training.calls import LossCalls
from hf_sparse.training.refusals import check_arguments, check_checkpointing
from hf_sparse.training.resume import require_same_settings, settings
from hf_sparse.training.run import Run
from hf_sparse.training.schedule import after_the_searches

logger = logging.get_logger(__name__)

SENSITIVITY_ROWS, LEAST_SENSITIVITY_ROWS = 128, 16
"""Rows that sensitivities are estimated on, at most and at least."""

SENSITIVITY_STEPS = 6
"""Fewer than the most rows are taken where they fill more than so many steps: backward passes alone, that is four."""


class Form(ABC):
    """What a search makes of the model: which units or weights it removes, and how."""

    def begin_(self) -> None:  # noqa: B027
        """Forget, in place, what was known of the model before this training."""

    def seen_(self) -> None:  # noqa: B027
        """Look, in place, at the first batch of a run."""

    @abstractmethod
    def end_step_(self, search: "Search", structure_found: bool) -> None:
        """Change the model in place where a step has ended the search, or a stage."""

    def finish_(self, search: "Search") -> None:  # noqa: B027
        """End the last stage of a training, in place."""

    @abstractmethod
    def take_(self, run: Run, checkpoint: Path) -> None:
        """Give the model the form it had at a checkpoint, in place: its gates and sizes, not its weights.

        Args:
            run: of the checkpoint.
            checkpoint: its directory.

        Raises:
            SparsityError: it cannot have that form.
        """

    @abstractmethod
    def density_left(self) -> tuple[float, float]:
        """The density of a model whose structure is found, and the one that was asked for."""


class Search(TrainerCallback):
    """Steers gates to the structure that was asked for; its form then removes what they have closed.

    Lambda times the slope of R is added to the gates' gradients once per optimizer step. Not through the loss: there it
    would be counted once per micro-batch and process, and clipped with the task's gradients. Here the trajectory does
    not depend on how a batch is split.

    Args:
        trainer: which trains the model; its model has no gates yet, or those of `config`.
        config: of gates and controller.
        calls: how its loss calls the model.
        form: what the search makes of the model.

    Raises:
        SparsityError: the Trainer has settings with which gates would not be exact.
    """

    def __init__(self, trainer: BaseTrainer, config: SearchConfig, calls: LossCalls, form: Form) -> None:
        check_arguments(trainer.args, trainer.lr_scheduler, trainer.engine.shards_weights)
        trainer.engine.check_()
        self.trainer, self.config, self.calls, self.form = trainer, config, calls, form
        self.schedules: tuple[Schedule, ...] = ()
        self.gate_optimizer: Optimizer | None = None  # where the engine does not train gates
        self._has_gate_group = False
        self._gates_are_due = False  # whether gates are to start in the step that has begun
        self._descent: Descent | None = None
        trainer.add_callback(self)

    @property
    def bank(self) -> SteeredGates | None:
        """The gates of the model, or None if it has none any more."""
        return attached_gates(self.trainer.bare_model)

    @property
    def schedule(self) -> Schedule:
        """That of the stage that the run is in."""
        return self.schedules[self.trainer.run.stage]

    @property
    def is_last_stage(self) -> bool:
        """Whether no further target follows."""
        return self.trainer.run.stage == len(self.config.descent) - 1

    @property
    def in_last_form(self) -> bool:
        """Whether the model has the structure that the run ends with."""
        return self.bank is None and self.is_last_stage

    # ---- Events of a training ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what would not be exact, and open the gates in place where a training begins."""
        check_checkpointing(self.trainer.bare_model)
        if not trains(self.trainer.bare_model):
            raise SparsityError("nothing trains: the model has no gates and is frozen, so save it, or unfreeze a part")
        if state.global_step == 0:  # also where training begins once more, after an error or by another train()
            self._open_gates_()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See whether gates start in this step."""
        self._gates_are_due = self.bank is not None and state.global_step == self.schedule.start

    def before_step(self, inputs: dict[str, Any]) -> None:
        """Find out on the inputs of a step what is not known yet, and start the gates in place if that is due."""
        if self.calls.is_probed and not self._gates_are_due:
            return
        self.trainer.bare_model.train()  # a Trainer may prepare inputs in another way where it evaluates
        with unchanged_random_state(self.trainer.args.device), unchanged_records(self.trainer):
            prepared = self.trainer.prepared(inputs)
            if not self.calls.is_probed:
                self.calls.record(prepared)
                self.form.seen_()
                self.calls.probe()
            if self._gates_are_due:
                self.start_gates_(prepared)
        self._gates_are_due = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Steer lambda and add its share to the gradients of the gates, in place."""
        bank, schedule, step = self.bank, self.schedule, state.global_step
        if bank is None:
            return
        bank.penalize_(step, schedule)
        # Reads the device only while the structure is searched, never in the long recovery.
        due = step >= schedule.warmup_end
        self._descent = Descent(bank, schedule.progress_at(step + 1)) if due else None
        if self.gate_optimizer is not None:
            self.gate_optimizer.step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the form change the model in place, once its structure is found or its stage is over."""
        descent, self._descent = self._descent, None
        structure_found = descent is not None and descent.settle_()
        self.form.end_step_(self, structure_found)
        if structure_found and not trains(self.trainer.bare_model):  # all weights are frozen, so none has to recover
            control.should_training_stop = True

    def finish_(self) -> None:
        """End the last stage, in place, and warn if its structure was not found."""
        if not self.in_last_form:
            bank = self.bank
            target = self.form.density_left()[1] if bank is None else bank.target_density
            left = self.form.density_left()[0] if bank is None else bank.density(bank.group_gates()).item()
            logger.warning(
                "The structure was not found: the density is %.3f, its target %.3f. Train for more steps, or raise "
                "sparsity_ramp%s.",
                left,
                target,
                " or gate_learning_rate" if left > target else ", or lower gate_learning_rate",
            )
        self.form.finish_(self)

    # ---- Optimizer and schedule ----

    def optimizer_with_gates(self, model: nn.Module | None) -> Optimizer:
        """The optimizer of the weights, with the gates in a parameter group of their own, last."""
        trainer = self.trainer
        if not trainer.engine.optimizes_gates:
            return trainer.optimizer or trainer.optimizer_of_weights(model)
        if trainer.optimizer is not None and self._has_gate_group:
            self.train_gates_()
            return trainer.optimizer
        optimizer = trainer.optimizer_of_weights(model)
        optimizer.add_param_group({"params": [], "lr": self.config.gate_learning_rate, "weight_decay": 0.0})
        self._has_gate_group = True
        self.train_gates_()
        return optimizer

    def train_gates_(self) -> None:
        """Let an optimizer train the gates that the model has now, in place: its last group, or one of their own."""
        trainer, bank = self.trainer, self.bank
        gates = list(bank.parameters()) if bank is not None else []
        if trainer.engine.optimizes_gates:
            assert trainer.optimizer is not None
            trainer.optimizer.param_groups[-1]["params"] = gates
        else:
            kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.bare_model)
            options |= {"lr": self.config.gate_learning_rate * self.schedule.pace, "weight_decay": 0.0}
            self.gate_optimizer = kind(gates, **options) if gates else None
        if bank is not None:
            trainer.engine.average_gates_(bank)

    def prepared_(self, checkpoint: Path | None) -> None:
        """Train gates, in place, beside an engine that does not; from where they were at a checkpoint, if any."""
        engine, bank = self.trainer.engine, self.bank
        if engine.optimizes_gates:
            return
        self.train_gates_()
        if bank is not None and checkpoint is not None:
            engine.load_gates_(bank, self.gate_optimizer, checkpoint)

    def plan_(self, steps: int) -> None:
        """Lay out the stages of a training of so many optimizer steps, in place."""
        self.form.begin_()
        self.schedules = Schedule.stages(self.config, steps)
        ramp = self.schedules[0].ramp_end - self.schedules[0].warmup_end
        # Importances start at or above the mean, log(1 / t0) above the threshold; Adam moves them by its learning rate.
        needed = math.log(1 / self.config.t0) / self.config.gate_learning_rate
        if ramp < needed and self.bank is not None and not self.config.shares_target:
            longer = min(0.3, self.config.sparsity_ramp * needed / ramp)
            logger.warning(
                "The density descends over %d steps, in which gates can hardly close, so the structure may be found "
                "late: train for more steps%s.",
                ramp,
                f", or set sparsity_ramp to {longer:.2f}" if longer > self.config.sparsity_ramp else "",
            )

    def stretched(self, scheduler: LRScheduler) -> LambdaLR:
        """The stock scheduler over the recovery of every stage; before it, warm-up and a constant learning rate.

        Raises:
            SparsityError: its rate depends on more than the step.
        """
        if not isinstance(scheduler, LambdaLR):
            raise SparsityError(
                f"{type(scheduler).__name__} would also slow the gates down, which then do not close: give an "
                "lr_scheduler_type whose rate depends on the step alone, such as linear or cosine"
            )
        with_gates = self.trainer.engine.optimizes_gates
        return after_the_searches(scheduler, self.schedules, self.trainer.args, with_gates)

    # ---- Gates ----

    def _open_gates_(self) -> None:
        """Let a search begin anew, in place: with open gates, none more important than another, and lambda at zero."""
        bank = self.bank
        if bank is None:
            return
        bank.reopen_()
        state = cast(Optimizer, self.gate_optimizer or self.trainer.optimizer).state
        for parameter in bank.parameters():
            state.pop(parameter, None)

    def start_gates_(self, inputs: Mapping[str, Any]) -> None:
        """Let importances start, in place, from sensitivities on some rows of the training data; gates stay at 1.

        A row alone may have no loss, where that makes pairs of the rows of a batch, or generates what it judges. Then
        the batch of the step counts as a whole.
        """
        self._open_gates_()
        bank = self.bank
        if bank is None or bank.warm_start == 0:
            return
        found: dict[str, Tensor] = {}
        with self.calls.estimating():
            if self.calls.takes_batches:
                found = broadcast(self._sensitivities(bank))
            if not any(scores.any() for scores in found.values()):
                found = broadcast(sensitivities(bank, [inputs], self.trainer.loss_of))
        bank.start_from_(found, bank.warm_start)

    def _sensitivities(self, bank: SteeredGates) -> dict[str, Tensor]:
        """Estimate sensitivities on some rows of the training data, many at once where they can be told apart."""
        calls, loss_of, size = self.calls, self.trainer.loss_of, self.trainer.args.per_device_train_batch_size
        count = min(SENSITIVITY_ROWS, max(LEAST_SENSITIVITY_ROWS, SENSITIVITY_STEPS * calls.rows_of_a_step))
        first, found = list(calls.training_rows(size, 1)), None
        if first:
            batches = calls.training_rows(count, size)
            found = batched_sensitivities(self.trainer.bare_model, bank, batches, [first[0], first[-1]], loss_of)
        return found or sensitivities(bank, calls.training_rows(count, 1), loss_of)

    # ---- Logs and checkpoints ----

    def logged(self) -> dict[str, float]:
        """Densities and lambda, while the structure is searched; then the density that is left."""
        bank = self.bank
        if bank is None:
            density, target = self.form.density_left()
            return {"density": density, "target_density": target}
        with torch.no_grad():
            gates = bank.group_gates()
            densities = bank.densities(gates)
            logs = {
                "density": bank.density(gates).item(),
                "effective_density": bank.penalty(gates).item(),
                "target_density": bank.scheduled_density(
                    self.schedule.progress_at(self.trainer.state.global_step),
                ),
                "lambda": bank.controller.multiplier.mean().item(),
            }
            logs |= {f"density_{kind}": value.item() for kind, value in densities.items()}
        return logs

    def state(self) -> Run:
        """The run as a checkpoint has it."""
        return replace(
            self.trainer.run,
            searching=self.bank is not None,
            processes=self.trainer.args.world_size,
            settings=settings(self.config),
        )

    def go_on_from_(self, checkpoint: Path) -> None:
        """Give the model the form that it had at a checkpoint of a run like this one, in place.

        Raises:
            SparsityError: that is of another run.
        """
        run = Run.read(checkpoint)
        require_same_settings(checkpoint, run.settings, self.config)
        self.form.take_(run, checkpoint)

    def save_gates(self, checkpoint: Path) -> None:
        """Write what the engine does not write of gates."""
        bank = self.bank
        if bank is not None:
            self.trainer.engine.save_gates(bank, self.gate_optimizer, checkpoint)


@contextmanager
def unchanged_records(trainer: Any) -> Iterator[None]:
    """Restore the trainer's metric dictionaries on exit; TRL's trainers append to them whenever a loss is computed."""
    records = [(record, copy.deepcopy(record)) for record in vars(trainer).values() if _is_record(record)]
    try:
        yield
    finally:
        for record, before in records:
            record.clear()
            record.update(before)


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_noted, value.values()))


def _is_noted(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_noted, value))
    return _is_record(value) or isinstance(value, int | float | str)
