"""The stages of a run: search, shrink, recover, and on to the next target.

Each stage finds the structure for its target, makes the model physically smaller on the spot, so that its recovery
trains only what is left, and leaves a whole model behind where there are several targets.
"""

from collections import Counter
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse.checkpoint.card import REPORT
from hf_sparse.compaction.compact import compact_alike_
from hf_sparse.config import SparsityConfig
from hf_sparse.costs.table import CostTable
from hf_sparse.engines.base import trains
from hf_sparse.errors import SparsityError
from hf_sparse.gates.attach import detach_gates, gate_bank
from hf_sparse.gates.units import GateBank
from hf_sparse.report.family import write_family
from hf_sparse.report.history import SHRUNK
from hf_sparse.report.report import Report
from hf_sparse.runtime.contexts import plain_forward
from hf_sparse.structure.blocks import layer_sizes
from hf_sparse.training.adapters import Adapters
from hf_sparse.training.base import BaseTrainer
from hf_sparse.training.borders import matched_layers, refit_to_teacher_
from hf_sparse.training.calls import LossCalls
from hf_sparse.training.results import Results
from hf_sparse.training.run import Run
from hf_sparse.training.search import Form, Search
from hf_sparse.training.start import attach_found_gates, discovered

logger = logging.get_logger(__name__)

LATEST_REFIT = 0.1
"""Share of the recovery after which nothing is refitted any more.

It would undo what sublayers have learnt together, and little is left of the learning rate to make up for it
(recipes/benchmark).
"""


class Stages(Form):
    """Makes a model physically smaller once its structure is found, target by target.

    Args:
        trainer: which trains the model.
        config: of the whole run.
        calls: how its loss calls the model.
        results: what the run leaves.
        adapters: of the model, if it has any.
    """

    def __init__(
        self, trainer: BaseTrainer, config: SparsityConfig, calls: LossCalls, results: Results, adapters: Adapters
    ) -> None:
        self.trainer, self.config, self.calls = trainer, config, calls
        self.results, self.adapters = results, adapters

    @property
    def _model(self) -> PreTrainedModel:
        return self.trainer.bare_model

    def attach_gates(self, model: PreTrainedModel, costs: CostTable | None = None) -> GateBank:
        """Put gates for the target of the stage on a model, in place.

        Args:
            model: without gates.
            costs: of the model that the run began with; taken now by default.
        """
        with self.adapters.aside(model):
            return attach_found_gates(model, self.config.stage(self.trainer.run.stage), self.calls, costs)

    def begin_(self) -> None:
        """Forget the report and metrics, in place, of a model that is trained on from here."""
        self.results.forget_()

    def seen_(self) -> None:
        """Match layers with those of the teacher, in place, at the first batch of a run."""
        if self.trainer.run.layer_map is None:
            self._match_layers_()

    def _match_layers_(self) -> None:
        structure, plan = self.results.structure, self.results.plan()
        self.trainer.run.layer_map = matched_layers(self.trainer, self.calls, structure, plan)

    def end_step_(self, search: Search, structure_found: bool) -> None:
        """Shrink the model in place once its structure is found; at the end of a stage, go on to the next."""
        if structure_found:
            self.trainer.require_finite()  # else it would be the shrinking that looks wrong
            self._shrink_(search)
        state = self.trainer.state
        recovered = state.global_step >= search.schedule.end or (structure_found and not trains(self._model))
        if recovered and not search.is_last_stage:
            self.trainer.require_finite()
            if gate_bank(self._model) is not None:
                logger.warning("The structure for target %s was not found in time.", self._target)
                self._shrink_(search)
            self._finish_stage_()
            self.trainer.run.stage += 1
            with self.trainer.editing():
                self.attach_gates(self._model, self.results.costs)
            search.train_gates_()

    def _shrink_(self, search: Search) -> None:
        """Make the model physically smaller in place, and go on training what is left."""
        with self.trainer.editing(), self.adapters.replaced(self._model):
            self.results.compact_together_()
            if self.config.refit and search.schedule.recovery_at(self.trainer.state.global_step) <= LATEST_REFIT:
                gated = self.results.costs.blocks
                outputs = [block.output for block in self.results.structure.blocks if block.name in gated]
                refit_to_teacher_(self.trainer, self.calls, outputs)
        self._match_layers_()
        self._log_what_is_left()

    def _log_what_is_left(self) -> None:
        """Log how many units each kind has left, beside what is due at this step anyway."""
        kept: Counter[str] = Counter()
        for layer in layer_sizes(self.results.structure, self.results.plan().kept):
            kept[f"{SHRUNK}{layer.kind}"] += layer.kept
        control = self.trainer.control
        due = control.should_log
        self.trainer.log(dict(kept))
        control.should_log = due

    @property
    def _target(self) -> float:
        return self.config.stage(self.trainer.run.stage).target

    def _member_path(self, target: float) -> Path:
        """Where the model of a stage goes."""
        return self.trainer.run_directory() / f"removed-{target:g}"

    def _finish_stage_(self) -> None:
        """Evaluate, measure and save the model of this stage, where there are several."""
        trainer = self.trainer
        if trainer.eval_dataset is not None:
            due = trainer.control.should_log, trainer.control.should_evaluate
            trainer.evaluate()
            trainer.control.should_log, trainer.control.should_evaluate = due
        path = self._member_path(self._target)
        with trainer.engine.gathered(self._model):
            report = self.results.measured_if_possible() if trainer.is_world_process_zero() else None
            if report is not None:
                trainer.run.members[path.name] = report
            self.results.save(path)
        self.results.report = None
        if trainer.args.should_save and trainer.run.members:
            write_family(path.parent, trainer.run.members)

    def finish_(self, search: Search) -> None:
        """End the last stage, in place, where there are several: its model is saved as those before."""
        is_over = search.in_last_form or self.trainer.state.global_step == search.schedules[-1].end
        if len(search.schedules) > 1 and is_over:
            if gate_bank(self._model) is not None:  # the structure was not found in time
                self.results.compact_()
            self._finish_stage_()

    def density_left(self) -> tuple[float, float]:
        """The density of a model that has been made smaller, and the one that was asked for."""
        kept = {name: len(kept) for name, kept in self.results.plan().kept.items()}
        stage, costs = self.config.stage(self.trainer.run.stage), self.results.costs
        return 1 - costs.removed(kept), 1 - costs.target(stage)

    def take_(self, run: Run, checkpoint: Path) -> None:
        """Give the model the form it had at a checkpoint, in place: its gates and sizes, not its weights.

        Raises:
            SparsityError: the checkpoint is of a run with other stages or gates, or the model is smaller already.
        """
        own, results = self.trainer.run, self.results
        if not 0 <= run.stage < len(self.config.descent):
            count = len(self.config.descent)
            raise SparsityError(f"{checkpoint} is in stage {run.stage}, of which this run has {count}")
        if run.gated not in (None, own.gated):
            raise SparsityError(f"{checkpoint} is of a run with gates on other blocks: freeze the same ones as then")
        done = len(own.compactions)
        if [report.plan for report in own.compactions] != [report.plan for report in run.compactions[:done]]:
            raise SparsityError(f"the model is smaller than it was at {checkpoint}: resume with a new trainer")
        with plain_forward(self._model):
            if gate_bank(self._model) is not None and (run.compactions[done:] or not run.searching):
                detach_gates(self._model)
            if run.compactions[done:]:
                with self.adapters.replaced(self._model):
                    for report in run.compactions[done:]:  # weights are loaded afterwards
                        compact_alike_(self._model, discovered(self._model, self.calls), report)
            own.compactions, own.stage, own.layer_map = run.compactions, run.stage, run.layer_map
            finished = [self._member_path(target) for target in self.config.descent[: own.stage]]
            own.members = {path.name: Report.read(path / REPORT) for path in finished if (path / REPORT).is_file()}
            if run.searching and gate_bank(self._model) is None:
                self.attach_gates(self._model, results.costs)
