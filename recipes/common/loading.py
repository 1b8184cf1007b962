"""Models and their tokenizers or processors, from the Hub or a directory; what does not fit is one line."""

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import ModelArguments
from hf_sparse import SparsityError


def _access(arguments: ModelArguments) -> dict[str, Any]:
    return {
        "revision": arguments.model_revision,
        "cache_dir": arguments.cache_dir,
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }


def load_processor(source: str, arguments: ModelArguments, processor_class: type[Any]) -> Any:
    """Load the tokenizer, image processor, feature extractor or processor of a model.

    Raises:
        SparsityError: it cannot be loaded, or is a tokenizer without words.
    """
    source = arguments.tokenizer_name or source
    try:
        processor = processor_class.from_pretrained(source, **_access(arguments))
    except (OSError, ValueError, TypeError) as error:  # the last where a tokenizer has no file
        raise SparsityError(
            f"cannot load the tokenizer or processor of {source}: {str(error).splitlines()[0]}"
        ) from None
    if isinstance(processor, PreTrainedTokenizerBase):
        if len(processor) <= len(processor.all_special_tokens):  # what transformers makes up where there is none
            raise SparsityError(
                f"{source} has no tokenizer, so all words would look the same: save one beside the model"
            )
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
    return processor


def require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot tell which words or characters a token stands for.

    Raises:
        SparsityError: it cannot.
    """
    if not tokenizer.is_fast:
        raise SparsityError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not know where in the text a token stands: "
            "take a model that has a fast one (tokenizer.json), or give --tokenizer_name"
        )


def load_model(
    source: str,
    arguments: ModelArguments,
    auto_class: type[Any],
    configure_: Callable[[PretrainedConfig], bool],
    processor: Any,
) -> tuple[PreTrainedModel, bool]:
    """Load a model.

    Args:
        source: where from.
        arguments: how.
        auto_class: of the task.
        configure_: fits a config to the data, in place; returns whether it did before.
        processor: of the model.

    Returns:
        The model, and whether its head is trained for these data.

    Raises:
        SparsityError: it cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(arguments.config_name or source, **_access(arguments))
        fitted = configure_(config)
        if isinstance(processor, PreTrainedTokenizerBase) and config.pad_token_id is None:
            config.pad_token_id = processor.pad_token_id
        model, loading = auto_class.from_pretrained(
            source,
            config=config,
            ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
            output_loading_info=True,
            dtype=arguments.dtype or ("auto" if arguments.use_peft else "float32"),
            **_access(arguments),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SparsityError(f"cannot load the model {source}: {str(error).splitlines()[0]}") from None
    return model, fitted and not loading["missing_keys"] and not loading["mismatched_keys"]
