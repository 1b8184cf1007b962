"""Fine-tune and prune a masked language model; with no flags, MiniLM on docstrings.

    python recipes/masked_lm.py
    accelerate launch recipes/masked_lm.py --model_name_or_path distilbert/distilroberta-base \\
        --train_file notes.txt --block_size 256 --output_dir runs/mlm

Texts are a column of any data, or the lines of .txt files; they are joined and cut into rows of --block_size tokens, or
are a row each with --line_by_line. Where no validation data are given, --validation_split_percentage of the training
data are put aside. What is masked differs from epoch to epoch in training, and never in evaluation.
"""

from dataclasses import dataclass, field
from typing import Any

from common.language import LanguageArguments, LanguageModel, blocks
from common.running import run
from common.task import Collator, Data, Encoder
from datasets import DatasetDict
from embedded.docstring_tasks import documents
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
)

from hf_sparse import SparsityError

SEED = 1
"""Of the masks of evaluations, so that all models are asked for the same words."""


@dataclass(frozen=True)
class Arguments(LanguageArguments):
    """How much is masked, and what a row is."""

    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are to be predicted."})
    line_by_line: bool = field(default=False, metadata={"help": "Every text is a row, cut to --block_size tokens."})
    max_seq_length: int | None = field(default=None, metadata={"help": "As --block_size, by its other name."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad rows of --line_by_line to --block_size."})

    def check(self) -> None:
        """Refuse numbers and combinations that mean nothing.

        Raises:
            SparsityError: there are some.
        """
        super().check()
        if not 0 < self.mlm_probability < 1:
            raise SparsityError(f"mlm_probability is {self.mlm_probability:g}: give a share between 0 and 1")

    def block(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """How many tokens a row has, at most."""
        return min(self.max_seq_length or self.block_size or 1024, tokenizer.model_max_length)


class MaskedLM(LanguageModel):
    """Masked tokens of running text."""

    pipeline_tag = "fill-mask"
    auto_class = AutoModelForMaskedLM
    data_arguments = Arguments
    shift = 0
    embedded_name = "docstrings"
    embedded_defaults = {
        "output_dir": "runs/masked_lm",
        "block_size": 64,
        "learning_rate": 3e-4,
        "dense_epochs": 2.0,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
    }

    def embedded_data(self, seed: int) -> DatasetDict:
        """What do libraries say of themselves?"""
        return documents(seed, per_library=15)

    def load(self, splits: DatasetDict) -> Data:
        """Find the texts, and mark those of evaluations."""
        data = super().load(splits)
        for split, rows in data.splits.items():
            if self.arguments.line_by_line:
                rows = rows.filter(lambda row: bool(row[self.text].strip()))
                data.splits[split] = rows
            if split != "train":
                data.splits[split] = rows.add_column("evaluated", [True] * len(rows))
        return data

    def encoder(self, data: Data, processor: PreTrainedTokenizerBase) -> Encoder:
        """Tokenize texts; rows of evaluations are masked here, once and for all, and have labels."""
        if processor.mask_token is None:
            raise SparsityError(f"{type(processor).__name__} has no mask token: take a masked language model")
        column, by_line, share = self.text, self.arguments.line_by_line, self.arguments.mlm_probability
        length = self.arguments.block(processor)
        padding = "max_length" if self.arguments.pad_to_max_length else False

        def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            found: dict[str, list[Any]]
            if by_line:
                found = dict(processor(rows[column], truncation=True, max_length=length, padding=padding))
            else:
                found = blocks(processor(rows[column]), length)
            if "evaluated" not in rows:
                return found
            mask = DataCollatorForLanguageModeling(processor, mlm_probability=share, seed=SEED)
            masked = [mask([{"input_ids": ids}]) for ids in found["input_ids"]]
            return found | {name: [row[name][0].tolist() for row in masked] for name in ("input_ids", "labels")}

        return encode

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        """Pad to the longest row, and mask what has no labels yet."""
        mask = DataCollatorForLanguageModeling(processor, mlm_probability=self.arguments.mlm_probability)
        pad = DataCollatorForTokenClassification(processor)
        return lambda rows: (pad if "labels" in rows[0] else mask)(rows)


if __name__ == "__main__":
    run(MaskedLM, __doc__)
