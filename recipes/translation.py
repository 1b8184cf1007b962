"""Fine-tune and prune a translator; with no flags, a tiny T5 from English into German, from scratch on a small grammar.

    python recipes/translation.py
    accelerate launch recipes/translation.py --model_name_or_path Helsinki-NLP/opus-mt-en-ro --source_lang en \\
        --target_lang ro --dataset_name wmt/wmt16 --dataset_config_name ro-en --target 0.5 --output_dir runs/en-ro

Rows have a column `translation` of texts by language, {"en": ..., "ro": ...}, so files are .json. mBART and M2M100 have
codes for languages, such as en_XX; the part before _ is then what the data call them. --do_predict also writes
generated_predictions.txt: a line for every row of the test data.
"""

from dataclasses import dataclass, field
from typing import Any

from common.files import KINDS, Kinds, require_columns
from common.metrics import Metric, local_metric
from common.running import run
from common.task import Data
from common.text_to_text import TextToText, TextToTextArguments
from datasets import Dataset, DatasetDict
from embedded.phrases import phrases
from transformers import EvalPrediction

from hf_sparse import SparsityError

COLUMN = "translation"
WORDS = {"ja": "char", "ko": "char", "th": "char", "zh": "zh"}
"""What BLEU counts, by language, where spaces do not tell words."""


@dataclass(frozen=True)
class Arguments(TextToTextArguments):
    """From which language into which."""

    source_lang: str | None = field(default=None, metadata={"help": "Language of the sources, such as en or en_XX."})
    target_lang: str | None = field(default=None, metadata={"help": "Language of the targets, such as ro or ro_RO."})

    @property
    def kinds(self) -> Kinds:
        """Files whose columns can hold texts by language."""
        return {name: kind for name, kind in KINDS.items() if name.startswith(".json")}

    @property
    def languages(self) -> tuple[str | None, str | None]:
        """Those of sources and of targets."""
        return self.source_lang, self.target_lang

    def check(self) -> None:
        """Refuse numbers and combinations that mean nothing.

        Raises:
            SparsityError: there are some, or a language is missing.
        """
        super().check()
        for option in ("source_lang", "target_lang"):
            if getattr(self, option) is None:
                raise SparsityError(f"--{option} is missing: say which language, such as en")


class Translation(TextToText):
    """A text in another language for every text."""

    pipeline_tag = "translation"
    data_arguments = Arguments
    metrics = (Metric("bleu", "BLEU", percent=False), Metric("chrf", "chrF", percent=False))
    embedded_name = "phrases"
    embedded_defaults = {
        "output_dir": "runs/translation",
        "source_lang": "en",
        "target_lang": "de",
        "learning_rate": 3e-3,
        "dense_epochs": 8,
        "num_train_epochs": 6,
        "max_target_length": 24,
    }

    def embedded_data(self, seed: int) -> DatasetDict:
        """What is an English sentence in German?"""
        return phrases(seed)

    def load(self, splits: DatasetDict) -> Data:
        """Find the texts of both languages."""
        source, target = (code.split("_")[0] for code in (self.arguments.source_lang, self.arguments.target_lang))
        require_columns(splits, [COLUMN], "name the column of texts by language so")
        texts = {split: rows[COLUMN][:] for split, rows in splits.items()}
        bare = all((row or {}).get(target) is None for row in texts.get("test", ()))
        return self.paired(
            {split: _texts(rows, source, split) for split, rows in texts.items()},
            {split: _texts(rows, target, split) for split, rows in texts.items() if split != "test" or not bare},
            target,
        )

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compare what was generated with the right translations."""
        words = WORDS.get(self.arguments.target_lang[:2], "13a")
        return local_metric("bleu")(
            predictions=self.generated(prediction), references=rows["target"][:], tokenize=words
        )


def _texts(rows: list[Any], language: str, split: str) -> list[str]:
    """The texts of one language."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get(language), str):
            raise SparsityError(
                f"row {number} of the {split} data has no text in {language!r}, only {row!r}: mend or drop it, or set "
                "--source_lang and --target_lang"
            )
    return [row[language] for row in rows]


if __name__ == "__main__":
    run(Translation, __doc__)
