"""Fine-tune and prune a chat model on conversations, by TRL; with no flags, SmolLM2-135M-Instruct on docstrings.

    python recipes/sft.py
    accelerate launch recipes/sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\
        --dataset_name trl-lib/Capybara --packing --max_length 1024 --target 0.3 --output_dir runs/chat

Rows have messages, or prompt and completion (texts, or messages), or a text. Messages are written by the chat template
of the tokenizer. The loss is of completions where there are any, of what assistants say with --assistant_only_loss, and
of all tokens otherwise. Flags of TRL's SFTConfig are flags here, too, such as --packing and --padding_free.
"""

from dataclasses import dataclass, field
from typing import Any

from common.arguments import RecipeArguments
from common.conversations import COLUMNS, Conversations
from common.files import DataArguments, DividedArguments
from common.language import LanguageModel
from common.running import run
from common.sft_trainers import DenseSFTTrainer, SFTRecipeArguments, SparseSFTTrainer
from common.task import Collator, Data, Encoder
from datasets import DatasetDict
from embedded.docstring_tasks import summaries
from embedded.smollm import DEFAULTS, REPO, smollm
from transformers import AutoModelForCausalLM, DataCollatorForTokenClassification, PreTrainedTokenizerBase
from trl import get_training_chat_template

from hf_sparse import SparsityError


@dataclass(frozen=True)
class Arguments(DividedArguments):
    """Where the rows come from, by TRL's names as well."""

    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Its configuration.", "aliases": ["--dataset_config"]}
    )
    train_split_name: str = field(
        default="train", metadata={"help": "Split to train on.", "aliases": ["--dataset_train_split"]}
    )
    validation_split_name: str = field(
        default="test", metadata={"help": "Split to validate on.", "aliases": ["--dataset_test_split"]}
    )
    test_split_name: str = field(default="-", metadata={"help": "Split to test on, if there is one."})


class SFT(LanguageModel):
    """Answers of a chat model."""

    pipeline_tag = "text-generation"
    auto_class = AutoModelForCausalLM
    sparse_trainer, dense_trainer = SparseSFTTrainer, DenseSFTTrainer
    data_arguments: type[DataArguments] = Arguments
    training_arguments = SFTRecipeArguments
    shift = 1
    why_rows_are_left_out = "nothing to learn is left of it within --max_length tokens: raise it, or look at the rows"
    embedded_name = "summaries of docstrings"
    embedded_model_id = REPO
    embedded_defaults = {"output_dir": "runs/sft", "max_length": 160, **DEFAULTS}
    training: SFTRecipeArguments

    def arrange_(self, arguments: RecipeArguments) -> None:
        """Remember the flags of TRL."""
        super().arrange_(arguments)
        assert isinstance(arguments, SFTRecipeArguments)
        self.training = arguments

    def embedded_data(self, seed: int) -> DatasetDict:
        """What is a docstring about?"""

        def conversation(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
            return {
                "prompt": [{"role": "user", "content": f"Say in one sentence what this is about:\n{row['text']}"}],
                "completion": [{"role": "assistant", "content": row["summary"]}],
            }

        return summaries(seed, per_library=16).map(conversation, remove_columns=["text", "summary"])

    def embedded_model(self) -> str:
        """Find SmolLM2."""
        return smollm()

    def load(self, splits: DatasetDict) -> Data:
        """Find out what rows have."""
        names = splits["train"].column_names
        known = (*COLUMNS, (self.training.dataset_text_field,))
        found = next((list(columns) for columns in known if set(columns) <= set(names)), None)
        if found is None:
            raise SparsityError(
                f"the data have columns {', '.join(names)}: give messages, or prompt and completion, or name the texts "
                "by --dataset_text_field"
            )
        for split, rows in splits.items():
            for number, row in enumerate(rows.select_columns(found), start=1):
                if not all(row.values()):
                    raise SparsityError(f"row {number} of the {split} data has no {' or no '.join(found)}: drop it")
        return Data(DatasetDict({split: rows.select_columns(found) for split, rows in splits.items()}))

    def encoder(self, data: Data, processor: PreTrainedTokenizerBase) -> Encoder:
        """Tokenize what is said, and label what is to be learnt."""
        training = self.training
        if training.eos_token is not None:
            processor.eos_token = training.eos_token
        template = get_training_chat_template(processor) if training.assistant_only_loss else None
        completion_only = training.completion_only_loss is not False
        assert training.max_length is not None
        return Conversations(processor, template, training.assistant_only_loss, completion_only, training.max_length)

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        """Pad to the longest row."""
        return DataCollatorForTokenClassification(processor)

    def trainer_options(self, processor: Any) -> dict[str, Any]:
        """Let TRL choose a collator that fits --packing and --padding_free."""
        return {**super().trainer_options(processor), "data_collator": None}


if __name__ == "__main__":
    run(SFT, __doc__)
