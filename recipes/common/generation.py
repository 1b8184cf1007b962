"""What recipes share whose models generate text: Trainers, their flags, and texts from generated tokens."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from common.arguments import RecipeArguments
from common.output import write_texts
from common.task import Data, Task
from hf_sparse import DenseTrainerMixin, SparseTrainerMixin, SparsityError


@dataclass
class Seq2SeqRecipeArguments(RecipeArguments, Seq2SeqTrainingArguments):
    """`RecipeArguments` of a model that generates."""

    predict_with_generate: bool = field(default=True, metadata={"help": "Judge what is generated; always so here."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.predict_with_generate:
            raise ValueError("--predict_with_generate False would leave out what is reported: leave it out")


class _EachRowOnce(Seq2SeqTrainer):
    """`Seq2SeqTrainer` that leaves out the rows by which several processes fill up their last batches."""

    # The arguments are those of Trainer.
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)


class SparseGenerationTrainer(SparseTrainerMixin, _EachRowOnce):
    """Prunes a model that generates."""


class DenseGenerationTrainer(DenseTrainerMixin, _EachRowOnce):
    """Fine-tunes a model that generates, and evaluates it."""


class GenerationTask(Task):
    """A task whose answers are generated texts.

    Attributes:
        generation: with which settings, by their names in a `GenerationConfig`.
        model: the one that was loaded last.
        processor: of the model.
    """

    sparse_trainer = SparseGenerationTrainer
    dense_trainer = DenseGenerationTrainer
    training_arguments = Seq2SeqRecipeArguments
    generation: dict[str, int | None]
    model: PreTrainedModel
    processor: Any

    def arrange_(self, arguments: RecipeArguments) -> None:
        """Read from the flags how texts are generated in evaluations."""
        assert isinstance(arguments, Seq2SeqRecipeArguments)
        given: dict[str, int | None] = {
            "max_length": arguments.generation_max_length,
            "num_beams": arguments.generation_num_beams,
        }
        self.generation = {name: value for name, value in given.items() if value is not None}
        if "max_length" in self.generation:
            self.generation["max_new_tokens"] = None  # which would come before it

    def prepare_(self, model: PreTrainedModel, processor: Any) -> None:
        """Let the model, once it is saved, generate as it does in evaluations."""
        self.model, self.processor = model, processor
        if model.config.decoder_start_token_id is None:
            raise SparsityError(
                "the model does not say which token begins a text: set decoder_start_token_id in its config"
            )
        try:
            model.generation_config.update(**self.generation)
            model.generation_config.validate(strict=True)
        except ValueError as error:  # saving would say so, too, when all is done
            raise SparsityError(f"the model cannot generate like this: {' '.join(str(error).split())}") from None

    def measured(self, rows: list[dict[str, Any]], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """Join encoded rows; the decoder reads as many tokens as there are labels, whichever they are."""
        names = {*processor.model_input_names, "labels"}
        batch = self.collator(processor)([{name: row[name] for name in row if name in names} for row in rows])
        labels = batch.pop("labels")
        return {**batch, "decoder_input_ids": labels.clamp(min=0)}

    def texts(self, tokens: Any) -> list[str]:
        """Decode rows of tokens; -100 fills up what is shorter than others."""
        rows = [row[row != -100].tolist() for row in tokens]
        return [text.strip() for text in self.processor.batch_decode(rows, skip_special_tokens=True)]

    def generated(self, found: EvalPrediction | PredictionOutput) -> list[str]:
        """Decode what was generated."""
        return self.texts(found.predictions)

    def write_predictions(self, found: PredictionOutput, rows: Dataset, data: Data, directory: Path) -> Path:
        """Write a line for every text."""
        return write_texts(self.generated(found), directory)
