"""A Trainer mixin that stops once weights are not finite, before a checkpoint is written from them."""

from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer

from hf_sparse.errors import NonFiniteLossError


class FiniteWeightsMixin(Trainer):
    """Adds to a Trainer that training stops with `NonFiniteLossError` once weights are NaN or infinite.

    The weights are judged and not the loss, which is NaN for a batch without labels, too, while its gradients are zero.
    They are read whenever something is logged, evaluated or saved: what has become NaN stays so.
    """

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._require_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._require_finite()
        return super()._finalize_training(*args, **kwargs)

    def _require_finite(self) -> None:
        """Stop all processes if one of them has trained weights that are not finite.

        Raises:
            NonFiniteLossError: there are some.
        """
        model = cast(nn.Module, self.model)
        trained = [_share(weight).detach() for weight in model.parameters() if weight.requires_grad]
        is_finite = get_total_norm(trained).to(self.args.device).isfinite()
        if self.accelerator.reduce((~is_finite).float(), "sum").item():
            raise NonFiniteLossError(
                f"weights became NaN or infinite by step {self.state.global_step}: lower the learning rate, check the "
                f"data, and go on from the last checkpoint in {self.args.output_dir}, which is from before"
            )


def _share(weight: Any) -> Tensor:
    """What this process has of a parameter: all of it, or a shard of FSDP or ZeRO stage 3."""
    share: Tensor = weight.to_local() if isinstance(weight, DTensor) else vars(weight).get("ds_tensor", weight)
    return share
