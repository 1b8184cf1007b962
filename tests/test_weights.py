"""Zeros among the weights of linear layers: patterns, gates on them, and what is left in the end."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import StopAt, bert, gpt2, rows, training_arguments
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_sparse import (
    SparseWeightsTrainer,
    SparsityConfig,
    SparsityError,
    WeightSparsityConfig,
    attach_gates,
    to_sparse_,
)
from hf_sparse.gates.base import attached_gates
from hf_sparse.gates.patterns import Blocks, Pattern, TwoOfFour, Unstructured, largest
from hf_sparse.gates.sensitivity import sensitivities
from hf_sparse.gates.weights import MASKS, attach_weight_gates, fix_weights_, fold_weights_, matrices, weight_densities

STEPS = 80
CONFIGS = {
    "unstructured": WeightSparsityConfig(target=0.8),
    "block": WeightSparsityConfig(pattern="block", block_size=8, target=0.7),
    "2:4": WeightSparsityConfig(pattern="2:4"),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> WeightSparsityConfig:
    return CONFIGS[request.param]


def small() -> PreTrainedModel:
    return bert(hidden_size=64, intermediate_size=128)


def trainer(directory: Path, config: WeightSparsityConfig, model: PreTrainedModel | None = None, **options: Any) -> Any:
    return SparseWeightsTrainer(
        model=model or small(),
        args=training_arguments(directory, **{"max_steps": STEPS, **options}),
        sparsity=config,
        teacher=small(),
        train_dataset=rows(64),
        eval_dataset=rows(16, seed=1),
    )


def outputs(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor(rows(8)["input_ids"])).logits


def follows(weight: torch.Tensor, pattern: str) -> bool:
    """Whether the zeros of a weight, shape (outputs, inputs), lie as its pattern says."""
    if pattern == "2:4":
        return int(weight.unflatten(1, (-1, 4)).count_nonzero(-1).max()) <= 2
    if pattern == "block":
        blocks = weight.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).transpose(1, 2).flatten(2).count_nonzero(-1)
        return set(blocks.unique().tolist()) <= {0, 64}
    return True


# ---- Patterns ----


@pytest.mark.parametrize("pattern", [Unstructured(), Blocks(4), TwoOfFour()])
def test_pooling_is_the_transpose_of_spreading(pattern: Pattern) -> None:
    values = torch.randn(8, 12, dtype=torch.double)
    gates = torch.randn_like(pattern.pool(values))
    torch.testing.assert_close((pattern.spread(gates, 8, 12) * values).sum(), (gates * pattern.pool(values)).sum())


def test_a_block_and_four_weights_lie_where_kernels_expect_them() -> None:
    blocks = Blocks(2).spread(torch.arange(4.0), 4, 4)
    assert blocks.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    values = torch.arange(16.0).view(2, 8)
    assert TwoOfFour().pool(values)[:, 0].tolist() == [0, 1, 2, 3]
    assert torch.equal(TwoOfFour().spread(TwoOfFour().pool(values), 2, 8), values)
    assert not Blocks(3).fits(4, 6) and not TwoOfFour().fits(4, 6) and Unstructured().fits(5, 7)
    assert largest(torch.tensor([[1.0, 3.0], [2.0, 1.0], [3.0, 2.0]]), 2).tolist() == [
        [False, True],
        [True, False],
        [True, True],
    ]


# ---- Gates ----


@pytest.mark.parametrize("make", [small, gpt2])
def test_open_gates_change_nothing_and_come_off(make: Any, config: WeightSparsityConfig) -> None:
    model = make()
    before, weights = outputs(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bank = attach_weight_gates(model, config)
    assert torch.equal(outputs(model), before)
    bank.start_from_(
        {name: torch.rand(bank.pattern.pool(torch.empty(shape)).shape) for name, shape in bank.shapes.items()}, 1.0
    )
    assert torch.equal(outputs(model), before) and bool((bank.group() == 1).all())
    fold_weights_(model)
    if config.pattern != "2:4":  # there the least of every four go
        assert torch.equal(outputs(model), before)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    assert not set(model.state_dict()) - set(weights)


@pytest.mark.parametrize("make", [small, gpt2])
def test_gated_fixed_and_folded_are_the_same_model(make: Any, config: WeightSparsityConfig) -> None:
    model = make().double()
    bank = attach_weight_gates(model, config)
    with torch.no_grad():
        bank.group.alpha.add_(torch.randn_like(bank.group.alpha))
        bank.group.beta.add_(2.5)
    gates = bank.group()
    assert 0.05 < (gates == 0).double().mean() < 0.95
    if config.pattern == "2:4":
        with torch.no_grad():  # as few as the search leaves before it ends
            bank.group.beta.add_(3.0)
        assert int((bank.group() > 0).sum(0).max()) <= 2
    before = outputs(model)
    fix_weights_(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-12, atol=1e-12)
    fold_weights_(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-12, atol=1e-12)
    for name, layer in matrices(model).items():
        assert type(layer) in (nn.Linear, type(layer)) and "Scaled" not in type(layer).__name__
        assert follows(layer.weight if isinstance(layer, nn.Linear) else layer.weight.T, config.pattern), name


def test_sensitivities_are_squared_slopes_by_every_gate(config: WeightSparsityConfig) -> None:
    model = small().double()
    bank = attach_weight_gates(model, config)
    batches = [
        {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])} for row in rows(2)
    ]
    found = sensitivities(bank, batches, lambda batch: model(**batch).loss)
    name, shape = list(bank.shapes.items())[1]
    pattern, squares = bank.pattern, []
    fold = copy.deepcopy(model)
    for batch in batches:
        gates = torch.ones_like(found[name]).double().requires_grad_()
        weight = dict(fold.named_parameters())[f"{name}.weight"].detach()
        scaled = {f"{name}.weight": weight * pattern.spread(gates, *shape)}
        plain = small().double()
        loss = torch.func.functional_call(plain, scaled, kwargs=batch).loss
        squares.append(torch.autograd.grad(loss, gates)[0].square())
    torch.testing.assert_close(found[name].double(), torch.stack(squares).mean(0), rtol=1e-4, atol=1e-10)


# ---- Training ----


def test_the_target_is_met_and_zeros_stay(config: WeightSparsityConfig, tmp_path: Path) -> None:
    run = trainer(tmp_path, config)
    run.train()
    assert attached_gates(run.model) is None
    assert run.state.log_history[-2]["density"] == pytest.approx(1 - config.target, abs=0.002)
    gated = outputs(run.model)
    run.save_model(str(tmp_path / "saved"))
    assert torch.equal(outputs(run.model), gated) and MASKS in run.model._modules
    densities = run.fold()
    assert torch.equal(outputs(run.model), gated)
    for name, layer in matrices(run.model).items():
        assert follows(layer.weight, config.pattern), name
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(saved), gated)
    about = json.loads((tmp_path / "saved" / "sparsity.json").read_text())
    assert about["density"] == densities == weight_densities(saved) and about["pattern"] == config.pattern
    assert not (tmp_path / "saved" / "training_args.bin").exists()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """The model of a run that never stopped."""
    torch.set_num_threads(1)
    run = trainer(tmp_path_factory.mktemp("unbroken"), CONFIGS["2:4"])
    run.train()
    return run.model


@pytest.mark.parametrize("step", [8, 60])
def test_resuming_gives_the_weights_of_never_stopping(step: int, unbroken: PreTrainedModel, tmp_path: Path) -> None:
    """In the search, and in the recovery."""
    first = trainer(tmp_path, CONFIGS["2:4"])
    first.add_callback(StopAt(step))
    first.train()
    resumed = trainer(tmp_path, CONFIGS["2:4"])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("pattern", ["block", "2:4"])
def test_one_times_eight_is_four_times_two(pattern: str, tmp_path: Path) -> None:
    """In float64, gates as well: in float32 a few of some ten thousand lie on the border."""
    config = CONFIGS[pattern]
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = small().double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        run = trainer(
            tmp_path,
            config,
            model,
            max_steps=30,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        run.distiller.teacher.model.double()
        gates = attached_gates(run.model)
        assert gates is not None
        for tensor in (*gates.parameters(), *gates.buffers()):
            tensor.data = tensor.data.double()
        run.train()
        run.fold()
        weights.append(run.model.state_dict())
    for name, tensor in weights[0].items():
        # Distances to the teacher are taken in float32, whose rounding is what the splits differ by.
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(weights[1][name] == 0, tensor == 0), name


# ---- Sparse tensors ----


@pytest.mark.parametrize("layout", ["csr", "bsr"])
def test_sparse_tensors_compute_the_same(layout: Any) -> None:
    config = CONFIGS["unstructured" if layout == "csr" else "block"]
    model = small()
    bank = attach_weight_gates(model, config)
    with torch.no_grad():
        bank.group.alpha.add_(torch.randn_like(bank.group.alpha))
        bank.group.beta.add_(5.0)
    fold_weights_(model)
    before = outputs(model)
    changed = to_sparse_(model, layout, block_size=8, densest=0.5)
    assert changed and all(model.get_parameter(f"{name}.weight").layout != torch.strided for name in changed)
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_made_sparse_is_refused() -> None:
    with pytest.raises(SparsityError, match="no linear layer has zeros enough"):
        to_sparse_(small(), "csr")
    if not torch.cuda.is_available():
        with pytest.raises(SparsityError, match="NVIDIA GPUs only"):
            to_sparse_(small(), "2:4")


# ---- What is refused ----


@pytest.mark.parametrize("is_over", [False, True])
def test_weights_that_are_read_through_gates_or_masks_are_folded_first(is_over: bool) -> None:
    model = small()
    attach_weight_gates(model, CONFIGS["unstructured"])
    if is_over:
        fix_weights_(model)
        with pytest.raises(SparsityError, match=r"trainer.fold\(\)"):
            attach_weight_gates(model, CONFIGS["unstructured"])
    outputs(model)
    for use in (weight_densities, lambda model: to_sparse_(model, "csr", densest=1.0)):
        with pytest.raises(SparsityError, match=r"trainer.fold\(\)"):
            use(model)
    fold_weights_(model)
    assert set(weight_densities(model).values()) == {1.0} and to_sparse_(model, "csr", densest=1.0)


def test_impossible_wishes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match="of four weights two stay"):
        WeightSparsityConfig(pattern="2:4", target=0.9)
    with pytest.raises(SparsityError, match="block_size"):
        WeightSparsityConfig(pattern="block", block_size=0)
    with pytest.raises(SparsityError, match="unknown pattern"):
        WeightSparsityConfig(pattern="4:8")  # type: ignore[arg-type]
    with pytest.raises(SparsityError, match="no linear layer can have pattern='block'"):
        attach_weight_gates(small(), WeightSparsityConfig(pattern="block", block_size=48))
    with pytest.raises(SparsityError, match="upload"):
        trainer(tmp_path, CONFIGS["2:4"], push_to_hub=True)
    with pytest.raises(SparsityError, match="hidden_distillation_weight"):
        SparseWeightsTrainer(
            model=small(), args=training_arguments(tmp_path), sparsity=CONFIGS["2:4"], teacher=bert(layers=1)
        )
    model = small()
    attach_weight_gates(model, CONFIGS["2:4"])
    with pytest.raises(SparsityError, match="gates already"):
        attach_gates(model, SparsityConfig())
    with pytest.raises(SparsityError, match="another configuration"):
        trainer(tmp_path, CONFIGS["block"], model)
