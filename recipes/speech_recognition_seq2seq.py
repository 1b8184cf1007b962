"""Fine-tune and prune a model that hears speech and generates a text; with no flags, a tiny Whisper on spoken phrases.

    python recipes/speech_recognition_seq2seq.py
    accelerate launch recipes/speech_recognition_seq2seq.py --model_name_or_path openai/whisper-small \\
        --dataset_name mozilla-foundation/common_voice_17_0 --dataset_config_name hi --text_column_name sentence \\
        --language hindi --do_lower_case False --generation_max_length 225 --target 0.5 --output_dir runs/hindi

Rows have a sound and what is said. In files (.csv, .json) the sound is the path of a wav, flac, ogg or mp3 file.
--do_predict also writes generated_predictions.txt: a line for every sound of the test data.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from common.arguments import ModelArguments
from common.generation import GenerationTask
from common.metrics import local_metric
from common.running import run
from common.sounds import decoded, freeze_
from common.task import Collator, Data, Encoder
from common.transcripts import ERROR_RATES, SpeechArguments, pads_sounds_and_labels
from datasets import Dataset, DatasetDict
from embedded.listeners import PHRASES, phrase_writer
from embedded.speech import spoken_phrases
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, EvalPrediction, PreTrainedModel

from hf_sparse import SparsityError

ONE_LANGUAGE = "the model knows one language only: leave --language out, or give another model"


@dataclass(frozen=True)
class Arguments(SpeechArguments):
    """Which sounds and texts, in which language, and what is trained."""

    language: str | None = field(
        default=None, metadata={"help": "What is spoken, such as hindi, for models of many languages."}
    )
    task: str = field(
        default="transcribe",
        metadata={
            "help": "Write what is said, or its translation into English.",
            "choices": ["transcribe", "translate"],
        },
    )
    do_lower_case: bool = field(default=True, metadata={"help": "Write texts in lower case."})
    freeze_encoder: bool = field(default=False, metadata={"help": "Train the decoder alone."})
    apply_spec_augment: bool = field(
        default=False, metadata={"help": "Hide parts of the sounds in training, as the model's config says."}
    )


class SpeechRecognition(GenerationTask):
    """A text that is generated from a sound."""

    pipeline_tag = "automatic-speech-recognition"
    auto_class = AutoModelForSpeechSeq2Seq
    processor_class = AutoProcessor
    data_arguments = Arguments
    metrics = ERROR_RATES
    encoded_when_read = True
    embedded_name = "spoken phrases"
    embedded_model_id = None
    embedded_defaults = {
        "output_dir": "runs/speech_recognition_seq2seq",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
        "dense_epochs": 8.0,
        "num_train_epochs": 6.0,
        "generation_max_length": 16,
    }

    def embedded_data(self, seed: int) -> DatasetDict:
        """What is said?"""
        return spoken_phrases(seed, PHRASES)

    def embedded_model(self) -> str:
        """A Whisper."""
        return phrase_writer()

    def load(self, splits: DatasetDict) -> Data:
        """Find sounds and texts."""
        return self.arguments.spoken(splits)

    def find_processor(self, source: str, access: ModelArguments, data: Data) -> Any:
        """Load the processor, and let texts begin with the language and the task."""
        found = super().find_processor(source, access, data)
        if self.arguments.language is not None:
            try:
                found.tokenizer.set_prefix_tokens(language=self.arguments.language, task=self.arguments.task)
            except ValueError as error:
                raise SparsityError(f"--language {self.arguments.language}: {error}") from None
            except TypeError:  # there is no token of the language
                raise SparsityError(ONE_LANGUAGE) from None
        return found

    def configure_(self, config: Any, data: Data) -> bool:
        """Say whether parts of sounds are hidden."""
        config.apply_spec_augment = self.arguments.apply_spec_augment
        return super().configure_(config, data)

    def prepare_(self, model: PreTrainedModel, processor: Any) -> None:
        """Freeze what the flags say, and let the model generate in the language that is spoken."""
        super().prepare_(model, processor)
        if self.arguments.freeze_feature_encoder:
            freeze_(model)
        if self.arguments.freeze_encoder:
            model.get_encoder().requires_grad_(False)
        if self.arguments.language is not None:
            if not getattr(model.generation_config, "is_multilingual", False):
                raise SparsityError(ONE_LANGUAGE)
            model.generation_config.update(language=self.arguments.language, task=self.arguments.task)

    def encoder(self, data: Data, processor: Any) -> Encoder:
        """Decode sounds, compute what the model reads of them, and tokenize texts."""
        extractor, tokenizer, cased = processor.feature_extractor, processor.tokenizer, self.arguments.do_lower_case
        rate, longest = extractor.sampling_rate, getattr(extractor, "chunk_length", float("inf"))
        begin = self.model.config.decoder_start_token_id

        def heard(sound: Any, place: str) -> np.ndarray:
            samples = decoded(sound, place, rate)
            if len(samples) > longest * rate:
                raise SparsityError(
                    f"{place} lasts {len(samples) / rate:.0f} seconds, and the model reads {longest}: cut it, or lower "
                    "--max_duration_in_seconds"
                )
            return samples

        def labels(text: str) -> list[int]:
            found = tokenizer(text.lower() if cased else text)["input_ids"]
            return found[1:] if found[0] == begin else found  # the model puts it there, too

        def encode(rows: dict[str, Any]) -> Mapping[str, Any]:
            sounds = [heard(*row) for row in zip(rows["audio"], rows["place"])]
            encoded = extractor(sounds, sampling_rate=rate)
            return {**encoded, "labels": [labels(text) for text in rows["text"]]} if "text" in rows else {**encoded}

        return encode

    def collator(self, processor: Any) -> Collator:
        """Pad to the longest sound and the longest text."""
        return pads_sounds_and_labels(processor.feature_extractor)

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compare what is generated with what is said."""
        said = self.texts(prediction.label_ids)
        return local_metric("error_rates")(predictions=self.generated(prediction), references=said)


if __name__ == "__main__":
    run(SpeechRecognition, __doc__)
