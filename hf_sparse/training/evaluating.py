"""What evaluations found: the metrics of the pruned model, and beside them those of the dense one."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

from transformers import DefaultFlowCallback, PreTrainedModel
from transformers.trainer_callback import CallbackHandler

from hf_sparse.compaction.compact import CompactionReport
from hf_sparse.distillation.distiller import DistillationMixin
from hf_sparse.engines.surgery import unchanged_random_state, unchanged_records
from hf_sparse.report.report import Metrics

SPLIT = "evaluation"
COSTS = ("runtime", "per_second", "model_preparation_time", "samples")
"""Endings of what evaluations note beside the task's own metrics."""


class EvaluationMixin(DistillationMixin):
    """Adds to a Trainer whose model is pruned that it remembers metrics, and evaluates the dense model, once, too."""

    _dense: PreTrainedModel
    """The model that the run began with, without weights."""
    _compactions: list[CompactionReport]
    _evaluated: tuple[int, Mapping[str, float]] = (0, MappingProxyType({}))
    """The step of the last evaluation, and what it returned, to which the caller may add something."""
    _dense_evaluated: Mapping[str, float] = MappingProxyType({})
    """The same of the dense model."""
    _teacher_evaluated = False

    # The arguments are those of whichever Trainer this is mixed into, of which Seq2SeqTrainer takes more.
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's evaluation; the first of the evaluation data also evaluates a teacher that is the dense model."""
        found = super().evaluate(*args, **kwargs)
        self._evaluated = self.state.global_step, found
        if (args[0] if args else kwargs.get("eval_dataset")) is not None:
            return found
        if self.teacher is not None and self._is_dense(self.teacher.model):
            if not self._teacher_evaluated:
                self._dense_evaluated, self._teacher_evaluated = self._teacher_metrics(), True
        elif self.state.global_step == 0 and not self._compactions:
            self._dense_evaluated = found
        return found

    def _is_dense(self, teacher: PreTrainedModel) -> bool:
        """Whether a teacher has the form of the dense model, and is not some other model; in shards it is not asked."""
        shapes, theirs = ([parameter.shape for parameter in model.parameters()] for model in (self._dense, teacher))
        return shapes == theirs and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _teacher_metrics(self) -> dict[str, float]:
        """Evaluate the teacher on the evaluation data; nothing is logged, and callbacks hear nothing of it."""
        assert self.teacher is not None
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else [None]
        found: dict[str, float] = {}
        model, callbacks = self.model, self.callback_handler
        self.model = self.teacher.model
        self.callback_handler = CallbackHandler([DefaultFlowCallback()], self.model, None, None, None)
        try:
            with unchanged_random_state(self.args.device), unchanged_records(self):
                for name in names:
                    output = self.evaluation_loop(
                        self.get_eval_dataloader(cast(Any, name)),
                        description="Evaluation of the teacher",
                        prediction_loss_only=True if self.compute_metrics is None else None,
                        metric_key_prefix="eval" if name is None else f"eval_{name}",
                    )
                    found |= output.metrics or {}
        finally:
            self.model, self.callback_handler = model, callbacks
        return found

    def _last_metrics(self) -> tuple[Metrics, Metrics]:
        """The task's own metrics of the dense model and of the pruned one at the last evaluation, by data split."""
        first = min(1, self.state.global_step)  # once it is trained, what was found before is of the dense model
        logs = [
            log
            for log in self.state.log_history
            if log["step"] >= first and any(name.startswith("eval_") for name in log)
        ]
        step, found = self._evaluated
        found = dict(found) if step >= first else {}
        for log in logs:
            if log["step"] == logs[-1]["step"]:
                found = {name: value for name, value in log.items() if name.startswith("eval_")} | found
        dense, pruned = _own(self._dense_evaluated), _own(found)
        return {SPLIT: dense} if dense and pruned else {}, {SPLIT: pruned} if pruned else {}


def _own(found: Mapping[str, Any]) -> dict[str, float]:
    """The task's own metrics of an evaluation; numbers only."""
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and name != "epoch" and not name.endswith(COSTS) and "_mem_" not in name
    }
