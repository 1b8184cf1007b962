"""Gather weights that ZeRO stage 3 has sharded on the main process, and shard them again.

Nothing here imports deepspeed before it is in use.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from hf_sparse.engines.tensors import META, exchange_, on_device, remove_hooks_, restored, unsharded
from hf_sparse.runtime.processes import broadcast_, is_main
from hf_sparse.runtime.streaming import HOST

MARKS = (
    "_external_params",
    "_original_parameters",
    "all_parameters",
    "applied_pre_backward_ref_cnt",
    "pre_bwd_fn",
    "post_bwd_fn",
)
"""What DeepSpeed sets on modules beside names that start with ds_; an engine would use the functions of another."""


def is_partitioned(model: nn.Module) -> bool:
    """Whether stage 3 has the weights of a model in shards."""
    return any("ds_id" in vars(parameter) for parameter in model.parameters())


@contextmanager
def partitions_together(model: nn.Module) -> Iterator[None]:
    """Inside this context a model of stage 3 is whole on the main process, in place, in the host's memory.

    On the others it has no weights. It must not be changed inside, and runs without the engine. Another model stays as
    it is. All processes must come here together.
    """
    if not is_partitioned(model):
        yield
        return
    with restored(model):
        gather_partitions_(model)
        yield


@torch.no_grad()
def gather_partitions_(model: nn.Module) -> None:
    """Make a model of stage 3 whole in place on the main process, tensor by tensor, and free of hooks.

    On other processes its parameters are left without values. What an optimizer trains is in float32 afterwards.
    """
    home = HOST if is_main() else META
    sharded = [parameter for parameter in model.parameters() if "ds_id" in vars(parameter)]
    wholes = {id(shard): nn.Parameter(_whole(shard).to(home), shard.requires_grad) for shard in sharded}
    exchange_(model, {**unsharded(model), **wholes})
    for module in model.modules():
        for mark in [name for name in vars(module) if name.startswith("ds_") or name in MARKS]:
            del vars(module)[mark]
    remove_hooks_(model, "deepspeed")


def _whole(parameter: Any) -> Tensor:
    """A parameter in float32 as its optimizer has it, or as it is if it has none, on the device of every process."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad and "_z3_optimizer" in vars(parameter):
        trained: Tensor = safe_get_full_fp32_param(parameter)
        return trained.view(parameter.ds_shape)
    with GatheredParameters([parameter]):
        return parameter.data.clone()


@torch.no_grad()
def partition_(model: nn.Module, config: Mapping[str, Any], device: torch.device) -> None:
    """Shard a model that the main process has as stage 3 does, in place, tensor by tensor, for an engine to take over.

    Args:
        model: without gates.
        config: of DeepSpeed.
        device: of this process.
    """
    from deepspeed.runtime.zero import Init

    buffers = {id(buffer): on_device(buffer, device) for buffer in model.buffers()}
    broadcast_(buffers.values())
    # What has no values yet takes no memory before they are there: pages that nobody has written to.
    rooms = {id(parameter): on_device(parameter, HOST) for parameter in model.parameters()}
    exchange_(model, {**buffers, **rooms})
    # Sizes of batches and buckets have nothing to do with it, and may not be known yet.
    settings = {name: value for name, value in config["zero_optimization"].items() if value != "auto"}
    Init(module=model, config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": settings})


@torch.no_grad()
def set_float32_(parameter: Any, values: Tensor) -> None:
    """Give the optimizer of a sharded parameter, in place, the values of this process's share, in float32."""
    from deepspeed.utils import safe_set_local_fp32_param

    size = parameter.ds_tensor.numel()
    share = values.flatten()[size * distributed.get_rank() :][:size]
    safe_set_local_fp32_param(parameter, F.pad(share, (0, size - len(share))))  # the last ones are padded
