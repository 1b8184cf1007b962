"""Code for model cards that uses a loaded model for its task and prints a result."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Code that uses a loaded model.

    Attributes:
        reader: the name of the variable for the tokenizer, processor or the like, as `pipeline` calls it.
        loader: the auto class that loads the reader.
        code: lines that use model and reader; empty if the task is not known.
    """

    reader: str
    loader: str
    code: str = ""

    @property
    def imports(self) -> list[str]:
        """The names that the code imports from transformers."""
        return [self.loader, *(["pipeline"] if "pipeline(" in self.code else [])]


_READERS = {
    "tokenizer": ("AutoTokenizer", "tokenizer_config.json"),
    "processor": ("AutoProcessor", "processor_config.json"),
    "image_processor": ("AutoImageProcessor", "preprocessor_config.json"),
    "feature_extractor": ("AutoFeatureExtractor", "preprocessor_config.json"),
}
"""By variable: the auto class, and the file that lies beside the model."""

_TEXT, _PICTURE = '"What a lovely day it was!"', '"picture.png"'
_PIPELINES = {
    "text-classification": ("tokenizer", _TEXT),
    "token-classification": ("tokenizer", '"Ada was born in London."'),
    "feature-extraction": ("tokenizer", _TEXT),
    "fill-mask": ("tokenizer", 'f"London is the {tokenizer.mask_token} of England."'),
    "text-generation": ("tokenizer", '"Once upon a time"'),
    "image-classification": ("image_processor", _PICTURE),
    "image-feature-extraction": ("image_processor", _PICTURE),
    "image-segmentation": ("image_processor", _PICTURE),
    "object-detection": ("image_processor", _PICTURE),
    "depth-estimation": ("image_processor", _PICTURE),
    "audio-classification": ("feature_extractor", '"sound.wav"'),
    "automatic-speech-recognition": ("processor", ""),
}
"""By task: the variable, and what its pipeline is given; nothing where it has code of its own."""

_GENERATE = """\
inputs = tokenizer("What a lovely day it was!", return_tensors="pt")
print(tokenizer.decode(model.generate(inputs["input_ids"])[0], skip_special_tokens=True))"""
_CODE = {
    **dict.fromkeys(("text2text-generation", "summarization", "translation"), _GENERATE),
    "question-answering": """\
inputs = tokenizer("Where was Ada born?", "Ada was born in London.", return_tensors="pt")
outputs = model(**inputs)
start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))""",
    "sentence-similarity": """\
inputs = tokenizer(["What a lovely day it was!", "The sun shone."], padding=True, return_tensors="pt")
kept = inputs["attention_mask"][..., None]
one, other = (model(**inputs).last_hidden_state * kept).sum(1) / kept.sum(1)
print(one @ other / (one.norm() * other.norm()))""",
    "multiple-choice": """\
choices = ["It rained.", "The sun shone."]
inputs = tokenizer(["Ada opened her umbrella."] * 2, choices, padding=True, return_tensors="pt")
print(model(**{name: value[None] for name, value in inputs.items()}).logits.softmax(-1))""",
    "automatic-speech-recognition": """\
hear = pipeline(
    "automatic-speech-recognition",
    model=model,
    tokenizer=processor.tokenizer,
    feature_extractor=processor.feature_extractor,
)
print(hear("speech.wav"))""",
}
"""By task with code of its own; most have a tokenizer and no pipeline."""


def usage(task: str | None, files: Collection[str]) -> Usage | None:
    """Choose the code for a task; None if nothing that reads inputs lies beside the model.

    Args:
        task: as pipelines call it; None if unknown.
        files: names in the directory of the model.
    """
    there = {reader: loader for reader, (loader, file) in _READERS.items() if file in files}
    reader, example = _PIPELINES.get(task or "", ("tokenizer", ""))
    if reader not in there:
        of_texts = (name for name in ("tokenizer", "processor") if name in there)
        return next((Usage(name, there[name]) for name in of_texts), None)
    if example:
        code = f'print(pipeline("{task}", model=model, {reader}={reader})({example}))'
    else:
        code = _CODE.get(task or "", "")
    return Usage(reader, there[reader], code)
