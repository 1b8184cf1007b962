"""Names as data, since structure does not show them: of integers that count heads or neurons, and of tables of heads.

Which entries belong to a unit is read from gradients; but modules also keep sizes as integers, for a `view` that is
taken in the forward pass. They are updated where name and value both fit, since a value alone also matches things
like a window size, and the result is compared with the masked model before it is believed.
"""

import re
from dataclasses import dataclass

# Integers of attention modules, and of the configs that they read while they run, that count query or kv heads.
HEAD_COUNTS = re.compile(r"^(n|num|nb)?_?(\w+_)?n?_?heads?(_kv|_q)?$|^num_key_value_groups$|^n_rep$|^nhead$")

# Integers that are the columns of all heads, in attention modules that have other names for the width of the model.
HEAD_WIDTHS = re.compile(
    r"^(all_head_size|split_size|inner_dim|q_size|kv_size|query_dim|key_dim|kv_dim|value_dim"
    r"|hidden_size_output|projection_size)$"
)

# Names for the columns of all heads that elsewhere are the width of the model: tried only where the others fail.
AMBIGUOUS_WIDTHS = re.compile(
    r"^(embed_dim|hidden_size|d_model|dim|embedding_size|d_inner|dim_out|output_channels|channels|n_embd"
    r"|head_size|hidden_dim|width|size)$"
)

# Integers of FFN and expert modules that count neurons.
NEURON_COUNTS = re.compile(
    r"^(\w*intermediate\w*|\w*inner\w*|\w*ffn\w*|\w*expert_dim\w*|\w*hidden_(size|dim|features)|\w*mlp\w*|d_ff"
    r"|dim|channels|moe_\w*)$"
)


@dataclass(frozen=True)
class PositionBias:
    """A bias of the attention scores that one layer makes from a table and all layers use.

    The table stays whole, and every layer picks its heads from the bias.

    Attributes:
        argument: of the attention modules, the bias with heads along dimension 1, None in the layer that makes it.
        method: of the attention module that has the table, which makes the bias; modules without it make zeros.
        table: path of the table below that module, one column per head.
    """

    argument: str
    method: str
    table: str


POSITION_BIASES = (
    # t5, mt5, switch_transformers
    PositionBias("position_bias", "compute_bias", "relative_attention_bias.weight"),
)


@dataclass(frozen=True)
class HeadTable:
    """A table of heads, as [layer, head], which code around a model picks from its attention weights.

    Attributes:
        name: of the entry of the generation config.
        attention: matches the names of the blocks that it is about.
    """

    name: str
    attention: re.Pattern[str]


HEAD_TABLES = (
    # whisper: the heads of cross attention by which words are aligned to the sound
    HeadTable("alignment_heads", re.compile(r"(^|\.)decoder\.layers\.\d+\.encoder_attn$")),
)

# Decoders that vLLM's AnyModel has layers of, whose attention there reads head_dim, as records of its own
# (vllm/model_executor/models/anymodel.py).
ANYMODEL_ARCHITECTURES = {
    "LlamaForCausalLM": {"decoder_layer_module": ".llama", "decoder_layer_class": "LlamaDecoderLayer"},
    "MistralForCausalLM": {"decoder_layer_module": ".mistral", "decoder_layer_class": "MistralDecoderLayer"},
    "Qwen3ForCausalLM": {"decoder_layer_module": ".qwen3", "decoder_layer_class": "Qwen3DecoderLayer"},
}
