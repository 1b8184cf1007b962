"""ROUGE as a local module of `evaluate`: Google's implementation, from the package rouge-score."""

from typing import Any

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer


class Rouge(evaluate.Metric):
    """Mean F1 of common words, pairs of words, and longest common subsequences of words (Lin, 2004).

    From 0 to 1: `rouge1`, `rouge2`, `rougeL`, and `rougeLsum`, which compares line with line, so write every sentence
    of a summary on a line of its own. Of several references the best counts. Words are runs of ASCII letters and
    digits, so that texts in other scripts score 0; `use_stemmer=True` takes endings off, as papers on English do.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Mean F1 of common n-grams and longest common subsequences of words, from 0 to 1.",
            citation="",
            inputs_description="predictions: texts; references: a text, or a list of texts, for each; use_stemmer.",
            features=[
                datasets.Features({"predictions": text, "references": datasets.List(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions: Any, references: Any, use_stemmer: bool = False) -> dict[str, float]:
        kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
        scorer = RougeScorer(kinds, use_stemmer=use_stemmer)
        several = [[texts] if isinstance(texts, str) else texts for texts in references]
        scores = [scorer.score_multi(texts, text) for text, texts in zip(predictions, several)]
        return {kind: float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}
