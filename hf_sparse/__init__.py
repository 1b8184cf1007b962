"""hf_sparse: pretrained transformers get smaller while they are fine-tuned, by gradient descent alone.

Importing it lets `AutoModelForX.from_pretrained` load pruned checkpoints, and takes no longer than importing an auto
class: everything else is imported when a model is loaded or one of the names below is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_sparse.modeling_hf_sparse import register as _register
from hf_sparse.runtime.importing import import_after as _import_after
from hf_sparse.version import __version__ as __version__

if TYPE_CHECKING:
    from hf_sparse.checkpoint.anymodel import export_anymodel as export_anymodel
    from hf_sparse.checkpoint.card import CardFields as CardFields
    from hf_sparse.checkpoint.hub import push_to_hub as push_to_hub
    from hf_sparse.checkpoint.inspection import inspect_checkpoint as inspect_checkpoint
    from hf_sparse.checkpoint.save_load import load_pruned as load_pruned
    from hf_sparse.checkpoint.save_load import save_pruned as save_pruned
    from hf_sparse.compaction.compact import CompactionReport as CompactionReport
    from hf_sparse.compaction.compact import compact as compact
    from hf_sparse.compaction.sparse_tensors import to_sparse_ as to_sparse_
    from hf_sparse.config import DistillationConfig as DistillationConfig
    from hf_sparse.config import SparsityConfig as SparsityConfig
    from hf_sparse.config import WeightSparsityConfig as WeightSparsityConfig
    from hf_sparse.errors import NonFiniteLossError as NonFiniteLossError
    from hf_sparse.errors import SparsityError as SparsityError
    from hf_sparse.export.llama_cpp import export_gguf as export_gguf
    from hf_sparse.export.onnx_runtime import export_onnx as export_onnx
    from hf_sparse.gates.attach import attach_gates as attach_gates
    from hf_sparse.gates.attach import current_plan as current_plan
    from hf_sparse.gates.attach import detach_gates as detach_gates
    from hf_sparse.gates.plan import PruningPlan as PruningPlan
    from hf_sparse.report.report import ModelMeasurements as ModelMeasurements
    from hf_sparse.report.report import Origin as Origin
    from hf_sparse.report.report import Report as Report
    from hf_sparse.structure.blocks import Block as Block
    from hf_sparse.structure.blocks import ModelStructure as ModelStructure
    from hf_sparse.structure.discovery import discover as discover
    from hf_sparse.training.dense_trainer import DenseTrainer as DenseTrainer
    from hf_sparse.training.dense_trainer import DenseTrainerMixin as DenseTrainerMixin
    from hf_sparse.training.resume import checkpoint_defect as checkpoint_defect
    from hf_sparse.training.resume import newest_whole_checkpoint as newest_whole_checkpoint
    from hf_sparse.training.trainer import SparseSeq2SeqTrainer as SparseSeq2SeqTrainer
    from hf_sparse.training.trainer import SparseTrainer as SparseTrainer
    from hf_sparse.training.trainer import SparseTrainerMixin as SparseTrainerMixin
    from hf_sparse.training.weight_trainer import SparseWeightsTrainer as SparseWeightsTrainer
    from hf_sparse.training.weight_trainer import SparseWeightsTrainerMixin as SparseWeightsTrainerMixin

_WHERE = {
    "checkpoint.anymodel": ["export_anymodel"],
    "checkpoint.card": ["CardFields"],
    "checkpoint.hub": ["push_to_hub"],
    "checkpoint.inspection": ["inspect_checkpoint"],
    "checkpoint.save_load": ["load_pruned", "save_pruned"],
    "compaction.compact": ["CompactionReport", "compact"],
    "compaction.sparse_tensors": ["to_sparse_"],
    "config": ["DistillationConfig", "SparsityConfig", "WeightSparsityConfig"],
    "errors": ["NonFiniteLossError", "SparsityError"],
    "export.llama_cpp": ["export_gguf"],
    "export.onnx_runtime": ["export_onnx"],
    "gates.attach": ["attach_gates", "current_plan", "detach_gates"],
    "gates.plan": ["PruningPlan"],
    "structure.blocks": ["Block", "ModelStructure"],
    "structure.discovery": ["discover"],
    "report.report": ["ModelMeasurements", "Origin", "Report"],
    "training.dense_trainer": ["DenseTrainer", "DenseTrainerMixin"],
    "training.resume": ["checkpoint_defect", "newest_whole_checkpoint"],
    "training.trainer": ["SparseSeq2SeqTrainer", "SparseTrainer", "SparseTrainerMixin"],
    "training.weight_trainer": ["SparseWeightsTrainer", "SparseWeightsTrainerMixin"],
}
_MODULES = {name: f"hf_sparse.{module}" for module, names in _WHERE.items() for name in names}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return found


def __dir__() -> list[str]:
    """All public names, imported or not."""
    return sorted({*globals(), *__all__})


_register()
_import_after("hf_sparse.checkpoint.own_classes", "transformers.quantizers")
