"""Small models that listen, without any training: what the recipes for sounds begin with when no model is given."""

import itertools
import json
import string

from common.ctc import character_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperProcessor,
    WhisperTokenizer,
)

from embedded.kept import untrained
from embedded.speech import DIGITS, PHRASE

MELS, FRAMES = 32, 80
"""Of a spectrogram of a digit: no digit lasts 0.8 seconds, and a frame is 0.01."""
PHRASES, PHRASE_MELS = 1500, 40


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


def phrase_writer() -> str:
    """Make a Whisper with tokens of the words of phrases; returns its directory."""
    extractor = WhisperFeatureExtractor(feature_size=PHRASE_MELS, hop_length=320, n_fft=512, chunk_length=3)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    phrases = map(" ".join, itertools.product(*PHRASE))
    trained.train_from_iterator(phrases, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokenizer = WhisperTokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]])
    begin = "<|startoftranscript|>"
    tokenizer.add_special_tokens({"additional_special_tokens": [begin, "<|notimestamps|>"]})
    tokenizer.set_prefix_tokens()
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=PHRASE_MELS,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        max_source_positions=extractor.nb_max_frames // 2,
        max_target_positions=32,
        decoder_start_token_id=tokenizer.get_vocab()[begin],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return untrained(AutoModelForSpeechSeq2Seq, config, WhisperProcessor(extractor, tokenizer))
