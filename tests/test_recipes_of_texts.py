"""The recipes that make texts from texts, end to end on a tiny model, and what goes wrong in them."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import summarization
import torch
import translation
from common.generation import Seq2SeqRecipeArguments
from common.metrics import local_metric
from datasets import Dataset, DatasetDict
from launching import command, environment, forks
from pruning import bart
from recipe_runs import SHORT, files, mistake, start, words
from test_recipe import WORDS, write_json
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MBart50Tokenizer, PreTrainedTokenizerFast
from zoo.building import build
from zoo.seq2seq import HALVES

from hf_sparse import SparsityError
from hf_sparse.report.generation import generations

RECIPES = {"summarization": summarization.Summarization, "translation": translation.Translation}


def shortened(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts whose summary is their first words."""
    generator = random.Random(seed)
    rows = [generator.choices(WORDS, k=8) for _ in range(count)]
    return [{"document": " ".join(words), "summary": " ".join(words[:3])} for words in rows]


def translated(count: int, seed: int) -> list[dict[str, Any]]:
    rows = shortened(count, seed)
    return [{"translation": {"en": row["document"], "ro": row["summary"]}} for row in rows]


ROWS = {"summarization": shortened, "translation": translated}
OWN: dict[str, dict[str, object]] = {
    "summarization": {"--source_prefix": "word1 "},
    "translation": {"--source_lang": "en", "--target_lang": "ro_RO", "--label_smoothing_factor": 0.1},
}


def tiny_model(directory: Path) -> Path:
    """A tiny BART with its tokenizer, saved."""
    bart().save_pretrained(directory)
    vocabulary = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(directory)
    return directory


def flags_of(name: str, directory: Path, counts: tuple[int, int, int] = (80, 9, 5)) -> dict[str, object]:
    return {
        **SHORT,
        **files(lambda path, count: write_json(path, ROWS[name](count, count)), directory, counts, "json"),
        "--model_name_or_path": tiny_model(directory / "tiny"),
        "--output_dir": directory / "out",
        "--per_device_train_batch_size": 8,
        "--per_device_eval_batch_size": 4,
        "--num_train_epochs": 3,
        "--max_target_length": 6,
        "--num_beams": 2,
        "--do_predict": None,
        **OWN[name],
    }


def generated(directory: Path, texts: list[str]) -> list[str]:
    """What a saved model makes of texts by itself, one by one."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    tokens = [model.generate(**tokenizer(text, return_tensors="pt"))[0] for text in texts]
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def test_a_translator_trains_resumes_predicts_and_generates_in_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, out = flags_of("translation", tmp_path) | {"--dense_epochs": 1}, tmp_path / "out"
    assert start(RECIPES["translation"], flags, monkeypatch) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["origin"]["task"] == "translation"
    assert abs(report["achieved"] - 0.5) <= 0.05 and report["max_abs_diff"] <= 1e-4
    results = json.loads((out / "all_results.json").read_text())
    assert {f"{split}_{metric}" for split in ("eval", "predict") for metric in ("bleu", "chrf")} <= set(results)
    said, weights = (out / "generated_predictions.txt").read_text(), (out / "model.safetensors").read_bytes()
    texts = [row["document"] for row in shortened(5, 5)]
    assert said.splitlines() == generated(out, texts)

    # A finished run has nothing left to resume but its last checkpoint, and says the same.
    assert start(RECIPES["translation"], {**flags, "--resume_from_checkpoint": "auto"}, monkeypatch) == 0
    assert (out / "model.safetensors").read_bytes() == weights
    assert (out / "generated_predictions.txt").read_text() == said

    card = (out / "README.md").read_text()
    assert "pipeline_tag: translation" in card
    snippet = card.partition("```python\n")[2].partition("```")[0].replace("What a lovely day it was!", texts[0])
    fresh = forks().run("-c", snippet, cwd=tmp_path)
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.splitlines() == said.splitlines()[:1]


def test_summaries_of_every_row_are_scored_once_by_several_processes(tmp_path: Path) -> None:
    """9 rows in batches of 4 on two processes, which have some of them twice to fill their batches."""
    flags, out = flags_of("summarization", tmp_path), tmp_path / "out"
    launch = command(2, "../recipes/summarization.py", *words(flags))
    run = forks().run(*launch[1:], env=environment(tmp_path))
    assert run.returncode == 0, run.stderr[-5000:]
    results = json.loads((out / "all_results.json").read_text())
    for split, count in (("eval", 9), ("predict", 5)):
        rows = shortened(count, count)
        texts, right = generated(out, ["word1 " + row["document"] for row in rows]), [row["summary"] for row in rows]
        for name, score in local_metric("rouge")(predictions=texts, references=right, use_stemmer=True).items():
            assert results[f"{split}_{name}"] == pytest.approx(100 * score)
    assert (out / "generated_predictions.txt").read_text().splitlines() == texts


@pytest.mark.parametrize(
    ("name", "change", "flags", "message"),
    [
        (
            "summarization",
            {},
            {"--text_column": "body"},
            "has no column 'body', only document, summary: set --text_col",
        ),
        ("summarization", {}, {"--text_column": "summary"}, "cannot be text and summary at once"),
        ("summarization", {"summary": None}, {}, "column 'summary' is empty in row 1 of the validation data"),
        ("summarization", {}, {"--num_beams": 0}, "num_beams is 0: give a number above 0"),
        ("summarization", {}, {"--predict_with_generate": False}, "would leave out what is reported"),
        (
            "summarization",
            {},
            {"--num_beams": 1, "--model_name_or_path": "beams"},
            "the model cannot generate like this",
        ),
        ("translation", {}, {"--source_lang": None}, "expected one argument"),
        ("translation", {}, {"--target_lang": "fr"}, "row 1 of the train data has no text in 'fr'"),
        ("translation", {"translation": "word1"}, {}, "row 1 of the validation data has no text in 'en'"),
        (
            "translation",
            {},
            {"--forced_bos_token": "ro_RO"},
            "TokenizersBackend knows no token 'ro_RO'",
        ),
        ("translation", {}, {"--train_file": "train.csv"}, "give a .json or .jsonl file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str,
    change: dict[str, Any],
    flags: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = flags_of(name, tmp_path, (9, 6, 3)) | flags
    if change:
        write_json(tmp_path / "validation.json", [row | change for row in ROWS[name](2, 0)])
    if "--model_name_or_path" in flags:  # which saving would refuse, once beams are no longer searched
        config = json.loads((tmp_path / "tiny/generation_config.json").read_text())
        (tmp_path / "tiny/generation_config.json").write_text(json.dumps(config | {"early_stopping": True}))
        given["--model_name_or_path"] = tmp_path / "tiny"
    assert message in mistake(RECIPES[name], given, monkeypatch, capsys)


def test_missing_languages_are_named() -> None:
    with pytest.raises(SparsityError, match="--target_lang is missing"):
        translation.Arguments(source_lang="en").check()


def test_padding_counts_in_the_loss_only_where_it_is_asked_for(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path))
    rows = {"source": ["word3 word4", "word5"], "target": ["word3", "word5"]}
    for ignored, padding in ((True, -100), (False, tokenizer.pad_token_id)):
        flags = summarization.Arguments(
            pad_to_max_length=True, max_source_length=5, max_target_length=4, ignore_pad_token_for_loss=ignored
        )
        task = summarization.Summarization(flags)
        task.model = bart()
        data = task.paired({"train": rows["source"]}, {"train": rows["target"]}, "summary")
        encoded = task.encoder(data, tokenizer)(rows)
        assert encoded["labels"] == [[7, 2, padding, padding], [9, 2, padding, padding]]
        assert [len(ids) for ids in encoded["input_ids"]] == [5, 5] and encoded["target"] == rows["target"]
        short = [{"input_ids": [7, 2], "labels": [7, 2]}, {"input_ids": [9, 2], "labels": [9]}]
        assert task.collator(tokenizer)(short)["labels"].tolist() == [[7, 2], [9, padding]]
        assert "labels" not in task.collator(tokenizer)([{"input_ids": [7, 2]}])
        measured = task.measured([{**row, "target": "word3"} for row in short], tokenizer, task.model)
        assert set(measured) == {"input_ids", "attention_mask", "decoder_input_ids"}
        assert measured["decoder_input_ids"].shape == (2, 2) and measured["decoder_input_ids"].min() >= 0


def test_a_tokenizer_with_languages_is_told_of_them(tmp_path: Path) -> None:
    tokenizer, model = MBart50Tokenizer(), bart()
    flags = {"source_lang": "en_XX", "target_lang": "ro_RO"}
    task = translation.Translation(translation.Arguments(**flags, forced_bos_token="ro_RO"))
    task.arrange_(Seq2SeqRecipeArguments(str(tmp_path), use_cpu=True))
    model.config.decoder_start_token_id = None
    task.prepare_(model, tokenizer)
    romanian = tokenizer.convert_tokens_to_ids("ro_RO")
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("en_XX", "ro_RO")
    assert model.generation_config.forced_bos_token_id == model.config.decoder_start_token_id == romanian
    assert model.generation_config.max_length == 128
    with pytest.raises(SparsityError, match="M2M100ForConditionalGeneration cannot smooth labels"):
        smoothing = Seq2SeqRecipeArguments(str(tmp_path), use_cpu=True, label_smoothing_factor=0.1)
        task.arrange_(smoothing)
        task.prepare_(build("M2M100ForConditionalGeneration", **HALVES), tokenizer)
    unknown = translation.Translation(translation.Arguments(**flags | {"target_lang": "ro"}))
    with pytest.raises(SparsityError, match="MBart50Tokenizer knows no language 'ro'"):
        unknown.prepare_(model, tokenizer)


def test_columns_are_those_of_known_data_sets_or_the_first_two() -> None:
    def data(**row: str) -> Any:
        task = summarization.Summarization(summarization.Arguments())
        rows = Dataset.from_list([row])
        return task.load(DatasetDict(train=rows, validation=rows))

    news = data(id="1", highlights="short", article="long")
    assert news.splits["train"][0] == {"source": "long", "target": "short"} and news.label_column == "highlights"
    assert data(before="long", after="short").splits["train"][0] == {"source": "long", "target": "short"}


def test_timing_generation_says_nothing_of_lengths_that_a_model_has(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = bart()
    model.generation_config.update(max_length=24, min_length=0)
    tokens = torch.tensor([[3, 4, 2]])
    [found] = generations([model], {"input_ids": tokens, "decoder_input_ids": tokens})
    assert found.tokens_per_second and found.prefill_tokens_per_second and found.cache_bytes_per_token is None
    assert not caplog.text
