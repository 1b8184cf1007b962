"""What a training leaves without being asked: report, picture and card, with metrics of both models."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruning import bert, rows, training_arguments
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback
from zoo import ZOO

from hf_sparse import SparseTrainer, SparsityConfig, load_pruned
from hf_sparse.structure.example_inputs import main_input, shape_text
from hf_sparse.training import results


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}


def trainer(directory: Path, teacher: PreTrainedModel | None = None, **options: Any) -> SparseTrainer:
    given = {name: options.pop(name) for name in ("eval_dataset", "callbacks") if name in options}
    return SparseTrainer(
        model=bert(),
        args=training_arguments(directory, max_steps=12, **options),
        sparsity=SparsityConfig(sparsity_ramp=0.5),
        teacher=teacher,
        train_dataset=rows(32),
        compute_metrics=accuracy,
        **{"eval_dataset": rows(16, seed=1), **given},
    )


def metrics(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    report = json.loads((directory / "report.json").read_text())
    return report["dense"]["metrics"], report["pruned"]["metrics"]


def test_training_and_saving_leave_a_report_with_the_metrics_of_both_models(tmp_path: Path) -> None:
    class Heard(TrainerCallback):
        evaluations = 0

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            Heard.evaluations += 1

    teacher = bert()
    with torch.no_grad():
        teacher.classifier.bias[0] += 0.5
    run = trainer(tmp_path, teacher, eval_strategy="steps", eval_steps=6, callbacks=[Heard()])
    run.train()
    assert Heard.evaluations == len([log for log in run.state.log_history if "eval_loss" in log]) == 2
    found = run.evaluate()
    found["perplexity"] = 7.0
    run.save_model()
    assert {"report.json", "structure.png", "README.md"} <= {path.name for path in tmp_path.iterdir()}
    dense, pruned = metrics(tmp_path)
    plain = SparseTrainer(
        model=teacher.requires_grad_(True),
        args=training_arguments(tmp_path / "plain"),
        sparsity=SparsityConfig(),
        eval_dataset=rows(16, seed=1),
        compute_metrics=accuracy,
    ).evaluate()
    assert dense["evaluation"] == pytest.approx({"loss": plain["eval_loss"], "accuracy": plain["eval_accuracy"]})
    assert pruned["evaluation"] == {"loss": found["eval_loss"], "accuracy": found["eval_accuracy"], "perplexity": 7.0}
    assert "| perplexity, evaluation |  | 7.0000 |" in (tmp_path / "README.md").read_text()
    run.evaluate()  # without a perplexity: what is saved next says what is known then
    run.save_model(tmp_path / "again")
    assert "perplexity" not in metrics(tmp_path / "again")[1]["evaluation"]


def test_an_evaluation_before_the_training_is_of_the_dense_model(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset={"a": rows(8, seed=1), "b": rows(8, seed=2)})
    before = run.evaluate()
    run.train()
    run.save_model()
    assert metrics(tmp_path) == ({}, {})  # the pruned model was not evaluated
    run.evaluate()
    run.save_model()
    dense, pruned = metrics(tmp_path)
    assert dense["evaluation"].keys() == pruned["evaluation"].keys()
    assert dense["evaluation"]["b_loss"] == before["eval_b_loss"] != pruned["evaluation"]["b_loss"]


def test_a_larger_teacher_is_not_taken_for_the_dense_model(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert(hidden_size=64))
    run.train()
    run.evaluate()
    run.save_model()
    dense, pruned = metrics(tmp_path)
    assert dense == {} and pruned["evaluation"]["accuracy"] >= 0


def test_a_model_that_cannot_be_measured_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(results.logger, "warning", lambda text, *values: warnings.append(text % values))
    run = trainer(tmp_path)
    run.train()
    for error, said in (
        (torch.OutOfMemoryError("no room"), "do not fit cpu together"),
        (KeyError("x"), "measured: 'x'"),
    ):

        def fail(*given: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(results, "make_report", fail)
        run.save_model(tmp_path / "out")
        assert len(warnings) == 1 and said in warnings.pop()
        assert load_pruned(tmp_path / "out").num_parameters() < bert().num_parameters()


def test_checkpoints_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    monkeypatch.setattr(results, "make_report", lambda *given: measured.append(given))
    run = trainer(tmp_path, save_strategy="steps", save_steps=6)
    run.train()
    assert not measured and run.report is None and len(list(tmp_path.glob("checkpoint-*"))) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bert", r"\d x \d+ tokens"),
        ("vit", r"\d images of 32 x 32"),
        ("vivit", r"\d videos of \d+ x 32 x 32"),
        ("wav2vec2", r"\d x \d+ samples"),
        ("whisper", r"\d spectrograms of 16 x \d+"),
    ],
)
def test_batches_are_described_in_their_own_units(name: str, text: str) -> None:
    model, inputs = ZOO[name].make(), ZOO[name].inputs()
    name = main_input(model, inputs)
    assert re.fullmatch(text, shape_text(name, inputs[name].shape))
    assert shape_text("input_ids", (8, 4, 128)) == "8 questions of 4 x 128 tokens"
