"""The density never falls through its schedule, however fast the gates move, and lands on its target."""

from collections.abc import Callable

import pytest
import torch
from pruning import bert

from hf_sparse import SparsityConfig, SparsityError, WeightSparsityConfig
from hf_sparse.gates.attach import attach_gates
from hf_sparse.gates.base import SteeredGates
from hf_sparse.gates.controller import Schedule
from hf_sparse.gates.landing import LAG, SLACK, TOLERANCE, Descent
from hf_sparse.gates.weights import WeightGates

Optimizer = Callable[..., torch.optim.Optimizer]


def heads_and_neurons(**settings: object) -> SteeredGates:
    model = bert(layers=4, hidden_size=64, num_attention_heads=16, intermediate_size=128)
    return attach_gates(model, SparsityConfig(**settings))


def single_weights(**settings: object) -> SteeredGates:
    layers = {name: torch.nn.Linear(64, 64) for name in ("one", "other")}
    return WeightGates(layers, WeightSparsityConfig(**settings))


def search(bank: SteeredGates, steps: int, make: Optimizer, useful: float = 0.5) -> list[tuple[float, float, bool]]:
    """Train gates alone, on a loss that some of them matter to.

    Args:
        bank: the gates.
        steps: that the whole run would have.
        make: makes their optimizer.
        useful: share of the gates that the loss depends on; all others are equal.

    Returns:
        The density after every step, the one scheduled for it, and whether the structure was found with it.
    """
    schedule, optimizer, course = Schedule.stages(bank.config, steps)[0], make(bank.parameters()), []
    for group in optimizer.param_groups:
        group["lr"] *= schedule.pace
    slopes = {
        name: torch.rand_like(gate) * (torch.rand_like(gate) < useful) for name, gate in bank.group_gates().items()
    }
    for step in range(steps):
        optimizer.zero_grad()
        sum((slopes[name] * (1 - gate) ** 2).mean() for name, gate in bank.group_gates().items()).backward()
        bank.penalize_(step, schedule)
        progress = schedule.progress_at(step + 1)
        scheduled = bank.scheduled_density(progress)
        descent = Descent(bank, progress) if step >= schedule.warmup_end else None
        optimizer.step()
        found = descent is not None and descent.settle_()
        course.append((bank.density(bank.group_gates()).item(), scheduled, found))
        if found:
            break
    return course


def adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=3.0)


def require_above(bank: SteeredGates, course: list[tuple[float, float, bool]]) -> None:
    below = max(SLACK, len(bank.parts()) * bank.largest_unit) + TOLERANCE
    assert all(density >= scheduled - below for density, scheduled, _ in course)


@pytest.mark.parametrize("steps", [60, 600])
@pytest.mark.parametrize("make", [adam, sgd])
@pytest.mark.parametrize("gates", [heads_and_neurons, single_weights])
def test_the_density_never_falls_through_its_schedule(
    gates: Callable[..., SteeredGates], make: Optimizer, steps: int
) -> None:
    bank = gates(target=0.3, sparsity_ramp=0.25)
    course = search(bank, steps, make)
    require_above(bank, course)
    density, _, found = course[-1]
    assert found and abs(density - bank.target_density) <= bank.largest_unit / 2 + TOLERANCE


@pytest.mark.parametrize("steps", [60, 600, 2000])
@pytest.mark.parametrize("make", [adam, sgd])
def test_kinds_that_share_the_target_follow_their_schedule(make: Optimizer, steps: int) -> None:
    """From the first step of the ramp to its last, which ends the search."""
    bank = heads_and_neurons(target=0.3, sparsity_ramp=0.12, group="model")
    course = search(bank, steps, make)
    require_above(bank, course)
    allowed = len(bank.parts()) * bank.largest_unit / 2 + TOLERANCE
    assert all(density <= scheduled + LAG + allowed for density, scheduled, _ in course)
    density, scheduled, found = course[-1]
    assert found and abs(density - bank.target_density) <= allowed and scheduled == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("target", [0.1, 0.9])
@pytest.mark.parametrize("settings", [{"gate": "simplex"}, {"sublayer_gates": True}, {"layout": "uniform"}])
def test_every_kind_of_gates_is_held_to_its_schedule(settings: dict[str, object], target: float) -> None:
    bank = heads_and_neurons(target=target, sparsity_ramp=0.25, **settings)
    course = search(bank, 80, adam)
    require_above(bank, [step for step in course if not step[2]])


def test_equal_gates_close_one_after_another() -> None:
    bank = heads_and_neurons(target=0.5, sparsity_ramp=0.25, warm_start=0.0)
    course = search(bank, 60, adam, useful=0.0)
    density, _, found = course[-1]
    assert found and abs(density - 0.5) <= bank.largest_unit / 2 + TOLERANCE


def test_a_density_that_was_below_its_target_comes_back_to_it() -> None:
    bank = heads_and_neurons(target=0.5, group="kind")
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    assert bank.density(bank.group_gates()) < 0.5
    descent = Descent(bank, 1.0)
    with torch.no_grad():
        for parameter, start in zip(bank.parameters(), descent.steps[0].before):
            parameter.copy_(torch.zeros_like(start) if start.ndim else start - 20.0)  # all open
    assert descent.settle_()
    assert abs(bank.density(bank.group_gates()).item() - 0.5) <= bank.largest_unit / 2 + TOLERANCE


def test_a_step_that_ends_in_time_is_left_alone() -> None:
    bank = heads_and_neurons(target=0.5)
    descent = Descent(bank, 0.02)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    after = [parameter.detach().clone() for parameter in bank.parameters()]
    assert not descent.settle_()
    assert all(torch.equal(one, other) for one, other in zip(after, bank.parameters()))


def test_kinds_share_the_target_by_what_is_least_sensitive_per_cost() -> None:
    bank = heads_and_neurons(target=0.4, group="model")
    blocks, equal = (
        bank.structure.blocks,
        {block.name: torch.full((block.units,), float(block.unit_cost)) for block in bank.structure.blocks},
    )
    dear = {
        block.name: scores * (100.0 if block.kind == "attention" else 1.0)
        for block, scores in zip(blocks, equal.values())
    }
    bank.start_from_(dear, 0.5)
    heads, neurons = bank.parts()
    share = sum(block.unit_cost * block.units for block in blocks if block.kind == "attention") / sum(
        block.unit_cost * block.units for block in blocks
    )
    assert share * heads.target + (1 - share) * neurons.target == pytest.approx(0.6, abs=1e-5)
    assert heads.target == pytest.approx(0.75 * 1.0 + 0.25 * 0.6, abs=0.01)  # three quarters by sensitivity
    course = search(bank, 100, adam)
    assert course[-1][2]
    for part in (heads, neurons):
        assert part.density().item() == pytest.approx(part.target, abs=part.unit / 2 + TOLERANCE)


@pytest.mark.parametrize("settings", [{"gate": "simplex"}, {"sublayer_gates": True}, {"layout": "uniform"}])
def test_kinds_that_cannot_be_steered_alone_do_not_share_the_target(settings: dict[str, object]) -> None:
    with pytest.raises(SparsityError, match="group='model' steers every kind by itself"):
        SparsityConfig(group="model", **settings)
