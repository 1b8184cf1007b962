"""Read a tokenizer as llama.cpp sees one: a table of the ways to split texts, and the tokens with their kinds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_sparse.errors import SparsityError, first_line

_WORDS = ("ByteLevel", False, True)  # GPT-2's regular expression
_BYTES = ("ByteLevel", False, False)
_DIGITS = ("Digits", True)
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS: dict[tuple[Any, ...], tuple[str, bool]] = {
    (_WORDS,): ("gpt-2", False),
    (_DIGITS, _WORDS): ("smollm", False),
    (("Split", rf"{_ENDINGS}|\p{{N}}{{1,3}}|{_REST}", "Isolated", False), _BYTES): ("llama-bpe", True),
    (("Split", rf"{_ENDINGS}|\p{{N}}|{_REST}", "Isolated", False), _BYTES): ("qwen2", False),
}
"""The name in llama.cpp of each way to split texts, and whether words that are tokens are not split further."""

_ENTRIES = {
    "ByteLevel": ("add_prefix_space", "use_regex"),
    "Digits": ("individual_digits",),
    "Split": ("pattern", "behavior", "invert"),
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp sees one.

    Attributes:
        splits: llama.cpp's name of the way texts are split.
        tokens: by id.
        kinds: of the tokens.
        merges: pairs of tokens, with a space between them, the first one first.
        special: ids of special tokens, by llama.cpp's names.
        adds: whether "bos" and "eos" are added to texts.
        template: of chats, if there is one; or several by name.
    """

    splits: str
    tokens: list[str]
    kinds: list[TokenType]
    merges: list[str]
    special: dict[str, int]
    adds: dict[str, bool]
    template: str | dict[str, str] | None

    def write(self, writer: GGUFWriter) -> None:
        """Add the vocabulary to the keys of a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.splits)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for name, index in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
        for name, added in self.adds.items():
            writer.add_bool(f"tokenizer.ggml.add_{name}_token", added)
        if isinstance(self.template, dict):
            writer.add_chat_template([{"name": name, "template": one} for name, one in self.template.items()])
        elif self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(directory: Path, count: int, stops: int | list[int] | None) -> Vocabulary:
    """Read the tokenizer of a checkpoint.

    Args:
        directory: of the checkpoint.
        count: rows of the embeddings; tokens that the tokenizer does not have are written as unused.
        stops: tokens that end a generation, beside the tokenizer's own.

    Raises:
        SparsityError: there is none, or llama.cpp would read texts otherwise.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        said = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # a file that came from anywhere can be wrong in any way
        reason = first_line(error)
        raise SparsityError(f"it has no tokenizer that can be read ({reason}): save one beside the weights") from None
    model = said["model"]
    name, whole_words = splits(said)
    _require(model["type"] == "BPE" and not model.get("byte_fallback"), "its tokens are not merges of bytes")
    _require((said["normalizer"] or {"type": "NFC"}) == {"type": "NFC"}, "it changes texts before it splits them")
    for entry in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        _require(not model.get(entry), f"it has {entry}")
    _require(bool(model.get("ignore_merges")) == whole_words, f"ignore_merges is {not whole_words}")
    tokens, kinds = _tokens(said, count)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = _special(tokenizer, stops, count)
    return Vocabulary(name, tokens, kinds, merges, special, _adds(tokenizer), tokenizer.chat_template)


def _require(holds: bool, reason: str) -> None:
    """Refuse a tokenizer."""
    if not holds:
        raise SparsityError(f"llama.cpp would not read texts as this tokenizer does: {reason}")


def splits(said: dict[str, Any]) -> tuple[str, bool]:
    """Find in the table how a tokenizer, given as its file says it, splits texts.

    Raises:
        SparsityError: it is not in the table.
    """
    step = said["pre_tokenizer"] or {"type": "none"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    key = tuple((one["type"], *(_value(one.get(name)) for name in _ENTRIES.get(one["type"], ()))) for one in steps)
    known = ", ".join(name for name, _ in PRE_TOKENIZERS.values())
    _require(key in PRE_TOKENIZERS, f"it splits them by {key}, and what is known here is {known}")
    return PRE_TOKENIZERS[key]


def _value(entry: Any) -> Any:
    return entry.get("Regex") if isinstance(entry, dict) else entry


def _tokens(said: dict[str, Any], count: int) -> tuple[list[str], list[TokenType]]:
    """List the tokens with their kinds by id; ids without token are unused."""
    tokens = [f"[PAD{index}]" for index in range(count)]
    kinds = [TokenType.UNUSED] * count
    added = {one["id"]: one for one in said["added_tokens"]}
    texts = {index: token for token, index in said["model"]["vocab"].items()}
    texts |= {index: one["content"] for index, one in added.items()}
    _require(
        max(texts, default=count) < count,
        f"it has tokens up to {max(texts, default=None)}, and the model embeddings of {count}",
    )
    for index, text in texts.items():
        tokens[index], kinds[index] = text, TokenType.NORMAL
    for index, one in added.items():
        for flag in ("single_word", "lstrip", "rstrip"):
            _require(not one[flag], f"its token {one['content']} has {flag}")
        kinds[index] = TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED
    return tokens, kinds


def _special(tokenizer: PreTrainedTokenizerBase, stops: int | list[int] | None, count: int) -> dict[str, int]:
    """Find the ids of special tokens, and of all those that end a generation."""
    found = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    more = [stop for stop in (stops if isinstance(stops, list) else [stops]) if stop not in (None, found["eos"])]
    known = all(type(stop) is int and 0 <= stop < count for stop in more)
    _require(known and len(more) <= 2, f"generation ends at {stops}, which are no tokens, or more than three")
    return {name: index for name, index in {**found, **dict(zip(("eot", "eom"), more))}.items() if index is not None}


def _adds(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Find what is added to a text."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
    adds = {
        "bos": whole[:1] == [tokenizer.bos_token_id] != plain[:1],
        "eos": whole[-1:] == [tokenizer.eos_token_id] != plain[-1:],
    }
    made = [tokenizer.bos_token_id] * adds["bos"] + plain + [tokenizer.eos_token_id] * adds["eos"]
    _require(whole == made, "it adds more to them than their begin and end")
    return adds
