"""Schedule the learning rate of a run: constant during the search, then a whole decay during the recovery."""

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from hf_sparse.gates.controller import Schedule


def after_the_searches(
    stock: LambdaLR, schedules: Sequence[Schedule], args: TrainingArguments, with_gates: bool
) -> LambdaLR:
    """The stock schedule, begun in every stage when the search for the structure ends and compressed into what is left.

    Structure must be found while weights can still move, and recovery wants a whole decay of its own.
    """
    warmup = args.get_warmup_steps(schedules[-1].end)

    def weights(step: int, decay: Any) -> float:
        stage = _stage(schedules, step)
        if step < stage.hold_end:
            return min(1.0, (step - stage.start + 1) / (warmup + 1))
        return decay(warmup + stage.recovery_at(step) * (schedules[-1].end - warmup))

    lambdas: list[Any] = [lambda step, decay=decay: weights(step, decay) for decay in stock.lr_lambdas]
    if with_gates:
        lambdas[-1] = lambda step: _stage(schedules, step).pace  # their group is the last one
    optimizer = stock.optimizer
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    return LambdaLR(optimizer, lambdas)


def _stage(schedules: Sequence[Schedule], step: int) -> Schedule:
    """The stage that an optimizer step is in; the last one after all of them."""
    return next((stage for stage in schedules if step < stage.end), schedules[-1])
