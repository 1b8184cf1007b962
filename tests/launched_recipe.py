"""Started by `accelerate launch`: the recipe, sharded on CPUs."""

import sys
from pathlib import Path

from launching import shard_on_cpus

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import common
import text_classification

shard_on_cpus()
common.run_recipe(text_classification.main)
