"""`SparseTrainer`: a thin `Trainer` that learns which heads and neurons to remove while it fine-tunes."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import (
    PreTrainedModel,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from hf_sparse.bank import GateBank
from hf_sparse.config import SparsityConfig
from hf_sparse.controller import Schedule
from hf_sparse.errors import SparsityError, UnknownInputsError
from hf_sparse.landing import Landing
from hf_sparse.patching import attach_gates, detach_gates, gate_bank, require_bank
from hf_sparse.preemption import PreemptionMixin
from hf_sparse.sharding import prepare_sharding_, require_whole
from hf_sparse.stages import StagesMixin
from hf_sparse.surgery import plain_forward, skeleton, unchanged_random_state

logger = logging.get_logger(__name__)

MOST_LOGGED_GROUPS = 4
"""Groups whose densities are logged one by one; more would drown the rest."""


class _SparsityCallback(TrainerCallback):
    """Adds lambda * dR to the gates' gradients, once per optimizer step, and lets stages follow each other.

    Not through the loss: there it would be counted once per micro-batch and process, and clipped with the task's
    gradients. Here the trajectory does not depend on how a batch is split.
    """

    def __init__(self, trainer: "SparseTrainerMixin") -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._penalize(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        landing, self.trainer._landing = self.trainer._landing, None
        self.trainer._end_step(structure_found=landing is not None and landing.reached_())


class SparseTrainerMixin(PreemptionMixin, StagesMixin):
    """What `SparseTrainer` adds to `Trainer`, for any other subclass of it: `class Mine(SparseTrainerMixin, Base)`.

    The constructor attaches gates to the model in place. During the search for the structure the learning rate stays
    constant after its warm-up. Once it is found, the model is made smaller in place, and the scheduler that was asked
    for runs over the recovery of what is left. With several targets, one such stage follows another, and each leaves a
    whole model in `output_dir`, beside a table and a picture of them all.

    Args:
        sparsity: what to remove.
        teacher: a dense model with the same outputs, whose logits and hidden states the pruned model is also trained
            on; it is put in evaluation mode and frozen.

    Raises:
        SparsityError: the model has nothing to prune, the teacher has other labels, or an engine is in use that would
            not give exact results.
    """

    # The arguments are those of whichever Trainer this is mixed into, so they cannot be spelt out here.
    def __init__(
        self, *args: Any, sparsity: SparsityConfig, teacher: PreTrainedModel | None = None, **kwargs: Any
    ) -> None:
        self.sparsity = sparsity
        self._compactions, self._members = [], {}
        super().__init__(*args, **kwargs)
        self._prepare_hub()
        if self.args.n_gpu > 1:
            raise SparsityError(
                "DataParallel would train a copy of the gates on every GPU: start with `accelerate launch`, which uses "
                "one process per GPU, or show one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        if self.is_deepspeed_enabled:
            raise SparsityError(
                "DeepSpeed keeps flat copies of the parameters that it starts with, and these are replaced when the "
                "model shrinks: use FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`), which shards as much"
            )
        require_whole(self._model)
        if self.is_fsdp_enabled:
            prepare_sharding_(self.accelerator)
        if self.args.fp16 and self.args.max_grad_norm <= 0:
            raise SparsityError("fp16 without gradient clipping leaves gradients scaled: set max_grad_norm or use bf16")
        bank = gate_bank(self._model) or self._attach_gates()
        if bank.config != sparsity.stage(0):
            raise SparsityError("the model has gates of another SparsityConfig: call detach_gates(model) first")
        self.structure, self.costs = bank.structure, bank.costs
        self._dense = skeleton(self._model)
        detach_gates(self._dense)
        if teacher is not None:
            self._learn_from(teacher, sparsity)
        self.add_callback(_SparsityCallback(self))
        self._loss_is_probed = self._has_gate_group = False
        self._landing: Landing | None = None

    @property
    def bank(self) -> GateBank:
        """The gates of the model that is trained.

        Raises:
            SparsityError: the model has none (any more).
        """
        return require_bank(self._model)

    def _attach_gates(self) -> GateBank:
        """Put gates on the model, in place; found by a batch of the data if no other input can be made up."""
        try:
            return attach_gates(self._model, self._stage_config)
        except UnknownInputsError:
            if self.eval_dataset is None and self.train_dataset is None:
                raise
            return attach_gates(self._model, self._stage_config, self._verification_batch())

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from `model_init`, with gates attached."""
        model = cast(PreTrainedModel, super().call_model_init(trial))
        self._stage, self._compactions, self._members, self._layer_map = 0, [], {}, None
        self._loss_is_probed = False
        attach_gates(model, self._stage_config)
        return model

    # ---- Optimizer, schedule, multiplier ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, with the gates in a parameter group of their own, last, if there are any."""
        if self.optimizer is not None and self._has_gate_group:
            self._train_gates()
            return self.optimizer
        bank = gate_bank(self._model)
        gates = list(bank.parameters()) if bank is not None else []
        for parameter in gates:
            parameter.requires_grad_(False)
        try:
            optimizer = super().create_optimizer(model)
        finally:
            for parameter in gates:
                parameter.requires_grad_(True)
        optimizer.add_param_group({"params": [], "lr": self.sparsity.gate_learning_rate, "weight_decay": 0.0})
        self._has_gate_group = True
        self._train_gates()
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Trainer's scheduler stretched over the recovery; before it, warm-up and a constant learning rate."""
        self.report = None  # of a model that is trained on from here
        self._schedules = Schedule.stages(self.sparsity, num_training_steps)
        steps = self._schedules[0].ramp_end - self._schedules[0].warmup_end
        # Importances start at or above the mean, log(1 / t0) above the threshold; Adam moves them by its learning rate.
        needed = math.log(1 / self.sparsity.t0) / self.sparsity.gate_learning_rate
        if steps < needed:
            logger.warning(
                "The density descends over %d steps, in which gates can hardly close, so the structure may be found "
                "late: train for more steps, or set sparsity_ramp to %.2f.",
                steps,
                min(0.3, self.sparsity.sparsity_ramp * needed / steps),
            )
        created = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if created and isinstance(scheduler, LambdaLR):
            scheduler = self.lr_scheduler = _after_the_searches(scheduler, self._schedules, self.args)
        return scheduler

    def _penalize(self, step: int) -> None:
        """Steer lambda and add its share to the gradients of the gates, in place."""
        bank, schedule = gate_bank(self._model), self._schedule
        if bank is None:
            return
        parameters = list(bank.parameters())
        with torch.enable_grad():
            gates = bank.group_gates()
            multipliers = bank.controller.steer_(bank.steered_densities(gates), step, schedule)
            slopes = torch.autograd.grad((multipliers * bank.penalties(gates)).sum(), parameters)
        for parameter, slope in zip(parameters, slopes):
            parameter.grad = slope if parameter.grad is None else parameter.grad + slope
        # Reads the device only while the structure is about to be found, never in the long phases.
        self._landing = Landing(bank) if step >= schedule.ramp_end else None

    # ---- Loss ----

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Trainer's step, after a look at how the model counts items, at the first one."""
        if not self._loss_is_probed:
            self._probe_loss(inputs)
            if self.state.global_step == 0:
                self._start_gates()
            if self._layer_map is None:
                with plain_forward(self._model), unchanged_random_state(self.args.device):
                    self._match_layers()
        return super().training_step(model, inputs, num_items_in_batch)

    def _probe_loss(self, inputs: dict[str, Tensor | Any]) -> None:
        """Find out, once, whether the model's loss heeds `num_items_in_batch`.

        Trainer believes so of every model with keyword arguments and then does not average over micro-batches and
        processes; several classification heads ignore the count, and their gradients would grow with accumulation.
        """
        self._loss_is_probed = True
        split = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        from_model = self.compute_loss_func is None and self.label_smoother is None and "labels" in inputs
        if split == 1 or not (self.model_accepts_loss_kwargs and from_model):
            return
        training = self._model.training
        self._model.eval()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            one, two = (self._model(**inputs, num_items_in_batch=torch.tensor(float(n))).loss for n in (1, 2))
        self._model.train(training)
        if torch.equal(one, two):
            self.model_accepts_loss_kwargs = False

    # ---- Logging, evaluation, checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with densities and lambda beside the training loss."""
        if "loss" in logs and self._schedules:
            bank, progress = gate_bank(self._model), self._schedule.progress_at(self.state.global_step)
            if bank is None:
                logs["density"] = 1 - self.costs.removed({name: len(kept) for name, kept in self.plan().kept.items()})
                logs["target_density"] = 1 - self.costs.target(self._stage_config)
            else:
                with torch.no_grad():
                    gates = bank.group_gates()
                    densities = bank.densities(gates)
                    logs["density"] = bank.density(gates).item()
                    logs["effective_density"] = bank.penalty(gates).item()
                    logs["target_density"] = bank.start_density - progress * (bank.start_density - bank.target_density)
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
            logger.warning(
                "The structure was not found: its density never reached the target. Train for more steps, or raise "
                "sparsity_ramp or gate_learning_rate."
            )
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's, but a model counts as best only once it has the size asked for.

        Early stopping has no best metric to fall behind until then, so it waits too.
        """
        return self._in_last_form and super()._determine_best_metric(metrics, trial)


class SparseTrainer(SparseTrainerMixin, Trainer):
    """`Trainer` that prunes while it fine-tunes; see `SparseTrainerMixin` for what it adds."""


class SparseSeq2SeqTrainer(SparseTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` that prunes while it fine-tunes; see `SparseTrainerMixin` for what it adds."""


def _after_the_searches(stock: LambdaLR, schedules: Sequence[Schedule], args: TrainingArguments) -> LambdaLR:
    """The stock schedule, begun in every stage when the search for the structure ends and compressed into what is left.

    Structure must be found while weights can still move, and recovery wants a whole decay of its own.
    """
    warmup = args.get_warmup_steps(schedules[-1].end)

    def weights(step: int, decay: Any) -> float:
        stage = next((stage for stage in schedules if step < stage.end), schedules[-1])
        if step < stage.hold_end:
            return min(1.0, (step - stage.start + 1) / (warmup + 1))
        progress = (step - stage.hold_end) / max(1, stage.end - stage.hold_end)
        return decay(warmup + progress * (schedules[-1].end - warmup))

    lambdas = [lambda step, decay=decay: weights(step, decay) for decay in stock.lr_lambdas[:-1]]
    optimizer = stock.optimizer
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    return LambdaLR(optimizer, [*lambdas, lambda step: 1.0])
