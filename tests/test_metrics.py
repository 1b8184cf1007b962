"""Metrics of recipes say what the packages that papers use say, on random texts and on odd ones."""

import random
import sys
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest

METRICS = Path(__file__).parents[1] / "recipes" / "metrics"
sys.path.append(str(Path(sys.prefix) / "peers"))  # where `make install` has put packages that only this file needs
SEEDS = range(5)
WORDS = [
    "a",
    "the",
    "An",
    "cat",
    "cats",
    "Cat",
    "sat",
    "on",
    "mat.",
    "¿qué?",
    "naïve",
    "日本",
    "e-mail",
    "U.S.",
    "42",
    "…",
]


def computed(name: str, **inputs: Any) -> dict[str, Any]:
    return evaluate.load(str(METRICS / name), keep_in_memory=True).compute(**inputs)  # type: ignore[no-any-return]


def texts(seed: int, count: int = 30, shortest: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(shortest, 12))) for _ in range(count)]


@pytest.mark.parametrize("name", sorted(path.name for path in METRICS.iterdir()))
def test_a_metric_says_what_it_is_and_has_its_folders_name(name: str) -> None:
    metric = evaluate.load(str(METRICS / name))
    assert type(metric).__doc__ and metric.description and metric.inputs_description


@pytest.mark.parametrize("seed", SEEDS)
def test_accuracy_and_f1(seed: int) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    generator = np.random.default_rng(seed)
    actual, predicted = generator.choice([0, 1, 4], 60), generator.choice([0, 1, 2, 7], 60)
    both: dict[str, Any] = {"predictions": predicted, "references": actual}
    assert computed("accuracy", **both)["accuracy"] == pytest.approx(accuracy_score(actual, predicted))
    assert computed("f1", **both)["f1"] == pytest.approx(f1_score(actual, predicted, average="macro"))
    one = f1_score(actual, predicted, labels=[1], average="macro")
    assert computed("f1", **both, positive=1)["f1"] == pytest.approx(one)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_matthews(seed: int, classes: int) -> None:
    from sklearn.metrics import matthews_corrcoef

    generator = np.random.default_rng(seed)
    actual = generator.integers(0, classes, 60) * 3 - 1  # classes need not be 0, 1, ...
    predicted = np.where(generator.random(60) < 0.5, actual, generator.integers(0, classes, 60))
    for one, other in ((predicted, actual), (actual, actual), (-actual, actual), (0 * actual, actual)):
        found = computed("matthews", predictions=one, references=other)["matthews_correlation"]
        assert found == pytest.approx(matthews_corrcoef(other, one), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_correlation(seed: int) -> None:
    from scipy.stats import pearsonr, spearmanr

    generator = np.random.default_rng(seed)
    actual = generator.integers(0, 6, 50) / 5  # with ties
    predicted = actual + generator.normal(size=50) ** 3
    found = computed("correlation", predictions=predicted, references=actual)
    assert found["pearson"] == pytest.approx(pearsonr(predicted, actual)[0])
    assert found["spearmanr"] == pytest.approx(spearmanr(predicted, actual)[0])


def test_a_model_that_always_says_the_same_has_no_correlation() -> None:
    assert computed("correlation", predictions=[2.0] * 4, references=[1, 2, 3, 4]) == {"pearson": 0, "spearmanr": 0}


@pytest.mark.filterwarnings("ignore:.*ill-defined:Warning")
@pytest.mark.parametrize("letters", ["BI", "IE", "BIES"])
@pytest.mark.parametrize("seed", SEEDS)
def test_spans_are_those_of_seqeval(seed: int, letters: str) -> None:
    from seqeval.metrics import accuracy_score, classification_report

    generator = random.Random(seed)
    tags = ["O", "O", *letters, *(f"{letter}-{kind}" for letter in letters for kind in ("PER", "LOC", "A-B"))]
    lengths = [generator.randint(0, 9) for _ in range(40)]
    actual, predicted = ([generator.choices(tags, k=length) for length in lengths] for _ in range(2))
    found = computed("seqeval", predictions=predicted, references=actual)
    report = classification_report(actual, predicted, output_dict=True)
    assert found.pop("overall_accuracy") == pytest.approx(accuracy_score(actual, predicted))
    overall = {name: found.pop(f"overall_{name}") for name in ("precision", "recall", "f1")}
    for kind, scores in {**found, "micro avg": overall}.items():
        assert scores["f1"] == pytest.approx(report[kind]["f1-score"])
        assert scores["precision"] == pytest.approx(report[kind]["precision"])
        assert scores["recall"] == pytest.approx(report[kind]["recall"])
        assert "number" not in scores or scores["number"] == report[kind]["support"]
    assert set(found) == {kind for kind in report if "avg" not in kind}


def test_a_model_that_finds_no_span_has_zeros_and_other_tags_are_refused() -> None:
    found = computed("seqeval", predictions=[["O", "O"]], references=[["B-PER", "O"]])
    assert found["PER"] == {"precision": 0, "recall": 0, "f1": 0, "number": 1}
    assert (found["overall_f1"], found["overall_accuracy"]) == (0, 0.5)
    with pytest.raises(ValueError, match="'NOUN' is no tag of a span"):
        computed("seqeval", predictions=[["O"]], references=[["NOUN"]])


def squad(given: list[str], right: list[list[str]]) -> dict[str, float]:
    names = [f"q{number}" for number in range(len(given))]
    predictions = [{"id": name, "prediction_text": text} for name, text in zip(names, given)]
    references = [{"id": name, "answers": {"text": t, "answer_start": [0] * len(t)}} for name, t in zip(names, right)]
    return computed("squad", predictions=predictions[::-1], references=references)


@pytest.mark.parametrize("seed", SEEDS)
def test_squad(seed: int) -> None:
    from torchmetrics.functional.text import squad as peer

    given = ["cat, sat", *texts(seed)]
    right = [["The CAT sat!"], *([one + " cat", other + " mat"] for one, other in zip(texts(seed + 9), texts(seed)))]
    found = peer(
        [{"id": str(row), "prediction_text": text} for row, text in enumerate(given)],
        [{"id": str(row), "answers": {"text": t, "answer_start": [0]}} for row, t in enumerate(right)],
    )
    assert squad(given, right) == pytest.approx({name: float(score) for name, score in found.items()}, rel=1e-5)


def test_squad_counts_questions_without_answers() -> None:
    given, right = ["", "cat", "", "big cat"], [[], [], ["cat"], ["cat", "a"]]
    assert squad(given, right) == pytest.approx(
        {
            "exact_match": 25.0,
            "f1": 100 * (1 + 0 + 0 + 2 / 3) / 4,
            "HasAns_exact": 0.0,
            "HasAns_f1": 100 * (2 / 3) / 2,
            "NoAns_exact": 50.0,
            "NoAns_f1": 50.0,
        }
    )
    assert "HasAns_exact" not in squad([""], [[]])
    one = {"id": "q0", "answers": {"text": ["cat"], "answer_start": [0]}}
    with pytest.raises(ValueError, match="not the same: \\['q0', 'q1'\\]"):
        computed("squad", predictions=[{"id": "q1", "prediction_text": "cat"}], references=[one])


@pytest.mark.parametrize("seed", SEEDS)
def test_error_rates(seed: int) -> None:
    import jiwer

    said, heard = texts(seed, shortest=1), texts(seed + 1)
    heard[:3] = [said[0], "", said[2] + "  more words  " + said[2]]
    found = computed("error_rates", predictions=heard, references=said)
    collapsed = [" ".join(text.split()) for text in heard]
    assert found == pytest.approx({"wer": jiwer.wer(said, heard), "cer": jiwer.cer(said, collapsed)})


def test_error_rates_of_nothing_said() -> None:
    assert computed("error_rates", predictions=["uh", "yes"], references=["", "yes"]) == {"wer": 1.0, "cer": 2 / 3}
    with pytest.raises(ValueError, match="they have none"):
        computed("error_rates", predictions=["uh"], references=[" "])


@pytest.mark.parametrize("seed", SEEDS)
def test_mean_iou(seed: int) -> None:
    from sklearn.metrics import accuracy_score, jaccard_score, recall_score

    generator = np.random.default_rng(seed)
    actual, predicted = generator.choice([0, 1, 4, 7, 255], 300), generator.choice([0, 1, 2, 7, 255], 300)
    found = computed("mean_iou", predictions=predicted, references=actual)
    counted = actual != 255
    actual, predicted = actual[counted], predicted[counted]
    assert found == pytest.approx(
        {
            "mean_iou": jaccard_score(actual, predicted, average="macro", zero_division=0),
            "mean_accuracy": recall_score(actual, predicted, labels=np.unique(actual), average="macro"),
            "overall_accuracy": accuracy_score(actual, predicted),
        }
    )
    pairs, counts = np.unique([predicted, actual], axis=1, return_counts=True)
    assert computed("mean_iou", predictions=pairs[0], references=pairs[1], counts=counts) == pytest.approx(found)


def test_rouge_and_bleu_are_those_of_their_packages() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu, corpus_chrf

    given, first, second = texts(0), texts(1), texts(2)
    given[0] = "Two cats sat.\nOne slept."
    first[0] = "One cat slept.\nTwo cats sat."
    found = computed("rouge", predictions=given, references=first, use_stemmer=True)
    scorer = RougeScorer(list(found), use_stemmer=True)
    for kind, score in found.items():
        assert score == pytest.approx(np.mean([scorer.score(*pair)[kind].fmeasure for pair in zip(first, given)]))
    assert found["rougeLsum"] > found["rougeL"]
    both = [list(pair) for pair in zip(first, second)]
    better = computed("rouge", predictions=given, references=both, use_stemmer=True)
    assert all(better[kind] >= found[kind] for kind in found) and better != found

    streams = [first, [*second[:-1], None]]  # one reference is missing
    found = computed("bleu", predictions=given, references=[*both[:-1], first[-1:]])
    assert found == {"bleu": corpus_bleu(given, streams).score, "chrf": corpus_chrf(given, streams).score}
    one = computed("bleu", predictions=["日本の猫"], references=["日本の犬"], tokenize="char")
    assert one["bleu"] > computed("bleu", predictions=["日本の猫"], references=["日本の犬"])["bleu"]
