"""Refit a model that has just shrunk to its teacher, and match its layers with those of the teacher."""

from typing import Any

import torch
from transformers.utils import logging

from hf_sparse.compaction.refit import depths, refit_, refittable
from hf_sparse.distillation.answers import answers, state_masks
from hf_sparse.distillation.distiller import LayerMap
from hf_sparse.distillation.losses import hidden_distances, layer_pairs
from hf_sparse.gates.plan import PruningPlan
from hf_sparse.runtime.contexts import evaluating, plain_forward, unchanged_random_state
from hf_sparse.runtime.processes import is_main
from hf_sparse.structure.blocks import ModelStructure
from hf_sparse.training.base import BaseTrainer
from hf_sparse.training.calls import LossCalls

logger = logging.get_logger(__name__)

REFIT_ROWS, REFIT_TOKENS = 256, 8192
"""Rows of text that output projections are refitted on, at once; fewer if they make up so many tokens with padding."""
REFIT_STEPS, LEAST_REFIT_TOKENS = 8, 4096
"""Fewer rows also where they fill so many steps, if they make up so many tokens."""
OTHER_ROWS = 64
"""Rows of images or sound."""


def refit_to_teacher_(trainer: BaseTrainer, calls: LossCalls, outputs: list[str]) -> None:
    """Fit output projections that are left to the teacher's, in place, where it has the same ones.

    On the main process, which then broadcasts the weights.

    Args:
        trainer: of a model that has just been made smaller.
        calls: how its loss calls the model.
        outputs: paths of the output projections of the blocks that were pruned.
    """
    if trainer.distiller is None:
        return
    model, teacher = trainer.bare_model, trainer.distiller.teacher
    if depths(model) != depths(teacher.model):  # its sublayers do other things
        return
    names = refittable(model, teacher.model, outputs)
    batch = _refit_batch(trainer, calls)
    if batch is None:
        return
    if not is_main():
        if teacher.sharded:  # all have to ask it together
            with torch.no_grad():
                teacher.model(**batch)
        return
    with evaluating(model):
        refit_(model, teacher.model, names, batch)


def _refit_batch(trainer: BaseTrainer, calls: LossCalls) -> dict[str, Any] | None:
    """Rows of the training data as one batch, without labels; None if the data have ended."""
    if not calls.takes_batches:
        return calls.as_called({})
    rows = longest = 0
    for row in calls.training_rows(REFIT_ROWS, 1):
        main = row[trainer.bare_model.main_input_name]
        is_text = main.ndim == 2 and not main.is_floating_point()
        longest = max(longest, main.shape[1] if is_text else REFIT_TOKENS // OTHER_ROWS)
        rows += 1
        if rows * longest >= (REFIT_TOKENS if rows < REFIT_STEPS * calls.rows_of_a_step else LEAST_REFIT_TOKENS):
            break
    return calls.as_called(next(calls.training_rows(rows, rows))) if rows else None


def matched_layers(
    trainer: BaseTrainer, calls: LossCalls, structure: ModelStructure, plan: PruningPlan
) -> LayerMap | None:
    """Find out which layers of the student learn from which of the teacher, on a batch of the evaluation data.

    Each from its own, while there are as many, or where layers have states of different shapes; else those that are
    left, each from one that it is close to. Where states cannot be compared, the teacher is no longer asked for them.

    Args:
        trainer: of the student.
        calls: how its loss calls the model.
        structure: of the model that the run began with.
        plan: what is left of it.
    """
    if trainer.distiller is None or not trainer.distiller.teacher.hidden:
        return trainer.run.layer_map
    model, teacher = trainer.bare_model, trainer.distiller.teacher
    batch = calls.verification_batch()
    device = trainer.args.device
    with torch.no_grad(), evaluating(model), plain_forward(model), unchanged_random_state(device):
        outputs = model(**batch, output_hidden_states=True, return_dict=True)
        taught = teacher.ask(batch).states
    student, masks = answers(outputs, None).states, state_masks(model, outputs, batch)
    left = _layers_left(structure, plan, len(student))
    shapes, others = ([state.shape for state in states] for states in (student, taught))
    if shapes and shapes == others and (len(left) == len(student) or len(set(shapes)) > 1):
        return tuple((layer, layer) for layer in left)
    if len({*shapes, *others}) > 1 or not taught:
        logger.warning("Hidden states of model and teacher differ in shape: it learns from the logits alone.")
        teacher.hidden = False
        return trainer.run.layer_map
    distances = hidden_distances([student[layer] for layer in left], taught, [masks[layer] for layer in left])
    pairs = layer_pairs(trainer.accelerator.reduce(distances, "mean").tolist())
    return tuple((left[student_layer], teacher_layer) for student_layer, teacher_layer in pairs)


def _layers_left(structure: ModelStructure, plan: PruningPlan, layers: int) -> list[int]:
    """The layers, counted through all stacks, of which a sublayer is left."""
    left: dict[tuple[str, int], bool] = {}
    for block in structure.blocks:
        place = block.name.split(f".{block.layer}.")[0], block.layer
        left[place] = left.get(place, False) or bool(plan.kept.get(block.name, (0,)))
    if len(left) != layers:  # layers that nothing can be removed from, or that were found in another order
        return list(range(layers))
    return [index for index, some in enumerate(left.values()) if some] or [layers - 1]
