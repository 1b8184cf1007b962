"""Fine-tune and prune a model that summarizes; with no flags, a tiny T5, from scratch on reports of games.

    python recipes/summarization.py
    accelerate launch recipes/summarization.py --model_name_or_path google-t5/t5-small --source_prefix "summarize: " \\
        --dataset_name EdinburghNLP/xsum --dense_epochs 1 --target 0.5 --output_dir runs/xsum

Rows have a text and its summary. Summaries are compared as they are, however many tokens --max_target_length leaves of
them. --do_predict also writes generated_predictions.txt: a line for every text of the test data.
"""

import re
from dataclasses import dataclass, field

from common.files import require_columns, require_target, require_texts
from common.metrics import Metric, local_metric
from common.running import run
from common.task import Data
from common.text_to_text import TextToText, TextToTextArguments
from datasets import Dataset, DatasetDict
from embedded.reports import reports
from transformers import EvalPrediction

from hf_sparse import SparsityError

COLUMNS = "set --text_column and --summary_column"
KNOWN = (
    ("article", "highlights"),  # of CNN and Daily Mail
    ("document", "summary"),  # of XSum and Multi-News
    ("dialogue", "summary"),  # of SAMSum
    ("article", "summary"),
    ("text", "summary"),
    ("description", "abstract"),  # of patents
    ("body", "summary"),
    ("extract_text", "summary_text"),
    ("news_body", "news_title"),
    ("review_body", "review_title"),
)
"""Columns of well-known data sets."""
SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Arguments(TextToTextArguments):
    """Which texts."""

    text_column: str | None = field(
        default=None, metadata={"help": "Column of the texts. Default: that of well-known data sets, or the first one."}
    )
    summary_column: str | None = field(
        default=None, metadata={"help": "Column of the summaries. Default: likewise, or the second one."}
    )
    lang: str | None = field(default=None, metadata={"help": "For mBART: the code of the language, such as en_XX."})

    @property
    def languages(self) -> tuple[str | None, str | None]:
        """Those of texts and of summaries, which are the same."""
        return self.lang, self.lang


class Summarization(TextToText):
    """A summary for every text."""

    pipeline_tag = "summarization"
    data_arguments = Arguments
    metrics = tuple(Metric(f"rouge{kind}", f"ROUGE-{kind}", percent=False) for kind in ("1", "2", "L", "Lsum"))
    embedded_name = "reports of games"
    embedded_defaults = {
        "output_dir": "runs/summarization",
        "learning_rate": 3e-3,
        "dense_epochs": 4,
        "num_train_epochs": 6,
        "max_target_length": 24,
    }

    def embedded_data(self, seed: int) -> DatasetDict:
        """Who won?"""
        return reports(seed)

    def load(self, splits: DatasetDict) -> Data:
        """Find texts and summaries."""
        names = splits["train"].column_names
        usual = next((pair for pair in KNOWN if set(pair) <= set(names)), (names[0], names[min(1, len(names) - 1)]))
        text, summary = self.arguments.text_column or usual[0], self.arguments.summary_column or usual[1]
        if text == summary:
            raise SparsityError(f"column {text!r} cannot be text and summary at once: {COLUMNS}")
        require_columns(splits, [text], COLUMNS)
        summarized = require_target(splits, summary, COLUMNS)
        require_texts(splits, [text])
        require_texts(summarized, [summary])
        return self.paired(
            {split: rows[text][:] for split, rows in splits.items()},
            {split: rows[summary][:] for split, rows in summarized.items()},
            summary,
        )

    def compute_metrics(self, prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """Compare generated summaries with the right ones, sentence by sentence for ROUGE-Lsum."""
        generated, right = (
            [SENTENCE_ENDS.sub("\n", text) for text in texts] for texts in (self.generated(prediction), rows["target"])
        )
        found = local_metric("rouge")(predictions=generated, references=right, use_stemmer=True)
        return {name: 100 * value for name, value in found.items()}


if __name__ == "__main__":
    run(Summarization, __doc__)
