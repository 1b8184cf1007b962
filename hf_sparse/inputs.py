"""Example inputs for a model of any modality, made from its config and from what its forward reads."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse.errors import SparsityError

BATCH, LENGTH = 2, 16

Inputs = dict[str, Tensor]
Maker = Callable[[PreTrainedModel, Inputs], Inputs]


def example_inputs(model: PreTrainedModel) -> Inputs:
    """A small batch that runs every tower of the model, on its device; the same every time.

    Raises:
        SparsityError: the model reads something that cannot be made up.
    """
    reads = inspect.signature(type(model).forward).parameters
    inputs: Inputs = {}
    for layouts in MODALITIES:
        name = next((name for name in layouts if name in reads), None)
        if name is not None:
            inputs |= {k: v for k, v in layouts[name](model, inputs).items() if k in reads}
    needed = [name for name, parameter in reads.items() if name != "self" and parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    for name in needed:
        if name in ALONGSIDE and name not in inputs:
            inputs |= ALONGSIDE[name](model, inputs)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    missing = [name for name in needed if name not in inputs]
    if missing or not inputs:
        raise _refusal(model, missing or [str(model.main_input_name)])
    with _undisturbed(model):
        try:
            model(**inputs)
        except Exception as error:
            raise _refusal(model, list(inputs), f" ({type(error).__name__}: {error})".replace("\n", " ")) from error
    return inputs


def _refusal(model: PreTrainedModel, names: list[str], why: str = "") -> SparsityError:
    return SparsityError(
        f"{type(model).__name__} reads {', '.join(names)}, of which no example can be made up{why}: "
        "pass a batch of your data as `inputs=`"
    )


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation without gradients, after which modes, statistics and random states are as before."""
    training = [module for module in model.modules() if module.training]
    with torch.no_grad(), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _find(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """The value of the first of these names in a config, or else in the configs within it, those of towers."""
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    for part in config.sub_configs:
        nested = getattr(config, part, None)
        value = None if nested is None else _find(nested, *names)
        if value is not None:
            return value
    return default


def _tower(model: PreTrainedModel, modality: str) -> PreTrainedConfig:
    return getattr(model.get_encoder(modality=modality), "config", model.config)


def _text_config(config: PreTrainedConfig, decoder: bool = False) -> PreTrainedConfig:
    names = ("decoder", "text_config") if decoder else ("text_encoder", "encoder", "text_config", "decoder")
    return next((getattr(config, n) for n in names if isinstance(getattr(config, n, None), PreTrainedConfig)), config)


def _noise(model: PreTrainedModel, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.dtype)


def _batch(model: PreTrainedModel) -> int:
    return BATCH


# Images


def _image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width."""
    size = _find(config, "image_size", "crop_size", default=64)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return _find(config, "num_channels", "in_channels", "in_chans", default=3), height, width


def _images(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Images (batch, channels, height, width), or videos (batch, frames, channels, height, width)."""
    config = _tower(model, "image")
    frames = _find(config, "num_frames")
    shape = _image_shape(config)
    return {"pixel_values": _noise(model, BATCH, *shape) if frames is None else _noise(model, BATCH, frames, *shape)}


def _videos(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    config = _tower(model, "video")
    frames = _find(config, "num_frames", "frames_per_clip", default=4)
    return {"pixel_values_videos": _noise(model, BATCH, frames, *_image_shape(config))}


def _image_lists(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """A list of one image for each sequence (batch, 1, channels, height, width)."""
    return {"pixel_values": _noise(model, BATCH, 1, *_image_shape(_tower(model, "image")))}


def _patches(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """The patches of all images in one row (patches, values of a patch), and the grid of each (batch, 3)."""
    config = _tower(model, "image")
    side = 2 * _find(config, "spatial_merge_size", default=1)
    depth = _find(config, "temporal_patch_size", default=1)
    values = _image_shape(config)[0] * depth * _find(config, "patch_size") ** 2
    grid = torch.tensor([[1, side, side]] * BATCH)
    return {"pixel_values": _noise(model, BATCH * side * side, values), "image_grid_thw": grid}


def _naflex(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    config = _tower(model, "image")
    side = 4
    values = _image_shape(config)[0] * _find(config, "patch_size") ** 2
    return {
        "pixel_values": _noise(model, BATCH, side * side, values),
        "pixel_attention_mask": torch.ones(BATCH, side * side, dtype=torch.long),
        "spatial_shapes": torch.tensor([[side, side]] * BATCH),
    }


IMAGES: dict[str, Maker] = {
    "image_grid_thw": _patches,
    "spatial_shapes": _naflex,
    "pixel_attention_mask": _image_lists,
    "pixel_values": _images,
    "pixel_values_videos": _videos,
}

# Sound


def _features(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    config = _tower(model, "audio")
    bins = _find(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", default=80)
    convolved = any(isinstance(m, nn.Conv1d) and m.in_channels == bins for m in model.modules())
    if convolved:
        shape = (BATCH, bins, 2 * _find(config, "max_source_positions", default=50))
    else:
        shape = (BATCH, 64, bins)
    mask = torch.ones(BATCH, max(shape[1:]), dtype=torch.long)
    return {"input_features": _noise(model, *shape), "input_features_mask": mask, "feature_attention_mask": mask}


def _waveform(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    config = _tower(model, "audio")
    bins = _find(config, "num_mel_bins")
    if bins is not None and _find(config, "max_length"):
        return {"input_values": _noise(model, BATCH, _find(config, "max_length"), bins)}
    length = LENGTH * math.prod(_find(config, "conv_stride", default=[400]))
    return {"input_values": _noise(model, BATCH, length)}


SOUNDS: dict[str, Maker] = {"input_features": _features, "input_values": _waveform}

# Text


def _placeholders(model: PreTrainedModel, inputs: Inputs) -> list[int]:
    tokens: list[int] = []
    for modality in ("image", "video", "audio"):
        getter = getattr(model.base_model, f"get_{modality}_features", None)
        token = _find(model.config, f"{modality}_token_id", f"{modality}_token_index")
        if getter is None or token is None:
            continue
        taken = {name: inputs[name] for name in inspect.signature(getter).parameters if name in inputs}
        if not taken:
            continue
        with _undisturbed(model):
            features = getter(**taken, return_dict=True).pooler_output
        tokens += [token] * (sum(f.numel() // f.shape[-1] for f in features) // BATCH)
    return tokens


def _tokens(config: PreTrainedConfig, special: set[int], length: int) -> Tensor:
    ordinary = [token for token in range(min(_find(config, "vocab_size", default=1000), 1000)) if token not in special]
    choice = torch.randint(len(ordinary), (BATCH, length), generator=torch.Generator().manual_seed(0))
    return torch.tensor(ordinary)[choice]


def _specials(config: PreTrainedConfig) -> set[int]:
    return {v for k, v in config.to_dict().items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}


def _text(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    config = _text_config(model.config)
    special = _specials(config) | _specials(model.config)
    length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH))
    tokens = _tokens(config, special, length)
    mask = torch.ones_like(tokens)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:
        tokens[1, length // 2 :] = pad
        mask[1, length // 2 :] = 0
    elif not inputs:
        tokens, mask = tokens[:1], mask[:1]
    holders = torch.tensor(_placeholders(model, inputs), dtype=torch.long).expand(len(tokens), -1)
    tokens = torch.cat([tokens[:, :1], holders, tokens[:, 1:]], dim=1)
    mask = torch.cat([mask[:, :1], torch.ones_like(holders), mask[:, 1:]], dim=1)
    kinds = torch.zeros_like(tokens)
    kinds[:, 1 : 1 + holders.shape[1]] = 1
    return {"input_ids": tokens, "attention_mask": mask, **({"mm_token_type_ids": kinds} if holders.numel() else {})}


def _decoder_text(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    if not model.config.is_encoder_decoder:
        return {}
    config = _text_config(model.config, decoder=True)
    return {"decoder_input_ids": _tokens(config, _specials(config), LENGTH).flip(0)}


TEXTS: dict[str, Maker] = {"input_ids": _text}
TARGETS: dict[str, Maker] = {"decoder_input_ids": _decoder_text}

MODALITIES = (IMAGES, SOUNDS, TEXTS, TARGETS)
ALONGSIDE: dict[str, Maker] = {}
