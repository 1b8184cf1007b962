import copy
import warnings
from pathlib import Path

import pytest
import torch
from pruning import bert, trainer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_sparse import SparsityConfig, SparsityError, attach_gates, current_plan, detach_gates
from hf_sparse.gates.attach import gate_bank
from hf_sparse.gates.base import BANK
from hf_sparse.gates.scaling import scale_parameter_
from hf_sparse.structure.example_inputs import example_inputs


@pytest.mark.parametrize("group", ["kind", "layer"])
@pytest.mark.parametrize("gate", ["relative", "simplex"])
def test_open_gates_leave_the_logits(model: PreTrainedModel, gate: str, group: str) -> None:
    inputs = example_inputs(model)
    before = model(**inputs).logits
    attach_gates(model, SparsityConfig(gate=gate, group=group))
    assert torch.equal(model(**inputs).logits, before)


def test_detaching_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    inputs = example_inputs(model)
    before, names = model(**inputs).logits, set(model.state_dict())
    types = [type(module) for module in model.modules()]
    attach_gates(model, SparsityConfig())
    detach_gates(model)
    assert torch.equal(model(**inputs).logits, before)
    assert set(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == types
    assert not model._forward_pre_hooks


def test_weights_keep_their_names_and_gates_come_beside_them(model: PreTrainedModel) -> None:
    names = set(model.state_dict())
    attach_gates(model, SparsityConfig())
    added = set(model.state_dict()) - names
    assert names <= set(model.state_dict())
    assert added and all(name.startswith(f"{BANK}.") for name in added)


def test_a_scaled_projection_equals_a_scaled_input(model: PreTrainedModel) -> None:
    bank = attach_gates(model, SparsityConfig())
    projection = model.get_submodule(bank.structure.blocks[0].output)
    detach_gates(model)
    inputs = projection.in_features if isinstance(projection, nn.Linear) else projection.nx
    x, scale = torch.randn(2, 3, inputs), torch.rand(inputs)
    expected = projection(x * scale)
    shape = (1, -1) if isinstance(projection, nn.Linear) else (-1, 1)
    scale_parameter_(projection, "weight").value = scale.view(shape)
    torch.testing.assert_close(projection(x), expected, rtol=1e-4, atol=1e-5)


def test_every_gate_gets_a_gradient_from_the_task(model: PreTrainedModel) -> None:
    bank = attach_gates(model, SparsityConfig())
    model(**example_inputs(model)).logits.square().sum().backward()
    for name, parameter in bank.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_copy_has_gates_of_its_own(model: PreTrainedModel) -> None:
    attach_gates(model, SparsityConfig())
    inputs = example_inputs(model)
    before = model(**inputs).logits.detach()
    twin = copy.deepcopy(model)
    for group in gate_bank(twin).groups.values():
        group.alpha.data.copy_(torch.randn_like(group.alpha) * 3)
        group.beta.data += 2
    assert not torch.allclose(twin(**inputs).logits, before)
    assert torch.equal(model(**inputs).logits, before)
    detach_gates(twin)
    assert not twin._forward_pre_hooks and model._forward_pre_hooks


def test_gates_work_under_gradient_checkpointing() -> None:
    plain, checkpointed = bert().train(), bert().train()
    with warnings.catch_warnings():
        # Newer versions call it activation checkpointing; the oldest supported one knows only this name.
        warnings.simplefilter("ignore", FutureWarning)
        checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for model in (plain, checkpointed):
        bank = attach_gates(model, SparsityConfig())
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        model(**example_inputs(model)).logits.sum().backward()
        gradients.append([parameter.grad for parameter in bank.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two)


def test_groups_are_the_model_the_kinds_or_the_layers(model: PreTrainedModel) -> None:
    banks = {
        group: attach_gates(copy.deepcopy(model), SparsityConfig(group=group)) for group in ("model", "kind", "layer")
    }
    assert set(banks["model"].groups) == set(banks["kind"].groups) == {"attention", "ffn"}
    assert len(banks["layer"].groups) == len(banks["layer"].structure.blocks)
    for bank in banks.values():
        assert sum(group.share for group in bank.groups.values()) == pytest.approx(1.0)
        assert set(bank.densities(bank.group_gates())) == {"attention", "ffn"}


def test_kinds_whose_units_are_of_very_different_size_share_the_target(tmp_path: Path) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    large = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, head_dim=64)  # 213 neurons' size
    small = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    found = [attach_gates(LlamaForCausalLM(one), SparsityConfig()).config.group for one in (large, small)]
    assert found == ["model", "kind"]
    for given in ({"group": "kind"}, {"gate": "simplex"}, {"layout": "uniform"}):
        assert attach_gates(LlamaForCausalLM(large), SparsityConfig(target=0.4, **given)).config.group == "kind"
    run = trainer(tmp_path, LlamaForCausalLM(large), sparsity=SparsityConfig())
    assert run.sparsity == run.search.config == run.stages.config == SparsityConfig(group="model")


def test_the_plan_is_the_open_gates() -> None:
    model = bert()
    bank = attach_gates(model, SparsityConfig(group="kind"))
    group = bank.groups["attention"]
    group.alpha.data = torch.tensor([0.0, 9.0, 9.0, 0.0, 0.0, 0.0, 0.0, 9.0])
    group.beta.data.fill_(-3.0)
    kept = current_plan(model).kept
    assert kept["bert.encoder.layer.0.attention.self"] == (1, 2)
    assert kept["bert.encoder.layer.1.attention.self"] == (3,)
    assert kept["bert.encoder.layer.0.intermediate"] == tuple(range(40))


class Adapted(nn.Linear):
    """A projection that computes more than its weight says."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__(projection.in_features, projection.out_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + input.mean()


def test_what_cannot_be_gated_is_refused() -> None:
    model = bert()
    attach_gates(model, SparsityConfig())
    with pytest.raises(SparsityError, match="gates already"):
        attach_gates(model, SparsityConfig())
    detach_gates(model)
    with pytest.raises(SparsityError, match="attach_gates"):
        detach_gates(model)
    with pytest.raises(SparsityError, match="would remove everything: the most expensive unit alone is"):
        attach_gates(model, SparsityConfig(target=0.999))
    for layer in model.bert.encoder.layer:
        layer.attention.output.dense = Adapted(layer.attention.output.dense)
        layer.output.dense = Adapted(layer.output.dense)
    with pytest.raises(SparsityError, match="no attention heads or FFN neurons"):
        attach_gates(model, SparsityConfig())
