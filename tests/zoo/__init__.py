"""Tiny random models of every kind of transformer, by model type."""

import importlib

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from zoo.species import Species

MODULES = ("encoders", "decoders", "moe_decoders", "seq2seq", "vision", "audio", "multimodal")


def _collect() -> dict[str, Species]:
    species: dict[str, Species] = {}
    for module in MODULES:
        for name, one in importlib.import_module(f"zoo.{module}").SPECIES.items():
            if name in species:
                raise ValueError(f"{name} is in the zoo twice")
            # Variants have what sets them apart in parentheses; older versions of transformers lack some types.
            if name.partition(" (")[0] in CONFIG_MAPPING_NAMES:
                species[name] = one
    return species


ZOO = _collect()
