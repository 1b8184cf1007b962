"""Trains a few steps and prints the peak of what torch allocated, in bytes, the model included."""

import sys
import tempfile
from pathlib import Path

import torch
from conftest import training_arguments
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, BertForSequenceClassification

from hf_sparse import SparseTrainer, SparsityConfig


def main(directory: str, batch: int, length: int, checkpointing: bool) -> None:
    torch.set_num_threads(1)
    ids = torch.randint(3, 90, (batch * 3, length)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": [row % 2 for row in range(len(ids))]})
    with tempfile.TemporaryDirectory() as output:
        run = SparseTrainer(
            model=BertForSequenceClassification(AutoConfig.from_pretrained(directory)),
            args=training_arguments(
                Path(output), per_device_train_batch_size=batch, max_steps=3, gradient_checkpointing=checkpointing
            ),
            sparsity=SparsityConfig(warm_start=0.0, sparsity_warmup=0.0, sparsity_ramp=0.98, sparsity_hold=0.0),
            train_dataset=data,
        )
        weights = sum(parameter.numel() * parameter.element_size() for parameter in run.model.parameters())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run.train()
    allocated = peak = 0
    results = profiled.profiler
    assert results is not None
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    print(weights + peak)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["checkpointing"])
