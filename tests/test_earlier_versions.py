"""Checkpoints of earlier versions: those in tests/saved were written by the commit 7c68da3."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from launching import forks
from pruning import training_arguments
from safetensors.torch import load_file
from transformers import AutoConfig, BertConfig, BertForSequenceClassification

from hf_sparse import PruningPlan, SparseTrainer, SparsityConfig, compact, load_pruned

SAVED = Path(__file__).parent / "saved"
IDS = torch.arange(3, 15).view(2, 6)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "experts"])
@torch.no_grad()
def test_a_model_that_was_saved_computes_what_it_did(name: str, tmp_path: Path) -> None:
    expected = load_file(SAVED / name / "expected.safetensors")["logits"]
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)} if name == "t5" else {"input_ids": IDS}
    model = load_pruned(SAVED / name)
    assert AutoConfig.from_pretrained(SAVED / name).hf_sparse["layers"] == model.config.hf_sparse["layers"]
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    compact(model, PruningPlan({}), inputs)  # what was discovered before is discovered in it
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_pruned(tmp_path)(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


def test_how_experts_are_computed_can_be_chosen_before_the_stock_class_was_asked() -> None:
    code = "from transformers import AutoModelForCausalLM as A; import hf_sparse, sys\n"
    code += "for how in ('eager', 'grouped_mm'): A.from_pretrained(sys.argv[1], experts_implementation=how)"
    run = forks().run("-c", code, SAVED / "experts")
    assert run.returncode == 0, run.stderr


def test_a_search_that_was_stopped_goes_on(tmp_path: Path) -> None:
    shutil.copytree(SAVED / "search-12", tmp_path / "checkpoint-12")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 10}
    config = BertConfig(vocab_size=24, max_position_embeddings=16, type_vocab_size=1, **sizes)
    rows = {
        "input_ids": [[(i * 7 + j) % 24 for j in range(6)] for i in range(32)],
        "labels": [i % 2 for i in range(32)],
    }
    search = SparsityConfig(target=0.5, gate_learning_rate=0.1, sparsity_ramp=0.5, round_to=1, cost_sequence_length=128)
    options = {"max_steps": 30, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1}
    run = SparseTrainer(
        model=BertForSequenceClassification(config),
        args=training_arguments(tmp_path, per_device_train_batch_size=8, **options),
        train_dataset=Dataset.from_dict(rows),
        sparsity=search,
    )
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    before = json.loads((SAVED / "search-12" / "trainer_state.json").read_text())["log_history"]
    history = [log for log in run.state.log_history if "density" in log]
    assert history[: len(before)] == [log for log in before if "density" in log]
    assert run.state.global_step == 30 and history[len(before)]["density"] <= before[-1]["density"]
    assert run.plan().kept and run.compact().max_abs_diff <= 1e-4
