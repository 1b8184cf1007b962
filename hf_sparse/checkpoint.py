"""Save and load pruned models: safetensors with stock tensor names, and a config that says how to rebuild the rest."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_sparse.errors import SparsityError
from hf_sparse.modeling_hf_sparse import MODEL_TYPE_PREFIX, model_class
from hf_sparse.patching import gate_bank


def save_pruned(model: PreTrainedModel, path: str | Path) -> None:
    """Write a compact model to a directory, which `from_pretrained` and `load_pruned` read.

    The files appear one by one under a temporary name and move into place whole.

    Raises:
        SparsityError: the model still has gates, or the directory cannot be written.
    """
    if gate_bank(model) is not None:
        raise SparsityError("this model still has gates: call compact(model), or save through SparseTrainer.save_model")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
            model.save_pretrained(temporary)
            path.mkdir(exist_ok=True)
            for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == CONFIG_NAME):
                shutil.move(file, path / file.name)
    except OSError as error:
        raise SparsityError(f"cannot write {path}: {error.strerror or error}") from None


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
