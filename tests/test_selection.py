"""Blocks that are left alone, by name or because they are frozen: no gates, no costs, and whole in all that is left."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import StopAt, bart, bert, llama, rows, training_arguments
from transformers import HfArgumentParser, PreTrainedModel

from hf_sparse import (
    PruningPlan,
    SparseTrainer,
    SparsityConfig,
    SparsityError,
    WeightSparsityConfig,
    attach_gates,
    compact,
    detach_gates,
    discover,
    load_pruned,
)
from hf_sparse.gates.weights import attach_weight_gates
from hf_sparse.structure.selection import selected


def gated(model: PreTrainedModel, **options: Any) -> set[str]:
    """The blocks that get gates, by the last two parts of their names."""
    structure = selected(model, discover(model), SparsityConfig(**options))
    return {block.name.partition("layers.")[2] for block in structure.blocks}


ATTENTION, FFN = ({f"{layer}.{name}" for layer in range(3)} for name in ("self_attn", "mlp"))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"exclude": ["model.layers.0.mlp"]}, (ATTENTION | FFN) - {"0.mlp"}),
        ({"exclude": ["*.layers.0.*", "layers.2"]}, {"1.self_attn", "1.mlp"}),
        ({"exclude": ["*.mlp"]}, ATTENTION),
        ({"exclude": []}, ATTENTION | FFN),
        ({"include": ["*.self_attn"]}, ATTENTION),
        ({"include": ["layers.[01].*"], "exclude": ["*.mlp"]}, {"0.self_attn", "1.self_attn"}),
    ],
)
def test_blocks_are_left_out_by_names_and_patterns(options: dict[str, list[str]], left: set[str]) -> None:
    assert gated(llama(), **options) == left


@pytest.mark.parametrize("option", ["exclude", "include"])
def test_a_pattern_that_matches_nothing_is_refused_with_names_that_there_are(option: str) -> None:
    with pytest.raises(SparsityError, match=rf"{option} has 'vision_tower.\*', .* called model.layers.0.self_attn,"):
        attach_gates(llama(), SparsityConfig(**{option: ["*.mlp", "vision_tower.*"]}))
    with pytest.raises(SparsityError, match="nothing is left to prune: of 6 blocks, 0 are left by include and exclude"):
        attach_gates(llama(), SparsityConfig(exclude=["*"]))
    with pytest.raises(SparsityError, match=r"give a list, such as \['vision_tower'\]"):
        SparsityConfig(**{option: "vision_tower"})


def test_flags_take_several_patterns() -> None:
    flags = ["--exclude", "vision_tower.*", "*.layers.0.*", "--include", "*.mlp"]
    [config] = HfArgumentParser(SparsityConfig).parse_args_into_dataclasses(flags)
    assert config == SparsityConfig(exclude=["vision_tower.*", "*.layers.0.*"], include=["*.mlp"])


def test_what_is_frozen_is_left_out(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("hf_sparse"), "propagate", True)
    model = llama()
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].mlp.down_proj.requires_grad_(False)  # the rest of its neurons train
    assert gated(model) == (ATTENTION | FFN) - {"1.self_attn", "1.mlp"}
    assert "2 of 6 blocks are frozen and keep all of their units (model.layers.1.self_attn, model.layers.1.mlp)" in (
        caplog.text
    )
    model.model.requires_grad_(False)
    with pytest.raises(SparsityError, match=r"nothing is left to prune: .* and 6 of these are frozen"):
        gated(model)
    model.requires_grad_(False)
    assert gated(model) == ATTENTION | FFN  # gates alone learn


def test_frozen_layers_keep_all_weights() -> None:
    model = bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    bank = attach_weight_gates(model, WeightSparsityConfig())
    assert bank.shapes and not [name for name in bank.shapes if ".layer.0." in name]


def test_costs_and_targets_count_what_remains() -> None:
    model = llama()
    bank = attach_gates(model, SparsityConfig(target=0.5, exclude=["layers.0"]))
    remaining = [block for block in discover(model).blocks if block.layer > 0]
    assert bank.costs.prunable == sum(block.units * block.unit_cost for block in remaining)
    assert [block.name for block in bank.structure.blocks] == [block.name for block in remaining]
    assert [block.name for block in bank.whole.blocks] == [block.name for block in discover(model).blocks]


def test_compaction_does_not_touch_what_is_left_out() -> None:
    model = llama()
    bank = attach_gates(model, SparsityConfig(exclude=["layers.0"]))
    with torch.no_grad():
        for group in bank.groups.values():
            group.alpha[::2] -= 9.0
    before = dict(model.model.layers[0].named_parameters())
    report = compact(model)
    after = dict(model.model.layers[0].named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert len(report.plan.kept["model.layers.0.mlp"]) == 40 > len(report.plan.kept["model.layers.1.mlp"])
    layers = {layer["block"]: layer for layer in model.config.hf_sparse["layers"]}
    assert layers["model.layers.0.mlp"]["kept"] == 40


def test_a_plan_may_still_name_what_has_no_gates() -> None:
    model = llama()
    attach_gates(model, SparsityConfig(exclude=["layers.0"]))
    compact(model, PruningPlan({"model.layers.0.mlp": (1, 2, 5)}))
    assert model.model.layers[0].mlp.down_proj.in_features == 3


def run_of(directory: Path, *callbacks: Any, **options: Any) -> SparseTrainer:
    return SparseTrainer(
        model=bert(num_attention_heads=8),
        args=training_arguments(directory, max_steps=60),
        sparsity=SparsityConfig(targets=[0.3, 0.5], **options),
        train_dataset=rows(64),
        eval_dataset=rows(16, seed=1),
        callbacks=list(callbacks),
    )


def test_what_is_left_out_stays_whole_in_all_stages_and_after_a_stop(tmp_path: Path) -> None:
    run_of(tmp_path, StopAt(40), exclude=["encoder.layer.0"]).train()  # in the second stage
    with pytest.raises(SparsityError, match=r"exclude=\['encoder.layer.0'\] \(now None\)"):
        run_of(tmp_path).train(resume_from_checkpoint=True)
    run = run_of(tmp_path, exclude=["encoder.layer.0"])
    run.train(resume_from_checkpoint=True)
    alone = {block.name: block.units for block in run.structure.blocks if block.layer == 0}
    for member, target in (("removed-0.3", 0.3), ("removed-0.5", 0.5)):
        report = json.loads((tmp_path / member / "report.json").read_text())
        layers = {layer["block"]: (layer["kept"], layer["units"]) for layer in report["layers"]}
        assert {name: layers[name] for name in alone} == {name: (units, units) for name, units in alone.items()}
        assert len(layers) == 2 * len(alone) and report["achieved"] == pytest.approx(target, abs=0.06)
        assert all(f"`{name}`" in (tmp_path / member / "README.md").read_text() for name in alone)
        recipe = load_pruned(tmp_path / member).config.hf_sparse
        assert [layer["block"] for layer in recipe["layers"]] == list(layers)


def test_resuming_with_other_frozen_blocks_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path, StopAt(5)).train()
    resumed = run_of(tmp_path / "other")
    resumed.run.gated = list(attach_gates(bert(), SparsityConfig(exclude=["encoder.layer.1"])).costs.blocks)
    with pytest.raises(SparsityError, match="gates on other blocks: freeze the same ones as then"):
        resumed.search.go_on_from_(tmp_path / "checkpoint-5")


def test_a_part_of_the_structure_that_was_given_stays_the_choice() -> None:
    model = bert()
    structure = discover(model)
    part = replace(structure, blocks=structure.blocks[:2])
    costs = attach_gates(model, SparsityConfig(), structure=part).costs
    detach_gates(model)
    bank = attach_gates(model, SparsityConfig(), costs=costs)  # as in a second stage
    assert [block.name for block in bank.structure.blocks] == [block.name for block in part.blocks]


def test_uniform_layouts_leave_out_what_their_config_can_tell_apart() -> None:
    bank = attach_gates(bart(), SparsityConfig(layout="uniform", exclude=["encoder"]))
    assert {block.name.split(".")[1] for block in bank.structure.blocks} == {"decoder"}
    with pytest.raises(SparsityError, match="cannot have fewer in every layer, as layout='uniform' asks for"):
        attach_gates(llama(), SparsityConfig(layout="uniform", exclude=["layers.0"]))
