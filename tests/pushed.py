"""Started by test_hub.py with the loopback server for a Hub: makes a small model and pushes it one of the ways."""

import sys
from pathlib import Path

import torch
from conftest import bert, rows, training_arguments
from test_compaction import learnt

from hf_sparse import SparseTrainer, SparsityConfig, SparsityError, compact, push_to_hub, save_pruned


def main(way: str, directory: Path) -> None:
    torch.set_num_threads(1)
    if way == "trainer":
        trainer = SparseTrainer(
            model=bert(),
            args=training_arguments(directory, push_to_hub=True, hub_model_id="me/small", hub_token=sys.argv[3]),
            sparsity=SparsityConfig(),
            train_dataset=rows(64),
            eval_dataset=rows(16, seed=1),
        )
        trainer.train()
        trainer.evaluate()
        trainer.push_to_hub(license="apache-2.0", tags="tiny")
    elif way == "model":
        model = learnt(bert())
        compact(model)
        push_to_hub(model, "me/small", token=sys.argv[3], private=True)
    else:
        if not directory.exists():
            model = learnt(bert())
            compact(model)
            save_pruned(model, directory)
        push_to_hub(directory, "me/small", token=sys.argv[3])


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except SparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
