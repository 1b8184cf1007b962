"""One run that descends through several targets and leaves a model at each."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pruning import StopAt, bert, rows, training_arguments
from safetensors.torch import load_file
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from hf_sparse import SparseTrainer, SparsityConfig, SparsityError, load_pruned
from hf_sparse.gates.attach import gate_bank
from hf_sparse.training import results
from hf_sparse.training.run import STATE

TARGETS, STEPS = [0.3, 0.5, 0.7], 90


def model() -> PreTrainedModel:
    return bert(layers=4, hidden_size=64, num_attention_heads=16, intermediate_size=128)


def run_of(directory: Path, callbacks: tuple[TrainerCallback, ...] = (), **options: Any) -> SparseTrainer:
    sparsity = options.pop("sparsity", SparsityConfig(targets=TARGETS))
    return SparseTrainer(
        model=model(),
        args=training_arguments(directory, **{"max_steps": STEPS, **options}),
        sparsity=sparsity,
        teacher=model(),
        train_dataset=rows(64),
        eval_dataset=rows(16, seed=1),
        compute_metrics=lambda prediction: {
            "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
        },
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> SparseTrainer:
    """A run that never stopped."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = run_of(tmp_path_factory.mktemp("unbroken"))
    run.train()
    return run


def test_a_run_leaves_a_whole_model_at_every_target(unbroken: SparseTrainer) -> None:
    run, directory, parameters = unbroken, Path(unbroken.args.output_dir), []
    for target in TARGETS:
        path = directory / f"removed-{target}"
        report = json.loads((path / "report.json").read_text())
        assert abs(report["achieved"] - target) <= 0.01 and report["target"] == target
        assert report["max_abs_diff"] <= 1e-4
        member = load_pruned(path)
        assert member.num_parameters() == report["pruned"]["parameters"]
        parameters.append(member.num_parameters())
        assert (path / "README.md").is_file() and (path / "structure.png").is_file()
    assert parameters == sorted(parameters, reverse=True)
    family = json.loads((directory / "family.json").read_text())
    assert [row["model"] for row in family] == [f"removed-{target}" for target in TARGETS]
    assert all("accuracy" in row["metrics"]["evaluation"] for row in family)
    assert (directory / "family.md").read_text().count("\n") == 2 + len(TARGETS)
    assert (directory / "family.png").stat().st_size > 0
    inputs = torch.tensor(rows(4)["input_ids"])
    assert torch.equal(run.model.eval()(inputs).logits, member.eval()(inputs).logits)


def test_trials_of_a_search_leave_their_models_apart(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert run.stages._member_path(0.5) == tmp_path / "removed-0.5"
    run.hp_search_backend, run._trial = HPSearchBackend.OPTUNA, SimpleNamespace(number=3)
    assert run.stages._member_path(0.5) == tmp_path / "run-3/removed-0.5"


def test_models_that_do_not_fit_beside_each_other_are_saved_unmeasured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(results, "make_report", no_room)
    run_of(tmp_path, sparsity=SparsityConfig(targets=[0.2, 0.4]), max_steps=40).train()
    for target in (0.2, 0.4):
        assert load_pruned(tmp_path / f"removed-{target}").num_parameters() < model().num_parameters()
        assert not (tmp_path / f"removed-{target}/report.json").exists()


# In a recovery, at the border of two stages, and in the second search.
@pytest.mark.parametrize("step", [18, 30, 33])
def test_resuming_in_any_stage_gives_the_weights_of_never_stopping(
    step: int, unbroken: SparseTrainer, tmp_path: Path
) -> None:
    run_of(tmp_path, (StopAt(step),)).train()
    resumed = run_of(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert resumed.plan() == unbroken.plan()
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    last = f"removed-{TARGETS[-1]}/model.safetensors"
    one, other = load_file(Path(unbroken.args.output_dir) / last), load_file(tmp_path / last)
    assert all(torch.equal(one[name], other[name]) for name in one)
    # The picture and table are of all members, also of those from before the stop.
    assert len(json.loads((tmp_path / "family.json").read_text())) == len(TARGETS)


def test_a_finished_model_is_taken_further(tmp_path: Path) -> None:
    run = run_of(tmp_path / "first", sparsity=SparsityConfig(target=0.4), max_steps=40)
    run.train()
    run.save_model(str(tmp_path / "half"))
    half = load_pruned(tmp_path / "half")
    before = half.num_parameters()
    further = SparseTrainer(
        model=half,
        args=training_arguments(tmp_path / "second"),
        sparsity=SparsityConfig(target=0.5),
        teacher=model(),
        train_dataset=rows(64),
        eval_dataset=rows(16, seed=1),
    )
    further.train()
    assert gate_bank(further.model) is None and further.model.num_parameters() < before
    further.save_model(str(tmp_path / "quarter"))
    assert load_pruned(tmp_path / "quarter").num_parameters() == further.model.num_parameters()


@pytest.mark.parametrize("gates", ["relative", "simplex"])
def test_sublayers_may_compete_as_a_whole(gates: str, tmp_path: Path) -> None:
    sparsity = SparsityConfig(target=0.6, sublayer_gates=True, gate=gates)
    run = run_of(tmp_path, sparsity=sparsity, max_steps=60)
    run.train()
    report = run.compact()
    removed = run.costs.removed({name: len(units) for name, units in report.plan.kept.items()})
    assert removed > 0.3 and report.max_abs_diff <= 1e-4


def test_a_state_that_is_not_one_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path, (StopAt(10),)).train()
    state = tmp_path / "checkpoint-10" / STATE
    state.write_text(json.dumps({**json.loads(state.read_text()), "stage": 7}))
    with pytest.raises(SparsityError, match="in stage 7"):
        run_of(tmp_path).train(resume_from_checkpoint=True)
    state.write_text("{")
    with pytest.raises(SparsityError, match="no whole checkpoint"):
        run_of(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("targets", [[0.5, 0.4], [0.5, 0.5], [0.5, 1.0], []])
def test_targets_are_ascending_shares(targets: list[float]) -> None:
    with pytest.raises(SparsityError, match="targets"):
        SparsityConfig(targets=targets)


def test_targets_may_be_given_as_a_tuple() -> None:
    assert SparsityConfig(targets=(0.2, 0.4)) == SparsityConfig(targets=[0.2, 0.4])  # type: ignore[arg-type]
