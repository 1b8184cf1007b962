"""Where training begins once more, at step 0 or at a checkpoint, nothing of the search before is left."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import StopAt, bert, rows, training_arguments
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from hf_sparse import SparseTrainer, SparseWeightsTrainer, SparsityConfig, WeightSparsityConfig
from hf_sparse.gates.attach import gate_bank
from hf_sparse.gates.base import attached_gates

SEARCH = SparsityConfig(target=0.3, sparsity_ramp=0.5, warm_start=0.0, gate_learning_rate=0.2)


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate collects garbage at every start, which takes longer than a training here."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


class Starts(TrainerCallback):
    """Remembers the model as the first step of every training finds it, and what a step of the first one did."""

    def __init__(self, fails_at: int | None) -> None:
        self.fails_at = fails_at
        self.found: list[dict[str, Tensor]] = []
        self.is_first = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.is_first = True

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.is_first:
            self.found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        self.is_first = False
        if state.global_step == self.fails_at:
            self.fails_at = None
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")


def run_of(directory: Path, callbacks: list[TrainerCallback], sparsity: Any = SEARCH, **options: Any) -> Any:
    kind: Any = SparseWeightsTrainer if isinstance(sparsity, WeightSparsityConfig) else SparseTrainer
    data = {"train_dataset": rows(64), "eval_dataset": rows(16, seed=1)}
    arguments = training_arguments(directory, auto_find_batch_size=True, **{"max_steps": 20, **options})
    return kind(model=bert(), args=arguments, sparsity=sparsity, callbacks=callbacks, **data)


def gates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("sparsity_gates")}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    "sparsity", [SEARCH, WeightSparsityConfig(target=0.3, sparsity_ramp=0.5, warm_start=0.0, gate_learning_rate=0.2)]
)
@pytest.mark.parametrize("cause", ["memory", "train"])
def test_a_search_that_begins_once_more_has_gates_as_at_first(cause: str, sparsity: Any, tmp_path: Path) -> None:
    starts = Starts(8 if cause == "memory" else None)
    run = run_of(tmp_path, [starts, *([] if cause == "memory" else [StopAt(8)])], sparsity)
    first = {name: tensor.clone() for name, tensor in gates(run.model.state_dict()).items()}
    run.train()
    if cause == "train":
        assert attached_gates(run.model).controller.multiplier > 0
        run.pop_callback(StopAt)
        run.train()
    assert len(starts.found) == 2 and run.state.global_step == 20
    for found in starts.found:
        assert_same(gates(found), first)
    assert attached_gates(run.model) is None and run.search.in_last_form
    before = starts.found[1]["bert.encoder.layer.0.output.dense.weight"]
    assert not torch.equal(before, starts.found[0]["bert.encoder.layer.0.output.dense.weight"])  # as Trainer has it


def test_importances_and_moments_begin_once_more_too(tmp_path: Path) -> None:
    seen: list[tuple[Tensor, int]] = []

    class Look(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                group = next(iter(run.bank.groups.values()))
                seen.append((group.opening.clone(), int(run.optimizer.state[group.alpha]["step"])))

    run = run_of(tmp_path, [Look(), Starts(2)], SparsityConfig(), max_steps=3)
    run.train()
    assert [steps for _, steps in seen] == [1, 1]
    assert all(opening.std() > 1e-3 for opening, _ in seen)  # importances are no longer equal


def test_what_was_cut_stays_cut_and_the_stage_is_searched_again(tmp_path: Path) -> None:
    targets = replace(SEARCH, targets=[0.2, 0.4])
    starts = Starts(22)
    run = run_of(tmp_path, [starts], targets, max_steps=40)
    run.train()
    first, again = (sum(tensor.numel() for name, tensor in found.items()) for found in starts.found)
    assert again < first and run.state.global_step == 40 and gate_bank(run.model) is None
    left = 1 - run.costs.removed({name: len(units) for name, units in run.plan().kept.items()})
    assert left == pytest.approx(0.6, abs=0.03)
    assert all((tmp_path / f"removed-{target}" / "report.json").is_file() for target in (0.2, 0.4))


def test_a_resumed_run_begins_once_more_at_its_checkpoint(tmp_path: Path) -> None:
    run_of(tmp_path, [StopAt(6)]).train()
    saved = load_file(tmp_path / "checkpoint-6/model.safetensors")
    starts = Starts(9)
    run = run_of(tmp_path, [starts])
    run.train(resume_from_checkpoint=True)
    assert len(starts.found) == 2 and run.state.global_step == 20
    for found in starts.found:
        assert_same(found, saved)
