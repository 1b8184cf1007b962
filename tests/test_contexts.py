"""What is changed for a while is as it was afterwards, also after an error."""

import contextlib

import pytest
import torch
from pruning import bert
from torch import nn

from hf_sparse import discover
from hf_sparse.report.report import latencies_ms
from hf_sparse.runtime.contexts import evaluating, unchanged_random_state
from hf_sparse.structure.example_inputs import example_inputs


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_every_module_goes_back_to_its_own_mode(error: type[BaseException] | None) -> None:
    model, other = bert().train(), bert().eval()
    model.bert.embeddings.eval()  # as of somebody who freezes a part
    before = {module: module.training for module in model.modules()}
    with pytest.raises(error) if error else contextlib.nullcontext(), evaluating(model, other):
        assert not any(module.training for module in model.modules())
        model.classifier = nn.Linear(32, 2).eval()
        if error is not None:
            raise error
    assert not other.training and model.classifier.training
    assert all(before.get(module, True) == module.training for module in model.modules())


def test_what_looks_at_a_model_leaves_modes_and_random_numbers_alone() -> None:
    model = bert().train()
    torch.manual_seed(0)
    discover(model)
    latencies_ms([model], example_inputs(model), repeats=1)
    assert model.training and all(module.training for module in model.modules())
    drawn = torch.rand(1)
    torch.manual_seed(0)
    with unchanged_random_state(torch.device("cpu")):
        torch.rand(1)
    assert torch.equal(torch.rand(1), drawn)
