"""Attention whose code counts on all heads: projections shrink and pad, once, and hostile records are refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig
from zoo import ZOO

from hf_sparse import PruningPlan, compact, discover, load_pruned, save_pruned
from hf_sparse.modeling_hf_sparse import check_recipe, empty_recipe, resize_, sealed

SPECIES = ZOO["longformer"]


def test_projections_shrink_and_the_next_round_prunes_the_rest(tmp_path: Path) -> None:
    model, inputs = SPECIES.make(), SPECIES.inputs()
    structure = discover(model, inputs)
    plan = {block.name: tuple(range(block.units)) for block in structure.blocks}
    attention = [block.name for block in structure.blocks if block.kind == "attention"]
    compact(model, PruningPlan({**plan, **dict.fromkeys(attention, (1, 3))}), inputs)
    query = model.longformer.encoder.layer[0].attention.self.query
    assert query.weight.shape == (16, 32) and query(torch.zeros(1, 32)).shape == (1, 32)
    assert type(query) is nn.Linear and query.out_features == 16
    assert query(torch.ones(1, 32)).nonzero()[:, 1].tolist() == [*range(8, 16), *range(24, 32)]

    again = discover(model, inputs)
    assert {block.kind for block in again.blocks} == {"ffn"}
    assert any("has lost heads before" in reason for _, reason in again.refused)
    compact(model, PruningPlan({block.name: (0, 7) for block in again.blocks}), inputs)
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


@torch.no_grad()
def logits(model: Any, inputs: dict) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize("name", ["longformer", "codegen"])
def test_lora_wraps_padded_projections_and_is_merged_into_them(name: str, tmp_path: Path) -> None:
    model, inputs = ZOO[name].make(), ZOO[name].inputs()
    blocks = [block for block in discover(model, inputs).blocks if block.padded]
    compact(model, PruningPlan({block.name: (1, 2) for block in blocks}), inputs)
    before, projection = logits(model, inputs), blocks[0].output
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    assert isinstance(model.get_submodule(projection), BaseTunerLayer)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, inputs), before, rtol=1e-5, atol=1e-5)
    expected = logits(adapted, inputs)
    assert (expected - before).abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-4)
    save_pruned(merged, tmp_path)
    torch.testing.assert_close(logits(load_pruned(tmp_path), inputs), expected, rtol=1e-4, atol=1e-4)


def test_what_takes_the_place_of_a_padded_projection_is_padded_once() -> None:
    model, inputs = SPECIES.make(), SPECIES.inputs()
    blocks = [block for block in discover(model, inputs).blocks if block.padded]
    compact(model, PruningPlan({block.name: (1, 2) for block in blocks}), inputs)
    before, attention = logits(model, inputs), model.longformer.encoder.layer[0].attention.self
    # A wrapper with a copy inside, as peft's for modules that are trained whole.
    attention.query = nn.Sequential(copy.deepcopy(attention.query))
    wrapped = logits(model, inputs), logits(copy.deepcopy(model), inputs)
    model.set_submodule("longformer.encoder.layer.0.attention.self.query", attention.query[0])
    for found in (*wrapped, logits(model, inputs)):
        torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "padding",
    [
        {"side": "outputs", "size": 8, "runs": [[0, 3]]},
        {"side": "outputs", "size": 8, "runs": [[4, 8], [0, 0]]},
        {"side": "outputs", "size": 3, "runs": [[0, 4]]},
        {"side": "outputs", "size": 8, "runs": [[-1, 3]]},
        {"side": "outputs", "size": 8, "runs": [[0, 4.0]]},
        {"side": "outputs", "size": 8, "runs": [[0, 2, 4]]},
        {"side": "outputs", "size": 10**12, "runs": [[0, 4]]},
        {"side": "inputs", "size": 8, "runs": [[0, 4]]},
        {"side": "sideways", "size": 8, "runs": [[0, 4]]},
    ],
)
def test_hostile_records_are_refused(padding: dict) -> None:
    recipe = {**empty_recipe(), "shapes": {"0.weight": [4, 6]}, "padded": {"0": padding}}
    with pytest.raises(ValueError, match=r"config\.hf_sparse (pads|has padded of) '0'"):
        check_recipe(sealed(recipe, PreTrainedConfig()), {})
        resize_(nn.Sequential(nn.Linear(6, 8)), recipe)
