"""What a `SparseTrainer` leaves: the smaller model, its report and its card, saved and uploaded."""

import copy
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_sparse.checkpoint.card import NO_FIELDS, CardFields
from hf_sparse.checkpoint.hub import upload
from hf_sparse.checkpoint.save_load import complete
from hf_sparse.checkpoint.tasks import task_of
from hf_sparse.compaction.compact import CompactionReport, compact, compact_alike_
from hf_sparse.config import SparsityConfig
from hf_sparse.costs.table import CostTable
from hf_sparse.engines.sharding import spread_
from hf_sparse.engines.surgery import plain_forward, skeleton, with_random_weights_
from hf_sparse.errors import SparsityError
from hf_sparse.gates.attach import current_plan, detach_gates, gate_bank, require_bank
from hf_sparse.gates.plan import PruningPlan
from hf_sparse.report.report import Metrics, Origin, Report, command_line, hub_id, make_report
from hf_sparse.runtime.files import replaced_directory
from hf_sparse.runtime.processes import is_first, once
from hf_sparse.structure.blocks import ModelStructure
from hf_sparse.structure.stock import stock_class
from hf_sparse.training.evaluating import EvaluationMixin
from hf_sparse.training.starting import StartingMixin

logger = logging.get_logger(__name__)


class ResultsMixin(EvaluationMixin, StartingMixin):
    """Adds to a Trainer whose model has gates that the smaller model is what it measures, saves and uploads."""

    structure: ModelStructure
    """What could be pruned in the model that the run began with."""
    costs: CostTable
    """What that costs."""
    report: Report | None = None
    """Of the run, once it is measured or set: what is saved and pushed then carries it."""

    _stage_config: SparsityConfig
    _filled_in: tuple[Metrics, Metrics] = ({}, {})
    """The metrics in `report`, unless they were given."""
    _card_fields: CardFields = NO_FIELDS
    _said: Mapping[str, Any] = MappingProxyType({})
    _hub_token: str | None = None
    _in_checkpoint = False

    def _prepare_hub(self) -> None:
        """Take the token out of the arguments, since checkpoints have those in them, and upload only at the end.

        On the way there are models with gates, which nobody else could load.

        Raises:
            SparsityError: a hub_strategy that asks for checkpoints on the Hub.
        """
        self._hub_token, self.args = self.args.hub_token, copy.copy(self.args)
        self.args.hub_token = None
        if self.args.push_to_hub and self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            strategy = HubStrategy(self.args.hub_strategy).value
            raise SparsityError(
                f"hub_strategy={strategy!r} would upload models with their gates, which nobody can load: take 'end'"
            )
        if self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            logger.warning(
                "hub_strategy='every_save' is taken for 'end': save_model() and push_to_hub() upload the model; "
                "checkpoints are kept here, as they may have gates, which nobody could load"
            )
        self.args.hub_strategy = HubStrategy.END

    def plan(self) -> PruningPlan:
        """What is kept now, in units of the model that the run began with."""
        plans = [report.plan for report in self._compactions]
        if gate_bank(self._model) is not None or not plans:
            plans.append(current_plan(self._model))
        return functools.reduce(PruningPlan.then, plans)

    def compact(self) -> CompactionReport:
        """Replace a model that still has gates by the smaller one it has become, in place, checked on a batch of data.

        Where its weights are in shards, all processes have to call this, and all have it whole afterwards.

        Returns:
            What was removed in the whole run, in units of the model that it began with.

        Raises:
            SparsityError: there never were gates, or the compact model would compute something else.
        """
        sharded, gated = self._is_in_shards, gate_bank(self._model) is not None
        with plain_forward(self._model):
            if sharded:
                self._leave_engine_()
                if gated:
                    self._compact_together()
                spread_(self._model, self.args.device)
            elif gated:
                self._compactions.append(compact(self._model, inputs=self._verification_batch()))
                nn.Module.to(self._model, self.args.device)  # transformers wraps `to` in a way that hides its type
        if sharded or gated:
            self.model_wrapped = self._model
            self.optimizer = self.lr_scheduler = None
        return _together(self._compactions)

    def _compact_together(self) -> None:
        """Make a model with gates smaller in place, on the first process; give it that form on the others.

        They are to get its weights from the first one.
        """
        batch, bank = self._verification_batch(), require_bank(self._model)
        done = once(lambda: compact(self._model, inputs=batch))
        if not is_first():
            detach_gates(self._model)
            compact_alike_(self._model, bank.whole, done, bank.structure.blocks)
        self._compactions.append(done)

    def _verification_batch(self, size: int | None = None) -> dict[str, Any]:
        """A batch of the evaluation data, else of the training data, as the loss hands it to the model, without labels.

        It is on the device of the run, and the same on all processes, of which none has to wait for another. Where the
        loss makes something else of batches, it is what the loss made of one in the first step of this process.

        Args:
            size: rows, of a batch of the data; as many as in evaluations by default.
        """
        if not self._takes_batches:
            return self._as_called({})
        dataset = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        loader = self.get_test_dataloader(cast(Any, dataset))
        rows = list(itertools.islice(iter(loader.dataset), size or self.args.eval_batch_size))
        return self._as_called(self._prepare_inputs(loader.collate_fn(rows)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the physically smaller model with its card, report.json and structure.png, measured where it is not yet.

        Checkpoints that Trainer resumes from keep model and gates. What is saved during a training has a report only
        if there is one. Trainer's pickled arguments are left out.
        """
        if _internal_call and gate_bank(self._model) is not None:
            with self._out_of_the_engine():
                super().save_model(output_dir, _internal_call)
            return
        path, home = Path(output_dir or str(self.args.output_dir)), Path(str(self.args.output_dir))
        pushing = self.args.push_to_hub and not _internal_call
        if not pushing or path.resolve() != home.resolve():
            self._save_result(path)
        if pushing:
            self.push_to_hub(commit_message="Model save")

    def _save_result(self, path: Path) -> None:
        """Save the smaller model with its card and, once the training is over, its report."""
        with self._whole():
            if not self.args.should_save:
                return
            if self.report is None and not self.is_in_train and (gate_bank(self._model) or self._compactions):
                self._measured_if_possible()
            elif self.report is not None and self._filled_in == (self.report.dense.metrics, self.report.pruned.metrics):
                self._fill_in(self._last_metrics())
            with self._compacted(), replaced_directory(path) as directory:
                self._save_into(directory)
                complete(directory, path, self.report, self._card_fields)

    def measure(
        self,
        inputs: Mapping[str, Tensor] | None = None,
        metrics: tuple[Metrics, Metrics] | None = None,
        origin: Origin | None = None,
    ) -> Report:
        """Measure the model before and after pruning, and keep that as `report`; gates, if any, stay on the model.

        One process is enough, unless its weights are in shards: then all have to call this, or `compact()` before.

        Args:
            inputs: a batch to measure both on; of the evaluation data by default.
            metrics: of the model before and after, by data split; by default those of the last evaluation, and those of
                the dense model where it was evaluated: before the training, or as the teacher.
            origin: what it was made from; by default what can be known here.

        Raises:
            SparsityError: there never were gates, or the compact model would compute something else.
        """
        batch = inputs if inputs is not None else self._verification_batch()
        if not self._is_in_shards:
            return self._measure(batch, metrics, origin)
        with self._whole():
            self.report = once(lambda: self._measure(batch, metrics, origin))
        return self.report

    def _measure(
        self, inputs: Mapping[str, Tensor], metrics: tuple[Metrics, Metrics] | None, origin: Origin | None
    ) -> Report:
        dense = with_random_weights_(skeleton(self._dense), self.args.device)
        if dense.dtype != self._model.dtype:  # engines may keep weights in float32 that were loaded in half precision
            nn.Module.to(dense, self._model.dtype)
        # In its own precision, as those who load it will have it, and as the dense model is measured.
        with self._compacted() as compactions, plain_forward(self._model):
            nn.Module.to(self._model, self.args.device)
            self.report = make_report(
                dense,
                self._model,
                self.structure,
                _together(compactions),
                self.costs,
                self._stage_config,
                inputs,
                metrics or ({}, {}),
                replace(origin or self._origin(dense), **self._said),
                self.args.seed,
            )
        if metrics is None:
            self._fill_in(self._last_metrics())
        return self.report

    def _fill_in(self, metrics: tuple[Metrics, Metrics]) -> None:
        """Put metrics that were not given into the report."""
        assert self.report is not None
        dense, pruned = (replace(one, metrics=of) for one, of in zip((self.report.dense, self.report.pruned), metrics))
        self.report, self._filled_in = replace(self.report, dense=dense, pruned=pruned), metrics

    def _origin(self, dense: PreTrainedModel) -> Origin:
        """What can be known of it here."""
        config: Any = dense.config
        task = task_of(stock_class(dense).__name__, config.model_type)
        return Origin(base_model=hub_id(dense), task=task, command=command_line())

    def _measured_if_possible(self) -> Report | None:
        """`measure()` where nobody has asked for it: what goes wrong there does not keep a model from being saved."""
        try:
            return self.measure()
        except torch.OutOfMemoryError:
            logger.warning("Not measured: the models before and after do not fit %s together.", self.args.device)
        except Exception as error:
            logger.warning("Not measured: %s", str(error).partition("\n")[0] or repr(error))
        return None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's; TRL's also asks for a card each time, beside which there is no result yet."""
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._in_checkpoint = False

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Save the physically smaller model to `output_dir`, with a card that says this beside what is measured.

        Args:
            language: of the texts.
            license: of the weights.
            tags: beside hf_sparse's own.
            model_name: what the card calls it.
            finetuned_from: the model that was pruned, as an id on the Hub.
            tasks: what it does, the first of them, as the Hub calls it.
            dataset_tags: the first of the data sets, as an id on the Hub.
            dataset: what it was trained on, for people.
            dataset_args: which part of that.
            dataset_name: what TRL calls `dataset_tags`.
        """
        if self._in_checkpoint:
            return
        self._describe(
            CardFields(self._repo_id, model_name, language, license, tuple(_listed(tags))),
            _said_of_origin(finetuned_from, tasks, dataset_tags or dataset_name, dataset, dataset_args),
        )
        self._save_result(Path(str(self.args.output_dir)))

    @property
    def _repo_id(self) -> str:
        """Where it is uploaded to."""
        return self.args.hub_model_id or Path(str(self.args.output_dir)).resolve().name

    def _describe(self, fields: CardFields, said: Mapping[str, Any]) -> None:
        """Remember what cards say of this model from now on, and of its origin beside what is known of it."""
        self._card_fields, self._said = fields, said
        if self.report is not None:
            self.report = replace(self.report, origin=replace(self.report.origin, **self._said))

    # Trainer takes and relays any keyword here; these are the ones that have a meaning.
    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        model_name: str | None = None,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> CommitInfo | None:
        """Upload the physically smaller model with its card to `hub_model_id`; measured, where it is not yet.

        Args:
            commit_message: of the commit.
            blocking: must be True: only then can a failure be told.
            token: to write with; `hub_token`, or that of `hf auth login`, by default.
            revision: branch to write to; `hub_revision` by default.
            private: whether a new repository is private; `hub_private_repo` by default.
            model_name: what the card calls it.
            language: of the texts, for the card.
            license: of the weights, for the card.
            tags: for the card.
            finetuned_from, tasks, dataset_tags, dataset, dataset_args, dataset_name: as in `create_model_card`.

        Returns:
            The commit; None on all processes but the first.

        Raises:
            SparsityError: the upload failed; the model is in `output_dir`, and the message says how to go on.
        """
        if not blocking:
            raise SparsityError("blocking=False would hide a failed upload: push in the foreground")
        self._describe(
            CardFields(self._repo_id, model_name, language, license, tuple(_listed(tags))),
            _said_of_origin(finetuned_from, tasks, dataset_tags or dataset_name, dataset, dataset_args),
        )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._save_result(Path(str(self.args.output_dir)))
        if not self.is_world_process_zero():
            return None
        return upload(
            Path(str(self.args.output_dir)),
            self._repo_id,
            self._card_fields,
            self.args.hub_private_repo if private is None else private,
            token or self._hub_token,
            revision or self.args.hub_revision,
            commit_message or "End of training",
        )

    @contextmanager
    def _compacted(self) -> Iterator[list[CompactionReport]]:
        """Inside this context the smaller model is in the gated one's place; gives all compactions that led to it."""
        if gate_bank(self._model) is None:
            yield self._compactions
            return
        with self._with_a_copy():
            with plain_forward(self._model):
                last = compact(self._model, inputs=self._verification_batch())
            yield [*self._compactions, last]


def _said_of_origin(
    base_model: str | None,
    tasks: str | list[str] | None,
    dataset_tags: str | list[str] | None,
    dataset: str | list[str] | None,
    dataset_args: str | list[str] | None,
) -> dict[str, str]:
    """What was said of a model's `Origin`, by the names of its fields."""
    said = {
        "base_model": base_model,
        "task": next(iter(_listed(tasks)), None),
        "dataset": ", ".join([*_listed(dataset), *_listed(dataset_args)]),
        "dataset_id": next(iter(_listed(dataset_tags)), None),
    }
    return {name: value for name, value in said.items() if value}


def _listed(given: str | list[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else given or []


def _together(compactions: Sequence[CompactionReport]) -> CompactionReport:
    """What compactions one after the other have done.

    Raises:
        SparsityError: there are none.
    """
    if not compactions:
        raise SparsityError("this model has no gates: nothing was pruned in this run")
    return functools.reduce(CompactionReport.then, compactions)
