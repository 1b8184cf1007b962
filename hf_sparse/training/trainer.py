"""`SparseTrainer`: a thin `Trainer` that learns which heads and neurons to remove while it fine-tunes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer

from hf_sparse.compaction.compact import CompactionReport
from hf_sparse.config import SparsityConfig
from hf_sparse.costs.table import CostTable
from hf_sparse.engines.tensors import META
from hf_sparse.errors import SparsityError
from hf_sparse.gates.attach import gate_bank, require_bank
from hf_sparse.gates.plan import PruningPlan
from hf_sparse.gates.units import GateBank
from hf_sparse.report.report import Metrics, Origin, Report
from hf_sparse.structure.blocks import ModelStructure
from hf_sparse.structure.prunable import require_prunable
from hf_sparse.training.adapters import Adapters, take_adapters_
from hf_sparse.training.base import BaseTrainer
from hf_sparse.training.calls import LossCalls
from hf_sparse.training.card_text import CardText, Words
from hf_sparse.training.progress import show_density_
from hf_sparse.training.results import Results
from hf_sparse.training.search import Search
from hf_sparse.training.stages import Stages


class SparseTrainerMixin(BaseTrainer):
    """What `SparseTrainer` adds to `Trainer`, for any other subclass of it: `class Mine(SparseTrainerMixin, Base)`.

    The constructor attaches gates to the model in place. During the search for the structure the learning rate stays
    constant after its warm-up. Once it is found, the model is made smaller in place, and the scheduler that was asked
    for runs over the recovery of what is left. With several targets, one such stage follows another, and each leaves a
    whole model in `output_dir`, beside a table and a picture of them all.

    A model of peft is taken out of its wrapper: `trainer.model` is the one inside, with its adapters. Gates and
    adapters train, all other weights stay frozen. When the model gets smaller the adapters are merged into it, and new
    ones train beside what is left; what is saved is plain, unless `SparsityConfig.keep_adapter` asks for both.

    Args:
        sparsity: what to remove; `trainer.sparsity` has `group` filled in, which follows from the model.
        teacher: a dense model with the same outputs, whose logits and hidden states the pruned model is also trained
            on; it is put in evaluation mode and frozen.

    Raises:
        SparsityError: the model is not one of transformers with plain weights or has nothing to prune, the teacher has
            another number of labels, or an engine is in use that would not give exact results.
    """

    results: Results | None = None  # until the constructor of Trainer has run
    stages: Stages

    # The arguments are those of whichever Trainer this is mixed into, so they cannot be spelt out here.
    def __init__(
        self, *args: Any, sparsity: SparsityConfig, teacher: PreTrainedModel | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(sparsity, SparsityConfig):
            raise SparsityError(f"sparsity is {sparsity!r}: give a SparsityConfig, such as SparsityConfig(target=0.5)")
        self.sparsity = sparsity
        super().__init__(*args, **kwargs)
        show_density_(self)
        adapters = take_adapters_(self)
        model = self.bare_model
        with adapters.aside(model):
            require_prunable(model)
        self.calls = LossCalls(self)
        results = Results(self, sparsity, self.calls, adapters)
        self.stages = Stages(self, sparsity, self.calls, results, adapters)
        self.search = Search(self, sparsity, self.calls, self.stages)
        self.engine.take_(model)  # as from_pretrained leaves it; to find heads, the main process has to have it whole
        self._place_to_measure_(model)
        bank = gate_bank(model) or self.stages.attach_gates(model)
        if sparsity.group is None:  # all parts have to know what follows from the model
            self.sparsity = sparsity = replace(sparsity, group=bank.config.group)
            results.config = self.stages.config = self.search.config = sparsity
        if bank.config != sparsity.stage(0):
            raise SparsityError("the model has gates of another SparsityConfig: call detach_gates(model) first")
        results.begin_with_(model, bank)
        if teacher is not None:
            self.learn_from_(teacher, sparsity)
        self.results = results

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from `model_init`; with gates attached, unless the constructor, which does that, is at work."""
        model, _ = Adapters.of(super().call_model_init(trial))
        if self.engine.is_in_shards(model):
            raise SparsityError("ZeRO stage 3 shards what model_init loads: give a model instead")
        if self.results is not None:
            self.calls.is_probed = False
            self._place_to_measure_(model)
            self.results.begin_with_(model, self.stages.attach_gates(model))
        return model

    def _place_to_measure_(self, model: PreTrainedModel) -> None:
        """Move a model, in place, to the device that costs are taken on; Trainer may do so only later.

        One that is to be sharded need not fit that, so it is counted where it is.
        """
        cost = self.sparsity.cost
        wanted = cost == "latency" or (cost == "macs" and not self.engine.shards_weights)
        if wanted and model.device != META:
            nn.Module.to(model, self.args.device)

    # ---- What the run knows ----

    @property
    def _results(self) -> Results:
        assert self.results is not None
        return self.results

    @property
    def bank(self) -> GateBank:
        """The gates of the model that is trained.

        Raises:
            SparsityError: the model has none (any more).
        """
        return require_bank(self.bare_model)

    @property
    def structure(self) -> ModelStructure:
        """What could be pruned in the model that the run began with."""
        return self._results.structure

    @property
    def costs(self) -> CostTable:
        """What the prunable units of that model cost."""
        return self._results.costs

    @property
    def report(self) -> Report | None:
        """The report of the run, once it is measured or set: what is saved and pushed then carries it."""
        return self._results.report

    @report.setter
    def report(self, report: Report | None) -> None:
        self._results.report = report

    def plan(self) -> PruningPlan:
        """What is kept now, in units of the model that the run began with."""
        return self._results.plan()

    # ---- What comes of it ----

    def compact(self) -> CompactionReport:
        """Replace a model that still has gates by the smaller one it has become, in place, checked on a batch of data.

        Where its weights are in shards, all processes have to call this, and all have it whole afterwards.

        Returns:
            What was removed in the whole run, in units of the model that it began with.

        Raises:
            SparsityError: there never were gates, or the compact model would compute something else.
        """
        return self._results.compact_()

    # The arguments are those of whichever Trainer this is mixed into, of which Seq2SeqTrainer takes more.
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's evaluation; the first of the evaluation data also evaluates a teacher that is the dense model."""
        found = super().evaluate(*args, **kwargs)
        self._results.evaluations.remember_(found)
        if (args[0] if args else kwargs.get("eval_dataset")) is None:
            self._results.evaluations.add_(found)
        return found

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
            origin: what it was made from; by default what can be known here. A command that is None is the one that
                this process was started with.

        Raises:
            SparsityError: there never were gates, or the compact model would compute something else.
        """
        return self._results.measure(inputs, metrics, origin)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the physically smaller model with its card, report.json and structure.png, measured where it is not yet.

        Checkpoints that Trainer resumes from keep model and gates. What is saved during a training has a report only
        if there is one. Trainer's pickled arguments are left out.
        """
        if _internal_call and gate_bank(self.bare_model) is not None:
            super().save_model(output_dir, _internal_call)
            return
        path, home = Path(output_dir or str(self.args.output_dir)), self._results.home
        pushing = self.args.push_to_hub and not _internal_call
        if not pushing or path.resolve() != home.resolve():
            self._results.save(path, to_resume=_internal_call)
        if _internal_call:
            self.write_run(path)
        if pushing:
            self.push_to_hub(commit_message="Model save")

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: Words = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Words = None,
        dataset_tags: Words = None,
        dataset: Words = None,
        dataset_args: Words = None,
        dataset_name: str | None = None,
    ) -> None:
        """Save the physically smaller model to `output_dir`, with a card that has this beside what is measured.

        The arguments are described in `CardText`.
        """
        if self.is_saving_checkpoint:  # TRL asks for a card each time, beside which there is no result yet
            return
        text = CardText(
            language,
            license,
            tags,
            model_name,
            finetuned_from,
            tasks,
            dataset_tags,
            dataset,
            dataset_args,
            dataset_name,
        )
        self._results.describe_(text)
        self._results.save(self._results.home)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **text: Any,
    ) -> CommitInfo | None:
        """Upload the physically smaller model with its card to `hub_model_id`; measured, where it is not yet.

        Args:
            commit_message: of the commit.
            blocking: must be True: only then can a failure be told.
            token: to write with; `hub_token`, or that of `hf auth login`, by default.
            revision: branch to write to; `hub_revision` by default.
            private: whether a new repository is private; `hub_private_repo` by default.
            text: for the card, as in `CardText`.

        Returns:
            The commit; None on all processes but the main one.

        Raises:
            SparsityError: the upload failed; the model is in `output_dir`, and the message says how to go on.
        """
        if not blocking:
            raise SparsityError("blocking=False would hide a failed upload: push in the foreground")
        self._results.describe_(CardText(**text))
        return self._results.push(commit_message, token, revision, private)


class SparseTrainer(SparseTrainerMixin, Trainer):
    """`Trainer` that prunes while it fine-tunes; see `SparseTrainerMixin` for what it adds."""


class SparseSeq2SeqTrainer(SparseTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` that prunes while it fine-tunes; see `SparseTrainerMixin` for what it adds."""
