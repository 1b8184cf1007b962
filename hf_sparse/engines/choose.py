"""Choose the engine; the only place that asks accelerate which one is on."""

from accelerate import Accelerator
from accelerate.utils import DistributedType

from hf_sparse.engines.base import Engine
from hf_sparse.engines.ddp import DDP
from hf_sparse.engines.fsdp import FSDP2
from hf_sparse.engines.zero import ZeRO
from hf_sparse.engines.zero3 import ZeRO3


def engine_of(accelerator: Accelerator) -> Engine:
    """Choose the engine that an accelerator trains with, by its plugins, as Trainer does."""
    # accelerate's state has these attributes only where their engine is on.
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None:
        return (ZeRO3 if deepspeed.zero_stage == 3 else ZeRO)(accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return FSDP2(accelerator)
    return (Engine if accelerator.distributed_type == DistributedType.NO else DDP)(accelerator)
