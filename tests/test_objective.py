import pytest
import torch

from hf_sparse.gates.objective import DENSITIES, simplex_density


@pytest.mark.parametrize("gate", DENSITIES)
@pytest.mark.parametrize("p", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_equal_survivors_count_as_their_share_of_the_cost(gate: str, p: float, k: int) -> None:
    weights = torch.rand(10)
    weights /= weights.sum()
    gates = (torch.arange(10) < k).float()
    share = weights[:k].sum()
    torch.testing.assert_close(DENSITIES[gate](gates, weights, p), share)


def test_the_simplex_density_is_the_p_norm_of_the_paper_over_n() -> None:
    a = torch.softmax(torch.randn(8), 0)
    norm = a.sqrt().sum() ** 2
    torch.testing.assert_close(simplex_density(8 * a, torch.full((8,), 1 / 8), 0.5), norm / 8)


@pytest.mark.parametrize("gate", DENSITIES)
@pytest.mark.parametrize("gates", [[0.0, 0.0, 0.0], [0.0, 1e-30, 1.0], [0.0, 0.5, 1.0]])
def test_gradients_are_finite_where_gates_are_closed(gate: str, gates: list[float]) -> None:
    tensor = torch.tensor(gates, requires_grad=True)
    density = DENSITIES[gate](tensor, torch.full((3,), 1 / 3), 0.5)
    (slope,) = torch.autograd.grad(density, tensor)
    assert torch.isfinite(density) and torch.isfinite(slope).all()
