"""The code in cards shows something, whatever the model is for."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pruning import bart, llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ViTImageProcessor
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
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "<pad>", "</s>", "[MASK]", "[UNK]", "What", "a", "lovely", "day", "it", "was", "Ada", "London", "."]
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special, mask_token="[MASK]")


@pytest.mark.parametrize("task", MAKE)
def test_the_code_of_every_task_runs(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MAKE[task]()
    if task != "multiple-choice":  # nothing can be made up that it reads
        compact(model, PruningPlan({discover(model).blocks[-2].name: (0,)}))
    if model.can_generate():
        model.generation_config.max_new_tokens = 4
    sees = task.startswith("image")
    save_pruned(model, tmp_path / "mine", ViTImageProcessor(size={"height": 32, "width": 32}) if sees else tokenizer())
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
