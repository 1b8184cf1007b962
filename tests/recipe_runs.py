"""Runs of recipes in this process."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from common import running
from common.task import Task

SHORT: dict[str, object] = {"--learning_rate": 1e-3, "--report_to": "none", "--use_cpu": None}
"""What most runs here have in common."""


def words(flags: Mapping[str, object]) -> list[str]:
    """The words of a command line; a flag whose value is None has none."""
    return [str(word) for flag in flags.items() for word in flag if word is not None]


def files(
    write: Callable[[Path, int], Path], directory: Path, counts: tuple[int, int, int], end: str
) -> dict[str, Path]:
    """Flags of files of so many rows, which `write` writes."""
    splits = zip(("train", "validation", "test"), counts)
    return {f"--{split}_file": write(directory / f"{split}.{end}", count) for split, count in splits}


def start(task: type[Task], flags: Mapping[str, object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a recipe in this process, as its file would; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{task.__module__}.py", *words(flags)])
    try:
        running.run(task, sys.modules[task.__module__].__doc__)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def mistake(
    task: type[Task],
    flags: Mapping[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Run a recipe that has to end before any work; returns its one line of error."""
    assert start(task, flags, monkeypatch) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert not Path(str(flags["--output_dir"])).exists()
    return error
