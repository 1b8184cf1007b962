"""What structure cannot tell, as data: how attention and FFN blocks are laid out, one record per layout.

A layout matches every module in which all of its paths exist, whatever the model is called, so one record serves a
whole family. A new family is a new record and a test, never a branch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionLayout:
    """Paths relative to the matched module; '' is the matched module itself.

    Attributes:
        core: the module that is replaced when no head is left; what it is called names the block.
        query: projection of the queries; with `fused` of queries, keys and values one after the other.
        key: projection of the keys; None if fused.
        value: projection of the values; None if fused.
        output: projection that reads the concatenated heads.
        head_dim: attribute of `core` with the width of one head.
    """

    core: str
    query: str
    key: str | None
    value: str | None
    output: str
    head_dim: str


@dataclass(frozen=True)
class FfnLayout:
    """Paths relative to the matched module; '' is the matched module itself.

    Attributes:
        core: the module that is replaced when no neuron is left; what it is called names the block.
        producers: projections whose rows are the neurons: up, and gate where there is one.
        output: the down projection.
    """

    core: str
    producers: tuple[str, ...]
    output: str


ATTENTION_LAYOUTS = (
    # bert, roberta, xlm-roberta, camembert, electra, ernie ...
    AttentionLayout("self", "self.query", "self.key", "self.value", "output.dense", "attention_head_size"),
    # llama, mistral, qwen2, smollm3 ... (grouped queries: fewer key and value heads)
    AttentionLayout("", "q_proj", "k_proj", "v_proj", "o_proj", "head_dim"),
    # bart, marian, pegasus, opt ...
    AttentionLayout("", "q_proj", "k_proj", "v_proj", "out_proj", "head_dim"),
    # gpt2
    AttentionLayout("", "c_attn", None, None, "c_proj", "head_dim"),
)

FFN_LAYOUTS = (
    # bert and its kin
    FfnLayout("intermediate", ("intermediate.dense",), "output.dense"),
    # llama and its kin
    FfnLayout("", ("gate_proj", "up_proj"), "down_proj"),
    # gpt2
    FfnLayout("", ("c_fc",), "c_proj"),
    # bart and its kin
    FfnLayout("fc1", ("fc1",), "fc2"),
)

# Attributes of attention modules that count heads, or the columns of all heads. They are updated where name and value
# both fit, since a value alone also matches things like a window size.
HEAD_COUNT_ATTRIBUTES = ("num_attention_heads", "num_heads", "num_key_value_heads", "n_heads")
HEAD_WIDTH_ATTRIBUTES = ("all_head_size", "split_size")
