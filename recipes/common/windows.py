"""Cuts questions and texts into windows of tokens, and says where in the text each token stands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_sparse import SparsityError


@dataclass(frozen=True)
class Windows:
    """Encodes rows with `question`, `context`, `example` and perhaps `answers`, as SQuAD has them.

    Attributes:
        tokenizer: a fast one.
        lengths: of inputs, as a tokenizer takes it.
        stride: tokens that two windows of a text have in common.
    """

    tokenizer: PreTrainedTokenizerBase
    lengths: Mapping[str, Any]
    stride: int

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Encode rows as windows with `offsets`, `nowhere` and `example`, as `find_answers` takes them.

        Where there are answers, `start_positions` and `end_positions` are those of the first one, or of the token that
        stands for no answer, if the window does not have all of it.

        Raises:
            SparsityError: a question leaves no room for its text.
        """
        right = self.tokenizer.padding_side == "right"
        asked = [question.lstrip() for question in rows["question"]]
        self._require_room(asked)
        encoded = self.tokenizer(
            *((asked, rows["context"]) if right else (rows["context"], asked)),
            truncation="only_second" if right else "only_first",
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            **self.lengths,
        )
        owners, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        result: dict[str, Any] = {**encoded, "example": [rows["example"][row] for row in owners]}
        result["offsets"] = [
            [list(pair) if of == int(right) else [-1, -1] for pair, of in zip(pairs, encoded.sequence_ids(window))]
            for window, pairs in enumerate(offsets)
        ]
        special = self.tokenizer.cls_token_id
        result["nowhere"] = [ids.index(special) if special in ids else 0 for ids in encoded["input_ids"]]
        if "answers" in rows:
            spans = [
                _span(rows["answers"][row], places) or (nowhere, nowhere)
                for row, places, nowhere in zip(owners, result["offsets"], result["nowhere"])
            ]
            result["start_positions"], result["end_positions"] = map(list, zip(*spans))
        return result

    def _require_room(self, questions: list[str]) -> None:
        longest = max(map(len, self.tokenizer(questions, add_special_tokens=False)["input_ids"]))
        room = self.lengths["max_length"]
        if longest + self.stride + self.tokenizer.num_special_tokens_to_add(pair=True) >= room:
            raise SparsityError(
                f"a question of {longest} tokens and a doc_stride of {self.stride} leave no room in windows of {room}: "
                "raise --max_seq_length, or lower --doc_stride"
            )


def _span(answers: dict[str, list[Any]], places: list[list[int]]) -> tuple[int, int] | None:
    """First and last token of the first answer, if a window has all of it."""
    if not answers["text"]:
        return None
    first, last = answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])
    tokens = [token for token, (start, end) in enumerate(places) if 0 <= start < last and first < end]
    if not tokens or places[tokens[0]][0] > first or places[tokens[-1]][1] < last:
        return None
    return tokens[0], tokens[-1]
