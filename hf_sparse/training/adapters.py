"""Train adapters of peft, such as LoRA's, beside the gates, and merge them where weights have to be plain.

Structure is found, costed, cut and saved in plain models, so adapters step aside for it. When the model shrinks they
are merged into its weights, and new ones are put beside what is left.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_sparse.errors import SparsityError
from hf_sparse.gates.base import BANK, attached_gates
from hf_sparse.gates.scaling import attach_scaler_, detach_scaler_
from hf_sparse.runtime.contexts import seeded
from hf_sparse.runtime.streaming import HOST
from hf_sparse.structure.prunable import adapters

logger = logging.get_logger(__name__)

WRAPPED = (nn.Linear, Conv1D, nn.Embedding)
"""What adapters may stand around: layers whose weights they can be merged into."""


class Adapters:
    """The adapters of a model, if it has any; every method leaves a model alone that has none.

    Args:
        config: peft's, of the adapters; None where there are none.
        name: that peft has given them.
        places: paths of the layers that have one.
        dtype: of their parameters.
    """

    def __init__(
        self, config: Any = None, name: str = "", places: tuple[str, ...] = (), dtype: torch.dtype = torch.float32
    ) -> None:
        self.config, self.name, self.places, self.dtype = config, name, places, dtype

    @classmethod
    def of(cls, model: Any) -> tuple[PreTrainedModel, "Adapters"]:
        """Take a model out of peft's wrapper, with its adapters inside; any other model is returned as it is.

        Raises:
            SparsityError: the adapters are several, or cannot be merged into weights.
        """
        if not type(model).__module__.startswith("peft."):
            return model, cls()
        from peft.utils import ModulesToSaveWrapper

        base: PreTrainedModel = model.get_base_model()
        around = {path: layer for path, layer in _layers(base) if not isinstance(layer, ModulesToSaveWrapper)}
        if len(model.peft_config) != 1 or not around:
            raise SparsityError(
                f"{type(model).__name__} has {len(model.peft_config)} adapters, around {len(around)} layers: give a "
                "model with one that can be merged into weights, such as LoRA's"
            )
        for path, layer in around.items():
            if not isinstance(_plain(layer), WRAPPED):
                raise SparsityError(
                    f"the adapter at {path} is around a {type(_plain(layer)).__name__}, and cannot be put back when "
                    "the model has become smaller: leave it out of target_modules"
                )
        name, config = next(iter(model.peft_config.items()))
        trained = next((parameter for parameter in base.parameters() if parameter.requires_grad), None)
        if trained is None:
            raise SparsityError("the adapters are frozen: load them with is_trainable=True")
        return base, cls(config, name, tuple(around), trained.dtype)

    @contextmanager
    def aside(self, model: PreTrainedModel) -> Iterator[None]:
        """Take the adapters out of a model inside this context, in place: it computes what its own weights say.

        All of these are frozen; that they are does not mean that they are not to be pruned.
        """
        layers = self._layers(model)
        plain = [(path, _plain(layer)) for path, layer in layers]
        trained = [one for _, layer in plain for one in layer.parameters() if one.requires_grad]  # of whole copies
        _replace_(model, plain)
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            _replace_(model, layers)

    @contextmanager
    def merged(self, model: PreTrainedModel) -> Iterator[None]:
        """Merge the adapters into the weights inside this context, in place; then all are exactly as they were."""
        layers = self._layers(model)
        weights = [weight for _, layer in layers for weight in _plain(layer).parameters(recurse=False)]
        before = [weight.detach().cpu().clone() for weight in weights]  # a device may have no room for both
        config = vars(model).get("peft_config")
        self.merge_(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, values in zip(weights, before):
                    weight.copy_(values)
            for _, layer in layers:
                layer.merged_adapters = []
            _replace_(model, layers)
            if config is not None:
                model.peft_config = config

    def merge_(self, model: PreTrainedModel) -> bool:
        """Merge the adapters into the weights, in place: the model is plain, and computes what it did.

        Returns:
            Whether there were any.
        """
        layers = self._layers(model)
        for _, layer in layers:
            if _wraps(layer):
                layer.merge()
        _replace_(model, [(path, _plain(layer)) for path, layer in layers])
        return vars(model).pop("peft_config", None) is not None

    @contextmanager
    def replaced(self, model: PreTrainedModel) -> Iterator[None]:
        """Merge the adapters in place; at the end of the context put new ones beside what is left of their layers.

        Inside, all weights count as trained: they are what has been learnt. They are in the host's memory, since
        outputs are compared in float32, for which the device may have no room.
        """
        if self.config is None:
            yield
            return
        device = model.device
        self.merge_(model)
        nn.Module.to(model, HOST)  # transformers wraps `to` in a way that hides its type
        model.requires_grad_(True)
        yield
        self._put_(model)
        nn.Module.to(model, device)

    def _put_(self, model: PreTrainedModel) -> None:
        """Put new adapters, which change nothing yet, beside the layers that had one, in place.

        Args:
            model: plain, without gates.

        Raises:
            SparsityError: none of these layers is left.
        """
        from peft import inject_adapter_in_model

        config, modules = copy.deepcopy(self.config), dict(model.named_modules())
        config.target_modules = [path for path in self.places if isinstance(modules.get(path), WRAPPED)]
        if not config.target_modules:
            raise SparsityError("no layer with an adapter is left: give target_modules that are not pruned away")
        with seeded(model.device):  # the same on every process, and in a run of any number of these
            inject_adapter_in_model(config, model, self.name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)

    def _layers(self, model: PreTrainedModel) -> list[tuple[str, Any]]:
        """The layers with adapters, with their paths; those that the model brought along are none of these."""
        return [] if self.config is None else _layers(model)

    def are_kept(self, model: PreTrainedModel) -> bool:
        """Whether a model can be saved beside its adapters; warns where they are gone, or trained for the search."""
        kept = bool(self._layers(model)) and attached_gates(model) is None
        if self.config is not None and not kept:
            logger.warning("No adapter was trained beside what is left, as that was found at the end: it is merged.")
        return kept

    def save(self, model: PreTrainedModel, directory: Path, home: Path) -> None:
        """Write the adapters of a model to a new directory, as peft reads them.

        Args:
            model: with its adapters inside.
            directory: to make.
            home: where the model itself goes, which the adapters name as their base.
        """
        from peft import get_peft_model_state_dict

        config = copy.deepcopy(cast(Any, model).peft_config[self.name])
        config.base_model_name_or_path, config.inference_mode = str(home), True
        config.save_pretrained(directory)
        tensors = get_peft_model_state_dict(model, adapter_name=self.name, save_embedding_layers=False)
        named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def take_adapters_(trainer: Any) -> Adapters:
    """Take the model of a Trainer out of peft's wrapper, in place; its adapters stay inside.

    Raises:
        SparsityError: they cannot be merged into its weights, or an engine would shard both.
    """
    model, adapters = Adapters.of(trainer.model)
    if adapters.config is not None:
        if trainer.engine.shards_weights or not trainer.engine.optimizes_gates:
            raise SparsityError(
                "adapters are merged into weights, which FSDP and DeepSpeed shard: start with `accelerate launch` "
                "without them, on one device or with the whole model on each"
            )
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
    return adapters


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers of peft that stand in the place of a model's own, with their paths."""
    found: list[tuple[str, Any]] = []
    for path in adapters(model):
        if not found or not path.startswith(f"{found[-1][0]}."):
            found.append((path, model.get_submodule(path)))
    return found


def _wraps(layer: nn.Module) -> bool:
    """Whether a layer of peft computes with the one that it stands for, rather than with a trained copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def _plain(layer: Any) -> nn.Module:
    """What is left of a layer of peft without its adapter; a copy that was trained as a whole counts as the layer."""
    if _wraps(layer):
        return cast(nn.Module, layer.get_base_layer())
    return cast(nn.Module, layer.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None))


def _replace_(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> None:
    """Put modules at paths of a model, in place; gates go on scaling what is at theirs."""
    if layers:
        with _moved_gates(model):
            for path, layer in layers:
                model.set_submodule(path, layer)


@contextmanager
def _moved_gates(model: nn.Module) -> Iterator[None]:
    """Take gates off a model inside this context, in place, and attach them to what is at their paths afterwards."""
    bank = attached_gates(model)
    if bank is not None:
        detach_scaler_(model, BANK)
    yield
    if bank is not None:
        attach_scaler_(cast(PreTrainedModel, model), BANK, bank, bank.paths)
