"""`SparseTrainer`: a thin `Trainer` that learns which heads and neurons to remove while it fine-tunes."""

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer

from hf_sparse.config import SparsityConfig
from hf_sparse.engines.sharding import META, prepare_sharding_, require_whole
from hf_sparse.engines.surgery import skeleton
from hf_sparse.engines.zero3 import gather_partitions_, is_partitioned
from hf_sparse.errors import SparsityError
from hf_sparse.gates.attach import detach_gates, gate_bank, require_bank
from hf_sparse.gates.units import GateBank
from hf_sparse.structure.prunable import require_prunable
from hf_sparse.training.stages import StagesMixin


class SparseTrainerMixin(StagesMixin):
    """What `SparseTrainer` adds to `Trainer`, for any other subclass of it: `class Mine(SparseTrainerMixin, Base)`.

    The constructor attaches gates to the model in place. During the search for the structure the learning rate stays
    constant after its warm-up. Once it is found, the model is made smaller in place, and the scheduler that was asked
    for runs over the recovery of what is left. With several targets, one such stage follows another, and each leaves a
    whole model in `output_dir`, beside a table and a picture of them all.

    Args:
        sparsity: what to remove.
        teacher: a dense model with the same outputs, whose logits and hidden states the pruned model is also trained
            on; it is put in evaluation mode and frozen.

    Raises:
        SparsityError: the model is not one of transformers with plain weights or has nothing to prune, the teacher has
            another number of labels, or an engine is in use that would not give exact results.
    """

    _is_constructed = False

    # The arguments are those of whichever Trainer this is mixed into, so they cannot be spelt out here.
    def __init__(
        self, *args: Any, sparsity: SparsityConfig, teacher: PreTrainedModel | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(sparsity, SparsityConfig):
            raise SparsityError(f"sparsity is {sparsity!r}: give a SparsityConfig, such as SparsityConfig(target=0.5)")
        self.sparsity = sparsity
        self._compactions, self._members = [], {}
        super().__init__(*args, **kwargs)
        require_prunable(self._model)
        self._prepare_hub()
        self._start_search()
        require_whole(self._model)
        if self.is_fsdp_enabled:
            prepare_sharding_(self.accelerator)
        self._was_in_shards = is_partitioned(self._model)
        if self._was_in_shards:  # as from_pretrained leaves them; to find heads, the first process has to have them
            gather_partitions_(self._model)
        self._place_to_measure(self._model)
        bank = gate_bank(self._model) or self._attach_gates(self._model)
        if bank.config != sparsity.stage(0):
            raise SparsityError("the model has gates of another SparsityConfig: call detach_gates(model) first")
        self._begin_with(self._model, bank)
        if teacher is not None:
            self._learn_from(teacher, sparsity)
        self._is_constructed = True

    @property
    def bank(self) -> GateBank:
        """The gates of the model that is trained.

        Raises:
            SparsityError: the model has none (any more).
        """
        return require_bank(self._model)

    def _place_to_measure(self, model: PreTrainedModel) -> None:
        """Move a model, in place, to the device that costs are taken on; Trainer may do so only later.

        One that is to be sharded need not fit that, so it is counted where it is.
        """
        wanted = self.sparsity.cost == "latency" or (self.sparsity.cost == "macs" and not self._shards_weights)
        if wanted and model.device != META:
            nn.Module.to(model, self.args.device)

    def _begin_with(self, model: PreTrainedModel, bank: GateBank) -> None:
        """Remember what the run begins with, for its report."""
        self.structure, self.costs = bank.whole, bank.costs
        self._dense = skeleton(model)
        detach_gates(self._dense)

    def _density_left(self) -> tuple[float, float]:
        kept = {name: len(kept) for name, kept in self.plan().kept.items()}
        return 1 - self.costs.removed(kept), 1 - self.costs.target(self._stage_config)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from `model_init`; with gates attached, unless the constructor, which does that, is at work."""
        model = cast(PreTrainedModel, super().call_model_init(trial))
        if is_partitioned(model):
            raise SparsityError("ZeRO stage 3 shards what model_init loads: give a model instead")
        self._stage, self._compactions, self._members, self._layer_map = 0, [], {}, None
        self._loss_is_probed, self._dense_evaluated = False, {}
        if self._is_constructed:
            self._place_to_measure(model)
            self._begin_with(model, self._attach_gates(model))
        return model


class SparseTrainer(SparseTrainerMixin, Trainer):
    """`Trainer` that prunes while it fine-tunes; see `SparseTrainerMixin` for what it adds."""


class SparseSeq2SeqTrainer(SparseTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` that prunes while it fine-tunes; see `SparseTrainerMixin` for what it adds."""
