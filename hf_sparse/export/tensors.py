"""Arrange the tensors of a decoder as an architecture of llama.cpp reads them, and choose how each is stored."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from hf_sparse.errors import SparsityError
from hf_sparse.export.architectures import Architecture
from hf_sparse.export.decoder import Decoder, Layer

LEAST_NEURONS = 32
"""Neurons, all zero, that stand in for a removed FFN: llama.cpp takes a layer without neurons for an empty one."""

FINER = {(name, "q4_0"): GGMLQuantizationType.Q8_0 for name in ("token_embd.weight", "output.weight")}
"""Where 4 bits would cost most: the embeddings, and the matrix that gives the logits."""

_WIDE = (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)


def filled_up(decoder: Decoder, architecture: Architecture, outtype: str) -> Decoder:
    """Add what an architecture and a quantization cannot be without, all zero, so that the outputs stay the same."""
    block = GGML_QUANT_SIZES[GGMLQuantizationType[outtype.upper()]][0]
    layers = []
    for index, layer in enumerate(decoder.layers):
        if not layer.heads and (index == 0 or not architecture.headless or "attn_output.bias" in layer.tensors):
            layer = _with_a_head(layer, decoder, architecture)
        layers.append(_with_neurons(layer, math.ceil(layer.neurons / block) * block or LEAST_NEURONS, decoder.width))
    return replace(decoder, layers=tuple(layers))


def _with_a_head(layer: Layer, decoder: Decoder, architecture: Architecture) -> Layer:
    """Give a layer without attention a head that is zero."""
    like = next(iter(layer.tensors.values()))
    rows = like.new_zeros(decoder.head_dim, decoder.width)
    own = {f"attn_{name}.weight": rows for name in ("q", "k", "v")}
    own |= {"attn_norm.weight": like.new_ones(decoder.width), "attn_output.weight": rows.T}
    if architecture.head_norms:
        own |= {f"attn_{name}_norm.weight": like.new_ones(decoder.head_dim) for name in ("q", "k")}
    return Layer({**own, **layer.tensors}, 1, 1, layer.neurons)


def _with_neurons(layer: Layer, count: int, width: int) -> Layer:
    """Give a layer `count` neurons, of which those that it does not have are zero."""
    missing = count - layer.neurons
    if not missing:
        return layer
    own = dict(layer.tensors)
    like = next(iter(own.values()))
    own.setdefault("ffn_norm.weight", like.new_ones(width))
    for name in ("ffn_gate.weight", "ffn_up.weight"):
        own[name] = torch.cat([own.get(name, like.new_zeros(0, width)), like.new_zeros(missing, width)])
    for name in ("ffn_gate.bias", "ffn_up.bias"):
        if name in own:
            own[name] = torch.cat([own[name], like.new_zeros(missing)])
    down = own.get("ffn_down.weight", like.new_zeros(width, 0))
    own["ffn_down.weight"] = torch.cat([down, like.new_zeros(width, missing)], dim=1)
    return Layer(own, layer.heads, layer.kv_heads, count)


def arranged(decoder: Decoder, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of all that the file has, in its order."""
    yield from decoder.tensors.items()
    if decoder.rope_factors is not None:
        yield "rope_freqs.weight", decoder.rope_factors
    for index, layer in enumerate(decoder.layers):
        own = dict(layer.tensors)
        if architecture.interleaved:
            own = {name: _interleaved(name, tensor, decoder.head_dim) for name, tensor in own.items()}
        if architecture.fused:
            own["attn_qkv.weight"] = torch.cat([own.pop(f"attn_{part}.weight") for part in "qkv"])
        for name, tensor in own.items():
            yield f"blk.{index}.{name}", tensor


def _interleaved(name: str, tensor: Tensor, head_dim: int) -> Tensor:
    """Put the two channels of a head that are rotated together side by side, in the rows of q and k."""
    if name.split(".")[0] not in ("attn_q", "attn_k"):
        return tensor
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(tensor.shape)


def stored_as(name: str, shape: Sequence[int], outtype: str) -> GGMLQuantizationType:
    """Choose how a tensor is stored: norms and biases in 32 bits, rows that are not whole blocks in 16."""
    kind = FINER.get((name, outtype), GGMLQuantizationType[outtype.upper()])
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def stored(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Convert a tensor to what is written.

    Raises:
        SparsityError: a value is too large for that.
    """
    if kind not in _WIDE and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise SparsityError(f"{name} has values that are too large for {kind.name.lower()}: write bf16 or f32")
    return quantize(tensor.float().contiguous().numpy(), kind)
