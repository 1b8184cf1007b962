"""The code in cards shows something, whatever the model is for."""

import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from pruning import bart, llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)
from transformers.pipelines import audio_classification, automatic_speech_recognition
from zoo import ZOO
from zoo.building import build

from hf_sparse import PruningPlan, compact, discover, save_pruned
from hf_sparse.checkpoint.usage import usage

MAKE: dict[str, Callable[[], PreTrainedModel]] = {
    "text-classification": partial(build, "BertForSequenceClassification"),
    "token-classification": partial(build, "BertForTokenClassification"),
    "fill-mask": partial(build, "BertForMaskedLM"),
    "feature-extraction": partial(build, "BertModel"),
    "question-answering": partial(build, "BertForQuestionAnswering"),
    "multiple-choice": partial(build, "BertForMultipleChoice"),
    "text-generation": llama,
    "text2text-generation": bart,
    "image-classification": ZOO["vit"].make,
    "audio-classification": ZOO["wav2vec2"].make,
    "automatic-speech-recognition": ZOO["wav2vec2 (stable)"].make,
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "<pad>", "</s>", "[MASK]", "[UNK]", "What", "a", "lovely", "day", "it", "was", "Ada", "London", "."]
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special, mask_token="[MASK]")


def listener(directory: Path) -> Wav2Vec2Processor:
    (directory / "vocab.json").write_text(json.dumps({"[PAD]": 0, "[UNK]": 1, "|": 2, "a": 3}))
    words = Wav2Vec2CTCTokenizer(directory / "vocab.json", unk_token="[UNK]", pad_token="[PAD]")
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), words)


@pytest.mark.parametrize("task", MAKE)
def test_the_code_of_every_task_runs(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MAKE[task]()
    if task != "multiple-choice":  # nothing can be made up that it reads
        compact(model, PruningPlan({discover(model).blocks[-2].name: (0,)}))
    if model.can_generate():
        model.generation_config.max_new_tokens = 4
    readers = {
        "image-classification": lambda: ViTImageProcessor(size={"height": 32, "width": 32}),
        "audio-classification": Wav2Vec2FeatureExtractor,
        "automatic-speech-recognition": lambda: listener(tmp_path),
    }
    save_pruned(model, tmp_path / "mine", readers.get(task, tokenizer)())
    for name in ("sound.wav", "speech.wav"):
        soundfile.write(tmp_path / name, np.zeros(4000), 16_000)
    for module in (audio_classification, automatic_speech_recognition):  # they call ffmpeg, which may be missing
        monkeypatch.setattr(module, "ffmpeg_read", lambda content, rate: soundfile.read(io.BytesIO(content))[0])
    Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "mine/README.md").read_text()
    assert f"pipeline_tag: {task}" in card
    snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    capsys.readouterr()
    exec(snippet, {})
    assert capsys.readouterr().out


def test_code_goes_only_as_far_as_there_is_something_to_read_inputs() -> None:
    assert usage("text-classification", []) is None and usage("image-classification", ["tokenizer.json"]) is None
    assert usage("visual-question-answering", ["processor_config.json"]).imports == ["AutoProcessor"]
    assert usage("next-sentence-prediction", ["tokenizer_config.json"]).code == ""


def test_texts_are_compared_by_their_embeddings(capsys: pytest.CaptureFixture[str]) -> None:
    found = usage("sentence-similarity", ["tokenizer_config.json"])
    assert found is not None
    exec(found.code, {"model": build("BertModel").eval(), "tokenizer": tokenizer()})
    assert capsys.readouterr().out.startswith("tensor(")
