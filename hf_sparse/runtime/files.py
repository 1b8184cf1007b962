"""Replace a checkpoint directory, or a file, as a whole: a kill at any moment leaves the old one or the new one."""

import ctypes
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from hf_sparse.errors import SparsityError

ADAPTER = "adapter"
"""Directory of the adapter beside a model that is saved without it."""

CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index*.json",
    "pytorch_model*.bin*",
    "adapter_config.json",
    "adapter_model*",
    ADAPTER,
    "modeling_*.py",
    "custom_generate*",
)
"""What belongs to the checkpoint that is replaced, and would be applied to the new one: all else stays."""

_UNFINISHED = ".unfinished"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Open a temporary directory; its files replace those of `path` when the block ends without an error.

    Raises:
        SparsityError: the directory cannot be written; what was there is as it was.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise SparsityError(f"cannot write {path}: it is a file, give a directory")
    host = socket.gethostname()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside it, but for a directory that is mounted into a place where nothing else can be written.
        home = path.parent if not path.exists() or os.access(path.parent, os.W_OK) else path
        for other in home.glob(f".{path.name}.new-{host}-*"):
            if not _runs(int(other.name.split("-")[-2])):
                _clear(other, path)
        temporary = Path(tempfile.mkdtemp(dir=home, prefix=f".{path.name}.new-{host}-{os.getpid()}-"))
        (temporary / _UNFINISHED).touch()
    except OSError as error:
        raise SparsityError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        for entry in temporary.iterdir():
            # Weights are written for their owner alone, who wants colleagues to load them.
            entry.chmod(0o755 if entry.is_dir() else 0o644)
        (temporary / _UNFINISHED).unlink()
        if not path.exists():
            temporary.rename(path)
        # A directory that a process stands in would be gone from under it.
        elif path not in (Path.cwd(), home) and _exchange(temporary, path):
            _clear(temporary, path)
        else:
            _move_files(temporary, path)
    except (OSError, SafetensorError) as error:
        raise SparsityError(f"cannot write {path}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Open a temporary file, readable by all; it takes the place of `path` when the block ends without an error.

    Raises:
        SparsityError: the file cannot be written; what was there is as it was.
    """
    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise SparsityError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, readable by all.

    Raises:
        SparsityError: it cannot be written; what was there is as it was.
    """
    with replaced_file(path) as temporary:
        temporary.write_text(text)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def belongs_to_checkpoint(name: str) -> bool:
    """Tell whether a file, by its name, is part of a model: its config, weights or code."""
    return any(fnmatch(name, pattern) for pattern in CHECKPOINT_FILES)


def _clear(directory: Path, path: Path) -> None:
    """Remove what `path` was before, or what a killed process left, after its other entries are brought over."""
    if path.is_dir() and not (directory / _UNFINISHED).exists():
        for entry in directory.iterdir():
            if not belongs_to_checkpoint(entry.name) and not (path / entry.name).exists():
                entry.rename(path / entry.name)
    shutil.rmtree(directory)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step, where the system can."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _move_files(temporary: Path, path: Path) -> None:
    """Where directories cannot be swapped: file by file, without a config in between, so that no mixture loads."""
    (path / "config.json").unlink(missing_ok=True)
    for entry in path.iterdir():
        if entry.is_dir() and belongs_to_checkpoint(entry.name):
            shutil.rmtree(entry)
        elif belongs_to_checkpoint(entry.name):
            entry.unlink()
    for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == "config.json"):
        shutil.move(entry, path / entry.name)
