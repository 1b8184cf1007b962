"""Small models that listen, without any training: what the recipes for sounds begin with when no model is given."""

import string

from common.transcripts import character_tokenizer
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertProcessor,
)

from embedded.kept import untrained
from embedded.speech import DIGITS

MELS, FRAMES = 32, 80
"""Of a spectrogram of a digit: no digit lasts 0.8 seconds, and a frame is 0.01."""
PHRASE_MELS = 40


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


def phrase_listener() -> str:
    """Make a Wav2Vec2-BERT that writes lower-case letters; returns its directory."""
    tokenizer = character_tokenizer(string.ascii_lowercase)
    config = Wav2Vec2BertConfig(
        hidden_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=240,
        feature_projection_input_dim=2 * PHRASE_MELS,  # of two frames each
        conv_depthwise_kernel_size=9,
        conformer_conv_dropout=0.0,
        left_max_position_embeddings=16,
        right_max_position_embeddings=16,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    extractor = SeamlessM4TFeatureExtractor(feature_size=PHRASE_MELS, num_mel_bins=PHRASE_MELS)
    return untrained(AutoModelForCTC, config, Wav2Vec2BertProcessor(extractor, tokenizer))
