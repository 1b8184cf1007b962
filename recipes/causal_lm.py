"""Fine-tune and prune a language model; with no flags, SmolLM2-135M-Instruct on docstrings.

    python recipes/causal_lm.py
    accelerate launch recipes/causal_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --block_size 512 --output_dir runs/lm

Texts are a column of any data, or the lines of .txt files; they are joined and cut into rows of --block_size tokens.
Where no validation data are given, --validation_split_percentage of the training data are put aside. A trained language
model is pruned as it is; --dense_epochs 1 first trains it on these data, which makes a better teacher.
"""

from common.language import LanguageModel, blocks
from common.running import run
from common.task import Collator, Data, Encoder
from datasets import DatasetDict
from embedded.docstring_tasks import documents
from embedded.smollm import DEFAULTS, REPO, smollm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, default_data_collator


class CausalLM(LanguageModel):
    """The next token of running text."""

    pipeline_tag = "text-generation"
    auto_class = AutoModelForCausalLM
    shift = 1
    embedded_name = "docstrings"
    embedded_model_id = REPO
    embedded_defaults = {"output_dir": "runs/causal_lm", "block_size": 128, **DEFAULTS}

    def embedded_data(self, seed: int) -> DatasetDict:
        """What do libraries say of themselves?"""
        return documents(seed, per_library=8)

    def embedded_model(self) -> str:
        """Find SmolLM2."""
        return smollm()

    def encoder(self, data: Data, processor: PreTrainedTokenizerBase) -> Encoder:
        """Tokenize texts, and cut them into rows that are their own labels."""
        column, length = self.text, self.arguments.block(processor)

        def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            found = blocks(processor(rows[column]), length)
            return {**found, "labels": found["input_ids"]}

        return encode

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        """Stack rows, which are of one length."""
        return default_data_collator


if __name__ == "__main__":
    run(CausalLM, __doc__)
