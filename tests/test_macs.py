"""Multiply-accumulates of blocks are those that a batch takes less without them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import bert, rows, training_arguments
from zoo import ZOO

from hf_sparse import PruningPlan, SparseTrainer, SparsityConfig, attach_gates, compact, discover
from hf_sparse.costs.macs import count_macs, mac_costs
from hf_sparse.costs.table import parameter_costs
from hf_sparse.gates import attach as patching

CONFIG = SparsityConfig(cost="macs", cost_batch_size=2)
# Stages of several resolutions, windows, two lengths, shared keys and values, experts, projections that are padded.
SPECIES = ["bert", "segformer", "swin", "swinv2", "whisper", "t5", "llama", "mixtral", "longformer", "albert", "pvt"]


@pytest.mark.parametrize("name", SPECIES)
def test_costs_of_what_is_removed_are_the_macs_that_a_batch_takes_less(name: str) -> None:
    model, batch = ZOO[name].make(), ZOO[name].inputs()
    structure = discover(model, batch)
    costs = mac_costs(model, structure, CONFIG, batch)
    generator = torch.Generator().manual_seed(0)
    kept = {
        block.name: tuple(torch.rand(block.units, generator=generator).lt(0.5).nonzero().flatten().tolist())
        for block in structure.blocks
    }
    kept[structure.blocks[0].name] = kept[structure.blocks[-1].name] = ()
    smaller = copy.deepcopy(model)
    kept = compact(smaller, PruningPlan(kept), batch).plan.kept
    left = sum(costs.blocks[block.name][len(kept[block.name])] for block in structure.blocks)
    less = count_macs(model, batch) - count_macs(smaller, batch)
    # In Swin 2 neurons say where heads look, so what both lose is counted twice.
    assert costs.prunable - left == pytest.approx(less, rel=0.02 if name == "swinv2" else 1e-6)
    assert costs.prunable < count_macs(model, batch)
    for block in structure.blocks:
        assert list(costs.blocks[block.name]) == sorted(costs.blocks[block.name])


def test_blocks_that_a_batch_does_not_run_cost_something() -> None:
    model, batch = ZOO["llava"].make(), ZOO["llava"].inputs()
    structure = discover(model, batch)
    costs = mac_costs(model, structure, CONFIG, {"input_ids": torch.arange(5, 15).view(2, 5)})
    unseen = [block for block in structure.blocks if "vision_tower" in block.name]
    assert unseen and len(unseen) < len(structure.blocks)
    for block in unseen:
        assert costs.blocks[block.name][-1] == block.units * block.unit_macs


@pytest.mark.parametrize("cost", ["macs", "latency"])
def test_costs_are_taken_on_the_data_of_the_trainer(cost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    for function in ("mac_costs", "measured_costs"):
        monkeypatch.setattr(
            patching, function, lambda *given: seen.append(given[-1]) or parameter_costs(given[1], given[2])
        )

    def shapes(**options: Any) -> list[tuple[int, ...]]:
        seen.clear()
        sparsity = SparsityConfig(cost=cost, cost_batch_size=3, **options)
        data = {"train_dataset": rows(16), "eval_dataset": rows(8, length=11)}
        SparseTrainer(model=bert(), args=training_arguments(tmp_path), sparsity=sparsity, **data)
        SparseTrainer(model_init=lambda: bert(), args=training_arguments(tmp_path), sparsity=sparsity, **data)
        attach_gates(bert(), sparsity)
        return [tuple(batch["input_ids"].shape) for batch in seen]

    assert shapes() == [(3, 11), (3, 11), (3, 64)]  # no text is longer than this model can read
    assert shapes(cost_sequence_length=16) == [(3, 16)] * 3
