"""Pruned models written as ONNX compute in onnxruntime, on batches and texts of any size, what they do in torch."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from pruning import MODELS, bert, learnt
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, ViTConfig, ViTForImageClassification

from hf_sparse import SparsityError, compact, export_onnx, save_pruned
from hf_sparse.cli import main
from hf_sparse.export.onnx_runtime import WholeModel


def vit() -> ViTForImageClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()


@pytest.mark.parametrize("make", [*MODELS.values(), vit], ids=lambda make: make.__name__)
def test_onnxruntime_computes_the_same_on_other_sizes(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = make()
    compact(learnt(model))
    save_pruned(model, tmp_path / "pruned")
    assert export_onnx(tmp_path / "pruned", tmp_path / "onnx", cache=False) <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (5, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:3, 7:] = 0
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": ids.flip(1),
        "decoder_attention_mask": mask,
        "pixel_values": torch.randn(5, 3, 32, 32, generator=generator),
    }
    given = {one.name: batch[one.name] for one in session.get_inputs()}
    with torch.no_grad():
        expected = model(**given).logits.numpy()
    found = session.run(["logits"], {name: value.numpy() for name, value in given.items()})[0]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decoder_generates_with_its_cache(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    compact(learnt(model))
    save_pruned(model, tmp_path / "pruned")
    assert export_onnx(tmp_path / "pruned", tmp_path / "onnx") <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    shapes = {one.name: one.shape for one in session.get_inputs()}
    ids, mask = np.arange(5, 13).reshape(2, 4), np.ones((2, 4), dtype=np.int64)
    mask[1, :1] = 0  # padding on the left
    expected = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        do_sample=False,
        max_new_tokens=5,
        eos_token_id=None,
    )
    past = {name: np.zeros((2, heads, 0, width), np.float32) for name, (_, heads, _, width) in _caches(shapes)}
    found, new = ids, ids
    for _ in range(5):
        positions = (mask.cumsum(1) - 1).clip(0)[:, -new.shape[1] :]
        logits, *cache = session.run(
            None, {"input_ids": new, "attention_mask": mask, "position_ids": positions, **past}
        )
        past = dict(zip(past, cache))
        new = logits[:, -1].argmax(-1)[:, None]
        found, mask = np.concatenate([found, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
    assert np.array_equal(found, expected.numpy())


def _caches(shapes: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, shape) for name, shape in shapes.items() if name.startswith("past_key_values.")]


def test_a_cache_that_forgets_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    save_pruned(MistralForCausalLM(config), tmp_path / "model")
    with pytest.raises(SparsityError, match=r"layer 0 of its cache is a DynamicSlidingWindowLayer.*give --no_cache"):
        export_onnx(tmp_path / "model", tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_onnxruntime_computes_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pruned(bert(), tmp_path / "model")
    with pytest.raises(SparsityError, match="the checkpoint itself"):
        export_onnx(tmp_path / "model", tmp_path / "model")
    monkeypatch.setattr(WholeModel, "write", lambda self, path: None)
    monkeypatch.setattr(WholeModel, "differences", lambda self, path: [1e-6, float("nan")])
    with pytest.raises(SparsityError, match="onnxruntime computes something else"):
        export_onnx(tmp_path / "model", tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command_copies_the_tokenizer_and_says_what_is_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pruned(bert(), tmp_path / "model")
    for name in ("tokenizer.json", "report.html"):
        (tmp_path / "model" / name).write_text("{}")
    monkeypatch.setattr(WholeModel, "write", lambda self, path: path.write_bytes(b""))
    monkeypatch.setattr(WholeModel, "differences", lambda self, path: [1e-6])
    main(["onnx", str(tmp_path / "model"), str(tmp_path / "onnx")])
    assert "within 1.0e-06 of torch" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"model.onnx", "tokenizer.json"}

    monkeypatch.undo()
    monkeypatch.setattr(WholeModel, "write", lambda self, path: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit):
        main(["onnx", str(tmp_path / "model"), str(tmp_path / "other")])
    error = capsys.readouterr().err
    assert "pip install 'hf_sparse[onnx]'" in error and error.count("error:") == 1
