"""Print what can be pruned in every model type of the zoo, as a table and in totals."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import sys

import torch
from transformers.utils import logging
from zoo import ZOO

from hf_sparse import ModelStructure, discover


def cell(structure: ModelStructure, *kinds: str) -> str:
    units = sorted({block.units for block in structure.blocks if block.kind in kinds})
    return "/".join(map(str, units)) or "-"


def row(name: str, structure: ModelStructure) -> tuple[str, ...]:
    whole = sum(block.stand_in is not None for block in structure.blocks)
    # Layers that are alike have the same reason.
    reasons = {reason: path for path, reason in reversed(structure.refused)}
    return (
        ZOO[name].family,
        name,
        cell(structure, "attention"),
        cell(structure, "ffn"),
        cell(structure, "experts"),
        f"{whole} of {len(structure.blocks)}",
        "; ".join(f"{path}: {reason}" for reason, path in reasons.items()),
    )


def main() -> int:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows = [("family", "model type", "heads", "neurons", "experts", "sublayers", "refused")]
    structures = {name: discover(species.make(), species.inputs()) for name, species in ZOO.items()}
    rows += [row(name, structure) for name, structure in structures.items()]
    widths = [max(len(one[i]) for one in rows) for i in range(6)]
    for one in rows:
        print("  ".join(text.ljust(width) for text, width in zip(one, widths)), one[6], sep="  ")
    kinds = {name: {block.kind for block in structure.blocks} for name, structure in structures.items()}
    types = {name: name.partition(" (")[0] for name in ZOO}

    def count(*wanted: str) -> int:
        return len({types[name] for name in ZOO if kinds[name] & {*wanted}})

    print(
        f"\n{len({*types.values()})} model types: heads exact in {count('attention')}, FFN neurons in "
        f"{count('ffn', 'experts')} (of experts in {count('experts')}); in all others refused with the reason."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
