"""What outside code learns of a pruned model's sizes, from its config and by the stock config class."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from pruning import MODELS, gpt2, llama, masked
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo import ZOO

from hf_sparse import (
    ModelStructure,
    PruningPlan,
    compact,
    discover,
    export_anymodel,
    load_pruned,
    save_pruned,
)
from hf_sparse.modeling_hf_sparse import TABLE_SWITCHES


def uneven(structure: ModelStructure) -> PruningPlan:
    return PruningPlan({b.name: tuple(range(i % b.units + 1)) for i, b in enumerate(structure.blocks)})


def pruned(name: str) -> tuple[PreTrainedModel, ModelStructure, dict]:
    model, inputs = ZOO[name].make(), ZOO[name].inputs()
    structure = discover(model, inputs)
    compact(model, uneven(structure), inputs)
    return model, structure, inputs


def columns(model: PreTrainedModel, structure: ModelStructure, kinds: tuple[str, ...]) -> dict[str, int]:
    """Inputs of the output projection by block: its neurons, or the width of its heads."""
    blocks = [block for block in structure.blocks if block.kind in kinds]
    return {block.name: model.get_parameter(block.weight.parameter).shape[block.weight.dim] for block in blocks}


def per_layer(config: Any, name: str) -> list[Any]:
    return [getattr(layer, name, None) for layer in config.per_layer_config]


# By the names that the stock configs have: of neurons, of query heads, and of kv heads where there are fewer.
NAMES = {
    "bert": ("intermediate_size", "num_attention_heads", None),
    "gpt2": ("n_inner", "n_head", None),
    "opt": ("ffn_dim", "num_attention_heads", None),
    "modernbert": ("intermediate_size", "num_attention_heads", None),
    "llama": ("intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "qwen3_moe": ("moe_intermediate_size", "num_attention_heads", "num_key_value_heads"),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_told_by_the_names_of_the_stock_config(name: str, tmp_path: Path) -> None:
    neurons, heads, kv_heads = NAMES[name]
    model, structure, inputs = pruned(name)
    save_pruned(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    stock = CONFIG_MAPPING[raw["base_model_type"]].from_dict({**raw, "model_type": raw["base_model_type"]})
    of_ffn, of_attention = (columns(model, structure, kinds) for kinds in (("ffn", "experts"), ("attention",)))
    for config in (model.config, AutoConfig.from_pretrained(tmp_path), stock):
        assert config.is_heterogeneous
        if neurons:
            assert per_layer(config, neurons) == list(of_ffn.values())
        widths = per_layer(config, "head_dim")
        assert [n * width for n, width in zip(per_layer(config, heads), widths)] == list(of_attention.values())
        if ZOO[name].family == "decoder":
            keys = [layer.keys for layer in model(**inputs, use_cache=True).past_key_values.layers]
            assert [tensor.shape[-1] for tensor in keys] == widths
            assert [tensor.shape[1] for tensor in keys] == per_layer(config, kv_heads or heads)
    # Where modules look, the sizes are those of the skeleton, as before.
    assert getattr(model.config, heads) == getattr(ZOO[name].make().config, heads)


@pytest.mark.parametrize("name", ["t5", "albert", "musicgen_decoder"])
def test_what_no_table_by_layer_can_tell_is_told_by_path(name: str, tmp_path: Path) -> None:
    model, structure, _ = pruned(name)
    save_pruned(model, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.layer_sizes == json.loads((tmp_path / "config.json").read_text())["layer_sizes"]
    assert config.layer_sizes.keys() == {block.name for block in structure.blocks}
    dense = {size for key, size in vars(ZOO[name].make().config).items() if type(size) is int}
    for block, wide in columns(model, structure, ("attention", "ffn")).items():
        sizes = dict(config.layer_sizes[block])
        width = sizes.pop("head_dim", 1)
        assert {size * width for size in sizes.values()} == {wide}
        assert all(getattr(config, key) in dense for key in sizes)


@pytest.mark.parametrize("name", ["clip"])
def test_every_tower_has_its_table_in_its_own_config(name: str, tmp_path: Path) -> None:
    model, structure, _ = pruned(name)
    save_pruned(model, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    of_ffn = columns(model, structure, ("ffn",))
    for tower, part in (("text_config", "text|language"), ("vision_config", "vision")):
        own = [wide for block, wide in of_ffn.items() if re.search(part, block)]
        assert own and per_layer(getattr(config, tower), "intermediate_size") == own


def test_a_kv_head_that_all_query_heads_share_stays_one(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**llama().config.to_dict(), "num_key_value_heads": 1})).eval()
    compact(model, PruningPlan({"model.layers.0.self_attn": (1, 2, 5)}))
    save_pruned(model, tmp_path / "pruned")
    assert per_layer(model.config, "num_key_value_heads") == [1, 1, 1]
    assert per_layer(model.config, "num_attention_heads") == [3, 8, 8]
    export_anymodel(tmp_path / "pruned", tmp_path / "any")
    blocks = json.loads((tmp_path / "any/config.json").read_text())["block_configs"]
    assert [block["attention"]["num_key_value_heads"] for block in blocks] == [1, 1, 1]
    compact(model, PruningPlan({"model.layers.0.self_attn": (0,), "model.layers.1.self_attn": (0, 1)}))
    assert per_layer(model.config, "num_key_value_heads") == [1, 1, 1]
    assert per_layer(model.config, "num_attention_heads") == [1, 2, 8]


def test_a_static_cache_that_is_made_first_has_the_heads_of_every_layer(tmp_path: Path) -> None:
    prompt = torch.arange(5, 17).view(2, 6)
    for make in (llama, gpt2):
        model = make().eval()
        compact(model, uneven(discover(model)))
        save_pruned(model, tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
        assert torch.equal(model.generate(prompt, **options, prefill_chunk_size=2), model.generate(prompt, **options))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "t5"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked for by peft
def test_a_prefix_for_all_heads_is_read_at_those_that_stay(name: str, tmp_path: Path) -> None:
    """Of keys and values that are made for the dense model the pruned one reads what the masked one does."""
    dense, inputs = MODELS[name]().eval() if name in MODELS else ZOO[name].make(), ZOO[name].inputs()
    structure = discover(dense, inputs)
    attention = [block for block in structure.blocks if block.kind == "attention"]
    first = PruningPlan({block.name: tuple(range(min(i, 1), block.units)) for i, block in enumerate(attention)})
    then = PruningPlan({block.name: tuple(range(0, len(first.kept[block.name]), 2)) for block in attention[1:]})
    whole = PruningPlan({block.name: tuple(range(block.units)) for block in structure.blocks})
    expected, model = masked(dense, structure, whole.then(first).then(then)), copy.deepcopy(dense)
    compact(model, first, inputs)
    save_pruned(model, tmp_path / "once")
    model = load_pruned(tmp_path / "once")
    compact(model, then, inputs)
    save_pruned(model, tmp_path / "twice")
    model = load_pruned(tmp_path / "twice")
    task = "CAUSAL_LM" if ZOO[name].family == "decoder" else "SEQ_2_SEQ_LM"
    options = PrefixTuningConfig(task_type=task, num_virtual_tokens=3)
    prefixed = [get_peft_model(one, options).eval() for one in (expected, model)]
    prefixed[1].prompt_encoder.load_state_dict(prefixed[0].prompt_encoder.state_dict())
    reference, got = (one(**inputs).logits for one in prefixed)
    torch.testing.assert_close(got, reference, atol=1e-5, rtol=1e-4)
    prefix = [one.prompt_encoder.default.embedding.weight for one in prefixed]
    for one in (reference, got):
        one.square().mean().backward()
    torch.testing.assert_close(prefix[1].grad, prefix[0].grad, atol=1e-6, rtol=1e-3)
    assert prefix[1].grad.any()


def test_continuous_batching_is_refused_where_layers_have_different_heads() -> None:
    model = llama().eval()
    compact(model, PruningPlan({"model.layers.0.self_attn": (1, 2)}))
    with pytest.raises(ValueError, match="continuous batching has one cache for all layers, but hf_sparse"):
        model.generate_batch([[5, 6]], generation_config=GenerationConfig(max_new_tokens=1))


def test_tables_of_earlier_versions_are_for_people(tmp_path: Path) -> None:
    model = llama().eval()
    compact(model, uneven(discover(model)))
    save_pruned(model, tmp_path / "new")
    model.save_pretrained(tmp_path / "old")
    raw = json.loads((tmp_path / "new/config.json").read_text())
    wrong = {index: {**sizes, "num_key_value_heads": 4} for index, sizes in raw["per_layer_config"].items()}
    old = {key: value for key, value in raw.items() if key not in TABLE_SWITCHES} | {"per_layer_config": wrong}
    (tmp_path / "old/config.json").write_text(json.dumps(old))
    loaded = load_pruned(tmp_path / "old")
    assert not loaded.config.is_heterogeneous and loaded.config.layer_sizes == wrong
    ids = torch.arange(5, 17).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    compact(loaded, PruningPlan({"model.layers.2.mlp": (0,)}))
    assert not loaded.config.is_heterogeneous and loaded.config.layer_sizes["model.layers.2.mlp"] == {
        "intermediate_size": 1
    }
    assert loaded.config.layer_sizes["model.layers.1.self_attn"]["num_key_value_heads"] == 3


def test_tables_that_cannot_be_are_refused() -> None:
    model = llama()
    compact(model, PruningPlan({"model.layers.0.self_attn": (1, 2)}))
    entries = model.config.to_dict()
    for size in (-1, 0, 9, 10**12, 2.0, True, "8", None, [4]):
        entries["per_layer_config"]["0"]["num_key_value_heads"] = size
        with pytest.raises(ValueError, match="per_layer_config with num_key_value_heads"):
            type(model.config).from_dict(entries)
    for table in (None, [], {"0": []}):
        with pytest.raises(ValueError, match="per_layer_config that is not a table"):
            type(model.config).from_dict({**entries, "per_layer_config": table})
