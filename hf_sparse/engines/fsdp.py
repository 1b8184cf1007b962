"""FSDP2: a sharded model is put together, changed, and sharded again; gates are whole on every process at all times.

The main process puts it together, in the host's memory. The others then have its modules but no weights: parameters
are on torch's meta device until shards of them come from the main process.

Sharding cannot be undone through torch's public interface: this file, and no other, uses its private one.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import GenerationMixin, PreTrainedModel

from hf_sparse.engines.base import Engine, Training, average_gradients_, evaluated_as_it_is
from hf_sparse.engines.tensors import META, exchange_, on_device, remove_hooks_, restored, unsharded
from hf_sparse.errors import SparsityError
from hf_sparse.gates.base import BANK, SteeredGates, attached_gates
from hf_sparse.runtime.processes import broadcast_, is_main
from hf_sparse.runtime.streaming import HOST, layers


class FSDP2(Engine):
    """Trains shards of the weights, layer by layer."""

    shards_weights = True
    loads_when_prepared = True
    evaluates_others = False

    def check_(self) -> None:
        """As `Engine.check_`; changes accelerate's plugin in place, so that it leaves gates whole."""
        plugin = self.accelerator.state.fsdp_plugin
        if not self.accelerator.is_fsdp2:
            raise SparsityError("FSDP's first version flattens the weights that gates scale: set fsdp_version to 2")
        if plugin.cpu_ram_efficient_loading:
            raise SparsityError(
                "fsdp_cpu_ram_efficient_loading has all tensors handed out as shards, of which gates are none: set it "
                "to false"
            )
        if plugin.activation_checkpointing:
            raise SparsityError(
                "fsdp_activation_checkpointing wraps layers in others, under other names: set it to false and give "
                "activation_checkpointing to TrainingArguments (gradient_checkpointing before transformers 5.23)"
            )
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise SparsityError("fsdp_offload_params keeps shards where they cannot be put together: set it to false")
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise SparsityError("torch.compile and FSDP do not go together here: leave one of them out")
        ignored = plugin.ignored_modules
        if ignored is not None and not isinstance(ignored, str):
            raise SparsityError("ignored_modules of FSDP are given as modules, which will change: give their names")
        gates = rf"{BANK}(\..*)?"
        if ignored is None or gates not in ignored:
            plugin.ignored_modules = gates if ignored is None else f"{ignored}|{gates}"

    def is_in_shards(self, model: nn.Module) -> bool:
        """As `Engine.is_in_shards`."""
        return isinstance(model, FSDPModule)

    def share(self, parameter: Tensor) -> Tensor:
        """As `Engine.share`."""
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def gathered(self, model: nn.Module) -> AbstractContextManager[None]:
        """As `Engine.gathered`."""
        return put_together(model)

    def evaluating(self, trainer: Any) -> AbstractContextManager[None]:
        """As `Engine.evaluating`."""
        return evaluated_as_it_is(trainer)

    @contextmanager
    def editing(self, model: PreTrainedModel, training: Training) -> Iterator[None]:
        """As `Engine.editing`; shards of what the main process has are distributed afterwards."""
        with whole(model, training.optimizer, self.accelerator), super().editing(model, training):
            yield

    def complete_(self, optimizer: Any) -> None:
        """As `Engine.complete_`: torch loads no state that lacks parameters, such as those that have just shrunk."""
        begin_states_(optimizer.optimizer)  # which accelerate has wrapped

    def leave_(self, model: nn.Module, training: Training) -> None:
        """As `Engine.leave_`."""
        gather_(model, training.optimizer)

    def average_gates_(self, gates: SteeredGates) -> None:
        """As `Engine.average_gates_`: FSDP averages only what it shards."""
        average_gradients_(gates, self.accelerator)

    def freeze_(self, teacher: PreTrainedModel, whole: bool) -> bool:
        """As `Engine.freeze_`; layer by layer, from the main process."""
        if whole:
            return super().freeze_(teacher, whole)
        shard_frozen_(teacher, self.accelerator.device)
        return True


@torch.no_grad()
def begin_states_(optimizer: Optimizer) -> None:
    """Give parameters that have made no step yet, in place, the optimizer's state that they would begin with.

    By a step without a gradient, a learning rate or weight decay, which then counts as none.
    """
    groups = optimizer.param_groups
    every = [parameter for group in groups for parameter in group["params"]]
    fresh = {id(one) for one in every if one.requires_grad and one not in optimizer.state}
    if not fresh:
        return
    gradients = [one.grad for one in every]
    settings: list[dict[str, Any]] = [
        {name: group[name] for name in ("lr", "weight_decay") if name in group} for group in groups
    ]
    for parameter in every:
        parameter.grad = torch.zeros_like(parameter) if id(parameter) in fresh else None
    for group, own in zip(groups, settings):
        group.update(dict.fromkeys(own, 0.0))
    optimizer.step()
    for group, own in zip(groups, settings):
        group.update(own)
    for parameter, gradient in zip(every, gradients):
        parameter.grad = gradient
        steps = optimizer.state[parameter].get("step") if id(parameter) in fresh else None
        if steps is not None:
            steps.zero_()


def shard_frozen_(model: PreTrainedModel, device: torch.device) -> None:
    """Shard a model that the main process has, in place, layer by layer; from here on all processes run it together.

    It must not be changed any more.
    """

    def shard() -> None:
        for layer in layers(model):
            fully_shard(layer)
        fully_shard(model)

    _shard_from_first_(model, device, shard, {})


@contextmanager
def whole(model: nn.Module, optimizer: Any, accelerator: Accelerator) -> Iterator[None]:
    """Inside this context a sharded model is whole on the main process, in place, in the host's memory.

    On the others it has no weights. One that is not sharded stays as it is. All processes must come here together.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    gather_(model, optimizer)
    try:
        yield
    finally:
        shard_(model, optimizer, accelerator)


@contextmanager
def put_together(model: nn.Module) -> Iterator[None]:
    """Inside this context a sharded model is whole on the main process, as it is in `whole`, but must not be changed.

    On leaving it the shards of before are there again: nothing has to be sent. All processes must come here together.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    from torch.distributed._composable_state import _module_state_mapping

    states = {module: _module_state_mapping[module] for module in model.modules() if module in _module_state_mapping}
    try:
        with restored(model):
            unshard_(model)
            yield
    finally:
        _module_state_mapping.update(states)


def gather_(model: nn.Module, optimizer: Any) -> None:
    """Make a sharded model whole in place on the main process, tensor by tensor; leave another as it is.

    Devices need room for one tensor only, and `streamed` runs it from the host's memory. The optimizer's state stays in
    shards: they are of use again to parameters that are the same afterwards.
    """
    if not isinstance(model, FSDPModule):
        return
    _train_(optimizer, unshard_(model))


def _train_(optimizer: Any, others: Mapping[int, Tensor]) -> None:
    """Let an optimizer train other parameters, in place, by the ids of those that it has, with their state."""
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            other = group["params"][index] = others.get(id(parameter), parameter)
            if other is not parameter and parameter in optimizer.state:
                optimizer.state[other] = optimizer.state.pop(parameter)


@torch.no_grad()
def unshard_(model: nn.Module) -> dict[int, Tensor]:
    """Make a sharded model whole in place on the main process; gives what is in the place of what, by its id."""
    # Private names of torch: imported here, so that nobody depends on them who does not shard.
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    home = HOST if is_main() else META
    shards = [shard for shard in model.parameters() if isinstance(shard, DTensor)]
    wholes = unsharded(model)
    wholes |= {id(shard): nn.Parameter(shard.full_tensor().to(home), shard.requires_grad) for shard in shards}
    exchange_(model, wholes)
    vars(model).pop("generate", None)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.__class__ = type(module).__bases__[1]
            _module_state_mapping.pop(module, None)
        for mark in (STATE_KEY, REGISTRY_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            vars(module).pop(mark, None)
    remove_hooks_(model, "torch.distributed.fsdp")
    return wholes


@torch.no_grad()
def shard_(model: nn.Module, optimizer: Any, accelerator: Accelerator) -> None:
    """Shard a model that the main process has, in place, as accelerate does by its plugin, tensor by tensor.

    The optimizer gets its parameters back.
    """
    bank = attached_gates(model)
    if bank is not None:
        bank.forget_scales_()  # of whole parameters
    before = {id(parameter): name for name, parameter in model.named_parameters()}
    left_out = _ignored(model, accelerator)
    _shard_from_first_(model, accelerator.device, lambda: fsdp2_prepare_model(accelerator, model), left_out)
    broadcast_(left_out.values())
    after = dict(model.named_parameters())
    _train_(optimizer, {key: after[name] for key, name in before.items()})
    if isinstance(model, GenerationMixin):
        register_fsdp_forward_method(model, "generate")


def _ignored(model: nn.Module, accelerator: Accelerator) -> dict[int, Tensor]:
    """The parameters that accelerate's plugin leaves whole, by their ids: gates, and what users name."""
    names = re.compile(accelerator.state.fsdp_plugin.ignored_modules)
    modules = [module for name, module in model.named_modules() if names.fullmatch(name)]
    return {id(parameter): parameter for module in modules for parameter in module.parameters()}


@torch.no_grad()
def _shard_from_first_(
    model: nn.Module, device: torch.device, shard: Callable[[], Any], left_out: Mapping[int, Tensor]
) -> None:
    """Shard a model in place, tensor by tensor, so that every process gets its shares from the main one.

    Args:
        model: whole on the main process; on the others its parameters may be on torch's meta device.
        device: of this process.
        shard: shards what has no values.
        left_out: parameters that it leaves whole, by their ids.
    """
    wholes = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in left_out}
    outlines = {
        id(whole): nn.Parameter(torch.empty_like(whole, device=META), whole.requires_grad) for whole in wholes.values()
    }
    buffers = {id(buffer): on_device(buffer, device) for buffer in model.buffers()}
    exchange_(model, {**outlines, **buffers})
    broadcast_(buffers.values())
    shard()
    after = dict(model.named_parameters())
    shares: dict[int, Tensor] = {}
    for name, whole in wholes.items():
        outline: Any = after[name]
        full = on_device(whole, device).detach().to(outline.dtype)
        share = distribute_tensor(full, outline.device_mesh, outline.placements)  # sends each process its own
        shares[id(outline)] = nn.Parameter(share, outline.requires_grad)
    exchange_(model, shares)
