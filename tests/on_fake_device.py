"""Started by test_streaming.py, as other tests must not see the device: models on the host whose inputs are there."""

import copy
from typing import Any

import torch
from fake_device import DEVICE, at_home, fake_device
from pruning import MODELS
from torch import nn
from transformers import PreTrainedModel

from hf_sparse import PruningPlan, SparsityConfig, compact, discover
from hf_sparse.compaction.refit import refit_, refittable
from hf_sparse.gates.attach import attach_gates
from hf_sparse.runtime.streaming import streamed
from hf_sparse.structure.example_inputs import example_inputs


def move_(module: nn.Module, move: Any, parameters: bool = True) -> None:
    """Move a module, or its buffers alone, to the device in place; Module.to cannot."""
    for part in module.modules():
        tables: list[dict[str, Any]] = [part._buffers, *([part._parameters] if parameters else [])]
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    moved = move(tensor.detach())
                    table[name] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved


def check(model: PreTrainedModel) -> None:
    inputs, dense = example_inputs(model), copy.deepcopy(model)
    blocks = discover(model).blocks
    gone = {block.name for block in blocks[:2]}
    plan = PruningPlan({one.name: () if one.name in gone else tuple(range(0, one.units, 2)) for one in blocks})
    expected, same = model(**inputs)[0], copy.deepcopy(model)
    names = [block.output for block in blocks]
    compact(same, plan, inputs)
    refit_(same, dense, refittable(same, dense, names), inputs)
    with fake_device() as move, torch.no_grad():
        there = move(inputs)
        try:
            model(**there)
        except RuntimeError as error:
            assert "on two devices" in str(error), error
        else:
            raise AssertionError("the device takes tensors of the host")
        with streamed(model, there):
            found = model(**there)[0]
        assert found.device == DEVICE
        torch.testing.assert_close(at_home(found), expected, rtol=1e-5, atol=1e-5)
        bank = attach_gates(model, SparsityConfig(), there)
        move_(bank, move)  # as FSDP leaves it, whole on every device
        compact(model, plan, there)
        move_(dense, move)
        refit_(model, dense, refittable(model, dense, names), there)
    assert model.config.to_dict() == same.config.to_dict()
    for name, tensor in same.state_dict().items():
        atol = 1e-5 * max(1.0, tensor.abs().max().item())  # least squares, by sums in another order
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=atol, msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, make in MODELS.items():
        check(make())
        print(name)
