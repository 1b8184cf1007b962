"""`Task`: what differs from recipe to recipe, and nothing else; `Data`: what it is trained on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from embedded.minilm import REPO, minilm
from torch import Tensor
from transformers import AutoTokenizer, EvalPrediction, PreTrainedModel
from transformers.trainer_utils import PredictionOutput

from common.arguments import ModelArguments, RecipeArguments
from common.files import DataArguments
from common.loading import load_processor
from common.metrics import Metric
from hf_sparse import DenseTrainer, DenseTrainerMixin, SparseTrainer, SparseTrainerMixin

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]
Encoder = Callable[[dict[str, list[Any]]], Mapping[str, Any]]


@dataclass(frozen=True)
class Data:
    """Checked data.

    Attributes:
        splits: train, validation and perhaps test.
        labels: the names of the classes, if there are any.
        label_column: the column that is to be predicted.
        test_is_labelled: whether the test data has it.
    """

    splits: DatasetDict
    labels: tuple[str, ...] = ()
    label_column: str = "label"
    test_is_labelled: bool = True


class Task:
    """What differs from task to task, and nothing else.

    Args:
        arguments: flags about the data, an instance of `data_arguments`.

    Attributes:
        pipeline_tag: the task as the Hub calls it.
        auto_class: of the model.
        processor_class: of its tokenizer, image processor, feature extractor or processor.
        sparse_trainer: prunes.
        dense_trainer: fine-tunes what has no trained head, and evaluates.
        data_arguments: the dataclass of its flags.
        training_arguments: the dataclass of the flags of training.
        metrics: what is reported, in this order; a task may set them once it has seen the data.
        problem: what a class is for, as configs say it.
        rows_in_order: whether `compute_metrics` needs predictions in the order of the rows.
        why_rows_are_left_out: what `encoder` leaves out, and what to do.
        encoded_when_read: whether rows are encoded each time they are read, since they would be too large to keep.
        embedded_name: what the data without flags are called.
        embedded_model_id: the model without flags, on the Hub; None if it is trained from scratch.
        embedded_defaults: flags whose defaults are others with the embedded data.
    """

    pipeline_tag: str
    auto_class: type[Any]
    processor_class: type[Any] = AutoTokenizer
    sparse_trainer: type[SparseTrainerMixin] = SparseTrainer
    dense_trainer: type[DenseTrainerMixin] = DenseTrainer
    data_arguments: type[DataArguments] = DataArguments
    training_arguments: type[RecipeArguments] = RecipeArguments
    metrics: tuple[Metric, ...]
    problem = "single_label_classification"
    rows_in_order = False
    why_rows_are_left_out = "give more"
    encoded_when_read = False
    embedded_name: str
    embedded_model_id: str | None = REPO
    embedded_defaults: Mapping[str, Any]

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments

    def arrange_(self, arguments: RecipeArguments) -> None:
        """Fit the arguments of the training, in place, to the task and its flags, before anything is read."""

    def embedded_data(self, seed: int) -> DatasetDict:
        """Make the data of a run without flags."""
        raise NotImplementedError

    def embedded_model(self) -> str:
        """Find or make the model of a run without flags; returns its directory."""
        return minilm()

    def load(self, splits: DatasetDict) -> Data:
        """Check the rows, and turn what is to be predicted into numbers.

        Raises:
            SparsityError: a column or label is missing, or labels do not fit.
        """
        raise NotImplementedError

    def find_processor(self, source: str, access: ModelArguments, data: Data) -> Any:
        """Load the tokenizer, image processor, feature extractor or processor of a model; data are there already.

        Raises:
            SparsityError: it cannot be loaded.
        """
        return load_processor(source, access, self.processor_class)

    def configure_(self, config: Any, data: Data) -> bool:
        """Fit the config of a model, in place, to the data; returns whether it did before. Classes by their names."""
        if not data.labels:
            return True
        before = tuple(config.id2label[i] for i in range(config.num_labels))
        same_problem, config.problem_type = config.problem_type in (None, self.problem), self.problem
        config.id2label = dict(enumerate(data.labels))
        config.label2id = {label: index for index, label in enumerate(data.labels)}
        return same_problem and before == data.labels

    def prepare_(self, model: PreTrainedModel, processor: Any) -> None:
        """Fit a loaded model and its processor, in place, to the flags: what is frozen, how it generates.

        Raises:
            SparsityError: they cannot be fitted.
        """

    def encoder(self, data: Data, processor: Any) -> Encoder:
        """Make the function that turns a batch of rows into inputs of the model and labels."""
        raise NotImplementedError

    def training_encoder(self, data: Data, processor: Any) -> Encoder:
        """Make that of training rows, which may change them at random where they are encoded when read."""
        return self.encoder(data, processor)

    def collator(self, processor: Any) -> Collator:
        """Make the function that joins encoded rows to a batch."""
        raise NotImplementedError

    def measured(self, rows: list[dict[str, Any]], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """Join encoded rows to the inputs of one forward without a loss, by which costs are counted and timed."""
        names = {*processor.model_input_names} - {"labels"}
        inputs = [{name: value for name, value in row.items() if name in names} for row in rows]
        return {name: value for name, value in self.collator(processor)(inputs).items() if name in names}

    def trainer_options(self, processor: Any) -> dict[str, Any]:
        """More arguments of all Trainers, by their names."""
        return {}

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compute all `metrics` from predictions for encoded rows."""
        raise NotImplementedError

    def example(self, model: PreTrainedModel, rows: Dataset, processor: Any) -> str | None:
        """Show what the pruned model makes of the first encoded row, for people; None where that is nothing to read."""
        return None

    def write_predictions(self, found: PredictionOutput, rows: Dataset, data: Data, directory: Path) -> Path:
        """Write what the model predicts for the encoded test rows; returns the file."""
        raise NotImplementedError
