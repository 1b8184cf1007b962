"""Tell what was written for llama.cpp, and what differs from what was asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_sparse.runtime.tables import Printed


@dataclass(frozen=True)
class GgufSummary(Printed):
    """A summary of a GGUF file; prints as a few lines.

    Attributes:
        path: of the file.
        size: bytes of it.
        architecture: llama.cpp's name of what it is.
        outtype: how matrices are stored, but for some of those below.
        otherwise: how a matrix is stored instead, by its name.
        zeros: neurons that were added, all zero, since an FFN is written in whole blocks.
    """

    path: Path
    size: int
    architecture: str
    outtype: str
    otherwise: Mapping[str, str]
    zeros: int

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.size / 1e6:,.1f} MB, {self.outtype}, architecture {self.architecture}"]
        for kind in sorted(set(self.otherwise.values())):
            names = [name for name, one in self.otherwise.items() if one == kind]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{kind} instead of {self.outtype}: {', '.join(names[:3])}{more}")
        if self.zeros:
            lines.append(
                f"{self.zeros:,} neurons of zeros fill up blocks and removed FFNs; round_to=32 prunes whole blocks"
            )
        return "\n".join(lines)
