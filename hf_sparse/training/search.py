"""The search for what goes, as a Trainer runs it: the gates' optimizer group, penalty, schedule and landing."""

import json
import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_sparse.config import SearchConfig
from hf_sparse.engines.sharding import average_gradients_
from hf_sparse.engines.surgery import surgery, trains
from hf_sparse.engines.zero import check_zero, engine_surgery, load_gates_, save_gates, without_gates
from hf_sparse.engines.zero3 import is_partitioned, partition_
from hf_sparse.errors import SparsityError
from hf_sparse.gates.base import attached_gates
from hf_sparse.gates.controller import Schedule
from hf_sparse.gates.landing import Descent
from hf_sparse.runtime.files import write_whole
from hf_sparse.training.finite import FiniteWeightsMixin
from hf_sparse.training.preemption import PreemptionMixin
from hf_sparse.training.refusals import check_arguments, check_checkpointing
from hf_sparse.training.resume import PROCESSES, SETTINGS, STATE, ResumingMixin, require_same_settings, settings
from hf_sparse.training.scheduling import after_the_searches
from hf_sparse.training.starting import StartingMixin

logger = logging.get_logger(__name__)

MOST_LOGGED_GROUPS = 4
"""Groups whose densities are logged one by one; more would drown the rest."""


class _SearchCallback(TrainerCallback):
    """Adds lambda * dR to the gates' gradients, once per optimizer step, and lets stages follow each other.

    Not through the loss: there it would be counted once per micro-batch and process, and clipped with the task's
    gradients. Here the trajectory does not depend on how a batch is split.
    """

    def __init__(self, trainer: "SearchingMixin") -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_checkpointing(self.trainer._model)
        if not trains(self.trainer._model):
            raise SparsityError("nothing trains: the model has no gates and is frozen, so save it, or unfreeze a part")
        if state.global_step == 0:  # also where training begins once more, after an error or by another train()
            self.trainer._open_gates()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gated = attached_gates(self.trainer._model) is not None
        self.trainer._gates_are_due = gated and state.global_step == self.trainer._schedule.start

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._penalize(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        descent, self.trainer._descent = self.trainer._descent, None
        structure_found = descent is not None and descent.settle_()
        self.trainer._end_step(structure_found)
        if structure_found and not trains(self.trainer._model):  # all weights are frozen, so none has to recover
            control.should_training_stop = True


class SearchingMixin(PreemptionMixin, ResumingMixin, FiniteWeightsMixin, StartingMixin, ABC):
    """Adds to a Trainer that gates on its model find out what goes; subclasses say what, and then take it out."""

    sparsity: SearchConfig
    _schedules: tuple[Schedule, ...] = ()
    _stage: int = 0
    _has_gate_group = False
    _is_loaded = False
    """Whether the model has just been loaded from a checkpoint."""
    _was_in_shards = False
    """Whether ZeRO stage 3 has sharded the weights as soon as they were loaded."""
    _descent: Descent | None = None

    # ---- What subclasses say ----

    @abstractmethod
    def _end_step(self, structure_found: bool) -> None:
        """Change the model in place where a step has ended the search, or a stage."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What a checkpoint has to say beside the weights, as JSON."""

    @abstractmethod
    def _take_form_of_(self, checkpoint: Path) -> None:
        """Give the model the form it had at a checkpoint, in place: its gates and sizes, not its weights."""

    @abstractmethod
    def _density_left(self) -> tuple[float, float]:
        """The density of a model whose structure is found, and the one that was asked for."""

    @property
    def _in_last_form(self) -> bool:
        """Whether the model has the structure that the run ends with."""
        return attached_gates(self._model) is None and self._stage == len(self.sparsity.descent) - 1

    def _start_search(self) -> None:
        """Check what would not be exact, once the Trainer is there, and listen to its steps.

        Raises:
            SparsityError: what it found.
        """
        check_arguments(self.args, self.lr_scheduler, self._shards_weights)
        if self.is_deepspeed_enabled:
            check_zero(self.accelerator)
        self.add_callback(_SearchCallback(self))

    # ---- Optimizer, schedule, multiplier ----

    @property
    def _schedule(self) -> Schedule:
        return self._schedules[self._stage]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, with the gates in a parameter group of their own, last, if there are any."""
        if self.is_deepspeed_enabled:
            return self.optimizer or self._optimizer_of_weights(model)
        if self.optimizer is not None and self._has_gate_group:
            self._train_gates()
            return self.optimizer
        optimizer = self._optimizer_of_weights(model)
        optimizer.add_param_group({"params": [], "lr": self.sparsity.gate_learning_rate, "weight_decay": 0.0})
        self._has_gate_group = True
        self._train_gates()
        return optimizer

    def _optimizer_of_weights(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        bank = attached_gates(self._model)
        gates = list(bank.parameters()) if bank is not None else []
        for parameter in gates:
            parameter.requires_grad_(False)
        try:
            return super().create_optimizer(model)
        finally:
            for parameter in gates:
                parameter.requires_grad_(True)

    def _fresh_optimizer_of_weights(self) -> torch.optim.Optimizer:
        wrapper, self.optimizer = self.optimizer, None
        try:
            return self._optimizer_of_weights()
        finally:
            self.optimizer = wrapper

    def _train_gates(self) -> None:
        """Let the optimizer train the gates that the model has now; its last group is theirs, or it is their own."""
        bank = attached_gates(self._model)
        gates = list(bank.parameters()) if bank is not None else []
        if self.is_deepspeed_enabled:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self._model)
            options |= {"lr": self.sparsity.gate_learning_rate, "weight_decay": 0.0}
            self._gate_optimizer = kind(gates, **options) if gates else None
        else:
            assert self.optimizer is not None
            self.optimizer.param_groups[-1]["params"] = gates
        if bank is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            average_gradients_(bank, self.accelerator)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Trainer's scheduler stretched over the recovery; before it, warm-up and a constant learning rate."""
        self._schedules = Schedule.stages(self.sparsity, num_training_steps)
        steps = self._schedules[0].ramp_end - self._schedules[0].warmup_end
        # Importances start at or above the mean, log(1 / t0) above the threshold; Adam moves them by its learning rate.
        needed = math.log(1 / self.sparsity.t0) / self.sparsity.gate_learning_rate
        if steps < needed and attached_gates(self._model) is not None:
            longer = min(0.3, self.sparsity.sparsity_ramp * needed / steps)
            logger.warning(
                "The density descends over %d steps, in which gates can hardly close, so the structure may be found "
                "late: train for more steps%s.",
                steps,
                f", or set sparsity_ramp to {longer:.2f}" if longer > self.sparsity.sparsity_ramp else "",
            )
        created = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if not created:
            return scheduler
        if not isinstance(scheduler, LambdaLR):
            raise SparsityError(
                f"{type(scheduler).__name__} would also slow the gates down, which then do not close: give an "
                "lr_scheduler_type whose rate depends on the step alone, such as linear or cosine"
            )
        self.lr_scheduler = after_the_searches(scheduler, self._schedules, self.args, not self.is_deepspeed_enabled)
        return self.lr_scheduler

    def _penalize(self, step: int) -> None:
        """Steer lambda and add its share to the gradients of the gates, in place."""
        bank, schedule = attached_gates(self._model), self._schedule
        if bank is None:
            return
        bank.penalize_(step, schedule)
        # Reads the device only while the structure is searched, never in the long recovery.
        scheduled = bank.scheduled_density(schedule.progress_at(step + 1))
        self._descent = Descent(bank, scheduled) if step >= schedule.warmup_end else None
        if self._gate_optimizer is not None:
            self._gate_optimizer.step()

    # ---- The model ----

    def _surgery(self) -> AbstractContextManager[None]:
        if self.is_deepspeed_enabled:
            make = self._fresh_optimizer_of_weights
            return engine_surgery(
                self._model, self.model_wrapped, self.optimizer, self.lr_scheduler, make, self.accelerator
            )
        return surgery(self._model, self.model_wrapped, self.optimizer, self.accelerator)

    # ---- Loss ----

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Trainer's step; before it, what has to be found out on data."""
        self._before_step(inputs)
        with self._out_of_the_engine():
            return super().training_step(model, inputs, num_items_in_batch)

    # ---- Logging, evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with densities and lambda beside the training loss."""
        if "loss" in logs and self._schedules:
            bank, progress = attached_gates(self._model), self._schedule.progress_at(self.state.global_step)
            if bank is None:
                logs["density"], logs["target_density"] = self._density_left()
            else:
                with torch.no_grad():
                    gates = bank.group_gates()
                    densities = bank.densities(gates)
                    logs["density"] = bank.density(gates).item()
                    logs["effective_density"] = bank.penalty(gates).item()
                    logs["target_density"] = bank.scheduled_density(progress)
                    logs["lambda"] = bank.controller.multiplier.mean().item()
                    if len(densities) <= MOST_LOGGED_GROUPS:
                        logs.update({f"density_{name}": value.item() for name, value in densities.items()})
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's; data of unknown length that have come to their end also end the training."""
        try:
            super()._run_epoch(*args, **kwargs)
        except ValueError as error:
            if "does not contain any data" not in str(error):  # accelerate's words for an empty iterator
                raise
            logger.warning(
                "The training data have ended at step %d of %d, and with them the training.",
                self.state.global_step,
                self.state.max_steps,
            )
            self.control.should_training_stop = True

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)
        if not self._in_last_form:
            bank = attached_gates(self._model)
            target = self._density_left()[1] if bank is None else bank.target_density
            left = self._density_left()[0] if bank is None else bank.density(bank.group_gates()).item()
            logger.warning(
                "The structure was not found: the density is %.3f, its target %.3f. Train for more steps, or raise "
                "sparsity_ramp%s.",
                left,
                target,
                " or gate_learning_rate" if left > target else ", or lower gate_learning_rate",
            )
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's, but a model counts as best only once it has the size asked for.

        Early stopping has no best metric to fall behind until then, so it waits too.
        """
        wanted = self.args.metric_for_best_model
        unknown = wanted is not None and f"eval_{wanted.removeprefix('eval_')}" not in metrics  # Trainer then says so
        return (self._in_last_form or unknown) and super()._determine_best_metric(metrics, trial)

    # ---- Checkpoints to resume from ----

    def _forget_scales(self) -> None:
        """FSDP reads parameters as attributes, when it starts and when it saves: shards, which have no scale."""
        bank = attached_gates(self._model)
        if bank is not None:
            bank.forget_scales_()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the result; a checkpoint to resume from also gets the state of the search."""
        self._forget_scales()
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save and self._schedules:
            state = {PROCESSES: self.args.world_size, SETTINGS: settings(self.sparsity), **self._state()}
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)  # shards are written into it later
            write_whole(Path(str(output_dir)) / STATE, json.dumps(state))

    def _go_on_from_(self, checkpoint: Path) -> None:
        """Give the model the form it had at a checkpoint of a run like this one, in place."""
        require_same_settings(checkpoint, self.sparsity)
        self._take_form_of_(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Give the model the form it had at a checkpoint, in place, then load the weights."""
        if not self.is_fsdp_enabled:
            self._go_on_from_(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._is_loaded = True

    def _prepare_for_training(self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded and resume_from_checkpoint is not None:  # they load weights once they have sharded them
            self._go_on_from_(Path(resume_from_checkpoint))
        elif resume_from_checkpoint is not None and not self._is_loaded:  # training begins once more, after an error
            self._load_from_checkpoint(resume_from_checkpoint)
        self._is_loaded = False
        self._forget_scales()
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        bank = attached_gates(self._model)
        if bank is not None:
            bank.to(self.args.device)
        with without_gates(self._model):
            if self._was_in_shards and not is_partitioned(self._model):
                plugin = self.accelerator.state.deepspeed_plugin
                partition_(self._model, plugin.deepspeed_config, self.args.device)
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._train_gates()
        if bank is not None and self._gate_optimizer is not None and resume_from_checkpoint is not None:
            load_gates_(bank, self._gate_optimizer, Path(resume_from_checkpoint))
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._out_of_the_engine():
            super()._save_optimizer_and_scheduler(output_dir)
        bank = attached_gates(self._model)
        if bank is not None and self._gate_optimizer is not None and self.args.should_save:
            save_gates(bank, self._gate_optimizer, Path(output_dir))
