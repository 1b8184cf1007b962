"""BLEU and chrF as a local module of `evaluate`: those of the package sacrebleu, which papers compare."""

from itertools import zip_longest
from typing import Any

import datasets
import evaluate
from sacrebleu.metrics import BLEU, CHRF


class Bleu(evaluate.Metric):
    """Precision of n-grams of words, with a penalty for brevity (`bleu`), and F2 of n-grams of characters (`chrf`).

    From 0 to 100, of all texts together, with as many references for each as there are (Papineni et al., 2002;
    Popović, 2015; Post, 2018). `tokenize` is sacrebleu's: "13a", or "zh", "char", ... for texts without spaces.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="BLEU and chrF of all texts together, from 0 to 100.",
            citation="",
            inputs_description="predictions: texts; references: a text, or a list of texts, for each; tokenize.",
            features=[
                datasets.Features({"predictions": text, "references": datasets.List(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions: Any, references: Any, tokenize: str = "13a") -> dict[str, float]:
        several = [[texts] if isinstance(texts, str) else texts for texts in references]
        streams = [list(stream) for stream in zip_longest(*several)]  # the second of all, ...; None where there is none
        scores = {"bleu": BLEU(tokenize=tokenize), "chrf": CHRF()}
        return {name: float(metric.corpus_score(predictions, streams).score) for name, metric in scores.items()}
