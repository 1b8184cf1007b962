"""Read what a training has logged: what `trainer_state.json` holds under `log_history`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_sparse.errors import SparsityError

LARGEST = 64 << 20
"""Bytes of a trainer_state.json that is still read."""

LARGEST_NUMBER = 1e100
"""Larger numbers are no measurements, and their differences could not be drawn."""

SHRUNK = "kept_"
"""How names begin that are logged when the model shrinks, each with the number of units that a kind has left."""

_LOSSES = ("loss", "task_loss", "logits_loss", "hidden_loss", "eval_loss")

COSTS = ("runtime", "per_second", "model_preparation_time", "samples")
"""Endings of what evaluations note beside the task's own metrics."""

Series = Mapping[str, tuple[tuple[int, float], ...]]
"""(step, value) pairs by name."""


@dataclass(frozen=True)
class History:
    """What was logged in a training.

    Attributes:
        series: every number that was logged, by its name; values that are not finite are left out.
    """

    series: Series = field(default_factory=dict)

    @classmethod
    def of(cls, log_history: Iterable[Mapping[str, Any]]) -> "History":
        """Collect what a Trainer has logged, by name."""
        found: dict[str, list[tuple[int, float]]] = {}
        for line in log_history:
            step = line.get("step")
            if not isinstance(step, int) or not 0 <= step <= LARGEST_NUMBER:
                continue
            for name, value in line.items():
                if isinstance(value, int | float) and abs(value) <= LARGEST_NUMBER and name not in ("step", "epoch"):
                    found.setdefault(str(name), []).append((step, float(value)))
        return cls({name: tuple(pairs) for name, pairs in found.items()})

    @classmethod
    def read(cls, path: Path) -> "History":
        """Read a trainer_state.json.

        Raises:
            SparsityError: it is not one.
        """
        try:
            if path.stat().st_size > LARGEST:
                raise ValueError(f"it has {path.stat().st_size:,} bytes")
            return cls.of(json.loads(path.read_text(encoding="utf-8"))["log_history"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SparsityError(f"{path} is not the state of a Trainer ({error!r}): delete it, or mend it") from None

    @property
    def shrinks(self) -> list[int]:
        """The steps at which the model became smaller."""
        return sorted({step for name, pairs in self.series.items() if name.startswith(SHRUNK) for step, _ in pairs})

    @property
    def charts(self) -> dict[str, Series]:
        """The series that are drawn together, by title; charts of which nothing was logged are left out."""
        logged = sorted(self.series)  # as in files
        metrics = [name for name in logged if name.startswith("eval_") and not name.endswith((*COSTS, "_loss"))]
        kinds = [name for name in logged if name.startswith("density_")]
        groups = {
            "Loss": _LOSSES,
            **{name.removeprefix("eval_"): (name,) for name in metrics},
            "Density and its schedule": ("density", "target_density", *kinds),
            "lambda": ("lambda",),
            "Learning rate": ("learning_rate",),
        }
        charts = {
            title: {name: self.series[name] for name in names if name in self.series} for title, names in groups.items()
        }
        return {title: series for title, series in charts.items() if series}


NOT_LOGGED = History()
