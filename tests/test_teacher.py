"""What a teacher is asked and compared by: a model is its own perfect teacher, whatever its task and its batches."""

import copy
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from pruning import VOCABULARY, bert, llama, rows, training_arguments
from torch import Tensor, nn
from transformers import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DataCollatorWithFlattening,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.utils.logging import get_logger

from hf_sparse import (
    DenseTrainer,
    DenseTrainerMixin,
    DistillationConfig,
    SparseTrainer,
    SparsityConfig,
    SparsityError,
)
from hf_sparse.distillation.answers import class_axis, token_mask
from hf_sparse.distillation.listening import without_labels
from hf_sparse.distillation.losses import drawn_logits, logit_distillation
from hf_sparse.distillation.teacher import Teacher
from hf_sparse.engines.base import Engine

ALONE = DistillationConfig(distillation_weight=1.0)
ENGINE = Engine(Accelerator(cpu=True))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = get_logger("hf_sparse")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        yield caplog
    logger.removeHandler(caplog.handler)


def pupil(model: PreTrainedModel, directory: Path, **options: Any) -> DenseTrainer:
    """A trainer whose model does not drop anything out and learns from a copy of itself."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    given: dict[str, Any] = {"teacher": copy.deepcopy(model), "distillation": ALONE} | {
        name: options.pop(name)
        for name in ("teacher", "distillation", "train_dataset", "data_collator", "compute_loss_func")
        if name in options
    }
    return DenseTrainer(model=model.train(), args=training_arguments(directory, **options), **given)


def distances(trainer: DenseTrainer, batch: dict[str, Any]) -> dict[str, float]:
    """What a batch adds to the losses that are logged."""
    trainer.distiller.logged()
    trainer.compute_loss(trainer.model, batch)
    return {name: loss.item() for name, loss in trainer.distiller.logged().items()}


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def question_answering() -> tuple[PreTrainedModel, dict[str, Any]]:
    labels = {name: torch.tensor([1, 2]) for name in ("start_positions", "end_positions")}
    return BertForQuestionAnswering(bert().config), {"input_ids": tokens(2, 8), **labels}


def multiple_choice() -> tuple[PreTrainedModel, dict[str, Any]]:
    return BertForMultipleChoice(bert().config), {"input_ids": tokens(2, 3, 8), "labels": torch.tensor([1, 2])}


def embedding() -> tuple[PreTrainedModel, dict[str, Any]]:
    return BertModel(bert().config), {"input_ids": tokens(2, 8)}


def segmentation() -> tuple[PreTrainedModel, dict[str, Any]]:
    sizes = {"hidden_sizes": [16, 32], "num_attention_heads": [2, 4], "decoder_hidden_size": 16, "num_labels": 5}
    shape = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2]}
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, **shape, mlp_ratios=[2, 2], drop_path_rate=0.0))
    model.decode_head.batch_norm = nn.Identity()  # which knows other means while training
    return model, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.zeros(2, 32, 32).long()}


def detection() -> tuple[PreTrainedModel, dict[str, Any]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    config = YolosConfig(**sizes, image_size=[32, 32], patch_size=8, num_detection_tokens=5)
    found = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    return YolosForObjectDetection(config), {"pixel_values": torch.randn(2, 3, 32, 32), "labels": [found, found]}


def speech() -> tuple[PreTrainedModel, dict[str, Any]]:
    """Frames of sound of which one row is shorter, and layers that are skipped at random unless a teacher is there."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    layers = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4}
    exact = {"feat_extract_norm": "layer", "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
    config = Wav2Vec2Config(vocab_size=VOCABULARY, layerdrop=0.9, pad_token_id=0, **sizes, **layers, **exact)
    mask = torch.ones(2, 400).long()
    mask[1, 205:] = 0
    sound = torch.randn(2, 400, generator=torch.Generator().manual_seed(0)) * mask
    return Wav2Vec2ForCTC(config), {"input_values": sound, "attention_mask": mask, "labels": tokens(2, 4)}


@pytest.mark.parametrize("make", [question_answering, multiple_choice, embedding, segmentation, detection, speech])
def test_a_model_is_its_own_perfect_teacher_in_every_task(make: Any, tmp_path: Path) -> None:
    model, batch = make()
    config = DistillationConfig(distillation_weight=1.0 if make is embedding else 0.5)
    options = {"compute_loss_func": lambda outputs, *_, **__: outputs.pred_boxes.mean()} if make is detection else {}
    trainer = pupil(model, tmp_path, distillation=config, **options)  # the loss of the model itself needs scipy
    found = distances(trainer, dict(batch))
    without = {embedding, detection}  # one predicts nothing, the other a set, whose entries are of no order
    assert found.keys() == {"hidden_loss"} | ({"logits_loss"} if make not in without else set()) | (
        {"task_loss"} if make is not embedding else set()
    )
    assert all(abs(found[name]) < 1e-5 for name in ("logits_loss", "hidden_loss") if name in found)
    with torch.no_grad():
        for parameter in trainer.distiller.teacher.model.parameters():  # type: ignore[union-attr]
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert all(distances(trainer, dict(batch))[name] > 1e-4 for name in found)


@pytest.mark.parametrize("kind", ["padded", "flattened", "flattened for flash attention"])
def test_a_model_is_its_own_perfect_teacher_of_all_batches_of_text(kind: str, tmp_path: Path) -> None:
    data = Dataset.from_dict({"input_ids": [row[: 8 - index % 4] for index, row in enumerate(tokens(8, 8).tolist())]})
    collator: Any = DataCollatorWithFlattening(return_flash_attn_kwargs="flash" in kind)
    if kind == "padded":
        data = data.map(lambda row: {"attention_mask": [1] * len(row["input_ids"]), "labels": row["input_ids"]})
        data = data.map(
            lambda row: {name: (values + [0 if name != "labels" else -100] * 8)[:8] for name, values in row.items()}
        )
        collator = None
    trainer = pupil(llama(), tmp_path, train_dataset=data, data_collator=collator)
    batch = next(iter(trainer.get_train_dataloader()))
    assert all(abs(distance) < 1e-6 for name, distance in distances(trainer, batch).items() if name != "task_loss")
    if kind != "padded":
        starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
        examples = [batch["input_ids"][:, start:end] for start, end in itertools.pairwise(starts)]
        assert trainer.distiller is not None and len(examples) == 8
        taught = trainer.distiller.teacher(without_labels(trainer.bare_model, batch, trainer.label_names)).logits
        torch.testing.assert_close(taught, torch.cat([llama()(example).logits for example in examples], 1))


def test_a_teacher_that_draws_its_tokens_at_random_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    decoder = {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 32, "decoder_num_attention_heads": 4}
    model = ViTMAEForPreTraining(ViTMAEConfig(**sizes, **decoder, image_size=32, patch_size=8))
    with pytest.raises(SparsityError, match="says something else to the same inputs each time"):
        distances(pupil(model, tmp_path), {"pixel_values": torch.randn(2, 3, 32, 32)})


def test_padding_counts_nothing_where_rows_are_sound_or_choices(tmp_path: Path) -> None:
    model, batch = speech()
    del batch["labels"]
    trainer = pupil(model, tmp_path, teacher=type(model)(model.config))
    together = distances(trainer, dict(batch))
    alone = [
        distances(
            trainer,
            {name: values[row : row + 1, : int(batch["attention_mask"][row].sum())] for name, values in batch.items()},
        )
        for row in range(2)
    ]
    assert together["hidden_loss"] == pytest.approx(sum(one["hidden_loss"] for one in alone) / 2, rel=1e-3)
    frames = [model._get_feat_extract_output_lengths(int(samples)) for samples in batch["attention_mask"].sum(1)]
    parts = [one["logits_loss"] * int(count) for one, count in zip(alone, frames)]
    assert together["logits_loss"] == pytest.approx(sum(parts) / sum(map(int, frames)), rel=1e-3)

    model, batch = multiple_choice()
    trainer = pupil(model, tmp_path, teacher=type(model)(model.config))
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    padded = {name: nn.functional.pad(batch[name], (0, 4)) for name in ("input_ids", "attention_mask")}
    expected, found = distances(trainer, dict(batch)), distances(trainer, batch | padded)
    assert found == pytest.approx(expected, rel=1e-4)


def test_classes_are_where_the_model_says_that_it_has_as_many() -> None:
    counts = {5, 99}
    assert class_axis((2, 7), counts, None) == -1 and class_axis((2, 7, 99), counts, None) == -1
    assert class_axis((2, 5, 8, 8), counts, None) == 1 and class_axis((2, 3, 7, 99), counts, None) == -1
    assert class_axis((2, 16, 192), counts, None) is None  # pixels of patches
    assert class_axis((2, 16, 17), counts, torch.zeros(2, 16)) == -1  # a head of one's own
    mask = torch.tensor([[1, 1], [1, 0]])
    assert token_mask(nn.Identity(), mask, (2, 3)) is None and token_mask(nn.Identity(), mask, (2,)) is None
    copies = token_mask(nn.Identity(), mask, (2, 2, 3))
    assert copies is not None and torch.equal(copies, mask[:, :, None].expand(2, 2, 3))


def llava(vocabulary: int) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
    text = {**sizes, "vocab_size": vocabulary, "pad_token_id": 0, "model_type": "llama"}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=1))


def test_a_teacher_that_cannot_be_compared_is_refused_before_training(tmp_path: Path) -> None:
    wide = llama()
    wide.lm_head = nn.Linear(32, VOCABULARY + 6, bias=False)  # a head padded to more than the config says
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config={**sizes, "vocab_size": 99}, vision_config={**sizes, "image_size": 32}))
    refused = {
        "vocab_size 105 and the model 99": (llava(99), llava(105)),
        "outputs of its head 105 and the model 99": (llama(), wide),
        "predicts end_logits, start_logits and the model logits": (bert(), BertForQuestionAnswering(bert().config)),
        "CLIPModel has neither logits nor": (clip, copy.deepcopy(clip)),
    }
    for words, (model, teacher) in refused.items():
        with pytest.raises(SparsityError, match=words):
            DenseTrainer(model, training_arguments(tmp_path), teacher=teacher, distillation=ALONE)
    with pytest.raises(SparsityError, match="BertModel has neither logits nor, unless hidden_distillation_weight is 0"):
        Teacher(BertModel(bert().config), BertModel(bert().config), ENGINE, False, False)
    short = pupil(bert(3), tmp_path, teacher=bert(2), train_dataset=rows(8))
    with pytest.raises(SparsityError, match="3 hidden states for the 2 of its teacher"):
        short.train()


# ---- Rows that are remembered ----


def test_rows_with_choices_and_tokens_that_are_classes_are_remembered() -> None:
    for make in (multiple_choice, question_answering):
        model, batch = make()
        inputs = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
        inputs["attention_mask"][1, ..., 5:] = 0
        cached, plain = (Teacher(copy.deepcopy(model), model, ENGINE, True, on) for on in (True, False))
        for width in (0, 4, 0, 4):
            wider = {name: nn.functional.pad(values, (0, width)) for name, values in inputs.items()}
            found, expected = cached(wider), plain(wider)
            for name, head in expected.heads.items():
                torch.testing.assert_close(found.heads[name], head, msg=name)
            for one, other in zip(found.states, expected.states, strict=True):
                torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.02)  # kept in bfloat16


def test_what_is_no_row_of_the_data_is_not_remembered() -> None:
    teacher = Teacher(llama(), llama(), ENGINE, True, True)
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    for collator in (flat, DataCollatorWithFlattening()):
        with pytest.raises(SparsityError, match="cache_teacher does not go with packed rows"):
            teacher(collator([{"input_ids": row} for row in tokens(2, 8).tolist()]))
    with pytest.raises(SparsityError, match=r"one entry per row \(of input_ids 2, pixel_values 3"):
        teacher({"input_ids": tokens(2, 8), "pixel_values": torch.zeros(3, 4)})

    class Contrasted(BertForSequenceClassification):
        def forward(self, **inputs: Any) -> Any:
            outputs = super().forward(**inputs)
            outputs.logits = outputs.logits - outputs.logits.mean(0)
            return outputs

    teacher = Teacher(Contrasted(bert().config), bert(), ENGINE, True, True)
    with pytest.raises(SparsityError, match="depends on the rows beside it"):
        teacher({"input_ids": tokens(2, 8)})


def test_rows_that_are_new_in_every_epoch_are_said_and_not_remembered(warnings: pytest.LogCaptureFixture) -> None:
    teacher, plain = (Teacher(bert(), bert(), ENGINE, False, on, rows=4) for on in (True, False))
    for epoch in range(3):
        masked = {"input_ids": tokens(4, 8).index_fill(1, torch.tensor([epoch]), 1)}
        torch.testing.assert_close(teacher(masked).logits, plain(masked).logits)
        assert ("cache_teacher is of no use, and off" in warnings.text) == (epoch > 0)


# ---- Losses ----


def test_without_labels_a_model_learns_from_its_teacher_alone(tmp_path: Path) -> None:
    data, model = rows(64).remove_columns("labels"), bert()
    given: dict[str, Any] = {"args": training_arguments(tmp_path, logging_steps=1, max_steps=20), "train_dataset": data}
    with pytest.raises(SparsityError, match="set distillation_weight to 1, which learns from the teacher alone"):
        SparseTrainer(model=bert(), teacher=bert(), sparsity=SparsityConfig(target=0.3), **given).train()
    search = SparsityConfig(target=0.3, sparsity_ramp=0.3, distillation_weight=1.0)
    for teacher in (copy.deepcopy(model), BertModel(model.config)):
        student = copy.deepcopy(teacher)
        trainer = SparseTrainer(model=student, teacher=teacher, sparsity=search, **given)
        importances: list[Tensor] = []
        start = trainer.search.start_gates_

        def started(
            inputs: Any, trainer: SparseTrainer = trainer, start: Any = start, found: list[Tensor] = importances
        ) -> None:
            start(inputs)
            found.extend(one.detach().clone() for one in trainer.bank.block_importances().values())

        trainer.search.start_gates_ = started  # type: ignore[method-assign]
        trainer.train()
        # Also of a copy of the teacher, where the distance has no slope, some are more important than others.
        assert all(one.std() > 0.01 for one in importances) and len(importances) == 4
        assert trainer.compact().max_abs_diff <= 1e-4
        assert trainer.state.log_history[-2]["hidden_loss"] > 0 and "task_loss" not in trainer.state.log_history[0]


def test_drawn_answers_have_the_curvature_of_the_distance_as_the_square_of_their_slope() -> None:
    logits = torch.tensor([[0.5, -1.0, 0.2]])
    for problem in (None, "multi_label_classification", "regression"):
        student = logits.expand(20_000, 3).clone().requires_grad_(True)
        drawn = drawn_logits(student.detach(), problem)
        square = (
            torch.autograd.grad(logit_distillation(student, drawn, 1.0, problem).sum(), student)[0].square().mean(0)
        )

        def distance(ours: Tensor, problem: str | None = problem) -> Tensor:
            return logit_distillation(ours, logits[0], 1.0, problem).sum()

        ratio = square / torch.autograd.functional.hessian(distance, logits[0]).diagonal()
        torch.testing.assert_close(ratio / ratio.mean(), torch.ones(3), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("steps", [1, 2])
def test_losses_are_logged_apart_as_the_loss_is(steps: int, tmp_path: Path) -> None:
    split = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 8 // steps}
    config = DistillationConfig(distillation_weight=0.3, hidden_distillation_weight=2.0)
    trainer = pupil(
        bert(), tmp_path, distillation=config, train_dataset=rows(64), max_steps=8, logging_steps=3, **split
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logs) == 2 and logs[-1]["hidden_loss"] > 0
    for line in logs:
        mixed = 0.7 * line["task_loss"] + 0.3 * line["logits_loss"] + 2.0 * line["hidden_loss"]
        assert line["loss"] == pytest.approx(mixed, rel=1e-4)


def test_every_forward_of_a_loss_is_compared(tmp_path: Path) -> None:
    """With what the loss gave the model, by name or by position, and however many there are."""

    class Contrastive(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            first, second = model(inputs["anchor"]), model(input_ids=inputs["other"])
            loss = (first.logits - second.logits).square().mean()
            with torch.no_grad():
                model(input_ids=inputs["other"][:, :1])
            return (loss, {}) if return_outputs else loss

    class Mine(DenseTrainerMixin, Contrastive):
        pass

    trainer = Mine(model=bert().train(), args=training_arguments(tmp_path))
    trainer.learn_from_(bert(), ALONE)
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    asked: list[Tensor] = []
    teacher = trainer.distiller.teacher
    ask = teacher.ask

    def spy(inputs: Any) -> Any:
        asked.append(inputs["input_ids"])
        return ask(inputs)

    teacher.ask, teacher._proven = spy, True
    batch = {"anchor": tokens(2, 8), "other": tokens(4, 8)[2:]}
    trainer.compute_loss(trainer.model, dict(batch))
    assert [torch.equal(one, other) for one, other in zip(asked, batch.values(), strict=True)] == [True, True]
    losses = trainer.distiller.logged()
    assert losses["hidden_loss"].item() < 1e-6 < losses["task_loss"].item()
