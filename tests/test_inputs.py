"""Example inputs that are made from a config run all of a model, and never break without saying what to do."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    LxmertConfig,
    LxmertModel,
    SegGptConfig,
    SegGptForImageSegmentation,
    TrainingArguments,
)
from zoo import ZOO
from zoo.building import build

from hf_sparse import SparseTrainer, SparsityConfig, SparsityError, discover
from hf_sparse.structure.example_inputs import example_inputs

# One of every way to read: texts, pairs, images, videos, patches, sound, spectrograms, series, pages, several at once.
KINDS = (
    "bert",
    "t5",
    "vit",
    "videomae",
    "siglip2_vision_model",
    "wav2vec2",
    "whisper",
    "time_series_transformer",
    "layoutlm",
    "llava_next",
    "qwen2_5_vl",
    "vision-encoder-decoder",
)


@pytest.mark.parametrize("name", KINDS)
def test_all_projections_run_on_them(name: str) -> None:
    model = ZOO[name].make()
    called = set()
    # But for those inside of torch's own attention, which reads their weights.
    projections = {path for path, module in model.named_modules() if type(module) is torch.nn.Linear}
    for path in projections:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path))
    inputs = example_inputs(model)
    called.clear()
    with torch.no_grad():
        model(**inputs)
    assert called == projections
    assert all(tensor.device == model.device for tensor in inputs.values())


def test_they_are_the_same_each_time_and_leave_the_random_state() -> None:
    model = ZOO["llava"].make()
    state = torch.get_rng_state()
    one, other = example_inputs(model), example_inputs(model)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_second_text_is_padded() -> None:
    inputs = example_inputs(ZOO["bert"].make())
    mask = inputs["attention_mask"]
    assert mask[0].all() and not mask[1].all()
    assert (inputs["input_ids"][1][mask[1] == 0] == 0).all()


def test_images_take_the_place_of_as_many_tokens() -> None:
    inputs = example_inputs(ZOO["llava"].make())
    assert (inputs["input_ids"] == 90).sum(1).tolist() == [16, 16]


def test_what_cannot_be_made_up_is_asked_for() -> None:
    model = LxmertModel(LxmertConfig(vocab_size=99, hidden_size=32, num_attention_heads=4, intermediate_size=40))
    with pytest.raises(
        SparsityError, match=r"LxmertModel reads .*visual_feats.*pass a batch of your data as `inputs=`"
    ):
        discover(model)
    features = {"visual_feats": torch.randn(2, 5, 2048), "visual_pos": torch.rand(2, 5, 4)}
    assert discover(model, {"input_ids": torch.randint(5, 99, (2, 7)), **features}).blocks


def test_the_trainer_takes_a_batch_of_its_data_then(tmp_path) -> None:
    """SegGPT reads a prompt of two images beside the image."""
    config = SegGptConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_dim=40,
        image_size=[32, 16],
        patch_size=8,
        pretrain_image_size=16,
        decoder_hidden_size=8,
        intermediate_hidden_state_indices=[0, 1],
        merge_index=0,
        drop_path_rate=0.0,
    )
    model = SegGptForImageSegmentation(config)
    with pytest.raises(SparsityError, match="prompt_"):
        discover(model)
    image = np.random.default_rng(0).standard_normal((3, 16, 16)).astype("float32").tolist()
    rows = {key: [image, image] for key in ("pixel_values", "prompt_pixel_values", "prompt_masks")}
    trainer = SparseTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
        train_dataset=Dataset.from_dict(rows),
        sparsity=SparsityConfig(target=0.5),
    )
    assert {block.kind for block in trainer.bank.structure.blocks} == {"attention", "ffn"}


def test_builds_for_a_model_in_half_precision() -> None:
    model = build("ViTForImageClassification").to(torch.bfloat16)
    assert example_inputs(model)["pixel_values"].dtype == torch.bfloat16
    assert discover(model).blocks
