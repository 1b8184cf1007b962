"""Count the bytes of a model by part, so that people see where they are: embeddings, attention, FFN, norms, head."""

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.structure.blocks import ModelStructure

PARTS = ("embeddings", "attention", "ffn", "experts", "norms", "head", "other")
"""In the order of a forward. A weight that is tied counts once, where it is first."""


def bytes_by_part(model: PreTrainedModel, structure: ModelStructure) -> dict[str, int]:
    """Count the bytes of the weights by part; parts without any are left out.

    Args:
        model: the one that the structure was found in, or what is left of it: weights keep their names.
        structure: tells which weights are those of attention, FFN and experts.
    """
    kinds: dict[str, str] = {}
    for block in structure.blocks:
        owners = {block.name, block.output, *(piece.parameter.rpartition(".")[0] for piece in block.slices)}
        kinds |= dict.fromkeys(owners, block.kind)
    inside = {id(module) for module in _embeddings(model)}
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    counts = dict.fromkeys(PARTS, 0)
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        if path in kinds:
            part = kinds[path]
        elif isinstance(module, nn.Embedding) or id(module) in inside:
            part = "embeddings"
        elif not f"{path}.".startswith(prefix):
            part = "head"
        elif all(parameter.ndim == 1 for parameter in module.parameters(recurse=False)):
            part = "norms"  # nothing but vectors: a scale, and a shift
        else:
            part = "other"
        counts[part] += sum(parameter.numel() * parameter.element_size() for parameter in own)
    return {part: count for part, count in counts.items() if count}


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """List the modules that turn inputs into states, which need not be of the class of embeddings."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # there are several, such as those of texts and of images
        return []
    return list(embedding.modules()) if embedding is not None else []
