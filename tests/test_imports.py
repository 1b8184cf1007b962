"""Data flows one way: what a module may import is what comes before it in the design."""

import ast
import sys
from pathlib import Path

import hf_sparse

PACKAGE = Path(hf_sparse.__file__).parent

# From the leaves up; a module imports only from those before it.
ORDER = [
    "version",
    "errors",
    "processes",
    "config",
    "directories",
    "contexts",
    "modeling_hf_sparse",
    "families",
    "scaling",
    "structure",
    "probing",
    "streaming",
    "comparison",
    "slicing",
    "head_tables",
    "selection",
    "inputs",
    "prunable",
    "ownership",
    "experts",
    "proof",
    "discovery",
    "layout",
    "stock",
    "size_names",
    "gates",
    "objective",
    "patterns",
    "controller",
    "distillation",
    "answers",
    "listening",
    "plan",
    "costs",
    "timing",
    "macs",
    "latency",
    "refit",
    "steering",
    "sensitivity",
    "weights",
    "sparse",
    "bank",
    "landing",
    "patching",
    "pruned_config",
    "own_classes",
    "compaction",
    "report",
    "plot",
    "family",
    "sharding",
    "surgery",
    "zero3",
    "zero",
    "model",
    "row_memory",
    "teacher",
    "distilling",
    "starting",
    "tasks",
    "usage",
    "evaluating",
    "inspection",
    "memory",
    "card",
    "anymodel",
    "checkpoint",
    "hub",
    "results",
    "refusals",
    "finite",
    "resuming",
    "preemption",
    "scheduling",
    "searching",
    "weight_trainer",
    "estimates",
    "stages",
    "trainer",
    "cli",
]
MATHEMATICS = ["gates", "objective", "patterns", "controller", "distillation", "plan"]


def imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return names | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_modules_import_only_what_comes_before_them() -> None:
    for index, module in enumerate(ORDER):
        own = {name.split(".")[1] for name in imports(module) if name.startswith("hf_sparse.")}
        assert own <= set(ORDER[:index]), module


def test_mathematics_knows_no_transformers() -> None:
    for module in MATHEMATICS:
        assert not any(name.split(".")[0] == "transformers" for name in imports(module)), module


def test_the_file_that_travels_needs_only_torch_and_transformers() -> None:
    outside = {name.split(".")[0] for name in imports("modeling_hf_sparse")} - sys.stdlib_module_names
    assert outside == {"torch", "transformers"}


def test_no_file_is_too_long_to_read() -> None:
    for path in PACKAGE.glob("*.py"):
        if path.stem != "modeling_hf_sparse":  # it travels in checkpoints, alone
            assert len(path.read_text().splitlines()) <= 420, path.name
