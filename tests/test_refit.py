"""Output projections that are fitted to the teacher's by least squares."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import MODELS, bert, rows, training_arguments
from transformers import PreTrainedModel

from hf_sparse import PruningPlan, SparseTrainer, SparsityConfig, compact, discover
from hf_sparse.distillation import hidden_distances
from hf_sparse.inputs import example_inputs
from hf_sparse.modeling_hf_sparse import BiasOnly
from hf_sparse.refit import RIDGE, _seen, refit_, refittable

BATCHES = [{"input_ids": torch.tensor(rows(32, seed=seed)["input_ids"])} for seed in range(4)]


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
    refit_(same, model, names, [example_inputs(model)])
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
    refit_(pruned, model, names, BATCHES)
    assert distance() < 0.8 * before


def test_it_is_the_minimum_of_the_squared_error_and_the_pull() -> None:
    model = bert().double()
    pruned, names = halved(model)
    first = names[0]
    seen = [(_seen(pruned, [first], batch)[first], _seen(model, [first], batch)[first]) for batch in BATCHES]
    inputs = torch.cat([own[0] for own, _ in seen])
    wanted = torch.cat([other[1] for _, other in seen])
    module = pruned.get_submodule(first)
    start = module.weight.detach().clone()
    refit_(pruned, model, [first], BATCHES)
    error = torch.nn.functional.linear(inputs, module.weight, module.bias) - wanted
    pull = RIDGE * inputs.square().sum(0).mean() * (module.weight - start)
    slope = error.T @ inputs + pull
    assert slope.abs().max() <= 1e-8 * (wanted.T @ inputs).abs().max()
    assert error.sum(0).abs().max() <= 1e-8 * wanted.abs().sum()


def test_of_a_removed_sublayer_the_bias_is_fitted() -> None:
    model = bert()
    pruned = copy.deepcopy(model)
    block = discover(model).blocks[0]
    compact(pruned, PruningPlan({block.name: ()}))
    assert isinstance(pruned.get_submodule(block.output), BiasOnly)
    refit_(pruned.eval(), model, refittable(pruned, model, [block.output]), BATCHES)
    wanted = torch.cat([_seen(model, [block.output], batch)[block.output][1] for batch in BATCHES]).mean(0)
    torch.testing.assert_close(pruned.get_submodule(block.output).bias, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("refit", [True, False])
def test_the_trainer_refits_to_its_teacher(refit: bool, tmp_path: Path) -> None:
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
    assert same == (not refit)


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
