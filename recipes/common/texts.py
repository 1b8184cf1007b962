"""What recipes for texts share: how long their inputs are, and how they are padded."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.files import DataArguments
from hf_sparse import SparsityError


@dataclass(frozen=True)
class TextArguments(DataArguments):
    """`DataArguments` of texts."""

    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to this number of tokens."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad all inputs to that length; by default, to the longest of their batch."}
    )

    def check(self) -> None:
        """Refuse numbers and combinations that mean nothing.

        Raises:
            SparsityError: there are some.
        """
        super().check()
        if self.max_seq_length < 1:
            raise SparsityError(f"max_seq_length is {self.max_seq_length}: give a number of tokens above 0")

    def lengths(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """How long inputs are, as a tokenizer takes it."""
        length = min(self.max_seq_length, tokenizer.model_max_length)
        return {"max_length": length, "padding": "max_length" if self.pad_to_max_length else False}
