"""Error rates of words and characters (WER, CER) as a local module of `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np


class ErrorRates(evaluate.Metric):
    """Substitutions, deletions and insertions per word of the references (`wer`), and per character (`cer`).

    0 where all is right, and above 1 where more is wrong than there is (Levenshtein, 1966). All texts count together.
    Words are what whitespace separates; characters are code points, with one space between words. Case and punctuation
    count: take them out of both texts if they should not.

    Raises:
        ValueError: the references have no words at all.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Edits per word and per character of the references, from 0.",
            citation="",
            inputs_description="predictions, references: texts.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        heard, said = [text.split() for text in predictions], [text.split() for text in references]
        if not any(said):
            raise ValueError("an error rate is per word of the references, and they have none")
        letters = [[list(" ".join(words)) for words in texts] for texts in (heard, said)]
        return {"wer": _rate(heard, said), "cer": _rate(*letters)}


def _rate(predictions: list[list[str]], references: list[list[str]]) -> float:
    return sum(map(_edits, predictions, references)) / sum(map(len, references))


def _edits(one: list[str], other: list[str]) -> int:
    """Levenshtein's distance, row by row: `row[j]` edits make the first j of `other` from what was read of `one`."""
    places = np.arange(len(other) + 1)
    row, others = places, np.array(other, dtype=object)
    for count, item in enumerate(one, start=1):
        changed = np.minimum(row[1:] + 1, row[:-1] + (others != item))
        row = np.minimum.accumulate(np.append(count, changed) - places) + places  # the last part inserts
    return int(row[-1])
