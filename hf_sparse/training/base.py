"""The one file that overrides `transformers.Trainer` in private; each override hands over to a part.

Its parts are the engine, the search for structure, the distiller, what has been done so far (`Run`), and what ends a
run early. tests/test_seam.py states which private names of transformers are used here, and with which parameters.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import SaveStrategy, has_length
from transformers.utils import logging

from hf_sparse.config import DistillationConfig
from hf_sparse.distillation.distiller import Distiller
from hf_sparse.distillation.shares import Share
from hf_sparse.distillation.teacher import Teacher
from hf_sparse.engines.base import Engine, Training
from hf_sparse.engines.choose import engine_of
from hf_sparse.errors import SparsityError
from hf_sparse.gates.base import attached_gates
from hf_sparse.runtime.copies import keep_own_forwards_
from hf_sparse.training.parts import Searching, require_order
from hf_sparse.training.resume import checked, names_in_memory, require_all_loaded, writing
from hf_sparse.training.run import Run
from hf_sparse.training.safety import Preemption, comes_from, require_finite

logger = logging.get_logger(__name__)


class BaseTrainer(Trainer):
    """Trainer that stops at NaN, saves at SIGTERM and goes on from whole checkpoints, and asks its parts for the rest.

    Attributes:
        run: what was done so far.
        search: for the structure; None where nothing is pruned.
        distiller: how it learns from a teacher; None where there is none.
    """

    search: Searching | None = None
    distiller: Distiller | None = None
    current_gradient_accumulation_steps = 1
    """Trainer's, which has none before it trains."""
    _engine: Engine | None = None
    _is_loaded = False
    """Whether the model has just been loaded from a checkpoint."""
    is_saving_checkpoint = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of bases in which another Trainer would hide what this one adds.

        Raises:
            TypeError: it is one.
        """
        super().__init_subclass__(**kwargs)
        require_order(cls, BaseTrainer)

    # The arguments are those of whichever Trainer this is mixed into, so they cannot be spelt out here.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.run = Run()
        self.preemption = Preemption()
        keep_own_forwards_(args[0] if args else kwargs.get("model"))
        super().__init__(*args, **kwargs)

    @property
    def engine(self) -> Engine:
        """The engine that trains the model."""
        if self._engine is None or self._engine.accelerator is not self.accelerator:
            self._engine = engine_of(self.accelerator)
        return self._engine

    @property
    def bare_model(self) -> PreTrainedModel:
        """The model as no engine has wrapped it, one of transformers once the constructor has run."""
        return cast(PreTrainedModel, self.model)

    def learn_from_(self, teacher: PreTrainedModel, config: DistillationConfig) -> None:
        """Take a teacher, which is frozen in place, and sharded where the model is.

        Raises:
            SparsityError: it is the student itself, or predicts something else.
        """
        hidden = config.hidden_distillation_weight > 0
        rows = len(self.train_dataset) if has_length(self.train_dataset) else None
        taught = Teacher(teacher, self.bare_model, self.engine, hidden, config.cache_teacher, rows)
        self.distiller = Distiller(taught, config, self.label_names, self.accelerator.autocast)
        self.distiller.run_all_layers_(self.bare_model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Trainer's fresh model, for a fresh run; it learns from the teacher as the first one does."""
        model = cast(PreTrainedModel, super().call_model_init(trial))
        self.run = Run()
        if self.distiller is not None:
            model.config.use_cache = self.args.use_cache  # as Trainer's constructor has it, and so the teacher
            self.distiller.run_all_layers_(model)
        return model

    # ---- What parts ask of the Trainer ----

    @property
    def training(self) -> Training:
        """The wrapped model, the optimizer and the scheduler that train the model."""
        return Training(self.model_wrapped, self.optimizer, self.lr_scheduler, self._fresh_optimizer)

    def _fresh_optimizer(self) -> Optimizer:
        wrapper, self.optimizer = self.optimizer, None
        try:
            return self.optimizer_of_weights()
        finally:
            self.optimizer = wrapper

    def optimizer_of_weights(self, model: nn.Module | None = None) -> Optimizer:
        """Trainer's optimizer, of the weights alone."""
        bank = attached_gates(self.bare_model)
        gates = list(bank.parameters()) if bank is not None else []
        for parameter in gates:
            parameter.requires_grad_(False)
        try:
            return super().create_optimizer(model)
        finally:
            for parameter in gates:
                parameter.requires_grad_(True)

    def editing(self) -> AbstractContextManager[None]:
        """Change the model inside this context; afterwards the engine trains the changed one."""
        return self.engine.editing(self.bare_model, self.training)

    def leave_training_(self) -> None:
        """Forget, in place, what trained the model: it is no longer what they hold."""
        self.model_wrapped = self.bare_model
        self.optimizer = self.lr_scheduler = None

    def require_finite(self) -> None:
        """Stop all processes if weights are NaN or infinite.

        Raises:
            NonFiniteLossError: they are.
        """
        require_finite(self.bare_model, self.engine, self.state.global_step, Path(str(self.args.output_dir)))

    def prepared(self, inputs: Any) -> dict[str, Any]:
        """Prepare a batch as Trainer does before a loss: on the device of the run."""
        return self._prepare_inputs(inputs)

    def loss_of(self, inputs: Mapping[str, Any]) -> Tensor:
        """Compute the loss of one batch, outside of a training step."""
        if self.learns_alone(inputs):
            assert self.distiller is not None
            return self.distiller.drawn_loss(self.bare_model, inputs, self._share(None), self.run.layer_map)
        items = self._get_num_items_in_batch([inputs], self.args.device)
        return cast(Tensor, self.compute_loss(self.bare_model, dict(inputs), num_items_in_batch=items))

    def run_directory(self) -> Path:
        """Where checkpoints of this run go; trials of a hyperparameter search have a directory each."""
        return Path(self._get_output_dir(None if self.hp_search_backend is None else self._trial))

    def save_into(self, directory: Path) -> None:
        """Save model and tokenizer, without Trainer's pickled arguments."""
        self._save(str(directory))
        (directory / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    # ---- Public methods of Trainer ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Trainer's; `resume_from_checkpoint=True` takes the newest whole checkpoint of `output_dir`.

        Raises:
            SparsityError: the one that was given is not whole, or none is.
            SystemExit: with code 143, once it has saved, if the process was sent SIGTERM.
        """
        if resume_from_checkpoint:
            wanted = None if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            resume_from_checkpoint = checked(wanted, Path(str(self.args.output_dir)))
        with self.preemption.listening():
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Trainer's optimizer, with gates in a parameter group of their own, last, if there are any."""
        if self.search is None:
            return self.optimizer_of_weights(model)
        return self.search.optimizer_with_gates(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Trainer's scheduler; where a structure is searched, stretched over the recovery."""
        if self.search is None:
            return super().create_scheduler(num_training_steps, optimizer)
        is_given = self.lr_scheduler is not None
        self.search.plan_(num_training_steps)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if not is_given:
            self.lr_scheduler = scheduler = self.search.stretched(scheduler)
        return scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Trainer's; data of unknown length that have come to their end also end the training."""
        try:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        except ValueError as error:
            if not comes_from(error.__traceback__, "accelerate.data_loader"):  # a dataset has errors of its own
                raise
            logger.warning(
                "The training data have ended at step %d of %d, and with them the training.",
                self.state.global_step,
                self.state.max_steps,
            )
            self.control.should_training_stop = True
            return [], None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trainer's step; before it, what has to be found out on data.

        Raises:
            SparsityError: the teacher was not asked in it, as the loss of a subclass hides that of this class.
        """
        if self.search is not None:
            self.search.before_step(inputs)
        with self.engine.hidden_gates(self.bare_model):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.distiller is not None:
            self.distiller.require_asked(type(self).__name__)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's loss, mixed with the distances to the teacher's logits and hidden states while training.

        Raises:
            SparsityError: there are no labels although they would count, or the answers cannot be compared.
        """
        if self.distiller is None or not model.training:
            return self._task_loss(model, inputs, return_outputs, num_items_in_batch)

        def task() -> tuple[Tensor | None, Any]:
            if self.learns_alone(inputs):
                return None, None
            given = self._task_loss(model, inputs, return_outputs, num_items_in_batch)
            return given if return_outputs else (given, None)

        loss, outputs = self.distiller.loss(
            model, self.bare_model, inputs, task, self._share(num_items_in_batch), self.run.layer_map
        )
        return (loss, outputs) if return_outputs else loss

    def _task_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Tensor | int | None
    ) -> Any:
        lacking = self.distiller is not None and self._lacks_labels(inputs)
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items)
        except ValueError as error:
            if not lacking:
                raise
            raise SparsityError(
                f"a batch has no labels, only {', '.join(inputs)}, and so no loss: set distillation_weight to 1, which "
                "learns from the teacher alone"
            ) from error

    def _lacks_labels(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the model itself would have to find a loss without any labels."""
        asks_model = getattr(super().compute_loss, "__func__", None) is Trainer.compute_loss
        return asks_model and all(inputs.get(name) is None for name in ("labels", *self.label_names))

    def learns_alone(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the distances to the teacher are all that a batch teaches."""
        return (
            self.distiller is not None and self.distiller.config.distillation_weight == 1 and self._lacks_labels(inputs)
        )

    def _share(self, num_items: Tensor | int | None) -> Share:
        """How Trainer weighs the loss of a micro-batch in its optimizer step."""
        counts = self.model_accepts_loss_kwargs and num_items is not None
        scaled: bool | None = getattr(self, "loss_is_scaled_for_ga", None)  # since transformers 5.19
        return Share(
            num_items,
            counts or self.compute_loss_func is not None if scaled is None else scaled,
            self.current_gradient_accumulation_steps,
            self.accelerator.num_processes if self.args.average_tokens_across_devices else 1,
            self._loss_shifts_labels,
        )

    # The arguments are those of whichever Trainer this is mixed into.
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; before the training and after it, the model is whole on every process."""
        with self.engine.evaluating(self) if self.optimizer is None else nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log; beside the training loss, densities and lambda, and what the loss is mixed of."""
        if "loss" in logs and self.search is not None:
            logs |= self.search.logged()
        if "loss" in logs and self.distiller is not None:
            means = self.distiller.logged()
            logs |= {name: self.accelerator.reduce(mean, "mean").item() for name, mean in means.items()}
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; a checkpoint to resume from has tensors by the names that they are loaded by, and its run."""
        self._forget_scales()
        if not _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        with names_in_memory(self.bare_model), self.engine.hidden_gates(self.bare_model):
            super().save_model(output_dir, _internal_call)
        self.write_run(Path(str(output_dir)))

    def write_run(self, checkpoint: Path) -> None:
        """Write the run to a checkpoint, on the process that saves."""
        if self.args.should_save and self.search is not None:
            self.search.state().write(checkpoint)

    # ---- Private ones ----

    def _forget_scales(self) -> None:
        """FSDP reads parameters as attributes, when it starts and when it saves: shards, which have no scale."""
        bank = attached_gates(self.bare_model)
        if bank is not None:
            bank.forget_scales_()

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Trainer's; stop at NaN first, else a process that is sent SIGTERM would save it.

        Weights are judged whenever something is logged, evaluated or saved: what has become NaN stays so.
        """
        stop = self.preemption.all_should_stop()
        self.control.should_save |= stop
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self.require_finite()
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )
        if stop:
            if self.args.save_strategy == SaveStrategy.BEST:  # then evaluating decides whether it saves
                self._save_checkpoint(self.bare_model, trial=None)
            self.preemption.exit_(self.state.global_step, str(self.args.output_dir))

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self.require_finite()
        output = super()._finalize_training(trial, num_train_samples, start_time)
        if self.search is not None:
            self.search.finish_()
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's, but a model counts as best only once it has the size asked for.

        Early stopping has no best metric to fall behind until then, so it waits too.
        """
        wanted = self.args.metric_for_best_model
        unknown = wanted is not None and f"eval_{wanted.removeprefix('eval_')}" not in metrics  # Trainer then says so
        counts = self.search is None or self.search.in_last_form or unknown
        return counts and super()._determine_best_metric(metrics, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Give the model the form it had at a checkpoint, in place, then load the weights."""
        if self.search is not None and not self.engine.loads_when_prepared:
            self.search.go_on_from_(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._is_loaded = True

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        checkpoint = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        if checkpoint is not None and self.engine.loads_when_prepared:
            if self.search is not None:
                self.search.go_on_from_(checkpoint)
        elif checkpoint is not None and not self._is_loaded:  # training begins once more, after an error
            self._load_from_checkpoint(str(checkpoint))
        self._is_loaded = False
        self._forget_scales()
        with self.engine.preparing(self.bare_model):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.search is not None:
            self.search.prepared_(checkpoint)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.engine.complete_(self.optimizer)
        with self.engine.hidden_gates(self.bare_model):
            super()._save_optimizer_and_scheduler(output_dir)
        if self.search is not None and self.args.should_save:
            self.search.save_gates(Path(output_dir))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        require_all_loaded(self.bare_model, load_result.missing_keys, load_result.unexpected_keys)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.is_saving_checkpoint = True
        try:
            with writing(Path(str(self.args.output_dir)), self.state.global_step, self.args.should_save):
                super()._save_checkpoint(model, trial)
        finally:
            self.is_saving_checkpoint = False
