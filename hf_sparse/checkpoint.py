"""Save and load pruned models: safetensors with stock tensor names, and a config that says how to rebuild the rest."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_sparse.directories import replaced_directory
from hf_sparse.errors import SparsityError
from hf_sparse.modeling_hf_sparse import MODEL_TYPE_PREFIX, model_class
from hf_sparse.patching import gate_bank


def save_pruned(model: PreTrainedModel, path: str | Path) -> None:
    """Write a compact model to a directory, which `from_pretrained` and `load_pruned` read.

    An earlier checkpoint there is replaced as a whole, and only once the new one is complete.

    Raises:
        SparsityError: the model still has gates, or the directory cannot be written.
    """
    if gate_bank(model) is not None:
        raise SparsityError("this model still has gates: call compact(model), or save through SparseTrainer.save_model")
    with replaced_directory(Path(path)) as directory:
        model.save_pretrained(directory)


def load_pruned(path: str | Path) -> PreTrainedModel:
    """Load a model that `save_pruned` or `SparseTrainer.save_model` wrote, with the head it was saved with.

    Raises:
        SparsityError: there is no such checkpoint, or its architecture is unknown here.
    """
    if not (Path(path) / CONFIG_NAME).is_file():
        raise SparsityError(f"no checkpoint at {path}: it has no {CONFIG_NAME}")
    config: Any = AutoConfig.from_pretrained(path)
    pruned = config.model_type.startswith(MODEL_TYPE_PREFIX)
    architecture = config.base_architecture if pruned else (config.architectures or ["?"])[0]
    stock = getattr(transformers, architecture, None)
    if stock is None:
        raise SparsityError(f"{path} holds a {architecture}, which transformers {transformers.__version__} lacks")
    model = model_class(stock, config.base_model_type) if pruned else stock
    return model.from_pretrained(path)
