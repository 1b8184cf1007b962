"""Started by test_hub.py with the loopback server for a Hub: makes small models and pushes each in its own way."""

import sys
from pathlib import Path

import torch
from pruning import bert, learnt, rows, training_arguments
from transformers import PreTrainedModel

from hf_sparse import SparseTrainer, SparsityConfig, compact, push_to_hub, save_pruned


def small() -> PreTrainedModel:
    model = learnt(bert())
    compact(model)
    return model


def main(directory: Path, token: str) -> None:
    torch.set_num_threads(1)
    trainer = SparseTrainer(
        model=bert(),
        args=training_arguments(directory / "trainer", push_to_hub=True, hub_model_id="me/trainer", hub_token=token),
        sparsity=SparsityConfig(),
        train_dataset=rows(64),
        eval_dataset=rows(16, seed=1),
    )
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(license="apache-2.0", tags="tiny")
    push_to_hub(small(), "me/model", token=token, private=True)
    save_pruned(small(), directory / "directory")
    push_to_hub(directory / "directory", "me/directory", token=token)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
