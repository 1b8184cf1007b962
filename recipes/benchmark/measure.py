"""How fast the models of compare.py are, against the dense one: in eager torch and onnxruntime, beside their MACs.

    python recipes/benchmark/measure.py --task sst2

Dense and pruned model take turns in random order, and the shortest time of each counts. One JSON line per model of
--output_dir goes to --measurements; models that have one are skipped. Needs `pip install -e .[bench]`.
"""

import argparse
import functools
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse import load_pruned
from hf_sparse.costs.macs import count_macs
from hf_sparse.runtime.timing import device_name, shortest_ms

BATCHES = (1, 32)
REPEATS = 15
ONNX = {"onnx": ("SkipLayerNormFusion",), "onnx_as_it_comes": ()}
"""What onnxruntime is told not to do: on CPUs its kernel for a norm of a sum is slower than a sum and a norm."""


def texts(batch: int, tokens: int) -> dict[str, Tensor]:
    """Random token ids, without padding."""
    ids = torch.randint(1000, 20000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _Logits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def in_onnxruntime(model: PreTrainedModel, inputs: dict[str, Tensor], threads: int) -> dict[str, Callable[[], Any]]:
    """The model in onnxruntime, by the names of ONNX, for inputs of these shapes; its logits are checked."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of onnxscript, about itself
        path = Path(directory) / "model.onnx"
        torch.onnx.export(_Logits(model), tuple(inputs.values()), path, verbose=False)
        sessions = {
            name: onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
            )
            for name, disabled in ONNX.items()
        }
    expected = model(**inputs).logits
    runs: dict[str, Callable[[], Any]] = {}
    for name, session in sessions.items():
        given = {node.name: value.numpy() for node, value in zip(session.get_inputs(), inputs.values())}
        runs[name] = functools.partial(session.run, None, given)
        torch.testing.assert_close(torch.from_numpy(runs[name]()[0]), expected, rtol=1e-3, atol=1e-3)
    return runs


@torch.inference_mode()
def measure(dense: PreTrainedModel, pruned: PreTrainedModel, tokens: int) -> dict[str, Any]:
    """Times of both, in milliseconds, and their ratios."""
    figures: dict[str, Any] = {"tokens": tokens, "parameters": pruned.num_parameters()}
    for batch in BATCHES:
        inputs = texts(batch, tokens)
        macs = [count_macs(model, inputs) for model in (dense, pruned)]
        figures[f"macs_{batch}"] = macs[0] / macs[1]
        runs: list[Callable[[], Any]] = [functools.partial(model, **inputs) for model in (dense, pruned)]
        engines = {"torch": runs}
        exported = [in_onnxruntime(model, inputs, torch.get_num_threads()) for model in (dense, pruned)]
        engines |= {engine: [by_engine[engine] for by_engine in exported] for engine in ONNX}
        for engine, pair in engines.items():
            before, after = shortest_ms(pair, dense.device, REPEATS)
            figures[f"{engine}_{batch}"] = before / after
            figures[f"{engine}_{batch}_ms"] = after
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="docstrings", help="as given to compare.py")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark"), help="as given to compare.py")
    parser.add_argument("--measurements", type=Path, default=Path("runs/benchmark/measurements.jsonl"))
    parser.add_argument("--tokens", type=int, default=32, help="tokens per sequence")
    parser.add_argument("--threads", type=int, default=1)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dense = load_pruned(flags.output_dir / flags.task / "dense").eval()
    lines = flags.measurements.read_text().splitlines() if flags.measurements.is_file() else []
    done = {(line["task"], line["model"]) for line in map(json.loads, lines)}
    for path in sorted((flags.output_dir / flags.task).iterdir()):
        if (flags.task, path.name) in done or not (path / "config.json").is_file() or path.name == "dense":
            continue
        figures = measure(dense, load_pruned(path).eval(), flags.tokens)
        line = {"task": flags.task, "model": path.name, "device": device_name(dense.device), **figures}
        with flags.measurements.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(path.name, {name: round(value, 2) for name, value in figures.items()}, flush=True)


if __name__ == "__main__":
    main()
