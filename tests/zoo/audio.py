"""Models of sound, and of time series, of the zoo; their inputs are made up from their configurations."""

from functools import partial

from zoo.building import species
from zoo.seq2seq import HALVES
from zoo.species import Species

audio = partial(species, "audio")


CONVOLUTIONS = {
    "conv_dim": [8, 8],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,  # training hides parts of long sounds only
}
MELS = {**HALVES, "max_source_positions": 20, "max_target_positions": 64}

SPECIES: dict[str, Species] = {
    "audio-spectrogram-transformer": audio("ASTForAudioClassification", max_length=32, patch_size=8),
    "data2vec-audio": audio("Data2VecAudioForSequenceClassification", **CONVOLUTIONS),
    "hubert": audio("HubertForSequenceClassification", **CONVOLUTIONS),
    "moonshine": audio(
        "MoonshineForConditionalGeneration",
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        encoder_num_key_value_heads=4,
        decoder_num_key_value_heads=4,
    ),
    "parakeet_ctc": audio("ParakeetForCTC", encoder_config={"subsampling_conv_channels": 8}),
    "patchtst": audio("PatchTSTForPrediction", prediction_length=4),
    "sew": audio("SEWForSequenceClassification", **CONVOLUTIONS),
    "sew-d": audio("SEWDForSequenceClassification", **CONVOLUTIONS),
    "speech_to_text": audio("Speech2TextForConditionalGeneration", **MELS, input_feat_per_channel=16, conv_channels=8),
    "speecht5": audio("SpeechT5ForSpeechToText", **HALVES, **CONVOLUTIONS, max_text_positions=64),
    "time_series_transformer": audio(
        "TimeSeriesTransformerForPrediction", **HALVES, prediction_length=4, context_length=8, lags_sequence=[1, 2]
    ),
    "unispeech": audio("UniSpeechForSequenceClassification", **CONVOLUTIONS),
    "unispeech-sat": audio("UniSpeechSatForSequenceClassification", **CONVOLUTIONS),
    "voxtral_encoder": audio("VoxtralEncoder", **MELS),
    "wav2vec2": audio("Wav2Vec2ForSequenceClassification", **CONVOLUTIONS),
    "wav2vec2 (stable)": audio("Wav2Vec2ForCTC", **CONVOLUTIONS, do_stable_layer_norm=True),
    "wav2vec2-bert": audio("Wav2Vec2BertForSequenceClassification", feature_projection_input_dim=16),
    "wav2vec2-conformer": audio("Wav2Vec2ConformerForSequenceClassification", **CONVOLUTIONS),
    "wavlm": audio("WavLMForSequenceClassification", **CONVOLUTIONS),
    "whisper": audio("WhisperForConditionalGeneration", **MELS),
}
