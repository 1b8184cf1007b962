"""Data flows one way: what a package may import is what comes before it in the design."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_sparse

ROOT = Path(hf_sparse.__file__).parent

# From the leaves up; a package imports from itself and from lower floors, and from no neighbour on its own.
FLOORS = [
    {"version", "errors", "modeling_hf_sparse"},
    {"runtime", "config"},
    {"structure"},
    {"costs"},
    {"gates"},
    {"compaction", "engines"},
    {"report", "distillation"},
    {"checkpoint"},
    {"export"},
    {"training", "cli"},
    {"__main__"},
]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
FILES = {name: path for name, path in FILES.items() if not name.endswith("__init__")}
MATHEMATICS = [f"gates.{name}" for name in ("mathematics", "objective", "patterns", "controller", "plan")]
MATHEMATICS.append("distillation.losses")


def imports(module: str) -> set[str]:
    tree = ast.parse(FILES[module].read_text())
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return names | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def own(module: str) -> set[str]:
    return {name.removeprefix("hf_sparse.") for name in imports(module) if name.startswith("hf_sparse.")}


def test_packages_import_only_from_lower_floors() -> None:
    assert {name.split(".")[0] for name in FILES} == set().union(*FLOORS)
    for i, floor in enumerate(FLOORS):
        for package in floor:
            below = set().union(*FLOORS[:i]) | {package}
            for module in [name for name in FILES if name.split(".")[0] == package]:
                assert {name.split(".")[0] for name in own(module)} <= below, module


def test_there_are_no_circles() -> None:
    list(TopologicalSorter({module: own(module) for module in FILES}).static_order())


def test_the_init_of_a_package_says_what_it_is_for_and_where_to_begin() -> None:
    for path in ROOT.glob("*/__init__.py"):
        [said] = ast.parse(path.read_text()).body
        text = ast.literal_eval(said.value) if isinstance(said, ast.Expr) else ""
        [first] = [word for word in text.split() if word.endswith(".py")]
        assert (path.parent / first).is_file(), path


@pytest.mark.parametrize("module", MATHEMATICS)
def test_mathematics_knows_no_transformers(module: str) -> None:
    assert not any(name.split(".")[0] == "transformers" for name in imports(module))


def test_the_file_that_travels_needs_only_torch_and_transformers() -> None:
    outside = {name.split(".")[0] for name in imports("modeling_hf_sparse")} - sys.stdlib_module_names
    assert outside == {"torch", "transformers"}


def test_no_file_is_too_long_to_read() -> None:
    for module, path in FILES.items():
        if module != "modeling_hf_sparse":  # it travels in checkpoints, alone, and is as long as that takes
            assert len(path.read_text().splitlines()) <= 420, module


def test_the_guide_names_files_that_are_there() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / "README.md").read_text())
    assert {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")} <= set(named)
    for name in named:
        assert (ROOT / name).exists() or len(list(ROOT.rglob(name))) or (ROOT.parent / name).exists(), name


def printed_by(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_brings_no_models_and_no_trainer() -> None:
    code = "import sys, hf_sparse; print(*sys.modules); assert set(hf_sparse.__all__) <= set(dir(hf_sparse))"
    heavy = {"transformers.modeling_utils", "transformers.quantizers", "transformers.trainer"}
    assert not (heavy | {"peft", "datasets", "matplotlib"}) & set(printed_by(code))


@pytest.mark.parametrize("before", ["", "from transformers import PreTrainedModel; "])
def test_the_loader_of_other_classes_is_registered_once_there_are_models(before: str) -> None:
    code = (
        f"{before}import hf_sparse; from transformers import PreTrainedModel; import transformers.quantizers.auto as q"
    )
    assert printed_by(f"{code}; print(q.AUTO_QUANTIZER_MAPPING['hf_sparse'].__name__)") == ["Replay"]


def test_every_public_name_is_imported_from_where_type_checkers_see_it() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    [seen] = [node for node in tree.body if isinstance(node, ast.If)]
    places = {alias.name: node.module for node in seen.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(places) == set(hf_sparse.__all__) - {"__version__"}
    for name, module in places.items():
        assert getattr(hf_sparse, name) is getattr(importlib.import_module(str(module)), name)


def test_recipes_use_public_names_only() -> None:
    """Benchmarks also look inside the library, but not into the parts of its Trainers."""
    for path in (ROOT.parent / "recipes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("hf_sparse"):
                continue
            names = {alias.name for alias in node.names}
            if path.parent.name != "benchmark":
                assert node.module == "hf_sparse" and names <= set(hf_sparse.__all__), path
            package = str(node.module).split(".")[1:2]
            assert package not in (["training"], ["engines"], ["distillation"]), path
            assert not any(name.startswith("_") for name in names), path


def test_all_packages_are_installed() -> None:
    named = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent.relative_to(ROOT.parent).as_posix() for path in ROOT.rglob("__init__.py")}
    assert set(named) == {name.replace("/", ".") for name in found} | {"hf_sparse.recipes"}
