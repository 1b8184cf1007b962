import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import (
    VOCABULARY,
    StopAt,
    bart,
    bert,
    density,
    gpt2,
    llama,
    rows,
    trainer,
    training_arguments,
    without_dropout,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    PreTrainedModel,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from hf_sparse import (
    NonFiniteLossError,
    PruningPlan,
    SparseSeq2SeqTrainer,
    SparseTrainer,
    SparseTrainerMixin,
    SparsityConfig,
    SparsityError,
    attach_gates,
    load_pruned,
)
from hf_sparse.gates.attach import gate_bank, require_bank

# ---- The target ----


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8, 0.95])
def test_the_density_lands_within_a_point_of_the_target(tmp_path: Path, target: float) -> None:
    # Large enough that a unit is far less than a point of the cost.
    model = bert(layers=4, hidden_size=64, num_attention_heads=16, intermediate_size=256)
    run = trainer(tmp_path, model, max_steps=100, sparsity=SparsityConfig(target=target))
    run.train()
    assert abs(density(run) - (1 - target)) <= 0.01
    assert gate_bank(run.model) is None


@pytest.mark.parametrize("cost", ["params", "macs"])
@pytest.mark.parametrize("group", ["kind", "layer"])
@pytest.mark.parametrize("gate", ["relative", "simplex"])
def test_every_kind_of_gate_group_and_cost_prunes(tmp_path: Path, gate: str, group: str, cost: str) -> None:
    sparsity = SparsityConfig(target=0.4, gate=gate, group=group, cost=cost)
    model = bert(layers=3, hidden_size=64, num_attention_heads=16, intermediate_size=128)
    run = trainer(tmp_path, model, sparsity=sparsity)
    run.train()
    assert density(run) < 0.9
    assert run.compact().max_abs_diff <= 1e-4


@pytest.mark.parametrize("make", [gpt2, llama])
def test_decoders_train_and_shrink(tmp_path: Path, make: Any) -> None:
    tokens = rows(64).remove_columns("labels")
    data = tokens.add_column("labels", tokens["input_ids"])
    run = trainer(tmp_path, make(), train_dataset=data, sparsity=SparsityConfig(target=0.4))
    run.eval_dataset = data.select(range(8))
    run.train()
    report = run.compact()
    assert report.max_abs_diff <= 1e-4 and report.parameters_after < report.parameters_before


# ---- Laws ----


def test_one_times_four_is_four_times_one(tmp_path: Path) -> None:
    weights = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        model = without_dropout(bert()).double()
        run = trainer(
            tmp_path,
            model,
            teacher=without_dropout(bert(layers=1)).double(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=24,
        )
        run.train()
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def taught(directory: Path, **options: Any) -> SparseTrainer:
    return trainer(directory, sparsity=SparsityConfig(sparsity_warmup=0.05), teacher=bert(layers=1), **options)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """The model of a run that never stopped."""
    torch.set_num_threads(1)
    run = taught(tmp_path_factory.mktemp("unbroken"))
    run.train()
    return run.model


@pytest.mark.parametrize("step", [1, 5, 11, 13, 30])
def test_resuming_gives_the_weights_of_never_stopping(tmp_path: Path, step: int, unbroken: PreTrainedModel) -> None:
    """Stops in warm-up, ramp, hold (before and after the structure is fixed) and recovery; dropout is on."""
    taught(tmp_path, callbacks=[StopAt(step)]).train()
    run = taught(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 40
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_runs_of_a_few_steps_end(tmp_path: Path, steps: int) -> None:
    run = trainer(tmp_path, max_steps=steps, sparsity=SparsityConfig(sparsity_ramp=0.9, sparsity_hold=0.0))
    assert run.train().global_step == steps
    assert run.compact().max_abs_diff <= 1e-4


def test_the_model_shrinks_as_soon_as_the_structure_is_found_and_goes_on_learning(tmp_path: Path) -> None:
    seen: list[tuple[bool, int, PruningPlan, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weight = run.model.bert.encoder.layer[0].output.dense.weight.detach().clone()
            seen.append((gate_bank(run.model) is None, run.model.num_parameters(), run.plan(), weight))

    run = trainer(tmp_path)
    run.add_callback(Watch())
    run.train()
    first = next(index for index, (compact, *_) in enumerate(seen) if compact)
    assert 10 <= first <= 20 and seen[first][1] < 0.9 * seen[0][1]
    for (_, size, plan, weight), (_, next_size, next_plan, next_weight) in zip(seen[first:], seen[first + 1 :]):
        assert size == next_size and plan == next_plan
        assert not torch.equal(weight, next_weight)
    trained = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in run.model.parameters()}


def test_shrinking_changes_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"input_ids": torch.tensor(rows(4)["input_ids"])}
    run = trainer(tmp_path)
    shrink, logits = run.stages._shrink_, []

    def compared(search: Any) -> None:
        for step in (None, shrink):
            if step is not None:
                step(search)
            with torch.no_grad():
                logits.append(run.model.eval()(**batch).logits)
        run.model.train()

    monkeypatch.setattr(run.stages, "_shrink_", compared)
    run.train()
    assert len(logits) == 2
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)


def test_gates_have_their_own_learning_rate_and_no_weight_decay(tmp_path: Path) -> None:
    run = trainer(tmp_path, weight_decay=0.1)
    *others, gates = run.create_optimizer().param_groups
    mine = {id(parameter) for parameter in require_bank(run.model).parameters()}
    assert {id(parameter) for parameter in gates["params"]} == mine
    assert gates["lr"] == run.sparsity.gate_learning_rate and gates["weight_decay"] == 0.0
    assert not mine & {id(parameter) for group in others for parameter in group["params"]}


def test_the_learning_rate_decays_over_the_recovery_only(tmp_path: Path) -> None:
    run = trainer(tmp_path, warmup_steps=4, sparsity=SparsityConfig(sparsity_ramp=0.24))
    scheduler = run.create_scheduler(100, run.create_optimizer())
    rates = []
    for _ in range(100):
        rates.append([group["lr"] for group in run.optimizer.param_groups])
        run.optimizer.step()
        scheduler.step()
    weights, gates = [rate[0] for rate in rates], [rate[-1] for rate in rates]
    assert weights[:5] == pytest.approx([1e-3 * n / 5 for n in range(1, 6)])
    assert weights[5:31] == pytest.approx([1e-3] * 26)
    assert weights[65] == pytest.approx(0.5e-3) and weights[-1] < 2e-5
    assert set(gates) == {0.1}


# ---- Trainer's own features ----


def test_densities_and_lambda_are_logged_and_reach_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    sparsity = SparsityConfig(sparsity_ramp=0.24)
    run = trainer(tmp_path, report_to=["tensorboard"], logging_steps=5, sparsity=sparsity)
    run.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    searching = ("effective_density", "lambda", "density_attention", "density_ffn")
    for name, count in {"density": 8, "target_density": 8, **dict.fromkeys(searching, 3)}.items():
        assert len(events.Scalars(f"train/{name}")) == count, name
    logged = [line for line in run.state.log_history if "density" in line]
    assert [line["target_density"] for line in logged[3:]] == pytest.approx([0.5] * 5)
    assert 0.5 < logged[0]["target_density"] < 1 and logged[0]["density"] > logged[-1]["density"]


def test_the_best_model_is_one_of_the_size_asked_for(tmp_path: Path) -> None:
    scores = iter([0.9, 0.8, 0.7, 0.1, 0.3, 0.2, 0.1, 0.1])

    def metrics(prediction: Any) -> dict[str, float]:
        return {"score": next(scores)}

    run = trainer(
        tmp_path,
        compute_metrics=metrics,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    run.train()
    # The scores from 0.7 up belong to steps 5 to 15, before the structure was fixed.
    assert run.state.best_global_step == 25 and run.state.best_metric == 0.3
    assert abs(density(run) - 0.5) <= 0.04


def test_early_stopping_waits_for_the_structure(tmp_path: Path) -> None:
    scores = iter([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    run = trainer(
        tmp_path,
        compute_metrics=lambda prediction: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    run.train()
    assert run.state.best_global_step == 20 and run.state.global_step == 30


def test_bf16_keeps_the_gates_in_float32(tmp_path: Path) -> None:
    run = trainer(tmp_path, bf16=True, teacher=bert(layers=1), callbacks=[StopAt(8)])
    run.train()
    assert {tensor.dtype for name, tensor in require_bank(run.model).named_parameters()} == {torch.float32}
    run = trainer(tmp_path, bf16=True, teacher=bert(layers=1))
    run.train()
    assert abs(density(run) - 0.5) <= 0.04
    assert run.compact().max_abs_diff <= 1e-4


def test_a_bfloat16_model_trains(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert().to(torch.bfloat16))
    run.train()
    assert run.compact().max_abs_diff <= 1e-4


def test_label_smoothing_and_a_teacher_go_together(tmp_path: Path) -> None:
    run = trainer(tmp_path, label_smoothing_factor=0.1, teacher=bert(layers=1))
    assert run.train().training_loss > 0


def test_the_teacher_changes_the_student_and_is_not_changed(tmp_path: Path) -> None:
    teacher = bert(layers=1)
    before = copy.deepcopy(teacher.state_dict())
    alone, taught = bert(), bert()
    trainer(tmp_path, alone).train()
    trainer(tmp_path, taught, teacher=teacher).train()
    assert not torch.equal(alone.classifier.weight, taught.classifier.weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_model_init_gives_gates_to_every_new_model(tmp_path: Path) -> None:
    run = SparseTrainer(
        model_init=lambda trial: bert(),
        args=training_arguments(tmp_path),
        sparsity=SparsityConfig(),
        train_dataset=rows(64),
    )
    first = run.model
    run.train()
    assert run.model is not first and abs(density(run) - 0.5) <= 0.04


def test_seq2seq_and_other_trainers_prune_too(tmp_path: Path) -> None:
    tokens = rows(64).remove_columns("labels")
    data = tokens.add_column("labels", tokens["input_ids"])
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=40,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        predict_with_generate=True,
        dataloader_pin_memory=False,
        generation_max_length=12,
    )
    run = SparseSeq2SeqTrainer(
        model=bart(), args=arguments, sparsity=SparsityConfig(), train_dataset=data, eval_dataset=data.select(range(8))
    )
    run.train()
    before = run.predict(data.select(range(8))).predictions
    assert run.compact().max_abs_diff <= 1e-4
    assert (run.predict(data.select(range(8))).predictions == before).all()

    class Doubled(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            return (2 * result[0], result[1]) if isinstance(result, tuple) else 2 * result

    class Mine(SparseTrainerMixin, Doubled):
        pass

    mine = Mine(model=bert(), args=training_arguments(tmp_path), sparsity=SparsityConfig(), train_dataset=rows(64))
    assert mine.train().global_step == 40


# ---- Results ----


def test_saving_while_there_are_gates_writes_the_small_model_and_training_can_go_on(tmp_path: Path) -> None:
    sparsity = SparsityConfig(sparsity_warmup=0, sparsity_ramp=0.9, sparsity_hold=0.05)
    run = trainer(tmp_path, callbacks=[StopAt(30)], sparsity=sparsity)
    run.train()
    batch = {"input_ids": torch.tensor(rows(4)["input_ids"])}
    run.model.eval()
    gated = run.model(**batch).logits
    run.save_model(str(tmp_path / "out"))
    assert gate_bank(run.model) is not None and torch.equal(run.model(**batch).logits, gated)
    loaded = load_pruned(tmp_path / "out").eval()
    torch.testing.assert_close(loaded(**batch).logits, gated, rtol=1e-5, atol=1e-5)
    assert loaded.num_parameters() < bert().num_parameters()


def test_the_report_of_a_compaction_is_that_of_the_whole_run(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    structure = run.structure
    run.train()
    before = run.evaluate()["eval_loss"]
    report = run.compact()
    assert report == run.compact() and run.evaluate()["eval_loss"] == before
    assert report.parameters_before == bert().num_parameters()
    assert report.plan == run.plan() and set(report.plan.kept) == {block.name for block in structure.blocks}
    run.save_model(str(tmp_path / "out"))
    assert load_pruned(tmp_path / "out").num_parameters() == report.parameters_after


# ---- What is refused ----


def test_a_loss_that_becomes_nan_stops_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 22:
                run.model.classifier.bias.data.fill_(float("nan"))

    run = trainer(tmp_path, save_strategy="steps", save_steps=10, callbacks=[Poison()])
    with pytest.raises(NonFiniteLossError, match="NaN or infinite by step 30: lower the learning rate"):
        run.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-20"]
    fresh = trainer(tmp_path)
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert all(torch.isfinite(parameter).all() for parameter in fresh.model.parameters())


def test_a_teacher_for_another_task_is_refused(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=5)
    with pytest.raises(SparsityError, match="num_labels 5 and the model 2"):
        trainer(tmp_path, teacher=BertForSequenceClassification(config))
    model = bert()
    with pytest.raises(SparsityError, match="is the model that is pruned"):
        trainer(tmp_path, model, teacher=model)


def test_gates_of_another_configuration_are_refused(tmp_path: Path) -> None:
    model = bert()
    attach_gates(model, SparsityConfig(target=0.3))
    with pytest.raises(SparsityError, match="another SparsityConfig"):
        trainer(tmp_path, model)


def test_what_is_compared_may_come_from_several_evaluation_sets(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=rows(64))
    run.eval_dataset = {"one": rows(8), "two": rows(4)}
    run.train()
    assert run.compact().max_abs_diff <= 1e-4
