"""Tiny random models of every kind of transformer, by model type."""

import importlib
import pathlib

from zoo.species import Species

MODULES = [f.stem for f in sorted(pathlib.Path(__file__).parent.glob("*.py")) if f.stem not in ("species", "__init__")]

ZOO: dict[str, Species] = {}
for module in MODULES:
    ZOO.update(importlib.import_module(f"zoo.{module}").SPECIES)
