"""Losses that are not `model(**batch).loss`: the model is estimated, proven and measured on what they call it with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from pruning import bert, llama, rows, training_arguments
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainerCallback, ViTConfig, ViTForImageClassification

from hf_sparse import SparseTrainer, SparseTrainerMixin, SparsityConfig, load_pruned
from hf_sparse.gates.attach import require_bank

SEARCH = SparsityConfig(target=0.4, sparsity_ramp=0.4, gate_learning_rate=0.1)


class Contrastive(Trainer):
    """Pairs of a batch belong together; a pair alone has a loss of zero."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        one, other = (model(input_ids=inputs[f"{side}_ids"]).logits for side in ("anchor", "positive"))
        loss = F.cross_entropy(one @ other.T, torch.arange(len(one)))
        return (loss, {"scores": one @ other.T}) if return_outputs else loss


class Generating(Trainer):
    """Answers are made from prompts, at least two for each, and judged; a row alone cannot be."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        prompts = torch.tensor([row["prompt"] for row in inputs])
        assert len(prompts) % 2 == 0
        answers = self.model.generate(prompts, max_new_tokens=3, min_new_tokens=3, do_sample=True)
        return {"answers": answers, "advantages": torch.linspace(-1, 1, len(prompts))}

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        logits = model(inputs["answers"][:, :-1], use_cache=False).logits  # by position
        chosen = logits.log_softmax(-1).gather(-1, inputs["answers"][:, 1:, None]).squeeze(-1)
        return -(inputs["advantages"] * chosen.mean(1)).mean()


class Scaled(Trainer):
    """Hands the model images that are larger than its own, as it has to be told, and weighs rows by itself."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(pixel_values=inputs["pixel_values"], interpolate_pos_encoding=True)
        loss = (F.cross_entropy(outputs.logits, inputs["classes"], reduction="none") * inputs["weight"]).mean()
        return (loss, outputs) if return_outputs else loss


def pairs() -> Dataset:
    one, other = rows(64, length=6), rows(64, seed=1)
    return Dataset.from_dict({"anchor_ids": one["input_ids"], "positive_ids": other["input_ids"]})


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": rows(64, length=4)["input_ids"]})


def images() -> Dataset:
    pixels = torch.randn(32, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "classes": [0, 1] * 16, "weight": [1.0] * 32})


def vit() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=2, **sizes)).eval()


LOSSES: dict[Any, tuple[Any, Any, dict[str, Any]]] = {
    Contrastive: (bert, pairs, {"input_ids": (8, 6)}),
    Generating: (llama, prompts, {"input_ids": (8, 6)}),
    Scaled: (vit, images, {"pixel_values": (8, 3, 24, 24), "interpolate_pos_encoding": True}),
}


@pytest.mark.parametrize("base", LOSSES)
def test_the_model_is_proven_and_measured_on_what_the_loss_calls_it_with(base: Any, tmp_path: Path) -> None:
    make, data, expected = LOSSES[base]
    options: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["classes"], "max_steps": 20}
    spread: list[float] = []

    class Importances(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 1:
                spread.extend(group.alpha.std().item() for group in require_bank(model).groups.values())

    run = type("Mine", (SparseTrainerMixin, base), {})(
        model=make(),
        args=training_arguments(tmp_path, **options),
        train_dataset=data(),
        data_collator=list if base is Generating else None,
        sparsity=SEARCH,
        callbacks=[Importances()],
    )
    run.train()
    assert min(spread) > 0.05  # they started from the loss, though its rows alone may have none
    assert run.search.in_last_form and run.compact().max_abs_diff <= 1e-4
    batch = run.calls.verification_batch()
    shapes = {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in batch.items()}
    assert shapes == expected and run.measure().batch == expected[run.model.main_input_name]
    run.save_model(str(tmp_path / "out"))
    assert load_pruned(tmp_path / "out").num_parameters() == run.model.num_parameters()


def test_weights_of_the_loss_stay_in_the_optimizer(tmp_path: Path) -> None:
    class Tempered(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits * scale, labels)
            return (loss, outputs) if return_outputs else loss

    class Mine(SparseTrainerMixin, Tempered):
        pass

    model, scale = bert(), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([*model.parameters(), scale], lr=1e-3)
    given = {"optimizers": (optimizer, None), "sparsity": SEARCH, "train_dataset": rows(64)}
    run: Any = Mine(model=model, args=training_arguments(tmp_path, max_steps=20), **given)
    run.train()
    assert run.search.in_last_form and int(run.optimizer.state[scale]["step"]) == 20
    trained = {id(parameter) for parameter in run.optimizer.param_groups[0]["params"]}
    assert trained == {id(parameter) for parameter in (*run.model.parameters(), scale)}


def test_a_run_whose_batches_are_not_the_models_is_resumed(tmp_path: Path) -> None:
    class Mine(SparseTrainerMixin, Contrastive):
        pass

    def run(**options: Any) -> Any:
        arguments = training_arguments(tmp_path, remove_unused_columns=False, max_steps=20, **options)
        return Mine(model=bert(), args=arguments, train_dataset=pairs(), sparsity=SEARCH)

    first, again = run(save_strategy="steps", save_steps=18), run()
    first.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-18"))
    assert again.plan() == first.plan()
    assert all(torch.equal(again.model.state_dict()[name], tensor) for name, tensor in first.model.state_dict().items())


def test_batches_that_go_into_the_model_are_those_of_the_evaluation_data(tmp_path: Path) -> None:
    given = {"train_dataset": rows(64), "eval_dataset": rows(16, seed=1), "sparsity": SparsityConfig(warm_start=0.0)}
    run = SparseTrainer(model=bert(), args=training_arguments(tmp_path, max_steps=1), **given)
    before = run.calls.verification_batch()
    run.train()
    after = run.calls.verification_batch()
    assert before.keys() == after.keys() == {"input_ids"} and torch.equal(
        *(one["input_ids"] for one in (before, after))
    )
    assert torch.equal(after["input_ids"], torch.tensor(rows(16, seed=1)["input_ids"])[:8])


# ---- Batches without labels ----


def unlabelled(data: Dataset, of: list[int]) -> Dataset:
    labels = [[-100] * len(row["input_ids"]) if i in of else row["input_ids"] for i, row in enumerate(data)]
    return Dataset.from_dict({"input_ids": data["input_ids"], "labels": labels})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_without_labels_ends_no_training(accumulation: int, tmp_path: Path) -> None:
    arguments = training_arguments(
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        max_steps=8,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=4,
    )
    data = unlabelled(rows(8 * accumulation), of=[0, 3, 4])
    run = SparseTrainer(model=llama(), args=arguments, train_dataset=data, sparsity=SparsityConfig(warm_start=0.0))
    run.train()
    losses = torch.tensor([line["loss"] for line in run.state.log_history if "loss" in line])
    assert run.state.global_step == 8 and bool(losses.isfinite().any())
    assert bool(losses.isnan().any()) == (accumulation == 1)  # as Trainer logs them
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())
    assert (tmp_path / "checkpoint-8").is_dir()


@pytest.mark.parametrize(("make", "heeds"), [(bert, False), (llama, True)])
def test_whether_a_loss_counts_items_is_not_read_off_a_batch_without_labels(
    make: Any, heeds: bool, tmp_path: Path
) -> None:
    data = rows(8) if make is bert else unlabelled(rows(8), of=[])
    arguments = training_arguments(tmp_path, gradient_accumulation_steps=2)
    run = SparseTrainer(model=make(), args=arguments, train_dataset=data, sparsity=SparsityConfig())
    batch = next(iter(run.get_train_dataloader()))
    for labels, probed, accepts in [
        (torch.full_like(batch["labels"], -100), False, True),
        (batch["labels"], True, heeds),
    ]:
        run.calls.record({**batch, "labels": labels})
        run.calls.probe()
        assert (run.calls.is_probed, run.model_accepts_loss_kwargs) == (probed, accepts)
