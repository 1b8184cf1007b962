"""The recipes for tags of words and for answers in texts, end to end on a tiny model, and what goes wrong in them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import question_answering
import token_classification
from common import task
from common.answers import find_answers
from datasets import Dataset
from launching import forks
from recipe_runs import SHORT, files, mistake, start
from test_recipe import WORDS, tiny_model, write_json
from transformers import AutoTokenizer

from hf_sparse import load_pruned

RECIPES = {
    "token_classification": token_classification.TokenClassification,
    "question_answering": question_answering.QuestionAnswering,
}


def tagged(count: int, seed: int) -> list[dict[str, Any]]:
    """Words of which those that come late in the vocabulary are names, in spans of neighbours."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        words = generator.choices(WORDS, k=8)
        late = [int(word.removeprefix("word")) >= 60 for word in words]
        tags = [("I-LATE" if before else "B-LATE") if now else "O" for now, before in zip(late, [False, *late])]
        rows.append({"words": words, "tags": tags})
    return rows


def asked(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions for the word after the one that is asked for; every third has no answer."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        words = generator.sample(WORDS[:90], k=24)
        place = generator.randrange(22)
        context, answer = " ".join(words), words[place + 1]
        row: dict[str, Any] = {"id": f"q{number}", "question": words[place], "context": context}
        row["answers"] = {"text": [answer], "answer_start": [context.index(f" {answer} ") + 1]}
        if number % 3 == 2:
            row |= {"question": WORDS[94], "answers": {"text": [], "answer_start": []}}
        rows.append(row)
    return rows


ROWS = {"token_classification": tagged, "question_answering": asked}
OWN: dict[str, dict[str, object]] = {
    "token_classification": {"--return_entity_level_metrics": None, "--label_all_tokens": None},
    "question_answering": {
        "--version_2_with_negative": None,
        "--max_seq_length": 16,
        "--doc_stride": 4,
        "--max_answer_length": 3,
        "--n_best_size": 5,
    },
}


def flags_of(name: str, directory: Path, counts: tuple[int, int, int] = (48, 16, 9)) -> dict[str, object]:
    return {
        **SHORT,
        **files(lambda path, count: write_json(path, ROWS[name](count, count)), directory, counts, "json"),
        "--model_name_or_path": tiny_model(directory / "tiny"),
        "--output_dir": directory / "out",
        "--per_device_train_batch_size": 8,
        "--dense_epochs": 1,
        "--num_train_epochs": 4,
        "--do_predict": None,
        **OWN[name],
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_resumes_predicts_and_loads_in_a_fresh_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, out = flags_of(name, tmp_path), tmp_path / "out"
    assert start(RECIPES[name], flags, monkeypatch) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["origin"]["task"] == name.replace("_", "-")
    assert abs(report["achieved"] - 0.5) <= 0.05 and report["max_abs_diff"] <= 1e-4
    results = json.loads((out / "all_results.json").read_text())
    metrics = ("f1", "precision", "recall", "accuracy") if name == "token_classification" else ("f1", "exact_match")
    assert {f"{split}_{metric}" for split in ("eval", "predict") for metric in metrics} <= set(results)
    [predictions] = [path for path in (out / "predictions.txt", out / "predict_predictions.json") if path.is_file()]
    said, weights = predictions.read_text(), (out / "model.safetensors").read_bytes()

    # A finished run has nothing left to resume but its last checkpoint, and says the same.
    assert start(RECIPES[name], {**flags, "--resume_from_checkpoint": "auto"}, monkeypatch) == 0
    assert (out / "model.safetensors").read_bytes() == weights and predictions.read_text() == said

    code = (
        "import hf_sparse, json, sys, torch\n"
        "from transformers import AutoTokenizer, AutoModelForQuestionAnswering, AutoModelForTokenClassification\n"
        "model = eval(sys.argv[2]).from_pretrained(sys.argv[1]).eval()\n"
        "inputs = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[3], return_tensors='pt')\n"
        "print(json.dumps(model(**inputs)[0][0].tolist()))\n"
    )
    words = " ".join(tagged(9, 9)[0]["words"])
    fresh = forks().run("-c", code, out, RECIPES[name].auto_class.__name__, words)
    assert fresh.returncode == 0, fresh.stderr
    logits = np.array(json.loads(fresh.stdout))
    model = load_pruned(out).eval()
    inputs = AutoTokenizer.from_pretrained(out)(words, return_tensors="pt")
    np.testing.assert_allclose(logits, model(**inputs)[0][0].detach().numpy(), atol=1e-5)
    if name == "token_classification":
        tags = [model.config.id2label[number] for number in logits.argmax(-1)]
        assert said.splitlines()[0] == " ".join(tags) and len(said.splitlines()) == 9
        assert {"eval_LATE_f1", "eval_LATE_number"} <= set(results)
    else:
        assert list(json.loads(said)) == [f"q{number}" for number in range(9)]
        assert {"eval_NoAns_f1", "eval_HasAns_f1"} <= set(results)
        assert set(json.loads((out / "predict_null_odds.json").read_text())) == set(json.loads(said))
        for candidates in json.loads((out / "predict_nbest_predictions.json").read_text()).values():
            assert sum(one["probability"] for one in candidates) == pytest.approx(1)
            assert all(len(one["text"].split()) <= 3 for one in candidates)


SLOW = {"--tokenizer_name": "slow"}


@pytest.mark.parametrize(
    ("name", "change", "flags", "message"),
    [
        ("token_classification", {"words": "text"}, {}, "does not hold lists of words"),
        ("token_classification", {"tags": ["O"]}, {}, "has 8 words, and not as many tags in column 'tags'"),
        ("token_classification", {"tags": ["B-NEW"] * 8}, {}, "labels that the training data lacks: B-NEW"),
        ("token_classification", {}, {"--label_column_name": "pos"}, "has no column 'pos'"),
        ("token_classification", {}, SLOW, "is a slow tokenizer"),
        ("question_answering", {"context": None}, {}, "column 'context' is empty in row 1"),
        (
            "question_answering",
            {"answers": {"text": ["x"], "answer_start": [0]}},
            {},
            "which is not at 0",
        ),
        ("question_answering", {}, {"--doc_stride": 15}, "raise --max_seq_length, or lower --doc_stride"),
        ("question_answering", {}, {"--train_sampling_strategy": "group_by_length"}, "reorders the rows"),
        ("question_answering", {}, SLOW, "is a slow tokenizer"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str,
    change: dict[str, Any],
    flags: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = flags_of(name, tmp_path, (9, 6, 3)) | flags
    if change:
        write_json(tmp_path / "validation.json", [row | change for row in ROWS[name](2, 0)])
    if flags is SLOW:
        slow = type("SlowTokenizer", (), {"is_fast": False})()
        monkeypatch.setattr(task, "load_processor", lambda *_: slow)
    assert message in mistake(RECIPES[name], given, monkeypatch, capsys)


def test_tags_that_are_not_of_spans_are_classes() -> None:
    rows = Dataset.from_list([{"tokens": ["a", "b"], "pos_tags": ["NN", "VB"]}])
    task = token_classification.TokenClassification(token_classification.Arguments(task_name="pos"))
    data = task.load({"train": rows, "validation": rows})  # type: ignore[arg-type]
    assert data.labels == ("NN", "VB") and not task.spans
    assert [metric.text for metric in task.metrics] == ["accuracy", "macro F1"]


def test_an_answer_is_the_best_span_of_all_windows_or_none() -> None:
    """Two windows of "one two three four", of two words each after a token for the question."""
    windows = Dataset.from_dict(
        {
            "example": [7, 7],
            "offsets": [[[-1, -1], [0, 3], [4, 7]], [[-1, -1], [8, 13], [14, 18]]],
            "nowhere": [0, 0],
        }
    )
    starts = np.array([[1.0, 5.0, 0.0, -100.0], [2.0, 0.0, 2.5, -100.0]])
    ends = np.array([[1.0, 0.0, 2.0, -100.0], [0.5, 4.5, 4.0, -100.0]])
    contexts = {7: "one two three four"}

    def answer(longest: int = 2, threshold: float | None = None) -> Any:
        return find_answers((starts, ends), windows, contexts, 2, longest, threshold)[7]

    assert answer().text == "one two" and answer().null_odds == pytest.approx(2.0 - 7.0)
    assert [one["text"] for one in answer().candidates] == ["one two", "four"]
    assert answer(longest=1).text == "four"  # 2.5 + 4; three has 0 + 4.5, one has 5 + 0
    assert answer(threshold=-4.0).text == "one two" and answer(threshold=-6.0).text == ""
    assert [one["text"] for one in answer(threshold=0.0).candidates] == ["one two", "four", ""]
