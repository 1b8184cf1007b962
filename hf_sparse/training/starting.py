"""What a Trainer finds out on its data before it trains: how its loss treats batches, and where importances start."""

import inspect
import itertools
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, cast

import torch
from accelerate.utils import broadcast, send_to_device
from torch import Tensor, nn
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_sparse.distillation.distiller import DistillationMixin
from hf_sparse.engines.surgery import full_precision_forward, unchanged_random_state, unchanged_records
from hf_sparse.gates.base import attached_gates
from hf_sparse.gates.sensitivity import sensitivities
from hf_sparse.runtime.contexts import hooked
from hf_sparse.runtime.processes import once

logger = logging.get_logger(__name__)

SENSITIVITY_ROWS = 128
"""Rows that sensitivities are estimated on."""

NO_INPUTS = ("output_", "return_", "use_cache", "past_key_values", "num_items_in_batch")
"""How the names of arguments begin that say in which form a model answers, or what its loss is divided by."""


class StartingMixin(DistillationMixin):
    """Adds to a Trainer that, before its first step, it learns from a batch how its loss calls the model."""

    _loss_is_probed = False
    _call: Mapping[str, Any] = MappingProxyType({})
    """What the loss called the model with for one batch, by name, in the host's memory; empty while that is unknown."""
    _takes_batches = True
    """Whether those were tensors of the batch, so that any other batch can be handed to the model as well."""
    _kept_back: Set[str] = frozenset()
    """What of the batch the loss did not hand to the model."""
    _gates_are_due = False
    """Whether gates are to start in the step that has begun."""
    _gate_optimizer: torch.optim.Optimizer | None = None
    """Of the gates alone, where DeepSpeed trains the weights."""

    def _before_step(self, inputs: dict[str, Tensor | Any]) -> None:
        """Find out on the inputs of a step what is not known yet, and start the gates in place if that is due."""
        if self._loss_is_probed and not self._gates_are_due:
            return
        self._model.train()  # a Trainer may prepare inputs in another way where it evaluates
        with unchanged_random_state(self.args.device), unchanged_records(self):
            prepared = self._prepare_inputs(inputs)
            if not self._loss_is_probed:
                self._record_call(prepared)
                self._probe_loss()
            if self._gates_are_due:
                self._start_gates(prepared)
        self._gates_are_due = False

    # ---- The loss ----

    @contextmanager
    def _estimating(self) -> Iterator[None]:
        """Compute losses inside this context in evaluation mode and in full precision."""
        training, _ = self._model.training, self._model.eval()
        try:
            with full_precision_forward(self._model):
                yield
        finally:
            self._model.train(training)

    def _loss_of(self, inputs: Mapping[str, Any]) -> Tensor:
        """The loss of a batch by itself."""
        if self._learns_alone(inputs):
            return self._drawn_loss(inputs)
        items = self._get_num_items_in_batch([inputs], self.args.device)
        return cast(Tensor, self.compute_loss(self._model, dict(inputs), num_items_in_batch=items))

    def _record_call(self, inputs: Mapping[str, Any]) -> None:
        """Remember what the loss calls the model with for a batch, in the first of its forwards."""
        reads = list(inspect.signature(type(self._model).forward).parameters)[1:]
        calls: list[dict[str, Any]] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not calls:
                calls.append({**dict(zip(reads, args)), **kwargs})

        # Before other hooks, of which engines have some that cast inputs.
        hook = self._model.register_forward_pre_hook(record, prepend=True, with_kwargs=True)
        with self._estimating(), torch.no_grad(), hooked([hook]):
            if self._learns_alone(inputs):
                calls.append(dict(inputs))
            else:
                self._loss_of(inputs)
        self._call = send_to_device(
            {
                name: value
                for call in calls  # none where a loss goes by a part of the model
                for name, value in call.items()
                if (name in reads or isinstance(value, Tensor)) and not name.startswith(NO_INPUTS)
            },
            "cpu",
        )
        same = all(
            _is_alike(inputs.get(name), value) for name, value in self._call.items() if isinstance(value, Tensor)
        )
        self._takes_batches, self._kept_back = once(lambda: same), inputs.keys() - self._call.keys()

    def _as_called(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the loss calls the model with for a batch, without labels, beside the settings that it adds.

        All of the batch where that is not known yet; and what it was called with before, if that was no batch's.
        """
        if not self._call:
            return self._without_labels(batch)
        called = send_to_device(self._without_labels(self._call), self.args.device)
        if not self._takes_batches:
            return called
        settings = {name: value for name, value in called.items() if not isinstance(value, Tensor)}
        handed_over = {
            name: value for name, value in self._without_labels(batch).items() if name not in self._kept_back
        }
        return settings | handed_over

    def _probe_loss(self) -> None:
        """Find out whether the model's loss heeds `num_items_in_batch`, unless no label tells.

        Trainer believes so of every model with keyword arguments and then does not average over micro-batches and
        processes; several classification heads ignore the count, and their gradients would grow with accumulation.
        """
        self._loss_is_probed = True
        split = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        if split == 1 or not self.model_accepts_loss_kwargs or "labels" not in self._call:
            return
        inputs: dict[str, Any] = send_to_device(dict(self._call), self.args.device)
        with self._estimating(), torch.no_grad():
            one, two = (self._model(**inputs, num_items_in_batch=torch.tensor(float(n))).loss for n in (1, 2))
        tells = one.isfinite() & (one != 0)  # without any label it is NaN or 0
        flags = torch.stack([tells, tells & (one != two)]).float()
        told, heeds = (self.accelerator.reduce(flags, "sum") > 0).tolist()
        self._loss_is_probed = told
        self.model_accepts_loss_kwargs = heeds or not told

    # ---- Importances ----

    def _open_gates(self) -> None:
        """Let a search begin anew, in place: with open gates, none more important than another, and lambda at zero."""
        bank = attached_gates(self._model)
        if bank is None:
            return
        bank.reopen_()
        state = cast(torch.optim.Optimizer, self._gate_optimizer or self.optimizer).state
        for parameter in bank.parameters():
            state.pop(parameter, None)

    def _start_gates(self, inputs: Mapping[str, Any]) -> None:
        """Let importances start from sensitivities on some rows of the training data; gates stay at 1.

        A row alone may have no loss, where that makes pairs of the rows of a batch, or generates what it judges. Then
        the batch of the step counts as a whole.
        """
        self._open_gates()
        bank = attached_gates(self._model)
        if bank is None or bank.warm_start == 0:
            return
        found: dict[str, Tensor] = {}
        with self._estimating():
            if self._takes_batches:
                found = broadcast(sensitivities(bank, self._some_rows(SENSITIVITY_ROWS, 1), self._loss_of))
            if not any(scores.any() for scores in found.values()):
                found = broadcast(sensitivities(bank, [inputs], self._loss_of))
        bank.start_from_(found, bank.warm_start)

    def _some_rows(self, count: int, size: int) -> Iterator[dict[str, Any]]:
        """Batches of some rows of the training data, the same on all processes."""
        loader = self.get_train_dataloader()
        rows: Any = loader.dataset
        if has_length(rows):
            chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
            rows = torch.utils.data.Subset(loader.dataset, chosen.tolist())
        else:  # of a stream every process has others
            rows = once(lambda: list(itertools.islice(iter(loader.dataset), count)))
        remaining = iter(rows)
        while batch := list(itertools.islice(remaining, size)):
            yield self._prepare_inputs(loader.collate_fn(batch))


def _is_alike(one: Any, other: Tensor) -> bool:
    """Whether something is a tensor of the shape and dtype of another."""
    return isinstance(one, Tensor) and one.shape == other.shape and one.dtype == other.dtype
