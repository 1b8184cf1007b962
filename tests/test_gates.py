import pytest
import torch
from torch import nn

from hf_sparse.gates.mathematics import GATES, GateGroup
from hf_sparse.gates.objective import DENSITIES


def group(n: int, gate: str = "relative", t0: float = 0.05) -> GateGroup:
    return GateGroup(torch.full((n,), 1 / n), gate, t0)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("n", [1, 3, 12, 72, 9216])
@pytest.mark.parametrize("t0", [0.01, 0.05, 0.5])
def test_every_gate_is_exactly_one_at_the_start(gate: str, n: int, t0: float) -> None:
    assert torch.equal(group(n, gate, t0)(), torch.ones(n))


def test_relative_gate_is_the_formula_of_the_design() -> None:
    t0 = 0.05
    learner = group(5, t0=t0)
    learner.alpha.data = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0])
    learner.beta.data += 1.5
    gamma = learner.alpha.exp()
    tau = torch.sigmoid(learner.beta) * gamma.sum()
    expected = torch.relu(1 - tau / gamma) / (1 - t0)
    torch.testing.assert_close(learner(), expected)
    assert learner()[0] == 0


def test_simplex_gate_is_the_formula_of_the_paper() -> None:
    learner = group(5, "simplex")
    learner.alpha.data = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0])
    learner.beta.data += 1.5
    gamma = learner.alpha.exp()
    above = torch.relu(gamma - torch.sigmoid(learner.beta) * gamma.sum())
    torch.testing.assert_close(learner() * learner.opening, 5 * above / above.sum())
    assert learner()[0] == 0


@pytest.mark.parametrize("gate", GATES)
def test_a_constant_added_to_alpha_changes_nothing(gate: str) -> None:
    learner = group(6, gate)
    learner.alpha.data = torch.randn(6)
    before = learner().detach()
    learner.alpha.data += 7.0
    torch.testing.assert_close(learner(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_gates_and_gradients_stay_finite_however_far_importances_drift_apart(gate: str) -> None:
    learner = group(4, gate)
    learner.alpha.data = torch.tensor([-500.0, 0.0, 1.0, 500.0])
    gates = learner()
    gates.square().sum().backward()
    assert torch.isfinite(gates).all()
    assert gates[0] == 0 and gates[3] > 0
    for parameter in learner.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_the_model_leaves_the_gates_in_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2), group(3))
    model[1].alpha.data = torch.tensor([0.1, 0.2, 0.3])
    before = model[1].alpha.detach().clone()
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[1].alpha, before)
    assert all(tensor.dtype == torch.float32 for tensor in model[1].state_dict().values())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("gate", GATES)
def test_gradient_descent_finds_a_known_structure(optimizer: type[torch.optim.Optimizer], gate: str) -> None:
    """Regression on 3 of 12 features, one gate per feature: the 9 others go to exactly zero, and those 3 stay."""
    torch.manual_seed(1)
    useful = [1, 5, 10]
    inputs = torch.randn(256, 12)
    targets = inputs[:, useful] @ torch.tensor([1.0, -2.0, 1.5])
    weights = nn.Parameter(torch.randn(12) * 0.3)
    learner = group(12, gate)
    rates = (0.02, 0.3) if optimizer is torch.optim.SGD else (0.02, 0.02)
    descent = optimizer(
        [{"params": [weights], "lr": rates[0]}, {"params": learner.parameters(), "lr": rates[1], "weight_decay": 0.0}]
    )
    for _ in range(1000):
        descent.zero_grad()
        gates = learner()
        loss = (inputs @ (weights * gates) - targets).square().mean()
        (loss + 1.0 * DENSITIES[gate](gates, learner.weights, 0.5)).backward()
        descent.step()
    assert learner().nonzero().flatten().tolist() == useful
