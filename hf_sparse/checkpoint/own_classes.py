"""Let `TheClass.from_pretrained` load pruned models of a class that is not one of transformers.

Transformers makes such a class from its stock config, without calling hf_sparse. But it has a registry of objects that
may change a model after its skeleton is made and before its weights are loaded: the quantizers. Nothing is quantized
here, and the loaded model is a plain one.
"""

from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_sparse.modeling_hf_sparse import LOADED_BY, check_recipe, model_class, resize_

if TYPE_CHECKING:  # which is being imported while this is
    from transformers import PreTrainedModel


@register_quantization_config(LOADED_BY["quant_method"])
class ReplayConfig(QuantizationConfigMixin):
    """The entry of config.json which asks for the recipe to be replayed."""

    def __init__(self, quant_method: str = LOADED_BY["quant_method"]) -> None:
        self.quant_method: Any = quant_method


@register_quantizer(LOADED_BY["quant_method"])
class Replay(HfQuantizer):
    """Replays the recipe of a pruned model on the skeleton of its class."""

    def preprocess_model(self, model: "PreTrainedModel", dtype: Any = None, **kwargs: Any) -> None:
        """Give a model without weights the shapes of its recipe, in place.

        Raises:
            ValueError: the recipe is not one, or does not fit the model.
        """
        # Not at the top, since that needs transformers' models, which need this file.
        from hf_sparse.compaction.pruned_config import become_

        config: Any = model.config
        check_recipe(config.hf_sparse, config.to_dict())
        become_(model, model_class(type(model), config.base_model_type))
        resize_(model.base_model, config.hf_sparse)

    def postprocess_model(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        """Remove the traces of this quantizer from the model, in place."""
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        """Return True: the model may be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model may be trained."""
        return True
