"""Find the auto class that loads an architecture, and its task, in transformers' own tables."""

import re
from collections import Counter
from typing import Any

import transformers
from transformers.modelcard import TASK_MAPPING
from transformers.pipelines import SUPPORTED_TASKS

from hf_sparse.modeling_hf_sparse import MODEL_TYPE_PREFIX, architectures, auto_classes


def auto_class(architecture: str, model_type: str) -> str | None:
    """Choose the auto class under which people look for an architecture; None if none knows it.

    Several auto classes load BART or a CLIP. First come those whose other architectures have the same ending, such as
    ForConditionalGeneration; among these, those with a pipeline; the general ones come last.

    Args:
        architecture: name of a class of transformers.
        model_type: of its config, stock or pruned.
    """
    model_type = model_type.removeprefix(MODEL_TYPE_PREFIX)
    order = [name for names in _pipelines().values() for name in names]

    def unlikeliness(candidate: tuple[str, dict[str, Any]]) -> tuple[bool, bool, bool, bool, int]:
        name, types = candidate
        endings = Counter(map(_ending, _names(types)))
        unlike = endings.most_common(1)[0][0] != _ending(architecture)
        place = order.index(name) if name in order else len(order)
        return name == "AutoModelForPreTraining", unlike, name not in order, name == "AutoModel", place

    known = [
        (name, types) for name, types in auto_classes() if architecture in architectures(types.get(model_type, ()))
    ]
    # Decoders inside of others are known by the config of the whole alone, and once pruned by their own.
    inside = [candidate for candidate in auto_classes() if architecture in _names(candidate[1])]
    return min(known or inside, key=unlikeliness, default=(None, {}))[0]


def _names(types: dict[str, Any]) -> list[str]:
    return [name for found in types.values() for name in architectures(found)]


def _pipelines() -> dict[str, list[str]]:
    """List the auto classes that each task's pipeline loads, by task."""
    tasks: dict[str, Any] = SUPPORTED_TASKS
    return {task: [auto.__name__ for auto in entry["pt"]] for task, entry in tasks.items()}


def _ending(architecture: str) -> str:
    return architecture.rpartition("For")[2]


def task_of(architecture: str, model_type: str) -> str | None:
    """Name the task of an architecture as pipelines and the Hub do; None if it has no name.

    Args:
        architecture: name of a class of transformers.
        model_type: of its config, stock or pruned.
    """
    name = auto_class(architecture, model_type)
    if name is None or name == "AutoModelForPreTraining":
        return None
    if name == "AutoModel":
        sees = getattr(transformers, architecture).main_input_name == "pixel_values"
        return "image-feature-extraction" if sees else "feature-extraction"
    for task, names in _pipelines().items():
        if name in names:
            return task
    for task, table in TASK_MAPPING.items():  # of pipelines that there were
        if table is dict(auto_classes())[name]:
            return task
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name.removeprefix("AutoModelFor")).lower()
