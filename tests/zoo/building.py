"""Tiny models of any architecture, from its configuration alone."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from functools import partial
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse.structure.example_inputs import example_inputs
from zoo.species import VOCABULARY, Species, initialized

# Sizes under all the names that configurations give them; each configuration takes those which it knows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"), 4),
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff", "ffn_hidden_size", "decoder_ffn_dim"), 40),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    "rotary_dim": 4,
    "sliding_window": 6,  # less than the ten tokens of the inputs
    # Latent attention: queries and keys have a part with and a part without rotary positions.
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    # Experts, routed and shared.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    "moe_intermediate_size": 24,
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 20),
    # Layers other than attention: state space models and linear attention.
    "mamba_n_heads": 16,
    "mamba_d_head": 4,
    "mamba_d_state": 6,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 7,
    # Images and sound.
    **dict.fromkeys(("image_size", "input_size"), 32),
    "patch_size": 8,
    "num_mel_bins": 16,
    **dict.fromkeys(("image_token_id", "image_token_index"), 90),
    **dict.fromkeys(("video_token_id", "video_token_index"), 91),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), 92),
    **dict.fromkeys(("vision_start_token_id", "vision_end_token_id"), 93),
}


def species(
    family: str, architecture: str, inputs: Callable[[], dict[str, Any]] | None = None, **sizes: Any
) -> Species:
    """That architecture as a species, see build; its inputs are made up from its configuration by default."""
    make = partial(build, architecture, **sizes)
    return Species(family, make, inputs or (lambda: example_inputs(make())))


def build(architecture: str, config: str | None = None, **sizes: Any) -> PreTrainedModel:
    """A tiny model of that architecture.

    Args:
        architecture: name of its class.
        config: name of the class of its configuration, where it isn't the one which the architecture names.
        sizes: what differs from SIZES; a dict for the sizes of a configuration within it.
    """
    model_class = getattr(transformers, architecture)
    config_class = getattr(transformers, config) if config else model_class.config_class
    return initialized(model_class(configured(config_class, **sizes)))


def configured(config_class: type[PreTrainedConfig], **sizes: Any) -> PreTrainedConfig:
    """A configuration of that class, and of those within it, with small sizes."""
    defaults = {field.name: field.default for field in fields(config_class)}
    known = {name: size for name, size in SIZES.items() if name in defaults}
    rates = {name: value for name, value in defaults.items() if "drop" in name or "jitter" in name}
    quiet = {name: type(rate)(0) for name, rate in rates.items() if type(rate) in (int, float)}
    # Configurations complete the lists and dicts that they are given in place, and species share some.
    sizes = deepcopy(sizes)
    stock = config_class() if config_class.sub_configs else None
    for name in config_class.sub_configs:
        part = getattr(stock, name)
        if isinstance(part, PreTrainedConfig) and not isinstance(sizes.get(name), PreTrainedConfig):
            sizes[name] = configured(type(part), **sizes.get(name, {}))
    return config_class(**{**known, **quiet, **sizes})
