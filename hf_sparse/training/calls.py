"""Record how a Trainer's loss calls its model on one batch, and make other batches of the same form."""

import inspect
import itertools
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.trainer_utils import has_length

from hf_sparse.distillation.listening import without_labels
from hf_sparse.runtime.contexts import evaluating, full_precision_forward, hooked
from hf_sparse.runtime.processes import once
from hf_sparse.training.base import BaseTrainer

NO_INPUTS = ("output_", "return_", "use_cache", "past_key_values", "num_items_in_batch")
"""How the names of arguments begin that say in which form a model answers, or what its loss is divided by."""


class LossCalls:
    """Remembers what a Trainer's loss calls the model with, so that it can be run on other batches in the same way.

    Attributes:
        takes_batches: whether those were tensors of the batch, so that any other batch can be handed over as well.
        is_probed: whether it is known how the model's loss counts items.
    """

    takes_batches = True
    is_probed = False
    _call: Mapping[str, Any] = MappingProxyType({})
    """What the loss called the model with for one batch, by name, in the host's memory; empty while that is unknown."""
    _kept_back: Set[str] = frozenset()
    """What of the batch the loss did not hand to the model."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer

    @property
    def has_data(self) -> bool:
        """Whether there are data to take a batch of."""
        return self.trainer.eval_dataset is not None or self.trainer.train_dataset is not None

    @property
    def rows_of_a_step(self) -> int:
        """How many rows of the training data an optimizer step takes, however they are split."""
        args = self.trainer.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    @contextmanager
    def estimating(self) -> Iterator[None]:
        """Compute losses inside this context in evaluation mode and in full precision."""
        model = self.trainer.bare_model
        with evaluating(model), full_precision_forward(model):
            yield

    def record(self, inputs: Mapping[str, Any]) -> None:
        """Remember what the loss calls the model with for a batch, in the first of its forwards."""
        model = self.trainer.bare_model
        reads = list(inspect.signature(type(model).forward).parameters)[1:]
        calls: list[dict[str, Any]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not calls:
                calls.append({**dict(zip(reads, args)), **kwargs})

        # Before other hooks, of which engines have some that cast inputs.
        hook = model.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
        with self.estimating(), torch.no_grad(), hooked([hook]):
            if self.trainer.learns_alone(inputs):
                calls.append(dict(inputs))
            else:
                self.trainer.loss_of(inputs)
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
        self.takes_batches, self._kept_back = once(lambda: same), inputs.keys() - self._call.keys()

    def without_labels(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Leave labels out of inputs, for a forward without a loss."""
        return without_labels(self.trainer.bare_model, inputs, self.trainer.label_names)

    def as_called(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments with which the loss calls the model for a batch, but for labels.

        All of the batch where that is not known yet; and what it was called with before, if that was no batch's.
        """
        if not self._call:
            return self.without_labels(batch)
        called = send_to_device(self.without_labels(self._call), self.trainer.args.device)
        if not self.takes_batches:
            return cast(dict[str, Any], called)
        settings = {name: value for name, value in called.items() if not isinstance(value, Tensor)}
        handed_over = {name: value for name, value in self.without_labels(batch).items() if name not in self._kept_back}
        return settings | handed_over

    def probe(self) -> None:
        """Find out whether the model's loss heeds `num_items_in_batch`, unless no label tells; tell the Trainer.

        Trainer believes so of every model with keyword arguments and then does not average over micro-batches and
        processes; several classification heads ignore the count, and their gradients would grow with accumulation.
        """
        self.is_probed = True
        trainer = self.trainer
        split = trainer.args.gradient_accumulation_steps * trainer.accelerator.num_processes
        if split == 1 or not trainer.model_accepts_loss_kwargs or "labels" not in self._call:
            return
        inputs: dict[str, Any] = send_to_device(dict(self._call), trainer.args.device)
        with self.estimating(), torch.no_grad():
            one, two = (trainer.bare_model(**inputs, num_items_in_batch=torch.tensor(float(n))).loss for n in (1, 2))
        tells = one.isfinite() & (one != 0)  # without any label it is NaN or 0
        flags = torch.stack([tells, tells & (one != two)]).float()
        told, heeds = (trainer.accelerator.reduce(flags, "sum") > 0).tolist()
        self.is_probed = told
        trainer.model_accepts_loss_kwargs = heeds or not told

    def training_rows(self, count: int, size: int) -> Iterator[dict[str, Any]]:
        """Batches of some rows of the training data, the same on all processes.

        Args:
            count: rows in all, at most.
            size: rows of a batch.
        """
        loader = self.trainer.get_train_dataloader()
        rows: Any = loader.dataset
        if has_length(rows):
            chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
            rows = torch.utils.data.Subset(loader.dataset, chosen.tolist())
        else:  # of a stream every process has others
            rows = once(lambda: list(itertools.islice(iter(loader.dataset), count)))
        remaining = iter(rows)
        while batch := list(itertools.islice(remaining, size)):
            yield self.trainer.prepared(loader.collate_fn(batch))

    def verification_batch(self, size: int | None = None) -> dict[str, Any]:
        """A batch of the evaluation data, else of the training data, as the loss hands it to the model, without labels.

        It is on the device of the run, and the same on all processes, of which none has to wait for another. Where the
        loss makes something else of batches, it is what the loss made of one in the first step of this process.

        Args:
            size: rows, of a batch of the data; as many as in evaluations by default.
        """
        if not self.takes_batches:
            return self.as_called({})
        trainer = self.trainer
        dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        loader = trainer.get_test_dataloader(cast(Any, dataset))
        rows = list(itertools.islice(iter(loader.dataset), size or trainer.args.eval_batch_size))
        return self.as_called(trainer.prepared(loader.collate_fn(rows)))


def _is_alike(one: Any, other: Tensor) -> bool:
    """Whether something is a tensor of the shape and dtype of another."""
    return isinstance(one, Tensor) and one.shape == other.shape and one.dtype == other.dtype
