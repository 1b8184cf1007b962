"""The embedded default models for images: tiny, from scratch, and a bit too large for their digits."""

from transformers import (
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerImageProcessorPil,
    ViTConfig,
    ViTImageProcessorPil,
)

from embedded.digits import CELL, SIZE
from embedded.kept import untrained

HALF = [0.5] * 3  # mean and standard deviation of all colors
INITIAL = 0.1  # weights; with the usual 0.02, a model so narrow takes long to begin


def digit_classifier() -> str:
    """Make a ViT that reads one digit; returns its directory."""
    config = ViTConfig(
        image_size=SIZE,
        patch_size=7,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=384,
        initializer_range=INITIAL,
    )
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=HALF, image_std=HALF)
    return untrained(AutoModelForImageClassification, config, processor)


def digit_segmenter() -> str:
    """Make a Segformer that reads all digits of a canvas; returns its directory."""
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 2],
        sr_ratios=[4, 1],
        hidden_sizes=[32, 64],
        patch_sizes=[7, 5],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 4],
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        decoder_hidden_size=32,
        initializer_range=INITIAL,
    )
    processor = SegformerImageProcessorPil(
        size={"height": 2 * CELL, "width": 2 * CELL}, image_mean=HALF, image_std=HALF
    )
    return untrained(AutoModelForSemanticSegmentation, config, processor)
