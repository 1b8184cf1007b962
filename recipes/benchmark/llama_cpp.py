"""How fast pruned decoders are in llama.cpp, against the dense one stored alike, and how near to transformers.

    python recipes/benchmark/llama_cpp.py
    python recipes/benchmark/llama_cpp.py out/pruned --dense my-model

Without directories, SmolLM2 is pruned by a Taylor ranking and not trained: its sizes are what is measured. All files of
a kind take turns, and the best speed of each counts. *Promised* is the ratio of the sizes of the files, since decoding
reads every weight once a token. Needs `pip install -e .[bench,gguf]`.
"""

import argparse
import itertools
import math
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from common.served import Served
from embedded.docstrings import docstrings_of
from embedded.smollm import smollm
from ranking import plan_by_rank
from transformers import AutoTokenizer

from hf_sparse import PruningPlan, compact, export_gguf, load_pruned, save_pruned
from hf_sparse.export.llama_cpp import OUTTYPES

SHARES = (0.2, 0.4)
BLOCK = 32  # neurons
PROMPT, GENERATED, REPEATS = 128, 16, 16
"""Tokens of a turn, which is short, so that some turns are undisturbed, and turns."""


def prune(dense: Path, share: float, path: Path) -> None:
    """Remove the units that the loss of some texts depends on least, and keep whole blocks of neurons."""
    model, tokenizer = load_pruned(dense), AutoTokenizer.from_pretrained(dense)
    ids = torch.tensor(text("pandas", tokenizer, 2048)).view(-1, 256)
    batches = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    plan = plan_by_rank("taylor", model, batches, share, seed=0).kept
    blocks = {name: len(units) // BLOCK * BLOCK if len(units) > BLOCK else len(units) for name, units in plan.items()}
    compact(model, PruningPlan({name: units[: blocks[name]] for name, units in plan.items()}))
    save_pruned(model, path, tokenizer)


def text(library: str, tokenizer: Any, count: int) -> list[int]:
    """The first tokens of docstrings of a library, all of them ASCII: an engine reports no parts of characters."""
    found = itertools.islice(docstrings_of(library, random.Random(0)), 200)
    whole = "\n\n".join(one for one in found if one.isascii())
    return tokenizer(whole)["input_ids"][:count]


def distance(directory: Path, file: Path, tokens: list[int]) -> float:
    """The largest difference in log-probabilities between transformers and llama.cpp."""
    with torch.no_grad():
        logits = load_pruned(directory).eval()(torch.tensor([tokens])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]
    found = Served(file, len(tokens) + 1).logprobs(tokens)
    return float((torch.tensor(found) - expected).abs().max())


def perplexity(file: Path, tokens: list[int]) -> float:
    """Perplexity of llama.cpp as it comes."""
    logprobs = Served(file, len(tokens) + 1, exact=False).logprobs(tokens)
    return math.exp(-sum(logprobs) / len(logprobs))


def speeds(files: Mapping[str, Path], tokens: list[int], threads: int) -> dict[str, dict[str, float]]:
    """Tokens per second of each file, the best of several turns."""
    served = {name: Served(file, PROMPT + GENERATED + 1, threads, exact=False) for name, file in files.items()}
    best = {name: {"prefill": 0.0, "decode": 0.0} for name in files}
    for _ in range(REPEATS):
        for name, one in served.items():
            found = one.speeds(tokens[:PROMPT], GENERATED)
            best[name] = {kind: max(best[name][kind], speed) for kind, speed in found.items()}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", metavar="PATH", nargs="*", type=Path, help="pruned models")
    parser.add_argument("--dense", type=Path, help="the model before; SmolLM2 by default")
    parser.add_argument("--outtypes", nargs="+", choices=OUTTYPES, default=["f32", "q8_0", "q4_0"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", type=int, default=1000, help="to measure perplexity on; more than 201")
    flags = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dense = flags.dense or Path(smollm())
    tokens = text("numpy", AutoTokenizer.from_pretrained(dense), flags.tokens)
    with tempfile.TemporaryDirectory() as directory:
        models = {"dense": dense, **{path.name: path for path in flags.pruned}}
        for share in SHARES if not flags.pruned else ():
            name = f"{share:.0%} removed"
            models[name] = Path(directory) / name
            prune(dense, share, models[name])
        for outtype in flags.outtypes:
            files = {name: Path(directory) / f"{name}.gguf" for name in models}
            for name, path in models.items():
                print(export_gguf(path, files[name], outtype, overwrite=True), file=sys.stderr)
            if outtype == "f32":
                for name, path in models.items():
                    print(f"\n{name}: {distance(path, files[name], tokens[:201]):.1e} from transformers at most")
            print_table(outtype, files, tokens, flags.threads)


def print_table(outtype: str, files: Mapping[str, Path], tokens: list[int], threads: list[int]) -> None:
    """Print what is measured of the files of a kind."""
    measured = {count: speeds(files, tokens, count) for count in threads}
    print(f"\n| {outtype} | MB | perplexity | threads | decode, tokens/s | as fast | promised | prefill | as fast |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, file in files.items():
        size, least = file.stat().st_size, f"{perplexity(file, tokens):.2f}"
        promised = files["dense"].stat().st_size / size
        for count, found in measured.items():
            decode, prefill = found[name]["decode"], found[name]["prefill"]
            ratios = [speed / found["dense"][kind] for kind, speed in found[name].items()]
            print(
                f"| {name} | {size / 1e6:.1f} | {least} | {count} | {decode:.1f} | {ratios[1]:.2f} | {promised:.2f} | "
                f"{prefill:.0f} | {ratios[0]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
