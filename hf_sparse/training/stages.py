"""The stages of a run: search, shrink, recover, and on to the next target; and what a checkpoint needs to go on.

Each stage finds the structure for its target, makes the model physically smaller on the spot, so that its recovery
trains only what is left, and leaves a whole model behind where there are several targets.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse.checkpoint.card import REPORT
from hf_sparse.compaction.compact import CompactionReport, compact_alike_
from hf_sparse.config import SparsityConfig
from hf_sparse.costs.table import CostTable
from hf_sparse.engines.surgery import plain_forward, trains
from hf_sparse.errors import SparsityError, UnknownInputsError
from hf_sparse.gates.attach import attach_gates, detach_gates, gate_bank
from hf_sparse.gates.plan import PruningPlan
from hf_sparse.gates.units import GateBank
from hf_sparse.report.family import write_family
from hf_sparse.report.report import Report
from hf_sparse.runtime.processes import once
from hf_sparse.structure.blocks import ModelStructure
from hf_sparse.structure.dependencies import FORWARD_ERRORS
from hf_sparse.structure.discovery import discover
from hf_sparse.structure.example_inputs import undisturbed
from hf_sparse.training.estimates import EstimatesMixin
from hf_sparse.training.resume import STATE

logger = logging.get_logger(__name__)


class StagesMixin(EstimatesMixin):
    """Adds to a Trainer that its model shrinks while it is trained, target by target."""

    _members: dict[str, Report]

    @property
    def _stage_config(self) -> SparsityConfig:  # type: ignore[override]
        return self.sparsity.stage(self._stage)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """As above; a report, and metrics, that were there are of a model that is trained on from here."""
        self.report, self._evaluated = None, (0, {})
        return super().create_scheduler(num_training_steps, optimizer)

    def _record_call(self, inputs: Mapping[str, Any]) -> None:
        """Remember what the loss calls the model with, and find out on such a batch which layers learn from which."""
        super()._record_call(inputs)
        if self._layer_map is None:
            self._match_layers()

    def _end_step(self, structure_found: bool) -> None:
        """Shrink the model in place once its structure is found; at the end of a stage, go on to the next."""
        if structure_found:
            self._require_finite()  # else it would be the shrinking that looks wrong
            self._shrink()
        recovered = self.state.global_step >= self._schedule.end or (structure_found and not trains(self._model))
        if recovered and self._stage < len(self._schedules) - 1:
            self._require_finite()
            if gate_bank(self._model) is not None:
                logger.warning("The structure for target %s was not found in time.", self._stage_config.target)
                self._shrink()
            self._finish_stage()
            self._stage += 1
            with self._surgery():
                self._attach_gates(self._model, self.costs)
            self._train_gates()

    def _discovered(self, model: PreTrainedModel) -> ModelStructure:
        """What can be pruned in a model, found by a batch of the data if no other input can be made up."""
        try:
            return once(lambda: discover(model))
        except UnknownInputsError:
            if not self._has_data:
                raise
            batch = self._verification_batch()
            return once(lambda: discover(model, batch))

    def _attach_gates(self, model: PreTrainedModel, costs: CostTable | None = None) -> GateBank:
        """Put gates on a model, in place."""
        with plain_forward(model):
            structure = self._discovered(model)
            inputs = self._cost_batch(model) if costs is None else None
            return attach_gates(model, self._stage_config, inputs, costs, structure)

    @property
    def _has_data(self) -> bool:
        return self.eval_dataset is not None or self.train_dataset is not None

    def _cost_batch(self, model: PreTrainedModel) -> dict[str, Any] | None:
        """A batch of the data to count or time costs on; None to do so on one that is made up."""
        if self.sparsity.cost == "params" or not self._has_data:
            return None
        batch = self._verification_batch(self.sparsity.cost_batch_size)

        def runs() -> bool:
            with undisturbed(model), suppress(*FORWARD_ERRORS):
                model(**batch)
                return True
            return False

        if once(runs):
            return batch
        logger.warning("The model cannot be run on a batch of the data alone: costs are those of a made-up batch.")
        return None

    def _shrink(self) -> None:
        """Make the model physically smaller in place, and go on training what is left."""
        with self._surgery():
            self._compact_together()
            self._refit()
        self._match_layers()

    def _member_path(self, target: float) -> Path:
        """Where the model of a stage goes; trials of a hyperparameter search have a directory each."""
        trial = None if self.hp_search_backend is None else self._trial
        return Path(self._get_output_dir(trial)) / f"removed-{target:g}"

    def _finish_stage(self) -> None:
        """Evaluate, measure and save the model of this stage, where there are several."""
        if self.eval_dataset is not None:
            due = self.control.should_log, self.control.should_evaluate
            self.evaluate()
            self.control.should_log, self.control.should_evaluate = due
        path = self._member_path(self._stage_config.target)
        with self._whole():
            report = self._measured_if_possible() if self.is_world_process_zero() else None
            if report is not None:
                self._members[path.name] = report
            self._save_result(path)
        self.report = None
        if self.args.should_save and self._members:
            write_family(path.parent, self._members)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)
        if len(self._schedules) > 1 and (self._in_last_form or self.state.global_step == self._schedules[-1].end):
            if gate_bank(self._model) is not None:  # the structure was not found in time
                self.compact()
            self._finish_stage()
        return output

    # ---- Checkpoints ----

    def _state(self) -> dict[str, Any]:
        return {
            "stage": self._stage,
            "searching": gate_bank(self._model) is not None,
            "gated": list(self.costs.blocks),
            "compactions": [
                {**vars(report), "plan": json.loads(report.plan.to_json())} for report in self._compactions
            ],
            "layer_map": self._layer_map,
        }

    def _take_form_of_(self, checkpoint: Path) -> None:
        """Give the model the form it had at a checkpoint, in place: its gates and sizes, not its weights."""
        path = checkpoint / STATE
        try:
            state = json.loads(path.read_text())
            reports = [
                CompactionReport(
                    PruningPlan.from_json(json.dumps(entry["plan"])),
                    float(entry["max_abs_diff"]),
                    int(entry["parameters_before"]),
                    int(entry["parameters_after"]),
                    tuple(entry["removed"]),
                    tuple(entry["identities"]),
                    bool(entry["stock"]),
                )
                for entry in state["compactions"]
            ]
            stage, searching, pairs = int(state["stage"]), bool(state["searching"]), state["layer_map"]
            self._layer_map = None if pairs is None else tuple((int(i), int(j)) for i, j in pairs)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SparsityError(f"{path} does not say which stage this checkpoint is in ({error!r})") from None
        if not 0 <= stage < len(self.sparsity.descent):
            raise SparsityError(f"{path} is in stage {stage}, of which this run has {len(self.sparsity.descent)}")
        if state.get("gated", gated := list(self.costs.blocks)) != gated:
            raise SparsityError(f"{path.parent} is of a run with gates on other blocks: freeze the same ones as then")
        done = [report.plan for report in self._compactions]
        if done != [report.plan for report in reports[: len(done)]]:
            raise SparsityError(f"the model is smaller than it was at {path.parent}: resume with a new trainer")
        with plain_forward(self._model):
            if gate_bank(self._model) is not None and (reports[len(done) :] or not searching):
                detach_gates(self._model)
            for report in reports[len(done) :]:  # weights are loaded afterwards
                compact_alike_(self._model, self._discovered(self._model), report)
            self._compactions, self._stage = reports, stage
            finished = [self._member_path(target) for target in self.sparsity.descent[:stage]]
            self._members = {path.name: Report.read(path / REPORT) for path in finished if (path / REPORT).is_file()}
            if searching and gate_bank(self._model) is None:
                self._attach_gates(self._model, self.costs)
