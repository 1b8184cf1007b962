"""Read the directories that runs leave, and write their pages."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from hf_sparse.checkpoint.card import REPORT
from hf_sparse.checkpoint.inspection import CheckpointSummary, inspect_checkpoint
from hf_sparse.errors import SparsityError
from hf_sparse.report.history import NOT_LOGGED, History
from hf_sparse.report.page import Run, comparison_page
from hf_sparse.report.report import Report
from hf_sparse.runtime.files import write_whole


def write_pages(directories: Sequence[Path], output: Path, overwrite: bool = False) -> None:
    """Write the page of a run, or, of several, one that compares them.

    Args:
        directories: of the runs.
        output: the file to write.
        overwrite: whether it may be there.

    Raises:
        SparsityError: a run has no readable report, the runs have no metric in common, or the file is there or cannot
            be written.
    """
    if output.exists() and not overwrite:
        raise SparsityError(f"{output} is there: give --overwrite, or another --output")
    runs = [read_run(directory) for directory in directories]
    if len(runs) == 1:
        write_whole(output, runs[0].page())
        return
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    reports = dict(zip(names, (run.report for run in runs)))
    if len(reports) < len(runs):
        raise SparsityError("a run is given twice: name each once")
    write_whole(output, comparison_page(reports))


def read_run(directory: Path) -> Run:
    """Read what is known of a run.

    Raises:
        SparsityError: it has no readable report, or a damaged checkpoint or log.
    """
    if not (directory / REPORT).is_file():
        raise SparsityError(f"{directory} has no {REPORT}: give a directory that save_model or a recipe has written")
    name, state = directory.resolve().name, directory / TRAINER_STATE_NAME
    summary = inspect_checkpoint(directory) if (directory / CONFIG_NAME).is_file() else None
    return Run(
        name,
        Report.read(directory / REPORT),
        History.read(state) if state.is_file() else NOT_LOGGED,
        _members(directory),
        ways_to_load(summary, str(directory)) if summary is not None else (),
    )


def _members(directory: Path) -> dict[str, Report]:
    """Read the reports of the models that a run with several targets leaves, by name, the densest first.

    Raises:
        SparsityError: one is damaged.
    """
    found = {path.parent.name: Report.read(path) for path in directory.glob(f"removed-*/{REPORT}")}
    return dict(sorted(found.items(), key=lambda member: member[1].achieved))


def ways_to_load(summary: CheckpointSummary, source: str) -> list[tuple[str, str]]:
    """List how a checkpoint is loaded, in words and in code."""
    place = json.dumps(source, ensure_ascii=False)
    load, own = f"load_pruned({place})", summary.of_own_class
    loader = summary.architecture if own else summary.auto_class
    code = f"from {'the_code' if own else 'transformers'} import {loader}\n\nmodel = {loader}.from_pretrained({place}"
    if not summary.pruned:
        ways = [(f"As a stock {summary.architecture}, without hf_sparse", f"{code})")]
    elif own:
        ways = [("By its class, which is its authors' own", f"import hf_sparse\n{code})")]
        load = f"load_pruned({place}, {loader})"
    else:
        ways = [
            ("With hf_sparse installed", f"import hf_sparse\n{code})"),
            ("Without it, by the file of code in the checkpoint", f"{code}, trust_remote_code=True)"),
        ]
    return [*ways, ("By hf_sparse, which knows the class", f"from hf_sparse import load_pruned\n\nmodel = {load}")]
