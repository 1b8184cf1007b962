"""The dense teacher: a frozen model that answers to what its student is asked, as its student would."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_sparse.distillation.answers import STACKS, Answers, alike, answers, class_counts, declared_outputs
from hf_sparse.distillation.row_memory import RowMemory
from hf_sparse.engines.base import Engine
from hf_sparse.errors import SparsityError

logger = logging.get_logger(__name__)


def _label_names(model: nn.Module) -> list[str]:
    """The labels of a classifier in their order; none where they were never named."""
    names = getattr(model.config, "id2label", None) or {}
    found = [str(names[index]) for index in sorted(names)]
    return [] if all(name.startswith("LABEL_") for name in found) else found


def _require_same_task(teacher: PreTrainedModel, student: PreTrainedModel, hidden: bool) -> None:
    """Refuse a teacher whose answers cannot be compared with those of a student, as far as configs and classes tell.

    Raises:
        SparsityError: why they cannot.
    """
    others = class_counts(teacher)
    for name, count in class_counts(student).items():
        if count != others[name]:
            raise SparsityError(
                f"the teacher has {name} {others[name]} and the model {count}: give a teacher for the same task"
            )
    ours, theirs = (_label_names(one) for one in (student, teacher))
    if ours and theirs and ours != theirs:
        raise SparsityError(f"the teacher has the labels {theirs} and the model {ours}: give both one id2label")
    if hidden and not all(_gives_states(one) for one in (student, teacher)):
        raise SparsityError(
            "the forward of model or teacher takes no output_hidden_states: set hidden_distillation_weight to 0"
        )
    said, by_teacher = declared_outputs(student), declared_outputs(teacher)
    if said is None or by_teacher is None:  # the first batch will show
        return
    heads, taught = ({name for name in names if name.endswith("logits")} for names in (said, by_teacher))
    if heads and taught and not heads & taught:
        raise SparsityError(
            f"the teacher predicts {', '.join(sorted(taught))} and the model {', '.join(sorted(heads))}: give a "
            "teacher for the same task"
        )
    if not heads & taught and not (hidden and said & by_teacher & set(STACKS)):
        raise SparsityError(
            f"{type(teacher).__name__} has neither logits nor, unless hidden_distillation_weight is 0, hidden states "
            "to learn from: leave the teacher out"
        )


def _gives_states(model: nn.Module) -> bool:
    parameters = inspect.signature(type(model).forward).parameters
    return "output_hidden_states" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _cache_as_(config: PreTrainedConfig, other: PreTrainedConfig) -> None:
    """Set `use_cache` of a config and of those within it, in place, as another config has it."""
    config.use_cache = getattr(other, "use_cache", False)
    for name in config.sub_configs:
        part, like = getattr(config, name, None), getattr(other, name, None)
        if isinstance(part, PreTrainedConfig) and isinstance(like, PreTrainedConfig):
            _cache_as_(part, like)


class Teacher:
    """A frozen dense model, on the device or in shards, that computes answers to the batches of its student.

    It caches no past where its student does not, as Trainer has that: beside a cache, transformers does not see where
    one of several packed examples ends.

    Args:
        model: the dense teacher; put in evaluation mode and frozen, with the forward of its class, and its config says
            whether it caches a past.
        student: the model that learns from it.
        engine: which trains the student; it may shard the teacher, which all processes then ask at the same time.
        hidden: whether hidden states are wanted.
        cached: whether to remember what it said about each row, as `RowMemory` does.
        rows: how many rows the training data have; None where that is not known.

    Raises:
        SparsityError: it is the student itself, or predicts something else.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        student: PreTrainedModel,
        engine: Engine,
        hidden: bool,
        cached: bool,
        rows: int | None = None,
    ) -> None:
        if model is student:
            raise SparsityError("the teacher is the model that is pruned: give a copy, copy.deepcopy(model)")
        _require_same_task(model, student, hidden)
        self.model = model.eval().requires_grad_(False)
        vars(model).pop("forward", None)  # of a Trainer before: fused with its loss, say, or that of another model
        _cache_as_(model.config, student.config)
        self.sharded = engine.freeze_(model, whole=cached)  # what a process has cached it does not ask for with others
        self.hidden = hidden
        self._declared = declared_outputs(model)
        self._proven = False
        # With a decoder, a tensor as long as the input may belong to the output, so its padding is kept.
        padded = model.config.is_encoder_decoder
        self.class_counts = {count for count in class_counts(model).values() if count is not None}
        self._memory = RowMemory(self.ask, self.class_counts, padded, rows) if cached else None

    def __call__(self, inputs: Mapping[str, Any]) -> Answers:
        """Its answers to a batch of the training data without labels, remembered or asked for.

        Raises:
            SparsityError: rows of the batch cannot be remembered, or it says something else each time.
        """
        if not self._proven:
            self._prove(inputs)
        return self.ask(inputs) if self._memory is None else self._memory(inputs)

    def _prove(self, inputs: Mapping[str, Any]) -> None:
        """Ask twice, in the first batch of a run; do without hidden states, in place, whose tokens are drawn each time.

        Raises:
            SparsityError: its logits are others each time.
        """
        first, second = self.ask(inputs), self.ask(inputs)
        self._proven = True
        if not all(alike(first.heads[name], second.heads[name]) for name in first.heads):
            raise SparsityError(
                f"{type(self.model).__name__} says something else to the same inputs each time, so nothing can be "
                "learnt from it: leave the teacher out"
            )
        if not all(map(alike, first.states, second.states)):
            logger.warning("The teacher draws tokens at random: the model learns from the logits alone.")
            self.hidden = False

    def ask(self, inputs: Mapping[str, Any]) -> Answers:
        """Its answers to any batch without labels."""
        asked = {**inputs, "return_dict": True, **({"output_hidden_states": True} if self.hidden else {})}
        # Not in inference mode, which is hardly faster: its tensors could not be used again outside, as FSDP would.
        with torch.no_grad():
            return answers(self.model(**asked), self._declared)
