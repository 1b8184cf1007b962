"""Output projections that are fitted to the teacher's by least squares."""

import copy
from pathlib import Path

import pytest
import torch
from pruning import MODELS, bert, rows, training_arguments
from torch import nn
from transformers import AlbertConfig, AlbertModel, LongformerConfig, LongformerModel, PreTrainedModel

from hf_sparse import PruningPlan, SparseTrainer, SparsityConfig, compact, discover
from hf_sparse.compaction.refit import RIDGE, refit_, refittable
from hf_sparse.distillation.losses import hidden_distances
from hf_sparse.modeling_hf_sparse import BiasOnly, padded_side
from hf_sparse.runtime.contexts import hooked
from hf_sparse.structure.example_inputs import example_inputs
from hf_sparse.training import stages

BATCH = {"input_ids": torch.tensor([tokens for seed in range(4) for tokens in rows(32, seed=seed)["input_ids"]])}


@torch.no_grad()
def seen(model: PreTrainedModel, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of a linear layer on the batch, shape (tokens, width)."""
    found = []

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found.append((args[0].flatten(0, -2), output.flatten(0, -2)))

    with hooked([model.get_submodule(name).register_forward_hook(keep)]):
        model(**BATCH)
    return found[0]


def halved(model: PreTrainedModel) -> tuple[PreTrainedModel, list[str]]:
    """A copy that lost every other unit, and its output projections."""
    structure, pruned = discover(model), copy.deepcopy(model)
    compact(pruned, PruningPlan({block.name: tuple(range(0, block.units, 2)) for block in structure.blocks}))
    return pruned.eval(), refittable(pruned, model, [block.output for block in structure.blocks])


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_stays_as_it_is(name: str) -> None:
    model = MODELS[name]()
    same = copy.deepcopy(model)
    names = refittable(same, model, [block.output for block in discover(model).blocks])
    assert len(names) == len(discover(model).blocks)
    refit_(same, model, names, example_inputs(model))
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(same.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_what_is_left_comes_closer_to_the_teacher(name: str) -> None:
    model = MODELS[name]()
    pruned, names = halved(model)
    held_out = {"input_ids": torch.tensor(rows(32, seed=9)["input_ids"])}

    def distance() -> float:
        with torch.no_grad():
            states = [one(**held_out, output_hidden_states=True).hidden_states[1:] for one in (pruned, model)]
        return hidden_distances(states[0], states[1], [None] * len(states[0])).diagonal().mean().item()

    before = distance()
    refit_(pruned, model, names, BATCH)
    assert distance() < 0.8 * before


def test_it_is_the_minimum_of_the_squared_error_and_the_pull() -> None:
    model = bert().double()
    pruned, names = halved(model)
    starts = {name: pruned.get_submodule(name).weight.detach().clone() for name in names}
    refit_(pruned, model, names, BATCH)
    for name in names:  # each on inputs from what was refitted before it
        module, (inputs, _), (_, wanted) = pruned.get_submodule(name), seen(pruned, name), seen(model, name)
        error = torch.nn.functional.linear(inputs, module.weight, module.bias) - wanted
        pull = RIDGE * inputs.square().sum(0).mean() * (module.weight - starts[name])
        slope = error.T @ inputs + pull
        assert slope.abs().max() <= 1e-8 * (wanted.T @ inputs).abs().max()
        assert error.sum(0).abs().max() <= 1e-8 * wanted.abs().sum()


def test_padding_does_not_count() -> None:
    model = bert()
    (pruned, names), padded = (
        halved(model),
        {name: torch.nn.functional.pad(BATCH["input_ids"], (0, 3)) for name in BATCH},
    )
    same = copy.deepcopy(pruned)
    padded["attention_mask"] = (torch.arange(11) < 8).long().expand(128, -1)
    refit_(pruned, model, names, BATCH)
    refit_(same, model, names, padded)
    for name, weight in pruned.named_parameters():
        torch.testing.assert_close(same.get_parameter(name), weight, rtol=1e-4, atol=1e-5)


def test_a_layer_that_several_share_stays_as_it_is() -> None:
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40}
    model = AlbertModel(AlbertConfig(vocab_size=99, num_hidden_layers=3, **sizes)).eval()
    pruned, names = halved(model)
    before = copy.deepcopy(pruned.state_dict())
    refit_(pruned, model, names, BATCH)
    assert names
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())


def test_of_a_removed_sublayer_the_bias_is_fitted() -> None:
    model = bert()
    pruned = copy.deepcopy(model)
    block = discover(model).blocks[0]
    compact(pruned, PruningPlan({block.name: ()}))
    assert isinstance(pruned.get_submodule(block.output), BiasOnly)
    refit_(pruned.eval(), model, refittable(pruned, model, [block.output]), BATCH)
    wanted = seen(model, block.output)[1].mean(0)
    torch.testing.assert_close(pruned.get_submodule(block.output).bias, wanted, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_all_zero_and_tokens_that_are_none_change_only_what_they_can() -> None:
    model = bert()
    pruned, names = halved(model)
    with torch.no_grad():
        pruned.bert.encoder.layer[0].intermediate.dense.weight.zero_()
        pruned.bert.encoder.layer[0].intermediate.dense.bias.zero_()
    module = pruned.bert.encoder.layer[0].output.dense
    before = module.weight.detach().clone()
    refit_(pruned, model, names, {**BATCH, "attention_mask": torch.zeros_like(BATCH["input_ids"])})
    assert torch.equal(module.weight, before)
    refit_(pruned, model, names, BATCH)
    assert torch.equal(module.weight, before)
    wanted = seen(model, "bert.encoder.layer.0.output.dense")[1].mean(0)
    torch.testing.assert_close(module.bias, wanted, rtol=1e-4, atol=1e-5)


def test_projections_that_are_padded_are_fitted_by_what_they_read() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "attention_window": [4, 4]}
    config = LongformerConfig(vocab_size=99, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    model = LongformerModel(config).eval()
    pruned, names = halved(model)
    assert any(padded_side(pruned.get_submodule(name)) for name in names)
    before = copy.deepcopy(pruned.state_dict())
    refit_(pruned, model, names, BATCH)
    assert all(not torch.equal(pruned.state_dict()[f"{name}.weight"], before[f"{name}.weight"]) for name in names)


@pytest.mark.parametrize(("refit", "latest"), [(True, 1.0), (False, 1.0), (True, -1.0)])
def test_the_trainer_refits_to_its_teacher_unless_it_is_late(
    refit: bool, latest: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "LATEST_REFIT", latest)
    weights = []
    for teacher in (None, bert()):
        # Without any weight for what the teacher says, only the refit can make a difference.
        sparsity = SparsityConfig(refit=refit, distillation_weight=0.0, hidden_distillation_weight=0.0)
        run = SparseTrainer(
            model=bert(),
            args=training_arguments(tmp_path, max_steps=40),
            sparsity=sparsity,
            teacher=teacher,
            train_dataset=rows(64),
            eval_dataset=rows(16, seed=1),
        )
        run.train()
        weights.append(run.model.state_dict())
    same = all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert same == (not refit or latest < 0)


@pytest.mark.parametrize("sizes", [{"layers": 3}, {"hidden_size": 64}])
def test_a_teacher_of_another_shape_teaches_by_its_states_and_logits_alone(sizes: dict, tmp_path: Path) -> None:
    run = SparseTrainer(
        model=bert(),
        args=training_arguments(tmp_path, max_steps=40),
        sparsity=SparsityConfig(),
        teacher=bert(**sizes),
        train_dataset=rows(64),
        eval_dataset=rows(16, seed=1),
    )
    assert torch.isfinite(torch.tensor(run.train().training_loss))
