"""Peers that rank units or layers once, cut the lowest, and fine-tune, such as Torch-Pruning and Taylor rankings."""

import copy
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse import PruningPlan, SparsityConfig, SparsityError
from hf_sparse.costs.table import CostTable, parameter_costs
from hf_sparse.structure.blocks import ModelStructure
from hf_sparse.structure.discovery import discover

Batch = Mapping[str, Tensor]
RANKINGS = ("taylor", "wanda", "activation", "magnitude", "random", "layers")
MOST_HEADS = 0.78  # share of the heads of MiniLM that Torch-Pruning removes before it skips layers


def plan_by_rank(
    method: str, model: PreTrainedModel, batches: Iterable[Batch], target: float, seed: int
) -> PruningPlan:
    """What a one-shot method keeps of a fine-tuned model.

    Args:
        method: "torch-pruning", or one of RANKINGS.
        model: fine-tuned, dense; left as it is.
        batches: with labels, for the methods that look at gradients or activations, on the device to find them on.
        target: fraction of the prunable parameters to remove.
        seed: of the random choice.
    """
    structure = discover(model)
    costs = parameter_costs(structure, SparsityConfig(round_to=1))
    if method == "torch-pruning":
        return _torch_pruning(model, structure, costs, batches, target)
    if method == "layers":
        return _least_influence(model, structure, costs, batches, target)
    rankings = {
        "taylor": _taylor,
        "wanda": _wanda,
        "activation": _activation,
        "magnitude": _magnitude,
        "random": _random,
    }
    return _lowest_first(rankings[method](model, structure, batches, seed), structure, costs, target)


def _lowest_first(
    scores: Mapping[str, Tensor], structure: ModelStructure, costs: CostTable, target: float
) -> PruningPlan:
    """Remove the units of the lowest score over all layers, from each kind until the target is reached there.

    Scores of heads and neurons are not comparable: ranked together, every head of MiniLM would go before any neuron.
    """
    kept = {block.name: set(range(block.units)) for block in structure.blocks}
    for kind in {block.kind for block in structure.blocks}:
        blocks = [block for block in structure.blocks if block.kind == kind]
        left = target * sum(costs.blocks[block.name][-1] for block in blocks)
        for _, name, unit, cost in sorted(
            (float(scores[block.name][unit]), block.name, unit, block.unit_cost)
            for block in blocks
            for unit in range(block.units)
        ):
            if left < cost / 2:
                break
            kept[name].remove(unit)
            left -= cost
    return PruningPlan({name: tuple(sorted(remaining)) for name, remaining in kept.items()})


def _taylor(
    model: PreTrainedModel, structure: ModelStructure, batches: Iterable[Batch], seed: int
) -> dict[str, Tensor]:
    """Mean over batches of |dL/dg| for a gate g = 1 on every unit (Michel et al., arXiv:1905.10650, section 4.1)."""
    batches = list(batches)
    taught = _copy_beside(model, batches[0])
    scores = {block.name: torch.zeros(block.units) for block in structure.blocks}
    for batch in batches:
        taught.zero_grad()
        taught(**batch).loss.backward()
        for block in structure.blocks:
            weight = taught.get_parameter(block.weight.parameter)
            assert weight.grad is not None
            by_column = (weight.grad * weight).detach().movedim(block.weight.dim, 0).flatten(1).sum(1)
            scores[block.name] += by_column[block.columns].sum(1).abs().cpu()
    return scores


def _column_sizes(model: PreTrainedModel, structure: ModelStructure, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean square of every input column of the output projections over all tokens, by block."""
    batches = list(batches)
    asked = _copy_beside(model, batches[0])
    totals = {block.name: torch.zeros(()) for block in structure.blocks}

    def add(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            totals[name] = totals[name] + args[0].float().square().flatten(0, -2).mean(0).cpu() / len(batches)

        return hook

    for block in structure.blocks:
        asked.get_submodule(block.output).register_forward_pre_hook(add(block.name))
    with torch.inference_mode():
        for batch in batches:
            asked(**batch)
    return totals


def _within_layers(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Places among the scores of the same layer, from 0 to 1, by which every layer loses as much."""
    return {name: score.argsort().argsort() / len(score) for name, score in scores.items()}


def _wanda(model: PreTrainedModel, structure: ModelStructure, batches: Iterable[Batch], seed: int) -> dict[str, Tensor]:
    """Squared sizes of columns times those of the weights that read them, by layer.

    Wanda-sp of An et al., arXiv:2312.11983.
    """
    scores, sizes = {}, _column_sizes(model, structure, batches)
    for block in structure.blocks:
        weight = model.get_parameter(block.weight.parameter).detach()
        readers = weight.square().movedim(block.weight.dim, 0).flatten(1).sum(1)
        scores[block.name] = (readers * sizes[block.name])[block.columns].sum(1)
    return _within_layers(scores)


def _activation(
    model: PreTrainedModel, structure: ModelStructure, batches: Iterable[Batch], seed: int
) -> dict[str, Tensor]:
    """Size of what units put out, by layer (Muralidharan et al., arXiv:2407.14679, section 2.2)."""
    sizes = _column_sizes(model, structure, batches)
    return _within_layers({block.name: sizes[block.name][block.columns].sum(1).sqrt() for block in structure.blocks})


def _least_influence(
    model: PreTrainedModel, structure: ModelStructure, costs: CostTable, batches: Iterable[Batch], target: float
) -> PruningPlan:
    """Remove whole layers that change their input least in direction (Men et al., arXiv:2403.03853, section 3.1)."""
    batches = list(batches)
    asked = _copy_beside(model, batches[0])
    changes: list[float] = []
    with torch.inference_mode():
        for batch in batches:
            states = asked(**batch, output_hidden_states=True).hidden_states
            likeness = [torch.cosine_similarity(one, other, dim=-1).mean().item() for one, other in pairwise(states)]
            changes = [total - alike for total, alike in zip(changes or [0.0] * len(likeness), likeness)]
    layers = sorted(range(len(changes)), key=changes.__getitem__)
    removed: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        more = removed | {block.name: () for block in structure.blocks if block.layer == layer}
        if abs(costs.removed(dict.fromkeys(more, 0)) - target) > abs(costs.removed(dict.fromkeys(removed, 0)) - target):
            break
        removed = more
    return PruningPlan(removed)


def _copy_beside(model: PreTrainedModel, batch: Batch) -> nn.Module:
    """A copy without gradients, in evaluation mode, on the device of a batch."""
    copied: nn.Module = copy.deepcopy(model)
    copied.zero_grad()
    return copied.eval().to(next(iter(batch.values())).device)


def _magnitude(
    model: PreTrainedModel, structure: ModelStructure, batches: Iterable[Batch], seed: int
) -> dict[str, Tensor]:
    """Squared norm of all weights that a unit owns."""
    scores = {}
    for block in structure.blocks:
        score = torch.zeros(block.units)
        for part in block.slices:
            weight = model.get_parameter(part.parameter).detach()
            squares = weight.square().movedim(part.dim, 0).reshape(weight.shape[part.dim], -1).sum(1)  # of biases, too
            score += squares[part.index].sum(1)
        scores[block.name] = score
    return scores


def _random(
    model: PreTrainedModel, structure: ModelStructure, batches: Iterable[Batch], seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {block.name: torch.rand(block.units, generator=generator) for block in structure.blocks}


def _torch_pruning(
    model: PreTrainedModel, structure: ModelStructure, costs: CostTable, batches: Iterable[Batch], target: float
) -> PruningPlan:
    """Torch-Pruning's group Taylor importance, global over layers, for whole heads and FFN neurons.

    It takes ratios of heads and of neurons and not of parameters; one ratio for both is found by bisection, so that the
    parameters removed come closest to the target. Asked for more heads than MOST_HEADS it leaves layers alone that
    would lose all of them, and removes less.
    """
    low, high, best = 0.0, 1.0, PruningPlan({})
    batches = list(batches)
    taught = _copy_beside(model, batches[0])
    for batch in batches:
        (taught(**batch).loss / len(batches)).backward()
    taught.cpu()  # its gradients, too
    gradients = {name: parameter.grad for name, parameter in taught.named_parameters()}
    for _ in range(9):
        ratio = (low + high) / 2
        plan = _torch_pruning_at(model, structure, batches[0], gradients, ratio)
        best = min(best, plan, key=lambda plan: abs(_removed(plan, costs) - target))
        low, high = (ratio, high) if _removed(plan, costs) < target else (low, ratio)
    return best


def _removed(plan: PruningPlan, costs: CostTable) -> float:
    return costs.removed({name: len(units) for name, units in plan.kept.items()})


def _torch_pruning_at(
    model: PreTrainedModel,
    structure: ModelStructure,
    batch: Batch,
    gradients: Mapping[str, Tensor | None],
    ratio: float,
) -> PruningPlan:
    import torch_pruning

    pruned: Any = copy.deepcopy(model).eval()
    heads, ignored = {}, []
    for block in structure.blocks:
        ignored.append(pruned.get_submodule(block.output))
        if block.kind == "attention":
            attention = pruned.get_submodule(block.name)
            heads.update({projection: block.units for projection in (attention.query, attention.key, attention.value)})
    ignored += [module for module in (pruned.base_model.pooler, pruned.classifier) if module is not None]
    example = {name: value.cpu() for name, value in batch.items() if name != "labels"}
    pruner = torch_pruning.pruner.BasePruner(
        pruned,
        example,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=ratio,
        head_pruning_ratio=min(ratio, MOST_HEADS),
        ignored_layers=ignored,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        output_transform=lambda output: output.logits,
    )
    for name, parameter in pruned.named_parameters():
        parameter.grad = gradients[name]
    pruner.step()
    kept = {}
    for block in structure.blocks:
        path = block.slices[0].parameter.rpartition(".")[0]
        kept[block.name] = _units_left(model, pruned, block.columns, path)
    return PruningPlan(kept)


def _units_left(before: nn.Module, after: nn.Module, columns: Tensor, path: str) -> tuple[int, ...]:
    """The units whose columns of a projection are still there, found by their contents, which cutting leaves alone."""
    old, new = (model.get_parameter(f"{path}.weight").detach() for model in (before, after))
    places = {column.numpy().tobytes(): index for index, column in enumerate(old.T.contiguous())}
    left = {places[column.numpy().tobytes()] for column in new.T.contiguous()}
    units = tuple(unit for unit, owned in enumerate(columns.tolist()) if set(owned) <= left)
    if sum(len(columns[unit]) for unit in units) != len(left):
        raise SparsityError(f"Torch-Pruning left parts of heads in {path}")
    return units
