"""The seam to transformers: which private names of its Trainer are used, where, and with which parameters."""

import ast
import inspect
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import bert, rows, training_arguments
from transformers import Trainer, TrainerCallback

import hf_sparse
from hf_sparse import DenseTrainer, NonFiniteLossError, SparseTrainer, SparseTrainerMixin, SparseWeightsTrainer
from hf_sparse.training.base import BaseTrainer

ROOT = Path(hf_sparse.__file__).parent
SEAM = ROOT / "training/base.py"

OVERRIDDEN = {
    "_determine_best_metric": ["metrics", "trial"],
    "_finalize_training": ["trial", "num_train_samples", "start_time"],
    "_issue_warnings_after_load": ["load_result"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_maybe_log_save_evaluate": [
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_save_checkpoint": ["model", "trial"],
    "_save_optimizer_and_scheduler": ["output_dir"],
}
CALLED = {
    "_get_num_items_in_batch": ["batch_samples", "device"],
    "_get_output_dir": ["trial"],
    "_prepare_inputs": ["inputs"],
    "_save": ["output_dir", "state_dict"],
}
READ = {"_loss_shifts_labels", "_trial"}


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]


def used(path: Path) -> set[str]:
    """Private names of any Trainer or of itself that a file asks for."""
    asked = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    names = {node.attr for node in asked if ast.unparse(node.value) in ("self", "super()", "trainer", "self.trainer")}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_private_names_have_the_parameters_that_they_are_used_with(name: str) -> None:
    expected = {**OVERRIDDEN, **CALLED}[name]
    assert parameters(getattr(Trainer, name)) == expected
    if name in OVERRIDDEN:
        assert parameters(vars(BaseTrainer)[name]) == expected


def test_private_attributes_are_there() -> None:
    source = inspect.getsource(Trainer)
    assert all(f"self.{name}" in source for name in READ)


def test_one_file_overrides_and_calls_what_is_private_in_trainers() -> None:
    theirs = {name for name in {*dir(Trainer), *READ} if name.startswith("_") and not name.startswith("__")}
    assert (used(SEAM) | vars(BaseTrainer).keys()) & theirs == {*OVERRIDDEN, *CALLED, *READ}
    ours = [kind for kind in SparseTrainer.__mro__ + SparseWeightsTrainer.__mro__ if "hf_sparse" in kind.__module__]
    overridden = {kind: {name for name in vars(kind) if name in theirs} for kind in {*ours, *DenseTrainer.__mro__[:2]}}
    assert {name for names in overridden.values() for name in names} == {*OVERRIDDEN}
    assert [kind for kind, names in overridden.items() if names] == [BaseTrainer]
    for path in ROOT.rglob("*.py"):
        assert path == SEAM or not used(path) & theirs, path


def test_two_classes_lie_between_our_trainer_and_that_of_transformers() -> None:
    for kind in (SparseTrainer, SparseWeightsTrainer, DenseTrainer):
        assert kind.__mro__.index(Trainer) == 3


def test_another_trainer_before_ours_is_refused() -> None:
    class Base(Trainer):
        pass

    class Mine(SparseTrainerMixin, Base):
        pass

    class More(Mine):
        pass

    with pytest.raises(TypeError, match=r"write class Wrong\(SparseTrainerMixin, Base\)"):

        class Wrong(Base, SparseTrainerMixin):
            pass


def test_what_is_nan_is_not_saved_at_sigterm(tmp_path: Path) -> None:
    """Both are found out after the same step: first that it is NaN."""

    class Both(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                with torch.no_grad():
                    next(model.parameters()).fill_(float("nan"))

    run = DenseTrainer(model=bert(), args=training_arguments(tmp_path), train_dataset=rows(64), callbacks=[Both()])
    with pytest.raises(NonFiniteLossError, match="by step 3"):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))
