"""Show beside the progress bar of a training how far the search for the structure is."""

from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

_SHOWN = ("density", "target_density")


class SparseProgress(ProgressCallback):
    """Trainer's bar, followed by the density and its target as they were logged last."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print what is logged, as Trainer does, and show the density."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        shown = {name: f"{logs[name]:.3f}" for name in _SHOWN if name in logs} if logs else {}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


def show_density_(trainer: Trainer) -> None:
    """Put this bar in the place of Trainer's, in place, where that has one."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(SparseProgress())
