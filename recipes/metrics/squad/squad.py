"""SQuAD's exact match and F1, with questions that have no answer or without, as a local module of `evaluate`."""

import re
import string
from collections import Counter
from typing import Any

import datasets
import evaluate
import numpy as np


class Squad(evaluate.Metric):
    """Share of the answers that are one of the right ones (`exact_match`), and their mean F1 in words (`f1`).

    From 0 to 100. Case, ASCII punctuation, articles and whitespace do not count, and of several right answers the
    nearest does (Rajpurkar et al., 2016). No answer is the empty text, and right where the question has none. Where
    there are such questions, the same figures follow for those with an answer (`HasAns_exact`, `HasAns_f1`) and for
    those without (`NoAns_exact`, `NoAns_f1`), as for SQuAD 2.0 (2018).

    Raises:
        ValueError: predictions and references are of other questions.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        answers = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int32"))}
        return evaluate.MetricInfo(
            description="Exact match and F1 of answers, from 0 to 100.",
            citation="",
            inputs_description="predictions: id and prediction_text; references: id and answers, both in any order.",
            features=datasets.Features(
                {
                    "predictions": {"id": text, "prediction_text": text},
                    "references": {"id": text, "answers": answers},
                }
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        given = {row["id"]: _words(row["prediction_text"]) for row in predictions}
        right = {row["id"]: [words for words in map(_words, row["answers"]["text"]) if words] for row in references}
        if set(given) != set(right):
            raise ValueError(f"questions are not the same: {sorted(set(given) ^ set(right))[:3]}")
        exact = {name: float(given[name] in (answers or [[]])) for name, answers in right.items()}
        f1 = {name: max(_f1(given[name], answer) for answer in answers or [[]]) for name, answers in right.items()}
        results = {"exact_match": _percent(exact.values()), "f1": _percent(f1.values())}
        if not all(right.values()):
            for kind, has in {"HasAns": True, "NoAns": False}.items():
                names = [name for name, answers in right.items() if bool(answers) == has]
                if names:
                    results[f"{kind}_exact"] = _percent(exact[name] for name in names)
                    results[f"{kind}_f1"] = _percent(f1[name] for name in names)
        return results


def _words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _f1(given: list[str], right: list[str]) -> float:
    if not given or not right:
        return float(given == right)
    return 2 * (Counter(given) & Counter(right)).total() / (len(given) + len(right))


def _percent(scores: Any) -> float:
    return 100 * float(np.mean(list(scores)))
