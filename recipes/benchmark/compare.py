"""The same fine-tuned model, data, teacher, epochs and seeds for hf_sparse and for what one would use instead.

    python recipes/benchmark/compare.py --task docstrings
    python recipes/benchmark/compare.py --task sst2 --data_dir sst2 --methods ours taylor --targets 0.75 --seeds 0 1 2
    python recipes/benchmark/compare.py --task language --batch_size 4 --block_size 128 --learning_rate 2e-4 \\
        --max_steps 300 --methods ours taylor wanda activation layers random dense --targets 0.2 0.4

Every cell is one line of --results, a JSON object with its settings, command, versions and figures, appended as soon as
it is done; cells that are there already are skipped, so the command can be interrupted and given again, and several can
run beside each other on different cells. Models are kept in --output_dir, for recipes/benchmark/measure.py. The peers'
packages come with `pip install -e .[bench]`.
"""

import argparse
import copy
import fcntl
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from hard_concrete import HardConcreteGates, LagrangianCallback, StopAt, constant_learning_rate
from ranking import RANKINGS, plan_by_rank
from tasks import load_task
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_sparse import DenseTrainer, SparseTrainer, SparsityConfig, compact, load_pruned, save_pruned
from hf_sparse.costs.table import parameter_costs
from hf_sparse.report.report import Report, command_line, versions
from hf_sparse.runtime.contexts import plain_forward
from hf_sparse.runtime.timing import device_name
from hf_sparse.structure.discovery import discover

METHODS = ("ours", "family", "torch-pruning", "hard-concrete", *RANKINGS, "dense")
BATCHES_TO_RANK = 32
SEARCH_SHARE = 0.3  # of the steps, for the hard-concrete gates; ours may search as long


class StepTimer(TrainerCallback):
    """Notes when every optimizer step begins: what its end does, such as shrinking the model, counts as the step's."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began.append(time.perf_counter())

    def found(self) -> dict[str, float]:
        """The median step in seconds, and the first one and the longest other one in units of it."""
        first, *others = (end - start for start, end in pairwise(self.began))
        median = statistics.median(others)
        return {
            "median_step": round(median, 3),
            "first_step": round(first / median, 1),
            "longest_step": round(max(others) / median, 1),
        }


class Bench:
    """One task, and the dense model of it, which every method shares."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.task = load_task(flags)
        self.splits = self.task.splits
        self.dense_path = flags.output_dir / flags.task / "dense"

    def arguments(self, epochs: float, learning_rate: float, seed: int) -> TrainingArguments:
        return TrainingArguments(
            str(self.flags.output_dir / self.flags.task / "training" / str(seed)),
            num_train_epochs=epochs,
            max_steps=self.flags.max_steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=self.flags.batch_size,
            per_device_eval_batch_size=2 * self.flags.batch_size,
            train_sampling_strategy="group_by_length",
            seed=seed,
            bf16=self.flags.bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )

    def options(self, model: PreTrainedModel, arguments: TrainingArguments) -> dict[str, Any]:
        return {
            "model": model,
            "args": arguments,
            "train_dataset": self.splits["train"],
            **self.task.evaluation(),
        }

    def dense(self) -> PreTrainedModel:
        """The dense model, fine-tuned once where it has a new head."""
        if not self.task.labels:
            return self.task.auto_class.from_pretrained(self.task.path)
        if not self.dense_path.is_dir():
            set_seed(0)
            names = dict(enumerate(self.task.labels))
            model = self.task.auto_class.from_pretrained(
                self.task.path, id2label=names, label2id={name: index for index, name in names.items()}
            )
            trainer = Trainer(**self.options(model, self.arguments(3, self.flags.dense_learning_rate, 0)))
            trainer.train()
            save_pruned(model, self.dense_path)
        return load_pruned(self.dense_path)

    def batches(self, seed: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Training batches on a device, for the methods that rank by gradients."""
        size, train = self.flags.batch_size, self.splits["train"]
        rows = train.shuffle(seed=seed).select(range(min(BATCHES_TO_RANK * size, len(train))))
        for start in range(0, len(rows), size):
            batch = self.task.collator([rows[index] for index in range(start, min(start + size, len(rows)))])
            yield {name: value.to(device) for name, value in batch.items()}

    def scores(self, trainer: Trainer) -> dict[str, float]:
        """The metric of the task on both splits that nothing is trained on, and their mean; shares in percent."""
        with torch.inference_mode():
            found = {
                split: self.task.unit * trainer.evaluate(self.splits[split])[f"eval_{self.task.metric}"]
                for split in ("validation", "test")
            }
        return {**found, "mean": sum(found.values()) / 2}


def run(bench: Bench, cell: dict[str, Any], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Prune and train one model, or a family of them; returns what to record, a record for each."""
    dense = bench.dense()
    structure = discover(dense)
    costs = parameter_costs(structure, SparsityConfig(round_to=1))
    model = copy.deepcopy(dense)
    arguments = bench.arguments(cell["epochs"], cell["learning_rate"], cell["seed"])
    one, several = isinstance(cell["target"], float), isinstance(cell["target"], list)
    sparsity = SparsityConfig(
        target=cell["target"] if one else 0.5,
        targets=cell["target"] if several else None,
        cache_teacher=cell["epochs"] > 1,
        **json.loads(cell["options"]),
    )
    shared: dict[str, Any] = {"teacher": dense, "distillation": sparsity}
    set_seed(cell["seed"])
    began, cpu = time.perf_counter(), time.process_time()
    trainer: Any
    if cell["method"] in ("ours", "family"):
        trainer = SparseTrainer(**bench.options(model, arguments), teacher=dense, sparsity=sparsity)
        steps = _train(trainer)
        plan = trainer.compact().plan
    elif cell["method"] == "hard-concrete":
        gates = HardConcreteGates(model, structure, costs).to(arguments.device)
        trainer = DenseTrainer(**bench.options(model, arguments), **shared)
        search = round(SEARCH_SHARE * math.ceil(len(bench.splits["train"]) / flags.batch_size) * cell["epochs"])
        constant_learning_rate(trainer)
        trainer.add_callback(LagrangianCallback(gates, cell["target"], round(0.8 * search), 0.1))
        trainer.add_callback(StopAt(search))
        _train(trainer)
        plan = gates.plan(cell["target"])
        gates.fold_()
        with plain_forward(model):
            compact(model, plan)
        rest = bench.arguments(cell["epochs"] * (1 - SEARCH_SHARE), cell["learning_rate"], cell["seed"] + 1000)
        trainer = DenseTrainer(**bench.options(model, rest), **shared)
        steps = _train(trainer)
    else:
        plan = None
        if cell["method"] != "dense":
            batches = bench.batches(cell["seed"], arguments.device)
            plan = plan_by_rank(cell["method"], model, batches, cell["target"], cell["seed"])
            compact(model, plan)
        trainer = DenseTrainer(**bench.options(model, arguments), **shared)
        steps = _train(trainer)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    spent = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), **steps}
    losses = [(log["step"], float(log["loss"])) for log in trainer.state.log_history if "loss" in log]
    if several:  # every member was measured and saved on the way
        members = []
        for target in cell["target"]:
            path = Path(str(arguments.output_dir)) / f"removed-{target:g}"
            removed = Report.read(path / "report.json").achieved
            trainer.model = load_pruned(path)
            members.append({"member": target, "removed": removed, **_finish(bench, trainer, cell, target), **spent})
        return members
    kept = {} if plan is None else {name: len(units) for name, units in plan.kept.items()}
    found = {"removed": costs.removed(kept), "kept": list(kept.values()), "losses": losses}
    return [{**found, **_finish(bench, trainer, cell, cell["target"]), **spent}]


def _finish(bench: Bench, trainer: Any, cell: dict[str, Any], target: float | None) -> dict[str, Any]:
    """Evaluate and save the model that a trainer has now."""
    options = "".join(character if character.isalnum() or character in ".-" else "" for character in cell["options"])
    name = f"{cell['method']}-{target}-{cell['seed']}-{cell['epochs']}-{cell['learning_rate']}{options}"
    save_pruned(trainer.model, bench.flags.output_dir / bench.flags.task / name, bench.task.tokenizer)
    return {**bench.scores(trainer), "model": name}


def _train(trainer: Any) -> dict[str, float]:
    """Train, and tell how long steps took."""
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return timer.found()


def recorded(path: Path) -> list[dict[str, Any]]:
    """All lines of a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    """The flags of this command, and of others that compare on its terms."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task",
        default="docstrings",
        help="any name for the data; 'punctuation' restores it, and case, in the texts; 'language' is SmolLM2's",
    )
    parser.add_argument(
        "--data_dir", type=Path, help="folder with train.csv, dev.csv and test.csv; docstrings by default"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.75, 0.9, 0.95])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--max_steps", type=int, default=-1, help="optimizer steps, instead of --epochs")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--block_size", type=int, default=128, help="tokens of a row, for --task language")
    parser.add_argument("--dense_learning_rate", type=float, default=5e-5)
    parser.add_argument("--options", default="{}", help="JSON of other SparsityConfig fields, such as for sweeps")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 mixed precision")
    parser.add_argument("--threads", type=int, help="threads of this process")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmark/results.jsonl"))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark"))
    return parser


def begin(flags: argparse.Namespace) -> Bench:
    """The task of a command, and what its cells need."""
    if flags.threads:
        torch.set_num_threads(flags.threads)
    transformers.logging.set_verbosity_error()
    flags.results.parent.mkdir(parents=True, exist_ok=True)
    return Bench(flags)


def is_recorded(cell: dict[str, Any], path: Path) -> bool:
    """Whether a file of results has a line of this cell."""
    return any(cell == {key: line.get(key) for key in cell} for line in recorded(path))


def record(line: dict[str, Any], path: Path) -> None:
    """Add a line to a file of results, with how it was made; others may do so at the same time."""
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    about = {"command": command_line(), "versions": versions(), "device": device, "threads": torch.get_num_threads()}
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({**line, **about}) + "\n")


def main() -> None:
    flags = parser().parse_args()
    bench = begin(flags)
    for seed in flags.seeds:
        for method in flags.methods:
            for target in {"dense": [None], "family": [flags.targets]}.get(method, flags.targets):
                cell = {
                    "task": flags.task,
                    "method": method,
                    "target": target,
                    "seed": seed,
                    "epochs": flags.epochs,
                    "learning_rate": flags.learning_rate,
                    "bf16": flags.bf16,
                    "options": flags.options,
                }
                if flags.batch_size != 32:
                    cell |= {"batch_size": flags.batch_size}
                if flags.max_steps > 0:
                    cell |= {"max_steps": flags.max_steps}
                if flags.task == "language":
                    cell |= {"block_size": flags.block_size}
                if is_recorded(cell, flags.results):
                    continue
                for result in run(bench, cell, flags):
                    record({**cell, **result}, flags.results)
                    print(
                        method,
                        result.get("member", target),
                        seed,
                        f"removed {result['removed']:.3f} mean {result['mean']:.2f} {result['seconds']:.0f}s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
