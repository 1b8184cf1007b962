"""Read a decoder as llama.cpp sees one: tensors under its names, layer by layer, and what else the layers have."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.errors import SparsityError

WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
"""Modules outside of layers, with their names in llama.cpp."""

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Modules of a layer, with their names in llama.cpp. Decoders with any other module are refused."""


@dataclass(frozen=True)
class Layer:
    """A layer of a decoder.

    Attributes:
        tensors: by llama.cpp's names, such as "attn_q.weight"; those of a removed sublayer are missing.
        heads: query heads, 0 if the attention was removed.
        kv_heads: key and value heads.
        neurons: of the FFN, 0 if it was removed.
    """

    tensors: Mapping[str, Tensor]
    heads: int
    kv_heads: int
    neurons: int


@dataclass(frozen=True)
class Decoder:
    """A decoder as llama.cpp sees one.

    Attributes:
        tensors: those outside of layers, by llama.cpp's names; "output.weight" is missing if it is the embeddings.
        layers: those of which anything is left, as a layer that lost both sublayers does nothing.
        head_dim: width of a head, all of which is rotated.
        rope_theta: base of the frequencies of positions.
        rope_factors: what these frequencies are divided by, shape (head_dim / 2,); None if by nothing.
        epsilon: of the norms.
        context: positions.
    """

    tensors: Mapping[str, Tensor]
    layers: tuple[Layer, ...]
    head_dim: int
    rope_theta: float
    rope_factors: Tensor | None
    epsilon: float
    context: int

    @property
    def vocabulary(self) -> int:
        """Rows of the embeddings."""
        return len(self.tensors["token_embd.weight"])

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.tensors["token_embd.weight"].shape[1]


def read_decoder(model: PreTrainedModel) -> Decoder:
    """Read a compact decoder of one of the classes in `architectures.py`.

    Raises:
        SparsityError: it computes what no architecture of llama.cpp does.
    """
    config: Any = model.config
    entries = config.to_dict()
    recipe = entries.get("hf_sparse", {})
    if recipe.get("selections") or recipe.get("padded"):
        raise SparsityError("its projections lost what its attention still computes with: no file can say so")
    if entries["hidden_act"] != "silu":
        raise SparsityError(f"hidden_act is {entries['hidden_act']!r}, and llama.cpp computes SiLU there")
    _require_full_attention(entries)
    rotary: Any = model.base_model.rotary_emb
    theta = float(entries["rope_parameters"]["rope_theta"])
    head_dim = 2 * len(rotary.inv_freq)
    tensors, layers = _named(model)
    if not layers:
        raise SparsityError("nothing is left of its layers")
    return Decoder(
        tensors,
        tuple(_layer(layer, head_dim) for layer in layers.values()),
        head_dim,
        theta,
        _rope_factors(rotary, theta, head_dim),
        float(entries["rms_norm_eps"]),
        int(entries["max_position_embeddings"]),
    )


def _require_full_attention(entries: Mapping[str, Any]) -> None:
    """Refuse a sliding window that a context can outgrow."""
    window, context = entries.get("sliding_window"), entries["max_position_embeddings"]
    if window is not None and window < context:
        raise SparsityError(
            f"attention has a window of {window} positions, and llama.cpp attends to all {context} there: set "
            f"max_position_embeddings to {window} in config.json, if that is context enough"
        )


def _rope_factors(rotary: Any, theta: float, head_dim: int) -> Tensor | None:
    """Compute what the frequencies of positions were divided by, from those of the model.

    Raises:
        SparsityError: they change with the length of the input, or attention is scaled by them, too.
    """
    if rotary.rope_type in ("dynamic", "longrope") or rotary.attention_scaling != 1:
        raise SparsityError(
            f"rope_type {rotary.rope_type!r} does more than divide frequencies by constants: fine-tune with 'default', "
            "'linear' or 'llama3'"
        )
    plain = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    factors = plain / rotary.inv_freq.float().cpu()
    return None if torch.allclose(factors, torch.ones(()), rtol=1e-5) else factors


def _named(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """Sort the tensors of a model, under llama.cpp's names, into those outside of layers and those of each layer."""
    whole: dict[str, Tensor] = {}
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
        known = LAYER.get(found[2]) if found else WHOLE.get(path)
        if known is None:
            raise SparsityError(
                f"there is a tensor {name}, which no architecture of llama.cpp has that is written here"
            )
        own = layers.setdefault(int(found[1]), {}) if found else whole
        own[f"{known}.{kind}"] = tensor
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        del whole["output.weight"]
    return whole, layers


def _layer(tensors: dict[str, Tensor], head_dim: int) -> Layer:
    """Count what a layer has, from the shapes of its tensors."""
    rows = {name: len(tensors.get(f"{name}.weight", ())) for name in ("attn_q", "attn_k", "ffn_gate")}
    return Layer(tensors, rows["attn_q"] // head_dim, rows["attn_k"] // head_dim, rows["ffn_gate"])
