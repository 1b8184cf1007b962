"""hf_sparse: pretrained transformers get smaller while they are fine-tuned, by gradient descent alone.

Importing it lets `AutoModelForX.from_pretrained` load pruned checkpoints.
"""

from hf_sparse.checkpoint.anymodel import export_anymodel as export_anymodel
from hf_sparse.checkpoint.card import CardFields as CardFields
from hf_sparse.checkpoint.hub import push_to_hub as push_to_hub
from hf_sparse.checkpoint.inspection import inspect_checkpoint as inspect_checkpoint
from hf_sparse.checkpoint.own_classes import register as _register_loader
from hf_sparse.checkpoint.save_load import load_pruned as load_pruned
from hf_sparse.checkpoint.save_load import save_pruned as save_pruned
from hf_sparse.compaction.compact import CompactionReport as CompactionReport
from hf_sparse.compaction.compact import compact as compact
from hf_sparse.compaction.sparse_tensors import to_sparse_ as to_sparse_
from hf_sparse.config import SparsityConfig as SparsityConfig
from hf_sparse.config import WeightSparsityConfig as WeightSparsityConfig
from hf_sparse.errors import SparsityError as SparsityError
from hf_sparse.gates.attach import attach_gates as attach_gates
from hf_sparse.gates.attach import current_plan as current_plan
from hf_sparse.gates.attach import detach_gates as detach_gates
from hf_sparse.gates.plan import PruningPlan as PruningPlan
from hf_sparse.modeling_hf_sparse import register as _register
from hf_sparse.structure.blocks import Block as Block
from hf_sparse.structure.blocks import ModelStructure as ModelStructure
from hf_sparse.structure.discovery import discover as discover
from hf_sparse.training.finite import NonFiniteLossError as NonFiniteLossError
from hf_sparse.training.trainer import SparseSeq2SeqTrainer as SparseSeq2SeqTrainer
from hf_sparse.training.trainer import SparseTrainer as SparseTrainer
from hf_sparse.training.trainer import SparseTrainerMixin as SparseTrainerMixin
from hf_sparse.training.weight_trainer import SparseWeightsTrainer as SparseWeightsTrainer
from hf_sparse.training.weight_trainer import SparseWeightsTrainerMixin as SparseWeightsTrainerMixin
from hf_sparse.version import __version__ as __version__

_register()
_register_loader()
