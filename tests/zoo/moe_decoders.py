"""Causal language models of the zoo with mixtures of experts, or with state space or linear attention layers."""

from zoo.decoders import GLOBAL_HEADS, LATENT, PLAIN_ROPE, SCALED_ROPE, SLIDING_AND_FULL, decoder
from zoo.species import Species

DENSE_AND_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
INDEXED = {"index_topk": 5, "index_head_dim": 6, "index_n_heads": 3}  # latent attention to the selected tokens
CONVOLVED = {
    "layer_types": ["hybrid_sliding", "hybrid"],
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 6,
    "sliding_window_size": 6,
    "d_rel": 3,
    "rel_extent": 8,
}

SPECIES: dict[str, Species] = {
    "afmoe": decoder("AfmoeForCausalLM", **SLIDING_AND_FULL),
    "aria_text": decoder("AriaTextForCausalLM"),
    "axk1": decoder("AXK1ForCausalLM", n_group=2, topk_group=1, **LATENT, **DENSE_AND_SPARSE),
    "axk2": decoder("AXK2ForCausalLM", gated_norm_rank=5, **LATENT, **INDEXED, **DENSE_AND_SPARSE),
    "bailing_hybrid": decoder(
        "BailingHybridForCausalLM", n_group=2, topk_group=1, **LATENT, **LINEAR_AND_FULL, **DENSE_AND_SPARSE
    ),
    "bamba": decoder("BambaForCausalLM", attn_layer_indices=[1]),
    "beam": decoder("BeamForCausalLM", n_group=2, topk_group=1, **SLIDING_AND_FULL, **DENSE_AND_SPARSE),
    "cohere2_moe": decoder("Cohere2MoeForCausalLM", logit_scale=0.5, **SLIDING_AND_FULL, **DENSE_AND_SPARSE),
    "dbrx": decoder(
        "DbrxForCausalLM",
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "deepseek_v2": decoder("DeepseekV2ForCausalLM", head_dim=4, first_k_dense_replace=1, **LATENT),
    "deepseek_v3": decoder("DeepseekV3ForCausalLM", first_k_dense_replace=1, n_group=2, topk_group=1, **LATENT),
    "deepseek_v32": decoder(
        "DeepseekV32ForCausalLM", head_dim=4, n_group=2, topk_group=1, **LATENT, **INDEXED, **DENSE_AND_SPARSE
    ),
    "deepseek_v4": decoder(
        "DeepseekV4ForCausalLM",
        num_hidden_layers=3,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        mlp_layer_types=["moe", "moe", "moe"],  # the table of "hash_moe" comes with a checkpoint
        num_key_value_heads=1,
        o_groups=2,
        o_lora_rank=5,
        hc_mult=2,
        index_topk=3,
        index_head_dim=6,
        index_n_heads=3,
    ),
    "doge": decoder("DogeForCausalLM"),
    # Which experts a token gets depends on later tokens, and on other sequences.
    "doge (experts)": decoder("DogeForCausalLM", is_moe=True),
    "dots1": decoder("Dots1ForCausalLM", first_k_dense_replace=1),
    "dots3_note_text": decoder(
        "Dots3NoteForCausalLM",
        shared_experts_intermediate_size=20,
        layer_types=["sliding_attention", "indexed_attention"],
        head_dim=4,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_q_lora_rank=15,
        swa_kv_lora_rank=11,
        swa_head_dim=12,
        swa_qk_nope_head_dim=8,
        swa_qk_rope_head_dim=4,
        swa_v_head_dim=5,
        **LATENT,
        **INDEXED,
        **DENSE_AND_SPARSE,
    ),
    "ernie4_5_moe": decoder("Ernie4_5_MoeForCausalLM"),
    "exaone_moe": decoder("ExaoneMoeForCausalLM", **SLIDING_AND_FULL, **DENSE_AND_SPARSE),
    "falcon_h1": decoder("FalconH1ForCausalLM", mamba_d_ssm=64),
    "flex_olmo": decoder("FlexOlmoForCausalLM"),
    "flint": decoder("FlintForCausalLM", mlp_only_layers=[0], **SLIDING_AND_FULL),
    "gemma4_text (experts)": decoder(
        "Gemma4ForCausalLM",
        attention_k_eq_v=True,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
        hidden_size_per_layer_input=0,
        **GLOBAL_HEADS,
        **SLIDING_AND_FULL,
    ),
    "glm4_moe": decoder("Glm4MoeForCausalLM"),
    "glm4_moe_lite": decoder("Glm4MoeLiteForCausalLM", **LATENT, **DENSE_AND_SPARSE),
    "glm_moe_dsa": decoder("GlmMoeDsaForCausalLM", head_dim=4, **LATENT, **INDEXED, **DENSE_AND_SPARSE),
    "gpt_oss": decoder("GptOssForCausalLM", **PLAIN_ROPE, **SLIDING_AND_FULL),
    "granitemoe": decoder("GraniteMoeForCausalLM", attention_multiplier=0.3),
    "granitemoe_swa": decoder("GraniteMoeSWAForCausalLM", attention_multiplier=0.3, **SLIDING_AND_FULL),
    "granitemoehybrid": decoder(
        "GraniteMoeHybridForCausalLM", attention_multiplier=0.3, layer_types=["mamba", "attention"]
    ),
    "granitemoeshared": decoder("GraniteMoeSharedForCausalLM", attention_multiplier=0.3),
    "hunyuan_v1_moe": decoder("HunYuanMoEV1ForCausalLM"),
    "hy_v3": decoder("HYV3ForCausalLM", **DENSE_AND_SPARSE),
    "hy_v4": decoder("HYV4ForCausalLM", **LATENT, **INDEXED, **DENSE_AND_SPARSE),
    "inkling2_text": decoder("Inkling2ForCausalLM", unpadded_vocab_size=97, **CONVOLVED),
    "inkling_text": decoder("InklingForCausalLM", logits_mup_width_multiplier=2.0, **CONVOLVED, **DENSE_AND_SPARSE),
    "jamba": decoder("JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1),
    "jetmoe": decoder("JetMoeForCausalLM", kv_channels=8),
    "kimi_linear": decoder(
        "KimiLinearForCausalLM", linear_head_dim=6, linear_num_heads=3, **LATENT, **LINEAR_AND_FULL, **DENSE_AND_SPARSE
    ),
    "kolibri1": decoder("Kolibri1ForCausalLM", **SLIDING_AND_FULL),
    "laguna": decoder("LagunaForCausalLM", **SLIDING_AND_FULL, **DENSE_AND_SPARSE),
    "lfm2": decoder("Lfm2ForCausalLM", block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]),
    "lfm2_moe": decoder("Lfm2MoeForCausalLM", num_dense_layers=1, layer_types=["conv", "full_attention"]),
    "lfm3": decoder(
        "Lfm3ForCausalLM", num_hidden_layers=3, layer_types=["conv", "sliding_attention", "full_attention"]
    ),
    "llama4_text": decoder(
        "Llama4ForCausalLM", moe_layers=[1], no_rope_layers=[1, 0], intermediate_size_mlp=48, attention_chunk_size=6
    ),
    "longcat_flash": decoder(
        "LongcatFlashForCausalLM", head_dim=4, expert_ffn_hidden_size=24, zero_expert_num=2, **LATENT
    ),
    "mellum": decoder("MellumForCausalLM", **SLIDING_AND_FULL, **DENSE_AND_SPARSE),
    "mimo_v2_flash": decoder("MiMoV2FlashForCausalLM", **SLIDING_AND_FULL, **DENSE_AND_SPARSE),
    "minimax": decoder("MiniMaxForCausalLM", block_size=6, **LINEAR_AND_FULL),
    "minimax_m2": decoder("MiniMaxM2ForCausalLM"),
    "minimax_m3_vl_text": decoder(
        "MiniMaxM3VLForCausalLM",
        dense_intermediate_size=48,
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=6,
        index_block_size=2,
        index_topk_blocks=2,
        index_local_blocks=1,
        **DENSE_AND_SPARSE,
    ),
    "mistral4": decoder("Mistral4ForCausalLM", first_k_dense_replace=1, **SCALED_ROPE, **LATENT),
    "mixtral": decoder("MixtralForCausalLM"),
    "nemotron_h": decoder(
        "NemotronHForCausalLM",
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        mamba_num_heads=16,
        mamba_head_dim=4,
        ssm_state_size=6,
        n_groups=2,
        chunk_size=8,
        moe_shared_expert_intermediate_size=20,
    ),
    "olmo_hybrid": decoder("OlmoHybridForCausalLM", **LINEAR_AND_FULL),
    "olmoe": decoder("OlmoeForCausalLM"),
    # Not noise but the margin within which experts share a token.
    "phimoe": decoder("PhimoeForCausalLM", router_jitter_noise=0.2),
    "qwen2_moe": decoder("Qwen2MoeForCausalLM"),
    "qwen3_5_moe_text": decoder("Qwen3_5MoeForCausalLM", **LINEAR_AND_FULL),
    "qwen3_5_text": decoder("Qwen3_5ForCausalLM", **LINEAR_AND_FULL),
    "qwen3_moe": decoder("Qwen3MoeForCausalLM"),
    "qwen3_next": decoder("Qwen3NextForCausalLM", **LINEAR_AND_FULL),
    "qwen4_exp_text": decoder(
        "Qwen4ExpForCausalLM",
        hc_count=2,
        hc_lowrank=5,
        ple_layer_ids=[1],
        ple_embed_dim=12,
        heads_per_ngram=2,
        ngram_vocab_size_base=50,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=10,
        indexer_budget=4,
        indexer_compress_ratio=2,
        **LINEAR_AND_FULL,
    ),
    "recurrent_gemma": decoder("RecurrentGemmaForCausalLM", num_hidden_layers=3, lru_width=24, attention_window_size=6),
    "solar_open": decoder("SolarOpenForCausalLM"),
    "zamba": decoder(
        "ZambaForCausalLM",
        num_hidden_layers=4,
        layers_block_type=2 * ["linear_attention", "hybrid"],
        num_key_value_heads=4,
    ),
    "zamba2": decoder(
        "Zamba2ForCausalLM",
        num_hidden_layers=4,
        layers_block_type=2 * ["linear_attention", "hybrid"],
        num_key_value_heads=4,
        adapter_rank=5,
        chunk_size=8,
    ),
    "zaya": decoder(
        "ZayaForCausalLM", num_experts_per_tok=1, router_hidden_size=7, layer_types=["hybrid_sliding", "hybrid"]
    ),
}
