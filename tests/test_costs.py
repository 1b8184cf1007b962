"""What units cost: counted, or measured on this device."""

import json
import resource
import sys
from pathlib import Path

import pytest
import torch
from pruning import bert, llama, rows, training_arguments
from torch import nn
from transformers import PreTrainedModel

from hf_sparse import SparseTrainer, SparsityConfig, SparsityError, attach_gates, compact, discover
from hf_sparse.costs import latency
from hf_sparse.costs.latency import measured_costs
from hf_sparse.costs.macs import count_macs
from hf_sparse.costs.table import CostTable, cost_batch, enlarged, memory_costs, parameter_costs
from hf_sparse.gates.attach import require_bank
from hf_sparse.report.generation import generations
from hf_sparse.runtime.timing import shortest_ms
from hf_sparse.structure.example_inputs import example_inputs

SMALL = {"cost": "latency", "cost_batch_size": 4, "cost_sequence_length": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(latency, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def wide() -> PreTrainedModel:
    return bert(layers=3, hidden_size=64, num_attention_heads=8, intermediate_size=256)


def test_counted_costs_are_those_of_the_parameters_that_go() -> None:
    model = wide()
    structure = discover(model)
    costs = parameter_costs(structure, SparsityConfig())
    before = model.num_parameters()
    attach_gates(model, SparsityConfig())
    bank = require_bank(model)
    with torch.no_grad():
        bank.groups["ffn"].alpha[:100] = -20.0
    plan = compact(model).plan
    kept = {name: len(units) for name, units in plan.kept.items()}
    assert costs.removed(kept) == pytest.approx((before - model.num_parameters()) / costs.prunable)


def test_memory_is_that_of_weights_and_of_a_full_cache() -> None:
    model, config = llama(), SparsityConfig(cost="memory", cost_batch_size=3, cost_sequence_length=20)
    structure = discover(model)
    counted, weights = memory_costs(structure, config), parameter_costs(structure, config)
    [generation] = generations([model], {"input_ids": torch.arange(5, 13)[None]})
    assert generation.cache_bytes_per_token is not None
    assert 4 * (counted.prunable - weights.prunable) == 3 * 20 * generation.cache_bytes_per_token
    neurons = [block.name for block in structure.blocks if block.kind == "ffn"]
    assert all(counted.blocks[name] == weights.blocks[name] for name in neurons)
    assert attach_gates(model, config).costs == counted


@pytest.mark.parametrize("cost", ["params", "macs"])
def test_a_target_of_the_whole_model_counts_all_of_it(cost: str, tmp_path: Path) -> None:
    model, batch = wide(), example_inputs(wide())
    before = {"params": model.num_parameters(), "macs": count_macs(model, batch)}[cost]
    config = SparsityConfig(
        target=0.3, target_of="all", cost=cost, round_to=1, sparsity_ramp=0.4, cost_sequence_length=None
    )
    bank = attach_gates(model, config, batch)
    asked = 1 - bank.asked_density
    with torch.no_grad():
        bank.groups["ffn"].alpha[: round(asked * 3 * 256)] = -20.0
        bank.groups["attention"].alpha[: round(asked * 3 * 8)] = -20.0
    compact(model)
    after = {"params": model.num_parameters(), "macs": count_macs(model, batch)}[cost]
    assert 1 - after / before == pytest.approx(0.3, abs=0.02)


def test_a_target_of_the_whole_model_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(SparsityError, match=r"0\.99 of the whole model, of which heads and neurons are 9\d\.\d%"):
        attach_gates(wide(), SparsityConfig(target=0.99, target_of="all"))
    with pytest.raises(SparsityError, match="for the time of the whole give target_speedup"):
        SparsityConfig(target_of="all", cost="latency")


def test_without_a_cache_memory_is_that_of_weights() -> None:
    structure, config = discover(bert()), SparsityConfig(cost="memory")
    assert memory_costs(structure, config) == parameter_costs(structure, config)


def test_a_line_charges_units_and_what_having_any_costs() -> None:
    block = discover(bert()).blocks[0]
    costs = CostTable({block.name: tuple(3.0 + 2.0 * units if units else 0.0 for units in range(block.units + 1))})
    assert costs.line(block) == pytest.approx((2.0, 3.0))


def test_a_speedup_is_the_share_of_the_cost_that_has_to_go() -> None:
    costs = CostTable({"a": (0.0, 20.0, 60.0)}, rest=40.0)
    config = SparsityConfig(cost="latency", target_speedup=2.0)
    assert costs.target(config) == pytest.approx(50 / 60)
    assert costs.target(SparsityConfig(target=0.3)) == 0.3
    with pytest.raises(SparsityError, match=r"2\.50 times as fast"):
        costs.target(SparsityConfig(cost="latency", target_speedup=2.5))


@pytest.mark.parametrize("make", [wide, llama])
def test_measured_costs_rise_from_zero_and_are_remembered(make: type, cache: Path) -> None:
    model, config = make(), SparsityConfig(**SMALL)
    structure = discover(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    costs = measured_costs(model, structure, config, cost_batch(model, config, None))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for block in structure.blocks:
        table = costs.blocks[block.name]
        assert len(table) == block.units + 1 and table[0] == 0.0 and list(table) == sorted(table)
    assert len(list(cache.iterdir())) == 3  # heads and neurons once, since layers are alike, and whole models
    again = measured_costs(model, structure, config, cost_batch(model, config, None))
    assert again.blocks == costs.blocks
    for path in cache.iterdir():
        entry = json.loads(path.read_text())
        path.write_text(json.dumps({**entry, "milliseconds": ["NaN", *entry["milliseconds"][1:]]}))
    assert measured_costs(model, structure, config, cost_batch(model, config, None)).blocks != costs.blocks


def test_a_batch_is_enlarged_without_padding() -> None:
    model = bert()
    batch = enlarged(example_inputs(model), model, 5, 24)
    assert batch["input_ids"].shape == (5, 24) and batch["attention_mask"].eq(1).all()


def test_a_batch_that_the_model_cannot_read_is_refused() -> None:
    with pytest.raises(SparsityError, match="cost_sequence_length"):
        attach_gates(bert(), SparsityConfig(cost="latency", cost_sequence_length=65))


def test_a_batch_in_which_fewer_units_save_no_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model, warnings = SparsityConfig(**SMALL), wide(), []
    structure = discover(model)
    monkeypatch.setattr(latency, "shortest_ms", lambda runs, device, repeats: [2.0] * len(runs))
    with pytest.raises(SparsityError, match=r"batch of 4 x 16 tokens on .*: give a larger cost_batch_size"):
        measured_costs(model, structure, config, cost_batch(model, config, None))
    monkeypatch.setattr(latency, "_remembered", lambda key, count: None)
    monkeypatch.setattr(latency, "shortest_ms", lambda runs, device, repeats: [1.0, *[2.0] * (len(runs) - 1)])
    monkeypatch.setattr(latency.logger, "warning", lambda text, *values: warnings.append(text % values))
    costs = measured_costs(model, structure, config, cost_batch(model, config, None))
    assert len(warnings) == 1 and "a quarter of all heads and neurons takes 100%" in warnings[0]
    assert costs.prunable == pytest.approx(1.0) and costs.rest == 1.0


@pytest.mark.parametrize("options", [{"target": 0.5}, {"target_speedup": 1.3}])
def test_training_lands_on_the_measured_cost(options: dict[str, float], tmp_path: Path) -> None:
    sparsity = SparsityConfig(**{**SMALL, **options})
    run = SparseTrainer(
        model=wide(), args=training_arguments(tmp_path, max_steps=100), sparsity=sparsity, train_dataset=rows(64)
    )
    target, largest = require_bank(run.model).target, require_bank(run.model).largest_unit
    run.train()
    removed = run.costs.removed({name: len(units) for name, units in run.compact().plan.kept.items()})
    assert abs(removed - target) <= max(0.01, largest)
    report = run.measure()
    assert report.cost_text == "latency" and report.target == pytest.approx(target)


@pytest.mark.parametrize("cost", ["params", "latency"])
def test_neurons_are_kept_in_multiples(cost: str, tmp_path: Path) -> None:
    sparsity = SparsityConfig(**{**SMALL, "cost": cost}, round_to=16)
    run = SparseTrainer(
        model=wide(), args=training_arguments(tmp_path, max_steps=60), sparsity=sparsity, train_dataset=rows(64)
    )
    run.train()
    report = run.compact()
    widths = [len(units) for name, units in report.plan.kept.items() if "intermediate" in name]
    assert len(widths) == 3 and all(width % 16 == 0 for width in widths) and sum(widths) < 3 * 256
    assert report.max_abs_diff <= 1e-4


@pytest.mark.parametrize(("width", "round_to", "left"), [(256, None, 88), (256, 1, 87), (64, None, 87)])
def test_wide_models_keep_multiples_of_eight_filled_up_by_importance(
    width: int, round_to: int | None, left: int
) -> None:
    model = bert(layers=2, hidden_size=width, num_attention_heads=8, intermediate_size=100)
    bank = attach_gates(model, SparsityConfig(round_to=round_to))
    with torch.no_grad():
        bank.groups["ffn"].alpha[:13] = -20.0 - torch.tensor([3.0] * 7 + [1.0] + [2.0] * 5)
    block = next(block for block in bank.structure.blocks if block.kind == "ffn")
    report = compact(model)
    assert report.max_abs_diff <= 1e-4
    assert report.plan.kept[block.name] == (*([7] if left == 88 else []), *range(13, 100))


@pytest.mark.parametrize(("target", "multiple"), [(0.3, 32), (0.5, 32), (0.75, 8), (0.9, 8)])
def test_the_multiple_is_little_of_what_stays(target: float, multiple: int) -> None:
    model = bert(layers=1, hidden_size=256, num_attention_heads=8, intermediate_size=512)
    assert attach_gates(model, SparsityConfig(target=target)).costs.multiple == multiple


@pytest.mark.parametrize("round_to", [None, 64, 128])
def test_every_projection_reads_a_multiple_of_channels_that_quantizers_group(round_to: int | None) -> None:
    model = bert(layers=3, hidden_size=256, num_attention_heads=16, intermediate_size=1024)
    bank = attach_gates(model, SparsityConfig(round_to=round_to))
    with torch.no_grad():
        for group in bank.groups.values():
            group.alpha.copy_(4 * torch.randn(group.alpha.shape))
    before = sum(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    assert compact(model).max_abs_diff <= 1e-4
    widths = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    assert sum(widths) < before and all(width % (round_to or 32) == 0 for width in widths)


@pytest.mark.parametrize(("target", "round_to"), [(0.3, None), (0.6, None), (0.6, 64)])
def test_the_target_is_met_with_what_fills_up_multiples(target: float, round_to: int | None) -> None:
    model = bert(layers=6, hidden_size=256, num_attention_heads=8, intermediate_size=1024)
    bank, removed = attach_gates(model, SparsityConfig(target=target, round_to=round_to)), []
    for seed in range(8):
        torch.manual_seed(seed)
        order = torch.cat([torch.randn(group.alpha.shape) for group in bank.groups.values()])
        low, high = -10.0, 10.0  # of thresholds, until the gates above them are as dense as the search ends
        for _ in range(40):
            threshold = (low + high) / 2
            parts = (order > threshold).float().split([len(group.alpha) for group in bank.groups.values()])
            gates = dict(zip(bank.groups, parts))
            dense = bank.density(gates) > bank.target_density
            low, high = (threshold, high) if dense else (low, threshold)
        counts = bank.counts(gates).tolist()
        kept = {block.name: block.physical(count) for block, count in zip(bank.structure.blocks, counts)}
        removed.append(bank.costs.removed(kept))
    assert abs(sum(removed) / len(removed) - target) < 0.005
    assert max(abs(one - target) for one in removed) < 0.012


def test_uniform_layouts_of_wide_models_have_multiples_of_eight() -> None:
    model = bert(layers=2, hidden_size=256, num_attention_heads=8, intermediate_size=100)
    bank = attach_gates(model, SparsityConfig(layout="uniform"))
    assert {block.counts for block in bank.structure.blocks} == {(*range(8, 100, 8), 100)}


def test_what_the_device_likes_is_a_multiple() -> None:
    model = wide()
    config = SparsityConfig(**SMALL, round_to=0)
    costs = measured_costs(model, discover(model), config, cost_batch(model, config, None))
    assert costs.multiple in latency.MULTIPLES
    assert attach_gates(model, SparsityConfig(**SMALL, round_to=0)).costs.multiple in latency.MULTIPLES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_speedup": 2.0}, "needs cost='latency'"),
        ({"target_speedup": 0.5, "cost": "latency"}, "above 1"),
        ({"target_speedup": 2.0, "cost": "latency", "targets": [0.5]}, "takes the place"),
        ({"round_to": 0}, "with cost='latency'"),
        ({"round_to": -1}, "at least 1"),
        ({"cost_batch_size": 0}, "above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(SparsityError, match=message):
        SparsityConfig(**options)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_a_disturbance_in_the_rhythm_of_the_measurement_meets_all_alike(
    period: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, calls = 0.0, 0

    def run() -> None:
        nonlocal clock, calls
        clock += 0.005 if calls % period == 0 else 0.001
        calls += 1

    monkeypatch.setattr("hf_sparse.runtime.timing.time.perf_counter", lambda: clock)
    assert shortest_ms([run, run], torch.device("cpu"), 15) == pytest.approx([1.0, 1.0])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep their heap in other ways")
def test_what_is_timed_takes_no_page_faults() -> None:
    """They would depend on what the process has done before, and be more for larger models."""
    faults = []

    def run() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        activations = [torch.empty(1 << 20).fill_(1.0) for _ in range(16)]  # 64 MB, freed at once
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        del activations

    shortest_ms([run], torch.device("cpu"), 8)
    assert max(faults[-4:]) < 100
