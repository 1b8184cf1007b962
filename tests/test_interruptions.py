"""Whatever ends a run, the next start goes on from what is on the disk, and says what it could not use."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TESTS, command, environment, forks, launch
from pruning import StopAt, bert, rows, training_arguments
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers.utils.logging import get_logger

from hf_sparse import SparseTrainer, SparsityConfig, SparsityError
from hf_sparse.training.safety import EXIT_CODE

PATIENCE = 240  # seconds; nothing takes so long unless it hangs


def run_of(directory: Path, **options: Any) -> SparseTrainer:
    torch.manual_seed(0)
    given = {name: options.pop(name) for name in ("train_dataset", "callbacks") if name in options}
    saving = {"save_strategy": "steps", "save_steps": 10, **options}
    return SparseTrainer(
        model=bert(),
        args=training_arguments(directory, **saving),
        sparsity=SparsityConfig(target=0.5, sparsity_ramp=0.3),
        **{"train_dataset": rows(64), "eval_dataset": rows(16, seed=1), **given},
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> SparseTrainer:
    """A run that never stopped; with all of its checkpoints."""
    torch.set_num_threads(1)
    run = run_of(tmp_path_factory.mktemp("unbroken"))
    run.train()
    return run


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = get_logger("hf_sparse")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        yield caplog
    logger.removeHandler(caplog.handler)


# ---- Kills ----


def test_killed_runs_end_as_the_one_that_was_not(tmp_path: Path) -> None:
    run = forks().run(TESTS / "killed_while_training.py", tmp_path / "runs", 4)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert run.stdout.count("2 kills") == 2


# ---- SIGTERM ----


def test_sigterm_saves_and_the_next_start_goes_on(tmp_path: Path) -> None:
    script = command(2, "launched.py", tmp_path, "--batch", 4, "--pause", 0.2)
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(tmp_path)) as run:
        assert run.stdout is not None
        assert any(b"'loss'" in line for line in iter(run.stdout.readline, b""))  # it trains
        run.send_signal(signal.SIGTERM)  # to the launcher, which tells its processes
        _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode != 0 and b"Told to stop by SIGTERM" in errors
    [checkpoint] = tmp_path.glob("checkpoint-*")
    assert int(checkpoint.name.rpartition("-")[2]) < 30
    launch(2, tmp_path, "--batch", 4, "--resume")
    launch(1, tmp_path / "unbroken", "--batch", 8)
    one, other = (load_file(path / "rank0.safetensors") for path in (tmp_path / "unbroken", tmp_path))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_sigterm_ends_one_process_after_its_step_and_only_while_it_trains(
    unbroken: SparseTrainer, tmp_path: Path
) -> None:
    class Terminate(StopAt):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.step:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as raised:
        run_of(tmp_path, save_strategy="no", callbacks=[Terminate(7)]).train()
    assert raised.value.code == EXIT_CODE and signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "checkpoint-7").is_dir()
    run = run_of(tmp_path, save_strategy="no")
    run.train(resume_from_checkpoint=True)
    _assert_same(run, unbroken)


def _assert_same(run: SparseTrainer, other: SparseTrainer) -> None:
    assert run.plan() == other.plan()
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], tensor), name


# ---- Damaged checkpoints ----


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = bytes(byte ^ 0xFF for byte in content[middle : middle + 300])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", _cut),
        ("optimizer.pt", _cut),
        ("optimizer.pt", _flip),
        ("scheduler.pt", Path.unlink),
        ("rng_state.pth", _cut),
        ("sparsity_state.json", _cut),
        ("trainer_state.json", _cut),
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_used(
    name: str, damage: Callable[[Path], Any], unbroken: SparseTrainer, tmp_path: Path, warnings: Any
) -> None:
    for step in (10, 20):
        shutil.copytree(f"{unbroken.args.output_dir}/checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damage(tmp_path / "checkpoint-20" / name)
    run = run_of(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert "checkpoint-20 is not whole" in warnings.text and "going on from the one before" in warnings.text
    _assert_same(run, unbroken)
    with pytest.raises(SparsityError, match=r"checkpoint-20 is not a whole checkpoint \(.+\): give another"):
        damage(tmp_path / "checkpoint-20" / name)  # it was written again
        run_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))


def test_without_a_whole_checkpoint_nothing_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(SparsityError, match="no whole checkpoint"):
        run_of(tmp_path).train(resume_from_checkpoint=True)


def test_a_full_disk_is_said_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    script = (TESTS / "launched.py", tmp_path, "--save_steps", 15)
    run = forks().run(*script, "--fault", "disk")
    assert run.returncode != 0
    assert "the checkpoint of step 30 could not be written" in run.stderr and "make room and resume" in run.stderr
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-15"]
    again = forks().run(*script, "--resume")
    assert again.returncode == 0, again.stderr[-3000:]


def test_a_clock_that_was_set_back_does_not_make_new_checkpoints_old(tmp_path: Path) -> None:
    class SetBack(StopAt):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for path in tmp_path.glob("checkpoint-*"):
                os.utime(path, (time.time() + 3600, time.time() + 3600))

    run_of(tmp_path, save_total_limit=2, callbacks=[SetBack(0)]).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-30", "checkpoint-40"]


# ---- Other faults ----


def test_nan_on_one_process_stops_all(tmp_path: Path) -> None:
    script = command(2, "launched.py", tmp_path, "--batch", 4, "--save_steps", 15, "--fault", "nan")
    run = forks().run(*script[1:])
    said = "NonFiniteLossError: weights became NaN or infinite by step 20"
    assert run.returncode != 0 and run.stderr.count(said) == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-15"]


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    script = command(2, "launched.py", tmp_path, "--batch", 4)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        script[script.index("--main_process_port") + 1] = str(port)
        run = forks().run(*script[1:])
    assert f"Port `{port}` is already in use" in run.stderr


def test_data_that_ends_early_ends_the_run_and_says_so(tmp_path: Path, warnings: Any) -> None:
    class Once(IterableDataset[Any]):
        def __init__(self) -> None:
            self.rows = iter(list(rows(64)))

        def __iter__(self) -> Iterator[Any]:
            return self.rows

    run = run_of(tmp_path, train_dataset=Once(), save_strategy="no")
    run.train()
    assert run.state.global_step < 40
    assert f"The training data have ended at step {run.state.global_step} of 40" in warnings.text
    assert run.compact().max_abs_diff <= 1e-4
