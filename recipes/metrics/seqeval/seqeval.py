"""F1 of whole spans, as the package seqeval defines it, as a local module of `evaluate`."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate


class Seqeval(evaluate.Metric):
    """Precision, recall and F1 of spans, of which type, first and last word must all be right; accuracy of tags.

    From 0 to 1, and 0 where there is nothing to divide by. Spans are read from tags as in CoNLL's conlleval (Tjong Kim
    Sang and Buchholz, 2000) and seqeval's default mode: a tag that cannot continue a span, or is of another type,
    begins a new one, whatever its letter. So IOB1, IOB2, IOE and IOBES are read alike.

    Raises:
        ValueError: a tag is neither O nor one of B, I, E, S with a type.
    """

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="Precision, recall and F1 of spans in all and by type, accuracy of tags; from 0 to 1.",
            citation="",
            inputs_description="predictions, references: a list of tags such as B-PER or O for every sentence.",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        predicted = {(row, *span) for row, tags in enumerate(predictions) for span in _spans(tags)}
        actual = {(row, *span) for row, tags in enumerate(references) for span in _spans(tags)}
        found, claimed, wanted = (
            Counter(span[-1] for span in spans) for spans in (predicted & actual, predicted, actual)
        )
        results: dict[str, Any] = {
            kind: {**_scores(found[kind], claimed[kind], wanted[kind]), "number": wanted[kind]}
            for kind in sorted(claimed | wanted)
        }
        overall = _scores(found.total(), claimed.total(), wanted.total())
        pairs = [pair for rows in zip(predictions, references, strict=True) for pair in zip(*rows, strict=True)]
        right = sum(one == other for one, other in pairs)
        results |= {f"overall_{name}": score for name, score in overall.items()}
        return {**results, "overall_accuracy": right / len(pairs) if pairs else 0.0}


def _spans(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """First and last place and type of every span."""
    spans: list[tuple[int, int, str]] = []
    before = "O"
    for place, tag in enumerate(tags):
        letter, kind = tag[:1], tag[2:] or "_"
        if (letter not in list("BIES") or tag[1:2] not in ("", "-")) and tag != "O":
            raise ValueError(f"{tag!r} is no tag of a span such as B-PER, I-PER or O: take accuracy and f1 instead")
        if letter in ("I", "E") and before in ("B", "I") and spans[-1][2] == kind:
            spans[-1] = (spans[-1][0], place, kind)
        elif letter != "O":
            spans.append((place, place, kind))
        before = letter
    return spans


def _scores(found: int, claimed: int, wanted: int) -> dict[str, float]:
    return {
        "precision": found / claimed if claimed else 0.0,
        "recall": found / wanted if wanted else 0.0,
        "f1": 2 * found / (claimed + wanted) if claimed + wanted else 0.0,
    }
