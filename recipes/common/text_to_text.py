"""What recipes share that make a text from a text: flags, inputs and labels."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict
from embedded.tiny_t5 import tiny_t5
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import RecipeArguments
from common.files import DataArguments
from common.generation import GenerationTask
from common.languages import set_languages_, token_id
from common.task import Collator, Data, Encoder
from hf_sparse import SparsityError


@dataclass(frozen=True)
class TextToTextArguments(DataArguments):
    """`DataArguments` of texts that are made from texts."""

    source_prefix: str | None = field(default=None, metadata={"help": "What T5 is to do, such as 'summarize: '."})
    max_source_length: int = field(default=1024, metadata={"help": "Longer sources are cut to this number of tokens."})
    max_target_length: int = field(default=128, metadata={"help": "Longer targets are cut to this number of tokens."})
    val_max_target_length: int | None = field(
        default=None, metadata={"help": "Tokens to generate, at most. Default: as --max_target_length."}
    )
    num_beams: int | None = field(default=None, metadata={"help": "Beams to generate with. Default: the model's."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad all texts to those lengths; by default, to the longest of their batch."}
    )
    ignore_pad_token_for_loss: bool = field(default=True, metadata={"help": "Leave padding out of the loss."})

    forced_bos_token: str | None = field(
        default=None,
        metadata={"help": "First token to generate: for mBART-50 and M2M100, the code of the target language."},
    )

    @property
    def languages(self) -> tuple[str | None, str | None]:
        """The languages of sources and targets, by the codes that some tokenizers have for them."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse numbers and combinations that mean nothing.

        Raises:
            SparsityError: there are some.
        """
        super().check()
        for option in ("max_source_length", "max_target_length", "val_max_target_length", "num_beams"):
            if (value := getattr(self, option)) is not None and value < 1:
                raise SparsityError(f"{option} is {value}: give a number above 0")


class TextToText(GenerationTask):
    """A task whose rows are a source and a target.

    Attributes:
        pairs: the rows to train on.
        smoothes_labels: whether a Trainer computes the loss, so that a batch needs what the decoder reads.
    """

    auto_class = AutoModelForSeq2SeqLM
    data_arguments = TextToTextArguments
    rows_in_order = True
    embedded_model_id = None
    pairs: Dataset
    smoothes_labels: bool

    def arrange_(self, arguments: RecipeArguments) -> None:
        """Read from the flags how texts are generated; those of this task come first where there are two for it."""
        flags: Any = arguments
        flags.generation_max_length = (
            flags.generation_max_length or self.arguments.val_max_target_length or self.arguments.max_target_length
        )
        flags.generation_num_beams = self.arguments.num_beams or flags.generation_num_beams
        self.smoothes_labels = flags.label_smoothing_factor > 0
        super().arrange_(arguments)

    def embedded_model(self) -> str:
        """Make a tiny T5 that knows the words, and not yet what they mean."""
        return tiny_t5([*self.pairs["source"], *self.pairs["target"]], vocabulary=400)

    def paired(self, sources: Mapping[str, list[str]], targets: Mapping[str, list[str]], column: str) -> Data:
        """Join sources and targets by split; test data may lack targets, which are called by their column."""
        rows = {
            split: Dataset.from_dict({"source": texts, **({"target": targets[split]} if split in targets else {})})
            for split, texts in sources.items()
        }
        self.pairs = rows["train"]
        return Data(DatasetDict(rows), label_column=column, test_is_labelled="test" in targets)

    def prepare_(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase) -> None:
        """Tell the tokenizer of languages, if it has any, and the model which token it has to begin with."""
        forced = self.arguments.forced_bos_token
        set_languages_(processor, model, self.arguments.languages)
        super().prepare_(model, processor)
        if self.smoothes_labels and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise SparsityError(f"{type(model).__name__} cannot smooth labels: leave --label_smoothing_factor out")
        if forced is not None:
            known = processor.get_vocab()
            model.generation_config.forced_bos_token_id = token_id(processor, forced, known, "token")

    def encoder(self, data: Data, processor: PreTrainedTokenizerBase) -> Encoder:
        """Tokenize sources and targets; these are also kept as they are, to be compared with what is generated."""
        flags, prefix, longest = self.arguments, self.arguments.source_prefix or "", processor.model_max_length
        options = {"truncation": True, "padding": "max_length" if flags.pad_to_max_length else False}

        def encode(rows: dict[str, Any]) -> Mapping[str, Any]:
            sources = [prefix + text for text in rows["source"]]
            encoded = processor(sources, max_length=min(flags.max_source_length, longest), **options)
            if "target" not in rows:
                return encoded
            length = min(flags.max_target_length, longest)
            targets = processor(text_target=rows["target"], max_length=length, return_attention_mask=True, **options)
            labels = [
                [token if seen or not flags.ignore_pad_token_for_loss else -100 for token, seen in zip(*row)]
                for row in zip(targets["input_ids"], targets["attention_mask"])
            ]
            return {**encoded, "labels": labels, "target": rows["target"]}

        return encode

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        """Pad to the longest source and the longest target."""
        padding = -100 if self.arguments.ignore_pad_token_for_loss else processor.pad_token_id
        pad = DataCollatorForSeq2Seq(processor, self.model, label_pad_token_id=padding)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            return {name: value for name, value in pad(rows).items() if value is not None}  # labels, of test data

        return collate
