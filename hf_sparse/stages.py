"""The stages of a run: search, shrink, recover, and on to the next target; and what a checkpoint needs to go on.

Each stage finds the structure for its target, makes the model physically smaller on the spot, so that its recovery
trains only what is left, and leaves a whole model behind where there are several targets.
"""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from hf_sparse.card import REPORT
from hf_sparse.compaction import CompactionReport, compact
from hf_sparse.config import SparsityConfig
from hf_sparse.controller import Schedule
from hf_sparse.directories import write_whole
from hf_sparse.errors import SparsityError
from hf_sparse.estimates import EstimatesMixin
from hf_sparse.family import write_family
from hf_sparse.finite import FiniteLossMixin
from hf_sparse.patching import attach_gates, detach_gates, gate_bank
from hf_sparse.plan import PruningPlan
from hf_sparse.report import Report
from hf_sparse.resuming import PROCESSES, STATE, ResumingMixin
from hf_sparse.sharding import average_gradients_
from hf_sparse.surgery import plain_forward, surgery

logger = logging.get_logger(__name__)


class StagesMixin(EstimatesMixin, ResumingMixin, FiniteLossMixin):
    """Adds to a Trainer that its model shrinks while it is trained, target by target."""

    _schedules: tuple[Schedule, ...] = ()
    _stage: int = 0
    _members: dict[str, Report]

    @property
    def _schedule(self) -> Schedule:
        return self._schedules[self._stage]

    @property
    def _stage_config(self) -> SparsityConfig:  # type: ignore[override]
        return self.sparsity.stage(self._stage)

    @property
    def _in_last_form(self) -> bool:
        """Whether the model has the structure that the run ends with."""
        return gate_bank(self._model) is None and self._stage == len(self.sparsity.descent) - 1

    def _end_step(self, structure_found: bool) -> None:
        """Shrink the model in place once its structure is found; at the end of a stage, go on to the next."""
        if structure_found:
            self._require_finite()  # else it would be the shrinking that looks wrong
            self._shrink()
        if self.state.global_step == self._schedule.end and self._stage < len(self._schedules) - 1:
            if gate_bank(self._model) is not None:
                logger.warning("The structure for target %s was not found in time.", self._stage_config.target)
                self._shrink()
            self._finish_stage()
            self._stage += 1
            with self._surgery():
                attach_gates(self._model, self._stage_config, self._verification_batch(), self.costs)
                self._start_gates()
            self._train_gates()

    def _surgery(self) -> AbstractContextManager[None]:
        return surgery(self._model, self.model_wrapped, self.optimizer, self.accelerator)

    def _train_gates(self) -> None:
        """Let the optimizer train the gates that the model has now; its last group is theirs."""
        bank = gate_bank(self._model)
        assert self.optimizer is not None
        self.optimizer.param_groups[-1]["params"] = list(bank.parameters()) if bank is not None else []
        if bank is not None and self.is_fsdp_enabled:
            average_gradients_(bank, self.accelerator)

    def _shrink(self) -> None:
        """Make the model physically smaller in place, and go on training what is left."""
        with self._surgery():
            self._compactions.append(compact(self._model, inputs=self._verification_batch()))
            self._refit()
            self._match_layers()

    def _member_path(self, target: float) -> Path:
        return Path(str(self.args.output_dir)) / f"removed-{target:g}"

    def _finish_stage(self) -> None:
        """Evaluate, measure and save the model of this stage, where there are several."""
        if self.eval_dataset is not None:
            self.evaluate()
        path = self._member_path(self._stage_config.target)
        with self._whole():
            if self.is_world_process_zero():
                self._members[path.name] = self.measure()
            self._save_result(path)
        self.report = None
        if self.args.should_save:
            write_family(Path(str(self.args.output_dir)), self._members)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)
        if len(self._schedules) > 1 and (self._in_last_form or self.state.global_step == self._schedules[-1].end):
            self.compact()  # changes nothing where the structure was found in time
            self._finish_stage()
        return output

    # ---- Checkpoints ----

    def _forget_scales(self) -> None:
        """FSDP reads parameters as attributes, when it starts and when it saves: shards, which have no scale."""
        bank = gate_bank(self._model)
        if bank is not None:
            bank.forget_scales_()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the physically smaller model; a checkpoint to resume from also gets the state of its stage."""
        self._forget_scales()
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save and self._schedules:
            state = {
                "stage": self._stage,
                PROCESSES: self.args.world_size,
                "searching": gate_bank(self._model) is not None,
                "compactions": [
                    {**vars(report), "plan": json.loads(report.plan.to_json())} for report in self._compactions
                ],
                "layer_map": self._layer_map,
            }
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)  # shards are written into it later
            write_whole(Path(str(output_dir)) / STATE, json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Give the model the form it had at a checkpoint, in place, then load the weights."""
        if not self.is_fsdp_enabled:
            self._take_form_of_(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.is_fsdp_enabled and resume_from_checkpoint is not None:  # it loads weights once they are sharded
            self._take_form_of_(Path(resume_from_checkpoint))
        self._forget_scales()
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

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
                )
                for entry in state["compactions"]
            ]
            stage, searching, pairs = int(state["stage"]), bool(state["searching"]), state["layer_map"]
            self._layer_map = None if pairs is None else tuple((int(i), int(j)) for i, j in pairs)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SparsityError(f"{path} does not say which stage this checkpoint is in ({error!r})") from None
        if not 0 <= stage < len(self.sparsity.descent):
            raise SparsityError(f"{path} is in stage {stage}, of which this run has {len(self.sparsity.descent)}")
        done = [report.plan for report in self._compactions]
        if done != [report.plan for report in reports[: len(done)]]:
            raise SparsityError(f"the model is smaller than it was at {path.parent}: resume with a new trainer")
        batch = self._verification_batch()
        with plain_forward(self._model):
            if gate_bank(self._model) is not None and (reports[len(done) :] or not searching):
                detach_gates(self._model)
            for report in reports[len(done) :]:
                compact(self._model, report.plan, batch)
            self._compactions, self._stage = reports, stage
            finished = [self._member_path(target) for target in self.sparsity.descent[:stage]]
            self._members = {path.name: Report.read(path / REPORT) for path in finished if (path / REPORT).is_file()}
            if searching and gate_bank(self._model) is None:
                attach_gates(self._model, self._stage_config, batch, self.costs)
