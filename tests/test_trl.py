"""TRL's Trainers, whose loss is fused with the model's head and has no outputs to learn from, prune like Trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from pruning import VOCABULARY, llama, training_arguments
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from hf_sparse import SparseTrainer, SparseTrainerMixin, SparsityConfig, load_pruned
from hf_sparse.costs.macs import count_macs
from hf_sparse.training.resume import checkpoint_defect

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # which TRL still says
    pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning"),
]
SEARCH = SparsityConfig(target=0.4, sparsity_ramp=0.3)
SETTINGS = {"max_length": 16, "bf16": False}


class SparseSFTTrainer(SparseTrainerMixin, SFTTrainer):
    pass


class SparseGRPOTrainer(SparseTrainerMixin, GRPOTrainer):
    pass


class SparseDPOTrainer(SparseTrainerMixin, DPOTrainer):
    pass


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {
        word: index for index, word in enumerate(["[UNK]", "<s>", "</s>", "<pad>", *map(str, range(4, VOCABULARY))])
    }
    model = WordLevel(words, unk_token="[UNK]")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tokens(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (count, length), generator=generator).tolist()


def arguments(kind: Any, directory: Path, **options: Any) -> Any:
    names = (
        "output_dir",
        "per_device_train_batch_size",
        "max_steps",
        "learning_rate",
        "logging_steps",
        "save_strategy",
    )
    usual = training_arguments(directory, logging_steps=1)
    return kind(**{name: getattr(usual, name) for name in names}, report_to=[], use_cpu=True, **(options or SETTINGS))


def densities(trainer: Trainer) -> list[float]:
    return [line["density"] for line in trainer.state.log_history if "density" in line]


def test_supervised_fine_tuning_learns_what_trainer_learns(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, teacher = llama(), llama()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    data = Dataset.from_dict({"input_ids": tokens(64, 8)})
    given = {"sparsity": SEARCH, "teacher": teacher, "processing_class": tokenizer}
    settings = arguments(SFTConfig, tmp_path / "sft")
    settings.save_strategy, settings.save_steps = "steps", 10
    tuned = SparseSFTTrainer(model=copy.deepcopy(model), args=settings, train_dataset=data, **given)
    usual = training_arguments(tmp_path / "plain", logging_steps=1)
    plain = SparseTrainer(
        model=model, args=usual, train_dataset=tuned.train_dataset, data_collator=tuned.data_collator, **given
    )
    tuned.train()
    assert not tuned._metrics["eval"]  # nothing was evaluated: importances were estimated
    plain.train()
    assert densities(tuned) == pytest.approx(densities(plain), abs=1e-3) and densities(tuned)[-1] < 0.65
    expected = plain.model.state_dict()
    for name, tensor in tuned.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-3, msg=name)
    assert checkpoint_defect(tmp_path / "sft/checkpoint-10") is None and not (tmp_path / "sft/config.json").exists()
    batch = {"input_ids": torch.tensor(tokens(4, 8, seed=1))}
    report = tuned.measure(batch)
    assert report.dense.macs == count_macs(llama(), batch) > report.pruned.macs == count_macs(plain.model, batch)
    tuned.create_model_card(dataset_name="me/texts")
    assert "me/texts" in (tmp_path / "sft/README.md").read_text()
    tuned.save_model(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(load_pruned(tmp_path / "out")(**batch).logits, tuned.model.eval()(**batch).logits)


@pytest.mark.parametrize("rows", ["packed", "flattened", "padded"])
@pytest.mark.parametrize("loss", ["fused", "smoothed"])
def test_a_model_is_its_own_perfect_teacher(
    rows: str, loss: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of rows with several examples, too, in which transformers sees no borders where there is a cache."""
    settings = arguments(SFTConfig, tmp_path)
    settings.packing, settings.padding_free = rows == "packed", rows == "flattened"
    settings.max_length = None if rows == "flattened" else 16
    settings.label_smoothing_factor = 0.1 if loss == "smoothed" else 0.0
    data = Dataset.from_dict({"input_ids": [row[: 8 - index % 4] for index, row in enumerate(tokens(32, 8))]})
    model = llama()
    trainer = SparseSFTTrainer(
        model=model,
        teacher=copy.deepcopy(model),
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
        sparsity=SEARCH,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("position_ids" in batch) == (rows != "padded")
    trainer.compute_loss(trainer.model.train(), dict(batch))
    losses = trainer.distiller.logged()
    assert losses["task_loss"] > 1
    assert max(losses[name].abs().item() for name in ("logits_loss", "hidden_loss")) < 1e-6


def test_what_was_trained_by_trl_before_runs_itself(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """TRL leaves a forward on a model that holds on to the one before, which a copy would have of the original."""
    data = Dataset.from_dict({"input_ids": tokens(32, 12), "labels": tokens(32, 12)})
    dense = llama()
    SFTTrainer(dense, arguments(SFTConfig, tmp_path), train_dataset=data, processing_class=tokenizer).train()
    run = SparseSFTTrainer(
        model=copy.deepcopy(dense),
        args=arguments(SFTConfig, tmp_path),
        train_dataset=data,
        processing_class=tokenizer,
        sparsity=SEARCH,
        teacher=copy.deepcopy(dense),
    )
    inputs = {"input_ids": torch.tensor(tokens(2, 12, seed=1))}
    with torch.no_grad():
        expected = dense(**inputs).logits
        torch.testing.assert_close(run.distiller.teacher.model(**inputs).logits, expected)
        run.model.get_output_embeddings().weight.mul_(2.0)
        torch.testing.assert_close(run.model(**inputs).logits, 2 * expected)
        run.model.get_output_embeddings().weight.mul_(0.5)
    run.train()
    run.compact()
    run.model.eval()
    run.save_model(str(tmp_path / "saved"))
    found = run.model(**inputs).logits
    assert not torch.allclose(found, expected)
    torch.testing.assert_close(load_pruned(tmp_path / "saved")(**inputs).logits, found, rtol=1e-5, atol=1e-5)


def test_direct_preference_optimization_finds_a_structure(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = {
        name: [" ".join(map(str, row)) for row in tokens(64, 4, seed)]
        for seed, name in enumerate(("prompt", "chosen", "rejected"))
    }
    trainer = SparseDPOTrainer(
        model=llama(),
        ref_model=llama(),
        teacher=llama(),
        args=arguments(DPOConfig, tmp_path),
        train_dataset=Dataset.from_dict(texts),
        processing_class=tokenizer,
        sparsity=SEARCH,
    )
    trainer.train()
    assert not trainer._metrics["eval"] and trainer.state.log_history[0]["logits_loss"] < 1e-4
    assert trainer.compact().max_abs_diff <= 1e-4 and densities(trainer)[-1] == pytest.approx(0.6, abs=0.06)


def test_group_relative_policy_optimization_is_pruned_on_what_it_generates(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    settings = arguments(GRPOConfig, tmp_path, bf16=False, num_generations=4, max_completion_length=4)
    settings.max_steps = 16
    trainer = SparseGRPOTrainer(
        model=llama(),
        args=settings,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": [" ".join(map(str, row)) for row in tokens(64, 4)]}),
        processing_class=tokenizer,
        sparsity=SparsityConfig(target=0.4, sparsity_ramp=0.5, gate_learning_rate=0.1),
    )
    trainer.train()
    assert not trainer._metrics["eval"] and trainer.search.in_last_form
    assert trainer.compact().max_abs_diff <= 1e-4 and trainer.measure().batch[0] == 8
