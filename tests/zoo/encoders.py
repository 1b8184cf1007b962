"""Text encoders of the zoo, with the head for sequence classification where there is one."""

from collections.abc import Callable
from typing import Any

import torch

from zoo.building import species
from zoo.species import Species, tokens


def padded() -> dict[str, Any]:
    """Two sequences of ten tokens, the second one padded."""
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def boxed() -> dict[str, Any]:
    """The same, with a place on a page for every token, shape (2, 10, 4): left, top, right and bottom."""
    corner = torch.arange(20).view(2, 10, 1).expand(2, 10, 2)
    return {**padded(), "bbox": torch.cat([corner, corner + 5], -1)}


def encoder(architecture: str, inputs: Callable[[], dict[str, Any]] = padded, **sizes: Any) -> Species:
    return species("encoder", architecture, inputs, **sizes)


def classifier(name: str, inputs: Callable[[], dict[str, Any]] = padded, **sizes: Any) -> Species:
    return encoder(f"{name}ForSequenceClassification", inputs, **sizes)


NO_WINDOWS = {"attention_window": 4}
BLOCKS = {"block_size": 2, "num_random_blocks": 1, "attention_type": "original_full"}
BOXES = {"max_2d_position_embeddings": 64}

SPECIES: dict[str, Species] = {
    "albert": classifier("Albert", embedding_size=16),
    "bert": classifier("Bert"),
    "big_bird": classifier("BigBird", **BLOCKS),
    "bros": encoder("BrosForTokenClassification", lambda: {**boxed(), "bbox": boxed()["bbox"] / 64.0}, dim_bbox=4),
    "camembert": classifier("Camembert"),
    "canine": classifier(
        "Canine", downsampling_rate=2, upsampling_kernel_size=2, num_hash_buckets=20, local_transformer_stride=4
    ),
    "convbert": classifier("ConvBert", embedding_size=16, conv_kernel_size=3, head_ratio=2),
    "data2vec-text": classifier("Data2VecText"),
    "deberta": classifier("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8),
    "deberta-v2": classifier(
        "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4, share_att_key=True
    ),
    "distilbert": classifier("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=40),
    "electra": classifier("Electra", embedding_size=16),
    "ernie": classifier("Ernie"),
    "esm": classifier("Esm", token_dropout=False, mask_token_id=4),
    "eurobert": classifier("EuroBert"),
    "flaubert": classifier("Flaubert", emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64),
    "funnel": classifier("Funnel", block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=40),
    "gte": classifier("Gte"),
    "ibert": classifier("IBert"),
    "jina_embeddings_v3": classifier("JinaEmbeddingsV3"),
    "layoutlm": classifier("LayoutLM", boxed, **BOXES),
    "lilt": classifier("Lilt", boxed, channel_shrink_ratio=2, hidden_size=48, **BOXES),
    "longformer": classifier("Longformer", **NO_WINDOWS),
    "luke": classifier("Luke", entity_vocab_size=20, entity_emb_size=12),
    "markuplm": classifier("MarkupLM", max_depth=5, xpath_unit_hidden_size=6),
    "megatron-bert": classifier("MegatronBert"),
    "mobilebert": classifier(
        "MobileBert",
        embedding_size=16,
        true_hidden_size=32,
        hidden_size=48,
        intra_bottleneck_size=32,
        num_feedforward_networks=2,
    ),
    "modernbert": classifier("ModernBert"),
    "mpnet": classifier("MPNet"),
    "mra": classifier("Mra"),
    "nomic_bert": classifier("NomicBert"),
    "nystromformer": classifier("Nystromformer", num_landmarks=10, segment_means_seq_len=10),
    "rembert": classifier("RemBert", input_embedding_size=16, output_embedding_size=16),
    "roberta": classifier("Roberta"),
    "roberta-prelayernorm": classifier("RobertaPreLayerNorm"),
    "roc_bert": classifier("RoCBert", pronunciation_vocab_size=20, shape_vocab_size=20, enable_shape=False),
    "roformer": classifier("RoFormer", embedding_size=16),
    "splinter": encoder("SplinterModel"),
    "squeezebert": classifier("SqueezeBert", embedding_size=32),
    "tapas": classifier("Tapas", type_vocab_sizes=[3, 4, 4, 2, 4, 4, 2]),
    "visual_bert": encoder("VisualBertModel", visual_embedding_dim=12),
    "xlm": classifier("XLM", emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64, n_langs=1),
    "xlm-roberta": classifier("XLMRoberta"),
    "xlm-roberta-xl": classifier("XLMRobertaXL"),
    "xlnet": classifier("XLNet", d_model=32, n_layer=2, n_head=4, d_inner=40),
    "xmod": classifier("Xmod", default_language="en_XX", languages=["en_XX"]),
    "yoso": classifier("Yoso", use_expectation=True, num_hash=2),
}
