"""What quantizing after pruning costs and saves: quality, bytes and time of dense and pruned models, and in fewer bits.

    python recipes/benchmark/quantized.py runs/quickstart/dense/model runs/quickstart
    python recipes/benchmark/quantized.py --task language DENSE PRUNED

Every model is quantized by torchao, or by torch's own dynamic quantization on CPUs, and scored on both splits that
nothing is trained on. Bytes are those of its tensors. Times are of one batch of --rows texts of --tokens tokens; all
forms of a model take turns. Prints a table in Markdown. Needs `pip install torchao`; what cannot be done on this device
is left out, with the reason below.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from tasks import Task, load_task
from torch import Tensor, nn
from torch.ao.nn.quantized import dynamic as nnqd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from hf_sparse import load_pruned
from hf_sparse.runtime.timing import device_name, shortest_ms

GROUP = 32


# torchao comes with none of the extras that tests need.


def _int8_weights(model: PreTrainedModel) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(version=2))
    return model


def _int4_weights(model: PreTrainedModel) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP)))  # type: ignore[attr-defined]  # torch has no stub for it
    return model


def _dynamic(model: PreTrainedModel) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


WAYS: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "float32": lambda model: model,
    "int8 weights": _int8_weights,
    f"int4 weights, groups of {GROUP}": _int4_weights,
    "int8, dynamic": _dynamic,
}


def size(model: nn.Module) -> int:
    """Bytes of all tensors of a model, and of what is packed; weights of 4 bits are kept in bytes here."""

    def of(tensor: Tensor) -> int:
        if is_traceable_wrapper_subclass(tensor):
            return sum(of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.numel() * tensor.element_size()

    inside = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = [module.weight() for module in model.modules() if isinstance(module, nnqd.Linear)]
    return sum(map(of, inside.values())) + sum(weight.numel() for weight in packed)  # a byte each


def scores(model: nn.Module, task: Task, rows: int) -> float:
    """The metric of a task on validation and test data, their mean; shares in percent."""
    arguments = TrainingArguments("unused", per_device_eval_batch_size=rows, report_to=[], disable_tqdm=True)
    arguments.use_cpu = not torch.cuda.is_available()
    trainer = Trainer(model=model, args=arguments, **task.evaluation())
    trainer.remove_callback(PrinterCallback)
    found = [trainer.evaluate(task.splits[split])[f"eval_{task.metric}"] for split in ("validation", "test")]
    return task.unit * sum(found) / 2


def forms(path: Path) -> Iterator[tuple[str, nn.Module | str]]:
    """A checkpoint as it is, and in fewer bits; or why that cannot be."""
    for name, quantized in WAYS.items():
        try:
            yield name, quantized(load_pruned(path).float().eval())
        except Exception as error:  # quantizers refuse in many ways
            yield name, str(error).partition("\n")[0] or type(error).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="checkpoint before pruning")
    parser.add_argument("pruned", type=Path, nargs="+", help="checkpoints after it")
    parser.add_argument("--task", default="docstrings", help="as given to compare.py")
    parser.add_argument("--data_dir", type=Path, help="as given to compare.py")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--block_size", type=int, default=64, help="tokens of a row that is scored, for language")
    flags = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = load_task(flags)
    ids = torch.randint(1000, 20000, (flags.rows, flags.tokens), generator=torch.Generator().manual_seed(0))
    print(f"| model | weights | {task.metric} | MB | ms |\n|---|---|---:|---:|---:|")
    left_out = []
    for path in (flags.dense, *flags.pruned):
        made = dict(forms(path))
        models = {name: model for name, model in made.items() if not isinstance(model, str)}
        title = "dense" if path == flags.dense else path.name
        left_out += [f"{path.name}, {name}: {why}" for name, why in made.items() if isinstance(why, str)]
        with torch.no_grad():
            runs = [functools.partial(model, input_ids=ids) for model in models.values()]
            times = shortest_ms(runs, torch.device("cpu"), 5)
        for (name, model), time in zip(models.items(), times):
            figures = f"{scores(model, task, flags.rows):.2f} | {size(model) / 1e6:.1f} | {time:.0f}"
            print(f"| {title} | {name} | {figures} |", flush=True)
    print(f"\non {device_name(torch.device('cpu'))}", *left_out, sep="\n")


if __name__ == "__main__":
    main()
