"""What a run leaves: the rules of its output directory, and the closing table."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from common.arguments import RecipeArguments
from common.metrics import Metric
from hf_sparse import ModelMeasurements, Report, SparsityError, checkpoint_defect, newest_whole_checkpoint

MISSED = 0.03
"""A target that is missed by more than this is worth a word."""


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
        for old in [
            *path.glob(f"{PREFIX_CHECKPOINT_DIR}-*"),
            *path.glob("removed-*"),
            path / "dense",
            path / "predict_masks",
        ]:
            shutil.rmtree(old, ignore_errors=True)
        for file in [*path.glob("family.*"), *path.glob("*_results.*"), *path.glob("*predictions.*")]:
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


# ---- Predictions ----


def write_predicted(predicted: Iterable[str], directory: Path) -> Path:
    """Write predict_results.txt, a numbered line for every row, as run_glue does; returns the file."""
    path = directory / "predict_results.txt"
    lines = ["index\tprediction", *(f"{index}\t{text}" for index, text in enumerate(predicted))]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_texts(texts: Iterable[str], directory: Path) -> Path:
    """Write generated_predictions.txt, a line for every row, as run_summarization does; returns the file."""
    path = directory / "generated_predictions.txt"
    path.write_text("".join(f"{' '.join(text.split())}\n" for text in texts), encoding="utf-8")
    return path


# ---- Tables ----


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


def closing_table(report: Report, metrics: Sequence[Metric]) -> str:
    """The closing table: dense beside pruned."""

    def row(name: str, cell: Callable[[ModelMeasurements], str]) -> tuple[str, str, str]:
        return name, cell(report.dense), cell(report.pruned)

    def value(split: str, metric: Metric) -> Callable[[ModelMeasurements], str]:
        return lambda model: metric.read(model.metrics[split][metric.name])

    rows: list[tuple[str, ...]] = [("", "dense", "pruned")]
    rows += [
        row(f"{split} {metric.text}", value(split, metric)) for split in report.dense.metrics for metric in metrics
    ]
    rows += [
        row("parameters", lambda model: f"{model.parameters:,}"),
        row("size of the weights", lambda model: f"{model.weight_bytes / 1e6:.1f} MB"),
        row("multiply-accumulates", lambda model: f"{model.macs / 1e9:.2f} G"),
        row(f"latency, {report.batch_text}", lambda model: f"{model.latency_ms:.0f} ms"),
    ]
    rows += report.generation_rows()
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
