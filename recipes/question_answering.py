"""Fine-tune and prune a model that finds answers in texts; with no flags, MiniLM on docstrings.

    python recipes/question_answering.py
    accelerate launch recipes/question_answering.py --model_name_or_path google-bert/bert-base-uncased \\
        --dataset_name rajpurkar/squad --target 0.5 --output_dir runs/squad

Columns are those of SQuAD: question, context, answers (text and answer_start) and id. With --version_2_with_negative,
questions may have no answer. --do_predict also writes predict_predictions.json and predict_nbest_predictions.json.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.answers import Answer, find_answers
from common.files import require_columns, require_target, require_texts
from common.loading import require_fast
from common.metrics import Metric, local_metric
from common.running import run
from common.task import Collator, Data, Encoder, Task
from common.texts import TextArguments
from common.windows import Windows
from datasets import Dataset, DatasetDict
from embedded.docstring_tasks import questions
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import PredictionOutput

from hf_sparse import SparsityError


@dataclass(frozen=True)
class Arguments(TextArguments):
    """How long texts and answers are, and whether there is always an answer."""

    max_seq_length: int = field(default=384, metadata={"help": "Longer texts are cut into windows of so many tokens."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that two windows of a text have in common."})
    n_best_size: int = field(default=20, metadata={"help": "Starts, ends and answers that are looked at."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of an answer, at most."})
    version_2_with_negative: bool = field(default=False, metadata={"help": "Questions may have no answer."})
    null_score_diff_threshold: float = field(
        default=0.0, metadata={"help": "There is none where its score is so much higher than the best answer's."}
    )


class QuestionAnswering(Task):
    """A span of a text for every question.

    Attributes:
        examples: what predictions are compared with: rows of the validation and test data.
    """

    pipeline_tag = "question-answering"
    auto_class = AutoModelForQuestionAnswering
    data_arguments = Arguments
    metrics = (Metric("exact_match", "exact match", percent=False), Metric("f1", "F1", percent=False))
    rows_in_order = True
    embedded_name = "types of parameters in docstrings"
    embedded_defaults = {
        "output_dir": "runs/question_answering",
        "learning_rate": 2e-4,
        "dense_epochs": 2.0,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
    }

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments)
        self.examples: list[dict[str, Any]] = []

    def embedded_data(self, seed: int) -> DatasetDict:
        """What is the type of a parameter?"""
        return questions(seed, per_library=30)

    def load(self, splits: DatasetDict) -> Data:
        """Check that answers are where they are said to be, and number the rows of the data to evaluate."""
        texts, cure = ["question", "context"], "name the columns as SQuAD does"
        require_columns(splits, texts, cure)
        require_target(splits, "answers", cure)
        require_texts(splits, texts)
        found = {}
        for split, rows in splits.items():
            columns = {name: rows[name][:] for name in texts}
            columns["example"] = range(len(self.examples), len(self.examples) + len(rows))
            if "answers" in rows.column_names:
                columns["answers"] = [self._checked(row, split, number) for number, row in enumerate(rows, start=1)]
            found[split] = Dataset.from_dict(columns)
            if split != "train":
                ids = rows["id"] if "id" in rows.column_names else columns["example"]
                self.examples += [{**row, "id": str(name)} for row, name in zip(found[split], ids)]
        labelled = "answers" in found.get("test", found["train"]).column_names
        return Data(DatasetDict(found), label_column="answers", test_is_labelled=labelled)

    def _checked(self, row: dict[str, Any], split: str, number: int) -> dict[str, list[Any]]:
        answers = row["answers"]
        if isinstance(answers, list):
            answers = {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
        place = f"row {number} of the {split} data"
        if not answers["text"] and not self.arguments.version_2_with_negative:
            raise SparsityError(f"{place} has no answer: give --version_2_with_negative, or drop it")
        for text, start in zip(answers["text"], answers["answer_start"]):
            if row["context"][start : start + len(text)] != text:
                raise SparsityError(f"{place} has the answer {text!r}, which is not at {start} of its context: mend it")
        return {name: answers[name] for name in ("text", "answer_start")}

    def encoder(self, data: Data, processor: PreTrainedTokenizerBase) -> Encoder:
        """Cut question and text into windows; `offsets`, `nowhere` and `example` are for `find_answers`."""
        require_fast(processor)
        return Windows(processor, self.arguments.lengths(processor), self.arguments.doc_stride)

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        """Pad to the longest window."""
        return DataCollatorWithPadding(processor)

    def _answers(self, prediction: EvalPrediction | PredictionOutput, windows: Dataset) -> dict[int, Answer]:
        flags = self.arguments
        logits: Any = prediction.predictions  # of starts, of ends, and what else a model returns
        threshold = flags.null_score_diff_threshold if flags.version_2_with_negative else None
        contexts = {row["example"]: row["context"] for row in self.examples}
        return find_answers(logits[:2], windows, contexts, flags.n_best_size, flags.max_answer_length, threshold)

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compare answers with the right ones."""
        found = self._answers(prediction, rows)
        return local_metric("squad")(
            predictions=[{"id": str(example), "prediction_text": answer.text} for example, answer in found.items()],
            references=[{"id": str(example), "answers": self.examples[example]["answers"]} for example in found],
        )

    def write_predictions(self, found: PredictionOutput, rows: Dataset, data: Data, directory: Path) -> Path:
        """Write answers by the ids of their questions, as run_qa does."""
        answers = {self.examples[example]["id"]: answer for example, answer in self._answers(found, rows).items()}
        files: dict[str, dict[str, Any]] = {
            "predictions": {name: answer.text for name, answer in answers.items()},
            "nbest_predictions": {name: answer.candidates for name, answer in answers.items()},
        }
        if self.arguments.version_2_with_negative:
            files["null_odds"] = {name: answer.null_odds for name, answer in answers.items()}
        for name, content in files.items():
            (directory / f"predict_{name}.json").write_text(json.dumps(content, indent=4) + "\n")
        return directory / "predict_predictions.json"


if __name__ == "__main__":
    run(QuestionAnswering, __doc__)
