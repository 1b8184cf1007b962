"""Uniform layouts: found in stock configs, learnt as such, and loaded by transformers alone."""

import json
from pathlib import Path

import pytest
import torch
from launching import forks
from pruning import MODELS, bart, bert, gpt2, llama, rows, training_arguments, uniform
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)
from zoo import ZOO

from hf_sparse import (
    PruningPlan,
    SparseTrainer,
    SparsityConfig,
    SparsityError,
    attach_gates,
    compact,
    current_plan,
    discover,
    load_pruned,
    save_pruned,
)
from hf_sparse.gates.attach import gate_bank
from hf_sparse.gates.layout import filled, uniform_counts, widest_counts
from hf_sparse.structure.example_inputs import example_inputs
from hf_sparse.structure.stock import expressible


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(**example_inputs(model)).logits


@pytest.mark.parametrize(
    ("make", "keep", "sizes"),
    [
        (llama, {"attention": 2, "ffn": 7}, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}),
        (llama, {"attention": 1}, {"num_attention_heads": 2, "num_key_value_heads": 1}),
        (bert, {"ffn": 5}, {"intermediate_size": 5, "num_attention_heads": 4}),
        (gpt2, {"ffn": 9}, {"n_inner": 9}),
        (bart, {"ffn": 6}, {"encoder_ffn_dim": 6, "decoder_ffn_dim": 6}),
    ],
)
def test_what_a_stock_config_can_say_is_saved_as_stock(
    make: object, keep: dict[str, int], sizes: dict[str, int], tmp_path: Path
) -> None:
    model = MODELS[make.__name__]()
    stock = type(model)
    compact(model, uniform(model, **keep))
    save_pruned(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert type(model) is stock and config["model_type"] == stock.config_class.model_type
    assert config == {**config, **sizes} and not {"auto_map", "hf_sparse", "per_layer_config"} & config.keys()
    assert not list(tmp_path.glob("*.py"))
    code = (
        "import sys, torch\nfrom safetensors.torch import load_file, save_file\nsys.modules['hf_sparse'] = None\n"
        f"from transformers import {stock.__name__} as Stock\n"
        f"model = Stock.from_pretrained({str(tmp_path)!r}).eval()\n"
        f"save_file({{'logits': model(**load_file({str(tmp_path / 'in')!r})).logits}}, {str(tmp_path / 'out')!r})\n"
    )
    from safetensors.torch import save_file

    save_file(example_inputs(model), tmp_path / "in")
    run = forks().run("-c", code)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], logits(model), rtol=1e-6, atol=1e-6)


def test_what_it_cannot_say_is_saved_as_pruned() -> None:
    uneven = PruningPlan({"model.layers.0.mlp": (1, 2)})
    # Llama wants a number of heads that divides its width.
    for make, plan in ((bert, uniform(bert(), attention=2)), (llama, uniform(llama(), attention=3)), (llama, uneven)):
        model = make()
        compact(model, plan)
        assert model.config.model_type.startswith("hf_sparse_")


def test_a_pruned_model_becomes_stock_where_another_round_makes_it_uniform(tmp_path: Path) -> None:
    model = llama()
    compact(model, PruningPlan({"model.layers.0.mlp": tuple(range(7))}))
    compact(model, uniform(model, ffn=7))
    assert type(model).__name__ == "LlamaForCausalLM"
    save_pruned(model, tmp_path)
    assert torch.equal(logits(load_pruned(tmp_path)), logits(model))


def test_every_kind_gets_a_count_and_the_finest_makes_up_for_the_rounding() -> None:
    blocks = expressible(llama(), discover(llama())).blocks
    assert {block.kind: block.counts for block in blocks} == {"attention": (1, 2, 4), "ffn": tuple(range(1, 41))}
    costs = {block.name: float(block.unit_cost) for block in blocks}
    total = sum(costs[block.name] * block.units for block in blocks)
    for density in (0.15, 0.3, 0.55, 0.9):
        counts = uniform_counts(blocks, costs, density)
        found = sum(costs[block.name] * counts[block.kind] for block in blocks) / total
        assert found == pytest.approx(density, abs=0.02)
        assert all(count >= 1 for count in counts.values())


def test_closed_units_fill_up_to_the_widest() -> None:
    blocks = [block for block in expressible(llama(), discover(llama())).blocks if block.kind == "attention"]
    names = [block.name for block in blocks]
    kept: dict[str, tuple[int, ...]] = {names[0]: (), names[1]: (1, 3), names[2]: (2,)}
    important = {name: torch.tensor([0.1, 0.2, 0.3, 0.4]) for name in names}
    plan = filled(kept, widest_counts(kept, blocks), important)
    assert plan == {names[0]: (2, 3), names[1]: (1, 3), names[2]: (2, 3)}
    kept[names[1]] = (0, 1, 3)
    assert {len(units) for units in filled(kept, widest_counts(kept, blocks), important).values()} == {4}


def llama_classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**{**llama().config.to_dict(), "pad_token_id": 0}))


@pytest.mark.parametrize(("make", "kinds"), [(llama_classifier, {"attention", "ffn"}), (bert, {"ffn"})])
def test_training_leaves_a_stock_model_of_the_size_asked_for(make: object, kinds: set[str], tmp_path: Path) -> None:
    model = make()
    trainer = SparseTrainer(
        model=model,
        args=training_arguments(tmp_path, max_steps=150),
        sparsity=SparsityConfig(target=0.5, layout="uniform"),
        train_dataset=rows(64),
        eval_dataset=rows(16, seed=1),
    )
    bank = trainer.bank
    assert {block.kind for block in bank.structure.blocks} == kinds
    trainer.train()
    assert gate_bank(trainer.model) is None
    plan = trainer.plan()
    for kind in kinds:
        assert len({len(plan.kept[block.name]) for block in bank.structure.blocks if block.kind == kind}) == 1
    kept = sum(block.unit_cost * len(plan.kept[block.name]) for block in bank.structure.blocks)
    assert kept / bank.costs.prunable == pytest.approx(bank.target_density, abs=0.03)
    trainer.save_model(str(tmp_path / "out"))
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(small) is type(make()) and small.num_parameters() < make().num_parameters()


def test_a_model_without_a_uniform_form_is_refused() -> None:
    species = ZOO["longformer"]
    model, inputs = species.make(), species.inputs()
    attach_gates(model, SparsityConfig(layout="uniform"), inputs)
    assert {block.kind for block in discover(model, inputs).blocks} >= {"ffn"}
    with pytest.raises(SparsityError, match="take layout='free'"):
        attach_gates(ZOO["swinv2"].make(), SparsityConfig(layout="uniform"), ZOO["swinv2"].inputs())


def test_the_plan_of_a_uniform_layout_is_uniform_whatever_the_gates_are() -> None:
    model = llama()
    bank = attach_gates(model, SparsityConfig(layout="uniform"))
    generator = torch.Generator().manual_seed(0)
    for group in bank.groups.values():
        group.alpha.data = 2 * torch.randn(group.alpha.shape, generator=generator)
        group.beta.data += 2.0
    plan, gated = current_plan(model), logits(model)
    for kind in ("attention", "ffn"):
        assert len({len(plan.kept[block.name]) for block in bank.structure.blocks if block.kind == kind}) == 1
    compact(model)
    assert type(model).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(model), gated, rtol=1e-5, atol=1e-5)
    # Units that only round up the number differ from others in nothing but their weights.
    assert {block.kind for block in discover(model).blocks} == {"attention", "ffn"}
    compact(model, uniform(model, ffn=2))
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.intermediate_size == 2
