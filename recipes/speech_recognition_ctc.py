"""Fine-tune and prune a CTC model, which writes down speech; with no flags, a small Wav2Vec2-BERT on spoken phrases.

    python recipes/speech_recognition_ctc.py
    accelerate launch recipes/speech_recognition_ctc.py --model_name_or_path facebook/wav2vec2-large-xlsr-53 \\
        --dataset_name mozilla-foundation/common_voice_17_0 --dataset_config_name tr --text_column_name sentence \\
        --chars_to_ignore , ? . ! - --target 0.5 --output_dir runs/turkish

Rows have a sound and what is said. In files (.csv, .json) the sound is the path of a wav, flac, ogg or mp3 file. A
model that has no tokenizer gets one, of the characters of the training texts. --do_predict also writes
generated_predictions.txt: a line for every sound of the test data.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common.arguments import ModelArguments
from common.ctc import ConfigArguments, character_tokenizer, characters_labeller, frames_of
from common.loading import load_processor
from common.metrics import first, local_metric
from common.output import write_texts
from common.running import run
from common.sounds import decoded, freeze_
from common.task import Collator, Data, Encoder, Task
from common.transcripts import ERROR_RATES, SpeechArguments, pads_sounds_and_labels, without
from datasets import Dataset, DatasetDict
from embedded.listeners import PHRASES, phrase_listener
from embedded.speech import spoken_phrases
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoProcessor,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Wav2Vec2Processor,
)
from transformers.trainer_utils import PredictionOutput

from hf_sparse import SparsityError


@dataclass(frozen=True)
class Arguments(SpeechArguments, ConfigArguments):
    """Which sounds and texts, and how the model is trained."""

    chars_to_ignore: list[str] | None = field(
        default=None, metadata={"help": "Characters to take out of the texts, with spaces between them."}
    )

    @property
    def ignored(self) -> Sequence[str]:
        """What is taken out of the texts."""
        return self.chars_to_ignore or ()


class SpeechRecognition(Task):
    """The characters that are said in a sound.

    Attributes:
        tokenizer: of characters.
        access: how models are loaded.
        model: the one that was loaded last.
    """

    pipeline_tag = "automatic-speech-recognition"
    auto_class = AutoModelForCTC
    processor_class = AutoProcessor
    data_arguments = Arguments
    metrics = ERROR_RATES
    rows_in_order = True
    embedded_name = "spoken phrases"
    embedded_model_id = None
    embedded_defaults = {
        "output_dir": "runs/speech_recognition_ctc",
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 16,
        "dense_epochs": 4.0,
        "num_train_epochs": 3.0,
        "mask_time_prob": 0.0,
    }
    tokenizer: PreTrainedTokenizerBase
    access: ModelArguments
    model: PreTrainedModel

    def embedded_data(self, seed: int) -> DatasetDict:
        """What is said?"""
        return spoken_phrases(seed, PHRASES)

    def embedded_model(self) -> str:
        """A Wav2Vec2-BERT that knows the letters."""
        return phrase_listener()

    def load(self, splits: DatasetDict) -> Data:
        """Find sounds and texts."""
        return self.arguments.spoken(splits)

    def find_processor(self, source: str, access: ModelArguments, data: Data) -> Any:
        """Load the processor; where there is no tokenizer, make one of the characters of the training texts."""
        self.access = access
        try:
            processor = super().find_processor(source, access, data)
        except SparsityError:
            if access.tokenizer_name is not None:
                raise
            extractor = load_processor(source, access, AutoFeatureExtractor)
            texts = (without(text, self.arguments.ignored).lower() for text in data.splits["train"]["text"])
            processor = Wav2Vec2Processor(extractor, character_tokenizer(texts))
        self.tokenizer = processor.tokenizer
        return processor

    def configure_(self, config: Any, data: Data) -> bool:
        """Fit the config to the tokenizer and the flags; a head is trained if it is of the same characters."""
        for one in dataclasses.fields(ConfigArguments):
            if hasattr(config, one.name):
                setattr(config, one.name, getattr(self.arguments, one.name))
        config.vocab_size, config.pad_token_id = len(self.tokenizer), self.tokenizer.pad_token_id
        try:
            beside = dataclasses.replace(self.access, tokenizer_name=None)
            known = load_processor(config.name_or_path, beside, AutoTokenizer).get_vocab()
        except SparsityError:
            return False
        return bool(known == self.tokenizer.get_vocab())

    def prepare_(self, model: PreTrainedModel, processor: Any) -> None:
        """Freeze what reads samples."""
        self.model = model
        if self.arguments.freeze_feature_encoder:
            freeze_(model)

    def encoder(self, data: Data, processor: Any) -> Encoder:
        """Decode sounds, compute what the model reads of them, and tokenize texts in the case of the tokenizer.

        `length` is that of a sound as the model reads it, without padding.
        """
        extractor = processor.feature_extractor
        labels = characters_labeller(processor.tokenizer, self.arguments.ignored)

        def encode(rows: dict[str, Any]) -> Mapping[str, Any]:
            rate, places = extractor.sampling_rate, rows["place"]
            # One by one, since some extractors would pad all to the longest.
            heard = [extractor(decoded(*row, rate), sampling_rate=rate) for row in zip(rows["audio"], places)]
            encoded = {name: [one[name][0] for one in heard] for name in heard[0]}
            encoded["length"] = [len(one) for one in encoded[extractor.model_input_names[0]]]
            if "text" in rows:
                encoded["labels"] = [labels(*row) for row in zip(rows["text"], places)]
            return encoded

        return encode

    def collator(self, processor: Any) -> Collator:
        """Pad to the longest sound and the longest text."""
        return pads_sounds_and_labels(processor.feature_extractor)

    def trainer_options(self, processor: Any) -> dict[str, Any]:
        """Keep the best token of every frame, and not the logits of all."""

        def best(logits: Any, labels: Tensor) -> Tensor:
            found: Tensor = first(logits).argmax(-1)
            return found

        return {"preprocess_logits_for_metrics": best}

    def _heard(self, found: EvalPrediction | PredictionOutput, rows: Dataset) -> list[str]:
        tokens: Any = found.predictions
        frames = frames_of(self.model, rows["length"][:])
        return self.tokenizer.batch_decode([best[:count] for best, count in zip(tokens, frames)])

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compare what is heard with what is said, as the tokenizer writes both."""
        labels = [row[row != -100] for row in np.asarray(prediction.label_ids)]
        said = self.tokenizer.batch_decode(labels, group_tokens=False)
        return local_metric("error_rates")(predictions=self._heard(prediction, rows), references=said)

    def write_predictions(self, found: PredictionOutput, rows: Dataset, data: Data, directory: Path) -> Path:
        """Write a line for every sound."""
        return write_texts(self._heard(found, rows), directory)


if __name__ == "__main__":
    run(SpeechRecognition, __doc__)
