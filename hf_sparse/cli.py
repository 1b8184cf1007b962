"""`hf-sparse`: run recipes, inspect and upload checkpoints, write cards, write for other engines, estimate memory."""

import argparse
import logging
import runpy
import sys
import typing
from pathlib import Path

from hf_sparse.checkpoint.anymodel import export_anymodel
from hf_sparse.checkpoint.card import CardFields, write_card
from hf_sparse.checkpoint.hub import push_to_hub
from hf_sparse.checkpoint.inspection import inspect_checkpoint
from hf_sparse.checkpoint.pages import write_pages
from hf_sparse.costs.memory import Engine, estimate_memory, load_config
from hf_sparse.errors import SparsityError
from hf_sparse.export.llama_cpp import OUTTYPES, export_gguf
from hf_sparse.export.onnx_runtime import export_onnx
from hf_sparse.export.onnx_session import SLOW_ON_CPUS
from hf_sparse.report.page import PAGE
from hf_sparse.version import __version__

PACKAGE = Path(__file__).parent
RECIPES = path if (path := PACKAGE / "recipes").is_dir() else PACKAGE.parent / "recipes"
"""In what was installed, or in the repository."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-sparse", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    names = sorted(path.stem for path in RECIPES.glob("*.py"))
    run = commands.add_parser(
        "run",
        help="fine-tune and prune a model by the recipe for its task",
        description="Runs a recipe. Without flags it takes data and a model that are installed; RECIPE --help shows "
        "all flags. On several devices: accelerate launch -m hf_sparse run RECIPE ...",
        epilog=f"recipes: {', '.join(names)}",
    )
    run.add_argument("recipe", metavar="RECIPE", choices=names, help="its name, such as text_classification")
    run.add_argument("flags", metavar="...", nargs=argparse.REMAINDER, help="its flags")
    run.set_defaults(run=_run)

    inspect = commands.add_parser(
        "inspect",
        help="print what a checkpoint has kept, without loading its weights",
        description="Prints the sizes, the dtype, and the heads and neurons that every sublayer kept, from the config "
        "and the headers of the weight files.",
    )
    inspect.add_argument("source", metavar="PATH_OR_REPO", help="a directory, or a repository such as me/my-model")
    inspect.add_argument("--revision", help="branch, tag or commit of the repository")
    inspect.set_defaults(run=lambda given: print(inspect_checkpoint(given.source, given.revision)))

    report = commands.add_parser(
        "report",
        help="write what came of a run as a page, or compare several runs",
        description="Writes one file of HTML that loads nothing: what a run removed and what that costs and is worth; "
        "of several runs a table and frontiers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    report.add_argument(
        "directories", metavar="RUN", type=Path, nargs="+", help="a directory that save_model or a recipe has written"
    )
    report.add_argument("--output", type=Path, default=Path(PAGE), help="the file to write")
    report.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    report.set_defaults(run=_report)

    push = commands.add_parser(
        "push",
        help="upload a saved model, with its card",
        description="Uploads model, tokenizer, card, report and picture, but no training state and no pickles. Log in "
        "first by `hf auth login`, or set HF_TOKEN.",
    )
    push.add_argument(
        "directory", metavar="PATH", type=Path, help="the directory that save_model or a recipe has written"
    )
    push.add_argument("repo_id", metavar="REPO", help="such as me/my-model; created if it does not exist")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", help="branch to write to")
    _add_card_fields(push)
    push.set_defaults(run=_push)

    card = commands.add_parser(
        "card",
        help="write README.md again from config.json and report.json",
        description="Writes the model card of a saved model again; a card that was edited (its mark deleted) is kept.",
    )
    card.add_argument(
        "directory", metavar="PATH", type=Path, help="the directory that save_model or a recipe has written"
    )
    card.add_argument("--model_id", help="the repository that the examples load; by default the directory's name")
    _add_card_fields(card)
    card.set_defaults(run=_card)

    estimate = commands.add_parser(
        "estimate",
        help="print how much memory a pruning run takes on every device, from a config alone",
        description="Prints the memory per device for weights, gates, optimizer, teacher and activations under an "
        "engine, without allocating the model. Flags have the names that training scripts use.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    estimate.add_argument("source", metavar="PATH_OR_REPO", help="a directory, or a repository such as me/my-model")
    estimate.add_argument(
        "--engine",
        choices=typing.get_args(Engine),
        default="single",
        help="FSDP2, or ZeRO of DeepSpeed",
    )
    estimate.add_argument("--num_processes", type=int, default=1, help="devices, as given to accelerate launch")
    estimate.add_argument("--per_device_train_batch_size", type=int, default=8, help="sequences per device in one step")
    estimate.add_argument("--max_seq_length", type=int, default=512, help="tokens of a sequence")
    estimate.add_argument("--bf16", action="store_true", help="mixed precision")
    estimate.add_argument(
        "--activation_checkpointing",
        "--gradient_checkpointing",  # its name in older versions of transformers
        action="store_true",
        help="keep only the inputs of layers, and compute the rest twice",
    )
    estimate.add_argument("--teacher_name_or_path", help="a dense teacher, such as the model itself")
    estimate.add_argument("--target", type=float, default=0.5, help="share of the prunable parameters to remove")
    estimate.add_argument(
        "--use_peft", action="store_true", help="train LoRA beside all linear layers; their own weights stay frozen"
    )
    estimate.add_argument("--lora_r", type=int, default=16, help="rank of LoRA")
    estimate.set_defaults(run=_estimate)

    anymodel = commands.add_parser(
        "anymodel",
        help="rewrite a pruned decoder for engines that serve layers of different sizes (vLLM's AnyModel)",
        description="Copies a pruned checkpoint, with the sizes of its layers in the format of vLLM's AnyModel. "
        "Transformers cannot load the copy.",
    )
    anymodel.add_argument("directory", metavar="PATH", type=Path, help="a pruned checkpoint")
    anymodel.add_argument("output", metavar="OUTPUT", type=Path, help="directory of the rewritten copy")
    anymodel.set_defaults(run=lambda given: export_anymodel(given.directory, given.output))

    gguf = commands.add_parser(
        "gguf",
        help="write a decoder, pruned or stock, with its tokenizer as a GGUF file for llama.cpp and Ollama",
        description="Writes one file that llama.cpp computes the same by; what it would compute otherwise is refused. "
        "Needs hf_sparse[gguf].",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    gguf.add_argument("directory", metavar="PATH", type=Path, help="a checkpoint")
    gguf.add_argument("output", metavar="OUT.gguf", type=Path, help="the file to write")
    gguf.add_argument("--outtype", choices=OUTTYPES, default="q8_0", help="how matrices are stored")
    gguf.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    gguf.set_defaults(
        run=lambda given: print(export_gguf(given.directory, given.output, given.outtype, given.overwrite))
    )

    onnx = commands.add_parser(
        "onnx",
        help="write a model, pruned or stock, as ONNX, and prove it in onnxruntime",
        description="Writes model.onnx, for any number of rows and of tokens, with the tokenizer or processor beside "
        "it. Needs hf_sparse[onnx].",
    )
    onnx.add_argument("directory", metavar="PATH", type=Path, help="a checkpoint")
    onnx.add_argument("output", metavar="OUT", type=Path, help="directory to write to")
    onnx.add_argument("--no_cache", action="store_true", help="a decoder reads the whole text at each call")
    onnx.set_defaults(run=_onnx)
    return parser


def _run(given: argparse.Namespace) -> None:
    """Run a recipe in this process, as if its file had been started."""
    path = str(RECIPES / f"{given.recipe}.py")
    sys.argv = [path, *given.flags]
    sys.path.insert(0, str(RECIPES))
    runpy.run_path(path, run_name="__main__")


def _estimate(given: argparse.Namespace) -> None:
    found = estimate_memory(
        load_config(given.source),
        given.engine,
        given.num_processes,
        given.per_device_train_batch_size,
        given.max_seq_length,
        given.bf16,
        given.activation_checkpointing,
        load_config(given.teacher_name_or_path) if given.teacher_name_or_path else None,
        given.target,
        given.lora_r if given.use_peft else None,
    )
    print(f"{found}\n{found.units:,} heads and neurons get gates; leave a tenth for allocators and communication")


def _onnx(given: argparse.Namespace) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that nobody needs here
    worst = export_onnx(given.directory, given.output, not given.no_cache)
    print(f"{given.output} is within {worst:.1e} of torch; on CPUs give onnxruntime disabled_optimizers={SLOW_ON_CPUS}")


def _report(given: argparse.Namespace) -> None:
    write_pages(given.directories, given.output, given.overwrite)
    print(f"the page is {given.output}")


def _add_card_fields(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name", help="name of the model in the card")
    parser.add_argument("--language", help="of the texts, such as en")
    parser.add_argument("--license", help="of the weights, such as apache-2.0")
    parser.add_argument("--tags", nargs="*", default=[], help="tags of the card")


def _card_fields(given: argparse.Namespace, model_id: str | None) -> CardFields:
    return CardFields(model_id, given.model_name, given.language, given.license, tuple(given.tags))


def _card(given: argparse.Namespace) -> None:
    write_card(given.directory, given.directory, _card_fields(given, given.model_id))


def _push(given: argparse.Namespace) -> None:
    about = _card_fields(given, given.repo_id)
    commit = push_to_hub(given.directory, given.repo_id, about=about, private=given.private, revision=given.revision)
    print(f"{given.directory} is at {commit.repo_url}")


def main(arguments: list[str] | None = None) -> None:
    """Run a command; an error that the user can mend becomes one line and exit code 2."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except SparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
