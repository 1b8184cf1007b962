"""Saves two models by turns into one directory and is killed at random moments: what is there must be one of them."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from pruning import bert, plans
from transformers.utils.logging import disable_progress_bar

from hf_sparse import compact, load_pruned, save_pruned
from hf_sparse.structure.example_inputs import example_inputs

KILLS = 25


@torch.no_grad()
def main(directory: Path) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()  # its lock is shared with the processes that are killed
    models = [bert(), bert()]
    inputs = example_inputs(models[0])
    for model, kind in zip(models, ("uneven", "some sublayers")):
        compact(model, plans(model)[kind])
    expected = [model(**inputs).logits for model in models]
    began = time.perf_counter()
    save_pruned(models[0], directory)
    span = 5 * (time.perf_counter() - began)  # of which some kills come in the first save, and some in a later one
    (directory / "report.json").write_text("mine")
    random.seed(0)
    seen = set()
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            for turn in range(10_000):
                save_pruned(models[turn % 2 == 0], directory)
        time.sleep(random.uniform(0.0, span))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        logits = load_pruned(directory)(**inputs).logits
        seen.add([torch.equal(logits, one) for one in expected].index(True))
    save_pruned(models[1], directory)
    assert (directory / "report.json").read_text() == "mine"
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
    print(f"{KILLS} kills, {len(seen)} of 2 models seen")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
