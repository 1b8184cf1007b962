"""Started by `accelerate launch` in test_launch.py: trains tiny BERT and writes what every rank ends with."""

import sys
from pathlib import Path

import torch
from conftest import bert, rows, training_arguments
from safetensors.torch import save_file
from torch import nn

from hf_sparse import SparseTrainer, SparsityConfig


def main(directory: Path, batch: int, cost: str, targets: list[float]) -> None:
    torch.set_num_threads(1)
    model, teacher = bert().double(), bert(layers=1).double()
    for module in [*model.modules(), *teacher.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    run = SparseTrainer(
        model=model,
        args=training_arguments(directory, per_device_train_batch_size=batch, max_steps=30 * len(targets)),
        sparsity=SparsityConfig(targets=targets, cost=cost, cost_sequence_length=16),
        teacher=teacher,
        train_dataset=rows(64),
        eval_dataset=rows(16, seed=1),
    )
    run.train()
    save_file(model.state_dict(), directory / f"rank{run.args.process_index}.safetensors")
    run.save_model(str(directory / "gated"))  # compacts a copy
    run.compact()
    run.save_model(str(directory / "out"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], [float(target) for target in sys.argv[4:]])
