"""Show beside the progress bar of a training how far the search for the structure is, and how good the model is."""

from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

_SHOWN = ("density", "target_density")
_NOT_SHOWN = ("_runtime", "_per_second")


class SparseProgress(ProgressCallback):
    """Trainer's bar, followed by the density, its target and the metrics of evaluations as they were logged last."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print what is logged, as Trainer does, and show what matters of it."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        for name, value in (logs or {}).items():
            if name in _SHOWN or (name.startswith("eval_") and not name.endswith(_NOT_SHOWN)):
                self._shown[name] = f"{value:.3f}" if isinstance(value, float) else str(value)
        if self.training_bar is not None and self._shown:
            self.training_bar.set_postfix(self._shown)


def show_density_(trainer: Trainer) -> None:
    """Put this bar in the place of Trainer's, in place, where that has one."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(SparseProgress())
