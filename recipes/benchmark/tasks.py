"""What compare.py trains on: a class for every text, or one for every word, with the same model and the same texts."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from common.metrics import class_metrics, logits_of
from common.running import encode, load_data
from common.task import Data
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from embedded.minilm import minilm
from text_classification import Arguments, TextClassification
from token_classification import Arguments as WordArguments
from token_classification import TokenClassification
from transformers import (
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from hf_sparse import SparsityError

MARKS = ("word", "Word", "word,", "Word,", "word.", "Word.")
"""What `punctuation` says of a word: whether it has a capital, and what follows it."""

LONGEST = 128  # tokens


@dataclass(frozen=True)
class Task:
    """Tokenized data, and what a Trainer needs for them.

    Attributes:
        splits: train, validation and test.
        labels: names of the classes.
        auto_class: the kind of model.
        metric: what is compared.
    """

    splits: DatasetDict
    labels: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    auto_class: type[Any]
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    metric: str

    def evaluation(self) -> dict[str, Any]:
        """Arguments of a Trainer."""
        return {
            "eval_dataset": self.splits["validation"],
            "processing_class": self.tokenizer,
            "data_collator": self.collator,
            "compute_metrics": _compute_metrics,
        }


def _compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return class_metrics(logits_of(prediction).argmax(-1), np.asarray(prediction.label_ids))


def load_task(flags: argparse.Namespace) -> Task:
    """The task that the flags name, of the texts in --data_dir or of docstrings.

    Raises:
        SparsityError: a task with data of its own comes without them, or they are not as `load_data` wants them.
    """
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    task = TextClassification(_files(flags))
    data = load_data(task, seed=42)
    if flags.task == "punctuation":
        return _words(data, task.texts[0], tokenizer)
    splits = encode(task, data, tokenizer)
    return Task(splits, data.labels, tokenizer, task.auto_class, task.collator(tokenizer), "accuracy")


def _files(flags: argparse.Namespace) -> Arguments:
    if flags.data_dir is None:
        if flags.task not in ("docstrings", "punctuation"):
            raise SparsityError(f"--task {flags.task} needs --data_dir: a folder with train.csv, dev.csv and test.csv")
        return Arguments()
    names = {"train": "train", "validation": "dev", "test": "test"}
    files: dict[str, Any] = {f"{split}_file": str(flags.data_dir / f"{name}.csv") for split, name in names.items()}
    return Arguments(**files)


def marked_words(text: str) -> tuple[list[str], list[str]]:
    """The words of a text in lower case and without punctuation around them, and the mark of each, one of MARKS."""
    words, marks = [], []
    for written in text.split():
        bare = re.sub(r"^\W+|\W+$", "", written)
        if not bare:
            continue
        after = written[written.rindex(bare) + len(bare) :]
        stop = "." if re.search(r"[.!?]", after) else "," if re.search(r"[,;:]", after) else ""
        words.append(bare.lower())
        marks.append(("word" if bare == bare.lower() else "Word") + stop)
    return words, marks


def _words(data: Data, column: str, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Restoring case and punctuation, as one does to what was heard: a mark for every word, at its first token."""
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=list(MARKS)))})
    splits = {}
    for split, rows in data.splits.items():
        pairs = [marked_words(text) for text in rows[column]]
        splits[split] = Dataset.from_list([{"tokens": words, "ner_tags": marks} for words, marks in pairs], features)
    task = TokenClassification(WordArguments(max_seq_length=LONGEST))
    encoded = encode(task, task.load(DatasetDict(splits)), tokenizer).remove_columns("starts")
    return Task(encoded, MARKS, tokenizer, task.auto_class, task.collator(tokenizer), "f1")
