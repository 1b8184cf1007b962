"""Real launches: however the work is split, and whatever shards the model, the same gates are learnt on every rank."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from pruning import rows
from safetensors.torch import load_file
from torch import Tensor

from hf_sparse import load_pruned

STAGES = ("--targets", 0.3, 0.6)


def weights(directory: Path) -> dict[str, Tensor]:
    """What every process ended with, which must be the same."""
    first, *others = (load_file(path) for path in sorted(directory.glob("rank*.safetensors")))
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
    return first


def logs(directory: Path) -> list[dict[str, Any]]:
    lines = json.loads((directory / "state.json").read_text())["log_history"]
    return [{name: line[name] for name in ("step", "density", "lambda") if name in line} for line in lines]


def assert_same(one: Path, other: Path, tolerance: float = 1e-4) -> None:
    """The same plan, logged densities and lambdas, and weights but for the rounding of gates, which are in float32."""
    assert (one / "plan.json").read_text() == (other / "plan.json").read_text()
    for line, expected in zip(logs(other), logs(one), strict=True):
        assert line == pytest.approx(expected, abs=1e-5)
    expected_weights = weights(one)
    for name, tensor in weights(other).items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=tolerance, atol=tolerance, msg=name)
    for run in (one, other):
        saved = [load_file(run / kind / "model.safetensors") for kind in ("gated", "out")]
        assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one")
    launch(1, directory, "--batch", 16, *STAGES)
    return directory


@pytest.mark.parametrize(("processes", "batch", "accumulation"), [(2, 4, 2), (4, 4, 1)])
def test_the_result_does_not_depend_on_how_the_work_is_split(
    processes: int, batch: int, accumulation: int, one_process: Path, tmp_path: Path
) -> None:
    launch(processes, tmp_path, "--batch", batch, "--accumulation", accumulation, *STAGES)
    assert_same(one_process, tmp_path)
    inputs = torch.tensor(rows(4)["input_ids"])
    for member in ("removed-0.3", "removed-0.6", "out"):
        one, other = (load_pruned(run / member) for run in (one_process, tmp_path))
        assert one.config.to_dict()["per_layer_config"] == other.config.to_dict()["per_layer_config"]
        torch.testing.assert_close(other(inputs).logits, one(inputs).logits, rtol=1e-4, atol=1e-4)


def test_kinds_share_the_target_alike_however_the_work_is_split(tmp_path: Path) -> None:
    one, two, sharded = tmp_path / "one", tmp_path / "two", tmp_path / "sharded"
    settings = ("--model", "llama", "--group", "model", *STAGES)
    launch(1, one, "--batch", 16, *settings)
    launch(2, two, "--batch", 8, *settings)
    launch(2, sharded, "--batch", 8, *settings, "--stop", 34, fsdp="FULL_STATE_DICT")  # in its second search
    launch(2, sharded, "--batch", 8, *settings, "--resume", fsdp="FULL_STATE_DICT")
    assert_same(one, two)
    assert_same(one, sharded)


def test_adapters_do_not_depend_on_how_the_work_is_split(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for processes, directory in ((1, one), (2, two)):
        launch(processes, directory, "--batch", 16 // processes, "--lora", *STAGES)
    assert_same(one, two)


def test_a_sharded_run_resumes_with_a_model_that_has_shrunk(one_process: Path, tmp_path: Path) -> None:
    settings = ("--batch", 4, "--accumulation", 2, *STAGES)
    launch(2, tmp_path, *settings, "--stop", 34, fsdp="SHARDED_STATE_DICT")  # in its second search
    launch(2, tmp_path, *settings, "--resume", fsdp="SHARDED_STATE_DICT")
    assert_same(one_process, tmp_path)


def test_deepspeed_finds_the_same_structure(tmp_path: Path) -> None:
    """DeepSpeed clips no gradients of gates, and its moments start anew when the model shrinks."""
    settings = ("--dtype", "float32", "--max_grad_norm", 0)
    launch(2, tmp_path / "ddp", "--batch", 4, *settings)
    launch(2, tmp_path / "zero2", "--batch", 2, "--accumulation", 2, *settings, zero=2)
    launch(2, tmp_path / "zero3", "--batch", 4, *settings, "--save_steps", 24, "--loaded", zero=3)
    expected_weights = weights(tmp_path / "ddp")
    for run in (tmp_path / "zero2", tmp_path / "zero3"):
        assert (run / "plan.json").read_text() == (tmp_path / "ddp/plan.json").read_text()
        for line, expected in zip(logs(run), logs(tmp_path / "ddp"), strict=True):
            assert line == pytest.approx(expected, abs=1e-4)
        for name, tensor in weights(run).items():
            torch.testing.assert_close(tensor, expected_weights[name], rtol=0.02, atol=0.02, msg=name)
    shutil.copytree(tmp_path / "zero3/checkpoint-24", tmp_path / "resumed/checkpoint-24")
    launch(2, tmp_path / "resumed", "--batch", 4, *settings, "--loaded", "--resume", zero=3)
    assert_same(tmp_path / "zero3", tmp_path / "resumed", tolerance=0.0)


def test_a_run_of_deepspeed_resumes_with_a_model_that_has_shrunk(tmp_path: Path) -> None:
    """In its second search, after which it shrinks twice: what is left of an engine must not touch the next ones."""
    settings = ("--batch", 4, "--dtype", "float32", "--bf16", "--targets", 0.2, 0.35, 0.5)
    launch(2, tmp_path / "whole", *settings, "--save_steps", 34, zero=2)
    shutil.copytree(tmp_path / "whole/checkpoint-34", tmp_path / "parts/checkpoint-34")
    launch(2, tmp_path / "parts", *settings, "--resume", zero=2)
    assert_same(tmp_path / "whole", tmp_path / "parts", tolerance=0.0)


def test_a_decoder_is_sharded_with_its_tied_weights_and_gradient_checkpointing(tmp_path: Path) -> None:
    settings = ("--model", "gpt2", "--gradient_checkpointing")
    launch(1, tmp_path / "one", "--batch", 8, *settings)
    launch(2, tmp_path / "two", "--batch", 4, *settings, fsdp="FULL_STATE_DICT")
    assert_same(tmp_path / "one", tmp_path / "two")


def test_zeros_among_weights_do_not_depend_on_how_the_work_is_split(tmp_path: Path) -> None:
    launch(1, tmp_path / "one", "--batch", 8, "--pattern", "block")
    launch(2, tmp_path / "two", "--batch", 4, "--pattern", "block")
    assert_same(tmp_path / "one", tmp_path / "two")
    assert "false" in (tmp_path / "one/plan.json").read_text() and "true" in (tmp_path / "one/plan.json").read_text()


def test_compiled_steps_learn_the_same(one_process: Path, tmp_path: Path) -> None:
    launch(1, tmp_path, "--batch", 16, *STAGES, "--torch_compile")
    assert_same(one_process, tmp_path)


def test_processes_share_what_the_first_one_has_measured(tmp_path: Path) -> None:
    launch(2, tmp_path, "--batch", 4, "--cost", "latency")
    weights(tmp_path)
    assert len(list((tmp_path / "latency").iterdir())) == 3
