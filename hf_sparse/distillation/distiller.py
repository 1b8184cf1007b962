"""A Trainer mixin that also trains on the distance to a dense teacher."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_sparse.config import DistillationConfig
from hf_sparse.distillation.answers import (
    Answers,
    answers,
    class_axis,
    declared_outputs,
    input_masks,
    state_masks,
    token_mask,
)
from hf_sparse.distillation.listening import Forward, forwards
from hf_sparse.distillation.losses import drawn_logits, drawn_states, hidden_distillation, logit_distillation
from hf_sparse.distillation.teacher import Teacher
from hf_sparse.engines.model import ModelMixin
from hf_sparse.errors import SparsityError

logger = logging.get_logger(__name__)


class DistillationMixin(ModelMixin):
    """Adds to a Trainer that its model learns from a teacher, once `_learn_from` was called."""

    distillation: DistillationConfig
    teacher: Teacher | None = None
    _teacher_asked = False
    _layer_map: tuple[tuple[int, int], ...] | None = None
    """Pairs of student and teacher layers whose states are compared; None where each layer has its own."""
    _summed_losses: dict[str, Tensor]
    """What the loss is mixed of, by what it is logged as, summed on the device since the last log."""
    _summed_steps: float
    current_gradient_accumulation_steps = 1
    """Trainer's, which has none before it trains."""

    def _learn_from(self, teacher: PreTrainedModel, distillation: DistillationConfig) -> None:
        """Take a teacher, which is frozen in place, and sharded where the model is.

        Raises:
            SparsityError: it is the student itself, or predicts something else.
        """
        hidden, cached = distillation.hidden_distillation_weight > 0, distillation.cache_teacher
        sharded = self._shards_weights and not cached  # what a process has cached it does not ask for with the others
        rows = len(self.train_dataset) if has_length(self.train_dataset) else None
        self.distillation, self._summed_losses, self._summed_steps = distillation, {}, 0.0
        self.teacher = Teacher(teacher, self._model, self.args.device, hidden, cached, sharded, rows)
        self._run_all_layers_(self._model)

    def _run_all_layers_(self, model: nn.Module) -> None:
        """Set layerdrop to 0 in place where states of layers are compared: one that is skipped has none."""
        if self.teacher is None or not self.teacher.hidden:
            return
        configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
        for one in (*model.modules(), *configs):
            for name in [name for name, value in vars(one).items() if name.endswith("layerdrop") and value]:
                _warn_once(f"{name} is 0 from here on, since a layer that is skipped has no state to compare.")
                setattr(one, name, 0.0)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Trainer's fresh model, which learns as the first one does."""
        model = cast(PreTrainedModel, super().call_model_init(trial))
        if self.teacher is not None:
            model.config.use_cache = self.args.use_cache  # as Trainer's constructor has it, and so the teacher
            self._run_all_layers_(model)
        return model

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trainer's step.

        Raises:
            SparsityError: the teacher was not asked in it, as the loss of a subclass hides that of this class.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.teacher is not None and not self._teacher_asked:
            raise SparsityError(
                f"the teacher would teach nothing: a compute_loss in {type(self).__name__} hides the one that asks it. "
                "Let it call super().compute_loss, put it in a Trainer of its own, `class Mine(SparseTrainerMixin, "
                "YourTrainer)`, or give a compute_loss_func"
            )
        return loss

    # ---- Loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's loss, mixed with the distances to the teacher's logits and hidden states while training.

        Every forward that the loss runs is compared with what the teacher says to the same inputs. Without labels,
        where they would count for nothing, the distances are all there is.

        Raises:
            SparsityError: there are no labels although they would count, or the answers cannot be compared.
        """
        if self.teacher is None or not model.training:
            return self._task_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)  # a loss may take labels out of its inputs, and put settings into them
        task, outputs = None, None
        with forwards(model, self._model, self._states_wanted) as heard:
            if not self._learns_alone(inputs):
                given = self._task_loss(model, inputs, return_outputs, num_items_in_batch)
                task, outputs = given if return_outputs else (given, None)
        compared = [self._answered(model, forward, batch | inputs) for forward in heard or [Forward(inputs, None)]]
        self._teacher_asked = True
        distances = [self._distances(forward, num_items_in_batch) for forward in compared]
        logits, hidden = (_mean(column) for column in zip(*distances))
        loss = self._mixed(task, logits, hidden, num_items_in_batch)
        return (loss, compared[-1].outputs if outputs is None else outputs) if return_outputs else loss

    def _task_loss(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], return_outputs: bool, num_items: Tensor | int | None
    ) -> Any:
        lacking = self.teacher is not None and self._lacks_labels(inputs)
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

    def _learns_alone(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the distances to the teacher are all that a batch teaches."""
        return self.teacher is not None and self.distillation.distillation_weight == 1 and self._lacks_labels(inputs)

    @property
    def _states_wanted(self) -> dict[str, bool]:
        return {"output_hidden_states": True} if self.teacher is not None and self.teacher.hidden else {}

    def _answers(self, outputs: Any) -> Answers:
        return answers(outputs, declared_outputs(self._model))

    def _answered(self, model: nn.Module, forward: Forward, batch: Mapping[str, Any]) -> Forward:
        """A forward with answers in its outputs, and with the labels of the batch that it was run for.

        Where it has none, as with a loss fused with the model's head, it is run once more, with what it reads of the
        batch, and with tensors that the loss has made.
        """
        labels = {name: batch[name] for name in ("labels", "shift_labels", *self.label_names) if name in batch}
        outputs = forward.outputs
        if not self._answers(outputs):
            read = {name: value for name, value in forward.inputs.items() if name in batch or isinstance(value, Tensor)}
            outputs = model(**(self._without_labels(read) | self._states_wanted))
        return Forward(labels | forward.inputs, outputs)

    def _distances(self, forward: Forward, num_items: Tensor | int | None) -> tuple[Tensor | None, Tensor | None]:
        """The distances of a forward to the teacher's logits and to its states, of what both of them have.

        Raises:
            SparsityError: that is nothing, or they differ in shape.
        """
        assert self.teacher is not None
        with self.accelerator.autocast():
            taught = self.teacher(self._without_labels(forward.inputs))
        ours, hidden = self._answers(forward.outputs), None
        if self.teacher.hidden and ours.states and taught.states:
            hidden = self._share_of_step(self._hidden_distance(forward.outputs, taught, forward.inputs), num_items)
        axes = self._class_axes(ours, taught, forward.inputs)
        if not axes and hidden is None:
            raise SparsityError(
                f"{type(self._model).__name__} and its teacher have neither logits that can be compared entry by entry "
                "nor, unless hidden_distillation_weight is 0, hidden states: leave the teacher out"
            )
        if not axes and ours.heads:
            _warn_once(
                f"The teacher's {', '.join(ours.heads)} cannot be compared entry by entry: hidden states are learnt."
            )
        temperature = self.distillation.distillation_temperature
        parts = [
            self._mean_over_items(
                self._head_distance(ours.heads[name], taught.heads[name], axis, temperature), forward.inputs, num_items
            )
            for name, axis in axes.items()
        ]
        return _mean(parts), hidden

    def _class_axes(self, ours: Answers, taught: Answers, inputs: Mapping[str, Any]) -> dict[str, int]:
        """By the names of the heads that are compared, which axis of their logits is that of classes.

        Raises:
            SparsityError: the model's logits are others than the teacher's.
        """
        assert self.teacher is not None
        shapes, others = ({name: tuple(head.shape) for name, head in one.heads.items()} for one in (ours, taught))
        both = sorted(shapes.keys() & others.keys())
        if (shapes and others and not both) or any(shapes[name] != others[name] for name in both):
            raise SparsityError(f"the teacher says {others} and the model {shapes}: give a teacher for the same task")
        labels = [inputs[name] for name in ("labels", *self.label_names) if inputs.get(name) is not None]
        if not all(isinstance(one, Tensor) for one in labels):
            return {}  # lists of objects: the loss finds out which prediction is of which, and in no order
        axes = {name: class_axis(shapes[name], self.teacher.class_counts, inputs.get("labels")) for name in both}
        return {name: axis for name, axis in axes.items() if axis is not None}

    def _head_distance(self, ours: Tensor, theirs: Tensor, axis: int, temperature: float) -> Tensor:
        problem = getattr(self._model.config, "problem_type", None)
        return logit_distillation(ours.movedim(axis, -1), theirs.movedim(axis, -1), temperature, problem)

    def _hidden_distance(self, outputs: Any, taught: Answers, inputs: Mapping[str, Any]) -> Tensor:
        student, masks = self._answers(outputs).states, state_masks(self._model, outputs, inputs)
        pairs = self._layer_map
        if pairs is None:
            pairs = tuple((layer, layer) for layer in range(len(taught.states)))
        if max(layer for layer, _ in pairs) >= len(student) or (self._layer_map is None and len(pairs) < len(student)):
            raise SparsityError(
                f"the model has {len(student)} hidden states for the {len(taught.states)} of its teacher: give one "
                "with as many layers, let no layer be skipped at random, or set hidden_distillation_weight to 0"
            )
        return hidden_distillation(
            [student[i] for i, _ in pairs], [taught.states[j] for _, j in pairs], [masks[i] for i, _ in pairs]
        )

    def _drawn_loss(self, inputs: Mapping[str, Any]) -> Tensor:
        """The distance to answers that are drawn at random from the teacher's: to its logits, or else to its states.

        The distance to the answers themselves has no slope where the model is a copy of its teacher.
        """
        assert self.teacher is not None
        asked = self._without_labels(inputs)
        outputs, taught = self._model(**(asked | self._states_wanted)), self.teacher(asked)
        ours = self._answers(outputs)
        axes, problem = self._class_axes(ours, taught, inputs), getattr(self._model.config, "problem_type", None)
        if not axes:
            drawn = Answers({}, tuple(drawn_states(state) for state in taught.states))
            return self._hidden_distance(outputs, drawn, inputs)
        parts = []
        for name, axis in axes.items():
            head = drawn_logits(taught.heads[name].movedim(axis, -1), problem).movedim(-1, axis)
            parts.append(self._mean_over_items(self._head_distance(ours.heads[name], head, axis, 1.0), inputs, None))
        return torch.stack(parts).mean()

    # ---- Shares of a step ----

    def _mean_over_items(self, losses: Tensor, inputs: Mapping[str, Any], num_items: Tensor | int | None) -> Tensor:
        """The mean as Trainer takes it: over the labelled items of the whole accumulated batch where it counts them.

        Where labels are not one of each item, over all but padding.
        """
        labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
        if isinstance(shifted, Tensor) and shifted.shape == losses.shape:
            counted = shifted != -100
        elif isinstance(labels, Tensor) and labels.shape == losses.shape:
            if self._loss_shifts_labels:
                losses, labels = losses[..., :-1], labels[..., 1:]
            counted = labels != -100
        else:
            reader = "decoder_hidden_states" if self._model.config.is_encoder_decoder else "hidden_states"
            mask = token_mask(self._model, input_masks(inputs)[reader], losses.shape)
            mean = losses.mean() if mask is None else (losses * mask).sum() / mask.sum()
            return self._share_of_step(mean, num_items)
        total = torch.where(counted, losses, 0.0).sum()
        if num_items is None or not self._loss_is_shared(num_items):
            return self._share_of_step(total / counted.sum().clamp(min=1), num_items)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total / num_items * processes

    def _share_of_step(self, mean: Tensor, num_items: Tensor | int | None) -> Tensor:
        """The mean over a micro-batch, divided by their number in a step where Trainer will not do so."""
        return mean / self.current_gradient_accumulation_steps if self._loss_is_shared(num_items) else mean

    def _loss_is_shared(self, num_items: Tensor | int | None) -> bool:
        """Whether Trainer takes a loss for one that is a share of its step already."""
        said: bool | None = getattr(self, "loss_is_scaled_for_ga", None)  # since transformers 5.19
        counts = self.model_accepts_loss_kwargs and num_items is not None
        return counts or self.compute_loss_func is not None if said is None else said

    # ---- Logging ----

    def _mixed(
        self, task: Tensor | None, logits: Tensor | None, hidden: Tensor | None, num_items: Tensor | int | None
    ) -> Tensor:
        """The weighted sum of the losses that there are, which are remembered for the next log."""
        options = self.distillation
        weight = options.distillation_weight
        losses = {
            # Without logits to weigh it against, it counts in full.
            "task_loss": (1 - weight if logits is not None or weight == 1 else 1.0, task),
            "logits_loss": (weight, logits),
            "hidden_loss": (options.hidden_distillation_weight, hidden),
        }
        there = [(name, factor, loss) for name, (factor, loss) in losses.items() if loss is not None]
        steps = self.current_gradient_accumulation_steps
        share = 1 if self._loss_is_shared(num_items) else steps
        for name, _, loss in there:
            summed = self._summed_losses.get(name)
            own = loss.detach() / share
            self._summed_losses[name] = own if summed is None else summed + own
        self._summed_steps += 1 / steps
        return cast(Tensor, sum(factor * loss for _, factor, loss in there))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with what its loss is mixed of beside it, before it is weighted."""
        if "loss" in logs and self.teacher is not None:
            for name, summed in self._summed_losses.items():
                logs[name] = self.accelerator.reduce(summed, "mean").item() / self._summed_steps
            self._summed_losses, self._summed_steps = {}, 0.0
        super().log(logs, start_time)


def _mean(losses: Sequence[Tensor | None]) -> Tensor | None:
    """The mean of the losses that there are, if any."""
    there = [loss for loss in losses if loss is not None]
    return torch.stack(there).mean() if there else None


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


class DistillationTrainer(DistillationMixin, Trainer):
    """`Trainer` that learns from a teacher: what a pruned model is trained on, for a model that is not pruned here.

    Args:
        teacher: a model with the same outputs and, unless hidden states are left out, the same number of layers; it is
            put in evaluation mode and frozen.
        distillation: how to learn from it.

    Raises:
        SparsityError: the teacher is the student itself, or predicts something else.
    """

    # The other arguments are Trainer's.
    def __init__(self, *args: Any, teacher: PreTrainedModel, distillation: DistillationConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._learn_from(teacher, distillation)
