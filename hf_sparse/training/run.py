"""Keep the state of a run, which its checkpoints have beside the weights."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_sparse.compaction.compact import CompactionReport
from hf_sparse.distillation.distiller import LayerMap
from hf_sparse.errors import SparsityError
from hf_sparse.report.report import Report
from hf_sparse.runtime.files import write_whole

STATE = "sparsity_state.json"
"""Beside a checkpoint's weights: the run, as JSON."""


@dataclass
class Run:
    """The state of a run: what has been done so far.

    Attributes:
        stage: index of the target that is searched for, or recovered from.
        searching: whether the model has gates.
        gated: paths of the blocks whose units the run may remove; None where that is unknown.
        compactions: in their order; each in units of the model that it was given.
        layer_map: whose states of student and teacher are compared; None where each layer has its own.
        processes: how many train; each leaves its random numbers in a checkpoint.
        settings: of the search, by name, as JSON has them.
        members: reports of the stages that are over, by directory; read from there, and not in checkpoints.
    """

    stage: int = 0
    searching: bool = True
    gated: list[str] | None = None
    compactions: list[CompactionReport] = field(default_factory=list)
    layer_map: LayerMap | None = None
    processes: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    members: dict[str, Report] = field(default_factory=dict)

    def to_json(self) -> str:
        """The run for a checkpoint."""
        state = {name: value for name, value in vars(self).items() if name != "members"}
        return json.dumps(state | {"compactions": [report.to_dict() for report in self.compactions]})

    @classmethod
    def from_json(cls, text: str) -> "Run":
        """Read what `to_json` wrote. A run that sets single weights to zero has no stages, compactions and layers.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is something else.
        """
        state = json.loads(text)
        pairs = state.get("layer_map")
        return cls(
            int(state.get("stage", 0)),
            bool(state["searching"]),
            None if state.get("gated") is None else [str(name) for name in state["gated"]],
            [CompactionReport.from_dict(entry) for entry in state.get("compactions", [])],
            None if pairs is None else tuple((int(i), int(j)) for i, j in pairs),
            int(state.get("processes", 1)),
            dict(state["settings"]),
        )

    def write(self, directory: Path) -> None:
        """Write the run to a checkpoint, which is made if it is not there: shards may be written into it later."""
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / STATE, self.to_json())

    @classmethod
    def read(cls, checkpoint: Path) -> "Run":
        """Read the run that a checkpoint is of.

        Raises:
            SparsityError: it does not have one.
        """
        try:
            return cls.from_json((checkpoint / STATE).read_text())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SparsityError(f"{checkpoint / STATE} does not say what its run has done ({error!r})") from None
