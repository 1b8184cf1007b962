"""Models that come from checkpoints, as those of users do, and what is left of them in files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import bert, llama, random_plans, rows, training_arguments
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel, Trainer
from zoo import ZOO

from hf_sparse import (
    PruningPlan,
    SparseTrainer,
    SparsityConfig,
    SparsityError,
    compact,
    discover,
    load_pruned,
    save_pruned,
)
from hf_sparse.costs.macs import count_macs
from hf_sparse.structure.comparison import outputs

CONVERTED = ("mixtral", "qwen3_moe", "olmoe", "swin", "videomae", "vit", "esm")
"""Model types whose tensors have other names in files than in memory."""


@pytest.mark.parametrize("name", CONVERTED)
def test_what_was_loaded_pruned_and_saved_loads_again(name: str, tmp_path: Path) -> None:
    inputs = ZOO[name].inputs()
    ZOO[name].make().save_pretrained(tmp_path / "stock")
    model = load_pruned(tmp_path / "stock").eval()
    compact(model, random_plans(discover(model, inputs))["some gone"], inputs)
    for turn in ("once", "twice"):
        expected = outputs(model, inputs)
        save_pruned(model, tmp_path / turn)
        model = load_pruned(tmp_path / turn).eval()
        for key, tensor in outputs(model, inputs).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)


def test_experts_that_were_loaded_train_stop_and_go_on(tmp_path: Path) -> None:
    ZOO["mixtral"].make().save_pretrained(tmp_path / "stock")
    data = rows(32).map(lambda row: {"labels": row["input_ids"]})

    def run(steps: int) -> SparseTrainer:
        torch.manual_seed(0)
        arguments = training_arguments(tmp_path / "out", max_steps=steps, save_strategy="steps", save_steps=3)
        model = load_pruned(tmp_path / "stock")
        return SparseTrainer(model=model, args=arguments, sparsity=SparsityConfig(), train_dataset=data)

    whole = run(6)
    whole.train()
    (tmp_path / "out/checkpoint-6").rename(tmp_path / "out/away")
    resumed = run(6)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, msg=name)


def test_a_pruned_decoder_is_smoothed_as_the_stock_one(tmp_path: Path) -> None:
    """Trainer finds out by the name of a class whether its labels are those of the next tokens."""
    data = rows(8).map(lambda row: {"labels": row["input_ids"]})
    losses = []
    for prune in (False, True):
        model: PreTrainedModel = llama()
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.down_proj.weight")[:, 0] = 0.0
        if prune:
            [ffn] = [block for block in discover(model).blocks if block.name == "model.layers.0.mlp"]
            compact(model, PruningPlan({ffn.name: tuple(range(1, ffn.units))}))
            assert type(model) is not LlamaForCausalLM and isinstance(model, LlamaForCausalLM)
        run = Trainer(model=model, args=training_arguments(tmp_path, label_smoothing_factor=0.1), eval_dataset=data)
        losses.append(run.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_products_of_experts_are_counted() -> None:
    model, inputs = ZOO["mixtral"].make().eval(), ZOO["mixtral"].inputs()
    before = model.get_experts_implementation()
    counted = count_macs(model, inputs)
    assert model.get_experts_implementation() == before
    model.set_experts_implementation("eager")
    assert count_macs(model, inputs) == counted > 0


def test_stock_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    model = bert()
    state = {name: tensor for name, tensor in model.state_dict().items() if "layer.1.output.dense" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(SparsityError, match=r"not whole: missing \['bert.encoder.layer.1.output.dense.bias'"):
        load_pruned(tmp_path)


@pytest.mark.parametrize("prune", [False, True])
def test_a_config_cannot_name_other_files_for_weights(prune: bool, tmp_path: Path) -> None:
    model: Any = bert()
    if prune:
        compact(model, random_plans(discover(model))["some gone"])
    save_pruned(model, tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("{", '{"transformers_weights": "adapter_model.bin",', 1))
    with pytest.raises(SparsityError, match="transformers_weights"):
        load_pruned(tmp_path)
    if prune:
        with pytest.raises(ValueError, match="transformers_weights"):
            type(model).from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path))


def test_a_mounted_directory_is_written_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mounted = bert(), tmp_path / "mounted"
    save_pruned(model, mounted)
    (mounted / "notes.txt").write_text("mine")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    compact(model, random_plans(discover(model))["some gone"])
    before = mounted.stat().st_ino
    save_pruned(model, mounted)
    assert mounted.stat().st_ino == before and (mounted / "notes.txt").read_text() == "mine"
    assert load_pruned(mounted).num_parameters() == model.num_parameters()
    assert not list(mounted.glob(".*")) and [path.name for path in tmp_path.iterdir()] == ["mounted"]


def test_saving_into_the_working_directory_leaves_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        save_pruned(bert(), ".")
        assert Path.cwd() == tmp_path and (Path.cwd() / "model.safetensors").is_file()
