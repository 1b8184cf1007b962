"""A Trainer mixin that also trains on the distance to a dense teacher."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hf_sparse.config import DistillationConfig
from hf_sparse.distillation import hidden_distillation, logit_distillation
from hf_sparse.errors import SparsityError
from hf_sparse.model import ModelMixin
from hf_sparse.teacher import Teacher, TeacherOutputs, layer_states, state_masks


class DistillationMixin(ModelMixin):
    """Adds to a Trainer that its model learns from a teacher, once `_learn_from` was called."""

    distillation: DistillationConfig
    teacher: Teacher | None = None
    _teacher_asked = False
    _loss_hides_outputs = False
    """Whether Trainer's loss does not come with outputs that gradients flow through."""
    _layer_map: tuple[tuple[int, int], ...] | None = None
    """Pairs of student and teacher layers whose states are compared; None where each layer has its own."""

    def _learn_from(self, teacher: PreTrainedModel, distillation: DistillationConfig) -> None:
        """Take a teacher, which is frozen in place, and sharded where the model is.

        Raises:
            SparsityError: it is the student itself, or predicts something else.
        """
        hidden, cached = distillation.hidden_distillation_weight > 0, distillation.cache_teacher
        sharded = self._shards_weights and not cached  # what a process has cached it does not ask for with the others
        self.distillation = distillation
        self.teacher = Teacher(teacher, self._model, self.args.device, hidden, cached, sharded)

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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's loss, mixed with the distances to the teacher's logits and hidden states while training."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        options, labels = self.distillation, inputs.get("labels")
        asked = {**inputs, "output_hidden_states": True} if self.teacher.hidden else dict(inputs)
        loss, outputs = self._loss_and_outputs(model, asked, num_items_in_batch)
        self._teacher_asked = True
        with self.accelerator.autocast():
            taught = self.teacher(self._without_labels(inputs))
        problem, temperature = getattr(self._model.config, "problem_type", None), options.distillation_temperature
        distances = logit_distillation(outputs.logits, taught.logits, temperature, problem)
        distance = self._mean_over_items(distances, labels, num_items_in_batch)
        weight = options.distillation_weight
        loss = (1 - weight) * loss + weight * distance
        if self.teacher.hidden:
            hidden = self._hidden_distance(outputs, taught, inputs)
            loss = loss + options.hidden_distillation_weight * self._share_of_step(hidden, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _loss_and_outputs(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        """Trainer's loss, and outputs of the model through which it learns.

        Those come from a forward of their own where the loss has none, as where it is fused with the model's head.
        """
        loss: Any
        if self._loss_hides_outputs:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items)
        else:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items)
            logits = outputs.get("logits")
            if not torch.is_grad_enabled() or (logits is not None and logits.requires_grad):
                return loss, outputs
            self._loss_hides_outputs = True
        return loss, model(**self._without_labels(inputs))  # with what the loss has set in them, such as use_cache

    def _hidden_distance(self, outputs: Any, taught: TeacherOutputs, inputs: Mapping[str, Any]) -> Tensor:
        student, teacher, masks = layer_states(outputs), taught.hidden_states, state_masks(outputs, inputs)
        pairs = self._layer_map
        if pairs is None:
            pairs = tuple((layer, layer) for layer in range(len(student)))
        return hidden_distillation(
            [student[i] for i, _ in pairs], [teacher[j] for _, j in pairs], [masks[i] for i, _ in pairs]
        )

    def _mean_over_items(self, losses: Tensor, labels: Tensor | None, num_items: Tensor | int | None) -> Tensor:
        """The mean as Trainer takes it: over the labelled items of the whole accumulated batch where it counts them."""
        if labels is None or labels.shape != losses.shape:
            return self._share_of_step(losses.mean(), num_items)
        if self._loss_shifts_labels:
            losses, labels = losses[..., :-1], labels[..., 1:]
        counted = labels != -100
        total = torch.where(counted, losses, 0.0).sum()
        if num_items is None or not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return total / counted.sum()
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total / num_items * processes

    def _share_of_step(self, mean: Tensor, num_items: Tensor | int | None) -> Tensor:
        """The mean over a micro-batch, divided by their number in a step where Trainer will not do so."""
        counts = self.model_accepts_loss_kwargs and num_items is not None
        divided = counts or self.compute_loss_func is not None
        return mean / self.current_gradient_accumulation_steps if divided else mean


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
