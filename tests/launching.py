"""Real launches of scripts in this directory."""

import atexit
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from forking import Forks, free_port

from hf_sparse.runtime import streaming

TESTS = Path(__file__).parent
DEEPSPEED = Path(sys.prefix) / "deepspeed"
"""Where `make install` has put it: transformers would import it in every process that can."""

FSDP = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": "false",
}


LAYERS = {"llama": "LlamaDecoderLayer", "gpt2": "GPT2Block", "bart": "BartEncoderLayer,BartDecoderLayer"}
"""Classes that are sharded on their own, by --model; of BERT otherwise."""


def shard_on_cpus() -> None:
    """Let accelerate shard, which it does on accelerators alone, though torch's fully_shard works on CPUs as well."""
    PartialState(cpu=True)
    stream_on_cpus()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def stream_on_cpus() -> None:
    """Let models that are put together run by copies of their layers, as where the device is not the host."""
    streaming.device_of = lambda inputs: torch.device("cpu", 0)  # which no tensor says of itself


def leave() -> None:
    """End a process whose work is done at once.

    Threads of gloo may abort one that ends by itself ("terminate called without an active exception"), in a few of a
    hundred launches; with a plain Trainer under FSDP, too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def deepspeed_on_cpus() -> None:
    """Let accelerate use DeepSpeed, which it does on accelerators alone, over gloo and without kernels to compile."""
    PartialState(cpu=True)
    if os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3":
        stream_on_cpus()
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    from deepspeed import comm

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def command(
    processes: int, script: str, *arguments: Any, fsdp: str | None = None, zero: int | None = None
) -> list[str]:
    """An `accelerate launch`, unless it is of one process.

    `fsdp` is how checkpoints of shards are kept; `zero` the stage of DeepSpeed.
    """
    if processes == 1:
        return [sys.executable, str(TESTS / script), *map(str, arguments)]
    engine = ["--multi_gpu", "--main_process_port", str(free_port())]
    if fsdp is not None:
        engine = ["--use_fsdp", *engine[1:], "--fsdp_state_dict_type", fsdp]
        layers = next((layers for model, layers in LAYERS.items() if model in arguments), "BertLayer")
        engine += ["--fsdp_transformer_layer_cls_to_wrap", layers]
        engine += [word for name, value in FSDP.items() for word in (f"--{name}", str(value))]
    if zero is not None:
        engine = ["--use_deepspeed", *engine[1:], "--zero_stage", str(zero)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *engine, "--num_processes", str(processes)]
    precision = "bf16" if "--bf16" in arguments else "no"
    launcher += ["--num_machines", "1", "--mixed_precision", precision, "--dynamo_backend", "no"]
    return [*launcher, str(TESTS / script), *map(str, arguments)]


def environment(directory: Path, zero: int | None = None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(DEEPSPEED), os.environ.get("PYTHONPATH")]))
    deepspeed = {} if zero is None else {"DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(directory / "home"), **deepspeed}


def forks(deepspeed: bool = False) -> Forks:
    """What starts all Python processes of a session that may share packages and caches; with DeepSpeed another one."""
    return _forks(deepspeed)


@functools.cache
def _forks(deepspeed: bool) -> Forks:
    home = tempfile.TemporaryDirectory()
    modules = ["deepspeed", "deepspeed.runtime.zero.muon.original_muon"] if deepspeed else []
    started = Forks(environment(Path(home.name), 3 if deepspeed else None), *modules)
    atexit.register(home.cleanup)
    atexit.register(started.close)
    return started


def launch(processes: int, directory: Path, *arguments: Any, fsdp: str | None = None, zero: int | None = None) -> str:
    """Run launched.py to its end; returns what it printed.

    Raises:
        AssertionError: it failed.
    """
    directory.mkdir(exist_ok=True)
    words = command(processes, "launched.py", directory, *arguments, fsdp=fsdp, zero=zero)[1:]
    run = forks(zero is not None).run(*words, env=environment(directory, zero))
    assert run.returncode == 0, run.stderr[-20000:]
    return run.stdout + run.stderr
