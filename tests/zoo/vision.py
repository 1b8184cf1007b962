"""Models of images and videos of the zoo; their inputs are those that are made up from their configurations."""

from functools import partial

from zoo.building import species
from zoo.species import Species

vision = partial(species, "vision")


# Stages of growing width, where each halves the sides of the image.
STAGES = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
ATTENDING_STAGES = {**STAGES, "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2]}
WINDOWS = {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
UNITS = {
    "embed_dim": 16,
    "depths": [1, 1, 1],
    "num_heads": [2, 4, 8],
    "image_size": [64, 64],
    "patch_size": [7, 7],
    "patch_stride": [4, 4],
    "patch_padding": [3, 3],
    "num_query_pool": 1,
    "masked_unit_size": [8, 8],
    "masked_unit_attention": [True, False, False],
    "query_stride": [2, 2],
}
CONVOLVED = {
    "num_heads": [2, 4],
    "embed_dim": [16, 32],
    "depth": [1, 2],
    "patch_sizes": [7, 3],
    "patch_stride": [4, 2],
    "patch_padding": [2, 1],
    "mlp_ratio": [2.0, 2.0],
    **{key: [0.0, 0.0] for key in ("attention_drop_rate", "drop_rate", "drop_path_rate")},
    "qkv_bias": [True, True],
    "cls_token": [False, True],
    "qkv_projection_method": ["dw_bn", "dw_bn"],
    **{key: [3, 3] for key in ("kernel_qkv", "kernel_q", "kernel_kv")},
    **{key: [1, 1] for key in ("padding_kv", "padding_q", "stride_q")},
    "stride_kv": [2, 2],
}
PREDICTOR = {"pred_hidden_size": 32, "pred_num_attention_heads": 4, "pred_num_hidden_layers": 2}
DECODER = {
    "decoder_num_attention_heads": 4,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_intermediate_size": 40,
}

SPECIES: dict[str, Species] = {
    "aimv2_vision_model": vision("Aimv2VisionModel"),
    "beit": vision("BeitForImageClassification"),
    "beit (position biases)": vision("BeitForImageClassification", use_relative_position_bias=True),
    "clip_vision_model": vision("CLIPVisionModelWithProjection"),
    "convnext": vision("ConvNextForImageClassification", **STAGES, patch_size=4),
    "cvt": vision("CvtForImageClassification", **CONVOLVED),
    "data2vec-vision": vision("Data2VecVisionForImageClassification"),
    "data2vec-vision (position biases)": vision(
        "Data2VecVisionForImageClassification", use_shared_relative_position_bias=True
    ),
    "deit": vision("DeiTForImageClassification"),
    "dinov2": vision("Dinov2ForImageClassification"),
    "dinov2 (gated)": vision("Dinov2ForImageClassification", use_swiglu_ffn=True),
    "dinov2_with_registers": vision("Dinov2WithRegistersForImageClassification"),
    "dinov3_vit": vision("DINOv3ViTModel"),
    "donut-swin": vision("DonutSwinForImageClassification", **WINDOWS),
    "dpt": vision("DPTModel"),
    "focalnet": vision(
        "FocalNetForImageClassification", embed_dim=16, depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3]
    ),
    "glpn": vision("GLPNModel", **ATTENDING_STAGES),
    "hiera": vision("HieraForImageClassification", **UNITS),
    "ijepa": vision("IJepaForImageClassification"),
    "llama4_vision_model": vision(
        "Llama4VisionModel", projector_input_dim=32, projector_output_dim=32, intermediate_size=128
    ),
    "maskformer-swin": vision("MaskFormerSwinModel", **WINDOWS),
    "mlcd_vision_model": vision("MLCDVisionModel"),
    "mobilevit": vision(
        "MobileViTForImageClassification",
        hidden_sizes=[16, 16, 32],
        neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16],
        patch_size=2,
    ),
    "pixio": vision("PixioModel"),
    "poolformer": vision("PoolFormerForImageClassification", **STAGES, patch_size=7),
    "pvt": vision("PvtForImageClassification", **ATTENDING_STAGES),
    "pvt_v2": vision("PvtV2ForImageClassification", **ATTENDING_STAGES),
    "resnet": vision("ResNetForImageClassification", **STAGES, embedding_size=8),
    "segformer": vision("SegformerForImageClassification", **ATTENDING_STAGES),
    "siglip_vision_model": vision("SiglipVisionModel"),
    "siglip2_vision_model": vision("Siglip2VisionModel", num_patches=16),
    "swiftformer": vision("SwiftFormerForImageClassification", embed_dims=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    "swin": vision("SwinForImageClassification", **WINDOWS),
    "swin2sr": vision("Swin2SRModel", **{**WINDOWS, "patch_size": 1}),
    "swinv2": vision("Swinv2ForImageClassification", **WINDOWS),
    "timesformer": vision("TimesformerForVideoClassification", num_frames=3),
    "tipsv2_vision_model": vision("Tipsv2VisionModel"),
    "videomae": vision("VideoMAEForVideoClassification", num_frames=4),
    "videoprism_vision_model": vision(
        "VideoPrismVisionModel", num_spatial_layers=2, num_temporal_layers=2, num_frames=3
    ),
    "vit": vision("ViTForImageClassification"),
    "vit_mae": vision("ViTMAEModel"),
    "vit_mae (with decoder)": vision("ViTMAEForPreTraining", **DECODER),
    "vit_msn": vision("ViTMSNForImageClassification"),
    "vitdet": vision("VitDetModel"),
    "vivit": vision("VivitForVideoClassification", num_frames=4),
    "vjepa2": vision("VJEPA2ForVideoClassification", **PREDICTOR, num_pooler_layers=1, frames_per_clip=4, crop_size=16),
    "yolos": vision("YolosForObjectDetection", image_size=[32, 32], num_detection_tokens=5),
}
