"""The recipes for images, end to end on tiny models and folders of images, and what goes wrong in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_classification
import numpy as np
import pytest
import semantic_segmentation
from common import images
from common.running import load_data
from launching import forks
from PIL import Image
from recipe_runs import SHORT, mistake, start
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

RECIPES = {
    "image_classification": image_classification.ImageClassification,
    "semantic_segmentation": semantic_segmentation.SemanticSegmentation,
}
SIZE = 32
COLORS = {"amber": (255, 180, 0), "blue": (30, 30, 255)}
Folder = Callable[[Path, int], Path]


def picture(color: tuple[int, int, int], generator: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Noise with a square of a color, and where that is: 1 for amber, 2 for blue."""
    pixels = generator.integers(0, 90, (SIZE, SIZE, 3)).astype(np.uint8)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    top, left = generator.integers(0, SIZE // 2, 2)
    place = slice(top, top + SIZE // 2), slice(left, left + SIZE // 2)
    pixels[place], mask[place] = color, 1 + list(COLORS.values()).index(color)
    return Image.fromarray(pixels), Image.fromarray(mask)


def classes(folder: Path, count: int) -> Path:
    """A folder of images for each of two colors; below test_dir none is labelled."""
    generator = np.random.default_rng(count)
    for number in range(count):
        name = list(COLORS)[number % 2]
        path = folder / ("" if folder.name == "test_dir" else name) / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(COLORS[name], generator)[0].save(path)
    return folder


def annotated(folder: Path, count: int) -> Path:
    """Images with their annotations, below test_dir without."""
    generator = np.random.default_rng(count)
    folder.mkdir()
    lines = []
    for number in range(count):
        made = picture(list(COLORS.values())[number % 2], generator)
        names = f"{number:03}.png", f"{number:03}_mask.png"
        for name, one in zip(names, made if folder.name != "test_dir" else made[:1]):
            one.save(folder / name)
        lines.append(json.dumps(dict(zip(("file_name", "annotation_file_name"), names))))
    if folder.name != "test_dir":  # datasets would leave a metadata.csv open
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def vit(directory: Path) -> Path:
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 64}
    config = ViTConfig(image_size=SIZE, patch_size=8, initializer_range=0.1, **shape)
    ViTForImageClassification(config).save_pretrained(directory)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(directory)
    return directory


def segformer(directory: Path) -> Path:
    shape = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [4, 4]}
    stages = {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    config = SegformerConfig(**shape, **stages, decoder_hidden_size=32, initializer_range=0.1)
    SegformerForSemanticSegmentation(config).save_pretrained(directory)
    SegformerImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(directory)
    return directory


FOLDERS: dict[str, Folder] = {"image_classification": classes, "semantic_segmentation": annotated}
MODELS = {"image_classification": vit, "semantic_segmentation": segformer}


def flags_of(name: str, directory: Path, counts: tuple[int, int, int] = (64, 16, 5)) -> dict[str, object]:
    """Those of run_image_classification's documented command, and a few more."""
    dirs = ("train_dir", "validation_dir", "test_dir")
    return {
        **SHORT,
        **{f"--{each}": FOLDERS[name](directory / each, count) for each, count in zip(dirs, counts)},
        "--model_name_or_path": MODELS[name](directory / "tiny"),
        "--output_dir": directory / "out",
        "--remove_unused_columns": False,
        "--do_train": None,
        "--do_eval": None,
        "--learning_rate": 2e-3,
        "--num_train_epochs": 5,
        "--per_device_train_batch_size": 8,
        "--per_device_eval_batch_size": 8,
        "--logging_strategy": "steps",
        "--logging_steps": 10,
        "--eval_strategy": "epoch",
        "--save_strategy": "epoch",
        "--load_best_model_at_end": True,
        "--save_total_limit": 3,
        "--seed": 1337,
        "--dense_epochs": 2,
        "--do_predict": None,
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_resumes_predicts_and_loads_in_a_fresh_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, flags, out = RECIPES[name], flags_of(name, tmp_path), tmp_path / "out"
    if name == "semantic_segmentation":
        (tmp_path / "names.json").write_text(json.dumps({"0": "ground", "1": "amber", "2": "blue"}))
        flags["--id2label"] = tmp_path / "names.json"
    assert start(task, flags, monkeypatch) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["origin"]["task"] == task.pipeline_tag
    assert abs(report["achieved"] - 0.5) <= 0.05 and report["max_abs_diff"] <= 1e-4
    results = json.loads((out / "all_results.json").read_text())
    assert {f"eval_{metric.name}" for metric in task.metrics} <= set(results)
    assert results[f"eval_{task.metrics[-1].name}"] > 0.7
    weights = (out / "model.safetensors").read_bytes()
    assert start(task, {**flags, "--resume_from_checkpoint": "auto"}, monkeypatch) == 0
    assert (out / "model.safetensors").read_bytes() == weights

    code = (
        "import hf_sparse, json, sys, numpy as np\n"
        "from transformers import pipeline\n"
        "found = pipeline(sys.argv[1], sys.argv[2], device='cpu')(sys.argv[3])\n"
        "print(json.dumps([[one['label'], int(np.sum(np.array(one.get('mask', 0)) > 0))] for one in found]))\n"
    )
    shown = tmp_path / "test_dir/000.png"
    printed = forks().run("-c", code, task.pipeline_tag, out, shown)
    assert printed.returncode == 0, printed.stderr
    fresh = json.loads(printed.stdout)
    if name == "image_classification":
        header, *lines = (out / "predict_results.txt").read_text().splitlines()
        assert header == "index\tprediction" and len(lines) == 5 and lines[0] == f"0\t{fresh[0][0]}"
    else:
        masks = [np.array(Image.open(out / f"predict_masks/{index}.png")) for index in range(5)]
        assert {label: count for label, count in fresh} == {
            ["ground", "amber", "blue"][number]: count
            for number, count in zip(*np.unique(masks[0], return_counts=True))
        }
    usage = (out / "README.md").read_text()
    assert f'pipeline("{task.pipeline_tag}", model=model, image_processor=image_processor)("picture.png")' in usage


def spoil(path: str, content: bytes = b"no image") -> Callable[[Path], None]:
    return lambda directory: (directory / path).write_bytes(content) and None


def draw(path: str, size: int = SIZE, mode: str = "L", pixel: Any = 0) -> Callable[[Path], None]:
    return lambda directory: Image.new(mode, (size, size), pixel).save(directory / path)


def rename(folder: str, new: str) -> Callable[[Path], None]:
    return lambda directory: (directory / folder).rename(directory / new) and None


def names(*numbers: int) -> Callable[[Path], None]:
    return lambda directory: (directory / "names.json").write_text(json.dumps({n: str(n) for n in numbers})) and None


def nothing(directory: Path) -> None: ...


CLASSES, PIXELS = RECIPES
NAMED = {"--id2label": "names.json"}


@pytest.mark.parametrize(
    ("name", "change", "flags", "message"),
    [
        (CLASSES, nothing, {"--train_dir": "nowhere"}, "--train_dir nowhere: there is no such folder"),
        (CLASSES, nothing, {"--train_file": "train.csv"}, "both --train_dir and --train_file are given"),
        (CLASSES, nothing, {"--train_dir": "tiny"}, "--train_dir tiny"),
        (CLASSES, nothing, {"--image_column_name": "img"}, "the train data has no column 'img', only image, label"),
        (CLASSES, nothing, {"--train_val_split": 1}, "a share of 1 cannot be validated on"),
        (CLASSES, spoil("train_dir/blue/003.png"), {}, "blue/003.png is no image that can be decoded"),
        (CLASSES, rename("validation_dir/blue", "validation_dir/red"), {}, "that the training data lacks: red"),
        (PIXELS, spoil("validation_dir/001_mask.png"), {}, "001_mask.png is no image that can be decoded"),
        (PIXELS, draw("train_dir/001_mask.png", size=9), {}, "row 2 of the train data has an image of (32, 32)"),
        (PIXELS, draw("train_dir/001_mask.png", mode="RGB"), {}, "3 channels"),
        (PIXELS, draw("train_dir/001_mask.png", mode="I;16", pixel=700), {}, "numbers from 700 to 700: give 0 to 255"),
        (PIXELS, draw("validation_dir/001_mask.png", pixel=9), {}, "a pixel of class 9, and there are 3 classes"),
        (PIXELS, nothing, NAMED, "--id2label names.json cannot be read"),
        (PIXELS, names(0, 2), NAMED, "does not name all numbers from 0 on"),
        (PIXELS, names(0), NAMED, "there are 1 classes"),
        (PIXELS, vit, {"--tokenizer_name": "."}, "does not process annotations"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str,
    change: Callable[[Path], None],
    flags: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = flags_of(name, tmp_path, (9, 6, 3)) | flags
    change(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert message in mistake(RECIPES[name], given, monkeypatch, capsys)


def test_an_image_that_is_read_later_is_said_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_of(CLASSES, tmp_path, (9, 6, 3))
    monkeypatch.setattr(images, "CHECKED", 1)
    spoil("train_dir/blue/003.png")(tmp_path)
    assert start(RECIPES[CLASSES], flags, monkeypatch) == 2
    assert "blue/003.png is no image that can be decoded" in capsys.readouterr().err


def test_rows_may_name_paths_and_a_share_of_them_validates(tmp_path: Path) -> None:
    paths = sorted(classes(tmp_path / "all", 40).glob("*/*.png"))
    lines = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in paths]
    (tmp_path / "rows.csv").write_text("\n".join(["image,label", *lines]) + "\n")
    arguments = image_classification.Arguments(
        train_file=str(tmp_path / "rows.csv"), train_val_split=0.25, max_train_samples=20
    )
    task = RECIPES[CLASSES](arguments)
    data = load_data(task, seed=0)
    assert data.labels == ("amber", "blue")
    assert (len(data.splits["train"]), len(data.splits["validation"])) == (20, 10)
    assert len(set(data.splits["train"]["label"])) == 2
    files = [{row["image"]["path"] for row in rows} for rows in data.splits.values()]
    assert not files[0] & files[1] and files[0] | files[1] <= set(map(str, paths))


def test_an_image_and_its_annotation_are_changed_alike() -> None:
    numbers = np.arange(600, dtype=np.int32).reshape(20, 30)
    sizes, mirrored = set(), set()
    for _ in range(50):
        one, other = images.changed_at_random([Image.fromarray(numbers), Image.fromarray(numbers + 1)])
        pixels = np.array(one)
        assert (np.array(other) == pixels + 1).all()
        mirrored.add(pixels.shape[1] > 1 and bool(pixels[0, 0] > pixels[0, -1]))
        sizes.add(pixels.shape)
        straight = pixels[:, ::-1] if pixels[0, 0] > pixels[0, -1] else pixels
        assert (np.diff(straight, axis=1) == 1).all() and (np.diff(straight, axis=0) == 30).all()
    assert len(sizes) > 20 and mirrored == {True, False}


def test_reduced_labels_begin_with_1() -> None:
    task = RECIPES[PIXELS](semantic_segmentation.Arguments(do_reduce_labels=True))
    assert task._numbers(Image.fromarray(np.array([[0, 1, 3, 255]], np.uint8))).tolist() == [[255, 0, 2, 255]]
