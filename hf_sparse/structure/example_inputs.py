"""Make example inputs for a model of any modality, from its config and from what its forward reads."""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from hf_sparse.errors import UnknownInputsError
from hf_sparse.runtime.contexts import evaluating, unchanged_random_state

BATCH, LENGTH = 2, 16
CHOICES = 2  # of every text, where a model chooses
SIDE = 4  # of images in patches, where the config leaves their size open

Inputs = dict[str, Tensor]
Maker = Callable[[PreTrainedModel, Inputs], Inputs]  # of some inputs, knowing those made before


def example_inputs(model: PreTrainedModel) -> Inputs:
    """Make a small random batch that runs all of a model, on its device: text, images, sound, series; always the same.

    The second of two texts is padded. If there is no padding token, a model that reads only text gets one text.

    Raises:
        UnknownInputsError: the model reads something that cannot be made up from its config.
    """
    reads, required, inputs = inspect.signature(type(model).forward).parameters, _required(model), Inputs()
    try:
        for layouts in MODALITIES:
            chosen = [layouts[name] for name in layouts if name in reads][:1]
            chosen += [COMPANIONS[name] for name in COMPANIONS if name in required - inputs.keys()]
            for make in chosen:
                inputs |= _read(model, make(model, inputs))
        idle = _idle(model, inputs)
    except Exception as error:
        missing = [name for name in required if name not in inputs]
        raise UnknownInputsError(
            f"{type(model).__name__} reads {', '.join(missing or inputs)}, for which no example could be made up "
            f"({' '.join(str(error).split())}): pass a batch of your data as `inputs=`"
        ) from error
    for name in OPTIONAL:
        if idle and name in reads and name not in inputs:
            more = inputs | _read(model, OPTIONAL[name](model, inputs))
            with suppress(Exception):
                left = _idle(model, more)
                inputs, idle = (more, left) if left < idle else (inputs, idle)
    return inputs


def main_input(model: PreTrainedModel, inputs: Mapping[str, Any]) -> str:
    """Return the name of a model's main input, or else of the first tensor in the batch."""
    first = next(name for name, value in inputs.items() if isinstance(value, Tensor))
    return model.main_input_name if model.main_input_name in inputs else first


def shape_text(name: str, shape: Sequence[int]) -> str:
    """Describe the size of an input for people: 32 x 128 tokens, 8 images of 224 x 224."""
    rows, *sizes = shape
    several = "" if rows == 1 else "s"
    if name == "input_ids" and len(sizes) == 2:
        return f"{rows} question{several} of {sizes[0]} x {sizes[1]} tokens"
    if name == "input_features" and len(sizes) == 2:
        return f"{rows} spectrogram{several} of {sizes[0]} x {sizes[1]}"
    if name == "pixel_values" and len(sizes) in (3, 4):
        kind, (*frames, _, height, width) = "image" if len(sizes) == 3 else "video", sizes
        return f"{rows} {kind}{several} of {' x '.join(map(str, [*frames, height, width]))}"
    unit = {"input_ids": "tokens", "input_values": "samples"}.get(name, "values") if len(sizes) == 1 else "values"
    return f"{' x '.join(map(str, shape))} {unit}"


def placed(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy the tensors of a batch to a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _read(model: PreTrainedModel, made: Inputs) -> Inputs:
    """Choose the inputs that forward reads, on the device of the model."""
    reads = inspect.signature(type(model).forward).parameters
    return {name: tensor.to(model.device) for name, tensor in made.items() if name in reads}


def _idle(model: PreTrainedModel, inputs: Inputs) -> set[nn.Module]:
    """Find the modules with parameters of their own that a forward does not call."""
    idle = {module for module in model.modules() if next(module.parameters(recurse=False), None) is not None}
    hooks = [module.register_forward_pre_hook(lambda module, _: idle.discard(module)) for module in idle]
    try:
        with undisturbed(model):
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return idle


def _required(model: PreTrainedModel) -> set[str]:
    """What forward and the getters of features cannot do without, of all that forward reads."""
    reads = inspect.signature(type(model).forward).parameters
    required = {
        parameter.name
        for function in (type(model).forward, *_getters(model).values())
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    return (required & reads.keys()) - {"self"}


def _getters(model: PreTrainedModel) -> dict[str, Callable[..., Any]]:
    """By modality, the methods that give features to put in the place of tokens."""
    names = {modality: f"get_{modality}_features" for modality in ("image", "video", "audio")}
    return {modality: getattr(model.base_model, n) for modality, n in names.items() if hasattr(model.base_model, n)}


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluate a model without gradients; modes and random states are restored when the block ends."""
    with torch.no_grad(), unchanged_random_state(model.device), evaluating(model):
        yield


# ---- What the config tells ----


def _find(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """The value of the first of these names that a config knows, or else one of the configs within it."""
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    parts = (getattr(config, part, None) for part in config.sub_configs)
    found = (_find(part, *names) for part in parts if isinstance(part, PreTrainedConfig))
    return next((value for value in found if value is not None), default)


def _tower(model: PreTrainedModel, modality: str) -> PreTrainedConfig:
    """The config of the encoder of a modality; that of the model, where it is one encoder."""
    return getattr(model.get_encoder(modality=modality), "config", model.config)


def _text_config(config: PreTrainedConfig, *parts: str) -> PreTrainedConfig:
    """The config of the first of these parts that there is; the config itself, where it has none."""
    nested = (getattr(config, part, None) for part in parts)
    return next((part for part in nested if isinstance(part, PreTrainedConfig)), config)


def _noise(model: PreTrainedModel, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.dtype)


# ---- Images and videos ----


def _image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width."""
    size = _find(config, "image_size", "crop_size", "input_size", default=64)
    height, width = (size, size) if isinstance(size, int) else size
    return _find(config, "num_channels", "in_channels", "in_chans", default=3), height, width


def _images(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Images (batch, channels, height, width) or videos (batch, frames, channels, height, width)."""
    config = _tower(model, "image")
    frames = _find(config, "num_frames")
    return {"pixel_values": _noise(model, BATCH, *([] if frames is None else [frames]), *_image_shape(config))}


def _videos(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Videos (batch, frames, channels, height, width)."""
    config = _tower(model, "video")
    frames = _find(config, "num_frames", "frames_per_clip", default=2)
    return {"pixel_values_videos": _noise(model, BATCH, frames, *_image_shape(config))}


def _image_lists(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """One image for each text (batch, 1, channels, height, width)."""
    channels, height, width = _image_shape(_tower(model, "image"))
    return {"pixel_values": _noise(model, BATCH, 1, channels, height, width)}


def _sized_images(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Images (batch, channels, height, width), or in tiles (batch, tiles, channels, height, width); their sizes."""
    channels, height, width = _image_shape(_tower(model, "image"))
    pinpoints = _find(model.config, "image_grid_pinpoints")
    if pinpoints is None:
        pixels, size = _noise(model, BATCH, channels, height, width), [height, width]
    else:
        size = min(pinpoints, key=math.prod)
        tiles = 1 + math.prod(size) // (height * width)  # the first shows the whole image
        pixels = _noise(model, BATCH, tiles, channels, height, width)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size] * BATCH)}


def _tiles(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """An image of one tile for each text (batch, 1, tiles, channels, height, width)."""
    config = _tower(model, "image")
    tiles = _find(config, "max_num_tiles")
    mask = torch.eye(tiles, dtype=torch.long)[0].expand(BATCH, 1, -1)
    seen = mask[:, None].expand(-1, LENGTH, -1, -1)
    pixels = _noise(model, BATCH, 1, tiles, *_image_shape(config))
    ids = torch.ones(BATCH, 1, dtype=torch.long)
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask, "cross_attention_mask": seen}


def _packed_patches(pixels: str, grid: str) -> Maker:
    def make(model: PreTrainedModel, inputs: Inputs) -> Inputs:
        """The patches of all images in one row (patches, values), and the grid of each (batch, 3)."""
        config = _tower(model, "image")
        depth, merged = _find(config, "temporal_patch_size", default=1), _find(config, "spatial_merge_size", default=1)
        side = SIDE * merged
        values = _image_shape(config)[0] * depth * _find(config, "patch_size") ** 2
        return {pixels: _noise(model, BATCH * side**2, values), grid: torch.tensor([[1, side, side]] * BATCH)}

    return make


def _patches(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """The patches of each image (batch, patches, values), and how many there are along its sides."""
    config = _tower(model, "image")
    values = _image_shape(config)[0] * _find(config, "patch_size") ** 2
    return {
        "pixel_values": _noise(model, BATCH, SIDE**2, values),
        "pixel_attention_mask": torch.ones(BATCH, SIDE**2, dtype=torch.long),
        "spatial_shapes": torch.tensor([[SIDE, SIDE]] * BATCH),
    }


# ---- Sound ----


def _spectrogram(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Spectrograms, (batch, bins, length) where a convolution along time reads them, else (batch, length, bins)."""
    config = _tower(model, "audio")
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "feature_size")
    bins = _find(config, *names, default=80)
    by_time = _find(config, "num_mel_bins") is not None and any(
        isinstance(module, nn.Conv1d) and module.in_channels == bins for module in model.modules()
    )
    # Convolutions over time halve the length to that of a table of positions.
    length = 2 * _find(config, "max_source_positions", default=50) if by_time else 100
    features = _noise(model, BATCH, bins, length) if by_time else _noise(model, BATCH, length, bins)
    mask = torch.ones(BATCH, length, dtype=torch.long)
    return {"input_features": features, "input_features_mask": mask, "feature_attention_mask": mask}


def _waveform(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Sound (batch, samples), or spectrograms (batch, length, bins) for a model with a number of bins."""
    config = _tower(model, "audio")
    bins, length = _find(config, "num_mel_bins"), _find(config, "max_length")
    if bins is not None and length is not None:
        return {"input_values": _noise(model, BATCH, length, bins)}
    return {"input_values": _noise(model, BATCH, LENGTH * math.prod(_find(config, "conv_stride", default=[400])))}


# ---- Series ----


def _series(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """The past of series (batch, length) or (batch, length, channels)."""
    config = model.config
    length, channels = config.context_length, _find(config, "num_input_channels", "input_size", default=1)
    past = length + max(_find(config, "lags_sequence", default=[0]))
    future = _find(config, "prediction_length", default=1)
    several = [channels] if hasattr(config, "num_input_channels") or channels > 1 else []
    times = _find(config, "num_time_features", default=0)
    return {
        "past_values": _noise(model, BATCH, past, *several),
        "past_values_padding": torch.zeros(BATCH, past, dtype=torch.long),
        "freq": torch.zeros(BATCH, 1, dtype=torch.long),
        "past_time_features": _noise(model, BATCH, past, times),
        "past_observed_mask": torch.ones(BATCH, past, *several),
        "future_values": _noise(model, BATCH, future, *several),
        "future_time_features": _noise(model, BATCH, future, times),
    }


# ---- Text ----


def _tokens(config: PreTrainedConfig, special: set[int]) -> Tensor:
    """Tokens (batch, length) none of which is special."""
    positions = _find(config, "max_position_embeddings", default=-1)
    length = LENGTH if positions < 0 else min(LENGTH, positions)
    ordinary = [token for token in range(min(_find(config, "vocab_size", default=1000), 1000)) if token not in special]
    choice = torch.randint(len(ordinary), (BATCH, length), generator=torch.Generator().manual_seed(0))
    return torch.tensor(ordinary)[choice]


def longest_text(model: PreTrainedModel) -> int:
    """Return the number of tokens that a model has positions for, as far as its config tells."""
    positions = _find(model.config, "max_position_embeddings", default=-1)
    return sys.maxsize if positions < 0 else positions


def _special(*configs: PreTrainedConfig) -> set[int]:
    entries = [entry for config in configs for entry in config.to_dict().items()]
    return {value for name, value in entries if name.endswith(("token_id", "token_index")) and isinstance(value, int)}


def _placeholders(model: PreTrainedModel, inputs: Inputs) -> list[int]:
    """The tokens of one text that give way to features, as many as there are features."""
    tokens = []
    for modality, getter in _getters(model).items():
        token = _find(model.config, f"{modality}_token_id", f"{modality}_token_index")
        known = {name: inputs[name] for name in inspect.signature(getter).parameters if name in inputs}
        if known and token is not None:
            with undisturbed(model):
                features = getter(**known, return_dict=True).pooler_output
            tokens += [token] * (sum(part.numel() // part.shape[-1] for part in features) // BATCH)
    return tokens


def _text(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Tokens (batch, length), or (batch, choices, length), with those that stand for features, and where these are."""
    config = _text_config(model.config, "text_encoder", "encoder", "text_config", "decoder")
    tokens = _tokens(config, _special(config, model.config))
    mask = torch.ones_like(tokens)
    padding = getattr(config, "pad_token_id", None)
    if padding is not None:
        tokens[1, tokens.shape[1] // 2 :] = padding
        mask[1, tokens.shape[1] // 2 :] = 0
    elif not inputs:
        # Without a padding token, sequence classifiers read one sequence at a time.
        tokens, mask = tokens[:1], mask[:1]
    features = torch.tensor(_placeholders(model, inputs), dtype=torch.long).expand(len(tokens), -1)
    made = {
        "input_ids": torch.cat([tokens[:, :1], features, tokens[:, 1:]], dim=1),
        "attention_mask": torch.cat([mask[:, :1], torch.ones_like(features), mask[:, 1:]], dim=1),
    }
    if features.numel():
        made["mm_token_type_ids"] = torch.isin(made["input_ids"], features[0]).long()
    if any(kind.__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values() for kind in type(model).__mro__):
        made = {name: value.unsqueeze(1).repeat(1, CHOICES, 1) for name, value in made.items()}
    return made


def _boxes(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """The boxes in which tokens are on a page (batch, length, 4)."""
    return {"bbox": torch.zeros(*inputs["input_ids"].shape, 4, dtype=torch.long)}


def _decoder_text(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """What the decoder of an encoder-decoder reads (batch, length): the texts swapped, or others."""
    if not model.config.is_encoder_decoder:
        return {}
    config = _text_config(model.config, "decoder", "text_config")
    tokens = (
        inputs["input_ids"] if config is model.config and "input_ids" in inputs else _tokens(config, _special(config))
    )
    return {"decoder_input_ids": tokens.flip(0)}


def _states(name: str) -> Maker:
    def make(model: PreTrainedModel, inputs: Inputs) -> Inputs:
        """What the encoder beside a decoder makes (batch, length, width)."""
        width = _find(model.config, "cross_attention_hidden_size", "hidden_size")
        return {name: _noise(model, BATCH, LENGTH, width)}

    return make


# For each modality, from the parameter of forward that shows how the model reads it, to what makes it.
MODALITIES: tuple[dict[str, Maker], ...] = (
    {
        "aspect_ratio_ids": _tiles,
        "image_grid_thw": _packed_patches("pixel_values", "image_grid_thw"),
        "grid_thw": _packed_patches("hidden_states", "grid_thw"),
        "spatial_shapes": _patches,
        "pixel_attention_mask": _image_lists,
        "pixel_values": _images,
        "pixel_values_videos": _videos,
    },
    {"input_features": _spectrogram, "input_values": _waveform},
    {"past_values": _series},
    {"input_ids": _text},
    {"bbox": _boxes},
    {"decoder_input_ids": _decoder_text},
)
# Inputs that are made only where they are required.
COMPANIONS: dict[str, Maker] = {"image_sizes": _sized_images}
# Inputs that are kept only if more of the model runs with them.
OPTIONAL: dict[str, Maker] = {
    "encoder_hidden_states": _states("encoder_hidden_states"),
    "cross_attention_states": _states("cross_attention_states"),
    "pixel_values_videos": _videos,
}
