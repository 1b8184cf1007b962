"""`DenseTrainer`: a `Trainer` for what is not pruned, which ends early and goes on as safely as `SparseTrainer`."""

from contextlib import nullcontext
from typing import Any

from transformers import PreTrainedModel, Trainer

from hf_sparse.config import DistillationConfig
from hf_sparse.engines.tensors import spread_
from hf_sparse.training.adapters import take_adapters_
from hf_sparse.training.base import BaseTrainer


class DenseTrainerMixin(BaseTrainer):
    """What `DenseTrainer` adds to `Trainer`, for any other subclass of it.

    Training stops with `NonFiniteLossError` once weights are NaN or infinite, saves and exits at SIGTERM, and goes on
    from checkpoints that are whole. Under FSDP2 and DeepSpeed it refuses what pruning would refuse afterwards. A model
    of peft is taken out of its wrapper; its adapters are trained, and merged into what is saved.

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
        self.adapters = take_adapters_(self)
        self.engine.check_()
        if teacher is not None:
            self.learn_from_(teacher, distillation or DistillationConfig())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; adapters are merged, unless it is a checkpoint to resume from."""
        with nullcontext() if _internal_call else self.adapters.merged(self.bare_model):
            super().save_model(output_dir, _internal_call)

    def make_whole_(self) -> None:
        """After the training, put the model, in place, as a whole on the device of every process; merge adapters."""
        self.engine.leave_(self.bare_model, self.training)
        spread_(self.bare_model, self.args.device)
        self.adapters.merge_(self.bare_model)
        self.leave_training_()
        vars(self.bare_model).pop("forward", None)  # which accelerate or a Trainer has put there


class DenseTrainer(DenseTrainerMixin, Trainer):
    """`Trainer` that stops at NaN, saves at SIGTERM, goes on from whole checkpoints, and may learn from a teacher."""
