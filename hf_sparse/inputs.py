"""Example inputs for a model, made from its config."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.errors import SparsityError

BATCH, LENGTH = 2, 16


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Random token ids with one padded sequence, on the model's device: the inputs of any text model.

    Raises:
        SparsityError: the model does not read text.
    """
    name = model.main_input_name
    if name != "input_ids":
        raise SparsityError(f"{type(model).__name__} reads {name}, not text: pass a batch of your data as `inputs`")
    config = model.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH))
    special = {config.pad_token_id, config.eos_token_id if isinstance(config.eos_token_id, int) else None}
    ordinary = [token for token in range(min(config.vocab_size, 1000)) if token not in special]
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(len(ordinary), (BATCH, length), generator=generator)
    tokens = torch.tensor(ordinary)[choice]
    mask = torch.ones_like(tokens)
    if config.pad_token_id is None:
        # Without a padding token, sequence classifiers read one sequence at a time.
        tokens, mask = tokens[:1], mask[:1]
    else:
        tokens[1, length // 2 :] = config.pad_token_id
        mask[1, length // 2 :] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(0)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}
