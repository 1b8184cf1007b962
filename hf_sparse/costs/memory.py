"""Estimate the memory that a pruning run takes on every device, without weights: on torch's meta device."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_sparse.errors import SparsityError
from hf_sparse.modeling_hf_sparse import MODEL_TYPE_PREFIX
from hf_sparse.runtime.tables import Printed
from hf_sparse.structure.dependencies import FORWARD_ERRORS
from hf_sparse.structure.discovery import discover
from hf_sparse.structure.example_inputs import example_inputs
from hf_sparse.structure.stock import named_class

Engine = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
FEW_TOKENS = 1000
"""Vocabulary of the twin in which units are counted."""

ZERO_BUCKET = 500_000_000
"""Gradients that DeepSpeed's bucket has room for, whatever the model: its default reduce_bucket_size."""

ZERO_LIVE = 1_000_000_000
"""Parameters that stage 3 of DeepSpeed leaves gathered after use: its default stage3_max_live_parameters."""

_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class MemoryEstimate(Printed):
    """Bytes on every device, by what they are for; prints as a table.

    Attributes:
        parts: bytes by purpose during the search, when most memory is needed.
        shrinking: the peak while the model shrinks.
        host: bytes of the host's memory that the main process takes meanwhile, to gather shards or where weights are
            frozen; else 0.
        units: attention heads and FFN neurons that get gates.
    """

    parts: Mapping[str, int]
    shrinking: int
    host: int
    units: int

    @property
    def training(self) -> int:
        """The peak of a training step."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        rows = [*self.parts.items(), ("peak of a step", self.training), ("peak while shrinking", self.shrinking)]
        rows += [("on the host of the main process", self.host)] if self.host else []
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {size / 2**30:9.3f} GiB" for name, size in rows)


def estimate_memory(
    config: PreTrainedConfig,
    engine: Engine = "single",
    processes: int = 1,
    batch_size: int = 8,
    sequence_length: int = 512,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    teacher: PreTrainedConfig | None = None,
    target: float = 0.5,
    adapter_rank: int | None = None,
) -> MemoryEstimate:
    """Estimate the memory that training a model with gates, by AdamW, takes on every device, from its config.

    Activations are those that a forward on the meta device keeps for its backward; heads and neurons are counted in a
    small model of two layers. Allocators, kernels and communication take some more: leave a tenth.

    Args:
        config: of the model; nothing is downloaded or allocated for its weights.
        engine: one device, DDP, FSDP2, or DeepSpeed ZeRO of stage 1, 2 or 3.
        processes: the number of devices.
        batch_size: sequences on each device in one step.
        sequence_length: tokens of each sequence.
        bf16: mixed precision; without it and with FSDP weights are in float32, else in the dtype of the config.
        gradient_checkpointing: keep the inputs of layers only, and compute the rest twice.
        teacher: the config of a dense model to learn from, which is sharded if weights are.
        target: share of the prunable parameters to remove.
        adapter_rank: of LoRA beside all linear layers, whose own weights are then frozen; None trains all weights.

    Raises:
        SparsityError: the architecture is unknown, was pruned already, has nothing to prune or cannot be run without
            weights, or a number is outside its range.
    """
    if min(processes, batch_size, sequence_length) < 1 or not 0 < target < 1:
        raise SparsityError(
            f"{processes} processes, {batch_size} sequences of {sequence_length} tokens, target {target}: give numbers "
            "of at least 1, and a target between 0 and 1"
        )
    if adapter_rank is not None and (adapter_rank < 1 or engine not in ("single", "ddp")):
        raise SparsityError(
            f"an adapter of rank {adapter_rank} with {engine}: give a rank of at least 1, and single or ddp"
        )
    if config.model_type.startswith(MODEL_TYPE_PREFIX):
        raise SparsityError(f"{config.model_type} is pruned already: give the model that it was pruned from")
    model = _on_meta(config)
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    layers = _layers(model)
    largest, inside = max(layers.values()), sum(layers.values())
    units, scaled, read = _gated(config, model)
    stored = 4 if engine == "fsdp" and bf16 else _bytes(config)
    compute = 2 if bf16 else stored
    share = processes if engine in ("fsdp", "zero3") else 1
    adapter = 0 if adapter_rank is None else _adapt_(model, adapter_rank)
    try:
        kept, states = _activations(model, batch_size, sequence_length, compute == 2)
    except FORWARD_ERRORS as error:
        raise SparsityError(
            f"{type(model).__name__} cannot be run on {sequence_length} tokens without weights "
            f"({str(error).splitlines()[0][:200]}): give fewer, or bf16, which some kernels need"
        ) from error
    if gradient_checkpointing:
        kept = states + kept // len(layers)
    zero = engine.startswith("zero")
    if zero and bf16:
        stored = 2
    parts = {
        "weights": stored * total // share,
        "gradients": stored * total // share,
        "optimizer": 2 * stored * total // share,
        "gates and their optimizer": 6 * 4 * units,
        "activations": kept,
    }
    # What is scaled is kept from forward to backward, or only within its layer where that is computed again.
    again = len(layers) if gradient_checkpointing else 1
    if adapter_rank is None:
        parts["scaled projections"] = compute * scaled // again
    else:
        parts |= {"adapter": 4 * adapter, "gradients": 4 * adapter, "optimizer": 8 * adapter}
        inputs = compute * batch_size * sequence_length * read
        # Those of a layer once more, times the slopes that are summed up to those of gates.
        parts["inputs that are scaled"] = inputs // again + inputs // len(layers)
    if zero:
        parts["optimizer"] = 8 * total // processes
        parts["optimizer's weights in float32"] = 4 * total // processes
        parts["gradients"] = stored * total // (processes if engine != "zero1" else 1)
        parts["bucket of gradients"] = stored * ZERO_BUCKET
    if engine == "zero3":
        parts["gathered weights"] = stored * min(total, ZERO_LIVE)
        parts["gradients in float32"] = 4 * total // processes if bf16 else 0
    if engine == "ddp":
        parts["buckets of gradients"] = parts["gradients"]
    if engine == "fsdp":
        parts["gathered layers"] = compute * (2 * largest + total - inside) + 4 * largest
    elif compute < stored and not zero and adapter_rank is None:
        parts["weights in bfloat16"] = 2 * (total - scaled)
    taught = 0
    if teacher is not None:
        other = _on_meta(teacher)
        size, its_layers = sum(parameter.numel() for parameter in other.parameters()), _layers(other)
        together = 2 * max(its_layers.values()) + size - sum(its_layers.values())
        taught = _bytes(teacher) * (size // share + together if share > 1 else size)
        parts["teacher"] = taught
        parts["teacher's hidden states"] = states
    # Outputs are compared in float32, first with masks; the smaller weights are copies, made before the larger ones go.
    copied = round(max(4 * scaled, 4 * (1 - target) * inside)) + (4 - stored) * total
    shrinking, host = parts["weights"] + (0 if zero else parts["optimizer"]) + taught, 0
    if adapter_rank is not None:
        shrinking, host = parts["optimizer"] + taught + 4 * (largest + total - inside), stored * total + copied
    elif engine in ("fsdp", "zero3"):  # weights stay on the host; the device has a layer at a time
        shrinking, host = shrinking + 4 * (largest + total - inside), stored * total + copied
    else:
        shrinking += copied
    return MemoryEstimate(parts, shrinking, host, units)


def _bytes(config: PreTrainedConfig) -> int:
    """Return the bytes of a weight in the dtype of the checkpoint, in which transformers loads it."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return dtype.itemsize


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    architecture: Any = named_class((config.architectures or ["?"])[0], "its config names")
    with torch.device("meta"):
        return architecture(copy.deepcopy(config))


def _layers(model: nn.Module) -> dict[str, int]:
    """Count the parameters of every layer, a layer being a member of the longest lists of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    inner = {id(child) for module in lists for child in module.modules() if child is not module}
    outer = [module for module in lists if id(module) not in inner]
    sizes = {
        f"{index}.{position}": sum(parameter.numel() for parameter in layer.parameters())
        for index, module in enumerate(outer)
        for position, layer in enumerate(module)
    }
    return sizes or {"0": sum(parameter.numel() for parameter in model.parameters())}


def _adapt_(model: PreTrainedModel, rank: int) -> int:
    """Freeze a model on the meta device, and put LoRA beside its linear layers, in place; returns its parameters."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _gated(config: PreTrainedConfig, model: PreTrainedModel) -> tuple[int, int, int]:
    """Count the units that get gates, the parameters that are scaled, and the inputs that these read for a token.

    From a small model of two layers.
    """
    small = copy.deepcopy(config)
    if getattr(small, "num_hidden_layers", 0) > 2:  # not every architecture has layers
        small.num_hidden_layers = 2
        if getattr(small, "layer_types", None) is not None:
            small.layer_types = small.layer_types[:2]
    text = small.get_text_config()
    if getattr(text, "vocab_size", 0) > FEW_TOKENS:  # they would take most of the time
        text.vocab_size = FEW_TOKENS
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(text, name, None)
    architecture: Any = type(model)
    structure = discover(architecture(small).eval())
    if not structure.blocks:
        raise SparsityError(f"{architecture.__name__} has no attention heads or FFN neurons that can be pruned exactly")
    counts: dict[str, list[int]] = {}
    for block in structure.blocks:
        counts.setdefault(_LAYER.sub(".N.", block.weight.parameter), []).append(block.units)
    units = scaled = read = 0.0
    for name, parameter in model.named_parameters():
        found = counts.get(_LAYER.sub(".N.", name))
        if found is not None:
            units += sum(found) / len(found)
            scaled += parameter.numel()
            read += max(parameter.shape)  # a projection is rarely to more than it is from
    return round(units), round(scaled), round(read)


def _activations(model: PreTrainedModel, batch: int, length: int, bf16: bool) -> tuple[int, int]:
    """Count the bytes that a training forward keeps for its backward, and those of states between layers among them."""
    model = (model.bfloat16() if bf16 else model.float()).train()
    inputs = _inputs(model, batch, length)
    with _kept(model) as kept:
        outputs = model(**inputs, output_hidden_states=True, return_dict=True)
        logits = outputs[0]
        F.cross_entropy(
            logits.flatten(0, -2).float(), torch.zeros(logits.flatten(0, -2).shape[0], dtype=torch.long, device="meta")
        )
    stacks = [outputs.get(name) for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")]
    states = sum(state.numel() * state.element_size() for stack in stacks if stack is not None for state in stack)
    return sum(kept.values()), states


def _inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    if model.main_input_name == "input_ids":
        ids = torch.ones(batch, length, dtype=torch.long, device="meta")
        # Without a mask, whose code would look for padding.
        return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    # Images, sound, ...: their size is that of the config.
    examples = example_inputs(model)
    return {name: value[:1].expand(batch, *value.shape[1:]) for name, value in examples.items()}


@contextmanager
def _kept(model: nn.Module) -> Iterator[dict[int, int]]:
    """Count the bytes, by storage, that autograd keeps inside this context, without the model's own parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def load_config(source: str) -> PreTrainedConfig:
    """Load the config of a directory or a repository.

    Raises:
        SparsityError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SparsityError(f"cannot read the config of {source}: {str(error).splitlines()[0]}") from None
