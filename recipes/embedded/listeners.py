"""Small models that listen, without any training: what the recipes for sounds begin with when no model is given."""

from transformers import ASTConfig, ASTFeatureExtractor, AutoModelForAudioClassification

from embedded.kept import untrained
from embedded.speech import DIGITS

MELS, FRAMES = 32, 80
"""Of a spectrogram of a digit: no digit lasts 0.8 seconds, and a frame is 0.01."""


def digit_listener() -> str:
    """Make a spectrogram transformer for one spoken digit; returns its directory."""
    config = ASTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=384,
        patch_size=16,
        frequency_stride=16,
        time_stride=16,
        num_mel_bins=MELS,
        max_length=FRAMES,
        id2label=dict(enumerate(DIGITS)),
    )
    extractor = ASTFeatureExtractor(num_mel_bins=MELS, max_length=FRAMES)
    return untrained(AutoModelForAudioClassification, config, extractor)
