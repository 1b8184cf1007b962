"""Rewrite a pruned decoder for serving engines that read `architectures: ["AnyModel"]`, such as vLLM's."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import CONFIG_NAME

from hf_sparse.checkpoint.card import CARD
from hf_sparse.checkpoint.inspection import inspect_checkpoint, read_config, tensor_names
from hf_sparse.errors import SparsityError
from hf_sparse.modeling_hf_sparse import MODEL_TYPE_PREFIX, TABLE_SWITCHES
from hf_sparse.report.page import PAGE
from hf_sparse.runtime.files import replaced_directory
from hf_sparse.structure.attribute_names import ANYMODEL_ARCHITECTURES
from hf_sparse.structure.stock import OWN_ENTRIES


def export_anymodel(directory: str | Path, output: str | Path) -> None:
    """Copy a pruned checkpoint for engines that build every layer by its own sizes.

    The config of the copy is that of the stock model type, with `architectures: ["AnyModel"]`, `base_architecture`, and
    the sizes of every layer in `block_configs`. The weights are the same files. Heads that share keys and values are
    removed together, so query heads differ between layers as well, which `anymodel_arch_info` records.

    Args:
        directory: of the pruned checkpoint.
        output: another directory, for the copy.

    Raises:
        SparsityError: there is no pruned checkpoint, or its sizes cannot be described that way.
    """
    source = Path(directory)
    entries = read_config(source / CONFIG_NAME)
    inspect_checkpoint(source)
    architecture = entries.get("base_architecture")
    if not entries["model_type"].startswith(MODEL_TYPE_PREFIX):
        raise SparsityError(f"{source} is a stock checkpoint: engines load it as it is")
    if architecture not in ANYMODEL_ARCHITECTURES:
        known = ", ".join(ANYMODEL_ARCHITECTURES)
        raise SparsityError(f"{architecture} is not an architecture that AnyModel has layers of: it has {known}")
    recipe = entries["hf_sparse"]
    for key in ("selections", "padded"):
        if recipe[key]:
            raise SparsityError(f"{source} has {key} in its recipe, which AnyModel cannot describe")
    if not recipe["shapes"]:
        # By its stock model type transformers would load it, and make up what is missing.
        raise SparsityError(
            f"{source} has only lost whole sublayers: a copy would load with random ones in their place"
        )
    if Path(output).resolve() == source.resolve():
        raise SparsityError(f"{output} is the checkpoint itself: give another directory")
    biases = [f"{removal['output']}.bias" for removal in recipe["removed"].values()]
    if any(name.endswith(bias) for name in tensor_names(source) for bias in biases):
        raise SparsityError(f"{source} keeps the bias of a removed sublayer, which AnyModel cannot describe")
    try:
        # The latter is what loading a checkpoint of an earlier version and saving it again makes of the former.
        table = entries.get("per_layer_config") or entries["layer_sizes"]
        layers = {int(index): dict(sizes) for index, sizes in table.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SparsityError(f"{source} has no per_layer_config that is a table by layer ({error!r})") from None
    stock = {name: value for name, value in entries.items() if name not in _OWN}
    model_type = entries["base_model_type"]
    if model_type not in CONFIG_MAPPING_NAMES:
        raise SparsityError(f"{source} has base_model_type {model_type!r}, which transformers does not know")
    blocks = [_block({**stock, **layers.get(index, {})}) for index in range(entries["num_hidden_layers"])]
    if any(block["attention"].get("num_key_value_heads", 1) > entries["num_key_value_heads"] for block in blocks):
        raise SparsityError(f"{source} has kv heads in its per_layer_config that the model never had: prune it again")
    rewritten = {
        **stock,
        "model_type": model_type,
        "architectures": ["AnyModel"],
        "base_architecture": architecture,
        "block_configs": blocks,
        "anymodel_arch_info": {**ANYMODEL_ARCHITECTURES[architecture], "extra_config_fields": _EXTRA_FIELDS},
    }
    with replaced_directory(Path(output)) as target:
        for file in source.iterdir():
            # Card and page explain how transformers loads the checkpoint; transformers cannot load the copy.
            if file.is_file() and file.suffix not in (".py", ".bin") and file.name not in (CONFIG_NAME, CARD, PAGE):
                shutil.copy2(file, target / file.name)
        (target / CONFIG_NAME).write_text(json.dumps(rewritten, indent=2) + "\n")


_OWN = (*OWN_ENTRIES, *TABLE_SWITCHES, "model_type", "architectures", "per_layer_config")
_EXTRA_FIELDS = {"attention.num_attention_heads": "num_attention_heads"}


def _block(sizes: dict[str, Any]) -> dict[str, Any]:
    """Describe a layer for AnyModel by its sizes."""
    skip = sizes.get("skip", ())
    attention: dict[str, Any] = {"no_op": "attention" in skip}
    if not attention["no_op"]:
        attention |= {name: sizes[name] for name in ("num_attention_heads", "num_key_value_heads")}
    ffn: dict[str, Any] = {"no_op": "mlp" in skip}
    if not ffn["no_op"]:
        ffn["intermediate_size"] = sizes["intermediate_size"]
    return {"attention": attention, "ffn": ffn}
