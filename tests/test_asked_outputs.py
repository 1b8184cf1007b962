"""What a model gives beside its default outputs stays exact: caches, attention weights, router logits, head tables."""

import copy
import json
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from asking import all_outputs, assert_same_answers, continued
from pruning import llama, masked
from transformers import PreTrainedModel, StaticCache
from transformers.configuration_utils import get_head_shapes
from zoo import ZOO

from hf_sparse import PruningPlan, SparsityError, compact, discover, load_pruned, save_pruned
from hf_sparse.modeling_hf_sparse import RemovedAttention, _checksum

# The cache comes as past_key_values, as layer_past, or by position; the index is layer_idx or layer_id; with encoder.
CALLING = ("llama", "gpt_neox", "gpt_neo", "cpmant", "bart")


def without(model: PreTrainedModel, *names: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model in which sublayers weigh zero, and one in which they are gone."""
    structure = discover(model)
    plan = {block.name: tuple(range(block.units)) for block in structure.blocks} | dict.fromkeys(names, ())
    small = copy.deepcopy(model)
    compact(small, PruningPlan(plan))
    return masked(model, structure, PruningPlan(plan)), small


def attention(model: PreTrainedModel) -> list[str]:
    return [block.name for block in discover(model).blocks if block.kind == "attention"]


@pytest.mark.parametrize("name", CALLING)
def test_a_cache_is_written_however_it_is_handed_over(name: str, tmp_path: Path) -> None:
    model, inputs = ZOO[name].make(), ZOO[name].inputs()
    expected, small = without(model, *attention(model)[::2])
    answers = continued(expected, inputs)
    assert answers is not None
    save_pruned(small, tmp_path)
    for one in (small, pickle.loads(pickle.dumps(small)), load_pruned(tmp_path)):
        assert_same_answers(answers, continued(one, inputs), name, 1e-5, alike_heads=True)


def test_recipes_without_what_was_seen_of_caches_load_as_before(tmp_path: Path) -> None:
    model, inputs = llama(), ZOO["llama"].inputs()
    expected, small = without(model, attention(model)[0])
    save_pruned(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for removal in config["hf_sparse"]["removed"].values():
        for entry in ("index", "cross", "weights"):
            del removal[entry]
    config["hf_sparse"]["checksum"] = _checksum(config["hf_sparse"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, answers = load_pruned(tmp_path), continued(expected, inputs)
    assert answers is not None
    assert_same_answers(answers, continued(loaded, inputs), "loaded", 1e-5, alike_heads=True)


def test_a_stand_in_takes_the_shape_of_a_cache_that_is_ready() -> None:
    model, tokens = llama(), ZOO["llama"].inputs()["input_ids"]
    _, small = without(model, *attention(model)[:2])
    cache = StaticCache(config=model.config, max_cache_len=32)
    cache.early_initialization(2, *get_head_shapes(model.config), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(small(tokens, past_key_values=cache).logits, small(tokens).logits)
    assert cache.get_seq_length() == tokens.shape[1]


def test_cross_attention_writes_to_its_own_cache_alone() -> None:
    model, inputs = ZOO["bart"].make(), ZOO["bart"].inputs()
    crossing = [name for name in attention(model) if "encoder_attn" in name]
    _, small = without(model, *crossing)
    for _ in range(2):  # the second time it is filled
        cache = small(**inputs, use_cache=True).past_key_values
        small(**inputs, past_key_values=cache)
        lengths = [layer.get_seq_length() for layer in cache.self_attention_cache.layers]
        assert lengths == [2 * inputs["decoder_input_ids"].shape[1]] * 2
        assert cache.cross_attention_cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_what_forgets_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    first, structure = attention(model)[0], discover(model)
    monkeypatch.setattr(RemovedAttention, "_write_zeros", lambda *_: 0)
    assert all(block.stand_in is None for block in discover(model).blocks if block.kind == "attention")
    monkeypatch.setattr("hf_sparse.compaction.compact.discover", lambda *_: structure)
    with pytest.raises(SparsityError, match="only one of them returns cache"):
        compact(model, PruningPlan({first: ()}))


# A model with a head, one without, and one whose attention returns its weights only when it is asked.
@pytest.mark.parametrize("name", ["llama", "splinter", "luke"])
def test_every_layer_has_its_attention_weights(name: str, tmp_path: Path) -> None:
    model, inputs = ZOO[name].make(), ZOO[name].inputs()
    with suppress(ValueError):  # luke has no other attention
        model.set_attn_implementation("eager")
    all_outputs(model, inputs)  # from now on transformers has its hooks on the modules
    expected, small = without(model, attention(model)[0])
    answers = all_outputs(expected, inputs)
    assert ".attentions.1" in answers and ".hidden_states.2" in answers
    save_pruned(small, tmp_path)
    loaded = load_pruned(tmp_path)
    with suppress(ValueError):
        loaded.set_attn_implementation("eager")
    for one in (small, copy.deepcopy(small), loaded):
        assert_same_answers(answers, all_outputs(one, inputs), name, 1e-5, alike_heads=True)


def test_a_norm_that_a_router_reads_stays() -> None:
    model, inputs = ZOO["mixtral"].make(), ZOO["mixtral"].inputs()
    expected, small = without(model, *(block.name for block in discover(model).blocks if block.kind == "experts"))
    answers = all_outputs(expected, inputs)
    assert {".router_logits.0", ".router_logits.1", ".aux_loss"} <= answers.keys()
    assert_same_answers(answers, all_outputs(small, inputs), "mixtral", 1e-5, alike_heads=True)


def test_alignment_heads_follow_the_plan() -> None:
    model = ZOO["whisper"].make()
    before = model.generation_config
    before.alignment_heads = [[0, 1], [0, 3], [1, 2]]
    crossing = [name for name in attention(model) if "encoder_attn" in name]
    moved = copy.deepcopy(model)
    compact(moved, PruningPlan({crossing[0]: (1, 2), crossing[1]: (2, 3)}))
    assert moved.generation_config.alignment_heads == [[0, 0], [1, 0]]
    compact(moved, PruningPlan({crossing[1]: ()}))
    assert moved.generation_config.alignment_heads == [[0, 0]]
    compact(moved, PruningPlan({crossing[0]: ()}))
    assert not hasattr(moved.generation_config, "alignment_heads")
    compact(model, PruningPlan({name: () for name in attention(model) if name not in crossing}))
    assert model.generation_config is before
