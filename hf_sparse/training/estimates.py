"""What some rows of data tell a Trainer at the borders of a stage: a refit, and who learns from whom."""

from typing import Any

import torch
from transformers.utils import logging

from hf_sparse.compaction.refit import depths, refit_, refittable
from hf_sparse.config import SparsityConfig
from hf_sparse.distillation.answers import answers, state_masks
from hf_sparse.distillation.losses import hidden_distances, layer_pairs
from hf_sparse.engines.surgery import plain_forward, unchanged_random_state
from hf_sparse.runtime.processes import is_first
from hf_sparse.training.results import ResultsMixin
from hf_sparse.training.search import SearchingMixin

logger = logging.get_logger(__name__)

REFIT_ROWS, REFIT_TOKENS = 256, 8192
"""Rows of text that output projections are refitted on, at once; fewer if they make up so many tokens with padding."""
OTHER_ROWS = 64
"""Rows of images or sound."""

LATEST_REFIT = 0.1
"""Share of the recovery after which nothing is refitted any more.

It would undo what sublayers have learnt together, and little is left of the learning rate to make up for it
(recipes/benchmark).
"""


class EstimatesMixin(SearchingMixin, ResultsMixin):
    """Adds to a Trainer with gates, and perhaps a teacher, what it has to find out before it trains on."""

    sparsity: SparsityConfig

    def _refit(self) -> None:
        """Fit the output projections that are left to the teacher's, in place, where it has the same ones.

        On the first process; the others are to get the weights from it.
        """
        if self.teacher is None or not self.sparsity.refit:
            return
        if depths(self._model) != depths(self.teacher.model):  # its sublayers do other things
            return
        if self._schedule.recovery_at(self.state.global_step) > LATEST_REFIT:
            return
        outputs = [block.output for block in self.structure.blocks if block.name in self.costs.blocks]
        names = refittable(self._model, self.teacher.model, outputs)
        batch = self._refit_batch()
        if batch is None:
            return
        if not is_first():
            if self.teacher.sharded:  # all have to ask it together
                with torch.no_grad():
                    self.teacher.model(**batch)
            return
        training, _ = self._model.training, self._model.eval()
        refit_(self._model, self.teacher.model, names, batch)
        self._model.train(training)

    def _refit_batch(self) -> dict[str, Any] | None:
        """Rows of the training data as one batch, without labels; None if the data have ended."""
        if not self._takes_batches:
            return self._as_called({})
        rows = longest = 0
        for row in self._some_rows(REFIT_ROWS, 1):
            main = row[self._model.main_input_name]
            is_text = main.ndim == 2 and not main.is_floating_point()
            longest = max(longest, main.shape[1] if is_text else REFIT_TOKENS // OTHER_ROWS)
            rows += 1
            if rows * longest >= REFIT_TOKENS:
                break
        return self._as_called(next(self._some_rows(rows, rows))) if rows else None

    def _match_layers(self) -> None:
        """Find out which layers of the student learn from which of the teacher, on a batch of the evaluation data.

        Each from its own, while there are as many, or where layers have states of different shapes; else those that are
        left, each from one that it is close to.
        """
        if self.teacher is None or not self.teacher.hidden:
            return
        batch = self._verification_batch()
        training, _ = self._model.training, self._model.eval()
        with torch.no_grad(), plain_forward(self._model), unchanged_random_state(self.args.device):
            outputs = self._model(**batch, output_hidden_states=True, return_dict=True)
            teacher = self.teacher.ask(batch).states
        student, masks = answers(outputs, None).states, state_masks(self._model, outputs, batch)
        self._model.train(training)
        left = self._layers_left(len(student))
        shapes, others = ([state.shape for state in states] for states in (student, teacher))
        if shapes and shapes == others and (len(left) == len(student) or len(set(shapes)) > 1):
            self._layer_map = tuple((layer, layer) for layer in left)
        elif len({*shapes, *others}) > 1 or not teacher:
            logger.warning("Hidden states of model and teacher differ in shape: it learns from the logits alone.")
            self.teacher.hidden = False
        else:
            distances = hidden_distances([student[layer] for layer in left], teacher, [masks[layer] for layer in left])
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
