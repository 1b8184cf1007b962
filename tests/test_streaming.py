"""Models whose weights are elsewhere than their inputs."""

import copy
from typing import Any

import pytest
import torch
from launching import TESTS, forks
from pruning import MODELS, bert
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse import PruningPlan, compact, discover
from hf_sparse.compaction.refit import refit_, refittable
from hf_sparse.runtime import streaming
from hf_sparse.runtime.streaming import layers, streamed
from hf_sparse.structure.example_inputs import example_inputs

COPY = torch.device("cpu", 0)  # no tensor says so of itself, so that all weights are copied


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "device_of", lambda inputs: COPY)


def visiting(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the weights that are not themselves now."""
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor is not before[name]}


def test_nothing_is_computed_from_two_devices() -> None:
    run = forks().run(TESTS / "on_fake_device.py")
    assert run.returncode == 0, run.stderr[-5000:]
    assert run.stdout.split() == list(MODELS)


@pytest.mark.usefixtures("copied")
def test_outputs_are_the_same_and_one_layer_at_a_time_is_there(model: PreTrainedModel) -> None:
    before, inputs = model.state_dict(keep_vars=True), example_inputs(model)
    inside = [{id(tensor) for tensor in layer.parameters()} for layer in layers(model)]
    owners = {name: [i for i, ids in enumerate(inside) if id(tensor) in ids] for name, tensor in before.items()}
    expected = model(**inputs)
    seen = []

    def look(*_: Any) -> None:
        seen.append({owner for name in visiting(model, before) for owner in owners[name]})

    for layer in layers(model):
        layer.register_forward_hook(look)
    with torch.no_grad(), streamed(model, inputs):
        found = model(**inputs)
    assert torch.equal(found[0], expected[0])
    assert sorted(seen, key=min) == [{index} for index in range(len(inside))]  # one at a time
    assert not visiting(model, before)


@pytest.mark.usefixtures("copied")
def test_what_a_hook_changes_is_brought_back() -> None:
    model = bert()
    module, inputs = model.bert.encoder.layer[0].output.dense, example_inputs(model)
    before = module.weight.detach().clone()

    @torch.no_grad()
    def add(module: nn.Module, *_: Any) -> None:
        module.weight.add_(1.0)

    with torch.no_grad(), streamed(model, inputs):
        module.register_forward_hook(add)
        model(**inputs)
    assert torch.equal(module.weight, before + 1.0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_backward_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    inputs, embedded, slopes = example_inputs(model), _probed(model), []
    for device in (torch.device("cpu"), COPY):
        monkeypatch.setattr(streaming, "device_of", lambda inputs, device=device: device)
        embedded.clear()
        with streamed(model, inputs):
            loss = model(**inputs)[0].square().sum()
        slopes += torch.autograd.grad(loss, embedded)
    assert torch.equal(*slopes)


def _probed(model: PreTrainedModel) -> list[Tensor]:
    """The scales, one for each forward, that embeddings are multiplied with from now on."""
    scales: list[Tensor] = []

    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        scales.append(torch.ones((), device=output.device, requires_grad=True))
        return output * scales[-1]

    model.get_input_embeddings().register_forward_hook(scale)
    return scales


@pytest.mark.parametrize("plan", ["every other unit", "a whole sublayer"])
def test_a_model_becomes_the_same_smaller_one(
    model: PreTrainedModel, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = discover(model).blocks
    kept = {block.name: tuple(range(0, block.units, 2)) for block in blocks}
    if plan == "a whole sublayer":
        kept |= {block.name: () for block in blocks[:2]}
    same, teacher = copy.deepcopy(model), copy.deepcopy(model)
    inputs = example_inputs(model)
    for one, device in ((model, torch.device("cpu")), (same, COPY)):
        monkeypatch.setattr(streaming, "device_of", lambda inputs, device=device: device)
        compact(one, PruningPlan(kept), inputs)
        refit_(one, teacher, refittable(one, teacher, [block.output for block in blocks]), inputs)
    assert model.config.to_dict() == same.config.to_dict()
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in same.state_dict().items())
    assert same.state_dict().keys() == expected.keys()


@pytest.mark.usefixtures("copied")
def test_a_forward_that_fails_leaves_the_weights(model: PreTrainedModel) -> None:
    before, inputs = model.state_dict(keep_vars=True), example_inputs(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("no room")

    handle = layers(model)[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no room"), torch.no_grad(), streamed(model, inputs):
        model(**inputs)
    handle.remove()
    assert not visiting(model, before)


@pytest.mark.usefixtures("copied")
def test_an_interrupt_leaves_the_weights_and_a_forward_may_replace_buffers(model: PreTrainedModel) -> None:
    def interrupt(module: nn.Module, *_: Any) -> None:
        module.register_buffer("replaced", module.replaced + 1, persistent=False)
        raise KeyboardInterrupt

    first = layers(model)[0]
    before, inputs = model.state_dict(keep_vars=True), example_inputs(model)
    first.register_buffer("replaced", torch.zeros(1), persistent=False)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), streamed(model, inputs):
        first.register_forward_hook(interrupt)
        model(**inputs)
    assert not visiting(model, before) and first.replaced.item() == 1
