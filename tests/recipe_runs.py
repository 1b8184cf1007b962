"""Runs of recipes in this process."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from common import running
from common.task import Task

RECIPES = Path(__file__).parents[1] / "recipes"


def start(task: type[Task], flags: Mapping[str, object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a recipe in this process; returns its exit code."""
    words = [str(word) for flag in flags.items() for word in flag if word is not None]
    monkeypatch.setattr(sys, "argv", [f"{task.__name__}.py", *words])
    try:
        running.run(task, task.__doc__)
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
