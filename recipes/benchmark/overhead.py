"""What gates cost: a step of SparseTrainer over a step of the plain Trainer, in time and in peak memory.

    python recipes/benchmark/overhead.py
    python recipes/benchmark/overhead.py --model_name_or_path google-bert/bert-base-uncased --tokens 128
    python recipes/benchmark/overhead.py --use_peft
    accelerate launch --multi_gpu --num_processes 2 recipes/benchmark/overhead.py --use_cpu

Both trainers take turns in one process, so that a noisy machine is noisy for both; the figure is the ratio of the
medians. Peak memory is measured in a process of its own for each: on a GPU what torch allocated, else resident memory;
with several processes it is left out, and a step is that of the first.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common.adapters import AdapterArguments, with_adapter
from datasets import Dataset
from embedded.minilm import minilm
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
)
from transformers.utils.logging import disable_progress_bar

from hf_sparse import SparseTrainer, SparsityConfig

KINDS = ("plain", "gated")
SETTLING = 3  # steps of a round that are not counted: allocators warm up, Adam makes its state


class StepTimer(TrainerCallback):
    """Times every optimizer step, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(self._now() - self.start)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def train(kind: str, model: PreTrainedModel, data: Dataset, flags: argparse.Namespace) -> list[float]:
    """Train a fresh copy for one round and return the times of its steps, in seconds."""
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, Any] = {
            "model": with_adapter(copy.deepcopy(model), AdapterArguments(use_peft=flags.use_peft)),
            "args": TrainingArguments(
                directory,
                per_device_train_batch_size=flags.batch,
                max_steps=flags.steps,
                save_strategy="no",
                report_to=[],
                use_cpu=flags.use_cpu,
                disable_tqdm=True,
                logging_strategy="no",
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            "train_dataset": data,
            "callbacks": [timer],
        }
        # The search lasts for the whole round: it is when gates cost most.
        sparsity = SparsityConfig(sparsity_warmup=0.0, sparsity_ramp=0.98, sparsity_hold=0.0)
        trainer = Trainer(**options) if kind == "plain" else SparseTrainer(**options, sparsity=sparsity)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return timer.times[SETTLING:]


def peak_bytes() -> int:
    """Peak memory of this process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not getrusage, whose peak includes what the process was forked from.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="default: all-MiniLM-L6-v2")
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=13, help="steps per round, of which the first three do not count")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each trainer, in turns")
    parser.add_argument("--use_peft", action="store_true", help="both train LoRA beside frozen weights")
    parser.add_argument("--use_cpu", action="store_true", help="as TrainingArguments has it, for processes on CPUs")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(flags.model_name_or_path or minilm())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        1000, model.config.vocab_size, (flags.batch * flags.steps, flags.tokens), generator=generator
    )
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": [row % 2 for row in range(len(tokens))]})
    if flags.only:
        train(flags.only, model, data, flags)
        print(peak_bytes())
        return
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(flags.rounds):
        for kind in KINDS:
            times[kind] += train(kind, model, data, flags)
    medians = {kind: statistics.median(times[kind]) for kind in KINDS}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    result: dict[str, Any] = {
        "processes": processes,
        "step_ms": {kind: round(1000 * median, 1) for kind, median in medians.items()},
        "step_ratio": round(medians["gated"] / medians["plain"], 3),
        "batch": [flags.batch, flags.tokens],
        "steps": len(times["plain"]),
    }
    if processes == 1:
        command = [sys.executable, *sys.argv, "--only"]
        memory = {kind: int(subprocess.run([*command, kind], capture_output=True, check=True).stdout) for kind in KINDS}
        result |= {"peak_bytes": memory, "peak_ratio": round(memory["gated"] / memory["plain"], 3)}
    if int(os.environ.get("RANK", "0")) > 0:
        return
    print(json.dumps(result, indent=2))
    if flags.output:
        flags.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
