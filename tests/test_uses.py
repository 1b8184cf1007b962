"""What people do with a pruned checkpoint: load it in every way, run, train, compress and export it."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pruning import MODELS, learnt, plans, rows, training_arguments
from safetensors import safe_open
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    pipeline,
)

from hf_sparse import PruningPlan, compact, discover, load_pruned, save_pruned
from hf_sparse.structure.example_inputs import example_inputs

AUTO = {
    "bert": AutoModelForSequenceClassification,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "bart": AutoModelForSeq2SeqLM,
}


def logits(model: nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**(inputs or example_inputs(model))).logits


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pruned(name: str) -> PreTrainedModel:
    """Pruned unevenly, with some sublayers gone."""
    model = MODELS[name]()
    compact(model, plans(model)["uneven"])
    compact(model, plans(model)["some sublayers"])
    return model


@pytest.fixture
def path(pruned: PreTrainedModel, tmp_path: Path) -> Path:
    save_pruned(pruned, tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(name: str, pruned: PreTrainedModel, path: Path, implementation: str) -> None:
    model = AUTO[name].from_pretrained(path, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(logits(model), logits(pruned), rtol=1e-5, atol=1e-5)


def test_dtype_and_device_map(name: str, pruned: PreTrainedModel, path: Path) -> None:
    half = AUTO[name].from_pretrained(path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    expected = logits(copy.deepcopy(pruned).to(torch.bfloat16))
    torch.testing.assert_close(logits(half), expected, rtol=1e-2, atol=1e-2)
    mapped = AUTO[name].from_pretrained(path, device_map={"": "cpu"})
    assert torch.equal(logits(mapped), logits(pruned))
    save_pruned(half, path.parent / "half")
    assert AUTO[name].from_pretrained(path.parent / "half").dtype == torch.bfloat16


def test_layers_are_offloaded(name: str, pruned: PreTrainedModel, path: Path, tmp_path: Path) -> None:
    offloaded = AUTO[name].from_pretrained(path, device_map={"": "disk"}, offload_folder=tmp_path / "disk")
    torch.testing.assert_close(logits(offloaded, example_inputs(pruned)), logits(pruned), rtol=1e-6, atol=1e-6)


def test_configs_load_and_copies_are_equal(name: str, pruned: PreTrainedModel, path: Path) -> None:
    config = AutoConfig.from_pretrained(path)
    assert type(config) is type(pruned.config) and config.to_dict().keys() == pruned.config.to_dict().keys()
    assert torch.equal(logits(copy.deepcopy(pruned)), logits(pruned))
    assert AutoConfig.from_pretrained(path, num_labels=5).num_labels == 5
    base = AutoModel.from_pretrained(path)
    assert base.config.base_model_type == pruned.config.base_model_type


def test_saved_again_it_is_the_same(name: str, pruned: PreTrainedModel, path: Path, tmp_path: Path) -> None:
    """By transformers' own method, from a model that came from code in the checkpoint or from the library."""
    for trust in (False, True):
        AUTO[name].from_pretrained(path, trust_remote_code=trust).save_pretrained(tmp_path / "again")
        assert (tmp_path / "again/modeling_hf_sparse.py").is_file()
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (path / file).read_bytes()
        again = AUTO[name].from_pretrained(tmp_path / "again", trust_remote_code=trust)
        assert torch.equal(logits(again), logits(pruned))


def test_large_weights_are_sharded(name: str, pruned: PreTrainedModel, tmp_path: Path) -> None:
    save_pruned(pruned, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(AUTO[name].from_pretrained(tmp_path)), logits(pruned))
    save_pruned(pruned, tmp_path)
    assert not list(tmp_path.glob("model-*")) and torch.equal(logits(load_pruned(tmp_path)), logits(pruned))


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_tied_weights_are_saved_once_and_stay_tied(name: str, pruned: PreTrainedModel, path: Path) -> None:
    with safe_open(path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    model = AUTO[name].from_pretrained(path)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_another_head_is_put_on_and_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(MODELS["bert"]().config)
    compact(model, plans(model)["uneven"])
    save_pruned(model, tmp_path / "masked")
    tagger = AutoModelForTokenClassification.from_pretrained(tmp_path / "masked", num_labels=3)
    save_pruned(tagger, tmp_path / "tagger")
    config = json.loads((tmp_path / "tagger/config.json").read_text())
    assert config["base_architecture"] == "BertForTokenClassification" and set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModelForTokenClassification",
    }
    assert type(load_pruned(tmp_path / "tagger")) is type(tagger)
    assert torch.equal(logits(load_pruned(tmp_path / "tagger")), logits(tagger))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # its name in newer versions
def test_gradient_checkpointing_changes_no_gradient(pruned: PreTrainedModel) -> None:
    gradients, inputs = [], example_inputs(pruned)
    for checkpointing in (False, True):
        model = copy.deepcopy(pruned).train()
        for module in model.modules():
            rates = [name for name, rate in vars(module).items() if "drop" in name and isinstance(rate, float)]
            vars(module).update(dict.fromkeys(rates, 0.0))
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert"])
def test_it_is_fine_tuned_and_pruned_once_more(pruned: PreTrainedModel, path: Path, tmp_path: Path) -> None:
    model = load_pruned(path)
    options = {"args": training_arguments(tmp_path / "run"), "train_dataset": rows(32)}
    assert Trainer(model=model, **options).train().global_step == 40
    before = model.num_parameters()
    gated = logits(learnt(model, 5))
    compact(model)
    assert model.num_parameters() < before
    torch.testing.assert_close(logits(model), gated, rtol=1e-5, atol=1e-5)
    save_pruned(model, tmp_path / "twice")
    assert torch.equal(logits(load_pruned(tmp_path / "twice")), logits(model))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's
def test_a_lora_adapter_is_trained_saved_and_merged(name: str, path: Path, tmp_path: Path) -> None:
    targets = ["q_proj", "o_proj", "down_proj"] if name == "llama" else "all-linear"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, on GPT-2's transposed weights
        adapted = get_peft_model(load_pruned(path), LoraConfig(r=2, target_modules=targets))
    inputs = example_inputs(load_pruned(path))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        adapted(**inputs).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(adapted, inputs)
    assert not torch.equal(expected, logits(load_pruned(path)))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_pruned(path), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    save_pruned(merged, tmp_path / "merged")
    torch.testing.assert_close(logits(load_pruned(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5)


def test_8_bit_dynamic_quantization(name: str, pruned: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have us use torchao
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(pruned), {nn.Linear}, torch.qint8)
    error = (logits(small, example_inputs(pruned)) - logits(pruned)).norm() / logits(pruned).norm()
    assert error < 0.2


def test_compiled_layer_by_layer_there_is_a_graph_for_every_width() -> None:
    model, counter = MODELS["llama"](), CompileCounter()
    ffns = [block for block in discover(model).blocks if block.kind == "ffn"]
    compact(model, PruningPlan({block.name: tuple(range(width)) for block, width in zip(ffns, (8, 16, 8))}))
    before, inputs = logits(model), example_inputs(model)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend=counter)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, before)
    assert counter.frame_count == 2


def test_compiled_it_is_one_graph(pruned: PreTrainedModel) -> None:
    inputs = example_inputs(pruned) | {"use_cache": False}
    compiled = torch.compile(pruned.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, pruned(**inputs).logits, rtol=1e-5, atol=1e-5)


class Logits(nn.Module):
    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model.eval()
        self.names = names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, values)), use_cache=False).logits


def test_exported_by_torch_it_computes_the_same(pruned: PreTrainedModel) -> None:
    inputs = example_inputs(pruned)
    module, values = Logits(pruned, tuple(inputs)), tuple(inputs.values())
    with torch.no_grad():
        program = torch.export.export(module, values)
        torch.testing.assert_close(program.module()(*values), module(*values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_pipelines(name: str, pruned: PreTrainedModel, path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "one": 5, "two": 6, "three": 7}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    save_pruned(pruned, path, tokenizer)
    task = "text-classification" if name == "bert" else "text-generation"
    for trust in (False, True):
        run = pipeline(task, model=str(path), trust_remote_code=trust)
        if name == "bert":
            (found,) = run("one two three")
            scores = logits(pruned, dict(tokenizer("one two three", return_tensors="pt"))).softmax(-1)
            assert found["score"] == pytest.approx(scores.max().item(), rel=1e-5)
        else:
            (found,) = run("one two", max_new_tokens=4, do_sample=False)
            tokens = pruned.generate(**tokenizer("one two", return_tensors="pt"), max_new_tokens=4, do_sample=False)
            assert found["generated_text"] == tokenizer.decode(tokens[0], skip_special_tokens=True)
