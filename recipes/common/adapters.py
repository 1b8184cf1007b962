"""The flags of LoRA, by TRL's names, and the adapter that they ask for."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from hf_sparse import SparsityError


@dataclass(frozen=True)
class AdapterArguments:
    """Whether an adapter is trained beside frozen weights, and which one."""

    use_peft: bool = field(
        default=False,
        metadata={
            "help": "Train a LoRA adapter beside frozen weights, which then take no gradients and no optimizer state."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Its scale, in units of the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of its inputs."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to put it beside, such as q_proj v_proj. Default: all linear ones."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Layers to train as a whole, such as a head."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale it by the root of the rank instead."})
    use_dora: bool = field(default=False, metadata={"help": "Learn sizes and directions of weights apart."})


def with_adapter(model: PreTrainedModel, arguments: AdapterArguments) -> Any:
    """Put the adapter that is asked for into a model, in place; returns it in peft's wrapper, if there is one.

    Raises:
        SparsityError: peft is missing, or cannot make that adapter.
    """
    if not arguments.use_peft:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise SparsityError("--use_peft needs peft: `pip install peft`") from None
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=arguments.lora_r,
                lora_alpha=arguments.lora_alpha,
                lora_dropout=arguments.lora_dropout,
                target_modules=arguments.lora_target_modules or "all-linear",
                modules_to_save=arguments.lora_modules_to_save,
                use_rslora=arguments.use_rslora,
                use_dora=arguments.use_dora,
            ),
        )
    except ValueError as error:
        raise SparsityError(f"no adapter can be put into the model: {' '.join(str(error).split())}") from None
