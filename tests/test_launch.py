"""Real launches: one process and two must learn the same gates, on every rank."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from conftest import rows
from safetensors.torch import load_file

from hf_sparse import load_pruned

SCRIPT = Path(__file__).parent / "launched.py"


def launch(
    processes: int, directory: Path, batch: int, targets: tuple[float, ...] = (0.5,), cost: str = "params"
) -> None:
    directory.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = ["--multi_gpu", "--main_process_port", str(port)] if processes > 1 else ["--cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *several]
    command += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", str(SCRIPT), str(directory), str(batch), cost, *map(str, targets)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(directory / "home")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    launch(1, tmp_path / "one", batch=8)
    launch(2, tmp_path / "two", batch=4)
    one = load_file(tmp_path / "one/rank0.safetensors")
    ranks = [load_file(tmp_path / f"two/rank{rank}.safetensors") for rank in range(2)]
    for name, tensor in one.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    sizes = [load_pruned(tmp_path / run / "out").num_parameters() for run in ("one", "two")]
    assert sizes[0] == sizes[1]
    for run in ("one", "two"):
        saved = [load_file(tmp_path / run / kind / "model.safetensors") for kind in ("gated", "out")]
        assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def test_two_processes_descend_through_the_same_stages_as_one(tmp_path: Path) -> None:
    launch(1, tmp_path / "one", batch=8, targets=(0.3, 0.6))
    launch(2, tmp_path / "two", batch=4, targets=(0.3, 0.6))
    ranks = [load_file(tmp_path / f"two/rank{rank}.safetensors") for rank in range(2)]
    assert ranks[0].keys() == ranks[1].keys() and all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    inputs = torch.tensor(rows(4)["input_ids"])
    for member in ("removed-0.3", "removed-0.6", "out"):
        one, two = (load_pruned(tmp_path / run / member) for run in ("one", "two"))
        assert one.config.layer_sizes == two.config.layer_sizes
        torch.testing.assert_close(two(inputs).logits, one(inputs).logits, rtol=1e-3, atol=1e-3)


def test_processes_share_what_the_first_one_has_measured(tmp_path: Path) -> None:
    launch(2, tmp_path / "two", batch=4, cost="latency")
    ranks = [load_file(tmp_path / f"two/rank{rank}.safetensors") for rank in range(2)]
    assert ranks[0].keys() == ranks[1].keys() and all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert len(list((tmp_path / "two/home/hf_sparse/latency").iterdir())) == 3
