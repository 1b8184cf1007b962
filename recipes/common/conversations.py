"""Turns conversations, prompts with completions, and texts into tokens, and labels what is to be learnt of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_sparse import SparsityError

COLUMNS = (("messages",), ("prompt", "completion"))
"""What rows have, if it is not a text."""


@dataclass(frozen=True)
class Conversations:
    """Encodes rows of messages, of prompt and completion, or of a text, which is the only column.

    Attributes:
        tokenizer: with a chat template, if there are messages.
        template: another one to use instead.
        assistant_only: whether only what the assistant says is learnt, which the template then marks.
        completion_only: whether completions are learnt without their prompts.
        longest: tokens of a row; what goes on is cut there.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    assistant_only: bool
    completion_only: bool
    longest: int

    def __call__(self, rows: dict[str, list[Any]]) -> Mapping[str, list[Any]]:
        """Encode rows as `input_ids` and `labels`, and leave out those of which nothing is to be learnt.

        Raises:
            SparsityError: messages cannot be written by the chat template.
        """
        found = [self._encoded(dict(zip(rows, row))) for row in zip(*rows.values())]
        kept = [row for row in found if any(label != -100 for label in row["labels"])]
        return {name: [row[name] for row in kept] for name in ("input_ids", "labels")}

    def _encoded(self, row: dict[str, Any]) -> dict[str, list[int]]:
        said, answered = next(iter(row.values())), row.get("completion")
        prompt: list[int] = []
        if isinstance(said, str):
            ids = self.tokenizer(said + (answered or "") + str(self.tokenizer.eos_token))["input_ids"]
            learnt = [1] * len(ids)
            if answered is not None:
                prompt = self.tokenizer(said)["input_ids"]
        else:
            whole = self._written(said + (answered or []), asks=False)
            ids = whole["input_ids"]
            learnt = whole["assistant_masks"] if self.assistant_only else [1] * len(ids)
            if answered is not None:
                prompt = self._written(said, asks=True)["input_ids"]
        if self.completion_only:
            # Tokens may differ where prompt and completion meet.
            known = next((place for place, pair in enumerate(zip(prompt, ids)) if pair[0] != pair[1]), len(prompt))
            learnt = [0] * known + learnt[known:]
        labels = [token if of else -100 for token, of in zip(ids, learnt)]
        return {"input_ids": ids[: self.longest], "labels": labels[: self.longest]}

    def _written(self, messages: list[Any], asks: bool) -> Mapping[str, list[int]]:
        """Write a conversation as tokens, up to where the assistant begins to answer if it `asks`."""
        try:
            found = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                add_generation_prompt=asks,
                return_dict=True,
                return_assistant_tokens_mask=self.assistant_only,
            )
        except (ValueError, TemplateError) as error:
            raise SparsityError(f"messages cannot be written as a chat: {str(error).splitlines()[0]}") from None
        return cast(Mapping[str, list[int]], found)
