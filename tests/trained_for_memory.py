"""Trains a few steps and prints the peak of what torch allocated, in bytes, the model included."""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from launching import deepspeed_on_cpus
from peft import LoraConfig, get_peft_model
from pruning import training_arguments
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, BertForSequenceClassification

from hf_sparse import SparseTrainer, SparsityConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--lora_r", type=int)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    steps, processes = 3, int(os.environ.get("WORLD_SIZE", "1"))
    ids = torch.randint(3, 90, (flags.batch * steps * processes, flags.length)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": [row % 2 for row in range(len(ids))]})
    with tempfile.TemporaryDirectory() as output:
        arguments = training_arguments(
            Path(output),
            per_device_train_batch_size=flags.batch,
            max_steps=steps,
            bf16=flags.bf16,
            gradient_checkpointing=flags.gradient_checkpointing,
        )
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            deepspeed_on_cpus()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            model = BertForSequenceClassification(AutoConfig.from_pretrained(flags.directory))
            if flags.lora_r is not None:
                model = get_peft_model(model, LoraConfig(r=flags.lora_r, target_modules="all-linear"))
            SparseTrainer(
                model=model,
                args=arguments,
                sparsity=SparsityConfig(warm_start=0.0, sparsity_warmup=0.0, sparsity_ramp=0.98, sparsity_hold=0.0),
                train_dataset=data,
            ).train()
    allocated = peak = 0
    results = profiled.profiler
    assert results is not None
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    if arguments.process_index == 0:
        print(f"peak: {peak}")


if __name__ == "__main__":
    main()
