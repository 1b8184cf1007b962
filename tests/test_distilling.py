"""Teachers of every kind of task: what they say is compared as the task's own loss compares, or they are refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from pruning import VOCABULARY, bart, bert, rows, training_arguments
from torch import nn
from transformers import (
    BartForConditionalGeneration,
    BertForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_sparse import SparseTrainer, SparsityConfig, SparsityError
from hf_sparse.compaction.refit import depths
from hf_sparse.distillation.losses import logit_distillation
from hf_sparse.distillation.teacher import Teacher
from hf_sparse.engines.base import Engine
from hf_sparse.engines.zero3 import ZeRO3
from hf_sparse.training.borders import refit_to_teacher_

ENGINE = Engine(Accelerator(cpu=True))

SEARCH = SparsityConfig(target=0.3, sparsity_ramp=0.3, gate_learning_rate=0.2)


def trainer(directory: Path, model: PreTrainedModel, data: Dataset, **options: Any) -> SparseTrainer:
    given = {name: options.pop(name) for name in ("sparsity", "teacher", "compute_loss_func") if name in options}
    arguments = training_arguments(directory, **{"logging_steps": 1, **options})
    return SparseTrainer(model=model, args=arguments, train_dataset=data, **{"sparsity": SEARCH, **given})


def pairs(count: int = 64, source: int = 8, target: int = 6) -> Dataset:
    """Sequences to be translated: labels alone, from which models make the decoder's input."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (count, source + target), generator=generator)
    return Dataset.from_dict({"input_ids": tokens[:, :source].tolist(), "labels": tokens[:, source:].tolist()})


def t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


def whisper() -> PreTrainedModel:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "max_source_positions": 8, "num_mel_bins": 4}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    tokens = {name: 1 for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")}
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=VOCABULARY, **sizes, **heads, **tokens))


@pytest.mark.parametrize("make", [t5, whisper, bart])
def test_models_that_make_the_input_of_their_decoder_from_labels_learn_from_a_teacher(
    make: Any, tmp_path: Path
) -> None:
    model, data = make(), pairs()
    if make is whisper:
        sound = torch.randn(64, 4, 16, generator=torch.Generator().manual_seed(0)).tolist()
        data = data.remove_columns("input_ids").add_column("input_features", sound)
    run = trainer(tmp_path, model, data, teacher=copy.deepcopy(model))
    batch = next(iter(run.get_train_dataloader()))
    assert run.distiller is not None
    with torch.no_grad():
        taught = run.distiller.teacher(run.calls.without_labels(batch))
        torch.testing.assert_close(taught.logits, model.eval()(**batch).logits)
    run.train()
    assert run.compact().max_abs_diff <= 1e-4 and run.costs.removed(
        {name: len(kept) for name, kept in run.plan().kept.items()}
    ) == pytest.approx(0.3, abs=0.05)


def test_a_cached_teacher_of_sequences_says_the_same_again() -> None:
    data = pairs(4, 8, 8).with_format("torch")[:]
    mask = torch.ones_like(data["input_ids"])
    mask[:, 5:] = 0
    inputs = {"input_ids": data["input_ids"], "attention_mask": mask, "labels": data["labels"]}
    cached, plain = (Teacher(bart(), bart(), ENGINE, True, cached) for cached in (True, False))
    expected = plain(inputs)
    for taught in (cached(inputs), cached(inputs)):
        torch.testing.assert_close(taught.logits, expected.logits)
        for one, other in zip(taught.states, expected.states, strict=True):
            torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.02)  # kept in bfloat16


def test_inputs_of_one_number_a_row_are_cached() -> None:
    class Scaled(BertForSequenceClassification):
        def forward(self, input_ids: torch.Tensor, factor: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(input_ids, **kwargs)
            output.logits = output.logits * factor.unsqueeze(1)
            return output

    teacher = Teacher(Scaled(bert().config), bert(), ENGINE, False, True)
    inputs = {"input_ids": torch.tensor(rows(4)["input_ids"]), "factor": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    assert torch.equal(teacher(inputs).logits, teacher(inputs).logits)


def test_only_a_teacher_of_the_same_layers_is_refitted_to(tmp_path: Path) -> None:
    config = copy.deepcopy(bart().config)
    config.decoder_layers = 4
    deeper = BartForConditionalGeneration(config)
    assert depths(deeper) != depths(bart()) and depths(bert()) == depths(bert())
    run = trainer(tmp_path, bart(), pairs(), teacher=deeper)
    before = copy.deepcopy(run.model.state_dict())
    refit_to_teacher_(run, run.calls, [block.output for block in run.structure.blocks])
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_a_teacher_is_compared_as_the_loss_of_the_task_compares(problem: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, generator=generator) for _ in range(2))
    found = logit_distillation(student, teacher, 1.0, problem)
    assert found.shape == (6,) and bool((found > 0).all())
    assert logit_distillation(teacher, teacher, 1.0, problem).abs().max() < 1e-6
    slopes = []
    for loss in (logit_distillation, None):
        logits = student.clone().requires_grad_(True)
        if loss is not None:
            total = loss(logits, teacher, 1.0, problem).mean()
        elif problem == "multi_label_classification":
            total = nn.functional.binary_cross_entropy_with_logits(logits, teacher.sigmoid())
        elif problem == "regression":
            total = nn.functional.mse_loss(logits, teacher)
        else:
            total = nn.functional.cross_entropy(logits, teacher.softmax(-1))
        slopes.append(torch.autograd.grad(total, logits)[0])
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("task", ["multi-label", "loss function"])
def test_accumulation_changes_no_loss(task: str, tmp_path: Path) -> None:
    losses = []
    for steps in (1, 4):
        model, teacher, data = bert(), bert(), rows(8)
        options: dict[str, Any] = {}
        if task == "multi-label":
            for one in (model, teacher):
                one.config.problem_type = "multi_label_classification"
            data = data.map(lambda row: {"labels": [float(row["labels"]), 1.0]})
        else:
            model.accepts_loss_kwargs = False

            def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
                loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
                return loss / num_items_in_batch

            options["compute_loss_func"] = summed
        with torch.no_grad():
            teacher.classifier.weight.mul_(-1)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        split = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 8 // steps}
        run = trainer(tmp_path, model, data, teacher=teacher, max_steps=1, **split, **options)
        run.train()
        losses.append(next(log["loss"] for log in run.state.log_history if "loss" in log))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_teacher_that_a_subclass_does_not_ask_or_whose_labels_differ_is_refused(tmp_path: Path) -> None:
    class Mine(SparseTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return model(**inputs).loss

    given: dict[str, Any] = {"args": training_arguments(tmp_path), "sparsity": SEARCH, "train_dataset": rows(64)}
    with pytest.raises(SparsityError, match="a compute_loss in Mine hides the one that asks it"):
        Mine(model=bert(), teacher=bert(), **given).train()
    model, teacher = bert(), bert()
    model.config.id2label, teacher.config.id2label = {0: "no", 1: "yes"}, {0: "yes", 1: "no"}
    with pytest.raises(SparsityError, match="give both one id2label"):
        SparseTrainer(model=model, teacher=teacher, **given)


def test_a_copy_of_shards_is_refused_as_a_teacher() -> None:
    """ZeRO stage 3 leaves parameters of shape (0,), and a copy of them does not know where the rest is."""
    teacher = bert()
    for parameter in teacher.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(SparsityError, match="load it by from_pretrained"):
        Teacher(copy.deepcopy(teacher), bert(), ZeRO3(ENGINE.accelerator), True, False)
