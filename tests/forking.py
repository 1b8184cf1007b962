"""Starts Python processes by forking one that has imported what is not ours: seconds sooner, and as fresh.

`Forks` starts this file as a script. A fork imports hf_sparse itself, if what it runs does. An `accelerate launch` in
one is accelerate's own, but for torchrun: the processes of a launch are forked, too.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from argparse import Namespace
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = (
    "accelerate.commands.launch",
    "datasets",
    "jinja2",
    "matplotlib.pyplot",
    "safetensors.torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "transformers.integrations.deepspeed",
    "transformers.trainer",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("auto", "bart", "bert", "gpt2", "llama")),
)
PATIENCE = 300  # seconds; nothing takes so long unless it hangs
GRACE = 10  # seconds that processes have to end by themselves when another one of their launch has failed


class Forks:
    """A process that forks Python processes, until it is closed or this one ends.

    Args:
        environment: with which it imports packages; what they read of it then is the same in all forks.
        modules: what it imports beside IMPORTED.
    """

    def __init__(self, environment: dict[str, str], *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self, *words: object, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run `python *words` to its end: a script, or `-c code`, or `-m module`, with arguments.

        Its environment is that of the process that forks, or `env`.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as directory:
            printed = [Path(directory, name) for name in ("stdout", "stderr")]
            job = {"words": [*map(str, words)], "env": env, "cwd": str(cwd or Path.cwd())}
            print(json.dumps({**job, "printed": [*map(str, printed)]}), file=self._process.stdin, flush=True)
            code = self._process.stdout.readline()
            assert code, "the process that forks has ended"
            return subprocess.CompletedProcess(words, int(code), *(path.read_text() for path in printed))

    def close(self) -> None:
        """End the process that forks."""
        self._process.communicate()


# ---- The process that forks, and its forks ----


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def jobs() -> dict[str, Any]:
    """Fork for every job that is read, and print how it ended; returns, in the forks alone, with the job."""
    gc.collect()
    gc.freeze()  # or forks would copy what they look through
    for line in sys.stdin:
        fork = os.fork()
        if fork == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)
    sys.exit()


def become(job: dict[str, Any]) -> None:
    """Give this process the environment and the output of a job."""
    signal.alarm(PATIENCE)
    os.chdir(job["cwd"])
    if job["env"] is not None:
        os.environ.clear()
        os.environ.update(job["env"])
    paths = [(os.devnull, os.O_RDONLY), *((path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in job["printed"])]
    for descriptor, (path, flags) in enumerate(paths):
        os.dup2(os.open(path, flags), descriptor)


def execute(words: list[str]) -> NoReturn:
    """As `python *words` does, but for the seconds in which an interpreter takes itself apart."""
    code: Any = 0
    try:
        if words[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], ""
            exec(words[1], {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def torchrun(arguments: Namespace) -> None:
    """Fork the processes of a launch, and wait for them."""
    count, running, failed = int(arguments.nproc_per_node), set(), False
    words = [*(["-m"] if arguments.module else []), arguments.training_script, *arguments.training_script_args]
    port = free_port() if arguments.standalone else arguments.master_port
    os.environ.update(
        WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    for rank in map(str, range(count)):
        fork = os.fork()
        if fork == 0:
            signal.alarm(PATIENCE)
            os.environ.update(RANK=rank, LOCAL_RANK=rank)
            execute(words)
        running.add(fork)
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(fork, signal.SIGKILL) for fork in running])
    while running:
        fork, status = os.wait()
        running.remove(fork)
        if status and not failed:
            failed = True
            signal.alarm(GRACE)
    sys.exit(failed)


def main() -> None:
    for name in (*IMPORTED, *sys.argv[1:]):
        importlib.import_module(name)
    sys.modules["torch.distributed.run"].run = torchrun  # type: ignore[attr-defined]
    job = jobs()
    become(job)
    execute(job["words"])


if __name__ == "__main__":
    main()
