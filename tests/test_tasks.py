"""What cards name loads the checkpoint with the class that it was saved from, and says what that is for."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import transformers
from transformers import PreTrainedModel
from zoo import ZOO
from zoo.building import build
from zoo.vision import ATTENDING_STAGES

from hf_sparse import PruningPlan, compact, discover, inspect_checkpoint, save_pruned
from hf_sparse.checkpoint.tasks import auto_class, task_of

# By architecture and model type: the auto class and the task.
KNOWN = {
    ("BartForConditionalGeneration", "bart"): ("AutoModelForSeq2SeqLM", "text2text-generation"),
    ("T5ForConditionalGeneration", "t5"): ("AutoModelForSeq2SeqLM", "text2text-generation"),
    ("WhisperForConditionalGeneration", "whisper"): ("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    ("LlavaForConditionalGeneration", "llava"): ("AutoModelForImageTextToText", "image-text-to-text"),
    ("GPT2LMHeadModel", "gpt2"): ("AutoModelForCausalLM", "text-generation"),
    ("BertForMaskedLM", "bert"): ("AutoModelForMaskedLM", "fill-mask"),
    ("BertForMultipleChoice", "bert"): ("AutoModelForMultipleChoice", "multiple-choice"),
    ("BertForQuestionAnswering", "bert"): ("AutoModelForQuestionAnswering", "question-answering"),
    ("BertModel", "bert"): ("AutoModel", "feature-extraction"),
    ("BertForPreTraining", "bert"): ("AutoModelForPreTraining", None),
    ("ViTModel", "vit"): ("AutoModel", "image-feature-extraction"),
    ("CLIPModel", "clip"): ("AutoModelForZeroShotImageClassification", "zero-shot-image-classification"),
    ("DeiTForImageClassification", "deit"): ("AutoModelForImageClassification", "image-classification"),
    ("LevitForImageClassification", "levit"): ("AutoModelForImageClassification", "image-classification"),
    ("SegformerForSemanticSegmentation", "segformer"): ("AutoModelForSemanticSegmentation", "image-segmentation"),
    ("DPTForDepthEstimation", "dpt"): ("AutoModelForDepthEstimation", "depth-estimation"),
    ("Wav2Vec2ForCTC", "wav2vec2"): ("AutoModelForCTC", "automatic-speech-recognition"),
    ("Emu3ForCausalLM", "emu3_text_model"): ("AutoModelForCausalLM", "text-generation"),
    ("CLIPVisionModelWithProjection", "clip_vision_model"): (None, None),
}
MAKE: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: ZOO[name].make for name in ("bart", "t5", "clip", "deit", "clip_vision_model", "emu3_text_model")},
    "BertModel": partial(build, "BertModel"),
    "BertForMultipleChoice": partial(build, "BertForMultipleChoice"),
    "SegformerForSemanticSegmentation": partial(build, "SegformerForSemanticSegmentation", **ATTENDING_STAGES),
}


def test_architectures_are_known_by_the_usual_auto_class_and_task() -> None:
    assert {known: (auto_class(*known), task_of(*known)) for known in KNOWN} == KNOWN


@pytest.mark.parametrize("name", MAKE)
def test_the_class_on_the_card_loads_the_class_that_was_saved(name: str, tmp_path: Path) -> None:
    model = MAKE[name]()
    for pruned in (False, True):
        if pruned:
            first = discover(model).blocks[0]
            compact(model, PruningPlan({first.name: (0,)}))
        save_pruned(model, tmp_path)
        summary = inspect_checkpoint(tmp_path)
        named = summary.auto_class if summary.pruned else summary.architecture
        assert f"model = {named}.from_pretrained" in (tmp_path / "README.md").read_text()
        assert type(getattr(transformers, named).from_pretrained(tmp_path)) is type(model)
