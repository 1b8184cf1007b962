"""Zeros among weights instead of smaller matrices: hf_sparse against a magnitude ranking, and how fast they run here.

    python recipes/benchmark/weights.py --task sst2 --data_dir sst2 --bf16 --threads 1 --learning_rate 2e-4

Model, data, teacher, steps and distillation are those of compare.py, and so are cells and their lines: those that are
there already are skipped. Everyone has the same pattern and keeps the same number of weights. Latency is that of one
forward of 32 x 32 tokens in float32, dense and with the weights as sparse tensors, in turns.
"""

import copy
import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
from compare import Bench, begin, is_recorded, record
from compare import parser as compare_parser
from transformers import PreTrainedModel, PrinterCallback, set_seed

from hf_sparse import DenseTrainer, SparseWeightsTrainer, SparsityError, WeightSparsityConfig, to_sparse_
from hf_sparse.gates.patterns import KEPT, largest, pattern_of
from hf_sparse.gates.weights import attach_masks, fold_weights_, matrices, weight_densities
from hf_sparse.report.report import latencies_ms
from hf_sparse.runtime.contexts import plain_forward

CELLS = [("unstructured", 0.9), ("unstructured", 0.95), ("block", 0.75), ("block", 0.9), ("2:4", 0.5)]
LAYOUTS: dict[str, Literal["csr", "bsr", "2:4"]] = {"unstructured": "csr", "block": "bsr", "2:4": "2:4"}


def magnitude_masks(model: PreTrainedModel, sparsity: WeightSparsityConfig) -> dict[str, torch.Tensor]:
    """Which weights (or blocks, by their norm) are the largest of their matrix, or of every four.

    One threshold for all matrices would leave none of the pooler's, whose weights are small.
    """
    pattern = pattern_of(sparsity.pattern, sparsity.block_size)
    masks = {}
    for name in matrices(model):
        weight = model.get_parameter(f"{name}.weight").detach()
        norms = pattern.pool(weight.square())
        if sparsity.pattern == "2:4":
            kept = largest(norms, KEPT)
        else:
            kept = largest(norms.unsqueeze(1), round((1 - sparsity.target) * len(norms))).squeeze(1)
        masks[name] = pattern.spread(kept, *weight.shape)
    return masks


def run(bench: Bench, cell: dict[str, Any]) -> dict[str, Any]:
    dense = bench.dense()
    model = copy.deepcopy(dense)
    arguments = bench.arguments(cell["epochs"], cell["learning_rate"], cell["seed"])
    sparsity = WeightSparsityConfig(
        pattern=cell["pattern"], target=cell["target"], cache_teacher=True, **json.loads(cell["options"])
    )
    set_seed(cell["seed"])
    began = time.process_time()
    trainer: Any
    if cell["method"] == "ours":
        trainer = SparseWeightsTrainer(**bench.options(model, arguments), teacher=dense, sparsity=sparsity)
    else:
        attach_masks(model, magnitude_masks(model, sparsity))
        trainer = DenseTrainer(**bench.options(model, arguments), teacher=dense, distillation=sparsity)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = time.process_time() - began
    fold_weights_(model)
    densities = weight_densities(model)
    weights = {name: model.get_parameter(f"{name}.weight").numel() for name in densities}
    removed = 1 - sum(densities[name] * count for name, count in weights.items()) / sum(weights.values())
    losses = [(log["step"], float(log["loss"])) for log in trainer.state.log_history if "loss" in log]
    result = {"removed": removed, **bench.scores(trainer), "cpu_seconds": round(seconds, 1)}
    return {**result, **speed(dense, model, cell["pattern"]), "losses": losses}


def speed(dense: PreTrainedModel, model: PreTrainedModel, pattern: str) -> dict[str, Any]:
    sparse = copy.deepcopy(model)
    try:
        layers = to_sparse_(sparse, LAYOUTS[pattern])
    except SparsityError as error:
        return {"speedup": None, "reason": str(error)}
    tokens = torch.randint(1000, 20000, (32, 32), device=dense.device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    # Without inference mode and the half precision of accelerate, which not all sparse products take.
    with torch.no_grad(), plain_forward(model), plain_forward(sparse):
        difference = (model.eval()(**inputs).logits - sparse.eval()(**inputs).logits).abs().max().item()
        slow, fast = latencies_ms([dense, sparse], inputs)
    return {"speedup": round(slow / fast, 2), "sparse_layers": len(layers), "max_abs_diff": difference}


def main() -> None:
    parser = compare_parser(__doc__)
    parser.set_defaults(methods=["ours", "magnitude"], results=Path("runs/benchmark/weights.jsonl"))
    parser.add_argument("--patterns", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    flags = parser.parse_args()
    bench = begin(flags)
    for seed in flags.seeds:
        for pattern, target in CELLS:
            for method in flags.methods:
                cell = {"task": flags.task, "method": method, "pattern": pattern, "target": target, "seed": seed}
                cell |= {"epochs": flags.epochs, "learning_rate": flags.learning_rate, "options": flags.options}
                wanted = pattern in flags.patterns and (target in flags.targets or pattern == "2:4")
                if not wanted or is_recorded(cell, flags.results):
                    continue
                line = {**cell, **run(bench, cell)}
                record(line, flags.results)
                shown = {key: line[key] for key in ("removed", "mean", "speedup", "cpu_seconds")}
                print(method, pattern, target, seed, shown, flush=True)


if __name__ == "__main__":
    main()
