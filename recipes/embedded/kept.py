"""Keeps models that were made once, as directories in the cache of Hugging Face."""

import copy
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from transformers import PretrainedConfig

CACHE = Path(HF_HOME) / "hf_sparse" / "models"


def kept(name: str, write: Callable[[Path], None]) -> Path:
    """Find a directory of the cache. Where it is missing, `write` fills it: it is there as a whole or not at all."""
    directory = CACHE / name
    if directory.is_dir():
        return directory
    CACHE.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        write(part)
        part.rename(directory)
    except OSError:
        if not directory.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return directory


def untrained(auto_class: type[Any], config: PretrainedConfig, processor: Any, seed: int = 0) -> str:
    """Save a model with random weights and its processor, always the same ones; returns the directory.

    Args:
        auto_class: makes the model from its config.
        config: of the model, small enough to be trained from scratch.
        processor: its tokenizer, image processor or the like.
        seed: of the weights.
    """
    with tempfile.TemporaryDirectory() as directory:
        processor.save_pretrained(directory)
        files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
        said = b"".join(path.read_bytes() for path in files) + f"{config.to_json_string()}{seed}".encode()

    def write(directory: Path) -> None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            auto_class.from_config(copy.deepcopy(config)).save_pretrained(directory)  # it changes the config
        processor.save_pretrained(directory)

    return str(kept(f"{config.model_type}-{hashlib.sha256(said).hexdigest()[:16]}", write))
