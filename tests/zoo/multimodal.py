"""Models that read texts beside images, videos or sound; their inputs are made up from their configurations."""

from functools import partial

from zoo.building import species
from zoo.species import Species

multimodal = partial(species, "multimodal")


# How many of a head's channels turn with time, height and width.
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}

SPECIES: dict[str, Species] = {
    "altclip": multimodal("AltCLIPModel"),
    "aya_vision": multimodal("AyaVisionForConditionalGeneration"),
    "blip": multimodal("BlipForConditionalGeneration"),
    "blip (dual)": multimodal("BlipModel"),
    "blip-2": multimodal("Blip2ForConditionalGeneration"),
    "chinese_clip": multimodal("ChineseCLIPModel"),
    "clip": multimodal("CLIPModel"),
    "clipseg": multimodal("CLIPSegModel"),
    "flava": multimodal("FlavaModel"),
    "gemma3": multimodal("Gemma3ForConditionalGeneration", mm_tokens_per_image=4),
    "git": multimodal("GitForCausalLM"),
    "glm4v": multimodal(
        "Glm4vForConditionalGeneration", text_config=SECTIONS, vision_config={"out_hidden_size": 32, "depth": 2}
    ),
    "idefics2": multimodal("Idefics2ForConditionalGeneration"),
    "idefics3": multimodal("Idefics3ForConditionalGeneration", scale_factor=2),
    "internvl": multimodal("InternVLForConditionalGeneration"),
    "layoutlmv3": multimodal("LayoutLMv3ForSequenceClassification", coordinate_size=4, shape_size=8, input_size=32),
    "llava": multimodal("LlavaForConditionalGeneration"),
    "llava_next": multimodal("LlavaNextForConditionalGeneration", image_grid_pinpoints=[[32, 64]]),
    "llava_onevision": multimodal("LlavaOnevisionForConditionalGeneration"),
    "metaclip_2": multimodal("MetaClip2Model"),
    "mistral3": multimodal("Mistral3ForConditionalGeneration"),
    "owlv2": multimodal("Owlv2Model"),
    "owlvit": multimodal("OwlViTModel"),
    "ovis2": multimodal("Ovis2ForConditionalGeneration"),
    "paligemma": multimodal(
        "PaliGemmaForConditionalGeneration", projection_dim=32, vision_config={"projection_dim": 32}
    ),
    "qwen2_5_vl": multimodal(
        "Qwen2_5_VLForConditionalGeneration", text_config=SECTIONS, vision_config={"out_hidden_size": 32, "depth": 2}
    ),
    "qwen2_vl": multimodal(
        "Qwen2VLForConditionalGeneration", text_config=SECTIONS, vision_config={"embed_dim": 32, "depth": 2}
    ),
    "qwen3_vl": multimodal("Qwen3VLForConditionalGeneration", vision_config={"out_hidden_size": 32, "depth": 2}),
    "qwen3_vl_moe": multimodal("Qwen3VLMoeForConditionalGeneration", vision_config={"out_hidden_size": 32, "depth": 2}),
    "siglip": multimodal("SiglipModel"),
    "siglip2": multimodal("Siglip2Model", vision_config={"num_patches": 16}),
    "smolvlm": multimodal("SmolVLMForConditionalGeneration"),
    "step3p7": multimodal("Step3p7ForConditionalGeneration"),
    "tipsv2": multimodal("Tipsv2Model"),
    "video_llava": multimodal("VideoLlavaForConditionalGeneration"),
    "vilt": multimodal("ViltForImageAndTextRetrieval"),
    "vipllava": multimodal("VipLlavaForConditionalGeneration", vision_feature_layers=[-1, -2]),
    "vision-encoder-decoder": multimodal("VisionEncoderDecoderModel"),
}
