"""Refuse arguments of a Trainer, and settings of its model, with which gates would not be exact."""

import functools
from typing import Any

from torch import nn
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
        raise SparsityError("the main process gathers the shards, so only it can save: leave out save_on_each_node")
    if arguments.fp16 and arguments.max_grad_norm <= 0:
        raise SparsityError("fp16 without gradient clipping leaves gradients scaled: set max_grad_norm or use bf16")


def check_checkpointing(model: nn.Module) -> None:
    """Refuse reentrant checkpointing, whether the arguments of a Trainer or a call of the model have switched it on.

    Raises:
        SparsityError: it is, or would be by torch's default.
    """
    for module in model.modules():
        own = vars(module)
        checkpoint = own.get("_gradient_checkpointing_func") if own.get("gradient_checkpointing") else None
        if isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant", True):
            raise SparsityError(
                "use_reentrant=True goes backward layer by layer through gates that all layers share: set it to False, "
                "in the arguments of gradient checkpointing or where it was enabled on the model"
            )
