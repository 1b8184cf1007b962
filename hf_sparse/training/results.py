"""Save and upload the results of a run: the smaller model, its report and its card."""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_sparse.checkpoint.card import NO_FIELDS
from hf_sparse.checkpoint.hub import upload
from hf_sparse.checkpoint.save_load import complete
from hf_sparse.checkpoint.tasks import task_of
from hf_sparse.compaction.compact import CompactionReport, compact, compact_alike_
from hf_sparse.config import SparsityConfig
from hf_sparse.costs.table import CostTable
from hf_sparse.engines.tensors import spread_
from hf_sparse.errors import SparsityError, first_line
from hf_sparse.gates.attach import current_plan, detach_gates, gate_bank, require_bank
from hf_sparse.gates.plan import PruningPlan
from hf_sparse.gates.units import GateBank
from hf_sparse.report.history import History
from hf_sparse.report.report import Metrics, Origin, Report, command_line, hub_id, make_report
from hf_sparse.runtime.contexts import plain_forward
from hf_sparse.runtime.copies import copy_in_place, skeleton, with_random_weights_
from hf_sparse.runtime.files import ADAPTER, replaced_directory
from hf_sparse.runtime.processes import is_main, once
from hf_sparse.structure.blocks import ModelStructure
from hf_sparse.structure.stock import stock_class
from hf_sparse.training.adapters import Adapters
from hf_sparse.training.base import BaseTrainer
from hf_sparse.training.calls import LossCalls
from hf_sparse.training.card_text import CardText
from hf_sparse.training.evaluations import Evaluations
from hf_sparse.training.resume import names_in_memory

logger = logging.get_logger(__name__)


class Results:
    """Compacts, measures, saves and uploads the model of a run.

    Attributes:
        structure: what could be pruned in the model that the run began with.
        costs: what that costs.
        evaluations: what was found of the model, and of the dense one.
        report: of the run, once it is measured or set: what is saved and pushed then carries it.
    """

    structure: ModelStructure
    costs: CostTable
    evaluations: Evaluations
    report: Report | None = None
    _filled_in: tuple[Metrics, Metrics] = ({}, {})
    """The metrics in `report`, unless they were given."""

    def __init__(self, trainer: BaseTrainer, config: SparsityConfig, calls: LossCalls, adapters: Adapters) -> None:
        self.trainer, self.config, self.calls, self.adapters = trainer, config, calls, adapters
        self._card_fields = NO_FIELDS
        self._said: Mapping[str, str] = {}
        self._hub_token = self._prepare_hub_()

    def _prepare_hub_(self) -> str | None:
        """Take the token out of the Trainer's arguments, since checkpoints have those, and upload only at the end.

        On the way there are models with gates, which nobody else could load.

        Raises:
            SparsityError: a hub_strategy that asks for checkpoints on the Hub.
        """
        arguments = self.trainer.args = copy.copy(self.trainer.args)
        token, arguments.hub_token = arguments.hub_token, None
        if arguments.push_to_hub and arguments.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            strategy = HubStrategy(arguments.hub_strategy).value
            raise SparsityError(
                f"hub_strategy={strategy!r} would upload models with their gates, which nobody can load: take 'end'"
            )
        if arguments.push_to_hub and arguments.hub_strategy == HubStrategy.EVERY_SAVE:
            logger.warning(
                "hub_strategy='every_save' is taken for 'end': save_model() and push_to_hub() upload the model; "
                "checkpoints are kept here, as they may have gates, which nobody could load"
            )
        arguments.hub_strategy = HubStrategy.END
        return token

    def begin_with_(self, model: PreTrainedModel, bank: GateBank) -> None:
        """Remember what the run begins with, in place, for its report."""
        self.structure, self.costs = bank.whole, bank.costs
        self.trainer.run.gated = list(self.costs.blocks)
        with self.adapters.aside(model):
            self._dense = skeleton(model)
        detach_gates(self._dense)
        self.evaluations = Evaluations(self.trainer, self._dense)

    def forget_(self) -> None:
        """Forget report and metrics, in place: the model is trained on from here."""
        self.report = None
        self.evaluations.forget_()

    @property
    def _model(self) -> PreTrainedModel:
        return self.trainer.bare_model

    @property
    def _compactions(self) -> list[CompactionReport]:
        return self.trainer.run.compactions

    # ---- Compaction ----

    def plan(self) -> PruningPlan:
        """What is kept now, in units of the model that the run began with."""
        plans = [report.plan for report in self._compactions]
        if gate_bank(self._model) is not None or not plans:
            plans.append(current_plan(self._model))
        return functools.reduce(PruningPlan.then, plans)

    def compact_(self) -> CompactionReport:
        """Replace a model that still has gates by the smaller one it has become, in place, checked on a batch of data.

        Where its weights are in shards, all processes have to call this, and all have it whole afterwards.

        Returns:
            What was removed in the whole run, in units of the model that it began with.

        Raises:
            SparsityError: there never were gates, or the compact model would compute something else.
        """
        trainer = self.trainer
        sharded, gated = trainer.engine.is_in_shards(self._model), gate_bank(self._model) is not None
        adapted = (gated or not self.config.keep_adapter) and self.adapters.merge_(self._model)
        with plain_forward(self._model):
            if sharded:
                trainer.engine.leave_(self._model, trainer.training)
                if gated:
                    self.compact_together_()
                spread_(self._model, trainer.args.device)
            elif gated:
                self._compactions.append(compact(self._model, inputs=self.calls.verification_batch()))
                nn.Module.to(self._model, trainer.args.device)  # transformers wraps `to` in a way that hides its type
        if sharded or gated or adapted:
            trainer.leave_training_()
        return _together(self._compactions)

    def compact_together_(self) -> None:
        """Make a model with gates smaller in place, on the main process; give it that form on the others.

        They are to get its weights from the main one.
        """
        batch, bank = self.calls.verification_batch(), require_bank(self._model)
        done = once(lambda: compact(self._model, inputs=batch))
        if not is_main():
            detach_gates(self._model)
            compact_alike_(self._model, bank.whole, done, bank.structure.blocks)
        self._compactions.append(done)

    @contextmanager
    def _compacted(self) -> Iterator[list[CompactionReport]]:
        """Put the smaller model in the gated one's place inside this context; gives all compactions that led to it.

        Adapters are merged into its weights.
        """
        if gate_bank(self._model) is None:
            with self.adapters.merged(self._model):
                yield self._compactions
            return
        with copy_in_place(self.trainer):
            self.adapters.merge_(self._model)
            with plain_forward(self._model):
                last = compact(self._model, inputs=self.calls.verification_batch())
            yield [*self._compactions, last]

    # ---- Report ----

    def measure(
        self,
        inputs: Mapping[str, Tensor] | None = None,
        metrics: tuple[Metrics, Metrics] | None = None,
        origin: Origin | None = None,
    ) -> Report:
        """Measure the model before and after pruning, and keep that as `report`; see `SparseTrainerMixin.measure`."""
        batch = inputs if inputs is not None else self.calls.verification_batch()
        if not self.trainer.engine.is_in_shards(self._model):
            return self._measure(batch, metrics, origin)
        with self.trainer.engine.gathered(self._model):
            self.report = once(lambda: self._measure(batch, metrics, origin))
        return self.report

    def _measure(
        self, inputs: Mapping[str, Tensor], metrics: tuple[Metrics, Metrics] | None, origin: Origin | None
    ) -> Report:
        device, origin = self.trainer.args.device, origin or self._origin(self._dense)
        dense = with_random_weights_(skeleton(self._dense), device)
        if dense.dtype != self._model.dtype:  # engines may keep weights in float32 that were loaded in half precision
            nn.Module.to(dense, self._model.dtype)
        # In its own precision, as those who load it will have it, and as the dense model is measured.
        with self._compacted() as compactions, plain_forward(self._model):
            nn.Module.to(self._model, device)
            self.report = make_report(
                dense,
                self._model,
                self.structure,
                _together(compactions),
                self.costs,
                self.config.stage(self.trainer.run.stage),
                inputs,
                metrics or ({}, {}),
                replace(origin, **{"command": origin.command or command_line(), **self._said}),
                self.trainer.args.seed,
            )
        if metrics is None:
            self._fill_in_(self.evaluations.last_metrics())
        return self.report

    def _fill_in_(self, metrics: tuple[Metrics, Metrics]) -> None:
        """Put metrics that were not given into the report, in place."""
        assert self.report is not None
        dense, pruned = (replace(one, metrics=of) for one, of in zip((self.report.dense, self.report.pruned), metrics))
        self.report, self._filled_in = replace(self.report, dense=dense, pruned=pruned), metrics

    def _origin(self, dense: PreTrainedModel) -> Origin:
        """What can be known of it here."""
        config: Any = dense.config
        task = task_of(stock_class(dense).__name__, config.model_type)
        return Origin(base_model=hub_id(dense), task=task)

    def measured_if_possible(self) -> Report | None:
        """Measure where nobody has asked for it: what goes wrong there does not keep a model from being saved."""
        try:
            return self.measure()
        except torch.OutOfMemoryError:
            device = self.trainer.args.device
            logger.warning("Not measured: the models before and after do not fit %s together.", device)
        except Exception as error:
            logger.warning("Not measured: %s", first_line(error))
        return None

    # ---- Files ----

    @property
    def home(self) -> Path:
        """Where the run leaves its model."""
        return Path(str(self.trainer.args.output_dir))

    def save(self, path: Path, to_resume: bool = False) -> None:
        """Save the smaller model with its card and, once the training is over, its report.

        Args:
            path: directory of the model.
            to_resume: whether Trainer loads it again, by the names that tensors have in memory.
        """
        names = names_in_memory(self._model) if to_resume else nullcontext()
        with names, self.trainer.engine.gathered(self._model):
            if not self.trainer.args.should_save:
                return
            is_pruned = gate_bank(self._model) is not None or bool(self._compactions)
            if self.report is None and not self.trainer.is_in_train and is_pruned:
                self.measured_if_possible()
            elif self.report is not None and self._filled_in == (self.report.dense.metrics, self.report.pruned.metrics):
                self._fill_in_(self.evaluations.last_metrics())
            keeps = self.config.keep_adapter and not to_resume and self.adapters.are_kept(self._model)
            form = nullcontext() if to_resume else self.adapters.aside(self._model) if keeps else self._compacted()
            with replaced_directory(path) as directory:
                with form:
                    self.trainer.save_into(directory)
                    history = History.of(self.trainer.state.log_history)
                    complete(directory, path, self.report, self._card_fields, history, self.trainer.run.members)
                if keeps:
                    self.adapters.save(self._model, directory / ADAPTER, path)

    @property
    def _repository(self) -> str:
        """Where the model is uploaded to."""
        return self.trainer.args.hub_model_id or self.home.resolve().name

    def describe_(self, text: CardText) -> None:
        """Remember, in place, what cards say of this model from now on, and of its origin beside what is known."""
        self._card_fields, self._said = text.fields(self._repository), text.origin()
        if self.report is not None:
            self.report = replace(self.report, origin=replace(self.report.origin, **self._said))

    def push(
        self, commit_message: str | None, token: str | None, revision: str | None, private: bool | None
    ) -> CommitInfo | None:
        """Save the model and upload it; see `SparseTrainerMixin.push_to_hub`."""
        trainer, arguments = self.trainer, self.trainer.args
        trainer.callback_handler.on_push_begin(arguments, trainer.state, trainer.control)
        self.save(self.home)
        if not trainer.is_world_process_zero():
            return None
        return upload(
            self.home,
            self._repository,
            self._card_fields,
            arguments.hub_private_repo if private is None else private,
            token or self._hub_token,
            revision or arguments.hub_revision,
            commit_message or "End of training",
        )


def _together(compactions: Sequence[CompactionReport]) -> CompactionReport:
    """What compactions one after the other have done.

    Raises:
        SparsityError: there are none.
    """
    if not compactions:
        raise SparsityError("this model has no gates: nothing was pruned in this run")
    return functools.reduce(CompactionReport.then, compactions)
