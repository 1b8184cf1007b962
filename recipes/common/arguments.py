"""The flags of every recipe, and the parser that reads them from a command line or from one file."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from common.adapters import AdapterArguments
from hf_sparse import SparsityError

CONFIGS = (".json", ".yaml", ".yml")
INSTEAD = {
    "use_fast_tokenizer": "tokenizers are fast wherever there is a fast one: leave it out",
    "use_slow_tokenizer": "tokenizers are fast wherever there is a fast one: leave it out",
    "use_auth_token": "give --token",
    "evaluation_strategy": "give --eval_strategy",
    "no_cuda": "give --use_cpu",
    "overwrite_output_directory": "give --overwrite_output_dir",
    "text_column_delimiter": "two columns of --text_column_name are a pair for the tokenizer: leave it out",
    "metric_name": "metrics follow from the task and its labels: leave it out",
    "remove_splits": "only the splits of --train_split_name and its kin are read: leave it out",
    "remove_columns": "only the columns of texts and labels are read: leave it out",
    "shuffle_train_dataset": "training rows are always shuffled, by --data_seed: leave it out",
    "shuffle_seed": "give --data_seed",
    "resize_position_embeddings": "models read as many tokens as they have positions: lower --max_source_length",
    "streaming": "rows are read from disk as they are needed: leave it out, or give --max_train_samples",
    "model_type": "what is pruned has been trained: give --model_name_or_path",
    "config_overrides": "what is pruned has been trained: give --model_name_or_path",
    "low_cpu_mem_usage": "this is how all models are loaded: leave it out",
    "torch_dtype": "give --dtype",
    "eval_packing": "evaluations count rows: leave it out",
    "load_in_4bit": "what is removed is cut out of plain weights: leave it out, and give --dtype bfloat16",
    "load_in_8bit": "what is removed is cut out of plain weights: leave it out, and give --dtype bfloat16",
    "forced_decoder_ids": "give --language and --task",
    "suppress_tokens": "the model's generation config says what is never generated: leave it out",
    "model_index_name": "cards are called as --hub_model_id or the directory: leave it out",
    "preprocessing_only": "processes wait for the one that encodes: leave it out",
    "eval_metrics": "error rates of words and of characters are always computed: leave it out",
    "group_by_length": "batches are padded to their longest row, and not further: leave it out",
}
"""Flags of transformers' examples that have no meaning here, and what to do."""


@dataclass(frozen=True)
class ModelArguments(AdapterArguments):
    """Which model is pruned, which one teaches it, and what of it is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to prune, from the Hub or a directory. Default: the embedded one."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Its config, if it is not beside the model."})
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Its tokenizer or processor, if it is not beside the model.",
            "aliases": [
                "--tokenizer_name_or_path",
                "--processor_name",
                "--image_processor_name",
                "--feature_extractor_name",
            ],
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded models and data are kept."})
    token: str | None = field(default=None, metadata={"help": "Token to read private models and data with."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the weights: float32, bfloat16, or auto for that of the checkpoint. Default: "
            "float32, or auto with --use_peft, which does not train them."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    ignore_mismatched_sizes: bool = field(
        default=True, metadata={"help": "Replace a head that was made for other labels; False: refuse the model."}
    )
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Fine-tuned teacher. Default: the dense model, before pruning."}
    )


@dataclass
class RecipeArguments(TrainingArguments):
    """TrainingArguments with defaults that suit pruning while fine-tuning."""

    # Not None, which TrainingArguments would replace by a directory of its own choice.
    output_dir: str | None = field(default="", metadata={"help": "Where model, report and picture go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew in an output directory that holds another run."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'auto': go on from the newest whole checkpoint in --output_dir, if any."}
    )
    num_train_epochs: float = field(default=4.0, metadata={"help": "Epochs of pruning and recovery."})
    dense_epochs: float | None = field(
        default=None,
        metadata={"help": "Epochs of fine-tuning before pruning. Default: 3 if the model has no trained head, else 0."},
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training batch size on each device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Evaluation batch size on each device."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint: no, steps or epoch."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two lines of the log."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("prediction_loss_only", "batch_eval_metrics"):
            if getattr(self, option):
                raise ValueError(f"--{option} would leave out what is reported: leave it out")
        # Pinning without a device to copy to does nothing but warn.
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the examples of the description as they were written."""


class RecipeParser(HfArgumentParser):
    """HfArgumentParser whose errors are one line, without the usage of some hundred flags above it."""

    def __init__(self, dataclasses: tuple[type, ...], description: str | None) -> None:
        # Its annotation takes only classes of one type.
        super().__init__(dataclasses, description=description, formatter_class=_HelpFormatter)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise SparsityError(f"{message}; --help lists all flags")

    def parse(self) -> tuple[Any, ...]:
        """Make one instance of every dataclass, from the command line or from the file that is its only word."""
        words = sys.argv[1:]
        if len(words) == 1 and Path(words[0]).suffix in CONFIGS:
            words = _words(Path(words[0]))
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(words, return_remaining_strings=True)
        except ValueError as error:  # flags that do not go together
            self.error(str(error))
        if unknown:
            name = unknown[0].removeprefix("--").partition("=")[0]
            if name in INSTEAD:
                raise SparsityError(f"--{name} has no meaning here: {INSTEAD[name]}")
            self.error(f"unknown flag {unknown[0]}")
        return tuple(parsed)


def _words(config: Path) -> list[str]:
    """The words of the command line that a .json or .yaml file of flags stands for."""
    try:
        flags = yaml.safe_load(config.read_text())  # JSON is YAML, too
    except (OSError, yaml.YAMLError) as error:
        raise SparsityError(f"{config} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(flags, Mapping):
        raise SparsityError(f"{config} holds no flags: give names and values, such as target: 0.5")
    words: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        if value is not None:
            words += [f"--{name}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
    return words
