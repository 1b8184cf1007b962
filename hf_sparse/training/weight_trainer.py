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
from hf_sparse.runtime.copies import copy_in_place
from hf_sparse.runtime.files import replaced_directory
from hf_sparse.training.base import BaseTrainer
from hf_sparse.training.calls import LossCalls
from hf_sparse.training.run import Run
from hf_sparse.training.search import Form, Search

DENSITIES = "sparsity.json"
"""Beside a saved model: its pattern and how dense every linear layer is."""


class Zeros(Form):
    """Multiplies gates into the weights once as many are closed as were asked for; closed ones stay at zero."""

    def __init__(self, trainer: BaseTrainer, config: WeightSparsityConfig) -> None:
        self.trainer, self.config = trainer, config

    def end_step_(self, search: Search, structure_found: bool) -> None:
        """Fix the weights in place once their structure is found."""
        if structure_found:
            self.trainer.require_finite()
            with self.trainer.editing():
                fix_weights_(self.trainer.bare_model)

    def density_left(self) -> tuple[float, float]:
        """The density of a model whose zeros are fixed, and the one that was asked for."""
        masks = self.trainer.bare_model._modules.get(MASKS)
        scales = list(masks.scales().values()) if isinstance(masks, WeightMasks) else []
        left = sum(mask.count_nonzero().item() for mask in scales) / max(1, sum(mask.numel() for mask in scales))
        return left, self.config.density

    def take_(self, run: Run, checkpoint: Path) -> None:
        """Put masks in the place of gates, in place, if the search was over; they are loaded right after this.

        Raises:
            SparsityError: the search was still on at the checkpoint, but is over in this Trainer.
        """
        model = self.trainer.bare_model
        bank = attached_gates(model)
        if run.searching and bank is None:
            raise SparsityError(f"the search was still on at {checkpoint}: resume with a new trainer")
        if not run.searching and isinstance(bank, WeightGates):
            masks = {name: torch.ones_like(mask) for name, mask in bank.masks().items()}
            detach_scaler_(model, BANK)
            attach_masks(model, masks)


class SparseWeightsTrainerMixin(BaseTrainer):
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

    # The arguments are those of whichever Trainer this is mixed into, so they cannot be spelt out here.
    def __init__(
        self, *args: Any, sparsity: WeightSparsityConfig, teacher: PreTrainedModel | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(sparsity, WeightSparsityConfig):
            raise SparsityError(f"sparsity is {sparsity!r}: give a WeightSparsityConfig")
        self.sparsity = sparsity
        super().__init__(*args, **kwargs)
        if self.engine.shards_weights:
            raise SparsityError(
                "gates on single weights are as large as the weights and would be whole on every process, unlike what "
                "FSDP and ZeRO stage 3 are for: use DDP, or remove heads and neurons with SparseTrainer"
            )
        self.calls = LossCalls(self)
        self.search = Search(self, sparsity, self.calls, Zeros(self, sparsity))
        bank = attached_gates(self.bare_model) or attach_weight_gates(self.bare_model, sparsity)
        if bank.config != sparsity:
            raise SparsityError("the model has gates of another configuration: load it anew")
        if teacher is not None:
            _require_same_shape(self.bare_model, teacher, sparsity)
            self.learn_from_(teacher, sparsity)

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
        attach_weight_gates(model, self.sparsity)
        if self.search is not None:  # the constructor of Trainer has run
            self.calls.is_probed = False
        return model

    # ---- What is left ----

    def fold(self) -> dict[str, float]:
        """Leave exact zeros in the model, in place, which then is a plain one of its stock class.

        Returns:
            The share of weights left in every linear layer, by its path.
        """
        fold_weights_(self.bare_model)
        self.leave_training_()
        return weight_densities(self.bare_model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the stock model with zeros, and beside it how dense its layers are (sparsity.json).

        Checkpoints that Trainer resumes from keep gates and masks.
        """
        model = self.bare_model
        if _internal_call and (attached_gates(model) is not None or MASKS in model._modules):
            super().save_model(output_dir, _internal_call)
            return
        if not self.args.should_save:
            return
        with copy_in_place(self), replaced_directory(Path(output_dir or str(self.args.output_dir))) as directory:
            fold_weights_(self.bare_model)
            self.save_into(directory)
            about = {"pattern": self.sparsity.pattern, "target": self.sparsity.target}
            text = json.dumps({**about, "density": weight_densities(self.bare_model)}, indent=2)
            (directory / DENSITIES).write_text(text + "\n")


def _require_same_shape(model: PreTrainedModel, teacher: PreTrainedModel, sparsity: WeightSparsityConfig) -> None:
    """Refuse a teacher whose hidden states cannot be compared with those of the model.

    Raises:
        SparsityError: it has another shape.
    """
    sizes, others = (parameter_shapes(one) for one in (model, teacher))
    if sizes != others and sparsity.hidden_distillation_weight > 0:
        name = next(name for name in sizes | others if sizes.get(name) != others.get(name))
        raise SparsityError(
            f"the teacher has another shape than the model ({name} is {others.get(name)} for "
            f"{sizes.get(name)}): set hidden_distillation_weight to 0, which leaves the logits"
        )


class SparseWeightsTrainer(SparseWeightsTrainerMixin, Trainer):
    """`Trainer` that sets weights to zero while it fine-tunes; see `SparseWeightsTrainerMixin` for what it adds."""
