"""Write a pruned decoder as a GGUF file for llama.cpp, Ollama and what else is built on them."""

from pathlib import Path
from typing import Any

from hf_sparse.checkpoint.save_load import load_pruned
from hf_sparse.errors import SparsityError
from hf_sparse.export.architectures import candidates, choose
from hf_sparse.export.decoder import read_decoder
from hf_sparse.export.summary import GgufSummary
from hf_sparse.structure.stock import stock_class

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def export_gguf(
    directory: str | Path, output: str | Path, outtype: str = "q8_0", overwrite: bool = False
) -> GgufSummary:
    """Write a checkpoint, pruned or stock, with its tokenizer and chat template as one GGUF file.

    Layers of one size are written as the architecture that the model had before, uneven ones as one that reads the
    sizes of each layer.

    Args:
        directory: of the checkpoint.
        output: the file.
        outtype: how matrices are stored: "f32", "f16", "bf16", "q8_0" or "q4_0".
        overwrite: replace the file if it exists.

    Raises:
        SparsityError: llama.cpp would compute something else, the checkpoint is damaged, the file exists or cannot be
            written, or the package gguf is missing.
    """
    source, path = Path(directory), Path(output)
    try:
        from hf_sparse.export.gguf_file import write_gguf
        from hf_sparse.export.vocabulary import read_vocabulary
    except ImportError:
        raise SparsityError("GGUF files are written by the package gguf: pip install 'hf_sparse[gguf]'") from None
    if outtype not in OUTTYPES:
        raise SparsityError(f"outtype is {outtype!r}: give one of {', '.join(OUTTYPES)}")
    if path.exists() and not overwrite:
        raise SparsityError(f"{path} exists: give another file, or overwrite it (overwrite=True, --overwrite)")
    model: Any = load_pruned(source)
    try:
        possible = candidates(stock_class(model).__name__)
        decoder = read_decoder(model)
        architecture = choose(decoder, possible)
        vocabulary = read_vocabulary(source, decoder.vocabulary, model.generation_config.eos_token_id)
    except SparsityError as error:
        raise SparsityError(f"{source} cannot be written for llama.cpp: {error}") from None
    return write_gguf(path, decoder, architecture, vocabulary, outtype)
