"""`compact(model, plan)`: remove the units that the plan drops, multiply the gates in, and prove that outputs stay."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse.compaction.head_tables import renumber_heads_
from hf_sparse.compaction.pruned_config import describe_, seal_
from hf_sparse.compaction.trial import computing_in, in_dtype, masked, small_batch, snapshot
from hf_sparse.errors import SparsityError
from hf_sparse.gates.attach import current_plan, detach_gates, gate_bank
from hf_sparse.gates.plan import PruningPlan
from hf_sparse.modeling_hf_sparse import MODEL_TYPE_PREFIX, LayerRecord, resize_
from hf_sparse.runtime.contexts import evaluating, hooked
from hf_sparse.runtime.copies import set_parameter_
from hf_sparse.runtime.streaming import HOST
from hf_sparse.runtime.tables import Printed
from hf_sparse.structure.blocks import Block, ModelStructure, layer_sizes
from hf_sparse.structure.comparison import (
    DOUBTFUL,
    RELATIVE_TOLERANCE,
    OptionalOutputs,
    disagreement,
    largest_difference,
    optional_outputs,
    outputs,
)
from hf_sparse.structure.dependencies import FORWARD_ERRORS
from hf_sparse.structure.discovery import discover
from hf_sparse.structure.example_inputs import example_inputs, placed
from hf_sparse.structure.prunable import require_prunable
from hf_sparse.structure.slicing import base_path, physical_units, rebased, shrink
from hf_sparse.structure.stock import computes_the_same, stock_config, to_stock_


@dataclass(frozen=True)
class CompactionReport(Printed):
    """What a compaction removed, and how exact it is; prints as a table.

    Attributes:
        plan: the units that every block of the model kept, with the units of zero weight that had to stay.
        max_abs_diff: largest difference between gated and compact outputs on the verification batch, in float32.
        parameters_before: parameters of the model without its gates.
        parameters_after: parameters of the compact model.
        removed: names of the attention and FFN sublayers that were removed as a whole.
        identities: paths of the norms that were removed, since nothing reads them any more.
        stock: whether a stock config can describe all sizes, so that the model is one of the stock class.
    """

    plan: PruningPlan
    max_abs_diff: float
    parameters_before: int
    parameters_after: int
    removed: tuple[str, ...]
    identities: tuple[str, ...]
    stock: bool

    def __str__(self) -> str:
        """Print what was removed and how exact it is, above the table of the plan."""
        share = 1 - self.parameters_after / self.parameters_before
        return (
            f"{self.parameters_before:,} parameters before, {self.parameters_after:,} after: {share:.1%} removed\n"
            f"outputs differ from those of the gated model by at most {self.max_abs_diff:.3g}\n"
            f"{len(self.removed)} sublayers and {len(self.identities)} norms removed as a whole"
            f"{'; the model is one of the stock class' if self.stock else ''}\n\n{self.plan}"
        )

    def then(self, later: "CompactionReport") -> "CompactionReport":
        """Join this report and that of a later compaction of the same model."""
        return CompactionReport(
            self.plan.then(later.plan),
            max(self.max_abs_diff, later.max_abs_diff),
            self.parameters_before,
            later.parameters_after,
            self.removed + later.removed,
            self.identities + later.identities,
            later.stock,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report in types that JSON has."""
        return {**vars(self), "plan": json.loads(self.plan.to_json())}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "CompactionReport":
        """Read a report from what `to_dict` returned.

        Raises:
            KeyError, TypeError, ValueError: the entry is something else.
        """
        return cls(
            PruningPlan.from_json(json.dumps(entry["plan"])),
            float(entry["max_abs_diff"]),
            int(entry["parameters_before"]),
            int(entry["parameters_after"]),
            tuple(entry["removed"]),
            tuple(entry["identities"]),
            bool(entry["stock"]),
        )


@torch.no_grad()
def compact(
    model: PreTrainedModel, plan: PruningPlan | None = None, inputs: Mapping[str, Any] | None = None
) -> CompactionReport:
    """Make a model physically smaller in place: attached gates are multiplied into its weights and removed.

    The model and its config get the classes of pruned models, so that `save_pretrained` writes a checkpoint that
    `from_pretrained` rebuilds. If all layers keep the same numbers and a stock config can describe them, the classes
    stay the stock ones, and the checkpoint needs no code.

    Outputs before and after are compared in float32, or in float64 if float32 leaves a doubt. On a small batch the
    comparison includes outputs that the model returns only when asked, such as router logits, and outputs that are
    computed with its cache.

    Args:
        model: with or without gates.
        plan: the units to keep; by default those that the attached gates keep.
        inputs: a batch to compare outputs on; made from the config by default.

    Returns:
        What was removed, and the largest difference between the outputs.

    Raises:
        SparsityError: the plan does not fit the model, or the outputs differ, or it is not a model of transformers with
            plain weights; the model is then as it was.
    """
    require_prunable(model)
    try:
        return _compacted(model, plan, inputs, torch.float32)
    except _DoubtfulError as doubtful:
        try:
            return _compacted(model, plan, inputs, torch.float64)
        except SparsityError:
            raise doubtful from None


class _DoubtfulError(SparsityError):
    """Outputs differ by what may be rounding where large values cancel."""


def _compacted(
    model: PreTrainedModel, plan: PruningPlan | None, inputs: Mapping[str, Any] | None, dtype: torch.dtype
) -> CompactionReport:
    """Do what `compact` does, with outputs compared in a dtype."""
    bank = gate_bank(model)
    inputs = dict(inputs) if inputs is not None else example_inputs(model)
    if model.device != HOST:  # from which it can run elsewhere
        inputs = placed(inputs, model.device)
    small = in_dtype(small_batch(model, inputs), dtype)
    structure = bank.whole if bank else discover(model, inputs)
    plan = plan or current_plan(model)
    kept = _kept_units(structure, plan)
    physical = {block.name: tuple(physical_units(block, kept[block.name]).tolist()) for block in structure.blocks}
    gates = _open_gates(structure, kept) | (bank.block_gates() if bank else {})
    before = _parameters(model) - (_parameters(bank) if bank else 0)
    removed = tuple(block.name for block in structure.blocks if not len(kept[block.name]))
    identities: tuple[str, ...] = ()
    restore = snapshot(model)
    inputs = in_dtype(inputs, dtype)
    with computing_in(dtype, model), evaluating(model):
        if bank:
            detach_gates(model)
        try:
            with masked(model, structure, gates, kept):
                reference = outputs(model, inputs)
                optional, returned = optional_outputs(model, small)
            idle = _idle_norms(model, optional, inputs) if removed else set()
            _compact_(model, structure, gates, kept, physical, before)
            if removed:
                identities = _drop_norms_(model, _idle_norms(model, optional, inputs) - idle, inputs)
            seal_(model)
            difference, scale = largest_difference(reference.values(), outputs(model, inputs).values())
            relative = difference / max(scale, 1.0)
            if not relative <= RELATIVE_TOLERANCE:
                kind = _DoubtfulError if relative <= DOUBTFUL * RELATIVE_TOLERANCE else SparsityError
                raise kind(
                    f"the compact model differs from the masked one by {difference:.3g} (outputs up to {scale:.3g}): "
                    f"{type(model).__name__} cannot be pruned exactly, and is left as it was"
                )
            if fault := disagreement(returned, optional.of(model)):
                raise _DoubtfulError(
                    f"the compact model differs from the masked one when it is asked for all its outputs: {fault}; "
                    f"{type(model).__name__} cannot be pruned exactly, and is left as it was"
                )
            config = _stock_form(model, structure, kept)
            stock = config is not None and computes_the_same(model, config, inputs)
            if config is not None and stock:
                to_stock_(model, config)
        except (torch.OutOfMemoryError, SparsityError):
            restore()
            raise
        except FORWARD_ERRORS as error:
            restore()
            raise SparsityError(
                f"{type(model).__name__} cannot be pruned exactly, and is left as it was: its compact form fails with "
                f"{str(error).split(chr(10))[0]!r}"
            ) from error
        except BaseException:
            restore()
            raise
    return CompactionReport(PruningPlan(physical), difference, before, _parameters(model), removed, identities, stock)


@torch.no_grad()
def compact_alike_(
    model: PreTrainedModel, structure: ModelStructure, done: CompactionReport, gated: Iterable[Block] = ()
) -> None:
    """Give a model, in place, the shapes that `compact` gave to another one of its kind.

    The caller fills in the weights. Nothing is computed with them, so they may be on torch's meta device.

    Args:
        model: without gates.
        structure: of both models, before compaction.
        done: the report of the other model.
        gated: blocks of the other model that had gates; their parameters become new ones even if no unit was removed.

    Raises:
        SparsityError: the other model was of another kind.
    """
    kept = _kept_units(structure, done.plan)
    gates = _open_gates(structure, kept) | {block.name: torch.ones(block.units) for block in gated}
    _compact_(model, structure, gates, kept, done.plan.kept, done.parameters_before)
    config = _stock_form(model, structure, kept) if done.stock else None
    unknown = sorted(set(done.identities) - dict(model.named_modules()).keys())
    if unknown or (config is None and done.stock):
        raise SparsityError(f"{type(model).__name__} is not what was made smaller: {unknown or 'it has no stock form'}")
    if done.identities:
        _put_identities_(model, done.identities)
    seal_(model)
    if config is not None:
        to_stock_(model, config)


def _kept_units(structure: ModelStructure, plan: PruningPlan) -> dict[str, Tensor]:
    """Return the kept units of every block, ascending.

    Raises:
        SparsityError: the plan names blocks or units that the model does not have.
    """
    unknown = sorted(set(plan.kept) - {block.name for block in structure.blocks})
    if unknown:
        raise SparsityError(f"the plan names blocks that the model does not have: {', '.join(unknown)}")
    kept = {}
    for block in structure.blocks:
        units = plan.kept.get(block.name, tuple(range(block.units)))
        if units and units[-1] >= block.units:
            raise SparsityError(f"the plan keeps unit {units[-1]} of {block.name}, which has {block.units} units")
        kept[block.name] = torch.tensor(units, dtype=torch.long)
    return kept


def _open_gates(structure: ModelStructure, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make gates of 1 for the blocks that lose units; other blocks are changed only if they have gates of their own."""
    return {b.name: torch.ones(b.units) for b in structure.blocks if len(kept[b.name]) < b.units}


def _with_gates(structure: ModelStructure, gates: Mapping[str, Tensor]) -> list[Block]:
    return [block for block in structure.blocks if block.name in gates]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- Slicing ----


def _compact_(
    model: PreTrainedModel,
    structure: ModelStructure,
    gates: dict[str, Tensor],
    kept: dict[str, Tensor],
    physical: Mapping[str, tuple[int, ...]],
    before: int,
) -> None:
    """Resize the model in place by the recipe that its checkpoint will carry, then fill in the new weights."""
    parameters = dict(model.named_parameters())
    recipe, values = shrink(parameters, _with_gates(structure, gates), kept, gates)
    recipe = rebased(recipe, base_path(model))
    recipe["parameters"] = before
    recipe["layers"] = [cast(LayerRecord, asdict(layer)) for layer in layer_sizes(structure, physical)]
    if recipe["shapes"] or recipe["removed"]:
        resize_(model.base_model, recipe)
        describe_(model, structure, kept, recipe)
    renumber_heads_(model, structure, physical)
    for path, value in values.items():
        # A new parameter, not a copy into the old one: that one still belongs to the model to go back to.
        set_parameter_(model, path, nn.Parameter(value.detach().clone(), parameters[path].requires_grad))


# ---- Norms that nothing reads any more ----


def _idle_norms(model: PreTrainedModel, optional: OptionalOutputs, inputs: dict[str, Any]) -> set[str]:
    """Find, by autograd, the norms (modules that only have vectors for parameters) on which no output depends."""
    shapes = {
        name: {parameter.ndim for parameter in module.parameters(recurse=False)}
        for name, module in model.named_modules()
        if not list(module.children())
    }
    names = {name for name, dimensions in shapes.items() if dimensions == {1}}
    scales: list[tuple[str, Tensor]] = []

    def scaled(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                names.discard(name)
                return None
            scales.append((name, torch.ones((), dtype=output.dtype, device=output.device, requires_grad=True)))
            multiplied: Tensor = output * scales[-1][1]
            return multiplied

        return hook

    handles = [model.get_submodule(name).register_forward_hook(scaled(name)) for name in names]
    with torch.enable_grad(), hooked(handles):
        # Some models change their cache in place, which has no gradient; a second forward reads the same norms anyway.
        found = [replace(optional, goes_on=False).of(model)]
        if optional.inputs is not inputs:
            found.append(outputs(model, inputs))
        read = [value.sum() for one in found for value in one.values() if value.requires_grad]
    if not scales or not read:
        return names
    slopes = torch.autograd.grad(read, [scale for _, scale in scales], allow_unused=True)
    return names - {name for (name, _), slope in zip(scales, slopes) if slope is not None}


def _drop_norms_(model: PreTrainedModel, names: set[str], inputs: dict[str, Any]) -> tuple[str, ...]:
    """Replace norms by identities in place, and return their paths; none if the model reads more than their outputs."""
    norms = {name: model.get_submodule(name) for name in sorted(names)}
    config: Any = model.config
    recipe = config.hf_sparse
    _put_identities_(model, norms)
    try:
        outputs(model, inputs)
    except FORWARD_ERRORS:
        # Their dtype, for one, or their device.
        for name, norm in norms.items():
            model.set_submodule(name, norm)
        config.hf_sparse = recipe
        return ()
    return tuple(norms)


def _put_identities_(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Put identities in the place of norms, in the model and in its recipe, in place."""
    config: Any = model.config
    prefix = f"{base_path(model)}." if base_path(model) else ""
    for name in names:
        model.set_submodule(name, nn.Identity())
    gone = [*config.hf_sparse["identities"], *(name.removeprefix(prefix) for name in names)]
    config.hf_sparse = {**config.hf_sparse, "identities": gone}


# ---- Back to stock ----


def _stock_form(model: PreTrainedModel, structure: ModelStructure, kept: dict[str, Tensor]) -> PreTrainedConfig | None:
    """Find the stock config that describes the sizes of a pruned model; None if there is none."""
    config: Any = model.config
    if not config.model_type.startswith(MODEL_TYPE_PREFIX):
        return None
    if any(config.hf_sparse[key] for key in ("selections", "padded", "removed", "identities")):
        return None
    return stock_config(model, model.state_dict(), list(structure.blocks), kept)
