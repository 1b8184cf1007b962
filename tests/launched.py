"""Started by `accelerate launch` in tests: trains tiny BERT and writes what every process ends with."""

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from launching import deepspeed_on_cpus, leave, shard_on_cpus
from peft import LoraConfig, get_peft_model
from pruning import MODELS, StopAt, bert, rows, training_arguments, without_dropout
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from hf_sparse import SparseTrainer, SparseWeightsTrainer, SparsityConfig, WeightSparsityConfig
from hf_sparse.costs import latency
from hf_sparse.training import borders, results, stages


def _nan(model: nn.Module, rank: int) -> None:
    if rank == 1:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))


def _disk(model: nn.Module, rank: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


FAULTS = {"nan": _nan, "disk": _disk}


SHARDED = os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
"""Whether the engine shards weights."""


@contextmanager
def by_the_main_process(trainer: SparseTrainer | SparseWeightsTrainer) -> Iterator[None]:
    """Inside this context weights are gathered on the main process, and the others fail if they compact or refit."""
    refit = stages.refit_to_teacher_

    def checked(trainer: Any, calls: Any, outputs: list[str]) -> None:
        if SHARDED:
            home = "cpu" if trainer.is_world_process_zero() else "meta"
            assert trainer.bare_model.device == torch.device(home)
        refit(trainer, calls, outputs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(stages, "refit_to_teacher_", checked))
        if not trainer.is_world_process_zero():
            stack.enter_context(mock.patch.object(results, "compact", side_effect=AssertionError("not here")))
            stack.enter_context(mock.patch.object(borders, "refit_", side_effect=AssertionError("not here")))
        yield


class Trouble(TrainerCallback):
    """Makes steps slow, and causes a fault after step 20."""

    def __init__(self, fault: str | None, pause: float) -> None:
        self.fault, self.pause = fault, pause

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        time.sleep(self.pause)
        if state.global_step == 20 and self.fault is not None:
            FAULTS[self.fault](model, args.process_index)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=MODELS, default="bert")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--cost", default="params")
    parser.add_argument("--group")
    parser.add_argument("--pattern", help="zeros among the weights instead of smaller matrices")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5])
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--lora", action="store_true", help="adapters of peft are trained instead of all weights")
    parser.add_argument("--loaded", action="store_true", help="model and teacher come from_pretrained")
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--stop", type=int, help="save and stop at a step, as if interrupted")
    parser.add_argument("--save_steps", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fault", choices=FAULTS, help="what goes wrong after step 20")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that a step takes longer")
    return parser.parse_args()


def loaded(model: Any, directory: Path) -> Any:
    """A model without dropout as from_pretrained leaves it, which may be in shards."""
    model.save_pretrained(directory)  # by the main process
    torch.distributed.barrier()
    return without_dropout(type(model).from_pretrained(directory, dtype=model.dtype))


def main() -> None:
    flags = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    latency.CACHE = flags.directory / "latency"
    saving = {"save_strategy": "steps", "save_steps": flags.save_steps} if flags.save_steps else {}
    arguments = training_arguments(
        flags.directory,
        per_device_train_batch_size=flags.batch,
        gradient_accumulation_steps=flags.accumulation,
        max_steps=30 * len(flags.targets),
        logging_steps=1,
        gradient_checkpointing=flags.gradient_checkpointing,
        torch_compile_backend="eager" if flags.torch_compile else None,  # traced, without the minutes of a compiler
        ddp_find_unused_parameters=False,
        bf16=flags.bf16,
        max_grad_norm=flags.max_grad_norm,
        **saving,
    )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        deepspeed_on_cpus()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        assert arguments.world_size > 1
        shard_on_cpus()
    dtype = getattr(torch, flags.dtype)
    train, test = rows(64), rows(16, seed=1)
    teacher: Any = bert(layers=1)
    if flags.model != "bert":
        teacher = MODELS[flags.model]()
        train, test = (data.map(lambda row: {"labels": row["input_ids"]}) for data in (train, test))
    trainer: Any = SparseTrainer
    sparsity: Any = SparsityConfig(targets=flags.targets, cost=flags.cost, cost_sequence_length=16, group=flags.group)
    if flags.pattern:
        trainer, teacher = SparseWeightsTrainer, bert()
        sparsity = WeightSparsityConfig(pattern=flags.pattern, block_size=4, sparsity_ramp=0.5, sparsity_hold=0.2)
    model: Any = without_dropout(MODELS[flags.model]()).to(dtype)
    teacher = without_dropout(teacher).to(dtype)
    if flags.loaded:
        model, teacher = loaded(model, flags.directory / "dense"), loaded(teacher, flags.directory / "teacher")
    if flags.lora:
        options = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
        model = get_peft_model(model, options, autocast_adapter_dtype=False)
    run = trainer(
        model=model,
        args=arguments,
        sparsity=sparsity,
        teacher=teacher,
        train_dataset=train,
        eval_dataset=test,
        callbacks=[Trouble(flags.fault, flags.pause), *([StopAt(flags.stop)] if flags.stop else [])],
    )
    if flags.pattern and flags.dtype == "float64":  # of thousands of gates, some would lie on the border in float32
        for tensor in (*run.model.sparsity_gates.parameters(), *run.model.sparsity_gates.buffers()):
            tensor.data = tensor.data.double()
    assert isinstance(run.distiller.teacher.model, FSDPModule) == SHARDED
    with by_the_main_process(run):
        run.train(resume_from_checkpoint=flags.resume)
    if flags.pattern:
        run.save_model(str(flags.directory / "gated"))
        run.fold()
    elif not flags.stop:
        run.save_model(str(flags.directory / "gated"))  # where it still has gates, a copy is compacted
        run.compact()
        assert run.evaluate()["eval_loss"] > 0
    if not flags.stop:
        save_file(
            {name: value.clone() for name, value in run.model.state_dict().items()},
            flags.directory / f"rank{arguments.process_index}.safetensors",
        )
        run.save_model(str(flags.directory / "out"))
        if run.is_world_process_zero():
            zeros = {name: (weight == 0).flatten().tolist() for name, weight in run.model.state_dict().items()}
            (flags.directory / "plan.json").write_text(json.dumps(zeros) if flags.pattern else run.plan().to_json())
            run.state.save_to_json(str(flags.directory / "state.json"))
    run.accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
