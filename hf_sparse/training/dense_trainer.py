"""`DenseTrainer`: a `Trainer` for what is not pruned, which ends early and goes on as safely as `SparseTrainer`."""

from typing import Any

from transformers import PreTrainedModel, Trainer

from hf_sparse.config import DistillationConfig
from hf_sparse.engines.tensors import spread_
from hf_sparse.training.base import BaseTrainer


class DenseTrainerMixin(BaseTrainer):
    """What `DenseTrainer` adds to `Trainer`, for any other subclass of it.

    Training stops with `NonFiniteLossError` once weights are NaN or infinite, saves and exits at SIGTERM, and goes on
    from checkpoints that are whole. Under FSDP2 and DeepSpeed it refuses what pruning would refuse afterwards.

    Args:
        teacher: a model with the same outputs and, unless hidden states are left out, the same number of layers; it is
            put in evaluation mode and frozen.
        distillation: how to learn from it.

    Raises:
        SparsityError: an engine has settings that pruning would refuse, or the teacher is the student itself, or
            predicts something else.
    """

    # The arguments are those of whichever Trainer this is mixed into, so they cannot be spelt out here.
    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | None = None,
        distillation: DistillationConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.engine.check_()
        if teacher is not None:
            self.learn_from_(teacher, distillation or DistillationConfig())

    def make_whole_(self) -> None:
        """After the training, put the model, in place, as a whole on the device of every process."""
        self.engine.leave_(self.bare_model, self.training)
        spread_(self.bare_model, self.args.device)
        self.leave_training_()


class DenseTrainer(DenseTrainerMixin, Trainer):
    """`Trainer` that stops at NaN, saves at SIGTERM, goes on from whole checkpoints, and may learn from a teacher."""
