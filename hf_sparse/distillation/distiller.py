"""Learn from a dense teacher: the distances to its answers are mixed with the loss of the task."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse.config import DistillationConfig
from hf_sparse.distillation.answers import Answers, answers, class_axis, declared_outputs, state_masks
from hf_sparse.distillation.listening import Forward, forwards, without_labels
from hf_sparse.distillation.losses import drawn_logits, drawn_states, hidden_distillation, logit_distillation
from hf_sparse.distillation.shares import Share
from hf_sparse.distillation.teacher import Teacher
from hf_sparse.errors import SparsityError

logger = logging.get_logger(__name__)

LayerMap = tuple[tuple[int, int], ...]
"""Pairs of student and teacher layers whose states are compared."""


class Distiller:
    """Mixes the loss of a task with the distances to a teacher's logits and hidden states.

    Args:
        teacher: frozen.
        config: how to learn from it.
        label_names: of the Trainer, beside `labels`.
        autocast: makes the context of the precision that the teacher is asked in.
    """

    def __init__(
        self,
        teacher: Teacher,
        config: DistillationConfig,
        label_names: Sequence[str],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.teacher, self.config = teacher, config
        self.label_names = ("labels", *label_names)
        self.autocast = autocast
        self._asked = False
        self._summed: dict[str, Tensor] = {}  # what losses are mixed of, by what they are logged as, since the last log
        self._steps = 0.0

    def run_all_layers_(self, model: nn.Module) -> None:
        """Set layerdrop to 0 in place where states of layers are compared: one that is skipped has none."""
        if not self.teacher.hidden:
            return
        configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
        for one in (*model.modules(), *configs):
            for name in [name for name, value in vars(one).items() if name.endswith("layerdrop") and value]:
                _warn_once(f"{name} is 0 from here on, since a layer that is skipped has no state to compare.")
                setattr(one, name, 0.0)

    def require_asked(self, trainer: str) -> None:
        """Refuse a training step in which the teacher was not asked.

        Args:
            trainer: name of the Trainer's class.

        Raises:
            SparsityError: the loss of a subclass hides the one that asks.
        """
        if not self._asked:
            raise SparsityError(
                f"the teacher would teach nothing: a compute_loss in {trainer} hides the one that asks it. "
                "Let it call super().compute_loss, put it in a Trainer of its own, `class Mine(SparseTrainerMixin, "
                "YourTrainer)`, or give a compute_loss_func"
            )

    # ---- Loss ----

    def loss(
        self,
        wrapped: nn.Module,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        task: Callable[[], tuple[Tensor | None, Any]],
        share: Share,
        layers: LayerMap | None,
    ) -> tuple[Tensor, Any]:
        """Mix the loss of a batch with the distances to what the teacher answers.

        Every forward that the loss runs is compared with the teacher's answer to the same inputs. Without a loss of the
        task the distances are all there is.

        Args:
            wrapped: what is called, by an engine or a compiler around the model.
            model: bare.
            inputs: the batch, with labels; `task` may change it.
            task: computes the loss of the task and the outputs that go with it, or None for either.
            share: of the batch in its optimizer step.
            layers: whose states are compared; each with its own by default.

        Returns:
            The loss, shape (), and outputs of the model.

        Raises:
            SparsityError: the answers cannot be compared.
        """
        batch = dict(inputs)  # a loss may take labels out of its inputs, and put settings into them
        with forwards(wrapped, model, self._states_wanted) as heard:
            loss, outputs = task()
        compared = [
            self._answered(wrapped, model, forward, batch | inputs) for forward in heard or [Forward(inputs, None)]
        ]
        self._asked = True
        logits, hidden = (
            _mean(column) for column in zip(*(self._distances(model, forward, share, layers) for forward in compared))
        )
        return self._mixed(loss, logits, hidden, share), compared[-1].outputs if outputs is None else outputs

    def drawn_loss(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], share: Share, layers: LayerMap | None
    ) -> Tensor:
        """The distance to answers that are drawn at random from the teacher's: to its logits, or else to its states.

        The distance to the answers themselves has no slope where the model is a copy of its teacher.
        """
        asked = self._without_labels(model, inputs)
        outputs, taught = model(**(asked | self._states_wanted)), self.teacher(asked)
        ours = answers(outputs, declared_outputs(model))
        axes, problem = self._class_axes(ours, taught, inputs), getattr(model.config, "problem_type", None)
        if not axes:
            drawn = Answers({}, tuple(drawn_states(state) for state in taught.states))
            return self._hidden_distance(model, outputs, drawn, inputs, layers)
        parts = []
        for name, axis in axes.items():
            head = drawn_logits(taught.heads[name].movedim(axis, -1), problem).movedim(-1, axis)
            parts.append(share.mean_over_items(model, _head_distance(model, ours.heads[name], head, axis, 1.0), inputs))
        return torch.stack(parts).mean()

    def _without_labels(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return without_labels(model, inputs, self.label_names)

    @property
    def _states_wanted(self) -> dict[str, bool]:
        return {"output_hidden_states": True} if self.teacher.hidden else {}

    def _answered(
        self, wrapped: nn.Module, model: PreTrainedModel, forward: Forward, batch: Mapping[str, Any]
    ) -> Forward:
        """A forward with answers in its outputs, and with the labels of the batch that it was run for.

        Where it has none, as with a loss fused with the model's head, it is run once more, with what it reads of the
        batch, and with tensors that the loss has made.
        """
        labels = {name: batch[name] for name in ("shift_labels", *self.label_names) if name in batch}
        outputs = forward.outputs
        if not answers(outputs, declared_outputs(model)):
            read = {name: value for name, value in forward.inputs.items() if name in batch or isinstance(value, Tensor)}
            outputs = wrapped(**(self._without_labels(model, read) | self._states_wanted))
        return Forward(labels | forward.inputs, outputs)

    def _distances(
        self, model: PreTrainedModel, forward: Forward, share: Share, layers: LayerMap | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The distances of a forward to the teacher's logits and to its states, of what both of them have.

        Raises:
            SparsityError: that is nothing, or they differ in shape.
        """
        with self.autocast():
            taught = self.teacher(self._without_labels(model, forward.inputs))
        ours, hidden = answers(forward.outputs, declared_outputs(model)), None
        if self.teacher.hidden and ours.states and taught.states:
            hidden = share.of(self._hidden_distance(model, forward.outputs, taught, forward.inputs, layers))
        axes = self._class_axes(ours, taught, forward.inputs)
        if not axes and hidden is None:
            raise SparsityError(
                f"{type(model).__name__} and its teacher have neither logits that can be compared entry by entry "
                "nor, unless hidden_distillation_weight is 0, hidden states: leave the teacher out"
            )
        if not axes and ours.heads:
            _warn_once(
                f"The teacher's {', '.join(ours.heads)} cannot be compared entry by entry: hidden states are learnt."
            )
        temperature = self.config.distillation_temperature
        parts = [
            share.mean_over_items(
                model,
                _head_distance(model, ours.heads[name], taught.heads[name], axis, temperature),
                forward.inputs,
            )
            for name, axis in axes.items()
        ]
        return _mean(parts), hidden

    def _class_axes(self, ours: Answers, taught: Answers, inputs: Mapping[str, Any]) -> dict[str, int]:
        """By the names of the heads that are compared, which axis of their logits is that of classes.

        Raises:
            SparsityError: the model's logits are others than the teacher's.
        """
        shapes, others = ({name: tuple(head.shape) for name, head in one.heads.items()} for one in (ours, taught))
        both = sorted(shapes.keys() & others.keys())
        if (shapes and others and not both) or any(shapes[name] != others[name] for name in both):
            raise SparsityError(f"the teacher has {others} and the model {shapes}: give a teacher for the same task")
        labels = [inputs[name] for name in self.label_names if inputs.get(name) is not None]
        if not all(isinstance(one, Tensor) for one in labels):
            return {}  # lists of objects: the loss finds out which prediction is of which, and in no order
        axes = {name: class_axis(shapes[name], self.teacher.class_counts, inputs.get("labels")) for name in both}
        return {name: axis for name, axis in axes.items() if axis is not None}

    def _hidden_distance(
        self, model: PreTrainedModel, outputs: Any, taught: Answers, inputs: Mapping[str, Any], layers: LayerMap | None
    ) -> Tensor:
        student = answers(outputs, declared_outputs(model)).states
        masks = state_masks(model, outputs, inputs)
        pairs = layers if layers is not None else tuple((layer, layer) for layer in range(len(taught.states)))
        if max(layer for layer, _ in pairs) >= len(student) or (layers is None and len(pairs) < len(student)):
            raise SparsityError(
                f"the model has {len(student)} hidden states for the {len(taught.states)} of its teacher: give one "
                "with as many layers, let no layer be skipped at random, or set hidden_distillation_weight to 0"
            )
        return hidden_distillation(
            [student[i] for i, _ in pairs], [taught.states[j] for _, j in pairs], [masks[i] for i, _ in pairs]
        )

    # ---- Logging ----

    def _mixed(self, task: Tensor | None, logits: Tensor | None, hidden: Tensor | None, share: Share) -> Tensor:
        """The weighted sum of the losses that there are, which are remembered for the next log."""
        weight = self.config.distillation_weight
        losses = {
            # Without logits to weigh it against, it counts in full.
            "task_loss": (1 - weight if logits is not None or weight == 1 else 1.0, task),
            "logits_loss": (weight, logits),
            "hidden_loss": (self.config.hidden_distillation_weight, hidden),
        }
        there = [(name, factor, loss) for name, (factor, loss) in losses.items() if loss is not None]
        for name, _, loss in there:
            summed = self._summed.get(name)
            own = loss.detach() / (1 if share.is_taken else share.micro_batches)
            self._summed[name] = own if summed is None else summed + own
        self._steps += 1 / share.micro_batches
        return cast(Tensor, sum(factor * loss for _, factor, loss in there))

    def logged(self) -> dict[str, Tensor]:
        """The means of what losses were mixed of since the last call, before they were weighted, of this process."""
        means = {name: summed / self._steps for name, summed in self._summed.items()}
        self._summed, self._steps = {}, 0.0
        return means


def _head_distance(model: PreTrainedModel, ours: Tensor, theirs: Tensor, axis: int, temperature: float) -> Tensor:
    problem = getattr(model.config, "problem_type", None)
    return logit_distillation(ours.movedim(axis, -1), theirs.movedim(axis, -1), temperature, problem)


def _mean(losses: Sequence[Tensor | None]) -> Tensor | None:
    """The mean of the losses that there are, if any."""
    there = [loss for loss in losses if loss is not None]
    return torch.stack(there).mean() if there else None


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
