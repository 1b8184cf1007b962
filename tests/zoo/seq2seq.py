"""Sequence to sequence models of the zoo."""

from typing import Any

from zoo.building import species
from zoo.encoders import padded
from zoo.species import Species, tokens

# Both halves, under all the names that configurations give to their sizes.
HALVES: dict[str, Any] = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 40),
    "d_model": 32,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
SPARSE = {"num_experts": 4, "expert_capacity": 64, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}

NLLB = {
    "num_experts": 4,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "normalize_router_prob_before_dropping": False,
}


def pair() -> dict[str, Any]:
    """Two sources of ten tokens, the second one padded, and two targets of seven."""
    return {**padded(), "decoder_input_ids": tokens().flip(0)[:, :7]}


def translator(architecture: str, **sizes: Any) -> Species:
    return species("sequence to sequence", architecture, pair, **sizes)


SPECIES: dict[str, Species] = {
    "bart": translator("BartForConditionalGeneration", **HALVES),
    "bigbird_pegasus": translator("BigBirdPegasusForConditionalGeneration", **HALVES, attention_type="original_full"),
    "blenderbot": translator("BlenderbotForConditionalGeneration", **HALVES),
    "blenderbot-small": translator("BlenderbotSmallForConditionalGeneration", **HALVES),
    "fsmt": translator("FSMTForConditionalGeneration", **HALVES, src_vocab_size=99, tgt_vocab_size=99),
    "led": translator(
        "LEDForConditionalGeneration",
        **HALVES,
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    "longt5": translator("LongT5ForConditionalGeneration", **T5),
    "longt5 (global)": translator("LongT5ForConditionalGeneration", **T5, encoder_attention_type="transient-global"),
    "m2m_100": translator("M2M100ForConditionalGeneration", **HALVES),
    "marian": translator("MarianMTModel", **HALVES),
    "mbart": translator("MBartForConditionalGeneration", **HALVES),
    "mt5": translator("MT5ForConditionalGeneration", **T5),
    "mvp": translator("MvpForConditionalGeneration", **HALVES),
    "nllb-moe": translator("NllbMoeForConditionalGeneration", **HALVES, **NLLB),
    "pegasus": translator("PegasusForConditionalGeneration", **HALVES),
    "pegasus_x": translator("PegasusXForConditionalGeneration", **HALVES, block_size=4, num_global_tokens=3),
    "plbart": translator("PLBartForConditionalGeneration", **HALVES),
    "prophetnet": translator(
        "ProphetNetForConditionalGeneration",
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
    ),
    "switch_transformers": translator("SwitchTransformersForConditionalGeneration", **T5, **SPARSE),
    "t5": translator("T5ForConditionalGeneration", **T5),
    "t5 (gated)": translator("T5ForConditionalGeneration", **T5, feed_forward_proj="gated-gelu"),
    "umt5": translator("UMT5ForConditionalGeneration", **T5),
}
