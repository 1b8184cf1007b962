"""Remember the metrics of evaluations: those of the pruned model, and of the dense one."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

from transformers import DefaultFlowCallback, PreTrainedModel
from transformers.trainer_callback import CallbackHandler

from hf_sparse.report.history import COSTS
from hf_sparse.report.report import Metrics
from hf_sparse.runtime.contexts import unchanged_random_state
from hf_sparse.training.base import BaseTrainer
from hf_sparse.training.search import unchanged_records

SPLIT = "evaluation"


class Evaluations:
    """Remembers what evaluations of the pruned model found, and evaluates the dense model, once, too.

    Args:
        trainer: which evaluates.
        dense: the model that the run began with, without weights.
    """

    def __init__(self, trainer: BaseTrainer, dense: PreTrainedModel) -> None:
        self.trainer, self.dense_model = trainer, dense
        self._last: tuple[int, Mapping[str, float]] = (0, MappingProxyType({}))  # its step, and what it returned
        self._dense: Mapping[str, float] = MappingProxyType({})
        self._teacher_is_evaluated = False

    def forget_(self) -> None:
        """Forget the last evaluation, in place: the model is trained on from here."""
        self._last = (0, MappingProxyType({}))

    def add_(self, found: dict[str, float]) -> None:
        """Remember an evaluation of the evaluation data, in place; the first of them also evaluates a dense teacher."""
        trainer = self.trainer
        if trainer.distiller is not None and self._is_dense(trainer.distiller.teacher.model):
            if not self._teacher_is_evaluated:
                self._dense, self._teacher_is_evaluated = self._teacher_metrics(), True
        elif trainer.state.global_step == 0 and not trainer.run.compactions:
            self._dense = found

    def remember_(self, found: dict[str, float]) -> None:
        """Remember what the last evaluation of any data returned, to which the caller may add something."""
        self._last = self.trainer.state.global_step, found

    def _is_dense(self, teacher: PreTrainedModel) -> bool:
        """Whether a teacher has the form of the dense model, and can be evaluated in its place."""
        models = (self.dense_model, teacher)
        shapes, others = ([parameter.shape for parameter in model.parameters()] for model in models)
        return shapes == others and self.trainer.engine.evaluates_others

    def _teacher_metrics(self) -> dict[str, float]:
        """Evaluate the teacher on the evaluation data; nothing is logged, and callbacks hear nothing of it."""
        trainer = self.trainer
        assert trainer.distiller is not None
        names = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else [None]
        found: dict[str, float] = {}
        model, callbacks = trainer.model, trainer.callback_handler
        trainer.model = trainer.distiller.teacher.model
        trainer.callback_handler = CallbackHandler([DefaultFlowCallback()], trainer.model, None, None, None)
        try:
            with unchanged_random_state(trainer.args.device), unchanged_records(trainer):
                for name in names:
                    output = trainer.evaluation_loop(
                        trainer.get_eval_dataloader(cast(Any, name)),
                        description="Evaluation of the teacher",
                        prediction_loss_only=True if trainer.compute_metrics is None else None,
                        metric_key_prefix="eval" if name is None else f"eval_{name}",
                    )
                    found |= output.metrics or {}
        finally:
            trainer.model, trainer.callback_handler = model, callbacks
        return found

    def last_metrics(self) -> tuple[Metrics, Metrics]:
        """The task's own metrics of the dense model and of the pruned one at the last evaluation, by data split."""
        state = self.trainer.state
        first = min(1, state.global_step)  # once it is trained, what was found before is of the dense model
        logs = [
            log for log in state.log_history if log["step"] >= first and any(name.startswith("eval_") for name in log)
        ]
        step, given = self._last
        found = dict(given) if step >= first else {}
        for log in logs:
            if log["step"] == logs[-1]["step"]:
                found = {name: value for name, value in log.items() if name.startswith("eval_")} | found
        dense, pruned = _own(self._dense), _own(found)
        return {SPLIT: dense} if dense and pruned else {}, {SPLIT: pruned} if pruned else {}


def _own(found: Mapping[str, Any]) -> dict[str, float]:
    """The task's own metrics of an evaluation; numbers only."""
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and name != "epoch" and not name.endswith(COSTS) and "_mem_" not in name
    }
