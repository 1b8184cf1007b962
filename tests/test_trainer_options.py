"""What users give to a Trainer works with gates, or is refused before it does harm."""

import copy
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import StopAt, bart, bert, rows, trainer, training_arguments
from torch import nn
from transformers import GenerationConfig, Trainer, get_linear_schedule_with_warmup
from zoo import ZOO

from hf_sparse import (
    NonFiniteLossError,
    SparseTrainer,
    SparseTrainerMixin,
    SparseWeightsTrainer,
    SparsityConfig,
    SparsityError,
    WeightSparsityConfig,
    compact,
    load_pruned,
)
from hf_sparse.checkpoint.inspection import inspect_checkpoint
from hf_sparse.cli import main
from hf_sparse.gates.attach import attach_gates, require_bank
from hf_sparse.report import report
from hf_sparse.runtime.copies import copied

MASKS = SparsityConfig(target=0.4, sparsity_ramp=0.4, gate_learning_rate=0.1, warm_start=0.0)
WEIGHTS = WeightSparsityConfig(target=0.4, sparsity_ramp=0.4, gate_learning_rate=0.1, warm_start=0.0)


def test_schedulers_that_would_stop_the_search_are_refused(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    own = optimizer, get_linear_schedule_with_warmup(optimizer, 1, 40)
    given: dict[str, Any] = {"sparsity": SparsityConfig(), "train_dataset": rows(64)}
    with pytest.raises(SparsityError, match=r"give \(optimizer, None\)"):
        SparseTrainer(model=model, args=training_arguments(tmp_path), optimizers=own, **given)
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 5}
    with pytest.raises(SparsityError, match="ReduceLROnPlateau would also slow the gates down"):
        trainer(tmp_path, **plateau).train()


def test_an_optimizer_of_ones_own_trains(tmp_path: Path) -> None:
    model = bert()
    run = SparseTrainer(
        model=model,
        args=training_arguments(tmp_path),
        optimizers=(torch.optim.SGD(model.parameters(), lr=1e-3), None),
        sparsity=SparsityConfig(target=0.3, sparsity_ramp=0.3),
        train_dataset=rows(64),
    )
    run.train()
    assert run.compact().parameters_after < run.compact().parameters_before


def test_frozen_layers_keep_their_units_and_weights(tmp_path: Path) -> None:
    model = bert()
    frozen = model.bert.encoder.layer[0].requires_grad_(False)
    before = copy.deepcopy(frozen.state_dict())
    run = trainer(tmp_path, model, teacher=bert(), sparsity=SparsityConfig(target=0.5, sparsity_ramp=0.3))
    run.train()
    kept = run.compact().plan.kept
    assert len(kept["bert.encoder.layer.0.intermediate"]) == 40 > len(kept["bert.encoder.layer.1.intermediate"]) > 0
    after = model.bert.encoder.layer[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_trainer_may_take_the_number_of_items_by_name_alone(tmp_path: Path) -> None:
    class Base(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)

    class Mine(SparseTrainerMixin, Base):
        pass

    for teacher in (None, bert()):
        given: dict[str, Any] = {"sparsity": SparsityConfig(), "teacher": teacher, "train_dataset": rows(64)}
        run = Mine(model=bert(), args=training_arguments(tmp_path, max_steps=2), **given)
        assert run.train().global_step == 2


def test_nan_before_a_stage_ends_leaves_no_model(tmp_path: Path) -> None:
    class Spoil(StopAt):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == self.step:
                with torch.no_grad():
                    model.classifier.bias.fill_(float("nan"))

    sparsity = SparsityConfig(targets=[0.3, 0.5])
    steps: dict[str, Any] = {"max_steps": 60, "logging_steps": 1000, "save_strategy": "steps", "save_steps": 20}
    run = trainer(tmp_path, sparsity=sparsity, callbacks=[Spoil(27)], **steps)
    with pytest.raises(NonFiniteLossError):
        run.train()
    assert not list(tmp_path.glob("removed-*"))


def test_metrics_of_all_evaluation_sets_are_reported(tmp_path: Path) -> None:
    nested = {"accuracy": 0.5, "by_class": {"a": 1.0}}
    run = trainer(tmp_path, compute_metrics=lambda prediction: nested)
    run.eval_dataset = {"a": rows(8, seed=1), "b": rows(8, seed=2)}
    run.train()
    run.evaluate()
    metrics = run.measure().pruned.metrics["evaluation"]
    assert {"a_loss", "b_loss", "a_accuracy", "b_accuracy"} == metrics.keys()


def test_both_models_are_measured_in_their_own_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, bf16=True)
    run.train()
    run.compact()
    seen: list[torch.dtype] = []

    def latencies(models: list[Any], inputs: Any) -> list[float]:
        for model in models:
            # Inside the model: what accelerate puts around it turns outputs back into float32.
            model.classifier.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
            model(**inputs)
        return [1.0, 1.0]

    monkeypatch.setattr(report, "latencies_ms", latencies)
    run.measure()
    assert set(seen) == {torch.float32}


def test_sigterm_saves_where_only_the_best_are_saved(tmp_path: Path) -> None:
    class Terminate(StopAt):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.step:
                os.kill(os.getpid(), signal.SIGTERM)

    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    with pytest.raises(SystemExit):
        trainer(tmp_path, callbacks=[Terminate(4)], **best).train()
    assert (tmp_path / "checkpoint-4/sparsity_state.json").is_file()


def test_a_metric_that_is_not_there_is_said_at_the_first_evaluation(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "acuracy", "save_strategy": "steps"}
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, **best)
    with pytest.raises(KeyError, match="acuracy"):
        run.train()
    assert run.state.global_step == 2


def test_a_run_does_not_go_on_with_another_target(tmp_path: Path) -> None:
    trainer(tmp_path, sparsity=SparsityConfig(target=0.3), callbacks=[StopAt(3)]).train()
    state = json.loads((tmp_path / "checkpoint-3/sparsity_state.json").read_text())
    assert state["settings"]["target"] == 0.3 and "distillation_weight" not in state["settings"]
    other = trainer(tmp_path, sparsity=SparsityConfig(target=0.8))
    with pytest.raises(SparsityError, match=r"target=0.3 \(now 0.8\): go on with the same, or start anew"):
        other.train(resume_from_checkpoint=True)
    same = SparsityConfig(target=0.3, distillation_weight=0.9)
    assert trainer(tmp_path, sparsity=same).train(resume_from_checkpoint=True).global_step == 40


def test_a_first_step_that_was_interrupted_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, teacher=bert(layers=4), max_steps=1)
    monkeypatch.setattr(run.search, "start_gates_", lambda inputs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    monkeypatch.undo()
    run.train()
    assert run.run.layer_map is not None and len(run.run.layer_map) == 2
    assert all(group.alpha.std() > 0 for group in require_bank(run.model).groups.values())


def test_gated_encoders_generate_what_the_compact_model_does() -> None:
    model = bart()
    bank = attach_gates(model, SparsityConfig())
    with torch.no_grad():
        for group in bank.groups.values():
            group.alpha[::2] = -9.0
    tokens = torch.tensor(rows(3)["input_ids"])
    small = copy.deepcopy(model)
    compact(small)
    wanted = GenerationConfig(max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    wanted.decoder_start_token_id, wanted.pad_token_id = 2, 1
    one, other = (each.eval().generate(tokens, generation_config=wanted) for each in (model, small))
    for gated, compacted in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(gated, compacted, rtol=1e-4, atol=1e-4)


def test_a_model_that_keeps_states_of_its_forward_is_saved_while_it_has_gates(tmp_path: Path) -> None:
    species, data = ZOO["recurrent_gemma"], rows(8).map(lambda row: {"labels": row["input_ids"]})
    arguments = training_arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    run = SparseTrainer(model=species.make(), args=arguments, train_dataset=data, sparsity=SparsityConfig())
    run.train()
    assert any(state.grad_fn is not None for state in recurrent_states(run.model))
    run.save_model(str(tmp_path / "out"))
    run.measure()
    assert all(state.grad_fn is None for state in recurrent_states(copied(run.model)))
    load_pruned(tmp_path / "out")


def recurrent_states(model: nn.Module) -> list[torch.Tensor]:
    return [state for module in model.modules() if (state := vars(module).get("recurrent_states")) is not None]


def test_what_cannot_be_trained_is_refused_before_it_is(tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match="Linear is not a model of transformers"):
        attach_gates(nn.Linear(2, 2), SparsityConfig())  # type: ignore[arg-type]
    with pytest.raises(SparsityError, match=r"such as SparsityConfig\(target=0.5\)"):
        trainer(tmp_path, sparsity=0.5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # its name until transformers 6
@pytest.mark.parametrize("how", [{"use_reentrant": True}, {"preserve_rng_state": True}])  # torch's default is to be so
@pytest.mark.parametrize("by", ["arguments", "model"])
def test_reentrant_checkpointing_is_refused_whoever_asks_for_it(by: str, how: dict[str, bool], tmp_path: Path) -> None:
    asked = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": how} if by == "arguments" else {}
    run = trainer(tmp_path, **asked)
    if by == "model":
        run.model.gradient_checkpointing_enable(how)
    with pytest.raises(SparsityError, match="use_reentrant=True goes backward layer by layer"):
        run.train()
    assert run.state.global_step == 0
    if by == "model":
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
        run.args.max_steps = 1
        assert run.train().global_step == 1


@pytest.mark.parametrize("sparsity", [MASKS, replace(MASKS, targets=[0.2, 0.4]), WEIGHTS])
def test_where_all_weights_are_frozen_the_gates_alone_are_learnt(sparsity: Any, tmp_path: Path) -> None:
    model = bert()
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    kind: Any = SparseWeightsTrainer if sparsity is WEIGHTS else SparseTrainer
    arguments = training_arguments(tmp_path, max_steps=40)
    run = kind(model=model, args=arguments, sparsity=sparsity, train_dataset=rows(64), eval_dataset=rows(8))
    run.train()
    assert run.search.in_last_form and run.state.global_step < 40
    left, target = run.search.form.density_left()
    assert left == pytest.approx(target, abs=0.03)
    run.save_model(str(tmp_path / "out"))
    if kind is SparseTrainer:
        assert load_pruned(tmp_path / "out").num_parameters() < bert().num_parameters()
        for target in sparsity.targets or ():
            assert (tmp_path / f"removed-{target:g}/report.json").is_file()
    for name in ("classifier.weight", "bert.embeddings.word_embeddings.weight"):
        assert torch.equal(run.model.state_dict()[name], before[name])
    with pytest.raises(SparsityError, match="nothing trains"):
        run.train()


def test_a_checkpoint_with_gates_is_not_shown_or_pushed_as_a_model(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[StopAt(3)]).train()
    for command in (["inspect"], ["card"], ["push", "me/small"]):
        with pytest.raises(SystemExit):
            main([command[0], str(tmp_path / "checkpoint-3"), *command[1:]])
    with pytest.raises(SparsityError, match="has gates in it"):
        inspect_checkpoint(tmp_path / "checkpoint-3")


def test_a_card_says_what_example_scripts_give(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    run.measure()
    run.create_model_card(finetuned_from="me/dense", tasks="text-classification", dataset="GLUE", dataset_tags="glue")
    card = (tmp_path / "README.md").read_text()
    assert "me/dense" in card and "GLUE" in card and "structured-sparsity" in card
    assert load_pruned(tmp_path).num_parameters() < bert().num_parameters()
    origin = json.loads((tmp_path / "report.json").read_text())["origin"]
    assert origin["dataset_id"] == "glue" and origin["base_model"] == "me/dense"
