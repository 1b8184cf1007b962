"""A Trainer mixin that stops at a loss that is not finite, before a checkpoint is written from it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_sparse.errors import SparsityError


class NonFiniteLossError(SparsityError):
    """The loss became NaN or infinite; training has stopped before anything was overwritten by it."""


class FiniteLossMixin(Trainer):
    """Adds to a Trainer that training stops with `NonFiniteLossError` when the loss becomes NaN or infinite.

    Whether it did is remembered on the device and read whenever something is logged, evaluated or saved.
    """

    _not_finite: Tensor | None = None

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Trainer's step; remembers, without waiting for the device, whether the loss was finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        not_finite = ~torch.isfinite(loss)
        self._not_finite = not_finite if self._not_finite is None else self._not_finite | not_finite
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._require_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._require_finite()
        return super()._finalize_training(*args, **kwargs)

    def _require_finite(self) -> None:
        if self._not_finite is None:
            return
        processes = self.accelerator.reduce(self._not_finite.float(), "sum")
        if processes.item():
            self._not_finite = None  # it is said; the next run begins anew
            raise NonFiniteLossError(
                f"the loss became NaN or infinite by step {self.state.global_step}: lower the learning rate, check the "
                f"data, and go on from the last checkpoint in {self.args.output_dir}, which is from before"
            )
