"""What recipes for language models share: texts cut into blocks, and how well tokens are predicted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from textwrap import indent
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import RecipeArguments
from common.files import KINDS, DataArguments, DividedArguments, Kinds, require_columns, require_texts
from common.metrics import Metric, first
from common.task import Data, Task
from hf_sparse import SparsityError

SHOWN = 24
"""Tokens of a text that a model goes on after, unless it is a question, and tokens that it then says."""

METRICS = (Metric("perplexity", "perplexity", higher_is_better=False, percent=False), Metric("accuracy", "accuracy"))


@dataclass(frozen=True)
class LanguageArguments(DividedArguments):
    """`DataArguments` of running text."""

    text_column_name: str | None = field(
        default=None, metadata={"help": "Column of the texts. Default: text, or the first one."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens of a row. Default: 1024, or what the model takes, if that is less."}
    )
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep line breaks of .txt files."})

    @property
    def kinds(self) -> Kinds:
        """The files that can be read."""
        return {**KINDS, ".txt": ("text", {"keep_linebreaks": self.keep_linebreaks})}

    def check(self) -> None:
        """Refuse numbers and combinations that mean nothing.

        Raises:
            SparsityError: there are some.
        """
        super().check()
        if self.block_size is not None and self.block_size < 2:
            raise SparsityError(f"block_size is {self.block_size}: give a number of tokens above 1")

    def block(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """How many tokens a row has."""
        return min(self.block_size or 1024, tokenizer.model_max_length)


class LanguageModel(Task):
    """Tokens of running text.

    Attributes:
        text: the column.
        shift: by how many places labels are ahead of the logits that predict them.
    """

    data_arguments: type[DataArguments] = LanguageArguments
    metrics = METRICS
    why_rows_are_left_out = "it does not fill a row of --block_size tokens: give more text, or lower it"
    text: str
    shift: int

    def arrange_(self, arguments: RecipeArguments) -> None:
        """Refuse predictions: there are none that one would want in a file.

        Raises:
            SparsityError: they are asked for.
        """
        if arguments.do_predict:
            raise SparsityError("--do_predict has no meaning here: test data are scored without it")

    def load(self, splits: DatasetDict) -> Data:
        """Find the texts."""
        names = splits["train"].column_names
        self.text = self.arguments.text_column_name or ("text" if "text" in names else names[0])
        require_columns(splits, [self.text], "set --text_column_name")
        require_texts(splits, [self.text])
        return Data(DatasetDict({split: rows.select_columns([self.text]) for split, rows in splits.items()}))

    def example(self, model: PreTrainedModel, rows: Dataset, processor: Any) -> str | None:
        """Go on after the beginning of a text, or after what is not to be learnt of it, such as a question."""
        if not self.shift:  # it fills gaps
            return None
        ids, labels = rows[0]["input_ids"], rows[0]["labels"]
        asked = next((place for place, label in enumerate(labels) if label != -100), 0) or min(SHOWN, len(ids) // 2)
        prompt = torch.tensor([ids[:asked]], device=model.device)
        generator: Any = model.eval()  # PreTrainedModel itself has no method to generate
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": SHOWN}
        whole = generator.generate(prompt, **options)[0]
        said, answer = (processor.decode(part, skip_special_tokens=True) for part in (whole[:asked], whole[asked:]))
        return f"after\n{indent(said, '    ')}\nit goes on\n{indent(answer, '    ')}"

    def trainer_options(self, processor: Any) -> dict[str, Any]:
        """Keep what is needed of logits, and not all of them."""
        return {"preprocess_logits_for_metrics": self.scored}

    def scored(self, logits: Any, labels: Tensor) -> Tensor:
        """Score every token: how surprising it is, in nats, and whether it is the likeliest.

        Args:
            logits: shape (rows, tokens, words), or a tuple that begins with them.
            labels: shape (rows, tokens), -100 where there is none.

        Returns:
            Shape (rows, tokens, 2), zero where there is no label.
        """
        logits = first(logits)
        places = logits.shape[1] - self.shift
        logits, wanted = logits[:, :places].flatten(0, 1).float(), labels[:, self.shift :].flatten()
        surprise = F.cross_entropy(logits, wanted, ignore_index=-100, reduction="none")
        found = torch.stack([surprise, (logits.argmax(-1) == wanted).float()], -1)
        return F.pad(found.unflatten(0, (-1, places)), (0, 0, self.shift, 0))

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Average over all tokens, however they were put in batches."""
        labels = np.array(prediction.label_ids)
        labels[:, : self.shift] = -100
        surprise, right = np.asarray(prediction.predictions)[labels != -100].mean(0, dtype=np.float64)
        return {"perplexity": float(np.exp(surprise)), "accuracy": float(right)}


def blocks(encoded: Mapping[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Join encoded texts and cut them into rows of so many tokens; the rest, which is shorter, is left out."""
    joined = {name: list(chain.from_iterable(values)) for name, values in encoded.items()}
    starts = range(0, len(joined["input_ids"]) - length + 1, length)
    return {name: [values[start : start + length] for start in starts] for name, values in joined.items()}
