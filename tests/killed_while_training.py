"""Trains by one or two processes that are killed at random moments, until the run ends: as if nothing had happened.

    python tests/killed_while_training.py DIRECTORY [KILLS]

Kills come at any time: in the searches, while the model shrinks, while checkpoints and models are written. Of two
processes, all are killed or only one, and the other must not hang.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers
from launching import free_port
from pruning import bert, rows, training_arguments
from safetensors.torch import load_file, save_file

from hf_sparse import SparseTrainer, SparsityConfig
from hf_sparse.training.resume import newest_whole_checkpoint

STEPS = 40
PATIENCE = 120  # seconds until a process whose other one died must have ended, too


def train(directory: Path, resume: bool, processes: int) -> None:
    """Train to the end, and write what came out."""
    run = SparseTrainer(
        model=bert(layers=2),
        args=training_arguments(
            directory,
            per_device_train_batch_size=8 // processes,
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=3,
            save_total_limit=2,
            eval_strategy="steps",
            eval_steps=10,
        ),
        sparsity=SparsityConfig(targets=[0.3, 0.6], sparsity_ramp=0.3),
        teacher=bert(layers=2),
        train_dataset=rows(64),
        eval_dataset=rows(16, seed=1),
    )
    run.train(resume_from_checkpoint=resume)
    if run.is_world_process_zero():
        save_file(dict(run.model.state_dict()), directory / "partial")
        (directory / "plan.json").write_text(run.plan().to_json())
        (directory / "partial").rename(directory / "end.safetensors")


def start(directory: Path, processes: int) -> list[int]:
    """Fork the processes of a run, which goes on from what is on the disk."""
    resume = newest_whole_checkpoint(directory) is not None
    port = free_port()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if processes > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
                os.environ.update(LOCAL_WORLD_SIZE=str(processes))
            code = 1
            try:
                torch.manual_seed(0)
                with (directory / f"log{rank}.txt").open("a") as log, contextlib.redirect_stdout(log):
                    train(directory, resume, processes)
                code = 0
            except BaseException:
                if "--verbose" in sys.argv:
                    traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return children


def ended(children: list[int], seconds: float) -> list[int]:
    """Exit statuses of those that end within a time; they are taken off the list."""
    statuses, until = [], time.monotonic() + seconds
    while children and time.monotonic() < until:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                statuses.append(status)
        time.sleep(0.01)
    return statuses


def compare(directory: Path, unbroken: Path) -> None:
    one, other = (load_file(path / "end.safetensors") for path in (unbroken, directory))
    assert (unbroken / "plan.json").read_text() == (directory / "plan.json").read_text()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for member in ("removed-0.3", "removed-0.6"):
        one, other = (load_file(path / member / "model.safetensors") for path in (unbroken, directory))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def main(home: Path, kills: int) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    random.seed(0)
    for processes in (1, 2):
        unbroken = home / f"unbroken-{processes}"
        unbroken.mkdir(parents=True)
        began = time.monotonic()
        children = start(unbroken, processes)
        assert ended(children, 600) == [0] * processes
        span = time.monotonic() - began
        killed = runs = 0
        directory = home / f"killed-{processes}"
        while killed < kills // 2 or directory.exists():
            directory.mkdir(exist_ok=True)
            children = start(directory, processes)
            # At least a part of a run, so that one ends in time.
            patience = random.uniform(0.2, 0.8) * span if killed < kills // 2 else 600
            statuses = ended(children, patience)
            if not children:
                assert statuses == [0] * processes, statuses
                compare(directory, unbroken)
                shutil.rmtree(directory)
                runs += 1
                continue
            victims = list(children) if random.random() < 0.5 else [random.choice(children)]
            for child in victims:
                os.kill(child, signal.SIGKILL)
            ended(children, PATIENCE)
            assert not children, "a process hangs"
            killed += 1
        print(f"{processes} processes: {killed} kills, {runs} runs ended as the unbroken one", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 30)
