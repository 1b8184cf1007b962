"""What CTC needs: flags for the configs of its models, a vocabulary of characters, and how many frames a sound has."""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Wav2Vec2CTCTokenizer

from common.transcripts import without
from hf_sparse import SparsityError


@dataclass(frozen=True)
class ConfigArguments:
    """What the config of the model is told, where it knows of it."""

    attention_dropout: float = field(default=0.0, metadata={"help": "Share of attention that is dropped."})
    activation_dropout: float = field(default=0.0, metadata={"help": "Share of FFN neurons that is dropped."})
    feat_proj_dropout: float = field(default=0.0, metadata={"help": "Share of features that is dropped."})
    hidden_dropout: float = field(default=0.0, metadata={"help": "Share of the outputs of sublayers that is dropped."})
    final_dropout: float = field(default=0.0, metadata={"help": "Share of what the head reads that is dropped."})
    layerdrop: float = field(default=0.0, metadata={"help": "Share of layers that is left out."})
    mask_time_prob: float = field(default=0.05, metadata={"help": "Share of the time that is hidden in training."})
    mask_time_length: int = field(default=10, metadata={"help": "Frames that are hidden at once."})
    mask_feature_prob: float = field(default=0.0, metadata={"help": "Share of the features that is hidden."})
    mask_feature_length: int = field(default=10, metadata={"help": "Features that are hidden at once."})
    ctc_loss_reduction: str = field(
        default="mean", metadata={"help": "How the losses of a batch become one.", "choices": ["mean", "sum"]}
    )
    ctc_zero_infinity: bool = field(
        default=True, metadata={"help": "Leave sounds out of the loss that are too short for what is said."}
    )


def character_tokenizer(texts: Iterable[str]) -> Wav2Vec2CTCTokenizer:
    """Make a tokenizer whose tokens are the characters of texts."""
    characters = sorted(set("".join(texts)) - {" "})
    tokens = ["[PAD]", "[UNK]", "|", *characters]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "vocab.json")
        path.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        return Wav2Vec2CTCTokenizer(str(path), pad_token="[PAD]", unk_token="[UNK]", word_delimiter_token="|")


def characters_labeller(tokenizer: PreTrainedTokenizerBase, ignored: Sequence[str]) -> Callable[[str, str], list[int]]:
    """Make the function that turns a text, in the case of the tokenizer, into labels; it is told which row that is of.

    The function raises SparsityError where a text has no characters, or others than the tokenizer knows.
    """
    letters = "".join(token for token in tokenizer.get_vocab() if len(token) == 1)
    cased = {letters.lower(): str.lower, letters.upper(): str.upper}.get(letters, str)

    def labels(text: str, place: str) -> list[int]:
        found: list[int] = tokenizer(cased(without(text, ignored)))["input_ids"]
        if not found or tokenizer.unk_token_id in found:
            what = "characters that the tokenizer lacks" if found else "no characters"
            raise SparsityError(f"{place} has {what}, {text!r}: give --chars_to_ignore, mend or drop it")
        return found

    return labels


def frames_of(model: PreTrainedModel, lengths: list[int]) -> list[int]:
    """Count the frames for which a CTC model says something, of inputs of these lengths, without any padding."""
    # Few have no such function; of them, what is said of padding remains.
    count = getattr(model, "_get_feat_extract_output_lengths", lambda lengths: lengths)
    found: list[int] = count(torch.tensor(lengths)).tolist()
    return found
