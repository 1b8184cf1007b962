import copy
from typing import Any

import pytest
import torch
from pruning import MODELS, PLANS, bert, gpt2, learnt, llama, plans
from transformers import BertModel, PreTrainedModel

from hf_sparse import PruningPlan, SparsityConfig, SparsityError, attach_gates, compact, current_plan, discover
from hf_sparse.compaction import compact as compaction
from hf_sparse.modeling_hf_sparse import BiasOnly, RemovedAttention, RemovedFfn
from hf_sparse.structure import proof
from hf_sparse.structure.example_inputs import example_inputs


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gated_equals_compact(model: PreTrainedModel, seed: int) -> None:
    learnt(model, seed)
    inputs, plan = example_inputs(model), current_plan(model)
    gated = model(**inputs).logits
    report = compact(model)
    torch.testing.assert_close(model(**inputs).logits, gated, rtol=1e-5, atol=1e-5)
    assert report.max_abs_diff <= 1e-5 and report.plan == plan
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert report.parameters_after < report.parameters_before
    assert not model._forward_pre_hooks and not any("gate" in name for name in model.state_dict() if "_gates" in name)


def test_a_model_without_a_head_still_returns_its_hidden_states() -> None:
    model = BertModel(bert().config).eval()
    inputs = example_inputs(model)
    compact(model, plans(model)["uneven"])
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("kind", PLANS)
def test_masked_equals_compact(model: PreTrainedModel, kind: str) -> None:
    blocks = discover(model).blocks
    plan = PruningPlan(PLANS[kind](blocks))
    inputs = example_inputs(model)
    masked = copy.deepcopy(model)
    for block in blocks:
        kept = plan.kept.get(block.name, tuple(range(block.units)))
        gone = [unit for unit in range(block.units) if unit not in kept]
        weight = masked.get_submodule(block.output).weight
        weight.data.index_fill_(block.slices[0].dim, block.columns[gone].flatten(), 0.0)
    report = compact(model, plan)
    expected = masked(**inputs).logits
    assert (model(**inputs).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert report.removed == tuple(block.name for block in blocks if plan.kept.get(block.name) == ())


def test_removed_sublayers_are_gone_with_their_norms() -> None:
    model = llama()
    compact(model, plans(model)["nothing left"])
    for layer in model.model.layers:
        assert isinstance(layer.self_attn, RemovedAttention) and isinstance(layer.mlp, RemovedFfn)
        assert not list(layer.parameters())
    encoder = bert()
    compact(encoder, plans(encoder)["nothing left"])
    for layer in encoder.bert.encoder.layer:
        assert isinstance(layer.attention.output.dense, BiasOnly) and isinstance(layer.output.dense, BiasOnly)
        # Two biases and two norms: after each sublayer of BERT comes a norm that still sees the residual.
        assert sum(parameter.numel() for parameter in layer.parameters()) == 2 * 32 + 2 * 2 * 32


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("kind", ["uneven", "some sublayers", "no attention"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_is_generation_without(make: object, kind: str, cache: str) -> None:
    model = MODELS[make.__name__]()
    compact(model, plans(model)[kind])
    prompt = torch.randint(3, 99, (2, 6))
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0  # left padding
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    without = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, cache_implementation=cache, **options), without)


def test_a_compact_model_can_be_pruned_again(model: PreTrainedModel) -> None:
    compact(model, plans(model)["uneven"])
    learnt(model, 3)
    inputs = example_inputs(model)
    gated = model(**inputs).logits
    compact(model)
    torch.testing.assert_close(model(**inputs).logits, gated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_verified_in_float32_and_kept(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    report = compact(learnt(model))
    assert report.max_abs_diff <= 1e-5
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_compact_model_trains() -> None:
    model = bert()
    compact(model, plans(model)["some sublayers"])
    model.train()
    model(**example_inputs(model), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_difference_is_refused_and_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learnt(bert())
    inputs = example_inputs(model)
    before, state = model(**inputs).logits, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    import hf_sparse.compaction.compact as compaction

    def wrong(base: PreTrainedModel, recipe: dict[str, object]) -> None:
        original(base, recipe)
        model.classifier.bias.data = model.classifier.bias.data + 1.0

    original = compaction.resize_
    bias = model.classifier.bias.detach().clone()
    monkeypatch.setattr(compaction, "resize_", wrong)
    with pytest.raises(SparsityError, match="differs from the masked one"):
        compact(model)
    model.classifier.bias.data = bias
    assert type(model).__name__ == "BertForSequenceClassification" and model.config.to_dict() == config
    assert set(model.state_dict()) == set(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**inputs).logits, before)
    monkeypatch.undo()
    compact(model)


def test_a_model_that_cannot_run_compact_is_refused_and_is_as_it_was() -> None:
    model = llama()
    attach_gates(model, SparsityConfig())
    # From now on it reads the number of heads that it was built with.
    queries = model.model.layers[0].self_attn.q_proj
    queries.register_forward_hook(lambda module, args, output: output.view(*output.shape[:-1], 8, 4).flatten(-2))
    plan = PruningPlan({"model.layers.0.self_attn": (0, 1)})
    single = {"input_ids": torch.randint(3, 99, (2, 8))}
    before = model(**single).logits
    with pytest.raises(SparsityError, match="cannot be pruned exactly, and is left as it was"):
        compact(model, plan, single)
    assert torch.equal(model(**single).logits, before)


def test_modes_of_modules_are_kept() -> None:
    model = bert().train()
    model.bert.embeddings.eval()
    compact(model, plans(model)["some sublayers"])
    assert model.training and model.bert.encoder.layer[0].output.training
    assert not model.bert.embeddings.dropout.training


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"nowhere": (0,)}, "does not have: nowhere"),
        ({"bert.encoder.layer.0.attention.self": (4,)}, "which has 4 units"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(kept: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(SparsityError, match=message):
        compact(bert(), PruningPlan(kept))


@pytest.mark.parametrize("units", [(1, 0), (0, 0), (-1,), (True,), (0.0,)])
def test_a_plan_has_ascending_distinct_indices(units: tuple[int, ...]) -> None:
    with pytest.raises(SparsityError, match="ascending"):
        PruningPlan({"block": units})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kept": []}', '{"kept": {"a": 1}}', "[" * 100_000])
def test_what_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(SparsityError, match="not a pruning plan"):
        PruningPlan.from_json(text)


def test_a_plan_survives_json() -> None:
    plan = current_plan(learnt(bert()))
    assert PruningPlan.from_json(plan.to_json()) == plan and copy.deepcopy(plan) == plan


@pytest.mark.parametrize("mistake", [0.0, 3e-7])
def test_what_float32_leaves_in_doubt_is_decided_in_float64(mistake: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (proof, compaction):
        monkeypatch.setattr(module, "RELATIVE_TOLERANCE", 1e-8)  # which float32 cannot hold
    model = llama().eval()
    structure = discover(model)
    assert {block.kind for block in structure.blocks} == {"attention", "ffn"} and not structure.refused
    before = copy.deepcopy(model.state_dict())
    shrink = compaction.shrink

    def mistaken(*args: Any) -> tuple[dict, dict]:
        recipe, values = shrink(*args)
        return recipe, {name: value * (1 + mistake) for name, value in values.items()}

    monkeypatch.setattr(compaction, "shrink", mistaken)
    plan = PruningPlan({block.name: (0, 2, 3) for block in structure.blocks})
    if mistake:
        with pytest.raises(SparsityError, match="cannot be pruned exactly"):
            compact(model, plan)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    else:
        report = compact(model, plan)
        assert report.max_abs_diff < 1e-12 and {p.dtype for p in model.parameters()} == {torch.float32}
