"""`SparseWeightsTrainer`: a `Trainer` that learns which weights of linear layers become zero while it fine-tunes."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, Trainer

from hf_sparse.config import WeightSparsityConfig
from hf_sparse.errors import SparsityError
from hf_sparse.gates.base import BANK, attached_gates
from hf_sparse.gates.scaling import detach_scaler_
from hf_sparse.gates.weights import (
    MASKS,
    WeightGates,
    WeightMasks,
    attach_masks,
    attach_weight_gates,
    fix_weights_,
    fold_weights_,
    parameter_shapes,
    weight_densities,
)
from hf_sparse.runtime.files import replaced_directory
from hf_sparse.training.resume import STATE
from hf_sparse.training.search import SearchingMixin

DENSITIES = "sparsity.json"
"""Beside a saved model: its pattern and how dense every linear layer is."""


class SparseWeightsTrainerMixin(SearchingMixin):
    """What `SparseWeightsTrainer` adds to `Trainer`, for any other subclass of it.

    The constructor attaches gates to the weights of the model's linear layers, in place. Once as many are closed as
    were asked for, they are multiplied in, closed ones stay at zero, and the weights that are left recover. The model
    keeps its shapes and is saved as the stock model that it is, with zeros.

    Args:
        sparsity: how many weights become zero, and in which pattern.
        teacher: a dense model of the same shape, whose logits and hidden states the model is also trained on; it is put
            in evaluation mode and frozen.

    Raises:
        SparsityError: no linear layer can have the pattern, the teacher does not fit, or an engine is in use that would
            not give exact results.
    """

    sparsity: WeightSparsityConfig

    # The arguments are those of whichever Trainer this is mixed into, so they cannot be spelt out here.
    def __init__(
        self, *args: Any, sparsity: WeightSparsityConfig, teacher: PreTrainedModel | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(sparsity, WeightSparsityConfig):
            raise SparsityError(f"sparsity is {sparsity!r}: give a WeightSparsityConfig")
        self.sparsity = sparsity
        super().__init__(*args, **kwargs)
        self._start_search()
        if self._shards_weights:
            raise SparsityError(
                "gates on single weights are as large as the weights and would be whole on every process, unlike what "
                "FSDP and ZeRO stage 3 are for: use DDP, or remove heads and neurons with SparseTrainer"
            )
        bank = attached_gates(self._model) or attach_weight_gates(self._model, sparsity)
        if bank.config != sparsity:
            raise SparsityError("the model has gates of another configuration: load it anew")
        if teacher is not None:
            sizes, others = (parameter_shapes(one) for one in (self._model, teacher))
            if sizes != others and sparsity.hidden_distillation_weight > 0:
                name = next(name for name in sizes | others if sizes.get(name) != others.get(name))
                raise SparsityError(
                    f"the teacher has another shape than the model ({name} is {others.get(name)} for "
                    f"{sizes.get(name)}): set hidden_distillation_weight to 0, which leaves the logits"
                )
            self._learn_from(teacher, sparsity)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Refuse `push_to_hub`, before a repository is made.

        Raises:
            SparsityError: always.
        """
        raise SparsityError(
            "push_to_hub would upload gates: leave it out, save the model, and `hf upload` its directory"
        )

    def call_model_init(self, trial: Any = None) -> Any:
        """A fresh model from `model_init`, with gates attached."""
        model = cast(PreTrainedModel, super().call_model_init(trial))
        self._loss_is_probed = False
        attach_weight_gates(model, self.sparsity)
        return model

    def _end_step(self, structure_found: bool) -> None:
        if structure_found:
            self._require_finite()
            with self._surgery():
                fix_weights_(self._model)

    def _density_left(self) -> tuple[float, float]:
        masks = self._model._modules.get(MASKS)
        scales = list(masks.scales().values()) if isinstance(masks, WeightMasks) else []
        left = sum(mask.count_nonzero().item() for mask in scales) / max(1, sum(mask.numel() for mask in scales))
        return left, 1 - self.sparsity.target

    # ---- What is left ----

    def fold(self) -> dict[str, float]:
        """Leave exact zeros in the model, in place, which then is a plain one of its stock class.

        Returns:
            The share of weights left in every linear layer, by its path.
        """
        fold_weights_(self._model)
        self.model_wrapped = self._model
        self.optimizer = self.lr_scheduler = None
        return weight_densities(self._model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the stock model with zeros, and beside it how dense its layers are (sparsity.json).

        Checkpoints that Trainer resumes from keep gates and masks.
        """
        if _internal_call and (attached_gates(self._model) is not None or MASKS in self._model._modules):
            super().save_model(output_dir, _internal_call)
            return
        if not self.args.should_save:
            return
        with self._with_a_copy(), replaced_directory(Path(output_dir or str(self.args.output_dir))) as directory:
            fold_weights_(self._model)
            self._save_into(directory)
            about = {"pattern": self.sparsity.pattern, "target": self.sparsity.target}
            text = json.dumps({**about, "density": weight_densities(self._model)}, indent=2)
            (directory / DENSITIES).write_text(text + "\n")

    def _state(self) -> dict[str, Any]:
        return {"searching": attached_gates(self._model) is not None}

    def _take_form_of_(self, checkpoint: Path) -> None:
        try:
            searching = bool(json.loads((checkpoint / STATE).read_text())["searching"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SparsityError(f"{checkpoint / STATE} does not say where the search is ({error!r})") from None
        bank = attached_gates(self._model)
        if searching and bank is None:
            raise SparsityError(f"the search was still on at {checkpoint}: resume with a new trainer")
        if not searching and isinstance(bank, WeightGates):
            masks = {name: torch.ones_like(mask) for name, mask in bank.masks().items()}  # loaded right after this
            detach_scaler_(self._model, BANK)
            attach_masks(self._model, masks)


class SparseWeightsTrainer(SparseWeightsTrainerMixin, Trainer):
    """`Trainer` that sets weights to zero while it fine-tunes; see `SparseWeightsTrainerMixin` for what it adds."""
