"""Tokenizers that have a token for each language: which they are, and how they are told of one."""

from collections.abc import Collection
from typing import Any

from transformers import (
    M2M100Tokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PLBartTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_sparse import SparsityError

WITH_LANGUAGES = (M2M100Tokenizer, MBart50Tokenizer, MBartTokenizer, NllbTokenizer, PLBartTokenizer)


def set_languages_(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, languages: tuple[str | None, str | None]
) -> None:
    """Tell a tokenizer, in place, of the languages of sources and targets, if it has any.

    Where nothing says which token the model begins with, it is that of the targets.

    Raises:
        SparsityError: it does not know one.
    """
    if not isinstance(tokenizer, WITH_LANGUAGES):
        return
    known = tokenizer.all_special_tokens
    _, first = (token_id(tokenizer, language, known, "language") for language in languages)
    told: Any = tokenizer  # the attributes are not those of all tokenizers
    told.src_lang, told.tgt_lang = languages
    if model.config.decoder_start_token_id is None:
        model.config.decoder_start_token_id = first


def token_id(tokenizer: PreTrainedTokenizerBase, name: str | None, known: Collection[str], what: str) -> int:
    """Find the number of a token, which M2M100 and PLBart write between underscores where it is of a language.

    Raises:
        SparsityError: it is not known.
    """
    for token in (f"__{name}__", str(name)):
        if token in known:
            return int(tokenizer.get_vocab()[token])
    raise SparsityError(f"{type(tokenizer).__name__} knows no {what} {name!r}: give one that it has")
