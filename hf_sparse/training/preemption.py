"""SIGTERM, with which a cluster takes its machines back: save, exit, and let the next start go on from there."""

import signal
import threading
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

logger = logging.get_logger(__name__)

EXIT_CODE = 128 + signal.SIGTERM


class PreemptionMixin(Trainer):
    """Adds to a Trainer that SIGTERM while training ends it with a checkpoint, on all processes after the same step.

    Whether one of them was told to stop travels beside the training, from the host's memory, and is read a step later;
    so it costs no time and waits for no device.
    """

    _told_to_stop = False
    _group: Any = None
    _pending: tuple[Tensor, Any] | None = None

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Trainer's; exits with code 143 after it has saved, if the process was sent SIGTERM.

        Raises:
            SystemExit: it was.
        """
        if threading.current_thread() is not threading.main_thread():  # the only one that can be told of signals
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self._group = distributed.new_group(backend="gloo") if distributed.is_initialized() else None
        self._told_to_stop, self._pending = False, None
        previous = signal.signal(signal.SIGTERM, self._remember)
        try:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            self._end_group()
            return output
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _remember(self, signum: int, frame: Any) -> None:
        self._told_to_stop = True

    def _all_should_stop(self) -> bool:
        """Whether a process knew at the last call that it should stop; the same on all."""
        if self._group is None:
            return self._told_to_stop
        stop = self._settle()
        flag = torch.tensor(int(self._told_to_stop))
        self._pending = flag, distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group, async_op=True)
        return stop

    def _end_group(self) -> None:
        """Wait for what travels and end the threads that send it: they must not meet the end of the interpreter."""
        self._settle()
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None

    def _settle(self) -> bool:
        """Wait for what travels; whether a process was to stop, if anything does."""
        if self._pending is None:
            return False
        (flag, work), self._pending = self._pending, None
        work.wait()
        return bool(flag)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        stop = self._all_should_stop()
        self.control.should_save |= stop
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if stop:
            if self.args.save_strategy == SaveStrategy.BEST:  # then evaluating decides whether it saves
                self._save_checkpoint(cast(nn.Module, self.model), trial=None)
            self._end_group()
            logger.warning(
                "Told to stop by SIGTERM: step %d is saved in %s; start again with resume_from_checkpoint.",
                self.state.global_step,
                self.args.output_dir,
            )
            raise SystemExit(EXIT_CODE)
