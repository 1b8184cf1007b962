"""The stages of a run: search, shrink, recover, and on to the next target; and what a checkpoint needs to go on.

Each stage finds the structure for its target, makes the model physically smaller on the spot, so that its recovery
trains only what is left, and leaves a whole model behind where there are several targets.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_sparse.card import REPORT
from hf_sparse.compaction import CompactionReport, compact
from hf_sparse.config import SparsityConfig
from hf_sparse.controller import Schedule
from hf_sparse.distillation import hidden_distances, layer_pairs
from hf_sparse.distilling import DistillationMixin
from hf_sparse.errors import SparsityError
from hf_sparse.family import write_family
from hf_sparse.patching import attach_gates, detach_gates, gate_bank
from hf_sparse.plan import PruningPlan
from hf_sparse.refit import refit_, refittable
from hf_sparse.report import Report
from hf_sparse.results import ResultsMixin
from hf_sparse.sensitivity import sensitivities
from hf_sparse.surgery import plain_forward, surgery, unchanged_random_state
from hf_sparse.teacher import layer_states

logger = logging.get_logger(__name__)

SENSITIVITY_ROWS = 128
"""Rows that sensitivities are estimated on."""

REFIT_ROWS = 1024
"""Rows that output projections are refitted on."""

STATE = "sparsity_state.json"
"""Beside a checkpoint's weights: which stage it is in, and what earlier ones have removed."""


class StagesMixin(ResultsMixin, DistillationMixin):
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
            self._shrink()
        if self.state.global_step == self._schedule.end and self._stage < len(self._schedules) - 1:
            if gate_bank(self._model) is not None:
                logger.warning("The structure for target %s was not found in time.", self._stage_config.target)
                self._shrink()
            self._finish_stage()
            self._stage += 1
            with surgery(self._model, self.model_wrapped, self.optimizer):
                attach_gates(self._model, self._stage_config, self._verification_batch(), self.costs)
            self._train_gates()
            self._start_gates()

    def _start_gates(self) -> None:
        """Let importances start from sensitivities on some rows of the training data; gates stay at 1."""
        bank = gate_bank(self._model)
        if bank is None or self.sparsity.warm_start == 0:
            return
        training, _ = self._model.training, self._model.eval()
        with plain_forward(self._model), unchanged_random_state(self.args.device):
            found = sensitivities(self._model, bank.structure, self._some_rows(SENSITIVITY_ROWS, 1), self._row_loss)
        self._model.train(training)
        bank.start_from_(broadcast(found), self.sparsity.warm_start)

    def _some_rows(self, count: int, size: int) -> Iterator[dict[str, Any]]:
        """Batches of some rows of the training data; the same on all processes, where the data set can be indexed."""
        loader = self.get_train_dataloader()
        rows: Any = loader.dataset
        if has_length(rows):
            chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
            rows = torch.utils.data.Subset(loader.dataset, chosen.tolist())
        chosen_rows = itertools.islice(iter(rows), count)
        while batch := list(itertools.islice(chosen_rows, size)):
            yield self._prepare_inputs(loader.collate_fn(batch))

    def _row_loss(self, inputs: Mapping[str, Any]) -> Tensor:
        return self.compute_loss(self._model, dict(inputs))

    def _train_gates(self) -> None:
        """Let the optimizer train the gates that the model has now; its last group is theirs."""
        bank = gate_bank(self._model)
        assert self.optimizer is not None
        self.optimizer.param_groups[-1]["params"] = list(bank.parameters()) if bank is not None else []

    def _shrink(self) -> None:
        """Make the model physically smaller in place, and go on training what is left."""
        with surgery(self._model, self.model_wrapped, self.optimizer):
            self._compactions.append(compact(self._model, inputs=self._verification_batch()))
            self._refit()
            self._match_layers()

    def _refit(self) -> None:
        """Fit the output projections that are left to the teacher's, in place, where it has the same ones."""
        if self.teacher is None or not self.sparsity.refit:
            return
        outputs = [block.output for block in self.structure.blocks]
        names = refittable(self._model, self.teacher.model, outputs)
        batches = [
            {name: value for name, value in batch.items() if name not in self.label_names}
            for batch in self._some_rows(REFIT_ROWS, self.args.eval_batch_size)
        ]
        training, _ = self._model.training, self._model.eval()
        refit_(self._model, self.teacher.model, names, batches)
        self._model.train(training)

    def _member_path(self, target: float) -> Path:
        return Path(str(self.args.output_dir)) / f"removed-{target:g}"

    def _finish_stage(self) -> None:
        """Evaluate, measure and save the model of this stage, where there are several."""
        if self.eval_dataset is not None:
            self.evaluate()
        path = self._member_path(self._stage_config.target)
        if self.is_world_process_zero():
            self._members[path.name] = self.measure()
        self._save_result(path)
        self.report = None
        if self.args.should_save:
            write_family(Path(str(self.args.output_dir)), self._members)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)
        if len(self._schedules) > 1 and self._in_last_form:
            self._finish_stage()
        return output

    # ---- The teacher's layers ----

    def _match_layers(self) -> None:
        """Find out which layers of the student learn from which of the teacher, on a batch of the evaluation data.

        Each from its own, while there are as many; else those that are left, each from one that it is close to.
        """
        if self.teacher is None or not self.teacher.hidden:
            return
        batch = self._verification_batch()
        training, _ = self._model.training, self._model.eval()
        with torch.no_grad():
            student = layer_states(self._model(**batch, output_hidden_states=True, return_dict=True))
            teacher = self.teacher(batch).hidden_states
        self._model.train(training)
        left = self._layers_left(len(student))
        if [state.shape for state in student] == [state.shape for state in teacher] and len(left) == len(student):
            self._layer_map = tuple((layer, layer) for layer in left)
        elif len({state.shape for state in (*student, *teacher)}) > 1 or not teacher:
            logger.warning("Hidden states of model and teacher differ in shape: it learns from the logits alone.")
            self.teacher.hidden = False
        else:
            mask = batch.get("attention_mask")
            distances = hidden_distances([student[layer] for layer in left], teacher, mask)
            pairs = layer_pairs(self.accelerator.reduce(distances, "mean").tolist())
            self._layer_map = tuple((left[student_layer], teacher_layer) for student_layer, teacher_layer in pairs)

    def _layers_left(self, layers: int) -> list[int]:
        """The layers, counted through all stacks, of which a sublayer is left."""
        kept = self.plan().kept
        left: dict[tuple[str, int], bool] = {}
        for block in self.structure.blocks:
            place = block.name.split(f".{block.layer}.")[0], block.layer
            left[place] = left.get(place, False) or bool(kept.get(block.name, (0,)))
        if len(left) != layers:  # layers that nothing can be removed from, or that were found in another order
            return list(range(layers))
        return [index for index, some in enumerate(left.values()) if some] or [layers - 1]

    # ---- Checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the physically smaller model; a checkpoint to resume from also gets the state of its stage."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save and self._schedules:
            state = {
                "stage": self._stage,
                "searching": gate_bank(self._model) is not None,
                "compactions": [
                    {**vars(report), "plan": json.loads(report.plan.to_json())} for report in self._compactions
                ],
                "layer_map": self._layer_map,
            }
            (Path(str(output_dir)) / STATE).write_text(json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Give the model the form it had at a checkpoint, in place, then load the weights."""
        path = Path(resume_from_checkpoint) / STATE
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
        super()._load_from_checkpoint(resume_from_checkpoint, model)
