import pytest
import torch

from hf_sparse import SparsityConfig
from hf_sparse.gates.controller import Controller, Schedule

SCHEDULE = Schedule.stages(SparsityConfig(target=0.5), total=1000)[0]


def test_the_phases_are_shares_of_the_run() -> None:
    assert Schedule(0, 10, 130, 180, 1000) == SCHEDULE
    assert [SCHEDULE.progress_at(step) for step in (0, 10, 70, 130, 999)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert [SCHEDULE.recovery_at(step) for step in (0, 180, 262, 1000)] == pytest.approx([0, 0, 0.1, 1])


def test_stages_follow_each_other() -> None:
    stages = Schedule.stages(SparsityConfig(targets=[0.5, 0.75, 0.9]), total=1000)
    assert [(stage.start, stage.end) for stage in stages] == [(0, 333), (333, 667), (667, 1000)]
    assert all(s.start <= s.warmup_end < s.ramp_end <= s.hold_end < s.end for s in stages)


def test_a_ramp_has_at_least_one_step() -> None:
    schedule = Schedule.stages(SparsityConfig(), total=1)[0]
    assert schedule.ramp_end > schedule.warmup_end


def test_lambda_is_zero_in_the_warm_up() -> None:
    controller = Controller(40.0, torch.tensor([1.0]), torch.tensor([0.5]))
    for step in range(SCHEDULE.warmup_end):
        assert controller.steer_(torch.tensor([1.0]), step, SCHEDULE) == 0


def test_lambda_rises_while_too_dense_and_falls_while_too_sparse() -> None:
    controller = Controller(40.0, torch.tensor([1.0]), torch.tensor([0.5]))
    dense = [controller.steer_(torch.tensor([0.8]), step, SCHEDULE).item() for step in range(260, 280)]
    sparse = [controller.steer_(torch.tensor([0.4]), step, SCHEDULE).item() for step in range(280, 300)]
    assert dense[0] > 0 and dense == sorted(dense)
    assert sparse[0] < dense[-1] and sparse == sorted(sparse, reverse=True)


@pytest.mark.parametrize(("density", "direction"), [(0.0502, 1), (0.0498, -1)])
def test_a_density_that_is_nearly_there_is_still_pushed_after_the_ramp(density: float, direction: int) -> None:
    controller = Controller(40.0, torch.tensor([1.0]), torch.tensor([0.05]))
    found = [controller.steer_(torch.tensor([density]), step, SCHEDULE).item() for step in range(200, 300)]
    assert (found[-1] - found[0]) * direction == pytest.approx(99 * 40.0 / 120 * Controller.LEAST_ERROR, rel=1e-4)


def test_the_state_goes_through_a_state_dict() -> None:
    controller, other = (
        Controller(40.0, torch.tensor([1.0]), torch.tensor([0.5])),
        Controller(40.0, torch.tensor([1.0]), torch.tensor([0.5])),
    )
    for step in range(100, 120):
        controller.steer_(torch.tensor([0.9]), step, SCHEDULE)
    other.load_state_dict(controller.state_dict())
    density = torch.tensor([0.7])
    assert torch.equal(controller.steer_(density, 120, SCHEDULE), other.steer_(density, 120, SCHEDULE))
