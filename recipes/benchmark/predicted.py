"""How well `--cost latency` knows what a smaller model takes: predicted and measured times of random layouts.

    python recipes/benchmark/predicted.py
    python recipes/benchmark/predicted.py --model_name_or_path google-bert/bert-base-uncased --batch 64 --tokens 128

Prints a table in Markdown: every layout keeps about a share of all heads and neurons, the same in all layers, or more
in some than in others. Nothing is trained.
"""

import argparse
import copy
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from embedded.minilm import minilm
from transformers import AutoModelForSequenceClassification

from hf_sparse import PruningPlan, SparsityConfig, compact, discover
from hf_sparse.costs.latency import measured_costs
from hf_sparse.costs.table import cost_batch
from hf_sparse.runtime.timing import device_name, shortest_ms
from hf_sparse.structure.blocks import ModelStructure

REPEATS = 15


def layout(structure: ModelStructure, share: float, uneven: bool, generator: torch.Generator) -> dict[str, int]:
    """Units that every block keeps: at least one in all of them, or about a share on average and none in some."""
    counts = {}
    for block in structure.blocks:
        factor = 2 * float(torch.rand((), generator=generator)) if uneven else 1.0
        count = min(block.units, round(factor * share * block.units))
        counts[block.name] = block.physical(count if uneven else max(1, count))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="all-MiniLM-L6-v2 by default")
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per sequence")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25, 0.1, 0.05], help="of units that stay")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    flags = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense = AutoModelForSequenceClassification.from_pretrained(
        flags.model_name_or_path or minilm(), dtype=getattr(torch, flags.dtype)
    )
    dense = dense.eval().to(device)
    config = SparsityConfig(cost="latency", cost_batch_size=flags.batch, cost_sequence_length=flags.tokens)
    structure = discover(dense)
    batch = cost_batch(dense, config, None)
    costs = measured_costs(dense, structure, config, batch)
    structure = structure.rounded(costs.multiple)
    generator = torch.Generator().manual_seed(0)
    layouts = {
        f"{share:.0%}, {'uneven' if uneven else 'even'}": layout(structure, share, uneven, generator)
        for share in flags.shares
        for uneven in (False, True)
    }
    models = [dense]
    for counts in layouts.values():
        models.append(copy.deepcopy(dense))
        compact(models[-1], PruningPlan({name: tuple(range(count)) for name, count in counts.items()}))
    with torch.inference_mode():
        runs = [functools.partial(model, **batch) for model in models]
        measured = shortest_ms(runs, device, REPEATS)
    whole = {block.name: block.units for block in structure.blocks}
    print(f"{flags.batch} x {flags.tokens} tokens in {flags.dtype} on {device_name(device)}\n")
    print("| units that stay | predicted | measured | predicted / measured | times as fast |\n|---|---|---|---|---|")
    for (name, counts), time in zip({"all": whole, **layouts}.items(), measured):
        predicted = costs.rest + sum(costs.blocks[block][count] for block, count in counts.items())
        ratios = f"{predicted / time:.2f} | {measured[0] / time:.1f}x"
        print(f"| {name} | {predicted:.1f} ms | {time:.1f} ms | {ratios} |")


if __name__ == "__main__":
    main()
