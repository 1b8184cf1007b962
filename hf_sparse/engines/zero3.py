"""DeepSpeed ZeRO stage 3: every process has a share of the weights only."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.engines.fsdp import shard_frozen_
from hf_sparse.engines.partitions import gather_partitions_, is_partitioned, partition_, partitions_together
from hf_sparse.engines.tensors import spread_
from hf_sparse.engines.zero import ZeRO
from hf_sparse.errors import SparsityError


class ZeRO3(ZeRO):
    """Trains shards of the weights, which may have been sharded while they were loaded."""

    shards_weights = True
    _shards_while_loading = False

    def take_(self, model: PreTrainedModel) -> None:
        """As `Engine.take_`; what shares weights while they are loaded does so again when the model is prepared."""
        super().take_(model)
        self._shards_while_loading = is_partitioned(model)
        if self._shards_while_loading:
            gather_partitions_(model)

    def is_in_shards(self, model: nn.Module) -> bool:
        """As `Engine.is_in_shards`."""
        return is_partitioned(model)

    def share(self, parameter: Tensor) -> Tensor:
        """As `Engine.share`."""
        share: Tensor = vars(parameter).get("ds_tensor", parameter)
        return share

    @contextmanager
    def preparing(self, model: PreTrainedModel) -> Iterator[None]:
        """As `ZeRO.preparing`."""
        with super().preparing(model):
            if self._shards_while_loading and not is_partitioned(model):
                partition_(model, self.accelerator.state.deepspeed_plugin.deepspeed_config, self.accelerator.device)
            yield

    def gathered(self, model: nn.Module) -> AbstractContextManager[None]:
        """As `Engine.gathered`."""
        return partitions_together(model)

    def freeze_(self, teacher: PreTrainedModel, whole: bool) -> bool:
        """As `Engine.freeze_`; shards are those of FSDP, which needs no optimizer.

        Raises:
            SparsityError: it is a copy of a model that was sharded while it was loaded.
        """
        if any(parameter.shape == (0,) and "ds_id" not in vars(parameter) for parameter in teacher.parameters()):
            raise SparsityError(
                "the teacher is a copy of weights that ZeRO stage 3 has sharded, which has none: load it by "
                "from_pretrained, as the model"
            )
        in_shards = is_partitioned(teacher)
        if in_shards:
            gather_partitions_(teacher)
        if not whole:
            shard_frozen_(teacher, self.accelerator.device)
            return True
        if not in_shards:
            return super().freeze_(teacher, whole)
        spread_(teacher, self.accelerator.device)
        return False
