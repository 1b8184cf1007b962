"""The tasks of GLUE: where their data are, what their columns are called, and by what they are judged."""

from dataclasses import dataclass, field

from common.problems import ACCEPTABILITY, EQUIVALENCE, NUMBERS
from common.texts import TextArguments

PAIR = ("sentence1", "sentence2")
COLUMNS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": PAIR,
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": PAIR,
    "sst2": ("sentence",),
    "stsb": PAIR,
    "wnli": PAIR,
}
PROBLEMS = {"cola": ACCEPTABILITY, "mrpc": EQUIVALENCE, "qqp": EQUIVALENCE, "stsb": NUMBERS}
"""Those that are more than classes."""


@dataclass(frozen=True)
class GlueArguments(TextArguments):
    """`TextArguments` that know tasks of GLUE by their names."""

    task_name: str | None = field(
        default=None,
        metadata={
            "help": "Task of GLUE: its data unless files are given, its columns and metrics.",
            "choices": [*COLUMNS],
        },
    )

    @property
    def on_hub(self) -> tuple[str | None, str | None]:
        """The data set on the Hub and its configuration."""
        named = self.task_name is not None and self.dataset_name is None and not self.files
        return ("nyu-mll/glue", self.task_name) if named else (self.dataset_name, self.dataset_config_name)

    @property
    def split_names(self) -> dict[str, str]:
        """What the splits are called on the Hub; MNLI has two of each but the first."""
        names = super().split_names
        if self.on_hub[1] == "mnli":
            names |= {name: f"{name}_matched" for name in ("validation", "test") if names[name] == name}
        return names
