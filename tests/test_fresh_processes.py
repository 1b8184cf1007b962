"""Every eighth model type, pruned twice, saved, and loaded in fresh processes with and without the library.

test_zoo.py loads all of them in its own process.
"""

import re
from pathlib import Path

import pytest
import torch
from launching import TESTS, forks
from loaded import tensors
from pruning import compact_found, random_plans
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar
from zoo import ZOO

from hf_sparse import PruningPlan, discover, save_pruned

PARTS = 2
CHOSEN = list(ZOO)[::8]


def save(name: str, directory: Path) -> PreTrainedModel | None:
    """A twice pruned model of a species with what it computes; None if there is nothing to prune."""
    model, inputs = ZOO[name].make(), ZOO[name].inputs()
    structure = discover(model, inputs)
    if not structure.blocks:
        return None
    compact_found(model, structure, random_plans(structure)["some gone"], inputs)
    left = discover(model, inputs)
    # What is left of one block alone may be a single column of all experts, which has to stay; and where heads can no
    # longer be told apart, as in MobileViT, a block is found by another name, which compact refuses.
    names = {block.name for block in structure.blocks}
    if len(left.blocks) > 1 and names.issuperset(block.name for block in left.blocks):
        halves = {block.name: tuple(range(block.units // 2, block.units)) for block in left.blocks}
        compact_found(model, left, PruningPlan(halves), inputs)  # sparser from sparse
    save_pruned(model, directory)
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = tensors(dict(model.eval()(**inputs)))
    torch.save({"inputs": inputs, "outputs": outputs}, directory / "expected.pt")
    return model


@pytest.mark.parametrize("part", range(PARTS))
def test_model_types_load_both_ways(part: int, tmp_path: Path) -> None:
    disable_progress_bar()
    paths = []
    for name in CHOSEN[part::PARTS]:
        path = tmp_path / re.sub(r"\W+", "-", name)
        if save(name, path) is not None:
            paths.append(path)
    assert len(paths) > 0.9 * len(CHOSEN[part::PARTS])
    for way in ("with", "without"):
        run = forks().run(TESTS / "loaded.py", way, *paths)
        assert run.returncode == 0 and not run.stdout, f"{way} the library:\n{run.stdout}\n{run.stderr[-1000:]}"
