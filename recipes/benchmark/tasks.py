"""What compare.py trains on: a class for every text or every word with MiniLM, or the next word with SmolLM2."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from causal_lm import CausalLM
from common.language import LanguageArguments
from common.metrics import class_metrics, logits_of
from common.running import encode, load_data
from common.task import Data
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from embedded.docstring_tasks import documents
from embedded.minilm import minilm
from embedded.smollm import smollm
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

DOCUMENTS_PER_LIBRARY = 40
SCORED_ROWS = 64  # of each split, for a language model


@dataclass(frozen=True)
class Task:
    """Tokenized data, and what a Trainer needs for them.

    Attributes:
        splits: train, validation and test.
        auto_class: the kind of model.
        path: of the model to begin with.
        labels: names of the classes; a model without any is not fine-tuned first, but pruned as it is.
        metric: what is compared, of what `compute_metrics` returns.
        unit: what it is multiplied by, to be read: 100 makes percent.
    """

    splits: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    auto_class: type[Any]
    path: str
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    labels: tuple[str, ...]
    metric: str
    unit: float = 100.0
    scoring: dict[str, Any] = field(default_factory=lambda: {"compute_metrics": _compute_metrics})

    def evaluation(self) -> dict[str, Any]:
        """Arguments of a Trainer."""
        return {
            "eval_dataset": self.splits["validation"],
            "processing_class": self.tokenizer,
            "data_collator": self.collator,
            **self.scoring,
        }


def _compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return class_metrics(logits_of(prediction).argmax(-1), np.asarray(prediction.label_ids))


def load_task(flags: argparse.Namespace) -> Task:
    """The task that the flags name, of the texts in --data_dir or of docstrings.

    Raises:
        SparsityError: a task with data of its own comes without them, or they are not as `load_data` wants them.
    """
    if flags.task == "language":
        return _language(flags.block_size)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    task = TextClassification(_files(flags))
    data = load_data(task, seed=42)
    if flags.task == "punctuation":
        return _words(data, task.texts[0], tokenizer)
    splits = encode(task, data, tokenizer)
    collator = task.collator(tokenizer)
    return Task(splits, tokenizer, task.auto_class, minilm(), collator, data.labels, "accuracy")


def _language(block_size: int) -> Task:
    """Continuing docstrings, in rows of so many tokens; documents of the splits are of different modules."""
    task = CausalLM(LanguageArguments(block_size=block_size))
    tokenizer = AutoTokenizer.from_pretrained(smollm())
    splits = encode(task, task.load(documents(42, DOCUMENTS_PER_LIBRARY)), tokenizer)
    for split in ("validation", "test"):
        splits[split] = splits[split].select(range(min(SCORED_ROWS, len(splits[split]))))

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return task.compute_metrics(prediction, splits["validation"])

    scoring = {"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": task.scored}
    collator = task.collator(tokenizer)
    return Task(splits, tokenizer, task.auto_class, smollm(), collator, (), "perplexity", 1.0, scoring)


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
    return Task(encoded, tokenizer, task.auto_class, minilm(), task.collator(tokenizer), MARKS, "f1")
