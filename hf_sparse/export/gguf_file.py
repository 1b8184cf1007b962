"""Write a GGUF file: its keys, then its tensors one after the other, whole or not at all."""

import math
from contextlib import closing
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape

from hf_sparse.export.architectures import Architecture
from hf_sparse.export.decoder import Decoder
from hf_sparse.export.summary import GgufSummary
from hf_sparse.export.tensors import arranged, filled_up, stored, stored_as
from hf_sparse.export.vocabulary import Vocabulary
from hf_sparse.runtime.files import replaced_file

BYTES = np.dtype(np.uint8)


def write_gguf(
    path: Path, decoder: Decoder, architecture: Architecture, vocabulary: Vocabulary, outtype: str
) -> GgufSummary:
    """Write a decoder as an architecture of llama.cpp.

    Raises:
        SparsityError: the file cannot be written, or a value not stored that way; what was there is as it was.
    """
    filled = filled_up(decoder, architecture, outtype)
    tensors = [(name, tensor.shape) for name, tensor in arranged(filled, architecture)]
    kinds = {name: stored_as(name, shape, outtype) for name, shape in tensors}
    said = {name: kinds[name].name.lower() for name, shape in tensors if len(shape) > 1}
    with replaced_file(path) as target, closing(GGUFWriter(target, architecture.name)) as writer:
        _write_keys(writer, filled, architecture, outtype)
        vocabulary.write(writer)
        for name, shape in tensors:
            stored_shape = quant_shape_to_byte_shape(shape, kinds[name])
            writer.add_tensor_info(name, stored_shape, BYTES, math.prod(stored_shape), kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in arranged(filled, architecture):
            writer.write_tensor_data(stored(name, tensor, kinds[name]))
    return GgufSummary(
        path,
        path.stat().st_size,
        architecture.name,
        outtype,
        {name: kind for name, kind in said.items() if kind != outtype},
        sum(layer.neurons for layer in filled.layers) - sum(layer.neurons for layer in decoder.layers),
    )


def _write_keys(writer: GGUFWriter, decoder: Decoder, architecture: Architecture, outtype: str) -> None:
    """Add the sizes of a decoder to the keys of a file: by layer where the architecture reads them so."""
    writer.add_file_type(next(one for one in LlamaFileType if one.name.endswith(f"_{outtype.upper()}")))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(len(decoder.layers))
    writer.add_context_length(decoder.context)
    writer.add_embedding_length(decoder.width)
    writer.add_vocab_size(decoder.vocabulary)
    writer.add_layer_norm_rms_eps(decoder.epsilon)
    writer.add_rope_freq_base(decoder.rope_theta)
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(decoder.head_dim)
    for add, sizes in (
        (writer.add_head_count, [layer.heads for layer in decoder.layers]),
        (writer.add_head_count_kv, [layer.kv_heads for layer in decoder.layers]),
        (writer.add_feed_forward_length, [layer.neurons for layer in decoder.layers]),
    ):
        add(sizes if architecture.by_layer else sizes[0])
