"""Pruned decoders compute in llama.cpp what they compute in transformers, and what would not is refused."""

import errno
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common.served import Served
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from pruning import bert
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Tokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from hf_sparse import PruningPlan, SparsityError, compact, discover, export_gguf, save_pruned
from hf_sparse.cli import main
from hf_sparse.export.vocabulary import PRE_TOKENIZERS, splits
from hf_sparse.structure.blocks import Block

TEXT = Path(__file__).read_text()
HARD = "I'll say: THEY'VE 1234567 things,\n\n  and\tthe rest ...  don't — naïve 北京!?\r\n\r\n (x+=1)   \n"
VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ROPE = {"rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SPECIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, head_dim=24),
    "llama with biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama with scaled positions": lambda: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "llama3", "original_max_position_embeddings": 32, **ROPE}
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=True),
}


def model(species: str) -> PreTrainedModel:
    """Weights that are large enough that everything shows in the outputs."""
    made = AutoModelForCausalLM.from_config(SPECIES[species]()).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator) + ("norm" in name))
    return made


def tokenizer(splits: Any = None, **model_options: Any) -> PreTrainedTokenizerFast:
    """Merges of bytes; all that these tests generate is ASCII, since no answer ends within a character."""
    made = Tokenizer(models.BPE(**model_options))
    made.pre_tokenizer = splits or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    special = ["<s>", "</s>"]
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, limit_alphabet=len(alphabet)
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


Kept = dict[str, tuple[int, ...]]
PLANS: dict[str, Callable[[list[Block]], Kept]] = {
    "dense": lambda blocks: {},
    "uneven": lambda blocks: {block.name: tuple(range(3 * i % block.units + 1)) for i, block in enumerate(blocks)},
    "uniform": lambda blocks: {block.name: tuple(range(block.units // 2)) for block in blocks},
    "no attention in the first layer": lambda blocks: {blocks[0].name: ()},
    "no attention in the second layer": lambda blocks: {blocks[2].name: ()},
    "no ffn in the last layer": lambda blocks: {blocks[-1].name: ()},
    "no attention": lambda blocks: {block.name: () for block in blocks if block.kind == "attention"},
    "no second layer": lambda blocks: {block.name: () for block in blocks[2:4]},
}


def pruned(species: str, plan: str, path: Path) -> PreTrainedModel:
    """A checkpoint of a model, pruned by a plan, with a tokenizer."""
    made = model(species)
    kept = PLANS[plan](sorted(discover(made).blocks, key=lambda block: (block.layer, block.kind)))
    if kept:
        compact(made, PruningPlan(kept))
    save_pruned(made, path, tokenizer())
    return made


def difference(made: PreTrainedModel, served: Served) -> float:
    """The largest difference in log-probabilities of 30 tokens; those that are generated are compared, too."""
    ids = torch.randint(2, 300, (1, 31), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logprobs = made(ids).logits[0, :-1].log_softmax(-1)
        generated = made.generate(ids[:, :8], max_new_tokens=16, do_sample=False, pad_token_id=1)[0, 8:]
    found = served.greedy(ids[0, :8].tolist(), 16)
    assert found == generated.tolist()
    expected = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    return float((torch.tensor(served.logprobs(ids[0].tolist())) - expected).abs().max())


@pytest.mark.parametrize(
    ("species", "plan", "architecture"),
    [
        ("llama", "dense", "llama"),
        ("llama", "uneven", "deci"),
        ("llama", "uniform", "llama"),
        ("llama", "no attention in the first layer", "deci"),
        ("llama", "no attention in the second layer", "deci"),
        ("llama", "no ffn in the last layer", "deci"),
        ("llama", "no second layer", "llama"),
        ("llama with biases", "uniform", "llama"),
        ("llama with biases", "uneven", "deci"),
        ("llama with biases", "no second layer", "deci"),  # of which the biases are left
        ("llama with scaled positions", "dense", "llama"),
        ("llama with scaled positions", "uneven", "deci"),
        ("mistral", "uneven", "deci"),
        ("qwen2", "dense", "qwen2"),
        ("qwen2", "uniform", "deci"),  # qwen2 takes as many heads as fill the width of the model
        ("qwen2", "uneven", "deci"),
        ("qwen2", "no attention in the first layer", "deci"),
        ("qwen3", "uniform", "qwen3"),
        ("qwen3", "uneven", "openelm"),
        ("qwen3", "no attention in the second layer", "openelm"),
        ("qwen3", "no attention", "qwen3"),
    ],
)
def test_llama_cpp_computes_the_same(species: str, plan: str, architecture: str, tmp_path: Path) -> None:
    made = pruned(species, plan, tmp_path)
    summary = export_gguf(tmp_path, tmp_path / "model.gguf", "f32")
    assert (summary.architecture, dict(summary.otherwise)) == (architecture, {})
    assert difference(made, Served(tmp_path / "model.gguf")) < 1e-4


@pytest.mark.parametrize(("outtype", "bits"), [("f16", 11), ("bf16", 8), ("q8_0", 7), ("q4_0", 3)])
def test_what_is_stored_in_fewer_bits_is_as_near_as_they_allow(outtype: str, bits: int, tmp_path: Path) -> None:
    made = pruned("mistral", "uneven", tmp_path)
    summary = export_gguf(tmp_path, tmp_path / "model.gguf", outtype)
    assert summary.size < 4 * made.num_parameters() and outtype in str(summary)
    found = {one.name: dequantize(one.data, one.tensor_type) for one in GGUFReader(tmp_path / "model.gguf").tensors}
    layers = made.model.layers
    for name, weight in {
        "token_embd.weight": made.get_input_embeddings().weight,
        "blk.0.attn_v.weight": layers[0].self_attn.v_proj.weight,
        "blk.1.ffn_up.weight": layers[1].mlp.up_proj.weight,
    }.items():
        rows = len(weight)
        error = (torch.from_numpy(found[name].copy())[:rows] - weight.detach()).abs().max()
        assert 0 < error <= weight.abs().max() / 2**bits
        assert not found[name][rows:].any()  # neurons that fill up a block
    served = Served(tmp_path / "model.gguf")
    logprobs = served.logprobs(list(range(40, 70)))
    with torch.no_grad():
        ids = torch.arange(40, 70)[None]
        expected = made(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert (torch.tensor(logprobs) - expected).abs().mean() < 8 / 2**bits


def test_rows_that_are_not_whole_blocks_are_filled_up_or_stored_otherwise(tmp_path: Path) -> None:
    pruned("llama", "uneven", tmp_path)  # with heads of 24 channels, and a number of neurons that is no multiple of 32
    summary = export_gguf(tmp_path, tmp_path / "model.gguf", "q4_0")
    neurons = GGUFReader(tmp_path / "model.gguf").fields["deci.feed_forward_length"].contents()
    assert summary.zeros > 0 and all(count % 32 == 0 for count in neurons)
    assert {name: kind for name, kind in summary.otherwise.items() if kind == "f16"} == {
        f"blk.{index}.attn_output.weight": "f16" for index in range(3)
    }
    assert summary.otherwise["token_embd.weight"] == summary.otherwise["output.weight"] == "q8_0"
    assert "f16 instead of q4_0: blk.0.attn_output.weight" in str(summary) and "round_to=32" in str(summary)
    assert all(word in str(summary) for word in ("deci", "MB", f"{summary.zeros} neurons of zeros"))


# ---- Tokenizers ----


def splitting(name: str) -> tuple[Any, dict[str, bool]]:
    """A pre-tokenizer of the table by its name in llama.cpp."""
    [(steps, whole_words)] = [(steps, whole) for steps, (one, whole) in PRE_TOKENIZERS.items() if one == name]
    made = {
        "ByteLevel": lambda prefix, regex: pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex),
        "Digits": lambda individual: pre_tokenizers.Digits(individual_digits=individual),
        "Split": lambda pattern, behavior, invert: pre_tokenizers.Split(Regex(pattern), behavior.lower(), invert),
    }
    parts = [made[kind](*entries) for kind, *entries in steps]
    return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts), {"ignore_merges": whole_words}


@pytest.mark.parametrize("name", [name for name, _ in PRE_TOKENIZERS.values()])
def test_llama_cpp_reads_texts_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    pre_tokenizer, options = splitting(name)
    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    every = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT, HARD], trainers.BpeTrainer(vocab_size=318, initial_alphabet=every))
    made.add_tokens(["<think>"])
    words = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", additional_special_tokens=["<|x|>"])
    sized = LlamaConfig(**{**SIZES, "vocab_size": len(words) + 3})
    save_pruned(AutoModelForCausalLM.from_config(sized), tmp_path, words)
    export_gguf(tmp_path, tmp_path / "model.gguf", "f16")
    served = Served(tmp_path / "model.gguf")
    for text in (TEXT[:2000], HARD, "<think>so<|im_end|> <|x|>it is"):
        found = served.ask("tokenize", content=text, parse_special=True, add_special=True)["tokens"]
        assert found == words.encode(text)


def test_texts_are_split_as_by_the_tokenizers_of_transformers() -> None:
    tokens, merges = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}, [("a", "b")]
    for made, name in ((GPT2Tokenizer(tokens, merges), "gpt-2"), (Qwen2Tokenizer(tokens, merges), "qwen2")):
        assert splits(json.loads(made.backend_tokenizer.to_str()))[0] == name
    llama = inspect.signature(TikTokenConverter).parameters["pattern"].default
    assert [name for steps, (name, _) in PRE_TOKENIZERS.items() if llama in steps[0]] == ["llama-bpe"]


def test_chats_and_special_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = "{% for one in messages %}[{{ one['role'] }}] {{ one['content'] }}{% endfor %}"
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    made = model("llama")
    made.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[1, 299])
    save_pruned(made, tmp_path, words)
    export_gguf(tmp_path, tmp_path / "model.gguf")
    served = Served(tmp_path / "model.gguf")
    chat = [{"role": "user", "content": "Who are you?"}]
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat, tokenize=False)
    assert served.ask("apply-template", messages=chat)["prompt"] == expected == "[user] Who are you?"
    assert served.ask("tokenize", content="print", add_special=True)["tokens"][0] == 0
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 299
    assert fields["tokenizer.ggml.add_bos_token"].contents() and not fields["tokenizer.ggml.add_eos_token"].contents()


# ---- What is refused ----


def edited(path: Path, file: str, **entries: Any) -> None:
    said = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps({**said, **entries}))


def with_tokenizer(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    said = json.loads((path / "tokenizer.json").read_text())
    change(said)
    (path / "tokenizer.json").write_text(json.dumps(said))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another activation": (lambda path: edited(path, "config.json", hidden_act="relu"), "hidden_act is 'relu'"),
    "positions that depend on the length": (
        lambda path: edited(
            path, "config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}
        ),
        "'dynamic' does more than divide",
    ),
    "sizes that are not those of the tensors": (
        lambda path: edited(path, "config.json", hidden_size=32),
        "hidden_size",
    ),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer that can be read"),
    "a tokenizer that is none": (
        lambda path: (path / "tokenizer.json").write_text("{"),
        "no tokenizer that can be read",
    ),
    "another way to split": (
        lambda path: with_tokenizer(path, lambda said: said.update(pre_tokenizer={"type": "Whitespace"})),
        "splits them by .*Whitespace.*known here is gpt-2",
    ),
    "lowercased texts": (
        lambda path: with_tokenizer(path, lambda said: said.update(normalizer={"type": "Lowercase"})),
        "changes texts",
    ),
    "a token that eats spaces": (
        lambda path: with_tokenizer(path, lambda said: said["added_tokens"][1].update(lstrip=True)),
        "</s> has lstrip",
    ),
    "more tokens than embeddings": (
        lambda path: with_tokenizer(path, lambda said: said["model"]["vocab"].update(more=VOCABULARY)),
        f"tokens up to {VOCABULARY}, and the model embeddings of {VOCABULARY}",
    ),
    "an end that is no token": (
        lambda path: edited(path, "generation_config.json", eos_token_id=[1, VOCABULARY]),
        f"ends at .*{VOCABULARY}.*no tokens",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_not_be_exact_is_refused_in_a_line(what: str, tmp_path: Path) -> None:
    pruned("llama", "uneven" if what.startswith("sizes") else "dense", tmp_path)
    spoil, reason = REFUSED[what]
    spoil(tmp_path)
    with pytest.raises(SparsityError, match=reason) as error:
        export_gguf(tmp_path, tmp_path / "model.gguf")
    assert "\n" not in str(error.value) and not (tmp_path / "model.gguf").exists()


def test_layouts_that_no_architecture_has_are_refused(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(SparsityError, match=r"it is a BertForSequenceClassification, and what can be written .* Llama"):
        export_gguf(tmp_path / "bert", tmp_path / "model.gguf")
    untied = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES, tie_word_embeddings=False))
    compact(untied, PruningPlan({discover(untied).blocks[0].name: (0,)}))
    save_pruned(untied, tmp_path / "untied", tokenizer())
    with pytest.raises(SparsityError, match="qwen3 has layers of one size; openelm has no output matrix beside"):
        export_gguf(tmp_path / "untied", tmp_path / "model.gguf")
    window = AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=32))
    save_pruned(window, tmp_path / "window", tokenizer())
    with pytest.raises(SparsityError, match=r"window of 32 positions.*set max_position_embeddings to 32"):
        export_gguf(tmp_path / "window", tmp_path / "model.gguf")
    edited(tmp_path / "window", "config.json", max_position_embeddings=32)
    export_gguf(tmp_path / "window", tmp_path / "model.gguf")
    nothing = model("llama")
    compact(nothing, PruningPlan({block.name: () for block in discover(nothing).blocks}))
    save_pruned(nothing, tmp_path / "nothing", tokenizer())
    with pytest.raises(SparsityError, match="nothing is left"):
        export_gguf(tmp_path / "nothing", tmp_path / "nothing.gguf")
    large = model("llama")
    large.lm_head.weight.data[0, 0] = 1e5
    save_pruned(large, tmp_path / "large", tokenizer())
    with pytest.raises(SparsityError, match=r"output\.weight has values that are too large for f16: write bf16"):
        export_gguf(tmp_path / "large", tmp_path / "large.gguf", "f16")


def test_a_file_is_overwritten_only_when_asked_to_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned("llama", "uneven", tmp_path / "model")
    output = tmp_path / "model.gguf"
    command = ["gguf", str(tmp_path / "model"), str(output)]
    output.write_text("mine")
    with pytest.raises(SystemExit):
        main(command)
    assert output.read_text() == "mine" and "--overwrite" in capsys.readouterr().err

    def full(self: GGUFWriter, tensor: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(GGUFWriter, "write_tensor_data", full)
        main([*command, "--overwrite"])
    assert f"cannot write {output}: No space left on device" in capsys.readouterr().err
    assert output.read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]

    main([*command, "--outtype", "f16", "--overwrite"])
    assert "f16, architecture deci" in capsys.readouterr().out
    assert GGUFReader(output).fields["general.architecture"].contents() == "deci"
    with pytest.raises(SparsityError, match="outtype is 'q2_k': give one of f32, f16"):
        export_gguf(tmp_path / "model", tmp_path / "other.gguf", "q2_k")


def test_the_package_gguf_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hf_sparse.export.gguf_file", raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SparsityError, match=r"pip install 'hf_sparse\[gguf\]'"):
        export_gguf(tmp_path, tmp_path / "model.gguf")
