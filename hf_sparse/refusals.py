"""Arguments of a Trainer with which gates would not be exact."""

from typing import Any

from transformers import TrainingArguments

from hf_sparse.errors import SparsityError


def check_arguments(arguments: TrainingArguments, scheduler: Any, shards_weights: bool) -> None:
    """Refuse what would not be exact.

    Args:
        arguments: of the Trainer.
        scheduler: that it was given, if any.
        shards_weights: whether the engine leaves every process a share of the weights only.

    Raises:
        SparsityError: what it is, and what to do instead.
    """
    if arguments.n_gpu > 1:
        raise SparsityError(
            "DataParallel would train a copy of the gates on every GPU: start with `accelerate launch`, which uses one "
            "process per GPU, or show one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if scheduler is not None:
        raise SparsityError(
            "a scheduler in optimizers=(...) cannot wait for the search: give (optimizer, None), and lr_scheduler_type "
            "in TrainingArguments"
        )
    if shards_weights and arguments.save_on_each_node:
        raise SparsityError("the first process alone puts shards together: leave out save_on_each_node")
    checkpointing = arguments.gradient_checkpointing_kwargs
    if arguments.gradient_checkpointing and isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
        raise SparsityError(
            "use_reentrant=True goes backward layer by layer through gates that all layers share: leave it out of "
            "gradient_checkpointing_kwargs"
        )
    if arguments.fp16 and arguments.max_grad_norm <= 0:
        raise SparsityError("fp16 without gradient clipping leaves gradients scaled: set max_grad_norm or use bf16")
