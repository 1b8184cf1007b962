"""What recipes share that make a text from a text: flags, inputs and labels."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from common.arguments import RecipeArguments
from common.files import DataArguments
from common.generation import GenerationTask
from common.task import Collator, Data, Encoder
from hf_sparse import SparsityError


@dataclass(frozen=True)
class TextToTextArguments(DataArguments):
    """`DataArguments` of texts that are made from texts."""

    source_prefix: str | None = field(default=None, metadata={"help": "What T5 is to do, such as 'summarize: '."})
    max_source_length: int = field(default=1024, metadata={"help": "Longer sources are cut to this number of tokens."})
    max_target_length: int = field(default=128, metadata={"help": "Longer targets are cut to this number of tokens."})
    val_max_target_length: int | None = field(
        default=None, metadata={"help": "Tokens to generate, at most. Default: as --max_target_length."}
    )
    num_beams: int | None = field(default=None, metadata={"help": "Beams to generate with. Default: the model's."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad all texts to those lengths; by default, to the longest of their batch."}
    )
    ignore_pad_token_for_loss: bool = field(default=True, metadata={"help": "Leave padding out of the loss."})

    def check(self) -> None:
        """Refuse numbers and combinations that mean nothing.

        Raises:
            SparsityError: there are some.
        """
        super().check()
        for option in ("max_source_length", "max_target_length", "val_max_target_length", "num_beams"):
            if (value := getattr(self, option)) is not None and value < 1:
                raise SparsityError(f"{option} is {value}: give a number above 0")


class TextToText(GenerationTask):
    """A task whose rows are a source and a target."""

    auto_class = AutoModelForSeq2SeqLM
    data_arguments = TextToTextArguments
    embedded_model_id = None

    def arrange_(self, arguments: RecipeArguments) -> None:
        """Read from the flags how texts are generated; those of this task come first where there are two for it."""
        flags: Any = arguments
        flags.generation_max_length = (
            flags.generation_max_length or self.arguments.val_max_target_length or self.arguments.max_target_length
        )
        flags.generation_num_beams = self.arguments.num_beams or flags.generation_num_beams
        super().arrange_(arguments)

    @staticmethod
    def paired(sources: Mapping[str, list[str]], targets: Mapping[str, list[str]], column: str) -> Data:
        """Join sources and targets by split; test data may lack targets, which are called by their column."""
        rows = {
            split: Dataset.from_dict({"source": texts, **({"target": targets[split]} if split in targets else {})})
            for split, texts in sources.items()
        }
        return Data(DatasetDict(rows), label_column=column, test_is_labelled="test" in targets)

    def encoder(self, data: Data, processor: PreTrainedTokenizerBase) -> Encoder:
        """Tokenize sources and targets; these are also kept as they are, to be compared with what is generated."""
        flags, prefix, longest = self.arguments, self.arguments.source_prefix or "", processor.model_max_length
        options = {"truncation": True, "padding": "max_length" if flags.pad_to_max_length else False}

        def encode(rows: dict[str, Any]) -> Mapping[str, Any]:
            sources = [prefix + text for text in rows["source"]]
            encoded = processor(sources, max_length=min(flags.max_source_length, longest), **options)
            if "target" not in rows:
                return encoded
            length = min(flags.max_target_length, longest)
            targets = processor(text_target=rows["target"], max_length=length, return_attention_mask=True, **options)
            labels = [
                [token if seen or not flags.ignore_pad_token_for_loss else -100 for token, seen in zip(*row)]
                for row in zip(targets["input_ids"], targets["attention_mask"])
            ]
            return {**encoded, "labels": labels, "target": rows["target"]}

        return encode

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        """Pad to the longest source and the longest target."""
        padding = -100 if self.arguments.ignore_pad_token_for_loss else processor.pad_token_id
        pad = DataCollatorForSeq2Seq(processor, self.model, label_pad_token_id=padding)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            return {name: value for name, value in pad(rows).items() if value is not None}  # labels, of test data

        return collate
