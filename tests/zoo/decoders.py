"""Dense causal language models of the zoo; those with experts or with layers other than attention: moe_decoders."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from zoo.building import species
from zoo.species import VOCABULARY, Species, noise, tokens

SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"num_key_value_heads": 4}  # every head has its own part of the latent keys and values
BYTES = {  # any of the four transformers of BLT
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SHARED_KEYS_AND_VALUES = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": 2 * SLIDING_AND_FULL["layer_types"],
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 6,
}
GLOBAL_HEADS = {"global_head_dim": 12, "num_global_key_value_heads": 1}  # of the layers with full attention
# For those whose default is a scaling which doesn't fit so few positions.
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
SCALED_ROPE = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": 4,
        "max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
}


def text() -> dict[str, Any]:
    """Two sequences of ten tokens."""
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, 10, dtype=torch.long)}


def text_beside(width: int) -> dict[str, Any]:
    """Two sequences of ten tokens, and what an encoder of that width made out of something of length seven."""
    return {**text(), "encoder_hidden_states": noise(2, 7, width)}


def text_beside_image() -> dict[str, Any]:
    """Two sequences of ten tokens, and seven patches of an image for each."""
    return {**text(), "cross_attention_states": noise(2, 7, 32)}


def frame() -> dict[str, Any]:
    """Two frames with a token of each of ten codebooks, and what the model of the frames says about each."""
    return {"input_ids": tokens(), "backbone_last_hidden_state": noise(2, 20)}


def codebooks(count: int) -> dict[str, Any]:
    """Two sequences of ten frames, each with a token of every codebook, beside the states of an encoder."""
    return {"input_ids": tokens(2 * count), "encoder_hidden_states": noise(2, 7, 32)}


def decoder(architecture: str, inputs: Callable[[], dict[str, Any]] = text, **sizes: Any) -> Species:
    """That architecture as a species, see build."""
    return species("decoder", architecture, inputs, **sizes)


SPECIES: dict[str, Species] = {
    "apertus": decoder("ApertusForCausalLM", **PLAIN_ROPE),
    "arcee": decoder("ArceeForCausalLM"),
    "bert-generation": decoder("BertGenerationDecoder", is_decoder=True),
    "biogpt": decoder("BioGptForCausalLM"),
    "bitnet": decoder("BitNetForCausalLM"),
    "blt": decoder(
        "BltForCausalLM",
        use_cache=False,  # its cache needs a configuration with layers
        cross_attn_k=2,
        local_attention_window_len=6,
        encoder_hash_byte_group_size=[2, 3],
        encoder_hash_byte_group_vocab=50,
        patching_threshold=3.9,  # splits the inputs into several patches
        patcher_config=BYTES,
        encoder_config={**BYTES, "hidden_size_global": 64},
        decoder_config={**BYTES, "hidden_size_global": 64},
        global_config={**BYTES, "hidden_size": 64},
    ),
    "bloom": decoder("BloomForCausalLM"),
    "clvp_decoder": decoder("ClvpForCausalLM"),
    "codegen": decoder("CodeGenForCausalLM"),
    "cohere": decoder("CohereForCausalLM", use_qk_norm=True, logit_scale=0.5),
    "cohere2": decoder("Cohere2ForCausalLM", logit_scale=0.5, **SLIDING_AND_FULL),
    "cohere_compass_text": decoder(
        "CohereCompassForCausalLM",
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
        **SLIDING_AND_FULL,
    ),
    "cpmant": decoder("CpmAntForCausalLM", dim_head=8, dim_ff=40, prompt_length=3, prompt_types=3, segment_types=4),
    "csm_depth_decoder_model": decoder("CsmDepthDecoderForCausalLM", frame, num_codebooks=10, backbone_hidden_size=20),
    "ctrl": decoder("CTRLLMHeadModel"),
    "cwm": decoder("CwmForCausalLM", **PLAIN_ROPE, **SLIDING_AND_FULL),
    "diffllama": decoder("DiffLlamaForCausalLM"),
    "emu3_text_model": decoder("Emu3ForCausalLM"),
    "ernie4_5": decoder("Ernie4_5ForCausalLM"),
    "exaone4": decoder("Exaone4ForCausalLM", **SLIDING_AND_FULL),
    # Falcon packs queries, keys and values in three ways: RW, 7B, and 40B and later.
    "falcon (multi-head)": decoder("FalconForCausalLM", multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "falcon": decoder("FalconForCausalLM"),
    "falcon (grouped)": decoder("FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2),
    "gemma": decoder("GemmaForCausalLM"),
    "gemma2": decoder("Gemma2ForCausalLM", query_pre_attn_scalar=8, **SLIDING_AND_FULL),
    "gemma3_text": decoder("Gemma3ForCausalLM", query_pre_attn_scalar=8, **SLIDING_AND_FULL),
    # In these, the last two layers attend to the keys and values of the first two.
    "gemma3n_text": decoder(
        "Gemma3nForCausalLM",
        altup_num_inputs=2,
        laurel_rank=5,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
        **SHARED_KEYS_AND_VALUES,
    ),
    "gemma4_text": decoder("Gemma4ForCausalLM", use_double_wide_mlp=True, **SHARED_KEYS_AND_VALUES, **GLOBAL_HEADS),
    "gemma4_unified_text": decoder(
        "Gemma4UnifiedForCausalLM", attention_k_eq_v=True, **GLOBAL_HEADS, **SLIDING_AND_FULL
    ),
    "glm": decoder("GlmForCausalLM"),
    "glm4": decoder("Glm4ForCausalLM"),
    "gpt2": decoder("GPT2LMHeadModel"),
    "gpt_bigcode": decoder("GPTBigCodeForCausalLM"),
    "gpt_bigcode (multi-head)": decoder("GPTBigCodeForCausalLM", multi_query=False),
    "gpt_neo": decoder("GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=4),
    "gpt_neox": decoder("GPTNeoXForCausalLM"),
    "gpt_neox_japanese": decoder("GPTNeoXJapaneseForCausalLM", intermediate_multiple_size=2),
    "gptj": decoder("GPTJForCausalLM"),
    "granite": decoder("GraniteForCausalLM", attention_multiplier=0.3),
    "granite_swa": decoder("GraniteSWAForCausalLM", attention_multiplier=0.3, **SLIDING_AND_FULL),
    "helium": decoder("HeliumForCausalLM"),
    "hrm_text": decoder("HrmTextForCausalLM"),
    "hunyuan_v1_dense": decoder("HunYuanDenseV1ForCausalLM"),
    "hyperclovax": decoder("HyperCLOVAXForCausalLM"),
    "imagegpt": decoder("ImageGPTForCausalImageModeling"),
    "internlm3": decoder("LlamaForCausalLM", config="InternLM3Config"),
    "iquestcoder": decoder("LlamaForCausalLM", config="IQuestCoderConfig"),
    "jais2": decoder("Jais2ForCausalLM"),
    "llama": decoder("LlamaForCausalLM"),
    "minicpm3": decoder("MiniCPM3ForCausalLM", dim_model_base=16, **LATENT),
    "ministral": decoder("MinistralForCausalLM", **SLIDING_AND_FULL),
    "ministral3": decoder("Ministral3ForCausalLM", **SCALED_ROPE),
    "mistral": decoder("MistralForCausalLM"),
    "mllama_text_model": decoder("MllamaForCausalLM", text_beside_image, cross_attention_layers=[1]),
    "modernbert-decoder": decoder("ModernBertDecoderForCausalLM", cls_token_id=1, sep_token_id=2, **SLIDING_AND_FULL),
    "moshi": decoder("MoshiForCausalLM", ffn_dim=80),
    "mpt": decoder("MptForCausalLM"),
    "musicgen_decoder": decoder("MusicgenForCausalLM", partial(codebooks, 3), num_codebooks=3),
    "musicgen_melody_decoder": decoder("MusicgenMelodyForCausalLM", partial(codebooks, 3), num_codebooks=3),
    "nanochat": decoder("NanoChatForCausalLM"),
    "nemotron": decoder("NemotronForCausalLM"),
    "olmo": decoder("OlmoForCausalLM"),
    "olmo2": decoder("Olmo2ForCausalLM"),
    "olmo3": decoder("Olmo3ForCausalLM", **SLIDING_AND_FULL),
    "openai-gpt": decoder("OpenAIGPTLMHeadModel"),
    "opt": decoder("OPTForCausalLM"),
    "persimmon": decoder("PersimmonForCausalLM"),
    "phi": decoder("PhiForCausalLM"),
    "phi3": decoder("Phi3ForCausalLM"),
    "qwen2": decoder("Qwen2ForCausalLM"),
    "qwen3": decoder("Qwen3ForCausalLM"),
    "seed_oss": decoder("SeedOssForCausalLM"),
    "smollm3": decoder("SmolLM3ForCausalLM", no_rope_layers=[1, 0]),
    "stablelm": decoder("StableLmForCausalLM"),
    "starcoder2": decoder("Starcoder2ForCausalLM"),
    "trocr": decoder("TrOCRForCausalLM", partial(text_beside, 20), is_decoder=True, cross_attention_hidden_size=20),
    "vaultgemma": decoder("VaultGemmaForCausalLM", query_pre_attn_scalar=8, **SLIDING_AND_FULL),
    "xglm": decoder("XGLMForCausalLM"),
    # Loading clears the embedding of the padding token.
    "youtu": decoder("YoutuForCausalLM", pad_token_id=None, **LATENT),
}
