"""DeepSpeed ZeRO: it trains the weights, in engines that are built anew when the model changes; gates are left to us.

ZeRO keeps flat copies of the parameters that it starts with, and steps inside of backward. So gates stay out of it:
whole on every process, in float32, with an optimizer of their own. Nothing here imports deepspeed before it is in use.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from hf_sparse.engines.base import Engine, Training, average_gradients_, evaluated_as_it_is
from hf_sparse.engines.partitions import gather_partitions_, is_partitioned, partition_, set_float32_
from hf_sparse.engines.tensors import on_device, remove_hooks_
from hf_sparse.errors import SparsityError
from hf_sparse.gates.base import BANK, SteeredGates, attached_gates
from hf_sparse.runtime.contexts import plain_forward, unchanged_random_state
from hf_sparse.runtime.processes import broadcast_

GATES = "gates.safetensors"
"""Beside a checkpoint of DeepSpeed: gates in float32, and the state of their optimizer."""


class ZeRO(Engine):
    """Trains whole weights, with the optimizer's state in shards: stages 1 and 2."""

    optimizes_gates = False
    loads_when_prepared = True
    evaluates_others = False

    def check_(self) -> None:
        """As `Engine.check_`; also what could not be changed while it trains."""
        plugin = self.accelerator.state.deepspeed_plugin
        config, stage = plugin.deepspeed_config, plugin.zero_stage
        if stage == 0:
            raise SparsityError("ZeRO stage 0 is plain DDP: leave DeepSpeed out, or use stage 1, 2 or 3")
        for section in ("optimizer", "scheduler"):
            if section in config:
                raise SparsityError(
                    f"the DeepSpeed config has a section {section!r}: leave it out and give TrainingArguments instead, "
                    "so that the learning rate follows the search"
                )
        for name in ("offload_optimizer", "offload_param"):
            if config["zero_optimization"].get(name, {}).get("device", "none") != "none":
                raise SparsityError(f"{name} is not supported: set its device to none")
        if config["zero_optimization"].get("mics_shard_size", 0) > 0:
            raise SparsityError("mics_shard_size has shards in several copies, which are not kept alike: leave it out")
        if config.get("fp16", {}).get("enabled") is True:
            raise SparsityError("fp16 in DeepSpeed scales the gradients of gates as well: use bf16")
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise SparsityError("torch.compile and DeepSpeed do not go together here: leave one of them out")

    def hidden_gates(self, model: nn.Module) -> AbstractContextManager[None]:
        """As `Engine.hidden_gates`."""
        return without_gates(model)

    @contextmanager
    def preparing(self, model: PreTrainedModel) -> Iterator[None]:
        """As `Engine.preparing`; gates stay out of it.

        Raises:
            SparsityError: there is nothing else to train.
        """
        if not _trained(model):
            raise SparsityError(
                "all weights are frozen, so DeepSpeed has nothing to train: learn gates alone without it, by DDP"
            )
        gates = attached_gates(model)
        if gates is not None:
            gates.to(self.accelerator.device)
        with without_gates(model):
            yield

    def evaluating(self, trainer: Any) -> AbstractContextManager[None]:
        """As `Engine.evaluating`."""
        return evaluated_as_it_is(trainer)

    @contextmanager
    def editing(self, model: PreTrainedModel, training: Training) -> Iterator[None]:
        """As `Engine.editing`, but moments of the optimizer start anew: ZeRO counts steps for all parameters at once.

        The engine, the wrapper of its optimizer and the scheduler stay the same objects. Inside, weights are in
        float32, so they lose nothing.
        """
        with _rebuilt(model, training, self.accelerator):
            yield

    def leave_(self, model: nn.Module, training: Training) -> None:
        """As `Engine.leave_`."""
        dismantle_(model, training.wrapped)

    def average_gates_(self, gates: SteeredGates) -> None:
        """As `Engine.average_gates_`: DeepSpeed does not know of gates."""
        average_gradients_(gates, self.accelerator)

    def save_gates(self, gates: SteeredGates, optimizer: Optimizer | None, directory: Path) -> None:
        """As `Engine.save_gates`."""
        if optimizer is not None:
            save_gates(gates, optimizer, directory)

    def load_gates_(self, gates: SteeredGates, optimizer: Optimizer | None, directory: Path) -> None:
        """As `Engine.load_gates_`.

        Raises:
            SparsityError: a tensor is missing, or has another shape.
        """
        if optimizer is not None:
            load_gates_(gates, optimizer, directory)


@contextmanager
def _rebuilt(model: PreTrainedModel, training: Training, accelerator: Accelerator) -> Iterator[None]:
    """Change parameters of a model inside this context; on leaving it, in place, a new engine trains those that it has.

    Weights are whole inside, after stage 3 on the main process only.
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    engine, wrapper, scheduler = training.wrapped, training.optimizer, training.scheduler
    partitioned = is_partitioned(model)
    half = any(parameter.dtype != torch.float32 for parameter in _trained(model).values())
    rates = [(group["lr"], group["initial_lr"]) for group in scheduler.optimizer.param_groups]
    dismantle_(model, engine)
    wrapper.optimizer = scheduler.optimizer = None
    with plain_forward(model), unchanged_random_state(accelerator.device):
        yield
    weights = {name: parameter.detach() for name, parameter in _trained(model).items()} if half else {}
    with without_gates(model):  # which it would cast
        if partitioned:
            for parameter in model.parameters() if half else ():
                parameter.data = parameter.data.to(torch.bfloat16 if parameter.is_floating_point() else parameter.dtype)
            partition_(model, accelerator.deepspeed_config, accelerator.device)
        else:
            broadcast_([*model.parameters(), *model.buffers()])
            weights = {name: weight.clone() for name, weight in weights.items()}
        optimizer = training.fresh_optimizer()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"], group["initial_lr"] = rate
        new, zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=accelerator.deepspeed_config)
    for name, parameter in _trained(model).items() if half else ():
        whole = on_device(weights[name], accelerator.device)
        broadcast_([whole])
        (set_float32_ if partitioned else safe_set_full_fp32_param)(parameter, whole)
    gates = attached_gates(model)
    if gates is not None:
        gates.to(accelerator.device)
    engine.__dict__ = new.__dict__  # Trainer and accelerate hold on to the old one
    wrapper.optimizer, scheduler.optimizer = zero, optimizer


def dismantle_(model: nn.Module, engine: Any) -> None:
    """End the engine of a model, which is left, in place, in float32; after stage 3 on the main process only."""
    from deepspeed.utils import safe_get_full_fp32_param

    if is_partitioned(model):
        gather_partitions_(model)
    else:
        for parameter in _trained(model).values():
            if parameter.dtype != torch.float32:
                parameter.data = safe_get_full_fp32_param(parameter).clone()
    engine.destroy()
    remove_hooks_(model, "deepspeed")
    vars(engine).clear()  # weights and moments; and what shares it must not be destroyed once more when it is collected


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the engine trains, by name."""
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad and not name.startswith(BANK)}


@contextmanager
def without_gates(model: nn.Module) -> Iterator[None]:
    """Inside this context the gates of a model are not among its submodules."""
    gates = model._modules.pop(BANK, None)
    try:
        yield
    finally:
        if gates is not None:
            model._modules[BANK] = gates


def save_gates(gates: SteeredGates, optimizer: Optimizer, directory: Path) -> None:
    """Write gates and the state of their optimizer to a checkpoint."""
    named = [*gates.named_parameters(), *gates.named_buffers()]
    states = {
        f"optimizer.{name}.{key}": torch.as_tensor(value)
        for name, parameter in gates.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    save_file({**{name: tensor.detach().clone() for name, tensor in named}, **states}, directory / GATES)


@torch.no_grad()
def load_gates_(gates: SteeredGates, optimizer: Optimizer, directory: Path) -> None:
    """Read back what `save_gates` wrote, into gates and optimizer, in place.

    Raises:
        SparsityError: a tensor is missing, or has another shape.
    """
    tensors = load_file(directory / GATES)
    for name, tensor in [*gates.named_parameters(), *gates.named_buffers()]:
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise SparsityError(f"{directory / GATES} has no {name} of shape {tuple(tensor.shape)}")
        tensor.copy_(tensors[name])
    for name, parameter in gates.named_parameters():
        start = f"optimizer.{name}."
        state = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        optimizer.state[parameter] = {  # torch counts steps on the host
            key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
        }
