"""Importances that start from sensitivities."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import bart, bert, gpt2, llama, rows, training_arguments
from torch import Tensor, nn
from torch.func import functional_call

from hf_sparse import SparseTrainer, SparsityConfig, WeightSparsityConfig, attach_gates, detach_gates
from hf_sparse.gates.attach import require_bank
from hf_sparse.gates.mathematics import SPREAD
from hf_sparse.gates.row_slopes import batched_sensitivities
from hf_sparse.gates.sensitivity import sensitivities
from hf_sparse.gates.weights import attach_weight_gates


def test_they_are_squared_slopes_of_the_loss_by_every_gate() -> None:
    model = bert().double()
    bank = attach_gates(model, SparsityConfig())
    batches = [
        {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])} for row in rows(3)
    ]
    found = sensitivities(bank, batches, lambda batch: model(**batch).loss)
    step = 1e-5
    with torch.no_grad():
        for block in bank.structure.blocks:
            weight = dict(model.named_parameters())[block.weight.parameter]
            for unit in (0, block.units - 1):
                slopes = []
                for batch in batches:
                    losses = []
                    for sign in (1, -1):
                        gates = torch.ones(block.units, dtype=torch.double)
                        gates[unit] += sign * step
                        whole = weight.clone()
                        weight.mul_(block.column_scale(gates, weight.ndim))
                        losses.append(model(**batch).loss)
                        weight.copy_(whole)
                    slopes.append((losses[0] - losses[1]) / (2 * step))
                expected = torch.stack(slopes).square().mean()
                assert found[block.name][unit].item() == pytest.approx(expected.item(), rel=1e-3)


ONE, OTHER = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10, 11]])


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    found: Tensor = model(tokens).logits
    return found


def contrastive(run: Callable[[Tensor], Tensor]) -> Tensor:
    return (run(ONE) * run(OTHER)).sum()


def with_metrics(run: Callable[[Tensor], Tensor]) -> Tensor:
    """A loss beside which the model runs once more, for what is logged."""
    loss = run(ONE).square().sum()
    with torch.no_grad():
        run(OTHER)
    return loss


def with_a_fixed_side(run: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        fixed = run(OTHER)
    return (run(ONE) - fixed).square().sum()


@pytest.mark.parametrize("loss", [contrastive, with_metrics, with_a_fixed_side])
def test_all_forwards_of_a_loss_count(loss: Callable[..., Tensor]) -> None:
    plain = bert().double()
    model = copy.deepcopy(plain)
    bank = attach_gates(model, SparsityConfig())
    found = sensitivities(bank, [{}], lambda _: loss(functools.partial(logits, model)))
    gates = {block.name: torch.ones(block.units).double().requires_grad_() for block in bank.structure.blocks}
    weights = {}
    for block in bank.structure.blocks:
        weight = plain.get_parameter(block.weight.parameter)
        weights[block.weight.parameter] = weight * block.column_scale(gates[block.name], weight.ndim)
    loss(lambda tokens: functional_call(plain, weights, (tokens,)).logits).backward()
    for name, gate in gates.items():
        assert gate.grad is not None and gate.grad.any()
        torch.testing.assert_close(found[name].double(), gate.grad.square(), rtol=1e-4, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # its name until transformers 6
@pytest.mark.parametrize("make", [bert, llama])
def test_a_forward_without_gradients_changes_none_that_checkpointing_recomputes(make: Any) -> None:
    slopes = []
    for checkpointing in (False, True):
        model = make().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        bank = attach_gates(model, SparsityConfig())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with_metrics(functools.partial(logits, model)).backward()
        slopes.append([parameter.grad for parameter in bank.parameters()])
    for plain, recomputed in zip(*slopes, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_what_runs_before_an_encoder_has_its_slopes_too() -> None:
    """The encoder of a model computes no gates of its own in a forward of that model; alone it does."""
    model = bart()
    bank = attach_gates(model, SparsityConfig())
    used: list[Any] = []

    def in_use() -> list[Any]:
        return [scale.value for scale in bank._scales.values()]

    model.model.encoder.register_forward_pre_hook(lambda *_: used.extend(in_use()))
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    model(**batch)
    assert all(one is other for one, other in zip(used, in_use(), strict=True))
    used.clear()
    model.get_encoder()(batch["input_ids"])
    model.get_encoder()(batch["input_ids"])
    count = len(used) // 2
    assert count == len(bank.structure.blocks) and used[0] is not used[count]
    detach_gates(model)
    assert not model._forward_hooks and not model._forward_pre_hooks


def three_rows(words: bool) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A padded batch with a label a row, or with labels for some of its words, and its rows without padding."""
    tokens, lengths = torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(0)), (9, 5, 7)
    labels = tokens.clone() if words else torch.tensor([0, 1, 1])
    if words:
        labels[1, :3], labels[2, 1:4] = -100, -100
    mask = torch.tensor([[int(place < length) for place in range(9)] for length in lengths])
    if words:
        labels[mask == 0] = -100
    whole = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    alone = [
        {
            name: value[row : row + 1, :length] if value.ndim > 1 else value[row : row + 1]
            for name, value in whole.items()
        }
        for row, length in enumerate(lengths)
    ]
    return whole, alone


@pytest.mark.parametrize(("make", "words"), [(bert, False), (gpt2, True), (llama, True), (bart, True)])
def test_rows_of_a_batch_have_the_sensitivities_that_they_have_alone(make: Any, words: bool) -> None:
    model = make()
    bank = attach_gates(model, SparsityConfig())
    batch, alone = three_rows(words)

    def loss_of(batch: Any) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    found = batched_sensitivities(model, bank, [batch, batch], [alone[0], alone[-1]], loss_of)
    outputs = [model.get_submodule(block.output) for block in bank.structure.blocks]
    assert found is not None and not any(output._forward_pre_hooks for output in outputs)
    for name, expected in sensitivities(bank, alone, loss_of).items():
        assert expected.any()
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4 * expected.max().item())


@pytest.mark.parametrize("loss", ["compares rows", "weighs rows", "of single weights"])
def test_rows_that_cannot_be_told_apart_are_taken_one_by_one(loss: str) -> None:
    model = bert()
    single = attach_weight_gates(model, WeightSparsityConfig()) if loss == "of single weights" else None
    bank = single or attach_gates(model, SparsityConfig())
    batch, alone = three_rows(words=False)

    def loss_of(batch: Any) -> Tensor:
        logits = model(**batch).logits
        if loss == "compares rows":
            return (logits @ logits.T).sum()
        return logits.square().sum(1) @ torch.arange(1.0, len(logits) + 1) if loss == "weighs rows" else logits.sum()

    assert batched_sensitivities(model, bank, [batch], [alone[0], alone[-1]], loss_of) is None


def test_without_rows_there_are_none() -> None:
    assert sensitivities(attach_gates(bert(), SparsityConfig()), [], lambda batch: torch.zeros(())) == {}


def test_gates_stay_exactly_open_and_importances_follow_the_sensitivities() -> None:
    model, inputs = bert(), torch.tensor([[5, 6, 7]])
    before = model(inputs).logits
    bank = attach_gates(model, SparsityConfig())
    scores = {block.name: torch.rand(block.units) for block in bank.structure.blocks}
    first = bank.structure.blocks[0].name
    scores[first][0] = 0.0
    bank.start_from_(scores, 0.5)
    assert all(bool((gate == 1).all()) for gate in bank.block_gates().values())
    assert torch.equal(model(inputs).logits, before)
    for name, group in bank.groups.items():
        joined = torch.cat([scores[block.name] / block.unit_cost for block in bank.members[name]])
        order = group.alpha.detach()[joined.argsort()]
        assert bool((order.diff() >= -SPREAD).all()) and order[-1] > order[0] + 10 * SPREAD


@pytest.mark.parametrize(("options", "power"), [((0.9, None), 0.5), ((0.92, None), 1.0), ((0.92, 0.25), 0.25)])
def test_more_is_left_to_the_sensitivities_where_less_stays(options: tuple[float, float | None], power: float) -> None:
    target, given = options
    config = SparsityConfig(target=target, warm_start=given)
    assert attach_gates(bert(num_attention_heads=8, intermediate_size=400), config).warm_start == power


def test_a_warm_start_takes_nothing_from_what_follows(tmp_path: Path) -> None:
    """Gates start from it; the weights' first step, dropout and data order are those of a run without it."""
    weights = []
    for power in (0.0, 0.5):
        model = bert()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        sparsity = SparsityConfig(
            warm_start=power, sparsity_warmup=0.9, sparsity_ramp=0.05, sparsity_hold=0.0, gate_learning_rate=1e-12
        )
        run = SparseTrainer(
            model=model, args=training_arguments(tmp_path, max_steps=3), sparsity=sparsity, train_dataset=rows(64)
        )
        run.train()
        weights.append(run.model.classifier.weight.detach().clone())
        alphas = torch.cat([group.alpha for group in require_bank(run.model).groups.values()])
        assert (alphas.std().item() > 0.1) == (power > 0)
    torch.testing.assert_close(*weights)
