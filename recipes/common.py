"""What every recipe shares: training defaults, the rules of output directories, metrics, and the closing table."""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import evaluate
import numpy as np
import torch
from huggingface_hub import HfApi
from transformers import EvalPrediction, HfArgumentParser, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_sparse import ModelMeasurements, Report, SparsityError, checkpoint_defect, newest_whole_checkpoint

METRICS = Path(__file__).parent / "metrics"
MISSED = 0.03
"""A target that is missed by more than this is worth a word."""


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
    dense_epochs: float = field(
        default=3.0, metadata={"help": "Epochs of fine-tuning before pruning, if the model has no trained head."}
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
        """One instance of every dataclass, from the command line."""
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(return_remaining_strings=True)
        except ValueError as error:  # flags that do not go together
            self.error(str(error))
        if unknown:
            self.error(f"unknown flag {unknown[0]}")
        return tuple(parsed)


def run_recipe(main: Callable[[], None]) -> None:
    """Run a recipe; what the user can mend becomes one line and exit code 2."""
    try:
        main()
    except SparsityError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# ---- Output directories ----


def check_output_dir(arguments: RecipeArguments) -> None:
    """Check, before any work and without creating anything, that a run may begin in its output directory.

    Raises:
        SparsityError: it cannot be written, or holds another run, or the checkpoint to go on from is not whole.
    """
    path = Path(arguments.output_dir or "")
    resuming = arguments.resume_from_checkpoint is not None
    if resuming and arguments.resume_from_checkpoint != "auto":
        checkpoint_to_resume(arguments, path)
    if path.exists() and not path.is_dir():
        raise SparsityError(f"--output_dir {path} is a file: give a directory")
    if path.is_dir() and any(path.iterdir()) and not (arguments.overwrite_output_dir or resuming):
        raise SparsityError(
            f"--output_dir {path} holds another run: go on with --resume_from_checkpoint auto, start anew with "
            "--overwrite_output_dir, or give another directory"
        )
    parent = path
    while not parent.exists():
        parent = parent.parent
    try:
        # Permissions alone do not tell: a file system may be full, read-only or not a directory at all.
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise SparsityError(f"--output_dir {path} cannot be written ({error.strerror}): give another") from None


def check_hub(arguments: RecipeArguments) -> None:
    """Check, before any work, that the Hub is there and knows who --push_to_hub uploads for.

    Raises:
        SparsityError: it is not, or does not.
    """
    if not arguments.push_to_hub:
        return
    try:
        HfApi(token=arguments.hub_token).whoami()
    except Exception as error:  # a server can fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SparsityError(
            f"--push_to_hub: the Hub does not say who you are ({reason}): run `hf auth login`, give --hub_token or "
            "leave it out, and `hf-sparse push` the result later"
        ) from None


def clear_output_dir(arguments: RecipeArguments) -> None:
    """With --overwrite_output_dir, delete checkpoints and members of the run before; other files are overwritten."""
    path = Path(arguments.output_dir or "")
    if arguments.overwrite_output_dir and arguments.resume_from_checkpoint is None and path.is_dir():
        for old in [*path.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), *path.glob("removed-*"), path / "dense"]:
            shutil.rmtree(old, ignore_errors=True)
        for file in path.glob("family.*"):
            file.unlink()


def checkpoint_to_resume(arguments: RecipeArguments, directory: Path) -> str | None:
    """The checkpoint to go on from: the newest whole one with 'auto', the one given otherwise, None to start anew.

    Raises:
        SparsityError: the checkpoint that was given is not whole.
    """
    wanted = arguments.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted != "auto":
        reason = checkpoint_defect(Path(wanted))
        if reason is not None:
            raise SparsityError(
                f"--resume_from_checkpoint {wanted} is not a whole checkpoint ({reason}): give another, or 'auto'"
            )
        return wanted
    found = newest_whole_checkpoint(directory)
    return None if found is None else str(found)


# ---- Metrics and tables ----


def predicted_classes(predictions: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    """The classes that logits are highest for; the first of what a model returns are its logits."""
    return np.argmax(predictions[0] if isinstance(predictions, tuple) else predictions, axis=-1)


def classification_metrics() -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` for Trainer: accuracy and macro F1, computed by `evaluate` from local modules."""
    metrics = [evaluate.load(str(METRICS / name), keep_in_memory=True) for name in ("accuracy", "f1")]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        counted = prediction.label_ids != -100  # as transformers marks what has no label, such as padding
        predicted, actual = predicted_classes(prediction.predictions)[counted], prediction.label_ids[counted]
        results: dict[str, float] = {}
        for metric in metrics:
            found = metric.compute(predictions=predicted, references=actual)
            results.update(found or {})
        return results

    return compute


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows under their header, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def summary(report: Report) -> str:
    """The closing table: dense beside pruned."""

    def row(name: str, value: Callable[[ModelMeasurements], str]) -> tuple[str, str, str]:
        return name, value(report.dense), value(report.pruned)

    def metric(split: str, name: str) -> Callable[[ModelMeasurements], str]:
        return lambda model: f"{100 * model.metrics[split][name]:.1f}"

    rows: list[tuple[str, ...]] = [("", "dense", "pruned")]
    rows += [
        row(f"{split} {name}", metric(split, name))
        for split, results in report.dense.metrics.items()
        for name in results
    ]
    rows += [
        row("parameters", lambda model: f"{model.parameters:,}"),
        row("size of the weights", lambda model: f"{model.weight_bytes / 1e6:.1f} MB"),
        row("multiply-accumulates", lambda model: f"{model.macs / 1e9:.2f} G"),
        row(f"latency, {report.batch_text}", lambda model: f"{model.latency_ms:.0f} ms"),
    ]
    lines = [
        table(rows),
        "",
        f"{report.achieved:.1%} of the prunable {report.cost_text} removed (target {report.target:.0%}), "
        f"{report.speedup:.2f}x faster on {report.device}",
        f"largest difference between gated and compact outputs: {report.max_abs_diff:.1e}",
    ]
    if abs(report.achieved - report.target) > MISSED:
        lines.append("the target was missed: train for more steps, or look at density and target_density in the logs")
    return "\n".join(lines)


def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The task's own metrics among what Trainer returns."""
    return {name: float(metrics[f"eval_{name}"]) for name in ("accuracy", "f1")}
