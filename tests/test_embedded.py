"""Data and models of runs without flags: the same from the same seed, and nothing of the test data in training."""

import functools
import importlib.util
import io
import re
import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import embedded.kept
import gguf
import numpy as np
import pytest
import torch
from datasets import DatasetDict
from embedded import digits, docstring_tasks, phrases, reports, smollm, speech
from embedded.installed import installed_file
from embedded.kept import kept, untrained
from embedded.tiny_t5 import tiny_t5
from pruning import llama
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ViTConfig,
    ViTImageProcessor,
)

from hf_sparse import SparsityError

FEW = 12
MAKERS: dict[str, Callable[[int], DatasetDict]] = {
    "digits": lambda seed: digits.digits(seed, per_digit=20),
    "canvases": lambda seed: digits.digit_canvases(seed, count=40),
    "spoken digits": lambda seed: speech.spoken_digits(seed, speakers=10),
    "spoken phrases": lambda seed: speech.spoken_phrases(seed, count=30),
    "questions": lambda seed: docstring_tasks.questions(seed, FEW),
    "tags": lambda seed: docstring_tasks.tagged_parameters(seed, FEW),
    "summaries": lambda seed: docstring_tasks.summaries(seed, FEW),
    "pairs": lambda seed: docstring_tasks.sentence_pairs(seed, FEW),
    "choices": lambda seed: docstring_tasks.choices(seed, FEW),
    "documents": lambda seed: docstring_tasks.documents(seed, FEW),
    "phrases": lambda seed: phrases.phrases(seed, count=400),
    "reports": lambda seed: reports.reports(seed, count=40),
}
INPUTS = {"digits": "image", "canvases": "image", "questions": "context", "tags": "tokens", "choices": "sent1"}
"""The column that must not occur in two splits, where it is not the first."""


@functools.cache
def made(name: str) -> DatasetDict:
    return MAKERS[name](0)


def column(rows: Any, name: str) -> list[bytes]:
    """A column as bytes that can be compared."""
    return [
        np.asarray(value).tobytes() if name in ("image", "annotation") else repr(value).encode() for value in rows[name]
    ]


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_seed_gives_the_same_rows_and_no_test_row_is_in_train(name: str) -> None:
    splits = made(name)
    assert list(splits) == ["train", "validation", "test"]
    key = INPUTS.get(name, splits["test"].column_names[0])
    again, other = MAKERS[name](0), MAKERS[name](1)
    seen: set[bytes] = set()
    for split, rows in splits.items():
        values = column(rows, key)
        assert values == column(again[split], key) != column(other[split], key)
        assert all(column(rows, each) == column(again[split], each) for each in rows.column_names)
        assert not seen & set(values)
        seen |= set(values)
    assert len(splits["train"]) > 4 * len(splits["test"]) > 0


def test_digits_are_as_many_of_each() -> None:
    rows = made("digits")["test"]
    assert np.bincount(rows["label"]).tolist() == [2] * 10
    assert rows[0]["image"].size == (28, 28)


def test_masks_of_canvases_lie_on_what_is_bright() -> None:
    for row in made("canvases")["train"]:
        image, mask = np.array(row["image"]), np.array(row["annotation"])
        assert image.shape == mask.shape == (64, 64)
        assert ((mask > 0) == (image >= digits.BRIGHT)).all()
        assert 0 < mask.max() < len(digits.CANVAS_LABELS)


@pytest.mark.parametrize("name", ["spoken digits", "spoken phrases"])
def test_speech_is_audible_and_no_speaker_of_test_is_in_train(name: str) -> None:
    speakers = [set(rows["speaker"]) for rows in made(name).values()]
    assert not speakers[0] & speakers[2]
    for row in made(name)["test"]:
        with wave.open(io.BytesIO(row["audio"]["bytes"])) as file:
            assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (speech.RATE, 2, 1)
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        assert 0.2 < len(sound) / speech.RATE < 5 and np.abs(sound).max() > 1000


def test_answers_lie_where_they_are_said_to() -> None:
    for rows in made("questions").values():
        assert len(set(rows["id"])) == len(rows)
        for row in rows:
            [text], [start] = row["answers"]["text"], row["answers"]["answer_start"]
            assert row["context"][start : start + len(text)] == text == text.strip()
            assert row["question"].removeprefix("What is the type of ").removesuffix("?") in row["context"][:start]


NUMPYS = """Make a box.

Parameters
----------
width, height : float
    Its sides.
color : str or (float, float, float), optional
    Its color : any.
fill : {'none', 'full'}, default: 'none'

Returns
-------
box : Box
"""
GOOGLES = """Make a box.

Args:
    width (`float`): Its width (in mm):
        more.
    color (`str`, *optional*, defaults to `"red"`):
        Its color.

Returns:
    box (Box): The box.
"""


def test_types_are_read_from_both_styles() -> None:
    [one, other] = [docstring_tasks._section(text) for text in (NUMPYS, GOOGLES)]
    assert one is not None and other is not None
    found = {entry["name"]: entry["type"] for entry in one.entries}
    assert found == {"color": "str or (float, float, float)", "fill": "{'none', 'full'}"}
    assert {entry["name"]: entry["type"] for entry in other.entries} == {"width": "`float`", "color": "`str`"}


def test_tags_mark_names_and_types() -> None:
    tags = made("tags")["train"].features["ner_tags"].feature
    for row in made("tags")["train"]:
        names = tags.int2str(row["ner_tags"])
        assert len(names) == len(row["tokens"]) and names.count("B-NAME") == names.count("B-TYPE") >= 2
        assert all(names[i - 1][2:] == name[2:] for i, name in enumerate(names) if name.startswith("I-"))


def test_the_labelled_choice_is_the_first_paragraph() -> None:
    firsts = dict(zip(made("summaries")["train"]["text"], made("summaries")["train"]["summary"]))
    assert made("choices")["train"]["sent1"] == made("summaries")["train"]["text"]
    for row in made("choices")["train"]:
        endings = [row[name] for name in docstring_tasks.ENDINGS]
        assert len(set(endings)) == 4 and endings[row["label"]] == firsts[row["sent1"]]


def test_german_has_its_genders_and_cases_and_its_verb_comes_second() -> None:
    second = {form for forms in phrases.VERBS.values() for form in forms}
    dogs = []
    for row in made("phrases")["train"]["translation"]:
        words = row["de"].removesuffix(".").split()
        first_noun = next(place for place, word in enumerate(words) if place and word[0].isupper())
        verb = next(place for place, word in enumerate(words) if word in second)
        assert verb == 1 if words[0].lower() in phrases.ADVERBS.values() else verb == first_noun + 1
        dogs += re.findall(r"\b(?:[Dd]e[rn]|[Ee]in\w*) (?:\w+ )?Hund\b", row["de"])
    shapes = r"[Dd]er (\w+e )?Hund|[Dd]en (\w+en )?Hund|[Ee]in (\w+er )?Hund|[Ee]inen (\w+en )?Hund"
    assert len(dogs) > 10 and all(re.fullmatch(shapes, dog) for dog in dogs)


def test_a_tiny_t5_reads_and_writes_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.kept, "CACHE", tmp_path)
    texts = [text for row in made("phrases")["train"]["translation"] for text in row.values()]
    directory = tiny_t5(texts, vocabulary=300)
    assert directory == tiny_t5(texts, vocabulary=300) != tiny_t5(texts[:99], vocabulary=300)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (
        len(tokenizer) <= 300
        and tokenizer.decode(tokenizer(texts[0])["input_ids"], skip_special_tokens=True) == texts[0]
    )
    config = AutoModelForSeq2SeqLM.from_pretrained(directory).config
    assert (config.decoder_start_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_what_is_missing_or_changed_is_one_line_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (speech.Espeak, lambda: digits.digits(0), smollm.smollm):
        with monkeypatch.context() as patched:
            patched.setattr(importlib.util, "find_spec", lambda name: None)
            with pytest.raises(SparsityError, match=r"^[^\n]*not installed: run `make install`[^\n]*$"):
                make()
    (tmp_path / "box.py").write_text("")
    (tmp_path / "__init__.py").write_text("raise AssertionError('the code is imported')")
    monkeypatch.syspath_prepend(tmp_path.parent)
    with pytest.raises(SparsityError, match=r"^\S*box.py is not what was published: run `make install`[^\n]*$"):
        installed_file(f"{tmp_path.name}==1.0", "box.py", "0" * 64)


def test_a_llama_of_a_gguf_file_becomes_a_plain_checkpoint(tmp_path: Path) -> None:
    source, model = tmp_path / "tiny.gguf", llama()
    write_gguf(source, model)
    directory = tmp_path / "tiny"
    smollm.unpack(source, directory)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert not hasattr(plain.config, "quantization_config")
    tokens = tokenizer("ab ba", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(tokens[0]) == "ab ba"
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, model(tokens).logits)


def test_what_is_kept_is_made_once_and_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.kept, "CACHE", tmp_path / "models")
    times = []

    def write(directory: Path) -> None:
        (directory / "a").write_text("whole")
        times.append(directory)
        if len(times) == 1:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        kept("one", write)
    assert not list((tmp_path / "models").iterdir())
    assert kept("one", write) == kept("one", write) == tmp_path / "models" / "one"
    assert len(times) == 2 and [path.name for path in (tmp_path / "models").rglob("*")] == ["one", "a"]


def test_a_model_from_scratch_is_the_same_each_time_and_another_for_another_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.kept, "CACHE", tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config, processor = ViTConfig(**sizes, image_size=8, patch_size=4), ViTImageProcessor(size=8)
    state = torch.get_rng_state()
    first = untrained(AutoModel, config, processor)
    assert torch.equal(torch.get_rng_state(), state)
    weights = AutoModel.from_pretrained(first).state_dict()
    shutil.rmtree(first)
    assert untrained(AutoModel, config, processor) == first
    again = AutoModel.from_pretrained(first).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert untrained(AutoModel, ViTConfig(**sizes | {"hidden_size": 16}), processor) != first
    assert untrained(AutoModel, config, ViTImageProcessor(size=16)) != first


def write_gguf(path: Path, model: Any) -> None:
    """A Llama with a tokenizer that knows two letters."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "ab", "ba"]
    words += [f"word{number}" for number in range(config.vocab_size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(words) - 3))
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        array, layer = weight.numpy(), name.split(".")[-2]
        if layer in heads:  # GGUF has other halves of heads next to each other
            array = array.reshape(heads[layer], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
