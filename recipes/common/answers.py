"""From logits of starts and ends to answers: the best spans of all windows of a text, and whether there is none."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset


@dataclass(frozen=True)
class Answer:
    """What a model answers to one question.

    Attributes:
        text: the answer; empty if there is none.
        candidates: the best answers with `text`, `score` (the sum of both logits) and `probability` among them.
        null_odds: how much higher the score of no answer is than that of the best answer.
    """

    text: str
    candidates: list[dict[str, Any]]
    null_odds: float


def find_answers(
    logits: tuple[np.ndarray, np.ndarray],
    windows: Dataset,
    contexts: Mapping[int, str],
    n_best: int,
    longest: int,
    threshold: float | None,
) -> dict[int, Answer]:
    """Find the answer to every question, whose text may be in several windows.

    Args:
        logits: of starts and ends, shape (windows, tokens); what is beyond the tokens of a window is padding.
        windows: with `example`, whose text it is a part of; `offsets`, the characters of every token, or -1 where it
            is none of the text; and `nowhere`, the token that stands for no answer.
        contexts: texts by example.
        n_best: how many starts, ends and candidates are looked at.
        longest: tokens of an answer, at most.
        threshold: odds above which there is no answer; None if there always is one.
    """
    found: dict[int, list[tuple[float, str]]] = defaultdict(list)
    nowhere: dict[int, float] = {}
    for window, start, end in zip(windows, *logits):
        example, offsets = window["example"], np.array(window["offsets"])
        start, end = start[: len(offsets)], end[: len(offsets)]
        null = float(start[window["nowhere"]] + end[window["nowhere"]])
        nowhere[example] = min(null, nowhere.get(example, null))
        inside = offsets[:, 0] >= 0
        firsts, lasts = (np.argsort(-np.where(inside, side, -np.inf), kind="stable")[:n_best] for side in (start, end))
        tokens = lasts[None] - firsts[:, None] + 1
        fits = (tokens > 0) & (tokens <= longest) & inside[firsts][:, None] & inside[lasts][None]
        for one, other in np.argwhere(fits):
            first, last = firsts[one], lasts[other]
            text = contexts[example][offsets[first, 0] : offsets[last, 1]]
            found[example].append((float(start[first] + end[last]), text))
    return {example: _answer(found[example], null, n_best, threshold) for example, null in nowhere.items()}


def _answer(found: list[tuple[float, str]], null: float, n_best: int, threshold: float | None) -> Answer:
    best = sorted(found, key=lambda one: -one[0])[:n_best]
    odds = null - best[0][0] if best else float("inf")
    if threshold is not None or not best:
        best = sorted([*best, (null, "")], key=lambda one: -one[0])
    scores = np.array([score for score, _ in best])
    shares = np.exp(scores - scores.max())
    candidates = [
        {"text": text, "score": score, "probability": float(share)}
        for (score, text), share in zip(best, shares / shares.sum())
    ]
    texts = [text for _, text in best if text]
    none = not texts or (threshold is not None and odds > threshold)
    return Answer("" if none else texts[0], candidates, odds)
