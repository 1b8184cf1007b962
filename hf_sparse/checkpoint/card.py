"""Write the model card of a checkpoint, from its config, its headers and the report of its run."""

import functools
from dataclasses import dataclass, fields, replace
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_sparse.checkpoint.inspection import CheckpointSummary, inspect_checkpoint
from hf_sparse.checkpoint.tasks import task_of
from hf_sparse.checkpoint.usage import usage
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import SparsityError
from hf_sparse.report.report import Report

CARD, REPORT, PICTURE = "README.md", "report.json", "structure.png"
TEMPLATE = Path(__file__).with_name("card_template.md")
MARK = "<!-- Written by hf_sparse"
TAGS = ("hf_sparse", "pruning", "structured-sparsity", "arxiv:1910.03201")


@dataclass(frozen=True)
class CardFields:
    """The entries of a card that are not measured, with the names of `Trainer.create_model_card`.

    Attributes:
        model_id: the repository that the examples load; by default the name of the directory.
        model_name: the name of the model; by default the last part of `model_id`.
        language: of the texts.
        license: of the weights.
        tags: beside hf_sparse's own.
    """

    model_id: str | None = None
    model_name: str | None = None
    language: str | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()


NO_FIELDS = CardFields()
"""A card with nothing but what is measured."""


def model_card(directory: Path, about: CardFields) -> ModelCard:
    """Make the card of the checkpoint in a directory, with the contents of its report.json, if there is one.

    Raises:
        SparsityError: there is no checkpoint, or the report is not one.
    """
    summary = inspect_checkpoint(directory)
    report = Report.read(directory / REPORT) if (directory / REPORT).is_file() else None
    if report is not None and not _is_of(report, summary):
        report = None  # of another model that was here before
    model_id = about.model_id or directory.name
    name = about.model_name or model_id.rpartition("/")[2]
    data = _card_data(summary, report, about, name)
    text = _template().render(
        card_data=data.to_yaml(),
        name=name,
        model_id=model_id,
        summary=summary,
        loader=summary.auto_class if summary.pruned else summary.architecture,
        usage=usage(data.pipeline_tag, {path.name for path in directory.iterdir()}),
        report=report,
        base_model=report.origin.base_model if report else None,
        dataset=report.origin.dataset if report else None,
        layers=report.layers if report else summary.layers,
        picture=PICTURE if report and (directory / PICTURE).is_file() else None,
        settings=_settings(report.sparsity) if report else None,
    )
    return ModelCard(text)


@functools.cache
def _template() -> jinja2.Template:
    """Compile the template of cards, which takes longer than all else that a card needs."""
    return jinja2.Template(TEMPLATE.read_text(encoding="utf-8"))


def _is_of(report: Report, summary: CheckpointSummary) -> bool:
    """Tell whether a report belongs to a checkpoint, whose files may also have buffers."""
    same_sizes = bool(summary.layers) and tuple(report.layers) == summary.layers
    return same_sizes or report.pruned.parameters == summary.parameters


def write_card(directory: Path, destination: Path, about: CardFields) -> None:
    """Write the card of a checkpoint into its directory, unless there is one that somebody has edited.

    Language, license and tags of an older card are kept unless others are given.

    Args:
        directory: where the checkpoint is now.
        destination: where it will be, and where an older card may be.
        about: other entries of the card.

    Raises:
        SparsityError: as `model_card`.
    """
    older = destination / CARD
    if older.is_file():
        if MARK not in older.read_text(encoding="utf-8", errors="replace"):
            return
        said = ModelCard.load(older, ignore_metadata_errors=True).data
        tags = tuple(tag for tag in said.tags or () if tag not in TAGS)
        about = replace(
            about,
            language=about.language or said.language,
            license=about.license or said.license,
            tags=about.tags or tags,
        )
    about = replace(about, model_id=about.model_id or destination.resolve().name)
    (directory / CARD).write_text(str(model_card(directory, about)), encoding="utf-8")


def _card_data(summary: CheckpointSummary, report: Report | None, about: CardFields, name: str) -> ModelCardData:
    origin = report.origin if report else None
    task = (origin.task if origin else None) or task_of(summary.architecture, summary.model_type)
    results = _results(report, task) if report and task else []
    try:
        return ModelCardData(
            base_model=origin.base_model if origin else None,
            datasets=origin.dataset_id if origin else None,
            eval_results=results or None,
            language=about.language,
            library_name="transformers",
            license=about.license,
            metrics=sorted({result.metric_type for result in results}) or None,
            model_name=name,
            pipeline_tag=task,
            tags=list(dict.fromkeys([*TAGS, *about.tags])),
        )
    except ValueError as error:
        raise SparsityError(f"the model card cannot be written: {error}") from None


def _results(report: Report, task: str) -> list[EvalResult]:
    """List the metrics of the pruned and of the dense model, for the card's model-index."""
    dataset = report.origin.dataset or "unknown"
    return [
        EvalResult(
            task_type=task,
            dataset_type=report.origin.dataset_id or dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric,
            metric_name=metric if model is report.pruned else f"{metric} (dense)",
            metric_value=round(value, 4),
        )
        for model in (report.pruned, report.dense)
        for split, metrics in model.metrics.items()
        for metric, value in metrics.items()
    ]


def _settings(sparsity: SparsityConfig) -> str:
    defaults = SparsityConfig(group="kind")  # which follows from most models
    values = {field.name: (getattr(sparsity, field.name), getattr(defaults, field.name)) for field in fields(sparsity)}
    return ", ".join(f"`{name}={value!r}`" for name, (value, default) in values.items() if value not in (None, default))
