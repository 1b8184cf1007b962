import pytest
import torch
from pruning import MODELS, bert, gpt2, llama
from torch import nn
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hf_sparse import PruningPlan, compact, discover

EXPECTED = {"bert": (2, 4, 40, 1), "gpt2": (3, 4, 40, 1), "llama": (3, 4, 40, 2), "bart": (6, 4, 40, 1)}


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_neurons_of_every_layer_are_found(name: str) -> None:
    blocks = discover(MODELS[name]()).blocks
    sublayers, heads, neurons, group = EXPECTED[name]
    attention = [block for block in blocks if block.kind == "attention"]
    ffn = [block for block in blocks if block.kind == "ffn"]
    assert len(attention) == sublayers
    assert {(block.units, block.heads_per_unit) for block in attention} == {(heads, group)}
    assert {block.units for block in ffn} == {neurons}


def test_the_cost_of_a_unit_is_what_its_removal_saves(model: PreTrainedModel) -> None:
    for block in discover(model).blocks[-2:]:
        report = compact(model, PruningPlan({block.name: tuple(range(1, block.units))}))
        assert report.parameters_before - report.parameters_after == block.unit_cost


def test_columns_name_the_inputs_of_the_output_projection(model: PreTrainedModel) -> None:
    for block in discover(model).blocks:
        projection = model.get_submodule(block.output)
        inputs = projection.in_features if isinstance(projection, nn.Linear) else projection.nx
        assert torch.equal(block.columns.flatten().sort().values, torch.arange(inputs))
        assert block.columns.shape[0] == block.units


def test_norms_of_one_head_are_shared_and_norms_of_all_heads_are_refused() -> None:
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
    }
    per_head = discover(Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8)))
    assert {block.kind for block in per_head.blocks} == {"attention", "ffn"} and not per_head.refused
    whole_width = discover(Olmo2ForCausalLM(Olmo2Config(**sizes, pad_token_id=None)))
    assert {block.kind for block in whole_width.blocks} == {"ffn"}
    assert "heads cannot be told apart" in whole_width.refused[0][1]


def test_the_structure_prints_as_a_table() -> None:
    lines = str(discover(llama())).splitlines()
    assert lines[0].split() == ["block", "kind", "units", "parameters", "per", "unit", "parameters"]
    assert len(lines) == 1 + 6 and "model.layers.2.mlp" in lines[-1]


def test_weights_that_two_modules_share_are_refused() -> None:
    model = bert()
    first, second = model.bert.encoder.layer
    second.intermediate.dense.weight = first.intermediate.dense.weight
    structure = discover(model)
    assert [block.kind for block in structure.blocks] == ["attention", "attention"]
    assert all("shared with another module" in reason for _, reason in structure.refused)


def test_discovery_changes_nothing() -> None:
    model = gpt2()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    discover(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_printed_fits_a_screen() -> None:
    many = PruningPlan({f"layers.{i}.{name}": tuple(range(i, 3000, 2)) for i in range(80) for name in ("attn", "mlp")})
    few = PruningPlan({"layers.0.mlp": (0, 1, 2, 3, 7, 9), "layers.1.mlp": ()})
    assert str(few).splitlines() == ["block         kept  units", "layers.0.mlp     6  0-3, 7, 9", "layers.1.mlp     0"]
    assert repr(few) == "PruningPlan(2 blocks: 6 units kept, 1 blocks removed)"
    assert str(many).splitlines()[1].split(maxsplit=2)[2] == "1,461 to 1,500 in 80 blocks"
    model = bert()
    report = compact(model, PruningPlan({discover(model).blocks[0].name: ()}))
    for shown in (many, few, report, discover(model)):
        assert shown._repr_html_().count("\n") == str(shown).count("\n")
        for text in (str(shown), repr(shown)):
            assert len(text.splitlines()) <= 60 and len(text) <= 4000
    assert f"{report.parameters_after:,} after" in str(report) and "blocks, " in repr(discover(model))
