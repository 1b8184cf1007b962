"""Attention whose code counts on all heads: projections shrink and pad, once, and hostile records are refused."""

from pathlib import Path

import pytest
import torch
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
    assert query.padded_channels["runs"] == [[8, 16], [24, 32]]

    again = discover(model, inputs)
    assert {block.kind for block in again.blocks} == {"ffn"}
    assert any("has lost heads before" in reason for _, reason in again.refused)
    compact(model, PruningPlan({block.name: (0, 7) for block in again.blocks}), inputs)
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


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
