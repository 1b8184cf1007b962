"""`GateBank`: the gates of a model, in groups that compete, and how dense they leave it."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_sparse.config import SparsityConfig
from hf_sparse.costs.table import CostTable
from hf_sparse.gates.base import Part, SteeredGates, log_importances
from hf_sparse.gates.controller import Controller
from hf_sparse.gates.layout import uniform_counts
from hf_sparse.gates.mathematics import GateGroup
from hf_sparse.gates.objective import DENSITIES
from hf_sparse.structure.blocks import Block, ModelStructure

TRUST = 0.75
"""How far kinds share the target by their sensitivities: 0 would remove as much of each.

These are slopes at open gates. What training makes up for they do not say, and of kinds with few units little.
"""

SUBLAYERS = "sublayers"
"""Name of the group whose gates scale whole sublayers."""


class GateBank(SteeredGates):
    """The gates of heads and neurons, in groups that compete.

    A unit's gate is its own, times that of its sublayer where those have gates, too. Densities are shares of
    `costs.prunable`, so those of a model that was pruned before start below 1.

    Args:
        structure: the blocks to gate.
        config: gate, group, cost and controller settings.
        costs: of these blocks, or of those that they were cut from.
        whole: these blocks among those without gates, which keep all of their units; by default there are no others.
    """

    config: SparsityConfig
    tables: Tensor
    same_kind: Tensor
    fixed_shares: Tensor

    def __init__(
        self, structure: ModelStructure, config: SparsityConfig, costs: CostTable, whole: ModelStructure | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.structure = structure
        self.whole = whole or structure
        self.costs = costs
        self.target = costs.target(config)
        self.asked_density = 1.0 - self.target
        """What the target leaves of the prunable cost of the model that the costs are of."""
        self.groups: dict[str, GateGroup] = {}
        self.members: dict[str, list[Block]] = {}
        for block in structure.blocks:
            self.members.setdefault(self._group_of(block), []).append(block)
        lines = {block.name: costs.line(block) for block in structure.blocks}
        if not config.sublayer_gates:  # nothing else can be charged for what a sublayer costs beside its units
            lines = {
                block.name: (costs.blocks[block.name][block.units] / block.units, 0.0) for block in structure.blocks
            }
        self.unit_costs = {name: unit for name, (unit, _) in lines.items()}
        places = {block.name: place for place, block in enumerate(structure.blocks)}
        for name, blocks in self.members.items():
            share = torch.cat([torch.full((block.units,), self._share(block)) for block in blocks])
            self.groups[name] = GateGroup(share, config.gate, config.t0)
            self.add_module(name, self.groups[name])
            members = torch.cat([torch.full((block.units,), places[block.name]) for block in blocks])
            self.register_buffer(f"{name}_blocks", members, persistent=False)
        fixed = torch.tensor([lines[block.name][1] for block in structure.blocks]) / costs.prunable
        self.register_buffer("fixed_shares", fixed, persistent=False)
        if config.sublayer_gates:
            self.add_module(SUBLAYERS, GateGroup(fixed, config.gate, config.t0))
        widest = max(block.units for block in structure.blocks)
        tables = torch.zeros(len(structure.blocks), widest + 1)
        for table, block in zip(tables, structure.blocks):
            table[: block.units + 1] = torch.tensor(costs.blocks[block.name][: block.units + 1]) / costs.prunable
        self.register_buffer("tables", tables, persistent=False)
        kinds = [block.kind for block in structure.blocks]
        alike = torch.tensor([[one == other for other in kinds] for one in kinds])
        self.register_buffer("same_kind", alike, persistent=False)
        self.filling = self._expected_filling()
        self.start_density = sum(costs.blocks[block.name][block.units] for block in structure.blocks) / costs.prunable
        self.controller = Controller(config.controller_gain, *self._descent())

    def _expected_filling(self) -> float:
        """Estimate the density of the closed units that stay because numbers are rounded up; 0 if gates pay for it."""
        added = 0.0
        for block, table in zip(self.structure.blocks, self.tables):
            counts = range(1, block.units + 1)
            physical = torch.tensor([block.physical(count) for count in counts])
            added += (table[physical] - table[1 : block.units + 1]).mean().item()
        return added

    def _group_of(self, block: Block) -> str:
        """Name the group that the units of a block compete in."""
        by_layer = self.config.layout == "uniform" or self.config.group == "layer"
        return block.name.replace(".", "-") if by_layer else block.kind

    def _share(self, block: Block) -> float:
        return self.unit_costs[block.name] / self.costs.prunable

    def _descent(self) -> tuple[Tensor, Tensor]:
        """Choose the densities to start from and to end at: of the model, its kinds, or in a uniform layout its blocks.

        Those of kinds and blocks are in units of what they are at the start.
        """
        if self.config.shares_target:
            count = len(self.groups)
            return torch.ones(count), torch.full((count,), self.target_density / self.start_density)
        if self.config.layout == "free":
            return torch.tensor([self.start_density]), torch.tensor([self.target_density])
        blocks = self.structure.blocks
        counts = uniform_counts(blocks, self.unit_costs, self.asked_density / self.start_density)
        ends = [counts[block.kind] / block.units for block in blocks]
        return torch.ones(len(blocks)), torch.tensor(ends)

    @property
    def target_density(self) -> float:
        """The density of open gates to end at, so that the model then has the density that was asked for.

        It leaves room for closed units that stay because numbers are rounded up. In a uniform layout it is the nearest
        density that such a layout can have.
        """
        if self.config.layout == "free":
            return self.asked_density - self.filling
        shares = [self._share(block) * block.units for block in self.structure.blocks]
        return sum(share * end for share, end in zip(shares, self.controller.targets.tolist()))

    @property
    def _usual_warm_start(self) -> float:
        """Default warm-start power, from recipes/benchmark: where few units stay, sensitivities deserve more trust."""
        return 1.0 if self.target > 0.9 or self.config.shares_target else 0.5

    @functools.cached_property
    def largest_unit(self) -> float:
        """The largest share of the prunable cost that is lost with one unit, or with units removed together."""
        return float(self.tables.diff(dim=1).max())

    # ---- Gates ----

    def parts(self) -> list[Part]:
        """Divide the gates into those that are held to a schedule of their own: of each kind, or all."""
        if not self.config.shares_target:
            return super().parts()
        found = []
        for (name, group), target in zip(self.groups.items(), self.controller.targets.tolist()):
            density = functools.partial(self._kind_density, name)
            found.append(Part(list(group.parameters()), density, 1.0, target, self._kind_units[name], [group.beta]))
        return found

    @functools.cached_property
    def _kind_units(self) -> dict[str, float]:
        """The largest density that a kind loses with one unit, by kind."""
        largest = self.tables.diff(dim=1).amax(1)
        return {
            name: float(largest[self.get_buffer(f"{name}_blocks")].max()) / group.share
            for name, group in self.groups.items()
        }

    def _kind_density(self, kind: str) -> Tensor:
        """Compute the exact density of one kind, shape (); 1 while all of its gates are open."""
        return self.densities({kind: self.groups[kind]()})[kind]

    def group_gates(self) -> dict[str, Tensor]:
        """Compute the gates of every group's units, by group, shape (units,)."""
        gates = {name: group() for name, group in self.groups.items()}
        if self.config.sublayer_gates:
            sublayers = self._sublayer_gates()
            gates = {name: gate * sublayers[self.get_buffer(f"{name}_blocks")] for name, gate in gates.items()}
        return gates

    def _sublayer_gates(self) -> Tensor:
        """Compute the gate of every block, shape (blocks,)."""
        return self.get_submodule(SUBLAYERS)()

    def start_from_(self, sensitivities: Mapping[str, Tensor], power: float) -> None:
        """Set the importances in place to a power of the sensitivities per cost; every gate stays exactly 1.

        Half of a mean squared slope, times the tokens of a row, is about what the loss rises by without the unit, so
        sums over units of any kind can be compared. Divided by what units cost, they say what is cheapest to remove.

        Args:
            sensitivities: how much the loss depends on each unit, by block name, not negative, shape (units,).
            power: 0 makes all importances equal.
        """
        least = min(cost for cost in self.unit_costs.values() if cost > 0)  # some cost no measurable time
        found = {}
        for name, blocks in self.members.items():
            costs = [max(self.unit_costs[block.name], least) for block in blocks]
            found[name] = torch.cat([sensitivities[block.name] / cost for block, cost in zip(blocks, costs)])
        if self.config.shares_target:
            self._share_target_(found)
        for name, group in self.groups.items():
            scores = found[name]
            if scores.any():
                group.open_(log_importances(scores, power).to(group.alpha))

    def _share_target_(self, scores: Mapping[str, Tensor]) -> None:
        """Choose in place how dense each kind ends: what is least sensitive per cost goes, whatever its kind.

        Args:
            scores: sensitivities per cost, by group, shape (units,).
        """
        names = list(self.groups)
        joined = torch.cat([scores[name] for name in names])
        shares = torch.cat([group.weights * group.share for group in self.groups.values()]).to(joined.device)
        kinds = torch.cat([torch.full((len(scores[name]),), place) for place, name in enumerate(names)])
        order = joined.argsort()
        stays = torch.ones_like(shares)
        stays[order] = (shares[order].cumsum(0) > self.start_density - self.target_density).to(shares)
        left = torch.zeros(len(names)).index_add_(0, kinds, (stays * shares).float().cpu())
        whole = torch.tensor([group.share for group in self.groups.values()])
        left *= self.target_density / left.sum()  # without what the last unit is more than was left to remove
        even = self.target_density / self.start_density
        self.controller.targets.copy_(TRUST * (left / whole).clamp(max=1.0) + (1 - TRUST) * even)

    def pooled(self, name: str, values: Tensor) -> Tensor:
        """Sum values over the columns of every unit of a block, shape (units,)."""
        return next(block for block in self.structure.blocks if block.name == name).column_sums(values)

    def block_gates(self) -> dict[str, Tensor]:
        """Compute the gates of every block, by block name, shape (units,)."""
        return self._by_block(self.group_gates())

    def block_importances(self) -> dict[str, Tensor]:
        """Return the logarithms of the importances of every block's units, by block name, shape (units,)."""
        return self._by_block({name: group.alpha for name, group in self.groups.items()})

    def _by_block(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, of_group in values.items():
            parts = of_group.split([block.units for block in self.members[name]])
            found.update({block.name: part for block, part in zip(self.members[name], parts)})
        return found

    def scales(self) -> dict[str, Tensor]:
        """Compute the scale of every block's output projection, by block name."""
        gates = self.block_gates()
        return {
            block.name: block.column_scale(gates[block.name], self._scales[block.name].ndim)
            for block in self.structure.blocks
        }

    # ---- How dense they are ----

    @torch.no_grad()
    def counts(self, gates: dict[str, Tensor]) -> Tensor:
        """Count the open gates of every block, shape (blocks,)."""
        counts = torch.zeros(len(self.tables), dtype=torch.long, device=self.tables.device)
        for name, gate in gates.items():
            counts.index_add_(0, self.get_buffer(f"{name}_blocks"), (gate > 0).long())
        return counts

    @torch.no_grad()
    def _block_densities(self, counts: Tensor) -> Tensor:
        return self.tables.gather(1, counts.unsqueeze(1)).squeeze(1)

    def densities(self, gates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the exact cost-weighted density of every kind, shape (); 1 while all of its gates are open."""
        left = self._block_densities(self.counts(gates))
        whole = self.tables.amax(1)
        places = {block.kind: alike for block, alike in zip(self.structure.blocks, self.same_kind)}
        return {kind: left[place].sum() / whole[place].sum() for kind, place in places.items()}

    def density(self, gates: dict[str, Tensor]) -> Tensor:
        """Compute the exact cost-weighted density of the model, shape ().

        In a uniform layout every block counts as many units as the widest block of its kind has, since those will stay.
        """
        counts = self.counts(gates)
        if self.config.layout == "uniform":
            counts = torch.where(self.same_kind, counts, 0).amax(1)
        return self._block_densities(counts).sum()

    def steered_densities(self, gates: dict[str, Tensor]) -> Tensor:
        """Compute the densities that are held to their schedule, shape (k,): of the model, its kinds, or its blocks."""
        if self.config.shares_target:
            return torch.stack(list(self.densities(gates).values()))
        if self.config.layout == "free":
            return self.density(gates).unsqueeze(0)
        return self._block_densities(self.counts(gates)) / self.tables.amax(1)

    def penalties(self, gates: dict[str, Tensor]) -> Tensor:
        """Compute the parts of R with a lambda each, shape (k,): effective densities times shares of the cost."""
        density = DENSITIES[self.config.gate]
        parts = [
            density(gates[name], group.weights, self.config.p) * group.share for name, group in self.groups.items()
        ]
        if self.config.layout == "uniform" or self.config.shares_target:
            return torch.stack(parts)
        if self.config.sublayer_gates:
            sublayers = self._sublayer_gates()
            parts.append(DENSITIES["relative"](sublayers, self.fixed_shares, self.config.p))
        return torch.stack(parts).sum(0, keepdim=True)
