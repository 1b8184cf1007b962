"""`discover(model)`: attention, FFN and expert blocks found from structure, each proven exact before it is believed."""

import functools
import math
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.modeling_hf_sparse import MODEL_TYPE_PREFIX, padded_side
from hf_sparse.runtime.contexts import evaluating
from hf_sparse.structure.blocks import Block, ModelStructure, Slice
from hf_sparse.structure.dependencies import (
    FORWARD_ERRORS,
    Call,
    accepted,
    input_dim,
    leaving_no_hooks,
    probe,
    projections,
    record_calls,
    widths,
)
from hf_sparse.structure.example_inputs import example_inputs, placed
from hf_sparse.structure.experts import expert_neurons, stacked_weights
from hf_sparse.structure.ownership import CoupledError, Ownership, heads, neurons
from hf_sparse.structure.proof import prove, with_own_entries
from hf_sparse.structure.prunable import adapters, require_plain
from hf_sparse.structure.slicing import base_path, common_path

# The index of a layer or an expert: h.0, experts.expert_0.
_NUMBER = re.compile(r"(?:(?<=\.)|(?<=_)|^)\d+(?=\.|$)")

Kind = Literal["attention", "ffn", "experts"]


def discover(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> ModelStructure:
    """Find the blocks of a model whose units can be removed exactly; the model is not changed.

    Identical layers are examined once.

    Args:
        model: any transformers model; attached gates don't matter.
        inputs: a small batch that it can be run on, from any device; made from its config by default.

    Returns:
        The blocks in the order of the model, and what was found but cannot be pruned, with the reason.

    Raises:
        SparsityError: it is not a model of transformers, or is quantized, or no example inputs can be made for it, and
            none are given.
    """
    require_plain(model)
    inputs = example_inputs(model) if inputs is None else placed(inputs, model.device)
    with evaluating(model), _differentiable(model):
        return _Discovery(model, inputs).run()


@contextmanager
def _differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Let frozen parameters have gradients until the block ends."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(parameter.is_floating_point())
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class _Finding:
    """The result for one output projection: a block, or the reason why there is none."""

    path: str
    block: Block | None = None
    reason: str = ""


class _Discovery:
    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters())
        self.shared = _shared_parameters(model)
        self.resized = _resized_parameters(model)
        self.adapters = tuple(f"{path}." for path in adapters(model))
        self.projections = projections(model, inputs)
        self.probe = probe(model, inputs, self.projections)
        # Last, since some modules keep a state of their latest forward, which should have no graph.
        self.calls = self._asked_calls("use_cache") or record_calls(model, inputs)

    def run(self) -> ModelStructure:
        found: dict[str, list[_Finding]] = {}
        findings = []
        for path, module in self.modules.items():
            if padded_side(module) == "inputs":
                findings.append(
                    _Finding(path, reason="it has lost heads before, though its code counts on all: it is pruned once")
                )
            if not (path in self.projections or stacked_weights(module)):
                continue
            twin = self._twin(path, found)
            if twin is not None:
                finding = _translated(twin, path)
            else:
                finding = self._examine(path, module)
                if not finding.reason:
                    found.setdefault(_NUMBER.sub("*", path), []).append(finding)
            findings.append(finding)
        # An expert that saw too few tokens to tell its neurons apart may have a twin that saw more.
        for i, finding in enumerate(findings):
            twin = self._twin(finding.path, found) if finding.reason else None
            if twin is not None:
                findings[i] = _translated(twin, finding.path)
        blocks = _without_overlaps([finding.block for finding in findings if finding.block is not None])
        blocks = tuple(map(self._with_cache_of_its_own, self._with_stand_ins_of_their_own(blocks)))
        refused = [(finding.path, finding.reason) for finding in findings if finding.reason]
        if not refused:
            found_kinds = {block.kind for block in blocks}
            for units, kinds in (("attention heads", {"attention"}), ("FFN neurons", {"ffn", "experts"})):
                if not kinds & found_kinds:
                    reason = f"no projection was found whose inputs are {units} and nothing else"
                    refused.append((type(self.model).__name__, reason))
        return ModelStructure(blocks, tuple(refused))

    def _asked_calls(self, flag: str, paths: Container[str] | None = None) -> dict[str, Call]:
        """Record calls while the model is asked for all outputs and a cache, by path; nothing if that fails.

        A cache has to be asked for if the config turns it off by default, as is usual for training.
        """
        with suppress(*FORWARD_ERRORS), leaving_no_hooks(self.model):
            return record_calls(self.model, {**self.inputs, **accepted(self.model, flag)}, paths)
        return {}

    def _with_stand_ins_of_their_own(self, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        """Complete the stand-ins of blocks with what they have to do for caches and for attention weights."""
        stand_ins = {block.name: block.stand_in for block in blocks if block.stand_in is not None}
        asked = self._asked_calls("output_attentions", stand_ins)
        stand_ins = {
            name: with_own_entries(stand_in, self.calls.get(name), asked.get(name))
            for name, stand_in in stand_ins.items()
        }
        return tuple(replace(block, stand_in=stand_ins.get(block.name)) for block in blocks)

    def _with_cache_of_its_own(self, block: Block) -> Block:
        """Give a block the layer of the cache that it writes to itself, in place of that of an equal block."""
        if block.cached is None:
            return block
        return replace(block, cached=next(iter(self.calls[block.name].written), None))

    # ---- One block ----

    def _examine(self, path: str, module: nn.Module) -> _Finding:
        try:
            owned = self._ownership(path, module)
            if owned is None:
                return _Finding(path)
            kind, output, ownership = owned
            block = self._block(path, kind, output, ownership)
            base = base_path(self.model)
            if base and not all(f"{part.parameter}.".startswith(f"{base}.") for part in block.slices):
                raise CoupledError(f"it is outside of {base!r}, the base model, which is what checkpoints describe")
            if any(part.parameter.startswith(self.adapters) for part in block.slices):
                raise CoupledError("it has an adapter inside: merge it into the weights first")
            if tied := [part.parameter for part in block.slices if part.parameter in self.shared]:
                raise CoupledError(f"its parameter {tied[0]} is shared with another module")
            proven = prove(self.modules, block, self.calls)
            if proven.padded and any(part.parameter in self.resized for part in proven.slices):
                raise CoupledError("it has lost heads before, and what is left of it could only be padded")
            return _Finding(path, self._with_costs(proven))
        except CoupledError as reason:
            return _Finding(path, reason=str(reason))

    def _ownership(self, path: str, module: nn.Module) -> tuple[Kind, Slice, Ownership] | None:
        if stacked_weights(module):
            if path not in self.calls:
                return None
            found = expert_neurons(module, self.calls[path])
            if found is None:
                return None
            name, dim, ownership = found
            return "experts", Slice(f"{path}.{name}", dim, ownership.columns), ownership
        kind = self._kind(path) if path in self.probe.inputs else None
        if kind is None:
            return None
        ownership = heads(self.probe, path) if kind == "attention" else neurons(self.probe, path)
        if used := [name for name in ownership.channels if self._consumers[name] != {path}]:
            raise CoupledError(f"the outputs of {used[0]} are used elsewhere too")
        return kind, Slice(f"{path}.weight", input_dim(module), ownership.columns), ownership

    def _kind(self, path: str) -> Kind | None:
        """Find the kind of block that ends with a projection: attention, or an FFN, whose neurons feed nothing else."""
        producers = [name for name in self.probe.sources(path) if name in self.probe.leaves]
        exclusive = [name for name in producers if self._consumers[name] == {path}]
        residual = [widths(self.modules[name])[0] == widths(self.modules[path])[1] for name in producers]
        if not exclusive or not any(residual):
            return None
        if self.probe.attends(path):
            return "attention"
        return "ffn" if all(residual) and exclusive == producers else None

    def _block(self, path: str, kind: Kind, output: Slice, ownership: Ownership) -> Block:
        slices = [output]
        for name, index in ownership.channels.items():
            dim = 1 - input_dim(self.modules[name])
            slices.append(Slice(f"{name}.weight", dim, index))
            if f"{name}.bias" in self.parameters:
                slices.append(Slice(f"{name}.bias", 0, index))
        for name, (dim, index) in ownership.entries.items():
            slices.append(Slice(f"{path}.{name}" if kind == "experts" else name, dim, index))
        name = path if kind == "experts" else self._core(path, set(ownership.channels))
        return Block(
            name=name,
            kind=kind,
            layer=_layer(name),
            units=len(ownership.columns),
            unit_cost=0,
            unit_macs=0,
            output=path,
            columns=ownership.columns,
            slices=tuple(slices),
            heads_per_unit=ownership.heads_per_unit,
            head_dim=ownership.head_dim,
            # Grouped matrix multiplication reads rows of a multiple of 16 bytes.
            multiple=8 if kind == "experts" else 1,
        )

    def _with_costs(self, block: Block) -> Block:
        saved = {part.parameter: self._entries(part) for part in block.slices}
        macs = sum(count for name, count in saved.items() if self.parameters[name].ndim > 1)
        if block.kind == "experts":
            macs = math.ceil(macs * self._active_experts(block.output))
        return replace(block, unit_cost=sum(saved.values()), unit_macs=macs)

    def _entries(self, part: Slice) -> int:
        """Count the parameters that one unit owns."""
        parameter = self.parameters[part.parameter]
        return parameter.numel() // parameter.shape[part.dim] * part.index.shape[1]

    def _active_experts(self, path: str) -> float:
        """Share of the experts that see a token: what routes them comes as indices, shape (tokens, experts)."""
        call = self.calls[path]
        indices = [
            value
            for value in (*call.args, *call.kwargs.values())
            if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()
        ]
        experts = self.modules[path].get_parameter(stacked_weights(self.modules[path])[0]).shape[0]
        return min(1.0, indices[0].shape[1] / experts) if indices else 1.0

    def _core(self, path: str, producers: set[str]) -> str:
        """Find the module to remove when no unit is left: the block's own, or else what feeds its output projection."""
        home = common_path([*producers, path])
        reached = {*self.probe.sources(path)}
        reached |= {f"{name}.{part}" for name in [*self.probe.sources(path), path] for part in ("weight", "bias")}
        if home and all(f"{home}.{name}" in reached for name, _ in self.modules[home].named_parameters()):
            return home
        core = common_path(producers)
        while (parent := core.rpartition(".")[0]) and not f"{path}.".startswith(f"{parent}."):
            if not all(f"{parent}.{name}" in reached for name, _ in self.modules[parent].named_parameters()):
                break
            core = parent
        return core

    # ---- Layers that are alike ----

    @functools.cached_property
    def _consumers(self) -> dict[str, set[str]]:
        """Find the projections that each projection feeds."""
        found: dict[str, set[str]] = {name: set() for name in self.probe.leaves}
        for path in self.probe.inputs:
            for name in self.probe.sources(path):
                if name in found:
                    found[name].add(path)
        return found

    def _twin(self, path: str, found: Mapping[str, list[_Finding]]) -> _Finding | None:
        return next((one for one in found.get(_NUMBER.sub("*", path), []) if self._alike(one.path, path)), None)

    def _alike(self, one: str, other: str) -> bool:
        """Tell whether the modules around two projections are equal except for their weights."""
        for up in range(len(one.split("."))):
            first, second = (path.split(".")[: len(path.split(".")) - up] for path in (one, other))
            if first == second:
                return True
            mine, theirs = self._looks(".".join(first)), self._looks(".".join(second))
            if mine != theirs:
                return False
            if _NUMBER.search(first[-1]):
                return True
        return True

    def _looks(self, path: str) -> list[Any]:
        module = self.modules.get(path)
        if module is None:
            return []
        parts: list[Any] = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
        for name, child in module.named_modules():
            numbers = {key: value for key, value in vars(child).items() if type(value) is int and key != "layer_idx"}
            parts.append((name, type(child), sorted(numbers.items())))
        return parts


def _layer(path: str) -> int:
    """Return the index of the layer that a module is in; 0 outside of all layers."""
    layers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(layers[0]) if layers else 0


def _without_overlaps(blocks: list[Block]) -> tuple[Block, ...]:
    """Keep one unit of each block whose removal would also remove what other blocks slice, by giving it no stand-in."""

    slicing: dict[str, set[str]] = {}  # by module, the blocks that slice a parameter in it
    for block in blocks:
        for part in block.slices:
            path = part.parameter
            while path := path.rpartition(".")[0]:
                slicing.setdefault(path, set()).add(block.name)

    def overlaps(block: Block) -> bool:
        return any(slicing.get(path, set()) - {block.name} for path in (block.name, block.output))

    return tuple(replace(block, stand_in=None) if overlaps(block) else block for block in blocks)


def _translated(finding: _Finding, path: str) -> _Finding:
    """Translate a finding to another layer."""

    def there(other: str) -> str:
        parts, mine, theirs = other.split("."), finding.path.split("."), path.split(".")
        for i, (part, here) in enumerate(zip(parts, mine)):
            if part != here:
                break
            parts[i] = theirs[i]
        return ".".join(parts)

    block = finding.block
    if block is None:
        return _Finding(path)
    name = there(block.name)
    block = replace(
        block,
        name=name,
        layer=_layer(name),
        output=path,
        slices=tuple(replace(part, parameter=there(part.parameter)) for part in block.slices),
        attributes=tuple(replace(attribute, module=there(attribute.module)) for attribute in block.attributes),
        stand_in=None if block.stand_in is None else {**block.stand_in, "output": there(block.stand_in["output"])},
    )
    return _Finding(path, block)


def _resized_parameters(model: PreTrainedModel) -> set[str]:
    """Name the parameters that are smaller since an earlier round of pruning."""
    config: Any = model.config
    if not config.model_type.startswith(MODEL_TYPE_PREFIX):
        return set()
    prefix = f"{base_path(model)}." if base_path(model) else ""
    return {f"{prefix}{name}" for name in config.hf_sparse["shapes"]}


def _shared_parameters(model: nn.Module) -> set[str]:
    """Name the parameters that several modules own, such as embeddings tied to an output layer."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for owners in names.values() if len(owners) > 1 for name in owners}
