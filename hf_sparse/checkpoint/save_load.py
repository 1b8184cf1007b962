"""Save and load pruned models: safetensors with stock tensor names, and a config that says how to rebuild the rest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, PushToHubMixin

from hf_sparse.checkpoint.card import NO_FIELDS, PICTURE, REPORT, CardFields, write_card
from hf_sparse.checkpoint.inspection import inspect_checkpoint, read_config
from hf_sparse.checkpoint.pages import ways_to_load
from hf_sparse.errors import SparsityError
from hf_sparse.gates.attach import gate_bank
from hf_sparse.modeling_hf_sparse import MODEL_TYPE_PREFIX, differing, model_class
from hf_sparse.report.history import NOT_LOGGED, History
from hf_sparse.report.page import NO_MEMBERS, PAGE, Run
from hf_sparse.report.report import Report
from hf_sparse.runtime.files import replaced_directory, write_whole
from hf_sparse.structure.prunable import is_quantized, require_model, require_no_adapters
from hf_sparse.structure.stock import named_class, require_loadable


def save_pruned(
    model: PreTrainedModel,
    path: str | Path,
    processing_class: PushToHubMixin | None = None,
    report: Report | None = None,
    about: CardFields = NO_FIELDS,
    max_shard_size: str = "50GB",
) -> None:
    """Write a compact model with its card to a directory, which `from_pretrained` and `load_pruned` read.

    An earlier checkpoint there is replaced as a whole, and only once the new one is complete.

    Args:
        model: without gates.
        path: the directory.
        processing_class: its tokenizer or processor, saved beside it.
        report: of its run; adds report.json, report.html, structure.png, and their contents to the card.
        about: other entries of the card.
        max_shard_size: larger weights are split into files of this size.

    Raises:
        SparsityError: the model still has gates, or is not one of transformers, or has adapters inside, or could not be
            loaded again, or the directory cannot be written.
    """
    require_model(model)
    require_no_adapters(model)
    if gate_bank(model) is not None:
        raise SparsityError("this model still has gates: call compact(model), or save through SparseTrainer.save_model")
    if not is_quantized(model):  # whose tensors are other ones
        require_loadable(model)
    with replaced_directory(Path(path)) as directory:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        if processing_class is not None:
            cast(Any, processing_class).save_pretrained(directory)
        complete(directory, Path(path), report, about)


def complete(
    directory: Path,
    path: Path,
    report: Report | None,
    about: CardFields,
    history: History = NOT_LOGGED,
    members: Mapping[str, Report] = NO_MEMBERS,
) -> None:
    """Add to a checkpoint what it has beside model and tokenizer: its report, its page, its picture and its card.

    Args:
        directory: where it is being written.
        path: where it will be; a card that somebody has edited there stays.
        report: of its run, if it is known.
        about: other entries of the card.
        history: what its training has logged.
        members: reports of the models that the run leaves, where it has several targets.
    """
    if report is not None:
        from hf_sparse.report.pictures import plot_structure  # matplotlib takes longer to import than all of hf_sparse

        report.write(directory / REPORT)
        plot_structure(
            report.layers, f"{report.achieved:.0%} removed, {report.speedup:.1f}x faster", directory / PICTURE
        )
        name = about.model_id or path.resolve().name
        loading = ways_to_load(inspect_checkpoint(directory), name)
        write_whole(directory / PAGE, Run(name, report, history, members, loading).page())
    write_card(directory, path, about)


def load_pruned(path: str | Path, kind: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """Load a model that `save_pruned` or `SparseTrainer.save_model` wrote, with the head it was saved with.

    Args:
        path: the directory.
        kind: the class of the model that was pruned; needed only if it is not one of transformers.

    Raises:
        SparsityError: there is no such checkpoint, it is damaged, or its architecture is unknown here.
    """
    if not (Path(path) / CONFIG_NAME).is_file():
        raise SparsityError(f"no checkpoint at {path}: it has no {CONFIG_NAME}")
    entries = read_config(Path(path) / CONFIG_NAME)
    try:
        pruned = entries["model_type"].startswith(MODEL_TYPE_PREFIX)
        architecture = entries["base_architecture"] if pruned else (entries.get("architectures") or ["?"])[0]
        stock = kind or named_class(architecture, f"{path} holds a")
        model = model_class(stock, entries["base_model_type"]) if pruned else stock
        options = {} if pruned else {"ignore_mismatched_sizes": True}  # which is an error below
        loaded, info = cast(Any, model).from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
        if not pruned and info["mismatched_keys"]:
            raise SparsityError(
                f"the checkpoint at {path} was not made by hf_sparse, as it has no recipe to rebuild it by, and its "
                f"tensors have other sizes than its config.json says: {differing(info)}"
            )
        if not pruned and (info["missing_keys"] or info["unexpected_keys"]):
            missing, extra = (sorted(info[f"{which}_keys"])[:3] for which in ("missing", "unexpected"))
            raise SparsityError(f"the weights at {path} are not whole: missing {missing}, unexpected {extra}")
        return cast(PreTrainedModel, loaded)
    except SparsityError:
        raise
    except Exception as error:  # a file that came from anywhere can be wrong in any way
        raise SparsityError(f"the checkpoint at {path} cannot be loaded: {str(error)[:1000]}") from error
