"""Started by `accelerate launch`: the recipe, sharded on CPUs."""

import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import common
import text_classification

# accelerate shards on accelerators alone, though torch's fully_shard works on CPUs as well.
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
common.run_recipe(text_classification.main)
