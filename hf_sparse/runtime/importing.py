"""Import a module once another one has been imported, where importing that one first would take seconds."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def import_after(ours: str, theirs: str) -> None:
    """Import a module as soon as another one has been imported, by whomever; now, if it has been.

    Args:
        ours: the name of the module to import.
        theirs: the name of the module to wait for.
    """
    if theirs in sys.modules:
        importlib.import_module(ours)
    else:
        sys.meta_path.insert(0, _Waiting(ours, theirs))


class _Waiting(MetaPathFinder):
    """Finds a module once, as the other finders do, and imports a second one as soon as the first has been executed."""

    def __init__(self, ours: str, theirs: str) -> None:
        self.ours, self.theirs = ours, theirs

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """Find the module that is waited for; None for every other."""
        if name != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_import(module: ModuleType) -> None:
                run(module)
                importlib.import_module(self.ours)

            spec.loader.exec_module = run_and_import  # type: ignore[method-assign]
        return spec
