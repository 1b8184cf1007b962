"""The recipe for multiple choice, end to end on a tiny model, and what goes wrong in it."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import forks
from multiple_choice import MultipleChoice
from recipe_runs import SHORT, files, mistake, start
from test_recipe import WORDS, tiny_model, write_json


def rows_of(count: int, labelled: bool = True) -> list[dict[str, Any]]:
    """Three endings, of which the one with a word of the late vocabulary is right."""
    generator = random.Random(count)
    rows = []
    for _ in range(count):
        endings = generator.choices(WORDS[:60], k=3)
        label = generator.randrange(3)
        endings[label] = generator.choice(WORDS[60:])
        row = {"sent1": " ".join(generator.choices(WORDS[:60], k=4)), "sent2": generator.choice(WORDS[:9])}
        rows.append({**row, **{f"ending{number}": one for number, one in enumerate(endings)}})
        if labelled:
            rows[-1]["label"] = label
    return rows


def flags_of(directory: Path, counts: tuple[int, int, int] = (48, 16, 9)) -> dict[str, object]:
    """Those of run_swag's documented command, and a few more."""
    return {
        **SHORT,
        **files(lambda path, count: write_json(path, rows_of(count, path.stem != "test")), directory, counts, "json"),
        "--model_name_or_path": tiny_model(directory / "tiny"),
        "--do_train": None,
        "--do_eval": None,
        "--num_train_epochs": 4,
        "--output_dir": directory / "out",
        "--per_device_eval_batch_size": 16,
        "--per_device_train_batch_size": 8,
        "--overwrite_output_dir": None,
        "--dense_epochs": 1,
        "--do_predict": None,
    }


def test_the_recipe_trains_predicts_and_loads_in_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, out = flags_of(tmp_path), tmp_path / "out"
    assert start(MultipleChoice, flags, monkeypatch) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["origin"]["task"] == "multiple-choice"
    assert abs(report["achieved"] - 0.5) <= 0.05 and report["max_abs_diff"] <= 1e-4
    results = json.loads((out / "all_results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1 and "predict_accuracy" not in results
    header, *lines = (out / "predict_results.txt").read_text().splitlines()
    assert header == "index\tprediction" and len(lines) == 9

    code = (
        "import hf_sparse, json, sys\n"
        "from transformers import AutoModelForMultipleChoice, AutoTokenizer\n"
        "model = AutoModelForMultipleChoice.from_pretrained(sys.argv[1]).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "for row in json.loads(sys.argv[2]):\n"
        "    endings = [row['sent2'] + ' ' + row[f'ending{number}'] for number in range(3)]\n"
        "    inputs = tokenizer([row['sent1']] * 3, endings, padding=True, return_tensors='pt')\n"
        "    print(int(model(**{name: value[None] for name, value in inputs.items()}).logits.argmax()))\n"
    )
    fresh = forks().run("-c", code, out, json.dumps(rows_of(9, False)))
    assert fresh.returncode == 0, fresh.stderr
    assert lines == [f"{index}\t{number}" for index, number in enumerate(fresh.stdout.split())]
    assert len(np.unique(fresh.stdout.split())) > 1


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"label": 3}, {}, "labels that the training data lacks: 3"),
        ({"label": None}, {}, "rows without a label in column 'label'"),
        ({"ending1": None}, {}, "column 'ending1' is empty in row 1 of the validation data"),
        ({}, {"--train_file": "texts.json"}, "the endings of the train data are missing"),
        ({}, {"--train_file": "gap.json"}, "the endings of the train data are ending0, ending2, and not two or more"),
        ({}, {"--validation_file": "texts.json"}, "has no column 'ending0'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    change: dict[str, Any],
    flags: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = flags_of(tmp_path, (9, 6, 3)) | flags
    write_json(tmp_path / "texts.json", [{"sent1": "word1", "label": 0}])
    write_json(tmp_path / "gap.json", [{"sent1": "word1", "ending0": "word2", "ending2": "word3", "label": 0}])
    if change:
        write_json(tmp_path / "validation.json", [row | change for row in rows_of(2)])
    monkeypatch.chdir(tmp_path)
    assert message in mistake(MultipleChoice, given, monkeypatch, capsys)
