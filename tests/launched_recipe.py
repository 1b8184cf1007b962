"""Started by `accelerate launch`: the recipe, on CPUs with engines that are for accelerators."""

import os
import sys
from pathlib import Path

from launching import deepspeed_on_cpus, leave, shard_on_cpus

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import text_classification
from common.running import run

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    deepspeed_on_cpus()
else:
    shard_on_cpus()
run(text_classification.TextClassification, text_classification.__doc__)
leave()
