"""The recipes for sounds, end to end on tiny models and tones, and what goes wrong in them."""

import csv
import io
import json
from pathlib import Path

import audio_classification
import numpy as np
import pytest
import soundfile
import speech_recognition_ctc
import speech_recognition_seq2seq
import torch
from common.arguments import ModelArguments
from common.ctc import character_tokenizer
from common.sounds import SoundArguments, decoded
from common.task import Data
from datasets import Audio, Dataset, DatasetDict
from embedded.listeners import digit_listener, phrase_listener, phrase_writer
from recipe_runs import SHORT, files, mistake, start
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    EvalPrediction,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    pipeline,
)
from zoo.audio import CONVOLUTIONS
from zoo.building import build

RATE = 4000
TONES = {"low": 200, "middle": 500, "high": 1100}
TEXTS = {"low": "La la!", "middle": "mi", "high": "hi"}


def tone(pitch: float, length: float, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(length * rate)) / rate).astype(np.float32)


def write_rows(path: Path, count: int) -> Path:
    """A csv file of paths, relative to it, of tones, of what they are, and what they say.

    They last from 0.1 to 0.3 seconds, and in the test data 0.2, so that nothing is padded there.
    """
    generator = np.random.default_rng(count)
    folder = path.parent / path.stem
    folder.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["audio", "label", "text"])
        writer.writeheader()
        for number in range(count):
            name = [*TONES][number % len(TONES)]
            sound = tone(TONES[name], 0.2 if path.stem == "test" else generator.uniform(0.1, 0.3))
            soundfile.write(folder / f"{number}.wav", sound, RATE)
            writer.writerow({"audio": f"{path.stem}/{number}.wav", "label": name, "text": TEXTS[name]})
    return path


def tiny_wav2vec2(directory: Path) -> Path:
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[16, 16],
        conv_kernel=[10, 8],
        conv_stride=[5, 8],
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=16,
        mask_time_length=2,
    )
    torch.manual_seed(0)
    Wav2Vec2Model(config).save_pretrained(directory)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE).save_pretrained(directory)
    return directory


def flags_of(directory: Path, counts: tuple[int, int, int] = (48, 12, 6)) -> dict[str, object]:
    return {
        **SHORT,
        **files(write_rows, directory, counts, "csv"),
        "--model_name_or_path": tiny_wav2vec2(directory / "tiny"),
        "--output_dir": directory / "out",
        "--per_device_train_batch_size": 4,
        "--dense_epochs": 1,
        "--num_train_epochs": 4,
        "--do_predict": None,
    }


def test_sounds_are_classified_and_the_small_model_is_one_of_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = flags_of(tmp_path) | {"--max_length_seconds": 0.2, "--attention_mask": True}
    out, task = tmp_path / "out", audio_classification.AudioClassification
    assert start(task, flags, monkeypatch) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["origin"]["task"] == "audio-classification"
    assert abs(report["achieved"] - 0.5) <= 0.06 and report["max_abs_diff"] <= 1e-4
    results = json.loads((out / "all_results.json").read_text())
    assert {"eval_accuracy", "predict_accuracy"} <= set(results) and results["predict_samples"] == 6
    said, weights = (out / "predict_results.txt").read_text(), load_file(out / "model.safetensors")
    before = load_file(tmp_path / "tiny" / "model.safetensors")
    frozen = [name for name in before if name.startswith("feature_extractor")]
    assert frozen and all(torch.equal(before[name], weights[f"wav2vec2.{name}"]) for name in frozen)

    # A finished run has nothing left to resume but its last checkpoint, and says the same.
    assert start(task, {**flags, "--resume_from_checkpoint": "auto"}, monkeypatch) == 0
    assert (out / "predict_results.txt").read_text() == said
    assert all(torch.equal(weights[name], value) for name, value in load_file(out / "model.safetensors").items())

    model, extractor = AutoModelForAudioClassification.from_pretrained(out), AutoFeatureExtractor.from_pretrained(out)
    assert extractor.return_attention_mask
    classify = pipeline("audio-classification", model=model, feature_extractor=extractor)
    sounds = [soundfile.read(tmp_path / "test" / f"{number}.wav", dtype="float32")[0] for number in range(6)]
    assert said.splitlines()[1:] == [f"{row}\t{classify(sound)[0]['label']}" for row, sound in enumerate(sounds)]


def test_speech_is_written_down_in_the_characters_of_the_training_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_of(tmp_path) | {"--chars_to_ignore": "!", "--max_duration_in_seconds": 0.29, "--mask_time_length": 2}
    out, task = tmp_path / "out", speech_recognition_ctc.SpeechRecognition
    assert start(task, flags, monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "rows of the train data are left out: shorter than 0 or longer than 0.29 seconds" in shown
    assert "test character error rate" in shown
    report = json.loads((out / "report.json").read_text())
    assert abs(report["achieved"] - 0.5) <= 0.06 and report["max_abs_diff"] <= 1e-4
    results = json.loads((out / "all_results.json").read_text())
    assert {"eval_wer", "eval_cer", "predict_wer", "predict_cer"} <= set(results) and results["train_samples"] < 48

    processor, model = AutoProcessor.from_pretrained(out), AutoModelForCTC.from_pretrained(out)
    assert {token for token in processor.tokenizer.get_vocab() if len(token) == 1} == {*"|lamih"}
    assert model.config.vocab_size == len(processor.tokenizer) and model.config.layerdrop == 0
    hear = pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    sounds = [soundfile.read(tmp_path / "test" / f"{number}.wav", dtype="float32")[0] for number in range(6)]
    said = (out / "generated_predictions.txt").read_text().split("\n")
    assert said == [*(hear(sound)["text"] for sound in sounds), ""]

    # Its head is known to be trained for these characters, and by its tokenizer alone.
    known = task(speech_recognition_ctc.Arguments())
    known.find_processor(str(out), ModelArguments(), Data(DatasetDict()))
    assert known.configure_(AutoConfig.from_pretrained(out), Data(DatasetDict()))
    assert not known.configure_(AutoConfig.from_pretrained(tmp_path / "tiny"), Data(DatasetDict()))


def tiny_whisper(directory: Path) -> Path:
    """A Whisper of one language for sounds of up to a second."""
    extractor = WhisperFeatureExtractor(8, hop_length=400, chunk_length=1)
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *"Ġlamih!"])}
    tokenizer = WhisperTokenizer(vocabulary, [])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"]})
    tokenizer.set_prefix_tokens()
    config = WhisperConfig(
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=len(tokenizer),
        d_model=32,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        decoder_start_token_id=tokenizer.get_vocab()["<|startoftranscript|>"],
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    WhisperForConditionalGeneration(config).save_pretrained(directory)
    WhisperProcessor(extractor, tokenizer).save_pretrained(directory)
    return directory


def test_a_text_is_generated_for_speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {
        "--model_name_or_path": tiny_whisper(tmp_path / "whisper"),
        "--generation_max_length": 12,
        "--freeze_encoder": None,
        "--learning_rate": 1e-2,
    }
    flags, out, task = flags_of(tmp_path) | own, tmp_path / "out", speech_recognition_seq2seq.SpeechRecognition
    assert start(task, flags, monkeypatch) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["achieved"] > 0.3 and report["max_abs_diff"] <= 1e-4
    results = json.loads((out / "all_results.json").read_text())
    assert {"eval_wer", "eval_cer", "predict_wer", "predict_cer"} <= set(results)
    model, processor = AutoModelForSpeechSeq2Seq.from_pretrained(out), AutoProcessor.from_pretrained(out)
    before = load_file(tmp_path / "whisper" / "model.safetensors")
    assert torch.equal(before["model.encoder.conv1.weight"], model.model.encoder.conv1.weight)
    paths = [tmp_path / "test" / f"{number}.wav" for number in range(6)]
    sounds = [decoded({"bytes": None, "path": path}, "a test", 16_000) for path in paths]
    inputs = processor(audio=sounds, sampling_rate=16_000, return_tensors="pt")
    said = processor.batch_decode(model.generate(inputs["input_features"]), skip_special_tokens=True)
    written = (out / "generated_predictions.txt").read_text().splitlines()
    assert written == [" ".join(text.split()) for text in said] and any(written)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--language": "hindi"}, "the model knows one language only: leave --language out"),
        ({"--language": "dolphin"}, "--language dolphin: Unsupported language: dolphin"),
        ({}, "row 13 of the validation data lasts 2 seconds, and the model reads 1: cut it"),
    ],
)
def test_what_cannot_be_generated_is_one_line(
    flags: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = flags_of(tmp_path, (12, 12, 6)) | {"--model_name_or_path": tiny_whisper(tmp_path / "whisper"), **flags}
    soundfile.write(tmp_path / "long.wav", tone(200, 2), RATE)
    with (tmp_path / "validation.csv").open("a") as file:
        file.write("long.wav,low,la\n")
    assert message in mistake(speech_recognition_seq2seq.SpeechRecognition, given, monkeypatch, capsys)


def test_texts_are_read_from_the_best_tokens_of_frames() -> None:
    task = speech_recognition_ctc.SpeechRecognition(speech_recognition_ctc.Arguments())
    task.tokenizer = character_tokenizer(["hi ya"])  # [PAD] [UNK] | a h i y
    task.model = build("Wav2Vec2ForCTC", **CONVOLUTIONS)
    rows = Dataset.from_dict({"length": [100, 60]})  # samples of 9 and 5 frames
    heard = np.array([[4, 4, 0, 5, 2, 6, 3, 0, 3], [4, 5, 5, 0, 5, 6, 6, -100, -100]])  # [5:] is said of padding
    said = np.array([[4, 5, 2, 6, 3], [4, 5, -100, -100, -100]])
    found = task.compute_metrics(EvalPrediction(heard, said), rows)
    assert task._heard(EvalPrediction(heard, said), rows) == ["hi yaa", "hii"]
    assert found == {"wer": 2 / 3, "cer": 2 / 7}


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("", {}, "column 'text' is empty in row 13 of the validation data"),
        ("!", {}, "row 13 of the validation data has no characters, '!'"),
        ("la 7", {}, "row 13 of the validation data has characters that the tokenizer lacks, 'la 7'"),
        ("la", {"--text_column_name": "said"}, "has no column 'said', only audio, label, text: set"),
        ("la", {"--max_duration_in_seconds": 0.01}, "longer than 0.01 seconds: raise --max_duration_in_seconds"),
        ("la", {"--eval_metrics": "cer"}, "error rates of words and of characters are always computed"),
        ("la", {"--teacher_name_or_path": "tiny"}, "the teacher tiny has no head that was trained"),
    ],
)
def test_what_cannot_be_learnt_to_write_is_one_line(
    text: str,
    flags: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = flags_of(tmp_path, (12, 12, 6)) | {"--chars_to_ignore": "!", **flags}
    with (tmp_path / "validation.csv").open("a") as file:
        file.write(f"train/0.wav,low,{text}\n")
    monkeypatch.chdir(tmp_path)
    assert message in mistake(speech_recognition_ctc.SpeechRecognition, given, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"audio": "no.wav"}, {}, "no.wav, is no file that is there: paths are relative"),
        ({"audio": ""}, {}, "row 13 of the validation data has no sound"),
        ({"audio": "noise.wav"}, {}, "noise.wav, cannot be decoded (Error opening"),
        ({"audio": "silence.wav"}, {}, "silence.wav, lasts no time: drop it"),
        ({"audio": "train/0.wav", "label": "new"}, {}, "labels that the training data lacks: new"),
        (
            {},
            {"--audio_column_name": "sound"},
            "has no column 'sound', only audio, label, text: set --audio_column_name",
        ),
        ({}, {"--label_column_name": "class"}, "has no column 'class'"),
        ({}, {"--max_length_seconds": 0}, "max_length_seconds is 0: give a number above 0"),
        ({}, {"--group_by_length": None}, "batches are padded to their longest row"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    row: dict[str, str],
    flags: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "noise.wav").write_bytes(b"no sound")
    soundfile.write(tmp_path / "silence.wav", np.zeros(0), RATE)
    given = flags_of(tmp_path, (12, 12, 6))
    if row:
        with (tmp_path / "validation.csv").open("a") as file:
            file.write(f"{row['audio']},{row.get('label', 'low')},\n")
    assert message in mistake(audio_classification.AudioClassification, given | flags, monkeypatch, capsys)


def test_the_default_models_know_the_words_of_their_data() -> None:
    phrase = "bring seven white shoes outside"
    letters = AutoProcessor.from_pretrained(phrase_listener()).tokenizer
    assert letters.unk_token_id not in letters(phrase)["input_ids"]
    words = AutoProcessor.from_pretrained(phrase_writer()).tokenizer
    tokens = words(phrase)["input_ids"]
    assert len(tokens) == 2 + 5 + 1 and words.decode(tokens, skip_special_tokens=True) == phrase
    assert AutoConfig.from_pretrained(digit_listener()).num_labels == 10


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_all_kinds_of_files_are_decoded_mixed_to_one_channel_and_resampled(kind: str) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone(440, 1, 16_000), np.zeros(16_000)], 1), 16_000, format=kind)
    sound = decoded({"bytes": file.getvalue(), "path": None}, "row 1", 8000)
    assert sound.dtype == np.float32 and abs(len(sound) - 8000) <= 400  # MP3 and OGG add some at the ends
    spectrum = np.abs(np.fft.rfft(sound[1000:5000]))
    assert spectrum.argmax() == 220 and np.abs(sound).max() == pytest.approx(0.25, abs=0.03)


def test_what_is_too_long_is_cut_somewhere_by_the_generator_of_torch() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.linspace(0, 1, 1000), 100, format="WAV", subtype="FLOAT")
    sound = {"bytes": file.getvalue(), "path": None}
    torch.manual_seed(0)
    cuts = [decoded(sound, "row 1", 100, longest=2) for _ in range(8)]
    torch.manual_seed(0)
    assert np.array_equal(decoded(sound, "row 1", 100, longest=2), cuts[0])
    assert {len(cut) for cut in cuts} == {200} and len({float(cut[0]) for cut in cuts}) > 4
    assert len(decoded(sound, "row 1", 100, longest=20)) == 1000


def test_a_column_of_the_hub_is_read_without_the_decoder_of_datasets() -> None:
    file = io.BytesIO()
    soundfile.write(file, tone(440, 1), RATE, format="FLAC")
    rows = Dataset.from_dict({"sound": [file.getvalue()], "audio": ["another"]}).cast_column("sound", Audio())
    [row] = SoundArguments(audio_column_name="sound").sounds(DatasetDict(train=rows))["train"]
    assert set(row) == {"audio", "place"} and len(decoded(row["audio"], row["place"], RATE)) == RATE
