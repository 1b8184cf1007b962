"""Choose the architecture of llama.cpp that computes what a decoder does: a table of what each of them reads."""

from collections.abc import Iterator
from dataclasses import dataclass

from hf_sparse.errors import SparsityError
from hf_sparse.export.decoder import Decoder

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
ALL = QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}


@dataclass(frozen=True)
class Architecture:
    """What an architecture of llama.cpp reads and computes.

    Attributes:
        name: as in its files.
        by_layer: whether it reads the heads and neurons of each layer.
        square: whether all heads of a layer together must be as wide as the residual stream.
        headless: whether layers may be without attention; the first one may not.
        interleaved: whether it rotates neighbouring channels of a head, and not the two halves of it.
        fused: whether q, k and v are one tensor.
        head_norms: whether q and k have a norm.
        rope_factors: whether it divides frequencies of positions by the factors of its file.
        tied: whether the output matrix is always that of the embeddings.
        biases: projections whose biases it reads.
    """

    name: str
    by_layer: bool = False
    square: bool = False
    headless: bool = False
    interleaved: bool = False
    fused: bool = False
    head_norms: bool = False
    rope_factors: bool = False
    tied: bool = False
    biases: frozenset[str] = frozenset()


LLAMA = Architecture("llama", interleaved=True, rope_factors=True, biases=ALL)
QWEN2 = Architecture("qwen2", square=True, biases=QKV)
QWEN3 = Architecture("qwen3", head_norms=True)
DECI = Architecture("deci", by_layer=True, headless=True, interleaved=True, rope_factors=True, biases=ALL)
OPENELM = Architecture("openelm", by_layer=True, fused=True, head_norms=True, tied=True)

CANDIDATES = {
    "LlamaForCausalLM": (LLAMA, DECI),
    "MistralForCausalLM": (LLAMA, DECI),
    "Qwen2ForCausalLM": (QWEN2, DECI),
    "Qwen3ForCausalLM": (QWEN3, OPENELM),
}
"""The architectures that a class of transformers can be written as, its own first."""


def candidates(name: str) -> tuple[Architecture, ...]:
    """Return the architectures that a class of transformers can be written as.

    Raises:
        SparsityError: there are none.
    """
    if name not in CANDIDATES:
        raise SparsityError(f"it is a {name}, and what can be written for llama.cpp is {', '.join(CANDIDATES)}")
    return CANDIDATES[name]


def choose(decoder: Decoder, possible: tuple[Architecture, ...]) -> Architecture:
    """Choose the first architecture that computes what a decoder does.

    Raises:
        SparsityError: none of them does; says why for each.
    """
    lacks = {one: list(_lacks(one, decoder)) for one in possible}
    for one, reasons in lacks.items():
        if not reasons:
            return one
    told = "; ".join(f"{one.name} {' and '.join(reasons)}" for one, reasons in lacks.items())
    raise SparsityError(f"no architecture of llama.cpp computes the same: {told}")


def _lacks(architecture: Architecture, decoder: Decoder) -> Iterator[str]:
    """What an architecture does not read of what a decoder has."""
    names = {name for layer in decoder.layers for name in layer.tensors}
    sizes = {(layer.heads, layer.kv_heads, layer.neurons) for layer in decoder.layers}
    if len(sizes) > 1 and not architecture.by_layer:
        yield "has layers of one size"
    if architecture.square and any(layer.heads * decoder.head_dim != decoder.width for layer in decoder.layers):
        yield "has heads that are together as wide as the embeddings"
    if "attn_q_norm.weight" in names and not architecture.head_norms:
        yield "has no norms of q and k"
    if decoder.rope_factors is not None and not architecture.rope_factors:
        yield "has no scaled rotary positions"
    if "output.weight" in decoder.tensors and architecture.tied:
        yield "has no output matrix beside the embeddings"
    biases = {name.removesuffix(".bias") for name in names if name.endswith(".bias")}
    for name in sorted(biases - architecture.biases):
        yield f"has no bias of {name}"
