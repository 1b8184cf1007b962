"""What cannot be pruned is refused in the same words wherever it is given, before anything else fails on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pruning import bert, llama, rows, training_arguments
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hf_sparse import (
    PruningPlan,
    SparseTrainer,
    SparsityConfig,
    SparsityError,
    WeightSparsityConfig,
    attach_gates,
    compact,
    discover,
    save_pruned,
)
from hf_sparse.gates.weights import attach_weight_gates

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = bert()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return self.encoder(input_ids=input_ids, labels=labels)


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def with_quantizer() -> nn.Module:
    model = bert()
    model.hf_quantizer = object()
    return model


def in_bytes() -> nn.Module:
    model = bert()
    weight = model.bert.encoder.layer[0].output.dense.weight
    model.bert.encoder.layer[0].output.dense.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    return model


def wrapped() -> nn.Module:
    """As torchao leaves it: a linear layer whose weight is a tensor of another class."""
    model = bert()
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(TwoTensor(dense.weight.detach(), dense.weight.detach()), requires_grad=False)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "module": (Own, "Own is not a model of transformers .*: give the one inside it, at 'encoder'"),
    "torch": (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential is not a model of transformers .*: give one of tran"),
    "peft": (lambda: get_peft_model(llama(), lora()), "not a model of transformers .* merge_and_unload()"),
    "quantizer": (with_quantizer, "is quantized, and gates are for plain weights: load it without"),
    "bytes": (in_bytes, "is quantized"),
    "wrapped": (wrapped, "is quantized"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_pruned_is_refused_everywhere(kind: str, tmp_path: Path) -> None:
    make, reason = REFUSED[kind]
    model, arguments = make(), training_arguments(tmp_path)
    entries: list[Callable[[], Any]] = [
        lambda: discover(model),
        lambda: attach_gates(model, SparsityConfig()),
        lambda: attach_weight_gates(model, WeightSparsityConfig()),
        lambda: compact(model, PruningPlan({})),
    ]
    if kind not in ("quantizer", "peft"):  # Trainer refuses it itself; adapters of peft are trained, see test_adapters
        entries += [
            lambda: SparseTrainer(model=model, args=arguments, train_dataset=rows(8), sparsity=SparsityConfig())
        ]
    if kind in ("module", "torch", "peft"):
        entries += [lambda: save_pruned(model, tmp_path)]
    for entry in entries:
        with pytest.raises(SparsityError, match=reason):
            entry()


def test_adapters_inside_are_no_blocks_and_are_refused_before_training(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(lora())
    structure = discover(model)
    assert {block.kind for block in structure.blocks} == {"ffn"}
    assert not [block for block in structure.blocks if "lora" in block.name]
    assert {reason for name, reason in structure.refused if name.endswith("o_proj")} == {
        "it has an adapter inside: merge it into the weights first"
    }
    arguments = training_arguments(tmp_path)
    entries: list[Callable[[], Any]] = [
        lambda: attach_gates(model, SparsityConfig()),
        lambda: attach_weight_gates(model, WeightSparsityConfig()),
        lambda: compact(model, PruningPlan({})),
        lambda: save_pruned(model, tmp_path),
        lambda: SparseTrainer(model=model, args=arguments, train_dataset=rows(8), sparsity=SparsityConfig()),
    ]
    for entry in entries:
        with pytest.raises(SparsityError, match=r"has adapters inside \(such as .*q_proj\).*merge_and_unload\(\)"):
            entry()


def test_merged_adapters_are_plain_weights() -> None:
    model = get_peft_model(llama(), lora()).merge_and_unload()
    assert [block.name for block in attach_gates(model, SparsityConfig()).structure.blocks] == [
        block.name for block in discover(llama()).blocks
    ]
