"""End a run early and safely: at SIGTERM, with which clusters take machines back, at NaN, at the end of the data."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm
from transformers.utils import logging

from hf_sparse.engines.base import Engine
from hf_sparse.errors import NonFiniteLossError

logger = logging.get_logger(__name__)

EXIT_CODE = 128 + signal.SIGTERM


class Preemption:
    """Remembers that a process was sent SIGTERM, so that all processes stop after the same step.

    Whether one of them was told to stop travels beside the training, from the host's memory, and is read a step later;
    so it costs no time and waits for no device.
    """

    _told_to_stop = False
    _group: Any = None
    _pending: tuple[Tensor, Any] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to SIGTERM inside this context, if it is in the main thread: no other can be told of signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._group = distributed.new_group(backend="gloo") if distributed.is_initialized() else None
        self._told_to_stop, self._pending = False, None
        previous = signal.signal(signal.SIGTERM, self._remember)
        try:
            yield
            self.end_()
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _remember(self, signum: int, frame: Any) -> None:
        self._told_to_stop = True

    def all_should_stop(self) -> bool:
        """Whether a process knew at the last call that it should stop; the same on all."""
        if self._group is None:
            return self._told_to_stop
        stop = self._settle()
        flag = torch.tensor(int(self._told_to_stop))
        self._pending = flag, distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group, async_op=True)
        return stop

    def exit_(self, step: int, directory: str) -> None:
        """End the process, which has saved.

        Args:
            step: optimizer steps that are over.
            directory: of the run, for the message.

        Raises:
            SystemExit: always, with code 143.
        """
        self.end_()
        logger.warning(
            "Told to stop by SIGTERM: step %d is saved in %s; start again with resume_from_checkpoint.",
            step,
            directory,
        )
        raise SystemExit(EXIT_CODE)

    def end_(self) -> None:
        """Wait for collective calls in flight and end their threads, which must not outlive the interpreter."""
        self._settle()
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None

    def _settle(self) -> bool:
        """Wait for the collective call in flight, if any; returns whether a process was asked to stop."""
        if self._pending is None:
            return False
        (flag, work), self._pending = self._pending, None
        work.wait()
        return bool(flag)


def require_finite(model: nn.Module, engine: Engine, step: int, directory: Path) -> None:
    """Stop all processes if one of them has trained weights that are not finite.

    The weights are judged and not the loss, which is NaN for a batch without labels, too, while its gradients are zero.

    Args:
        model: bare.
        engine: which trains it.
        step: optimizer steps that are over.
        directory: of the run, for the message.

    Raises:
        NonFiniteLossError: there are some.
    """
    trained = [engine.share(weight).detach() for weight in model.parameters() if weight.requires_grad]
    is_finite = get_total_norm(trained).to(engine.accelerator.device).isfinite()
    if engine.accelerator.reduce((~is_finite).float(), "sum").item():
        raise NonFiniteLossError(
            f"weights became NaN or infinite by step {step}: lower the learning rate, check the data, and go on from "
            f"the last checkpoint in {directory}, which is from before"
        )


def comes_from(traceback: TracebackType | None, module: str) -> bool:
    """Whether an error was raised in a module itself."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals["__name__"] == module
