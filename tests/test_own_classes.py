"""Classes of one's own, as most people have: two heads, another loss, a model inside; pruned, saved, loaded."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import bert, rows, training_arguments
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
)
from transformers.utils import ModelOutput

from hf_sparse import (
    PruningPlan,
    SparseTrainer,
    SparsityConfig,
    SparsityError,
    attach_gates,
    compact,
    discover,
    inspect_checkpoint,
    load_pruned,
    save_pruned,
)
from hf_sparse.structure.comparison import outputs
from hf_sparse.structure.example_inputs import example_inputs
from hf_sparse.structure.prunable import is_quantized


class TwoHeads(BertPreTrainedModel):
    """What is most common: a stock model under its usual name, with heads and a loss of one's own."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.topic, self.tone = nn.Linear(config.hidden_size, 2), nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ModelOutput:
        pooled = self.bert(input_ids, attention_mask=attention_mask).pooler_output
        logits, tone = self.topic(pooled), self.tone(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels) + tone.square().mean()
        return ModelOutput(loss=loss, logits=logits, tone=tone)


class OwnLoss(BertForSequenceClassification):
    """A stock head with another loss."""

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if labels is not None:
            output.loss = nn.functional.multi_margin_loss(output.logits, labels)
        return output


class AnyEncoder(PreTrainedModel):
    """Without a base model of its own; an auto class makes what is inside, and the output is a tuple."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config)
        self.score = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        logits = self.score(self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state.mean(1))
        return (logits,) if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


class OwnConfig(BertConfig):
    """Another entry in a stock config, under its model type."""

    scale: float = 1.0


class Scaled(TwoHeads):
    config_class = OwnConfig

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        output = super().forward(*args, **kwargs)
        output["logits"] = output["logits"] * self.config.scale
        return output


class NewConfig(PreTrainedConfig):
    """A model type that transformers does not know."""

    model_type = "my_encoder"

    def __init__(self, encoder: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.encoder = BertConfig(**(encoder or {}))
        super().__init__(**kwargs)


class NewType(PreTrainedModel):
    config_class = NewConfig
    base_model_prefix = "encoder"

    def __init__(self, config: NewConfig) -> None:
        super().__init__(config)
        self.encoder = BertModel(config.encoder)
        self.score = nn.Linear(config.encoder.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.score(self.encoder(input_ids).pooler_output)
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


def made(kind: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    stock = bert().config.to_dict()
    stock["initializer_range"] = 0.25
    options = {"encoder": stock} if kind is NewType else {**stock, **({"scale": 3.0} if kind is Scaled else {})}
    config_class: Any = kind.config_class
    return kind(config_class(**options)).eval()


KINDS = [TwoHeads, OwnLoss, AnyEncoder, Scaled, NewType]


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_of_ones_own_is_pruned_saved_and_loaded(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    model, inputs = made(kind), {"input_ids": torch.tensor(rows(4)["input_ids"])}
    structure = discover(model, inputs)
    assert len(structure.blocks) == 4
    compact(model, PruningPlan({block.name: tuple(range(i)) for i, block in enumerate(structure.blocks)}), inputs)
    for turn, load in enumerate((load_pruned, lambda path, kind: kind.from_pretrained(path), load_pruned)):
        expected = outputs(model, inputs)
        save_pruned(model, tmp_path / str(turn))
        model = load(tmp_path / str(turn), kind).eval()
        assert isinstance(model, kind) and not is_quantized(model) and not hasattr(model.config, "quantization_config")
        found = outputs(model, inputs)
        assert expected and found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", [TwoHeads, AnyEncoder])
def test_it_is_trained_to_the_same_metrics_as_are_loaded(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    sparsity, held_out = SparsityConfig(target=0.5, sparsity_ramp=0.3), rows(32, seed=1)
    arguments = training_arguments(tmp_path, max_steps=40)
    run = SparseTrainer(
        model=made(kind), args=arguments, train_dataset=rows(64), eval_dataset=held_out, sparsity=sparsity
    )
    run.train()
    run.save_model(str(tmp_path / "out"))
    run.compact()
    reached = run.evaluate()["eval_loss"]
    loaded = load_pruned(tmp_path / "out", kind)
    assert loaded.num_parameters() < made(kind).num_parameters()
    again = Trainer(model=loaded, args=arguments, eval_dataset=held_out).evaluate()["eval_loss"]
    assert again == pytest.approx(reached, rel=1e-5)


def test_uniform_layouts_are_plain_checkpoints_of_the_class(tmp_path: Path) -> None:
    model = made(TwoHeads)
    plan = {block.name: tuple(range(8)) for block in discover(model).blocks if block.kind == "ffn"}
    compact(model, PruningPlan(plan))
    save_pruned(model, tmp_path)
    expected = outputs(model, example_inputs(model))
    found = outputs(TwoHeads.from_pretrained(tmp_path).eval(), example_inputs(model))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_was_saved_of_it_names_the_class_that_it_needs(tmp_path: Path) -> None:
    model = made(TwoHeads)
    compact(model, PruningPlan({discover(model).blocks[0].name: (0,)}))
    save_pruned(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import hf_sparse\nfrom the_code import TwoHeads\n\nmodel = TwoHeads.from_pretrained(" in card
    assert "AutoModel" not in card and "TwoHeads" in str(inspect_checkpoint(tmp_path))
    with pytest.raises(SparsityError, match=r"holds a TwoHeads, which transformers .* load_pruned\(path, TwoHeads\)"):
        load_pruned(tmp_path)
    with pytest.raises(ValueError, match="holds a 'TwoHeads', which is not a class of transformers: give its"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_heads_of_ones_own_come_new_on_a_pruned_stock_model(tmp_path: Path) -> None:
    model = bert()
    compact(model, PruningPlan({discover(model).blocks[0].name: (0,)}))
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path, TwoHeads)
    trunk = dict(model.bert.named_parameters())
    assert all(torch.equal(trunk[name], parameter) for name, parameter in loaded.bert.named_parameters())


class Wrapper(nn.Module):
    """Not a model of transformers, as a SentenceTransformer is not one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = bert().bert

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.normalize(self.encoder(input_ids).last_hidden_state.mean(1))


def test_what_is_inside_of_something_else_gets_smaller_where_it_is(tmp_path: Path) -> None:
    wrapper, data = Wrapper(), rows(64).remove_columns("labels")
    run = SparseTrainer(
        model=wrapper.encoder,
        teacher=copy.deepcopy(wrapper.encoder),
        args=training_arguments(tmp_path, max_steps=40, remove_unused_columns=False),
        train_dataset=data,
        sparsity=SparsityConfig(target=0.5, sparsity_ramp=0.3, distillation_weight=1.0),
    )
    run.train()
    assert run.compact().parameters_after == sum(parameter.numel() for parameter in wrapper.encoder.parameters())
    expected = wrapper.eval()(torch.tensor(data["input_ids"]))
    wrapper.encoder.save_pretrained(tmp_path / "inside")
    wrapper.encoder = AutoModel.from_pretrained(tmp_path / "inside")
    torch.testing.assert_close(wrapper.eval()(torch.tensor(data["input_ids"])), expected)


class NeedsMore(TwoHeads):
    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__(config)
        self.extra = nn.Linear(config.hidden_size, width)


def with_a_module_more() -> PreTrainedModel:
    model = bert()
    model.second = nn.Linear(32, 5)
    return model


def with_another_head() -> PreTrainedModel:
    model = bert()
    model.classifier = nn.Linear(32, 5)
    return model


def with_a_layer_less() -> PreTrainedModel:
    model = bert(layers=3)
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_a_module_more, r"second.weight has shape \(5, 32\), and None in what its class makes"),
        (with_another_head, r"classifier.weight has shape \(5, 32\), and \(2, 32\) in what its class makes"),
        (with_a_layer_less, r"layer.2.\S+ has shape None, and \(32, 32\) .* Set the config to what it is"),
        (
            lambda: NeedsMore(bert().config, 4),
            "NeedsMore could not be loaded again, since it cannot be made from its",
        ),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_before_it_is_trained_or_written(
    make: Any, reason: str, tmp_path: Path
) -> None:
    model = make()
    with pytest.raises(SparsityError, match=reason):
        attach_gates(model, SparsityConfig())
    with pytest.raises(SparsityError, match=reason):
        save_pruned(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
