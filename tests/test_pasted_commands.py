"""Command lines of transformers' examples work here, with another script's name, on files."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import question_answering
import text_classification
from common import running
from common.task import Task
from test_recipe import pairs, tiny_model, write_json
from test_recipes_of_words import asked

from hf_sparse import load_pruned

GLUE = """
python run_glue.py
  --model_name_or_path {model}
  --task_name mrpc
  --train_file {train}
  --validation_file {validation}
  --do_train
  --do_eval
  --max_seq_length 128
  --per_device_train_batch_size 32
  --learning_rate 2e-5
  --num_train_epochs 3
  --output_dir {output}/
"""
SQUAD = """
python run_qa.py
  --model_name_or_path {model}
  --train_file {train}
  --validation_file {validation}
  --do_train
  --do_eval
  --per_device_train_batch_size 12
  --learning_rate 3e-5
  --num_train_epochs 2
  --max_seq_length 384
  --doc_stride 20
  --output_dir {output}/
"""
"""As in the README of question answering, but for the stride: the longest input of the tiny model is short."""


def answered(count: int, seed: int) -> list[dict[str, Any]]:
    return [row for row in asked(2 * count, seed) if row["answers"]["text"]][:count]


@pytest.mark.parametrize(
    ("command", "task", "make", "metrics"),
    [
        (
            GLUE,
            text_classification.TextClassification,
            lambda *of: pairs(*of, lambda word: word % 2),
            ("accuracy", "f1"),
        ),
        (SQUAD, question_answering.QuestionAnswering, answered, ("exact_match", "f1")),
    ],
    ids=["run_glue", "run_qa"],
)
def test_a_pasted_command_works(
    command: str, task: type[Task], make: Any, metrics: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "model": tiny_model(tmp_path / "tiny"),
        "output": tmp_path / "out",
        "train": write_json(tmp_path / "train.json", make(48, 0)),
        "validation": write_json(tmp_path / "validation.json", make(12, 1)),
    }
    words = shlex.split(command.format(**given))
    monkeypatch.setattr(sys, "argv", words[1:])
    running.run(task, task.__doc__)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert {f"eval_{metric}" for metric in metrics} | {"train_loss", "epoch", "eval_samples"} <= set(results)
    assert load_pruned(tmp_path / "out").num_parameters() > 0
